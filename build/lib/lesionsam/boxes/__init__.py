"""The two boxes of a lesion: geometry, the box CSV, the simulated annotator and the box prior."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.boxes.annotator import simulate_boxes
    from lesionsam.boxes.geometry import to_model_frame
    from lesionsam.boxes.prior import box_prior, outline_offset
    from lesionsam.boxes.table import read_boxes, write_boxes

__all__ = ["box_prior", "outline_offset", "read_boxes", "simulate_boxes", "to_model_frame", "write_boxes"]
__getattr__, __dir__ = lazy_names(
    __name__,
    annotator="simulate_boxes",
    geometry="to_model_frame",
    prior="box_prior outline_offset",
    table="read_boxes write_boxes",
)

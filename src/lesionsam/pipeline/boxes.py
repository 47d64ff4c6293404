"""Step boxes: index -> the two-box CSV, by the simulated annotator or from the user's own file."""

from __future__ import annotations

from pathlib import Path

from lesionsam.boxes.annotator import annotate
from lesionsam.boxes.table import read_boxes, write_boxes
from lesionsam.config.load import Config
from lesionsam.config.schema import CsvBoxes
from lesionsam.data.index import read_index
from lesionsam.errors import UserError
from lesionsam.pipeline.paths import BOXES, INDEX
from lesionsam.types import SPLITS
from lesionsam.utils.processes import stage_lock


@stage_lock("boxes")
def prepare_boxes(config: Config) -> None:
    """Write data/boxes.csv, checked."""
    index, own = read_index(INDEX), isinstance(config.boxes, CsvBoxes)
    if isinstance(config.boxes, CsvBoxes):
        samples = read_boxes(Path(config.inputs.boxes), index, root=Path())
    else:
        samples = annotate(index, root=Path(), **config.boxes.annotator())
        passed_over = sum(len(entry.get("lesions", ())) for entry in index.values()) - len(samples)
        if passed_over > 0:
            print(
                f"{passed_over} lesions are smaller than boxes.min_area ({config.boxes.min_area} px) and are not used"
            )
    counts = {split: sum(s.split == split for s in samples) for split in SPLITS}
    for split, count in counts.items():
        if not count:
            raise UserError(
                f"{config.inputs.boxes if own else BOXES}: no lesion of split {split!r}; "
                "training, selection and the final report each need at least one"
            )
    BOXES.parent.mkdir(parents=True, exist_ok=True)
    write_boxes(BOXES, samples)
    without = len(index) - len({s.image_id for s in samples})
    print(
        f"{len(samples)} lesions with two boxes: "
        + ", ".join(f"{split} {count}" for split, count in counts.items())
        + (f"; {without} images have no row and are not used" if without else "")
    )

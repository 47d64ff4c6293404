"""Adapt SAM to a domain from two boxes per lesion."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.boxes.prior import box_prior
    from lesionsam.inference.decode import Prediction
    from lesionsam.inference.files import predict_files
    from lesionsam.inference.image import ImagePredictor
    from lesionsam.inference.predictor import Predictor
    from lesionsam.models.checkpoint import load_sam
    from lesionsam.types import Sample

__version__ = "0.1.0"
__all__ = [
    "ImagePredictor",
    "Prediction",
    "Predictor",
    "Sample",
    "__version__",
    "box_prior",
    "load_sam",
    "predict_files",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    boxes__prior="box_prior",
    inference__decode="Prediction",
    inference__files="predict_files",
    inference__image="ImagePredictor",
    inference__predictor="Predictor",
    models__checkpoint="load_sam",
    types="Sample",
)

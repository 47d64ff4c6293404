"""Image and prompt to mask: in Python, over folders, and without a prompt."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.inference.auto import automatic_masks
    from lesionsam.inference.files import predict_files
    from lesionsam.inference.image import ImagePredictor
    from lesionsam.inference.lesion import find_lesions
    from lesionsam.inference.prediction import Prediction
    from lesionsam.inference.predictor import Predictor

__all__ = ["ImagePredictor", "Prediction", "Predictor", "automatic_masks", "find_lesions", "predict_files"]
__getattr__, __dir__ = lazy_names(
    __name__,
    auto="automatic_masks",
    prediction="Prediction",
    files="predict_files",
    image="ImagePredictor",
    lesion="find_lesions",
    predictor="Predictor",
)

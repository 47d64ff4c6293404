"""Find lesions by text: boxes, and masks where the model gives them."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.detection.detectors import Detection, Detector, open_detector

__all__ = ["Detection", "Detector", "open_detector"]
__getattr__, __dir__ = lazy_names(__name__, detectors="Detection Detector open_detector")

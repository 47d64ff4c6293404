"""Configuration to objects to a trained model; configuration stops here."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.experiment.run import Trained, open_data, train

__all__ = ["Trained", "open_data", "train"]
__getattr__, __dir__ = lazy_names(__name__, run="Trained open_data train")

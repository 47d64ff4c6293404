"""Pretraining of the compact SAM on generated shapes."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.pretraining.run import pretrain

__all__ = ["pretrain"]
__getattr__, __dir__ = lazy_names(__name__, run="pretrain")

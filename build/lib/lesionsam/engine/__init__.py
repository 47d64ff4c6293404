"""The data engine: rounds of training, proposing and accepting."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.engine.command import run

__all__ = ["run"]
__getattr__, __dir__ = lazy_names(__name__, command="run")

"""Optuna: the search space, trials, workers, and the comparison of winner and start."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.sweep.search import Request, sweep

__all__ = ["Request", "sweep"]
__getattr__, __dir__ = lazy_names(__name__, search="Request sweep")

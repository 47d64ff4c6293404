"""MLflow: values go to a journal first, and a process of its own sends them."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.tracking.registry import promote, resolve_model
    from lesionsam.tracking.tracker import NullTracker, Tracker, sync

__all__ = ["NullTracker", "Tracker", "promote", "resolve_model", "sync"]
__getattr__, __dir__ = lazy_names(__name__, registry="promote resolve_model", tracker="NullTracker Tracker sync")

"""The training loop, its optimizer, its saved states and its recovery from faults."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.training.loop import fit
    from lesionsam.training.optimizer import Group, Schedule, parameter_groups
    from lesionsam.training.state import Progress

__all__ = ["Group", "Progress", "Schedule", "fit", "parameter_groups"]
__getattr__, __dir__ = lazy_names(__name__, loop="fit", optimizer="Group parameter_groups Schedule", state="Progress")

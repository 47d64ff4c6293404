"""The training loop, its optimizer, its saved states and its recovery from faults."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.training.loop import fit
    from lesionsam.training.optimizer import Group, parameter_groups, schedule_factor
    from lesionsam.training.state import Progress

__all__ = ["Group", "Progress", "fit", "parameter_groups", "schedule_factor"]
__getattr__, __dir__ = lazy_names(
    __name__, loop="fit", optimizer="Group parameter_groups schedule_factor", state="Progress"
)

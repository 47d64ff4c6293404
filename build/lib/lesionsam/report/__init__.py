"""The HTML report, the model card and the comparison of runs."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.report.card import build_card
    from lesionsam.report.comparison import compare
    from lesionsam.report.page import build_report

__all__ = ["build_card", "build_report", "compare"]
__getattr__, __dir__ = lazy_names(__name__, card="build_card", comparison="compare", page="build_report")

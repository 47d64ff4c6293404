"""Masks to tables: per image, by stratum, with intervals and baselines."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.evaluation.baselines import evaluate_baselines
    from lesionsam.evaluation.columns import Evaluation
    from lesionsam.evaluation.evaluate import evaluate_model
    from lesionsam.evaluation.selection import quick_evaluate
    from lesionsam.evaluation.tables import write_results

__all__ = ["Evaluation", "evaluate_baselines", "evaluate_model", "quick_evaluate", "write_results"]
__getattr__, __dir__ = lazy_names(
    __name__,
    baselines="evaluate_baselines",
    columns="Evaluation",
    evaluate="evaluate_model",
    selection="quick_evaluate",
    tables="write_results",
)

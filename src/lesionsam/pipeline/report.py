"""Step report: results and training -> one HTML page that opens offline, and the model card."""

from __future__ import annotations

from pathlib import Path

from lesionsam.pipeline.paths import ADAPTED, REPORT, RESULTS
from lesionsam.report.card import build_card
from lesionsam.report.page import build_report
from lesionsam.tracking.lineage import lineage_tags
from lesionsam.utils.processes import stage_lock


@stage_lock("report")
def write_report() -> None:
    """Write report/index.html and report/model_card.md."""
    page, card = REPORT / "index.html", REPORT / "model_card.md"
    REPORT.mkdir(exist_ok=True)
    commit = lineage_tags(Path.cwd()).get("mlflow.source.git.commit")
    size = build_report(RESULTS, ADAPTED, page, commit=commit)
    build_card(RESULTS, ADAPTED, card, commit=commit)
    print(f"{page} ({size / 1e6:.1f} MB), {card}")

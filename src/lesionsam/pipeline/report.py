"""Step report: results and training -> one HTML page that opens offline, and the model card."""

from __future__ import annotations

from pathlib import Path

from lesionsam.config.load import Config
from lesionsam.pipeline.paths import ADAPTED, REPORT, RESULTS
from lesionsam.report.card import build_card
from lesionsam.report.page import build_report
from lesionsam.tracking.lineage import lineage_tags, repository_root
from lesionsam.tracking.tracker import Tracker
from lesionsam.utils.processes import stage_lock


@stage_lock("report")
def write_report(config: Config) -> None:
    """Write report/index.html and report/model_card.md, and add them to the run that trained the model."""
    page, card = REPORT / "index.html", REPORT / "model_card.md"
    REPORT.mkdir(exist_ok=True)
    commit = lineage_tags(Path.cwd()).get("mlflow.source.git.commit")
    size = build_report(RESULTS, ADAPTED, page, commit=commit)
    build_card(RESULTS, ADAPTED, card, commit=commit)
    if config.tracking.enabled and (ADAPTED / "run.json").is_file():
        with Tracker.reopen(
            ADAPTED,
            uri=config.tracking.uri,
            experiment=config.tracking.experiment,
            root=repository_root(Path.cwd()),
            stage="report",
        ) as tracker:
            tracker.log_artifact(REPORT, "report")
    print(f"{page} ({size / 1e6:.1f} MB), {card}")

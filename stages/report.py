"""Stage report: results and training -> one HTML page that opens offline, and the model card."""

from __future__ import annotations

from pathlib import Path

from lesionsam.errors import run_guarded
from lesionsam.report.card import build_card
from lesionsam.report.page import build_report
from lesionsam.tracking.lineage import lineage_tags
from lesionsam.utils.processes import stage_lock


def main() -> None:
    """Build report/index.html and report/model_card.md."""
    output = Path("report/index.html")
    output.parent.mkdir(exist_ok=True)
    results, training = Path("results"), Path("models/adapted")
    commit = lineage_tags(Path.cwd()).get("mlflow.source.git.commit")
    size = build_report(results, training, output, commit=commit)
    build_card(results, training, output.with_name("model_card.md"), commit=commit)
    print(f"{output} ({size / 1e6:.1f} MB), {output.with_name('model_card.md')}")


if __name__ == "__main__":
    run_guarded(stage_lock("report")(main))

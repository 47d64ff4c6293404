"""Stage report: results and training -> one HTML page that opens offline."""

from __future__ import annotations

from pathlib import Path

from lesionsam.errors import run_guarded
from lesionsam.lineage import lineage_tags
from lesionsam.report import build_report


def main() -> None:
    """Build report/index.html."""
    output = Path("report/index.html")
    output.parent.mkdir(exist_ok=True)
    size = build_report(
        Path("results"), Path("models/adapted"), output, commit=lineage_tags(Path.cwd()).get("mlflow.source.git.commit")
    )
    print(f"{output} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_guarded(main)

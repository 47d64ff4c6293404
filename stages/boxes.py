"""Stage boxes: index -> the two-box CSV, by the simulated annotator or from the user's own file."""

from __future__ import annotations

from lesionsam.config.load import load_config
from lesionsam.errors import run_guarded
from lesionsam.pipeline.boxes import prepare_boxes


def main() -> None:
    """Make the boxes as params.yaml says."""
    prepare_boxes(load_config())


if __name__ == "__main__":
    run_guarded(main)

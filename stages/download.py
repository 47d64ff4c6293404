"""Stage download: parameters -> images and masks of the chosen source, and data/raw/index.csv."""

from __future__ import annotations

from lesionsam.config.load import load_config
from lesionsam.errors import run_guarded
from lesionsam.pipeline.download import prepare_data


def main() -> None:
    """Fetch the data as params.yaml says."""
    prepare_data(load_config())


if __name__ == "__main__":
    run_guarded(main)

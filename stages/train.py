"""Stage train: two boxes and a pretrained SAM -> models/adapted/, resumable, tracked."""

from __future__ import annotations

from lesionsam.config.load import load_config
from lesionsam.errors import run_guarded
from lesionsam.pipeline.train import train_model


def main() -> None:
    """Train as params.yaml says."""
    train_model(load_config())


if __name__ == "__main__":
    run_guarded(main)

"""Stage weights: parameters -> models/pretrained/: the checkpoint to start from, verified, and what it is."""

from __future__ import annotations

from lesionsam.config.load import load_config
from lesionsam.errors import run_guarded
from lesionsam.pipeline.weights import prepare_weights


def main() -> None:
    """Fetch the weights as params.yaml says."""
    prepare_weights(load_config())


if __name__ == "__main__":
    run_guarded(main)

"""Stage evaluate: the test split, once: adapted and zero-shot model per prompt source, and what needs no network."""

from __future__ import annotations

from lesionsam.config.load import load_config
from lesionsam.errors import run_guarded
from lesionsam.pipeline.evaluate import evaluate_models


def main() -> None:
    """Evaluate as params.yaml says."""
    evaluate_models(load_config())


if __name__ == "__main__":
    run_guarded(main)

"""Run the steps of `dvc.yaml` as commands, for people without DVC: the same code, the same outputs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lesionsam.cli.examples import EXAMPLES

NOTE = "Without DVC nothing is skipped: `dvc repro` runs only what has changed."


def prepare() -> None:
    """Fetch data and pretrained weights and make the boxes: the first three steps of `dvc repro`."""
    from lesionsam.config.load import load_config
    from lesionsam.pipeline.boxes import prepare_boxes
    from lesionsam.pipeline.download import prepare_data
    from lesionsam.pipeline.weights import prepare_weights

    config = load_config()
    prepare_data(config)
    prepare_boxes(config)
    prepare_weights(config)


def train(
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Train and evaluate with so many seeds: mean, spread, what is noise.")
    ] = 1,
) -> None:
    """Train on what `prepare` has made, or resume a training that was cut short."""
    from lesionsam.config.load import load_config

    if seeds > 1:
        from lesionsam.pipeline.seeds import train_seeds

        print(f"\n{train_seeds(load_config(), seeds)}\nkept in results/seeds.md")
        return
    from lesionsam.pipeline.train import train_model

    train_model(load_config())


def evaluate() -> None:
    """Evaluate the trained and the pretrained model on the test split."""
    print("evaluate: loading", file=sys.stderr, flush=True)  # the libraries take seconds
    from lesionsam.config.load import load_config
    from lesionsam.pipeline.evaluate import evaluate_models

    evaluate_models(load_config())


def report() -> None:
    """Write report/index.html and the model card of the last training and evaluation."""
    from lesionsam.config.load import load_config
    from lesionsam.pipeline.report import write_report

    write_report(load_config())


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (prepare, train, evaluate, report):
        app.command(epilog=f"Example: {EXAMPLES[command.__name__]}. {NOTE}")(command)

"""Commands for what comes after a training: registering its model, giving it away, looking after the set-up."""

from __future__ import annotations

from typing import Annotated

import typer


def add_commands(app: typer.Typer) -> None:
    """Make this module's commands part of `lesionsam`."""
    app.command()(promote)


def promote(
    run: Annotated[str, typer.Option(help="Folder of the train stage, or an MLflow run id.")] = "models/adapted",
    alias: Annotated[str, typer.Option(help="Which name to give this version.")] = "champion",
) -> None:
    """Register a run's model in MLflow with its test table; `--model models:/lesionsam@champion` then means it."""
    from lesionsam.registry import NAME
    from lesionsam.registry import promote as run_promote

    done = run_promote(run, alias=alias)
    score = "" if done.objective is None else f", mean IoU of ring, centre and box {done.objective:.3f}"
    known = "" if done.is_new else ", registered before,"
    print(f"models:/{NAME}@{alias} is version {done.version}{known} of run {done.run_id}{score}")
    if done.previous not in (None, done.version):
        score = "" if done.previous_objective is None else f", {done.previous_objective:.3f}"
        print(f"it was version {done.previous}{score}; models:/{NAME}/{done.previous} still means that one")

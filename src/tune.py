"""`python src/tune.py`: search for better parameters; see `lesionsam.sweep` and section `sweep` of params.yaml."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the code beside this file, installed or not

from lesionsam.errors import run_guarded

DESCRIPTION = """Search the space of params.yaml (sweep.space) for a better objective on the development split.

Trial 0 is params.yaml as it stands. It uses the data, boxes and weights that `dvc repro` prepared. The same command
again goes on where it was; several may share one storage, on one machine or many. Ctrl-C ends it in good order.

Examples: `python src/tune.py --trials 20`, then `python src/tune.py --apply`."""


def tune(
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Finished trials the study shall have in all; unset: 20, or with --apply those that it has.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0, help="No trial starts after so many minutes; 0 = no limit.")] = 0.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine, each with a trial of its own.")] = 1,
    study: Annotated[
        str, typer.Option(help="Name; empty = after what is searched, so that a change starts anew.")
    ] = "",
    storage: Annotated[
        str,
        typer.Option(
            help="Database URL (sqlite:///FILE, postgresql://...) or a journal FILE.log; empty = sweeps/sweeps.db."
        ),
    ] = "",
    apply: Annotated[
        bool,
        typer.Option(
            "--apply",
            help="Write the best values into params.yaml, comments kept, if they are better on images that no trial "
            "saw. Without --trials and --timeout no trial runs any more.",
        ),
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="With --apply: also values that are not shown to be better.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be searched; run and write nothing.")
    ] = False,
    params: Annotated[Path, typer.Option(help="Parameter file.")] = Path("params.yaml"),
) -> None:
    from lesionsam.sweep.search import Request, sweep

    sweep(
        Request(
            trials=trials,
            timeout_minutes=timeout,
            workers=workers,
            study=study,
            storage=storage,
            apply=apply,
            anyway=anyway,
            dry_run=dry_run,
            params=params,
        )
    )


tune.__doc__ = DESCRIPTION

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(tune)
    run_guarded(app)

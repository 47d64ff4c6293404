"""python src/engine_trial.py FOLDER: the data engine with a simulated annotator on real pairs; resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lesionsam.errors import run_guarded

ROOT = Path(__file__).resolve().parent.parent


def main(
    folder: Annotated[Path, typer.Argument(help="holds images/{train,val} and masks/{train,val}")],
    out: Annotated[Path, typer.Option(help="folder of the results; what is finished there is not run again")] = Path(
        "engine-trial"
    ),
    params: Annotated[Path, typer.Option(help="parameter file of the training")] = ROOT / "params.yaml",
    first: Annotated[int, typer.Option(help="images drawn before the first round")] = 60,
    each: Annotated[int, typer.Option(help="images reviewed between two rounds")] = 100,
    rounds: Annotated[int, typer.Option(help="how many")] = 5,
    auto_from: Annotated[int, typer.Option(help="first round that may accept automatically")] = 4,
    share: Annotated[float, typer.Option(help="of automatic ones that people would accept unchanged, at least")] = 0.8,
    steps: Annotated[int, typer.Option(help="of every training, about: few labelled images get more epochs")] = 100,
    precision: Annotated[str, typer.Option(help="fp32 | bf16")] = "bf16",
) -> None:
    """Rounds with a simulated annotator, and drawing alone for the same seconds; mIoU on the val pairs."""
    from lesionsam.engine.command import run_trial

    run_trial(
        folder,
        out=out,
        params=params,
        first=first,
        each=each,
        rounds=rounds,
        auto_from=auto_from,
        share=share,
        steps=steps,
        precision=precision,
    )


if __name__ == "__main__":
    run_guarded(lambda: typer.run(main))

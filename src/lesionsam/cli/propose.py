"""`lesionsam propose`: lesions found by text, for the annotation page to review."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_commands(app: typer.Typer) -> None:
    """Add `propose`."""
    app.command()(propose)


def propose(
    images: Annotated[
        list[str], typer.Argument(help="Folder (and those in it), files or quoted patterns.", show_default=False)
    ],
    text: Annotated[str, typer.Option(help="What to look for; synonyms parted by commas.")] = "skin lesion",
    model: Annotated[
        str, typer.Option(help="SAM 3, Grounding DINO or OWLv2: OWNER/NAME of the Hub, or a folder in its form.")
    ] = "IDEA-Research/grounding-dino-tiny",
    boxes: Annotated[Path | None, typer.Option(help="The two-box CSV; unset: boxes.csv beside the folder.")] = None,
    threshold: Annotated[float, typer.Option(help="Score below which nothing is proposed.")] = 0.2,
    accept: Annotated[
        float | None,
        typer.Option(
            help="Score from which lesions enter the CSV unseen, marked as such; unset: none does.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Propose lesions found by text for the images without boxes; `lesionsam annotate` shows them for review."""
    from lesionsam.annotation.text import propose_by_text
    from lesionsam.utils.devices import torch_device

    code = propose_by_text(
        images,
        text=text,
        model=model,
        boxes=boxes,
        threshold=threshold,
        accept=accept,
        batch_size=batch_size,
        device=torch_device(device),
    )
    if code:
        raise typer.Exit(code)

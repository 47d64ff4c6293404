"""`lesionsam track` and `lesionsam series`: lesions followed through a clip, and over months."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_commands(app: typer.Typer) -> None:
    """Add `track` and `series`."""
    app.command()(track)
    app.command()(series)


def track(
    clip: Annotated[Path, typer.Argument(help="Video file, GIF, or folder of frames.", show_default=False)],
    boxes: Annotated[
        Path, typer.Option(help="CSV of boxes with a column frame (from 0); one frame is enough.", show_default=False)
    ],
    model: Annotated[
        str, typer.Option("--model", "--weights", help="Weights of any SAM, folder of a run, MLflow run, OWNER/NAME.")
    ] = "models/adapted",
    out: Annotated[Path, typer.Option(help="Folder for masks, tracks.csv, coco.json and overlay.mp4.")] = Path(
        "tracks"
    ),
    memory: Annotated[
        str | None,
        typer.Option(
            help="SAM 2.1, EdgeTAM, SAM 3: the video model whose memory tracks, a folder or OWNER/NAME; unset: the "
            "model's own, if it has one.",
            show_default=False,
        ),
    ] = None,
    mask_prompt: Annotated[
        bool, typer.Option("--mask-prompt", help="Without a memory: give the last mask as a prompt beside the box.")
    ] = False,
    overlay: Annotated[bool, typer.Option(help="Write overlay.mp4 too.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Track lesions through a clip from boxes in one frame; a second call goes on where the first was interrupted."""
    from lesionsam.tracking.registry import resolve_model
    from lesionsam.utils.devices import torch_device
    from lesionsam.video.run import track as run

    code = run(
        clip,
        boxes=boxes,
        model=resolve_model(model),
        out=out,
        memory=memory,
        mask_prompt=mask_prompt,
        overlay=overlay,
        device=torch_device(device),
    )
    if code:
        raise typer.Exit(code)


def series(
    images: Annotated[
        list[str], typer.Argument(help="Pictures of one lesion in the order of time.", show_default=False)
    ],
    boxes: Annotated[Path, typer.Option(help="CSV of boxes, one row for each picture.", show_default=False)],
    model: Annotated[
        str, typer.Option("--model", "--weights", help="Weights of any SAM, folder of a run, MLflow run, OWNER/NAME.")
    ] = "models/adapted",
    out: Annotated[Path, typer.Option(help="Folder for series.csv and the registered pictures.")] = Path("series"),
    any_scale: Annotated[
        bool, typer.Option("--any-scale", help="The magnification may differ; areas are brought to the first's.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Compare pictures of one lesion over time: registered, change of area with an interval. No diagnosis."""
    from lesionsam.tracking.registry import resolve_model
    from lesionsam.utils.devices import torch_device
    from lesionsam.video.series import compare_series as run

    code = run(
        images, boxes=boxes, model=resolve_model(model), out=out, any_scale=any_scale, device=torch_device(device)
    )
    if code:
        raise typer.Exit(code)

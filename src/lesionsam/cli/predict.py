"""`lesionsam predict`: masks for new images, from boxes, from points, or without a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lesionsam.errors import UserError


def add_commands(app: typer.Typer) -> None:
    """Make this module's command part of `lesionsam`."""
    app.command()(predict)


def predict(
    images: Annotated[list[str], typer.Argument(help="Files, folders or quoted patterns.", show_default=False)],
    boxes: Annotated[
        Path | None, typer.Option(help="CSV of boxes; image_id is the image's name without ending.", show_default=False)
    ] = None,
    points: Annotated[
        Path | None,
        typer.Option(
            help="CSV of points: image_id, x, y and, where wanted, lesion_id and label (1 lesion, 0 not).",
            show_default=False,
        ),
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="No prompt: the one lesion of each image.")] = False,
    everything: Annotated[
        bool, typer.Option("--everything", help="No prompt: every mask of each image; params.yaml, section auto.")
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            "--model", "--weights", help="Weights file, folder of a run, MLflow run, or models:/lesionsam@champion."
        ),
    ] = "models/adapted",
    out: Annotated[
        Path, typer.Option(help="Folder for masks, overlays, polygons, COCO JSON and predictions.csv.")
    ] = Path("predictions"),
    prompt: Annotated[
        str, typer.Option(help="Made from boxes: box, box+core, core, centre or ring; all but box need the small box.")
    ] = "box",
    ensemble: Annotated[
        int,
        typer.Option(
            help="Decodings of each box, all but one jittered by up to 10 %, to see how much depends on it; 1: none."
        ),
    ] = 1,
    zoom: Annotated[
        bool, typer.Option("--zoom", help="Enlarge the surroundings of each box to the model's whole input.")
    ] = False,
    threshold: Annotated[
        float, typer.Option(help="Probability above which a pixel is lesion; not with --everything.")
    ] = 0.5,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 8,
    overlays: Annotated[bool, typer.Option(help="Draw pictures too.")] = True,
    shapes: Annotated[bool, typer.Option(help="Write polygons (GeoJSON) and COCO JSON too.")] = True,
    params: Annotated[
        Path | None,
        typer.Option(
            help="Parameter file with section auto, for --auto and --everything; unset: params.yaml if there is one.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Segment lesions in images from boxes, points or without a prompt; a second call does only what is missing."""
    from lesionsam.experiment.auto import read_auto_options
    from lesionsam.inference.auto import AUTO_DEFAULTS
    from lesionsam.inference.files import predict_files
    from lesionsam.inference.inputs import Source
    from lesionsam.tracking.registry import resolve_model
    from lesionsam.utils.devices import torch_device

    source = Source.of(boxes=boxes, points=points, auto=auto, everything=everything, prompt=prompt)  # before any model
    uses_auto = source.kind in ("auto", "everything")
    if params is not None and not uses_auto:
        raise UserError(f"--params {params}: section auto is read for --auto and --everything only; leave it out")
    code = predict_files(
        images,
        boxes=boxes,
        points=points,
        auto=auto,
        everything=everything,
        model=resolve_model(model),
        out=out,
        prompt=prompt,
        ensemble=ensemble,
        device=torch_device(device),
        batch_size=batch_size,
        overlays=overlays,
        shapes=shapes,
        threshold=threshold,
        zoom=zoom,
        options=read_auto_options(params) if uses_auto else AUTO_DEFAULTS,
    )
    if code:
        raise typer.Exit(code)

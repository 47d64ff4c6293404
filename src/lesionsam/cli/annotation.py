"""Commands for drawing boxes: the annotation page, Label Studio's backend, the data engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lesionsam.errors import UserError
from lesionsam.utils.progress import say, working

Images = Annotated[
    list[str], typer.Argument(help="Folder (and those in it), files or quoted patterns.", show_default=False)
]
Boxes = Annotated[Path | None, typer.Option(help="The two-box CSV; unset: boxes.csv beside the folder.")]


def add_commands(app: typer.Typer) -> None:
    """Add `annotate`, `label-studio` and `engine`."""
    for command in (annotate, engine):
        app.command()(command)
    app.command("label-studio")(label_studio)


def annotate(
    images: Images,
    boxes: Boxes = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Weights, a run's folder such as models/adapted, a run id or models:/NAME@ALIAS: its masks follow the "
            "boxes."
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Probability above which a pixel is lesion.")] = 0.5,
    port: Annotated[int | None, typer.Option(help="Unset: 8350, or a free one.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own get a token.")
    ] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
    who: Annotated[str, typer.Option(help="Your name, recorded with every change; unset: the login name.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Draw two boxes per lesion on a page in the browser; everything is saved at once and stays on this machine."""
    weights, where = None, "cpu"
    if not 0 < threshold < 1:
        raise UserError(f"--threshold: expected a probability between 0 and 1, got {threshold:g}")
    if model is not None:
        say("loading the model; the page opens then")
        from lesionsam.tracking.registry import resolve_model
        from lesionsam.utils.devices import torch_device

        with working("loading"):
            weights, where = resolve_model(model), str(torch_device(device))
    from lesionsam.annotation.serve import annotate as run

    run(
        images,
        boxes=boxes,
        model=weights,
        threshold=threshold,
        port=port,
        host=host,
        browser=browser,
        who=who,
        device=where,
    )


def label_studio(
    model: Annotated[
        str, typer.Option(help="Weights, a run's folder such as models/adapted, a run id or models:/NAME@ALIAS.")
    ] = "models/adapted",
    local_root: Annotated[
        Path | None, typer.Option(help="Label Studio's LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT.", show_default=False)
    ] = None,
    upload_root: Annotated[
        Path | None, typer.Option(help="Folder media/upload of Label Studio's data.", show_default=False)
    ] = None,
    url: Annotated[
        str,
        typer.Option(
            help="Of Label Studio, to fetch its files and cloud storage from; its key: LABEL_STUDIO_API_KEY.",
            show_default=False,
        ),
    ] = "",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="HOST or HOST:PORT to fetch images from; may be repeated.")
    ] = None,
    label: Annotated[str, typer.Option(help="Of masks where none is chosen; else the first.")] = "lesion",
    threshold: Annotated[float, typer.Option(help="Probability above which a pixel is lesion.")] = 0.5,
    port: Annotated[int, typer.Option(help="To listen on.")] = 9090,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own ask for a password.")
    ] = "127.0.0.1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Answer Label Studio as its ML backend: predictions, and masks of drawn rectangles and points."""
    from lesionsam.integrations.addresses import ImageSources
    from lesionsam.integrations.serve import serve
    from lesionsam.tracking.registry import resolve_model
    from lesionsam.utils.devices import torch_device

    key = os.environ.get("LABEL_STUDIO_API_KEY", "")
    serve(
        resolve_model(model),
        ImageSources(local_root, upload_root, url, key, tuple(allow_host or ())),
        label=label,
        threshold=threshold,
        port=port,
        host=host,
        device=torch_device(device),
    )


def engine(
    images: Images,
    boxes: Boxes = None,
    out: Annotated[Path, typer.Option(help="Folder of the rounds: weights, report.md, curve.png.")] = Path("engine"),
    params: Annotated[Path, typer.Option("--params", help="Parameter file.")] = Path("params.yaml"),
    start: Annotated[
        str | None, typer.Option(help="Weights that every round starts from; unset: model.checkpoint of params.yaml.")
    ] = None,
    training: Annotated[bool, typer.Option(help="Train; without, --start proposes as it is.")] = True,
    auto: Annotated[bool, typer.Option("--auto", help="Accept the proposals that may be accepted unseen.")] = False,
    share: Annotated[float, typer.Option(help="Of those, how many people would accept unchanged, at least.")] = 0.9,
    test: Annotated[Path | None, typer.Option(help="Folder with images/ and masks/ to measure quality on.")] = None,
) -> None:
    """Run one round of the data engine: train on the existing boxes, propose for the rest, report."""
    from lesionsam.engine.command import run

    run(images, boxes=boxes, out=out, params=params, start=start, training=training, auto=auto, share=share, test=test)

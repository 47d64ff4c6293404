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
    images: Annotated[
        list[str] | None, typer.Argument(help="Files, folders or quoted patterns.", show_default=False)
    ] = None,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="Text file with such an argument per line.", show_default=False)
    ] = None,
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
    text: Annotated[
        str | None,
        typer.Option(help='Boxes by text, such as "skin lesion"; synonyms parted by commas.', show_default=False),
    ] = None,
    detector: Annotated[
        str, typer.Option(help="Of --text: SAM 3, Grounding DINO or OWLv2; OWNER/NAME, or a folder.")
    ] = "IDEA-Research/grounding-dino-tiny",
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
    mm_per_pixel: Annotated[
        float | None, typer.Option(help="Side of a pixel of all images [mm]: areas in mm2 too.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 8,
    overlays: Annotated[bool, typer.Option(help="Draw pictures too.")] = True,
    shapes: Annotated[bool, typer.Option(help="Write polygons (GeoJSON) and COCO JSON too.")] = True,
    dicom_seg: Annotated[
        bool, typer.Option("--dicom-seg", help="Write DICOM segmentations too; the images must be DICOM.")
    ] = False,
    params: Annotated[
        Path | None,
        typer.Option(
            help="Parameter file with section auto, for --auto and --everything; unset: params.yaml if there is one.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    devices: Annotated[
        str,
        typer.Option(help="Processes on this machine, a GPU each or a part of the CPU: a number, or auto: all GPUs."),
    ] = "1",
    shard: Annotated[
        str, typer.Option(help="I/N: part I of N of the images, for several machines with one --out; then --merge.")
    ] = "",
    merge: Annotated[
        Path | None,
        typer.Option(help="Join the shards in this folder to what a single call writes.", show_default=False),
    ] = None,
) -> None:
    """Segment lesions in images from boxes, points or without a prompt; a second call does only what is missing."""
    if merge is not None:
        from lesionsam.inference.shards import merge_shards

        if images or list_file or shard:
            raise UserError("--merge: expected the folder of the shards alone, without images, --list or --shard")
        if code := merge_shards(merge):
            raise typer.Exit(code)
        return
    from lesionsam.inference.arguments import Source, check_options, find_images, read_list

    # Before torch is imported, which takes seconds.
    if text is not None and (boxes or points or auto or everything):
        raise UserError("--text: finds the boxes itself; leave --boxes, --points, --auto and --everything out")
    source = Source.of(boxes=boxes or text is not None, points=points, auto=auto, everything=everything, prompt=prompt)
    checked = {"threshold": threshold, "ensemble": ensemble, "zoom": zoom, "batch_size": batch_size}
    check_options(source, **checked, mm_per_pixel=mm_per_pixel)
    named = [*(images or []), *(read_list(list_file) if list_file is not None else [])]
    paths, problems = find_images(named)
    if not paths:
        raise UserError(problems[0] if problems else "no images given; name files, folders or patterns")
    from lesionsam.utils.progress import working

    with working(f"{len(paths)} images; loading libraries"):
        from lesionsam.experiment.auto import read_auto_options
        from lesionsam.inference.auto import AUTO_DEFAULTS
        from lesionsam.inference.files import predict_files
        from lesionsam.inference.shards import Shard
        from lesionsam.inference.workers import num_devices, predict_on_devices
        from lesionsam.tracking.registry import resolve_model
        from lesionsam.utils.devices import torch_device

    if text is not None:
        from lesionsam.detection.prompts import write_text_boxes

        boxes = write_text_boxes(named, text=text, detector=detector, out=out, device=torch_device(device))
    uses_auto = source.kind in ("auto", "everything")
    if params is not None and not uses_auto:
        raise UserError(f"--params {params}: section auto is read for --auto and --everything only; leave it out")
    own = Shard.parse(shard) if shard else None
    count = num_devices(devices, device) if devices != "1" else 1
    if own is not None and devices != "1":
        raise UserError("--shard and --devices: expected one of the two; --devices makes shards of its own")
    options = {
        "images": named,
        "boxes": boxes,
        "points": points,
        "auto": auto,
        "everything": everything,
        "model": resolve_model(model),
        "out": out,
        "prompt": prompt,
        **checked,
        "mm_per_pixel": mm_per_pixel,
        "overlays": overlays,
        "shapes": shapes,
        "dicom_seg": dicom_seg,
        "options": read_auto_options(params) if uses_auto else AUTO_DEFAULTS,
    }
    if count > 1:
        code = predict_on_devices(count, device=device, **options)
    else:
        code = predict_files(**options, device=torch_device(device), shard=own)
    if code:
        raise typer.Exit(code)

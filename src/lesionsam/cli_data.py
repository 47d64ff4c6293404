"""`lesionsam data`: annotations from one format into another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(no_args_is_help=True, help="Care of data sets: convert boxes, inspect images and masks.")

FORMATS = "csv (two-box CSV), coco, yolo (a folder), cvat (for images 1.1), label-studio"


@data_app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="File to read, or folder of YOLO files.",
                                           show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="TO", help="File to write, or new folder for YOLO files.",
                                           show_default=False)],
    form: Annotated[str, typer.Option("--format", help=f"Of TO: {FORMATS}; unset: by its ending.")] = "",
    from_form: Annotated[str, typer.Option("--from-format", help="Of FROM; unset: by its ending and content.")] = "",
    images: Annotated[Path | None, typer.Option(help="Folder of the images, for their names and sizes.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of masks to take along, where TO can hold them.")] = None,
    big: Annotated[str, typer.Option(help="Label of the big boxes.")] = "big",
    small: Annotated[str, typer.Option(help="Label of the small boxes.")] = "small",
    category: Annotated[list[str] | None, typer.Option(help="Of COCO: read this one only; may be repeated.")] = None,
    classes: Annotated[str, typer.Option(help="Of YOLO: names by number, with commas; unset: as its folder says.")]
    = "",
    core: Annotated[float | None, typer.Option(
        help="Where one box is given: sides of the small one as a share of it, same centre; unset: 0.45.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TO if it is a file.")] = False,
) -> None:
    """Convert boxes between the two-box CSV, COCO, YOLO, CVAT and Label Studio."""
    from lesionsam.formats.convert import convert as run
    from lesionsam.formats.records import CORE, Labels

    names = [name.strip() for name in classes.split(",")] if classes else None
    found = run(source, target, from_form=from_form, to_form=form, images=images, masks=masks,
                labels=Labels(big, small), categories=category or (), classes=names,
                core=CORE if core is None else core, overwrite=overwrite)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{target}: {len(found.lesions)} lesions of {len(found.pictures)} images")

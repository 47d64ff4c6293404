"""`lesionsam data`: convert annotations between formats, and check a data set before training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(no_args_is_help=True, help="Care of data sets: convert boxes, inspect images and masks.")

FORMATS = "csv (two-box CSV), coco, yolo (a folder), cvat (for images 1.1), label-studio"


@data_app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="FROM", help="File to read, or folder of YOLO files.", show_default=False)
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TO", help="File to write, or new folder for YOLO files.", show_default=False)
    ],
    form: Annotated[str, typer.Option("--format", help=f"Of TO: {FORMATS}; unset: by its ending.")] = "",
    from_form: Annotated[str, typer.Option("--from-format", help="Of FROM; unset: by its ending and content.")] = "",
    images: Annotated[Path | None, typer.Option(help="Folder of the images, for their names and sizes.")] = None,
    big: Annotated[str, typer.Option(help="Label of the big boxes.")] = "big",
    small: Annotated[str, typer.Option(help="Label of the small boxes.")] = "small",
    category: Annotated[list[str] | None, typer.Option(help="Of COCO: read this one only; may be repeated.")] = None,
    classes: Annotated[
        str, typer.Option(help="Of YOLO: names by number, with commas; unset: as its folder says.")
    ] = "",
    core: Annotated[
        float | None,
        typer.Option(help="Where one box is given: sides of the small one as a share of it, same centre; unset: 0.45."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TO if it is a file.")] = False,
) -> None:
    """Convert boxes between the two-box CSV, COCO, YOLO, CVAT and Label Studio."""
    from lesionsam.formats.convert import convert as run
    from lesionsam.formats.records import CORE, Labels

    names = [name.strip() for name in classes.split(",")] if classes else None
    found = run(
        source,
        target,
        from_form=from_form,
        to_form=form,
        images=images,
        labels=Labels(big, small),
        categories=category or (),
        classes=names,
        core=CORE if core is None else core,
        overwrite=overwrite,
    )
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{target}: {len(found.lesions)} lesions of {len(found.pictures)} images")


Target = Annotated[
    Path,
    typer.Argument(
        help="Folder of images, with masks/ or without, COCO JSON, or parameter file, whose data.source counts."
    ),
]
Boxes = Annotated[Path | None, typer.Option(help="Two-box CSV; unset: that of the parameter file, if it names one.")]
Images = Annotated[Path | None, typer.Option(help="Of a COCO JSON: folder of its images; unset: where it lies.")]
Category = Annotated[list[str] | None, typer.Option(help="Of a COCO JSON: look at this one only; may be repeated.")]
Threshold = Annotated[bool, typer.Option("--threshold-masks", help="Cut grey masks at half of their range.")]
PROMPTLY = 20  # issues of a severity that are printed; all are on the page


@data_app.command()
def check(
    target: Target = Path("params.yaml"),
    boxes: Boxes = None,
    images: Images = None,
    category: Category = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="Another set, to find pictures that are in both; may be repeated.")
    ] = None,
    threshold_masks: Threshold = False,
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("data-check.html"),
    pictures: Annotated[int, typer.Option(min=0, max=1000, help="Images shown on the page.")] = 60,
    threads: Annotated[int, typer.Option(min=1, max=256, help="That decode images.")] = 4,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
) -> None:
    """Inspect images, masks and boxes before training: sizes, values, duplicates across splits.

    For data. `lesionsam check` is for params.yaml, `doctor` for the installation, `smoke` for weights.

    Exit status 1 on errors. Writes one HTML page, to be opened without a network, with pictures of what was found.
    """
    from lesionsam.data.check.checks import check as run
    from lesionsam.data.check.checks import summary
    from lesionsam.data.check.items import find_items
    from lesionsam.data.check.page import write_page

    found = find_items(target, images=images, categories=category or (), threshold=threshold_masks)
    report = run(found, against=[find_items(other) for other in against or ()], boxes=boxes, num_threads=threads)
    for line in summary(report):
        print(line)
    for severity in ("error", "warning", "note"):
        issues = [issue for issue in report.issues if issue.severity == severity]
        for issue in issues[:PROMPTLY]:
            print(f"{severity}: {issue.text}", file=sys.stderr)
        if len(issues) > PROMPTLY:
            print(f"{severity}: and {len(issues) - PROMPTLY} more, see {out}", file=sys.stderr)
    size = write_page(report, out, num_pictures=pictures)
    print(f"page      {out} ({size / 1e6:.1f} MB)")
    if report.count("error") or (strict and report.count("warning")):
        raise typer.Exit(1)


@data_app.command()
def split(
    folder: Annotated[Path, typer.Argument(help="Folder of images, and folders in it.", show_default=False)],
    by: Annotated[
        Path | None,
        typer.Option(
            help="CSV with image_id and a group, such as a patient: images of a group stay together.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="The group's column of that CSV; unset: its only other one.")] = "",
    out: Annotated[Path, typer.Option(help="Folder to make train/, val/ and test/ in.")] = Path("own/images"),
    val: Annotated[float, typer.Option(help="Share of the images to select the best checkpoint on.")] = 0.15,
    test: Annotated[float, typer.Option(help="Share of the images to report on.")] = 0.15,
    seed: Annotated[int, typer.Option(help="Of the draw: the same seed gives the same split.")] = 0,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the files; otherwise hard links, without disk.")] = False,
) -> None:
    """Split one folder of images into train, val and test, with the images of a patient in one of them."""
    from lesionsam.data.split import split_folder

    chosen = split_folder(folder, out, by=by, column=column, val=val, test=test, seed=seed, copy=copy)
    print(f"{out}: " + ", ".join(f"{name} {len(paths)}" for name, paths in chosen.items()) + " images")
    if by is None:
        print("note: without --by, images of one patient may be in two splits, and the test looks too good")


@data_app.command()
def show(
    ids: Annotated[list[str] | None, typer.Argument(help="Image ids; none: a sample of all.")] = None,
    target: Annotated[Path, typer.Option("--from", help="Set to show, as of `data check`.")] = Path("params.yaml"),
    boxes: Boxes = None,
    images: Images = None,
    category: Category = None,
    threshold_masks: Threshold = False,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("data-show.png"),
    count: Annotated[int, typer.Option(min=1, max=400, help="Size of the sample.")] = 12,
    columns: Annotated[int, typer.Option(min=1, max=20, help="Pictures in a row.")] = 4,
) -> None:
    """Write a contact sheet of images with their masks and boxes drawn."""
    from lesionsam.data.check.items import find_items
    from lesionsam.data.check.page import write_sheet

    found = find_items(target, images=images, categories=category or (), threshold=threshold_masks)
    number = write_sheet(found, out, ids=ids or (), boxes=boxes, count=count, columns=columns)
    print(f"{out}: {number} images")

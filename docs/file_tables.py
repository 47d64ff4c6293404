"""Page of the columns of the tables that the commands read and write."""

from __future__ import annotations

from collections.abc import Mapping

from markdown_table import cell, code, table

from lesionsam.boxes import table as boxes_table
from lesionsam.data import index
from lesionsam.inference import jobs, outputs


def corners(names: tuple[str, ...], box: str) -> dict[str, str]:
    """Return column -> content of a box's four columns."""
    sides = {"x0": "left side", "y0": "upper side", "x1": "right side", "y1": "lower side"}
    return {name: f"{sides[name[-2:]]} of the {box} box [px]" for name in names}


BOX_MEANING = {
    "image_id": "file name of the image without its ending",
    "lesion_id": "any name, different for the lesions of one image; may be left out where every image has one lesion",
    "split": "train, dev or test; must agree with the folders",
    "width": "of the image [px]; checked where it is given",
    "height": "of the image [px]; checked where it is given",
    **corners(boxes_table.BIG, "big"),
    **corners(boxes_table.SMALL, "small"),
}
POINT_MEANING = {
    "image_id": "file name of the image without its ending",
    "x": "to the right [px]",
    "y": "downwards [px]",
    "lesion_id": "points of one lesion share it; without it all points of an image are one prompt",
    "label": "1 lesion (also where it is empty), 0 not",
    "width": "of the image [px]; checked where it is given",
    "height": "of the image [px]; checked where it is given",
}
INDEX_MEANING = {
    "image_id": "file name of the image without its ending",
    "split": "train, dev (to select on) or test (to report on)",
    "image_path": "image file, from the root of the repository",
    "mask_path": "mask file; empty without one",
    "width": "after EXIF transpose [px]",
    "height": "after EXIF transpose [px]",
    "sha256": "of the image's contents",
    "mask_sha256": "of the mask's contents; empty without one",
}


def columns_table(columns: tuple[str, ...], meaning: Mapping[str, str], needed: tuple[str, ...] | None = None) -> str:
    """Return the table of a file's columns; `needed` are those that it must have, None where it has all."""
    if needed is None:
        return table(("column", "content"), [(code(name), cell(meaning[name])) for name in columns])
    rows = [(code(name), "yes" if name in needed else "", cell(meaning[name])) for name in columns]
    return table(("column", "required", "content"), rows)


def files_page() -> str:
    """Return the page of the tables' columns."""
    folders = ", ".join(f"`{folder}/*{ending}`" for folder, ending in outputs.ENDINGS.items())
    return f"""# Files

All tables are CSV in UTF-8, separated by commas, with a header. Coordinates are pixels of the upright image (after EXIF
transpose): x to the right, y downwards, (0, 0) the upper left corner of the first pixel. Boxes are half-open.

## Two boxes per lesion

`boxes.csv`: read by `lesionsam predict --boxes`, `inputs.boxes` and the annotation page. A prediction needs the
small box only where its prompt does. [Your own images](../project/own.md) has the rules.

{columns_table(boxes_table.COLUMNS, BOX_MEANING, boxes_table.REQUIRED)}
## Points

Read by `lesionsam predict --points`.

{columns_table(jobs.POINT_COLUMNS, POINT_MEANING, ("image_id", "x", "y"))}
## Predictions

`predictions.csv`: written by `lesionsam predict`, one row per mask.

{columns_table(outputs.COLUMNS, outputs.COLUMN_GUIDE)}
Beside it: {folders}, and `{outputs.COCO}` with all masks as COCO instances.
[Predict](../howto/predict.md) has the options.

## Index of a data set

`data/raw/index.csv`: written by the stage `download`, one row per image.

{columns_table(index.COLUMNS, INDEX_MEANING)}"""

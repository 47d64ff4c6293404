"""CVAT for images 1.1: an XML file with an element per image and, inside it, per shape.

Two boxes are two <box> elements labelled "big" and "small"; the attribute lesion_id, or else CVAT's group, ties them
together. A mask is a <mask> or <polygon> of any other label with the same lesion_id. Tracks of CVAT for video and
turned boxes are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lesionsam.errors import UserError
from lesionsam.formats.records import (
    BIG_LABEL,
    MASK_LABEL,
    SMALL_LABEL,
    Annotations,
    Gathered,
    Labels,
    Lesion,
    Picture,
    Shape,
    need_names,
)
from lesionsam.formats.rle import decode, encode, mask_box, polygon_box, runs_of
from lesionsam.formats.safe import Element, number, read_xml
from lesionsam.utils.files import whole_number, write_text_atomic

EXPECTED = "CVAT for images 1.1 XML"


def read_cvat(path: Path, labels: Labels | None = None) -> Annotations:
    """Boxes, and the boxes around polygons and masks, of a CVAT file; other shapes are left out.

    Raises:
        UserError: names file, image and shape.
    """
    root = read_xml(path, EXPECTED)
    if root.tag != "annotations" or root.first("track") is not None:
        raise UserError(
            f"{path}: <{'track' if root.tag == 'annotations' else root.tag}>: expected {EXPECTED}, with an "
            "<image> per image (export as 'CVAT for images 1.1')"
        )
    gathered, left_out = Gathered(str(path)), 0
    for image in root.all("image"):
        held = image.attributes
        image_id = gathered.add(
            held.get("name", ""), _whole(held.get("width")), _whole(held.get("height")), held.get("subset", "")
        )
        picture = gathered.pictures[image_id]
        for place, element in enumerate(image.children, 1):
            if element.tag not in ("box", "polygon", "mask"):
                left_out += element.tag != "tag"
                continue
            where = f"{element.tag} {place}"
            try:
                gathered.shapes[image_id].append(_shape(element, where, picture))
            except (UserError, ValueError) as error:
                message = str(error).removeprefix(f"{where}: ")
                raise UserError(f"{path}: image {picture.file_name!r}, {where}: {message}") from None
    if left_out:
        gathered.notes.append(f"{left_out} shapes other than boxes, polygons and masks were left out")
    return gathered.finish(labels or Labels())


def _whole(text: str | None) -> object:
    found = whole_number(text or "")
    return text if found is None else found


def _shape(element: Element, where: str, picture: Picture) -> Shape:
    held = element.attributes
    lesion_id = next(
        (child.text.strip() for child in element.all("attribute") if child.attributes.get("name") == "lesion_id"), ""
    )
    segmentation: Any = None
    if element.tag == "box":
        if number(held.get("rotation", "0"), where):
            raise ValueError(f"turned by {held['rotation']} degrees; expected an upright box")
        box = np.array([number(held.get(name), f"{where}: {name}") for name in ("xtl", "ytl", "xbr", "ybr")])
    elif element.tag == "polygon":
        pairs = [pair.split(",") for pair in held.get("points", "").split(";")]
        segmentation = [[number(value, where) for pair in pairs for value in pair]]
        box = polygon_box(segmentation)
    else:
        mask = _read_mask(held, where, picture)
        box, segmentation = mask_box(mask), encode(mask)
    group = held.get("group_id", "")
    return Shape(held.get("label", ""), box, where, lesion_id, segmentation, "" if group == "0" else group)


def _read_mask(held: dict[str, str], where: str, picture: Picture) -> np.ndarray:
    """CVAT's runs go along the rows of the rectangle that the mask stands in."""
    left, top, width, height = (
        int(number(held.get(name), f"{where}: {name}")) for name in ("left", "top", "width", "height")
    )
    if min(left, top) < 0 or min(width, height) < 1 or left + width > picture.width or top + height > picture.height:
        raise ValueError(
            f"rectangle {width}x{height} at {left}, {top} leaves the image of {picture.width}x{picture.height} px"
        )
    runs = [int(number(value, where)) for value in held.get("rle", "").split(",")]
    # the same runs down the columns of the turned rectangle
    part = decode({"size": [width, height], "counts": runs}, width, height).T
    mask = np.zeros((picture.height, picture.width), bool)
    mask[top : top + height, left : left + width] = part
    if not mask.any():
        raise ValueError("mask is empty; remove it")
    return mask


def write_cvat(path: Path, annotations: Annotations) -> None:
    """Write a CVAT file; the attribute subset of an image is its split."""
    need_names(annotations, "CVAT")
    write_text_atomic(path, "\n".join(_lines(annotations)) + "\n")


def _lines(annotations: Annotations) -> Iterator[str]:
    attribute = (
        "<attributes><attribute><name>lesion_id</name><mutable>False</mutable><input_type>text</input_type>"
        "<default_value></default_value><values></values></attribute></attributes>"
    )
    yield '<?xml version="1.0" encoding="utf-8"?>'
    yield "<annotations>"
    yield "  <version>1.1</version>"
    yield f"  <meta><task><size>{len(annotations.pictures)}</size><mode>annotation</mode><labels>"
    for label, kind in ((BIG_LABEL, "rectangle"), (SMALL_LABEL, "rectangle"), (MASK_LABEL, "mask")):
        yield f"    <label><name>{label}</name><type>{kind}</type>{attribute}</label>"
    yield "  </labels></task></meta>"
    lesions = annotations.by_picture()
    for number_, picture in enumerate(annotations.pictures):
        subset = f' subset="{_text(picture.split)}"' if picture.split else ""
        yield (
            f'  <image id="{number_}" name="{_text(picture.file_name)}"{subset} width="{picture.width}" '
            f'height="{picture.height}">'
        )
        for group, lesion in enumerate(lesions[picture.image_id], 1):
            yield from _shapes(lesion, group, picture)
        yield "  </image>"
    yield "</annotations>"


def _shapes(lesion: Lesion, group: int, picture: Picture) -> Iterator[str]:
    common = f'source="manual" occluded="0" z_order="0" group_id="{group}"'
    name = f'<attribute name="lesion_id">{_text(lesion.lesion_id)}</attribute>'
    for label, box in ((BIG_LABEL, lesion.big_box), (SMALL_LABEL, lesion.small_box)):
        if box is not None:
            corners = " ".join(
                f'{side}="{round(float(value), 6)!r}"'
                for side, value in zip(("xtl", "ytl", "xbr", "ybr"), box, strict=True)
            )
            yield f'    <box label="{label}" {corners} {common}>{name}</box>'
    if lesion.segmentation is not None:
        mask = decode(lesion.segmentation, picture.height, picture.width)
        x0, y0, x1, y1 = (int(value) for value in mask_box(mask))
        runs = ", ".join(map(str, runs_of(mask[y0:y1, x0:x1].T)))
        yield (
            f'    <mask label="{MASK_LABEL}" rle="{runs}" left="{x0}" top="{y0}" width="{x1 - x0}" '
            f'height="{y1 - y0}" {common}>{name}</mask>'
        )


def _text(text: str) -> str:
    if any(ord(character) < 32 for character in text):
        raise UserError(f"{text!r}: XML cannot hold control characters; rename it")
    return escape(text)

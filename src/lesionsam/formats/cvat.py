"""Read and write CVAT for images 1.1: an XML file with an element per image and, inside it, per shape.

Two boxes are two <box> elements labelled "big" and "small"; the attribute lesion_id, or else CVAT's group, ties them
together. A <polygon> or <mask> counts with the box around it. Tracks of CVAT for video and turned boxes are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from xml.etree.ElementTree import Element  # nosec B405

import numpy as np

from lesionsam.errors import UserError
from lesionsam.formats.gather import Gathered
from lesionsam.formats.records import BIG_LABEL, SMALL_LABEL, Annotations, Labels, Lesion, Picture, Shape
from lesionsam.formats.rle import polygon_box
from lesionsam.formats.safe import number, read_xml
from lesionsam.utils.files import whole_number, write_text_atomic

EXPECTED = "CVAT for images 1.1 XML"


def read_cvat(path: Path, labels: Labels | None = None, pictures: Mapping[str, Picture] | None = None) -> Annotations:
    """Read the boxes, and the boxes around polygons and masks, of a CVAT file; other shapes are left out, and said.

    Args:
        pictures: the images at hand, whose sizes are compared.
    Raises:
        UserError: names file, image and shape.
    """
    root = read_xml(path, EXPECTED)
    if root.tag != "annotations" or root.find("track") is not None:
        raise UserError(
            f"{path}: <{'track' if root.tag == 'annotations' else root.tag}>: expected {EXPECTED}, with an "
            "<image> per image (export as 'CVAT for images 1.1')"
        )
    gathered = Gathered(str(path), known=pictures)
    for image in root.findall("image"):
        held = image.attrib
        image_id = gathered.add(
            held.get("name", ""), _whole(held.get("width")), _whole(held.get("height")), held.get("subset", "")
        )
        picture = gathered.pictures[image_id]
        for place, element in enumerate(image, 1):
            if element.tag not in ("box", "polygon", "mask"):
                if element.tag != "tag":
                    where = f"image {picture.file_name!r} {element.tag} {place}"
                    gathered.leave_out("shapes other than boxes, polygons and masks", where)
                continue
            where = f"{element.tag} {place}"
            try:
                gathered.shapes[image_id].append(_shape(element, where, picture))
            except (UserError, ValueError) as error:
                message = str(error).removeprefix(f"{where}: ")
                raise UserError(f"{path}: image {picture.file_name!r}, {where}: {message}") from None
    return gathered.finish(labels or Labels())


def _whole(text: str | None) -> object:
    found = whole_number(text or "")
    return text if found is None else found


def _shape(element: Element, where: str, picture: Picture) -> Shape:
    held = element.attrib
    lesion_id = next(
        ((child.text or "").strip() for child in element.findall("attribute") if child.get("name") == "lesion_id"), ""
    )
    if element.tag == "polygon":
        pairs = [pair.split(",") for pair in held.get("points", "").split(";")]
        box = polygon_box([[number(value, where) for pair in pairs for value in pair]])
    elif element.tag == "mask":  # given by the rectangle around it
        x, y, w, h = (number(held.get(name), f"{where}: {name}") for name in ("left", "top", "width", "height"))
        box = np.array([x, y, x + w, y + h])
    else:
        if number(held.get("rotation", "0"), where):
            raise ValueError(f"turned by {held['rotation']} degrees; expected an upright box")
        box = np.array([number(held.get(name), f"{where}: {name}") for name in ("xtl", "ytl", "xbr", "ybr")])
    group = held.get("group_id", "")
    return Shape(held.get("label", ""), box, where, lesion_id, "" if group == "0" else group)


def write_cvat(path: Path, annotations: Annotations) -> None:
    """Write a CVAT file; the attribute subset of an image is its split."""
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
    for label in (BIG_LABEL, SMALL_LABEL):
        yield f"    <label><name>{label}</name><type>rectangle</type>{attribute}</label>"
    yield "  </labels></task></meta>"
    lesions = annotations.by_picture()
    for number_, picture in enumerate(annotations.pictures):
        subset = f' subset="{_text(picture.split)}"' if picture.split else ""
        yield (
            f'  <image id="{number_}" name="{_text(picture.file_name)}"{subset} width="{picture.width}" '
            f'height="{picture.height}">'
        )
        for group, lesion in enumerate(lesions[picture.image_id], 1):
            yield from _shapes(lesion, group)
        yield "  </image>"
    yield "</annotations>"


def _shapes(lesion: Lesion, group: int) -> Iterator[str]:
    common = f'source="manual" occluded="0" z_order="0" group_id="{group}"'
    name = f'<attribute name="lesion_id">{_text(lesion.lesion_id)}</attribute>'
    for label, box in ((BIG_LABEL, lesion.big_box), (SMALL_LABEL, lesion.small_box)):
        if box is not None:
            corners = " ".join(
                f'{side}="{round(float(value), 6)!r}"'
                for side, value in zip(("xtl", "ytl", "xbr", "ybr"), box, strict=True)
            )
            yield f'    <box label="{label}" {corners} {common}>{name}</box>'


def _text(text: str) -> str:
    if any(ord(character) < 32 for character in text):
        raise UserError(f"{text!r}: XML cannot hold control characters; rename it")
    return escape(text)

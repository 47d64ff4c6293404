"""Read and write Label Studio's JSON: a list of tasks, each an image with regions in percent of its sides.

Two boxes are two rectangles labelled "big" and "small". A relation between them, or the note "lesion_id: NAME" of the
regions, ties them together. Polygons count with the box around them; turned rectangles are refused. Export as JSON, not
as JSON-MIN.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lesionsam.errors import UserError, listed
from lesionsam.formats.gather import Gathered
from lesionsam.formats.records import BIG_LABEL, SMALL_LABEL, Annotations, Labels, Lesion, Picture, Shape
from lesionsam.formats.rle import polygon_box
from lesionsam.formats.safe import number, read_json
from lesionsam.utils.files import write_json_atomic
from lesionsam.utils.images import IMAGE_SUFFIXES

EXPECTED = "Label Studio JSON (a list of tasks with data and annotations)"
UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts before the name of an uploaded file
NOTE = "lesion_id: "
LOCAL = "/data/local-files/?d="
GEOMETRY = ("x", "points", "rle", "vertices", "imageDataURL")  # what a region's value has where it is a shape


def read_label_studio(
    path: Path, pictures: Mapping[str, Picture] | None = None, labels: Labels | None = None
) -> Annotations:
    """Read the rectangles, and the boxes around polygons, of the first annotation of each task that was not cancelled.

    Other shapes (ellipses, brushes, key points) are left out, and said.

    Args:
        pictures: the images at hand, for the sizes of those without any region, which are left out otherwise, and to
            compare the other sizes.
    Raises:
        UserError: names file, task and region.
    """
    tasks = read_json(path, EXPECTED)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise UserError(f"{path}: expected {EXPECTED}")
    gathered = Gathered(str(path), known=pictures)
    several, sizeless = [], []
    for place, task in enumerate(tasks, 1):
        task_name = f"task {task.get('id', place)}"
        where = f"{path}: {task_name}"
        data, annotations = task.get("data"), task.get("annotations")
        if not isinstance(data, dict) or not isinstance(annotations, list):
            raise UserError(f"{where}: expected data and annotations (export as JSON, not as JSON-MIN)")
        name = file_name(data, where)
        drawn = [each for each in annotations if isinstance(each, dict) and not each.get("was_cancelled")]
        several += [task_name] if len(drawn) > 1 else []
        regions = drawn[0].get("result", []) if drawn else []
        if not isinstance(regions, list) or not all(isinstance(region, dict) for region in regions):
            raise UserError(f"{where}: expected a list of regions as result")
        known = (pictures or {}).get(PurePosixPath(name).stem)
        size = _size(regions, data, known)
        if size is None:
            sizeless.append(task_name)
            continue
        image_id = gathered.add(name, *size, str(data.get("split", "")))
        for place, region in enumerate(regions, 1):
            if _is_other_shape(region):
                at = f"{task_name} region {region.get('id') or place} ({_kind(region) or 'no type'})"
                gathered.leave_out("shapes other than rectangles and polygons", at)
        gathered.shapes[image_id] = _shapes(regions, *size, where)
    if several:
        gathered.notes.append(
            f"{len(several)} tasks hold several annotations; the first of each was read: {listed(several)}"
        )
    if sizeless:
        gathered.notes.append(
            f"{len(sizeless)} images without any region were left out, as nothing tells their size: {listed(sizeless)}"
        )
    return gathered.finish(labels or Labels())


def _kind(region: Mapping[str, Any]) -> str:
    """Return the kind of a region: rectangle, polygon, ellipse, brush, ..."""
    return str(region.get("type", "")).removesuffix("labels")


def _is_other_shape(region: Mapping[str, Any]) -> bool:
    value = region.get("value")
    is_shape = isinstance(value, dict) and any(name in value for name in GEOMETRY)
    return _kind(region) not in ("rectangle", "polygon", "labels", "") and is_shape


def file_name(data: Mapping[str, Any], where: str) -> str:
    """Return the image's file name out of a task's data: an upload's own name, or a path below the local storage.

    Label Studio does not escape names everywhere, so that "#" and "?" may belong to one: the address is cut at the
    first of them before which an image's ending stands.
    """
    address = data.get("image", data.get("img"))
    if not isinstance(address, str) or not address:
        texts = [value for value in data.values() if isinstance(value, str) and "." in value]
        if len(texts) != 1:
            raise UserError(f"{where}: expected data.image with the image's address")
        address = texts[0]
    if LOCAL in address:
        return urllib.parse.unquote(_without_query(address.partition(LOCAL)[2])).lstrip("/")
    path = urllib.parse.unquote(_without_query(address.split("://", 1)[-1]))
    name = PurePosixPath(path).name
    return UPLOADED.sub("", name) if "/upload/" in path else name


def _without_query(address: str) -> str:
    """Return an address up to the query or fragment behind an image's ending; up to the first of them without one."""
    cuts = [match.start() for match in re.finditer("[?#&]", address)]
    for end in [*cuts, len(address)]:
        if address[:end].lower().endswith(IMAGE_SUFFIXES):
            return address[:end]
    return re.split("[?#]", address, maxsplit=1)[0]


def _size(regions: list[dict[str, Any]], data: Mapping[str, Any], known: Picture | None) -> tuple[Any, Any] | None:
    for held, names in ((region, ("original_width", "original_height")) for region in regions):
        if all(name in held for name in names):
            return held[names[0]], held[names[1]]
    if "width" in data and "height" in data:
        return data["width"], data["height"]
    return (known.width, known.height) if known is not None else None


def _shapes(regions: list[dict[str, Any]], width: int, height: int, where: str) -> list[Shape]:
    ties = _relations(regions)
    words: dict[str, str] = {}  # region id -> label, which may stand in a result of its own
    for region in regions:
        value = region.get("value")
        for kind in ("rectanglelabels", "polygonlabels", "labels"):
            if isinstance(value, dict) and isinstance(value.get(kind), list) and value[kind]:
                words[str(region.get("id", ""))] = str(value[kind][0])
    shapes = []
    for place, region in enumerate(regions, 1):
        kind = _kind(region)
        if kind not in ("rectangle", "polygon"):
            continue
        key, value = str(region.get("id", "")), region.get("value")
        at = f"region {key or place}"
        if not isinstance(value, dict):
            raise UserError(f"{where}, {at}: expected a value with the place of the {kind}")
        scale = np.array([width, height]) / 100
        turns = value.get("rotation", 0), region.get("image_rotation") or 0
        if any(number(turn, f"{where}, {at}, rotation") for turn in turns):
            raise UserError(f"{where}, {at}: turned; expected an upright {kind} on an image as it lies")
        if kind == "rectangle":
            x, y, w, h = (number(value.get(name), f"{where}, {at}, {name}") for name in ("x", "y", "width", "height"))
            with np.errstate(over="ignore"):  # an infinite box is refused with the other wrong ones
                box = np.array([x, y, x + w, y + h]) * np.tile(scale, 2)
        else:
            points = value.get("points")
            if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
                raise UserError(f"{where}, {at}: expected points as [[x, y], ...] in percent")
            xy = np.array([[number(v, f"{where}, {at}") for v in point] for point in points]).reshape(-1, 2) * scale
            try:
                box = polygon_box([xy.ravel().tolist()])
            except ValueError as error:
                raise UserError(f"{where}, {at}: {error}") from None
        shapes.append(Shape(words.get(key, ""), box, at, _note(region), ties.get(key, "")))
    return shapes


def _relations(regions: list[dict[str, Any]]) -> dict[str, str]:
    """Return region id -> a name shared by the two regions of a relation."""
    ties: dict[str, str] = {}
    for region in regions:
        if region.get("type") == "relation":
            ends = [str(region.get(name, "")) for name in ("from_id", "to_id")]
            tie = next((ties[end] for end in ends if end in ties), ends[0])
            ties |= dict.fromkeys(ends, tie)
    return ties


def _note(region: dict[str, Any]) -> str:
    meta = region.get("meta")
    texts = meta.get("text") if isinstance(meta, dict) else None
    for text in texts if isinstance(texts, list) else [texts]:
        if isinstance(text, str) and text.startswith(NOTE):
            return text.removeprefix(NOTE).strip()
    return ""


def write_label_studio(path: Path, annotations: Annotations) -> None:
    """Write tasks for a project with images in local storage: an <Image name="image" value="$image"/> and
    <RectangleLabels name="box" toName="image"> of the labels big and small."""
    lesions = annotations.by_picture()
    tasks = []
    for place, picture in enumerate(annotations.pictures, 1):
        data = {
            "image": LOCAL + urllib.parse.quote(picture.file_name),
            "width": picture.width,
            "height": picture.height,
        } | ({"split": picture.split} if picture.split else {})
        result = [entry for lesion in lesions[picture.image_id] for entry in _entries(lesion, picture)]
        tasks.append({"id": place, "data": data, "annotations": [{"id": place, "result": result}]})
    write_json_atomic(path, tasks)


def _entries(lesion: Lesion, picture: Picture) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    percent = 100 / np.array([picture.width, picture.height] * 2)
    for label, box in ((BIG_LABEL, lesion.big_box), (SMALL_LABEL, lesion.small_box)):
        if box is None:
            continue
        x0, y0, x1, y1 = (float(value) for value in box * percent)
        key = hashlib.sha256(f"{picture.image_id}|{lesion.lesion_id}|{label}".encode()).hexdigest()[:10]
        entries.append(
            {
                "id": key,
                "type": "rectanglelabels",
                "from_name": "box",
                "to_name": "image",
                "image_rotation": 0,
                "original_width": picture.width,
                "original_height": picture.height,
                "value": {
                    "x": x0,
                    "y": y0,
                    "width": x1 - x0,
                    "height": y1 - y0,
                    "rotation": 0,
                    "rectanglelabels": [label],
                },
                "meta": {"text": [NOTE + lesion.lesion_id]},
            }
        )
    if len(entries) == 2:
        entries.append(
            {"type": "relation", "from_id": entries[0]["id"], "to_id": entries[1]["id"], "direction": "right"}
        )
    return entries

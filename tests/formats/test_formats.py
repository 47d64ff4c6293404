"""Annotations of other tools: round trips, hand-written documents with known boxes, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as pycoco
from pycocotools.coco import COCO

from lesionsam.errors import UserError
from lesionsam.formats import rle
from lesionsam.formats.convert import FORMATS, WRITERS, convert, guess_format, read_annotations
from lesionsam.formats.gather import find_pictures
from lesionsam.formats.records import Annotations, Labels, Lesion, Picture, with_small_boxes

# pycocotools 2.0.11 decodes through an array class that numpy 2 finds old-fashioned.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SIZES = {"train/a": (200, 100), "train/b & <c>": (333, 77), "test/empty": (10, 10), "test/ä": (641, 480)}
HEADER = "image_id,lesion_id,width,height,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1\n"
ROW = "a,0,200,100,10.00,20.00,110.00,80.00,40.00,40.00,60.50,50.25\n"


def lesion(image_id: str, lesion_id: str, big: list[float], small: list[float] | None) -> Lesion:
    return Lesion(image_id, lesion_id, np.array(big), None if small is None else np.array(small))


def many() -> Annotations:
    """Several lesions an image, nested and overlapping boxes, odd names, an image without any."""
    pictures = tuple(Picture(Path(name).name, f"{name}.png", *size, name.split("/")[0]) for name, size in SIZES.items())
    lesions = (
        lesion("a", "0", [10, 20, 110, 80], [40, 40, 60.5, 50.25]),
        lesion("a", "right", [5, 15, 199, 99.5], [120.13, 30, 150, 60]),
        lesion("b & <c>", '"1"', [0, 0, 333, 77], [1 / 3, 2 / 3, 300, 70]),
        lesion("ä", "0", [100.01, 100.02, 400.03, 333.04], [200, 200, 201, 201]),
        lesion("ä", "1", [110, 110, 390, 320], [150, 150, 160, 170]),
    )
    return Annotations(pictures, lesions)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, size in SIZES.items():
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 150, 130)).save(path)
    return tmp_path / "images"


def same(found: Annotations, wanted: Annotations, *, within: float = 1e-5) -> None:
    assert [(one.image_id, one.lesion_id) for one in found.lesions] == [
        (one.image_id, one.lesion_id) for one in wanted.lesions
    ]
    for one, other in zip(found.lesions, wanted.lesions, strict=True):
        assert one.small_box is not None
        assert other.small_box is not None
        assert np.abs(one.big_box - other.big_box).max() <= within
        assert np.abs(one.small_box - other.small_box).max() <= within


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("form", ["coco", "cvat", "label-studio"])
def test_round_trip_is_lossless(form: str, tmp_path: Path, images: Path) -> None:
    path, wanted = tmp_path / "file", many()
    WRITERS[form](path, wanted)
    found = read_annotations(path, form)
    same(found, wanted)
    assert found.pictures == wanted.pictures, "names, sizes, splits, and the image without a lesion"
    assert found.notes == ()
    assert read_annotations(path, form, pictures=find_pictures(images)).pictures == wanted.pictures
    WRITERS[form](tmp_path / "again", found)
    again = read_annotations(tmp_path / "again", form)
    same(again, wanted)


@pytest.mark.parametrize("form", FORMATS)
def test_from_the_two_box_csv_and_back(form: str, tmp_path: Path, images: Path) -> None:
    """Byte for byte, but for lesion ids, splits and the order of images in YOLO, which has no place for them."""
    wanted = many()
    if form == "yolo":
        names = ["0", "1", "0", "0", "1"]
        wanted = Annotations(
            tuple(replace(each, split="") for each in wanted.pictures),
            tuple(replace(one, lesion_id=name) for one, name in zip(wanted.lesions, names, strict=True)),
        )
    start, middle, end = tmp_path / "start.csv", tmp_path / "middle", tmp_path / "end.csv"
    WRITERS["csv"](start, wanted)
    convert(start, middle, to_form=form, images=images)
    convert(middle, end, from_form=form, images=images)
    order = sorted if form == "yolo" else list
    assert order(end.read_text("utf-8").splitlines()) == order(start.read_text("utf-8").splitlines())


boxes = st.tuples(*[st.floats(0, 1, allow_nan=False, width=32)] * 4)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(boxes, boxes), min_size=1, max_size=4),
    st.integers(20, 5000),
    st.integers(20, 5000),
    st.sampled_from(["coco", "cvat", "label-studio"]),
)
def test_any_boxes_come_back(drawn: list[tuple[Any, Any]], width: int, height: int, form: str) -> None:
    """Ties by lesion id do not depend on where boxes lie: many of these overlap or are equal."""
    lesions = []
    for number, (outer, inner) in enumerate(drawn):
        low, high = np.minimum(outer[:2], outer[2:]), np.maximum(outer[:2], outer[2:])
        big = np.concatenate([low * 0.9, np.minimum(high + 0.1, 1)]) * np.array([width, height] * 2)
        side, (x, y) = big[2:] - big[:2], inner[:2]
        start = big[:2] + side * np.array([x, y]) * 0.5
        lesions.append(Lesion("a", str(number), big, np.concatenate([start, start + side * 0.4])))
    wanted = Annotations((Picture("a", "a.png", width, height, "dev"),), tuple(lesions))
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[form](Path(folder) / "file", wanted)
        same(read_annotations(Path(folder) / "file", form), wanted)


# -------------------------------------------------------------------------------------------- what other tools write


def written(path: Path, text: str | dict | list) -> Path:
    path.write_text(text if isinstance(text, str) else json.dumps(text), "utf-8")
    return path


def coco_file(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 200, "height": 100}],
        "categories": [{"id": 3, "name": "melanoma"}],
        "annotations": [{"id": 9, "image_id": 7, "category_id": 3, "bbox": [10, 20, 100, 60], "iscrowd": 0}],
    } | changes


def one(entry: dict[str, Any]) -> dict[str, Any]:
    return coco_file(annotations=[{"id": 9, "image_id": 7, "category_id": 3} | entry])


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><job><id>5</id></job></meta>
  <image id="0" name="folder/a.jpg" subset="Train" width="200" height="100">
    <tag label="checked" source="manual"></tag>
    <box label="Rough" source="manual" occluded="0" xtl="10.00" ytl="20.00" xbr="110.00" ybr="80.00" z_order="0"
      group_id="4"></box>
    <box label="rough" source="manual" occluded="0" xtl="5.00" ytl="15.00" xbr="150.00" ybr="95.00" z_order="0"></box>
    <box label="core" occluded="0" source="manual" xtl="40" ytl="40" xbr="60.5" ybr="50.25" z_order="0"></box>
    <box label="core" occluded="0" source="manual" xtl="41" ytl="41" xbr="60" ybr="50" group_id="4"></box>
    <points label="p" points="1,2"></points>
  </image>
</annotations>"""


def test_cvat_export(tmp_path: Path) -> None:
    """Labels of one's own in any case; the group ties, then what contains what."""
    found = read_annotations(written(tmp_path / "a.xml", CVAT), "cvat", labels=Labels("rough", "core"))
    assert found.pictures == (Picture("a", "folder/a.jpg", 200, 100, "train"),)
    same(
        found,
        Annotations(
            (),
            (
                lesion("a", "0", [10, 20, 110, 80], [41, 41, 60, 50]),
                lesion("a", "1", [5, 15, 150, 95], [40, 40, 60.5, 50.25]),
            ),
        ),
    )
    assert found.notes == (
        "1 shapes other than boxes, polygons and masks were left out: image 'folder/a.jpg' points 6",
    )


def test_a_cvat_mask_counts_with_its_rectangle(tmp_path: Path) -> None:
    """A mask of 3 x 2 pixels at (5, 7): rows 110, 011."""
    text = (
        '<annotations><image name="a.png" width="20" height="10"><mask label="x" rle="0, 2, 2, 2" left="5" '
        'top="7" width="3" height="2"/></image></annotations>'
    )
    found = read_annotations(written(tmp_path / "a.xml", text), "cvat")
    assert found.lesions[0].big_box.tolist() == [5, 7, 8, 9]


def studio_region(key: str, label: str, x: float, y: float, w: float, h: float, **more: Any) -> dict[str, Any]:
    return {
        "id": key,
        "type": "rectanglelabels",
        "from_name": "tag",
        "to_name": "img",
        "original_width": 200,
        "original_height": 100,
        "image_rotation": 0,
        "value": {"x": x, "y": y, "width": w, "height": h, "rotation": 0, "rectanglelabels": [label]},
    } | more


def studio_task(*regions: dict[str, Any], image: str = "/data/upload/3/0a1b2c3d-a.jpg", **more: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "data": {"image": image},
        "annotations": [{"id": 8, "was_cancelled": False, "result": list(regions)}],
    } | more


def test_label_studio_export(tmp_path: Path) -> None:
    regions = [
        studio_region("r1", "Big", 5, 20, 50, 60),
        studio_region("r2", "big", 2.5, 15, 70, 80),
        studio_region("r3", "small", 20, 40, 10, 10),
        studio_region("r4", "small", 21, 41, 9, 9),
        {"type": "relation", "from_id": "r4", "to_id": "r1", "direction": "right"},
    ]
    skipped = {"id": 3, "result": [], "was_cancelled": True}
    task = studio_task(*regions)
    task["annotations"] = [skipped, *task["annotations"], {"id": 9, "result": []}]
    other = studio_task(image="https://host/x/b%20c.jpg", id=2)
    found = read_annotations(written(tmp_path / "a.json", [task, other]), "label-studio")
    same(
        found,
        Annotations(
            (),
            (
                lesion("a", "0", [10, 20, 110, 80], [42, 41, 60, 50]),
                lesion("a", "1", [5, 15, 145, 95], [40, 40, 60, 50]),
            ),
        ),
    )
    assert found.pictures == (Picture("a", "a.jpg", 200, 100),)
    assert [note.split(" ")[0] for note in found.notes] == ["1", "1"], "another annotation, an image of unknown size"
    known = {"a": Picture("a", "a.jpg", 200, 100), "b c": Picture("b c", "b c.jpg", 9, 9)}
    assert len(read_annotations(tmp_path / "a.json", "label-studio", pictures=known).pictures) == 2


def test_label_studio_labels_beside_the_rectangle(tmp_path: Path) -> None:
    """With <Labels> and <Rectangle> the label is a result of its own with the region's id."""
    place = studio_region("r1", "", 5, 20, 50, 60)
    place["type"] = "rectangle"
    del place["value"]["rectanglelabels"]
    word = {"id": "r1", "type": "labels", "from_name": "l", "to_name": "img", "value": {"labels": ["small"]}}
    big = studio_region("r0", "big", 0, 0, 100, 100)
    polygon = {
        "id": "p",
        "type": "polygonlabels",
        "original_width": 200,
        "original_height": 100,
        "value": {"points": [[10, 10], [60, 20], [30, 90]], "polygonlabels": ["x"]},
    }
    path = written(tmp_path / "a.json", [studio_task(big, place, word, polygon)])
    found = read_annotations(path, "label-studio")
    same(found, Annotations((), (lesion("a", "0", [0, 0, 200, 100], [10, 20, 110, 80]),)))
    assert found.notes == ("1 shapes with other labels than 'big' and 'small' were left out: image 'a' region p",)
    alone = read_annotations(written(tmp_path / "b.json", [studio_task(polygon)]), "label-studio")
    assert alone.lesions[0].big_box.tolist() == [20, 10, 120, 90]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "rough\nLESION\n\n"),
        ("obj.names", "rough\nlesion\n"),
        ("data.yaml", "names: [rough, lesion]\n"),
        ("data.yaml", "nc: 2\nnames:\n  0: rough\n  1: lesion\n"),
    ],
)
def test_yolo_folder(tmp_path: Path, images: Path, name: str, content: str) -> None:
    """Class names beside or above the labels; polygons; images without a file."""
    labels = tmp_path / "set" / "labels" / "train"
    labels.mkdir(parents=True)
    (tmp_path / "set" / name).write_text(content)
    (labels / "a.txt").write_text("1 0.3 0.5 0.5 0.6\n0 0.1 0.1 0.9 0.2 0.5 0.7\n")
    (labels / "empty.txt").write_text("")
    found = read_annotations(tmp_path / "set" / "labels", "yolo", pictures=find_pictures(images))
    assert [one.big_box.tolist() for one in found.lesions] == [
        pytest.approx([10, 20, 110, 80]),
        pytest.approx([20, 10, 180, 70]),
    ]
    found = read_annotations(labels, "yolo", pictures=find_pictures(images), classes=["other", "big"])
    assert [one.lesion_id for one in found.lesions] == ["0"]
    assert found.notes == ("1 shapes with other labels than 'big' and 'small' were left out: image 'a' a.txt line 2",)


def test_coco_without_boxes(tmp_path: Path) -> None:
    """The box is what surrounds polygons or mask; crowds are left out; one box a lesion makes the other."""
    mask = np.zeros((100, 200), bool)
    mask[20:80, 10:110] = True
    entries = [
        {"segmentation": [[10, 20, 110, 20, 60, 80], [12, 30, 20, 30, 20, 79.5]]},
        {"segmentation": {"size": [100, 200], "counts": rle.runs_of(mask)}},
        {"segmentation": rle.encode(mask)},
        {"bbox": [1, 1, 2, 2], "iscrowd": 1},
    ]
    document = coco_file(
        annotations=[{"id": k, "image_id": 7, "category_id": 3} | entry for k, entry in enumerate(entries)]
    )
    found = read_annotations(written(tmp_path / "a.json", document), "coco")
    assert [each.big_box.tolist() for each in found.lesions] == [[10, 20, 110, 80]] * 3
    assert [each.lesion_id for each in found.lesions] == ["0", "1", "2"]
    assert found.notes == ("1 crowd annotations (iscrowd) were left out: annotation 3",)


def test_coco_categories(tmp_path: Path) -> None:
    document = coco_file(categories=[{"id": 3, "name": "melanoma"}, {"id": 4, "name": "ruler"}])
    document["annotations"].append({"id": 10, "image_id": 7, "category_id": 4, "bbox": [0, 0, 9, 9]})
    path = written(tmp_path / "a.json", document)
    assert len(read_annotations(path, "coco").lesions) == 2
    assert len(read_annotations(path, "coco", categories=["melanoma"]).lesions) == 1
    with pytest.raises(UserError, match=r"a\.json: no category 'nevus'; it has melanoma, ruler"):
        read_annotations(path, "coco", categories=["nevus"])


def test_pycocotools_reads_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Boxes and areas, by COCO's own tools."""
    WRITERS["coco"](tmp_path / "a.json", many())
    held = COCO(str(tmp_path / "a.json"))
    first = held.loadAnns(held.getAnnIds(catIds=[1]))[0]
    assert (first["bbox"], first["area"]) == ([10, 20, 100, 60], 6000)
    assert len(held.getAnnIds(catIds=[1])) == len(held.getAnnIds(catIds=[2])) == 5
    capsys.readouterr()


# ------------------------------------------------------------------------------------------------ one box, two boxes


def test_small_box_from_the_big_one(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", coco_file())
    convert(path, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == (
        HEADER + "a,0,200,100,10.00,20.00,110.00,80.00,37.50,36.50,82.50,63.50\n"
    ), "45 % about the same centre"
    found = convert(path, tmp_path / "c.csv", core=0.2)
    assert found.lesions[0].small_box is not None
    assert found.lesions[0].small_box.tolist() == pytest.approx([50, 44, 70, 56])
    assert found.notes[0].startswith("1 of 1 cores were made from the one box given: 0.2 of its sides")
    with pytest.raises(UserError, match="expected a number between 0 and 1, got 1"):
        convert(path, tmp_path / "d.csv", core=1)


def test_small_box_lies_in_an_ellipse_drawn_too_large() -> None:
    """The rule's own claim: corners of the core, in an ellipse whose bounding box was drawn 57 % too large."""
    made = with_small_boxes(Annotations((), (lesion("a", "0", [0, 0, 157, 157], None),))).lesions[0].small_box
    assert made is not None
    assert math.hypot(*(made[2:] - 78.5)) < 50


@pytest.mark.parametrize(
    ("form", "lost"),
    [
        ("coco", []),
        ("cvat", []),
        ("label-studio", []),
        ("yolo", ["yolo holds no lesion ids"]),
        ("csv", ["csv has a row per lesion: 1 images without any"]),
    ],
)
def test_what_a_format_cannot_hold_is_told(form: str, lost: list[str], tmp_path: Path) -> None:
    WRITERS["coco"](tmp_path / "a.json", many())
    notes = convert(tmp_path / "a.json", tmp_path / "b", to_form=form).notes
    assert len(notes) == len(lost)
    assert all(note.startswith(start) for note, start in zip(notes, lost, strict=True))


def test_drawn_small_boxes_stay() -> None:
    wanted = many()
    assert with_small_boxes(wanted) is wanted


def test_csv_may_lack_small_boxes(tmp_path: Path) -> None:
    rows = HEADER + ROW + "a,1,200,100,1,1,50,50,,,,\n"
    found = read_annotations(written(tmp_path / "a.csv", rows), "csv")
    assert [each.small_box is None for each in found.lesions] == [False, True]
    head = HEADER.partition(",small")[0]
    found = read_annotations(written(tmp_path / "a.csv", head + "\na,1,200,100,1,1,50,50\n"), "csv")
    assert found.lesions[0].small_box is None


# --------------------------------------------------------------------------------------------------------------- RLE


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_run_lengths_agree_with_pycocotools(mask: np.ndarray) -> None:
    text = rle.encode(mask)
    assert text["counts"].encode() == pycoco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    height, width = mask.shape
    plain = {"size": [height, width], "counts": rle.runs_of(mask)}
    for form in (text, plain):
        assert np.array_equal(rle.decode(form, height, width), mask)
    assert np.array_equal(pycoco.decode(pycoco.frPyObjects(plain, height, width)).astype(bool), mask)


def test_polygons_agree_with_pycocotools() -> None:
    """A star and a second part: mask and area as COCO's tools draw them."""
    angles = np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2, 12.0, 30.0)
    star = np.stack([50 + radii * np.cos(angles), 40 + radii * np.sin(angles)], 1).ravel().tolist()
    parts = [star, [0, 0, 10.5, 0, 10.5, 80]]
    mask = rle.decode(parts, 80, 100)
    wanted = pycoco.merge(pycoco.frPyObjects(parts, 80, 100))
    assert np.array_equal(mask, pycoco.decode(wanted))
    assert mask.sum() == pycoco.area(wanted)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [2, 3], "counts": [1, 2]}, "the runs cover 3 pixels; expected 6 = 3x2"),
        ({"size": [2, 3], "counts": [7, -1]}, "a run of -1 pixels"),
        ({"size": [2, 3], "counts": [1.5, 4.5]}, "expected whole numbers"),
        ({"size": [3, 2], "counts": [6]}, r"size \(height, width\) is \[3, 2\]; expected \[2, 3\]"),
        ({"size": [2, 3], "counts": None}, "expected counts as a list or as text, got nothing"),
        ({"size": [2, 3]}, "expected size and counts, got size"),
        ({"size": [2, 3], "counts": "ÿ"}, "the character 'ÿ' is none of the compressed form"),
        ({"size": [2, 3], "counts": "6P"}, "ends in the middle of a run"),
        ({"size": [2, 3], "counts": "o" * 40}, "a run too long for any image"),
        ({"size": [2, 3], "counts": "oooo1"}, "the runs cover"),
        ("polygon", "expected polygons or RLE, got text"),
        (None, "expected polygons or RLE, got nothing"),
        ([], "segmentation: empty"),
        ([[1, 2, 3, 4]], "4 numbers; expected x and y of at least 3 points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "7 numbers"),
        ([[1, 2, 3, 4, 5, "6"]], "expected a list of numbers"),
        ([1, 2, 3, 4, 5, 6], "expected a list of numbers"),
        ([[0, 0, 3, 0, 3, float("inf")]], "finite"),
        ([[0, 0, 5, 0, 5, 2]], "leaves the image of 3x2 px by 2.0 px"),
        ([[0, -2, 3, 0, 3, 2]], "leaves the image of 3x2 px by 2.0 px"),
        ([[0, 0, 1e30, 0, 3, 2]], "leaves the image"),
    ],
)
def test_faulty_segmentations(segmentation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rle.decode(segmentation, 2, 3)


# ----------------------------------------------------------------------------------------------------------- refusals

BOMB = (
    '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY lol "lol"><!ENTITY lol2 "&lol;&lol;">]>'
    "<annotations>&lol2;</annotations>"
)
BOX = '<box label="big" xtl="1" ytl="1" xbr="{}" ybr="{}"{}/>'


def cvat(*shapes: str, head: str = 'name="a.jpg" width="200" height="100"') -> str:
    return f"<annotations><image {head}>{''.join(shapes)}</image></annotations>"


FAULTS: dict[str, tuple[str, Any, str]] = {
    "coco: no JSON": ("coco", '{"images": [', r"line 1: not JSON"),
    "coco: NaN": ("coco", '{"images": [NaN]}', "NaN is no JSON number"),
    "coco: deep": ("coco", "[" * 100_000, "nested too deeply"),
    "coco: empty": ("coco", "", "empty; expected COCO instances JSON"),
    "coco: a list": ("coco", [], "with the lists images, annotations and categories"),
    "coco: no images": ("coco", {"annotations": []}, "with the lists images"),
    "coco: image twice": ("coco", coco_file(images=coco_file()["images"] * 2), "image 7: this id stands twice"),
    "coco: id": ("coco", coco_file(images=[{"id": "x"}]), "image number 1: expected an object with a whole number"),
    "coco: image": ("coco", one({"image_id": 1}), "annotation 9: image_id 1 stands for no image"),
    "coco: category": (
        "coco",
        one({"category_id": 1}),
        r"annotation 9: category_id 1 stands for no category; it has 3 \(melanoma\)",
    ),
    "coco: categories": ("coco", coco_file(categories={}), "expected a list of category objects"),
    "coco: size": (
        "coco",
        coco_file(images=[{"id": 7, "file_name": "a.jpg", "width": 0, "height": 9}]),
        "image 'a.jpg': expected width and height in pixels, .*, got 0 and 9",
    ),
    "coco: outside name": (
        "coco",
        coco_file(images=[{"id": 7, "file_name": "../a.jpg", "width": 9, "height": 9}]),
        "expected a file name below the folder",
    ),
    "coco: same stem": (
        "coco",
        coco_file(images=[{"id": k, "file_name": f"{k}/a.jpg", "width": 9, "height": 9} for k in (6, 7)]),
        "'6/a.jpg' and '7/a.jpg' have the same id 'a'",
    ),
    "coco: no area": ("coco", one({"bbox": [1, 1, 0, 5]}), r"annotation 9: bbox has no area \(0 x 5 px\)"),
    "coco: no box": ("coco", one({}), "annotation 9: expected bbox as"),
    "coco: text box": ("coco", one({"bbox": [1, 1, "x", 5]}), "annotation 9, bbox: expected a finite number, got 'x'"),
    "coco: box outside": ("coco", one({"bbox": [150, 0, 90, 9]}), r"lesion '0', big_x1: 240 lies outside"),
    "coco: empty mask": ("coco", one({"segmentation": {"size": [100, 200], "counts": [20000]}}), "its mask is empty"),
    "coco: unknown RLE": (
        "coco",
        one({"segmentation": {"counts": 5, "size": [100, 200]}}),
        "annotation 9: RLE: expected counts as a list or as text",
    ),
    "cvat: bomb": ("cvat", BOMB, r"line 1: holds a document type or entities"),
    "cvat: bomb in UTF-16": ("cvat", BOMB.encode("utf-16"), "holds a document type or entities"),
    "cvat: external": ("cvat", '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotations/>', "holds a document type"),
    "cvat: entity": ("cvat", "<annotations>&x;</annotations>", "not XML .undefined entity"),
    "cvat: no XML": ("cvat", "image_id,big", "not XML"),
    "cvat: other": ("cvat", "<svg/>", "<svg>: expected CVAT for images"),
    "cvat: video": ("cvat", "<annotations><track/></annotations>", "<track>: expected CVAT for images"),
    "cvat: size": ("cvat", cvat(head='name="a.jpg" width="x" height="9"'), "expected width and height in pixels"),
    "cvat: turned": ("cvat", cvat(BOX.format(9, 9, ' rotation="30.0"')), "a.jpg', box 1: turned by 30.0 degrees"),
    "cvat: number": ("cvat", cvat(BOX.format("x", 9, "")), "box 1: xbr: expected a finite number, got 'x'"),
    "cvat: infinite": ("cvat", cvat(BOX.format("inf", 9, "")), "box 1: xbr: expected a finite number"),
    "cvat: no box": ("cvat", cvat(BOX.format(0, 9, "")), r"big_x0, big_x1: expected big_x0 < big_x1"),
    "cvat: polygon": ("cvat", cvat('<polygon label="x" points="1,2;3,4"/>'), "polygon 1: polygon: 4 numbers"),
    "cvat: mask outside": (
        "cvat",
        cvat('<mask label="x" rle="6" left="199" top="0" width="3" height="2"/>'),
        "big_x1: 202 lies outside the image 'a' of 200x100 px",
    ),
    "cvat: no big": (
        "cvat",
        cvat('<box label="small" xtl="1" ytl="1" xbr="2" ybr="2"/>'),
        r"image 'a': box 1: the core \[1, 1, 2, 2\] lies inside no big box",
    ),
    "studio: object": ("label-studio", {}, "expected Label Studio JSON"),
    "studio: min": ("label-studio", [{"image": "a.jpg", "label": []}], "task 1: expected data and annotations"),
    "studio: no address": ("label-studio", [studio_task() | {"data": {}}], "expected data.image"),
    "studio: turned": (
        "label-studio",
        [studio_task(studio_region("r", "big", 1, 1, 5, 5, image_rotation=90))],
        "task 1, region r: turned",
    ),
    "studio: number": (
        "label-studio",
        [studio_task(studio_region("r", "big", 1, 1, 5, None))],  # type: ignore[arg-type]
        "region r, height: expected a finite number, got 'None'",
    ),
    "studio: points": (
        "label-studio",
        [studio_task({"type": "polygon", "value": {"points": [[1], [2]]}, "original_width": 9, "original_height": 9})],
        r"region 1: expected points as",
    ),
    "studio: one small twice": (
        "label-studio",
        [
            studio_task(
                *(
                    studio_region(k, k[:-1], 1, 1, 50, 50, meta={"text": "lesion_id: x"})
                    for k in ("big1", "small1", "small2")
                )
            )
        ],
        "region small2: a second core of the lesion of region big1",
    ),
    "studio: one id twice": (
        "label-studio",
        [studio_task(*(studio_region(k, "big", 1, 1, 50, 50, meta={"text": ["lesion_id: x"]}) for k in "ab"))],
        "two lesions have the id 'x'",
    ),
    "csv: number": ("csv", HEADER + ROW.replace("110.00", "wide"), "line 2, big_x1: expected a finite number"),
    "csv: half a box": ("csv", HEADER + ROW.replace("60.50", ""), "line 2, small_x1: expected all four numbers"),
    "csv: twice": ("csv", HEADER + ROW * 2, "line 3: lesion '0' of image 'a' stands already in line 2"),
    "csv: no size": ("csv", HEADER + ROW.replace("200", ""), r"line 2: the size of image 'a' is unknown"),
    "csv: exchanged": ("csv", HEADER + "a,0,200,100,40,40,60,50,10,20,110,80\n", "are the two exchanged?"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str) -> None:
    form, content, message = FAULTS[fault]
    path = tmp_path / "file"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        written(path, content)
    with pytest.raises(UserError, match=message) as caught:
        read_annotations(path, form)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def damaged(document: Any, rng: random.Random) -> Any:
    """A JSON document with some of its parts taken out or replaced by something else."""

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield path
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield from places(value[key], (*path, key))

    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2, 3])):
        *path, leaf = rng.choice([path for path in places(document) if path])
        held = document
        for key in path:
            held = held[key]
        if rng.random() < 0.25:
            del held[leaf]
        else:
            held[leaf] = rng.choice(
                [
                    None,
                    True,
                    -1,
                    0,
                    1e308,
                    "x",
                    "",
                    [],
                    {},
                    [1],
                    {"a": 1},
                    "../x",
                    "n" * 300,
                    "a\0",
                    [[1, 2]],
                    10**30,
                    10**400,
                    {"size": [1, 1], "counts": "0"},
                ]
            )
    return document


@pytest.mark.parametrize("form", ["coco", "label-studio", "cvat", "csv"])
def test_damaged_files_end_in_one_line_or_are_read(form: str, tmp_path: Path) -> None:
    """A hundred files with planted nonsense: no traceback, whatever it is."""
    WRITERS[form](tmp_path / "sound", many())
    sound, rng = (tmp_path / "sound").read_bytes(), random.Random(7)
    refused: list[str] = []
    for _ in range(100):
        if form in ("coco", "label-studio"):
            broken = json.dumps(damaged(json.loads(sound), rng)).encode()
        else:
            at, end = sorted(rng.choices(range(len(sound)), k=2))
            piece = rng.choice([b"-", b"9" * 30, b"<", b'"', b"inf", b"\x00", b"\xff", b"&x;", sound[at : at + 50]])
            broken = sound[:at] + piece + sound[min(end, at + rng.choice([0, 0, 5, 40])) :]
        (tmp_path / "broken").write_bytes(broken)
        try:
            read_annotations(tmp_path / "broken", form)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert max(len(line) for line in refused) < 500 + len(str(tmp_path))


YOLO_FAULTS: dict[str, tuple[str, str]] = {
    "fields": ("0 0.5 0.5 0.5\n", r"a\.txt: line 1: 4 fields"),
    "confidence": ("0 0.5 0.5 0.5 0.5 0.9", "6 fields; expected class, x, y, width, height"),
    "class": ("\n2 0.5 0.5 0.5 0.5", r"line 2: class '2'; expected 0 to 1 \(big, small\)"),
    "negative class": ("-1 0.5 0.5 0.5 0.5", "class '-1'"),
    "number": ("0 a 0.5 0.5 0.5", "line 1: expected a finite number, got 'a'"),
    "nan": ("0 nan 0.5 0.5 0.5", "expected a finite number"),
    "pixels": ("0 50 50 20 20", "are these pixels"),
    "outside": ("0 0.9 0.5 0.5 0.5", "big_x1: 230 lies outside the image 'a' of 200x100 px"),
    "no area": ("0 0.5 0.5 0 0.5", "expected big_x0 < big_x1"),
    "bytes": ("\xff\xfe", "not UTF-8"),
}


@pytest.mark.parametrize("fault", YOLO_FAULTS)
def test_yolo_faults(tmp_path: Path, images: Path, fault: str) -> None:
    text, message = YOLO_FAULTS[fault]
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "a.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read_annotations(folder, "yolo", pictures=find_pictures(images))


OTHER_FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no file": (lambda tmp, _: convert(tmp / "x.csv", tmp / "y.json"), r"x\.csv: no such file"),
    "folder": (lambda tmp, images: read_annotations(tmp, "coco"), "is a folder; expected COCO"),
    "no YOLO files": (lambda tmp, images: convert(images, tmp / "y.csv", images=images), "no YOLO label text files"),
    "YOLO needs images": (lambda tmp, images: convert(images, tmp / "y.csv"), r"give the folder of images \(--im"),
    "no images": (lambda tmp, _: find_pictures(tmp / "nowhere"), "nowhere: no such folder"),
    "empty folder": (lambda tmp, _: find_pictures(tmp), "no images in it"),
    "format": (lambda tmp, images: convert(tmp / "b.csv", tmp / "c", from_form="voc"), "got 'voc'"),
    "format to": (lambda tmp, images: convert(tmp / "b.csv", tmp / "c", to_form="voc"), "got 'voc'"),
    "ending": (lambda tmp, images: convert(tmp / "b.csv", tmp / "c.txt"), r"c\.txt: no format is known"),
    "there already": (lambda tmp, images: convert(tmp / "b.csv", tmp / "b.csv"), "is there already"),
    "names unknown": (lambda tmp, images: convert(tmp / "b.csv", tmp / "c.json"), "names image files with their"),
    "not among images": (
        lambda tmp, images: convert(tmp / "c.csv", tmp / "c.json", images=images),
        "'zz' is not among the 4 images given",
    ),
    "other size": (
        lambda tmp, images: convert(tmp / "d.json", tmp / "c.xml", images=images),
        r"d\.json says 300x100 px, the file has 200x100 px; annotate the images as they are",
    ),
    "image missing": (lambda tmp, images: convert(tmp / "e.json", tmp / "c.xml", images=images), "no such image among"),
    "no boxes": (lambda tmp, images: convert(tmp / "f.json", tmp / "c.xml"), "no boxes in it"),
    "folder in use": (
        lambda tmp, images: convert(tmp / "b.csv", images, to_form="yolo", images=images),
        "is not empty; choose a new folder",
    ),
}


@pytest.mark.parametrize("fault", OTHER_FAULTS)
def test_faults_of_conversion(tmp_path: Path, images: Path, fault: str) -> None:
    written(tmp_path / "b.csv", HEADER + ROW)
    written(tmp_path / "c.csv", HEADER + ROW.replace("a,", "zz,", 1))
    for name, change in (("d", {"width": 300}), ("e", {"file_name": "q.jpg"})):
        document = coco_file()
        document["images"][0] |= change
        written(tmp_path / f"{name}.json", document)
    written(tmp_path / "f.json", coco_file(annotations=[]))
    if fault == "empty folder":
        for path in images.rglob("*.png"):
            path.unlink()
    call, message = OTHER_FAULTS[fault]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        call(tmp_path, images)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before, "nothing half written"


def test_formats_by_their_endings(tmp_path: Path) -> None:
    written(tmp_path / "a.json", "\ufeff [ {}]")
    written(tmp_path / "b.JSON", '{"images": []}')
    assert guess_format(tmp_path / "a.json", reading=True) == "label-studio"
    assert guess_format(tmp_path / "b.JSON", reading=True) == "coco"
    assert [guess_format(Path(name), reading=False) for name in ("a.csv", "a.xml", "a.json", "folder")] == [
        "csv",
        "cvat",
        "coco",
        "yolo",
    ]


def test_a_control_character_is_no_xml(tmp_path: Path) -> None:
    wanted = many()
    wanted = replace(wanted, lesions=(replace(wanted.lesions[0], lesion_id="a\x01"),))
    with pytest.raises(UserError, match="XML cannot hold control characters"):
        WRITERS["cvat"](tmp_path / "a.xml", wanted)
    assert not (tmp_path / "a.xml").exists()

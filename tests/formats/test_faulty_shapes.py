"""Shapes and sizes that cannot be taken over: each is named with its id, and none is taken as something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lesionsam.errors import UserError
from lesionsam.formats.convert import convert, read_annotations
from lesionsam.formats.label_studio import LOCAL, file_name

SIZE = {"original_width": 160, "original_height": 120}


def studio(path: Path, *regions: dict[str, Any]) -> Path:
    task = {"id": 3, "data": {"image": "a.png"}, "annotations": [{"result": list(regions)}]}
    path.write_text(json.dumps([task]))
    return path


def region(key: str, kind: str, **value: Any) -> dict[str, Any]:
    return {"id": key, "type": f"{kind}labels", **SIZE, "value": {f"{kind}labels": ["lesion"], **value}}


RECTANGLE = region("r1", "rectangle", x=10, y=10, width=20, height=20)
TRIANGLE = [[10, 10], [60, 20], [30, 90]]


@pytest.mark.parametrize(
    "turned",
    [
        region("p7", "polygon", points=TRIANGLE) | {"image_rotation": 90},
        region("p7", "polygon", points=TRIANGLE, rotation=30),
        region("p7", "rectangle", x=10, y=10, width=20, height=20, rotation=30),
    ],
)
def test_turned_label_studio_shapes_are_refused(tmp_path: Path, turned: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="task 3, region p7: turned; expected an upright"):
        read_annotations(studio(tmp_path / "a.json", RECTANGLE, turned), "label-studio")


def test_label_studio_shapes_that_are_left_out_are_named(tmp_path: Path) -> None:
    others = [
        region("e1", "ellipse", x=50, y=50, radiusX=10, radiusY=5, rotation=0),
        region("b1", "brush", format="rle", rle=[0, 1, 2]),
        region("k1", "keypoint", x=50, y=50, width=1),
        {"id": "c1", "type": "choices", "value": {"choices": ["benign"]}},  # about the image, no shape
        {"type": "relation", "from_id": "e1", "to_id": "b1"},
    ]
    found = read_annotations(studio(tmp_path / "a.json", RECTANGLE, *others), "label-studio")
    assert len(found.lesions) == 1
    assert found.notes == (
        "3 shapes other than rectangles and polygons were left out: task 3 region e1 (ellipse), "
        "task 3 region b1 (brush), task 3 region k1 (keypoint)",
    )


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("/data/upload/3/0a1b2c3d-lesion#3.png", "lesion#3.png"),
        ("images/a#1.png", "a#1.png"),
        ("images/why?.png", "why?.png"),
        ("https://host/x/b%20c.jpg", "b c.jpg"),
        ("https://host/x/b%23c.jpg?X-Amz-Date=1&sig=a.b#top", "b#c.jpg"),
        ("https://host/picture.png?d=mm", "picture.png"),  # the Gravatar parameter, no place in local storage
        ("https://host/picture?d=3", "picture"),
        (LOCAL + "folder/a%231.png", "folder/a#1.png"),
        (LOCAL + "folder/a#1.png", "folder/a#1.png"),
        (LOCAL + "folder/a+b.png", "folder/a+b.png"),
        (LOCAL + "folder/a%26b.png&token=4", "folder/a&b.png"),
        (f"http://localhost:8080{LOCAL}x/a.png", "x/a.png"),
        ("s3://bucket/set/a.TIFF", "a.TIFF"),
    ],
)
def test_addresses(address: str, name: str) -> None:
    assert file_name({"image": address}, "here") == name


def coco(path: Path, *annotations: dict[str, Any], width: int = 160, height: int = 120, name: str = "a.png") -> Path:
    entries = [
        {"id": 7 + k, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 50, "bbox": [10, 10, 60, 40]} | each
        for k, each in enumerate(annotations)
    ]
    document = {
        "images": [{"id": 1, "file_name": name, "width": width, "height": height}],
        "annotations": entries,
        "categories": [{"id": 1, "name": "lesion"}],
    }
    path.write_text(json.dumps(document))
    return path


def test_a_turned_coco_box_is_refused(tmp_path: Path) -> None:
    """CVAT writes a turned rectangle as the box before the turn, and the angle as an attribute."""
    path = coco(tmp_path / "a.json", {"attributes": {"rotation": 45.0}})
    with pytest.raises(UserError, match=r"annotation 7: a box turned by 45.0 degrees"):
        read_annotations(path, "coco")
    upright = coco(tmp_path / "b.json", {"attributes": {"rotation": 0.0}})
    assert len(read_annotations(upright, "coco").lesions) == 1


@pytest.fixture
def phone(tmp_path: Path) -> Path:
    """An upright image of 300 x 400 px, stored as 400 x 300 px with an EXIF orientation, as phones do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (400, 300), (200, 150, 130)).save(tmp_path / "images" / "phone.jpg", exif=exif)
    Image.new("RGB", (300, 400), (200, 150, 130)).save(tmp_path / "images" / "plain.jpg")
    return tmp_path / "images"


@pytest.mark.parametrize("box", [[45, 72, 120, 96], [45, 272, 120, 96]])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("phone.jpg", "its EXIF orientation turns it. .* exchange width and height in .*a.json"),
        ("plain.jpg", "width and height are exchanged; correct them in .*a.json"),
    ],
)
def test_exchanged_width_and_height(tmp_path: Path, phone: Path, box: list[float], name: str, remedy: str) -> None:
    """Whether the box happens to lie inside the wrong frame or not."""
    path = coco(tmp_path / "a.json", {"bbox": box}, width=400, height=300, name=name)
    with pytest.raises(UserError, match=f"a.json says 400x300 px, the file has 300x400 px.*{remedy}"):
        convert(path, tmp_path / "out.csv", images=phone)
    right = coco(tmp_path / "b.json", {"bbox": box}, width=300, height=400, name=name)
    assert np.array_equal(convert(right, tmp_path / "out.csv", images=phone).lesions[0].big_box[:2], box[:2])


def test_a_box_outside_the_frame_that_fits_the_exchanged_one_gets_a_hint(tmp_path: Path) -> None:
    path = coco(tmp_path / "a.json", {"bbox": [45, 272, 120, 96]}, width=400, height=300)
    with pytest.raises(UserError, match=r"outside the image .*are the image's width and height exchanged"):
        convert(path, tmp_path / "out.csv")
    beyond = coco(tmp_path / "b.json", {"bbox": [45, 372, 120, 96]}, width=400, height=300)
    with pytest.raises(UserError, match="outside the image") as caught:
        convert(beyond, tmp_path / "out.csv")
    assert "exchanged" not in str(caught.value)

"""CVAT's driver runs the auto-annotation function on a task whose server is replaced by lists."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cvat_sdk.auto_annotation as cvataa
import numpy as np
import pytest
from cvat_sdk import models
from cvat_sdk.auto_annotation import driver
from cvat_sdk.masks import decode_mask
from PIL import Image

from helpers.tiny import Lesion, draw_lesion, tiny_sam
from lesionsam.errors import UserError
from lesionsam.formats.rle import decode
from lesionsam.inference.image import ImagePredictor
from lesionsam.inference.predictor import Predictor
from lesionsam.integrations.cvat import create
from lesionsam.models.checkpoint import load_sam, save_sam

HEIGHT, WIDTH, TASK_LABEL = 60, 80, 77


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_sam(tiny_sam(sharpness=20), tmp_path / "weights.safetensors", name="compact")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def lesions() -> list[Lesion]:
    return [draw_lesion(np.random.default_rng(k), HEIGHT, WIDTH) for k in range(2)]


def annotate(
    monkeypatch: pytest.MonkeyPatch,
    function: Any,
    lesions: Sequence[Lesion],
    label: str = "lesion",
    kind: str = "mask",
    **options: Any,
) -> list[models.LabeledShapeRequest]:
    """What `annotate_task` would upload for a task of these images, whose label has the number `TASK_LABEL`."""
    samples = [
        SimpleNamespace(
            frame_name=f"clinic/photo {k}.jpg",
            frame_index=k,
            media=SimpleNamespace(load_image=lambda image=each.image: Image.fromarray(image)),
        )
        for k, each in enumerate(lesions)
    ]
    labels = [models.Label(name=label, id=TASK_LABEL, type=kind, attributes=[], sublabels=[])]
    monkeypatch.setattr(driver, "TaskDataset", lambda *_, **__: SimpleNamespace(labels=labels, samples=samples))
    sent: list[models.LabeledShapeRequest] = []

    def upload(action: str, task: int, *, patched_labeled_data_request: Any) -> None:
        assert (action, task) == ("create", 5)
        sent.extend(patched_labeled_data_request.shapes)

    api = SimpleNamespace(partial_update_annotations=upload)
    client: Any = SimpleNamespace(logger=logging.getLogger("cvat"), tasks=SimpleNamespace(api=api))
    cvataa.annotate_task(client, 5, function, **options)
    assert {(shape.label_id, shape.source) for shape in sent} <= {(TASK_LABEL, "auto")}
    return sent


def decoded(shape: models.LabeledShapeRequest) -> np.ndarray:
    return decode_mask(shape.points, image_width=WIDTH, image_height=HEIGHT)


def test_masks_without_a_prompt_are_those_of_auto(
    weights: Path, lesions: list[Lesion], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = annotate(monkeypatch, create(model=str(weights), device="cpu"), lesions)
    assert [shape.frame for shape in shapes] == [0, 1]
    for shape, lesion in zip(shapes, lesions, strict=True):
        (expected,) = Predictor(weights).predict(lesion.image, auto=True)
        assert expected.area
        np.testing.assert_array_equal(decoded(shape), expected.mask)


def test_boxes_of_a_csv_are_prompts_and_images_without_one_get_no_shape(
    weights: Path, lesions: list[Lesion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "boxes.csv"
    big = ",".join(map(str, lesions[0].big.tolist()))
    table.write_text(f"image_id,big_x0,big_y0,big_x1,big_y1\nphoto 0,{big}\n")
    shapes = annotate(monkeypatch, create(model=str(weights), device="cpu", boxes=str(table)), lesions)
    (expected,) = Predictor(weights).predict(lesions[0].image, boxes=lesions[0].big)
    assert [shape.frame for shape in shapes] == [0]
    np.testing.assert_array_equal(decoded(shapes[0]), expected.mask)
    table.write_text("image_id,big_x0,big_y0,big_x1,big_y1\nphoto 0,500,500,600,600\n")
    with pytest.raises(UserError, match=r"boxes: line 2, .*outside"):
        annotate(monkeypatch, create(model=str(weights), device="cpu", boxes=str(table)), lesions)


@pytest.mark.parametrize(("shape", "options"), [("polygon", {}), ("mask", {"conv_mask_to_poly": True})])
def test_polygons_enclose_the_mask(
    weights: Path, lesions: list[Lesion], monkeypatch: pytest.MonkeyPatch, shape: str, options: dict[str, bool]
) -> None:
    function = create(model=str(weights), device="cpu", shape=shape, label="naevus")
    shapes = annotate(monkeypatch, function, lesions[:1], label="naevus", kind="polygon", **options)
    assert {one.type.value for one in shapes} == {"polygon"}
    (expected,) = Predictor(weights).predict(lesions[0].image, auto=True)
    drawn = decode([one.points for one in shapes], HEIGHT, WIDTH)
    assert np.count_nonzero(drawn & expected.mask) / np.count_nonzero(expected.mask) > 0.97  # outlines are simplified


def test_shapes_below_the_confidence_asked_for_are_left_out(
    weights: Path, lesions: list[Lesion], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = create(model=str(weights), device="cpu")
    (found,) = Predictor(weights).predict(lesions[0].image, auto=True)
    assert 0 < found.predicted_iou < 1
    for threshold, number in ((found.predicted_iou * 0.9, 1), (min(1.0, found.predicted_iou * 1.1), 0)):
        assert len(annotate(monkeypatch, function, lesions[:1], conf_threshold=threshold)) == number


def test_a_drawn_box_with_points_becomes_a_mask(weights: Path, lesions: list[Lesion]) -> None:
    function: Any = create(model=str(weights), device="cpu", interactive=True)
    assert (function.spec.min_bounding_boxes, function.spec.min_pos_points) == (1, 0)
    lesion = lesions[0]
    x0, y0, x1, y1 = lesion.big.tolist()
    prompts: Any = SimpleNamespace(
        pos_points=[(40.0, 30.0)], neg_points=[(2.0, 3.0)], bounding_box=((x0, y0), (x1, y1))
    )
    (shape,) = function.detect(None, Image.fromarray(lesion.image), prompts)
    predictor = ImagePredictor(load_sam(None, weights))
    predictor.set_image(lesion.image)
    points, labels = np.array([[40.0, 30.0], [2.0, 3.0]]), np.array([1, 0])
    (expected,), _, _ = predictor.predict(points, labels, lesion.big, multimask_output=False)
    assert shape.type == "mask"
    np.testing.assert_array_equal(decode_mask(shape.points, image_width=WIDTH, image_height=HEIGHT), expected)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(UserError, match="shape: expected mask or polygon, got 'ellipse'"):
        create(shape="ellipse")

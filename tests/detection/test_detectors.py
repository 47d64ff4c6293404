"""Detectors by text, beside transformers' own calls, on tiny random models of three families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from helpers.detectors import DETECTORS, write_detector
from helpers.families import write_hub_folder
from lesionsam.detection.detectors import SAME, Detection, _distinct, open_detector, split_texts
from lesionsam.errors import UserError
from lesionsam.models.sam2 import quiet

THRESHOLD = 0.02
TEXTS = ["skin lesion", "mole"]


@pytest.fixture(scope="module", params=list(DETECTORS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(request.param, tmp_path_factory.mktemp(request.param))


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, shape, dtype=np.uint8) for shape in ((48, 80, 3), (70, 60, 3))]


@torch.no_grad()
def theirs(folder: Path, image: np.ndarray) -> list[tuple[np.ndarray, float, str, Any]]:
    """What transformers finds in one image, before suppression: by its own calls, as its documentation has them."""
    with quiet():
        processor = transformers.AutoProcessor.from_pretrained(folder)
    sizes = [image.shape[:2]]
    found: list[tuple[np.ndarray, float, str, Any]] = []
    if "owlv2" in folder.name:
        model = transformers.Owlv2ForObjectDetection.from_pretrained(folder).eval()
        inputs = processor(images=image, text=[TEXTS], return_tensors="pt")
        (one,) = processor.post_process_grounded_object_detection(model(**inputs), THRESHOLD, sizes)
        labels = [TEXTS[k] for k in one["labels"]]
        found += zip(one["boxes"].numpy(), one["scores"].tolist(), labels, [None] * len(labels), strict=True)
    elif "grounding" in folder.name:
        model = transformers.GroundingDinoForObjectDetection.from_pretrained(folder).eval()
        inputs = processor(images=image, text="skin lesion. mole.", return_tensors="pt")
        (one,) = processor.post_process_grounded_object_detection(
            model(**inputs), inputs.input_ids, THRESHOLD, THRESHOLD, sizes
        )
        labels = [label or TEXTS[0] for label in one["text_labels"]]
        found += zip(one["boxes"].numpy(), one["scores"].tolist(), labels, [None] * len(labels), strict=True)
    else:
        model = transformers.Sam3Model.from_pretrained(folder).eval()
        for text in TEXTS:
            inputs = processor(images=image, text=text, return_tensors="pt")
            outputs = model(**{name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")})
            (one,) = processor.post_process_instance_segmentation(outputs, THRESHOLD, 0.5, sizes)
            masks = list(one["masks"].bool().numpy())
            found += zip(one["boxes"].numpy(), one["scores"].tolist(), [text] * len(masks), masks, strict=True)
    return found


def test_detections_equal_those_of_transformers_and_do_not_depend_on_the_batch(folder: Path) -> None:
    detector = open_detector(str(folder))
    together = detector.detect(images(), TEXTS, threshold=THRESHOLD)
    assert sum(map(len, together)) > 2, "something that could differ"
    for image, found in zip(images(), together, strict=True):
        wanted = theirs(folder, image)
        limits = np.tile(image.shape[1::-1], 2)
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        for one in found:
            near = min(
                wanted,
                key=lambda other: np.abs(np.clip(other[0], 0, limits) - one.box).max() + abs(other[1] - one.score),
            )
            assert np.allclose(np.clip(near[0], 0, limits), one.box, atol=1e-2)
            assert near[1] == pytest.approx(one.score, abs=1e-4)
            assert near[2] == one.text
            assert (one.mask is None) == (near[3] is None)
            if one.mask is not None:
                assert one.mask.shape == image.shape[:2]
                assert (one.mask != near[3]).mean() < 0.01
        if wanted:
            assert found[0].score == pytest.approx(max(score for _, score, _, _ in wanted), abs=1e-4)


def test_a_score_that_nothing_reaches_finds_nothing(folder: Path) -> None:
    assert open_detector(str(folder)).detect(images(), ["mole"], threshold=1.0) == [[], []]


def test_of_several_boxes_of_one_place_the_surest_stays_and_none_leaves_the_image() -> None:
    """Closed form: IoU of the first two is 81 / 119 of equal boxes a tenth apart."""
    boxes = [[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [-5, 35, 12, 60], [41, 5, 60, 9]]
    found = [
        Detection(np.array(box, float), score, "mole")
        for box, score in zip(boxes, [0.4, 0.9, 0.5, 0.6, 0.8], strict=True)
    ]
    kept = _distinct(found, (40, 40))
    assert SAME < 81 / 119
    assert [one.score for one in kept] == [0.9, 0.6, 0.5]
    assert kept[1].box.tolist() == [0, 35, 12, 40]


def test_what_takes_no_text_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is of type 'sam2', which takes no text"):
        open_detector(str(write_hub_folder("sam2", tmp_path / "sam2")))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as a") as caught:
        open_detector(str(broken))
    assert "\n" not in str(caught.value)
    assert split_texts(" skin lesion,mole, ") == ["skin lesion", "mole"]
    with pytest.raises(UserError, match="--text: expected words"):
        split_texts(" , ")

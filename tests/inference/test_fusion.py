"""Both boxes: the enlarged box's mask fused with the box prior, alike for every caller."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.tiny import tiny_sam
from lesionsam.boxes.geometry import pixels_inside
from lesionsam.boxes.outline import FOUND_OFFSET, OUTLINE, Outline
from lesionsam.boxes.prior import OUTSIDE, prior_at
from lesionsam.inference.arguments import Source
from lesionsam.inference.decode import DecodeOptions, decode_lesions
from lesionsam.inference.fusion import FUSION_WEIGHT, fuse
from lesionsam.inference.image import EncodedImages
from lesionsam.inference.inputs import Lesion
from lesionsam.inference.prediction import LesionPrompt, with_others
from lesionsam.inference.run import PredictOptions
from lesionsam.prompts import BOTH, ZOOM

SIDE, CELLS = 64, 16
BIG, SMALL = np.array([12.0, 10, 44, 38]), np.array([22.0, 18, 34, 30])
NOTHING = np.zeros((0, 4))


def picture() -> np.ndarray:
    """Skin with a dark lesion in the boxes' middle, (48, 64, 3) uint8."""
    rng = np.random.default_rng(0)
    image = np.full((48, 64, 3), (200, 160, 140)) + rng.normal(0, 4, (48, 64, 3))
    y, x = np.mgrid[:48, :64]
    image[np.hypot((x - 28) / 13, (y - 24) / 11) < 1] -= 70
    return image.clip(0, 255).astype(np.uint8)


def framed() -> torch.Tensor:
    frame = np.zeros((SIDE, SIDE, 3), np.uint8)
    frame[:48] = picture()
    return torch.from_numpy(frame).permute(2, 0, 1)


def test_the_fused_logits_are_those_of_the_formula() -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 3, (CELLS, CELLS)).astype(np.float32))
    outline = Outline(0.15, 1.1)
    found = fuse(logits, framed(), (48, SIDE), BIG, SMALL, NOTHING, outline)
    prior = np.full((SIDE, SIDE), OUTSIDE, np.float32)
    prior[:48] = outline.shift(prior_at(picture(), BIG, SMALL, NOTHING, (48, SIDE)), BIG)
    cell = SIDE // CELLS
    coarse = prior.reshape(CELLS, cell, CELLS, cell).mean((1, 3))
    inside = pixels_inside(BIG / cell, (CELLS, CELLS))
    expected = logits.numpy() + FUSION_WEIGHT * np.abs(logits.numpy()[inside]).mean() * coarse
    assert np.allclose(found.numpy(), expected, atol=1e-4)
    assert not np.allclose(found.numpy(), logits.numpy(), atol=0.1)


@pytest.mark.parametrize("factor", [0.1, 20.0])
def test_the_scale_of_the_logits_does_not_change_the_mask(factor: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(2).normal(0, 3, (CELLS, CELLS)).astype(np.float32))
    one, other = (fuse(k * logits, framed(), (48, SIDE), BIG, SMALL, NOTHING, Outline(0.15)) for k in (1.0, factor))
    assert torch.allclose(other, factor * one, rtol=1e-4, atol=1e-4)


def test_the_prior_decides_where_the_model_does_not_know() -> None:
    """A model that says `lesion` weakly and everywhere in the box: the mask is the prior's."""
    logits = torch.full((CELLS, CELLS), 0.2)
    mask = fuse(logits, framed(), (48, SIDE), BIG, SMALL, NOTHING, Outline(0.0)) > 0
    assert mask[6, 7]
    assert not mask[10, 3]
    assert not mask[0].any()


def test_both_boxes_are_decoded_on_the_enlarged_box_and_fused() -> None:
    sam = tiny_sam(sharpness=8.0)
    images = EncodedImages.of([picture()], sam.frame)
    prompt, options = LesionPrompt(BIG, SMALL), DecodeOptions(outline=Outline(0.3, 1.2))
    (alone,) = decode_lesions(sam, images, [prompt], [0], ["a/0"], replace(options, kind=ZOOM))
    (both,) = decode_lesions(sam, images, [prompt], [0], ["a/0"], replace(options, kind=BOTH))
    scale = sam.side / 64
    expected = fuse(
        alone.low_res, images.frames[0], images.input_sizes[0], BIG * scale, SMALL * scale, NOTHING, options.outline
    )
    assert torch.allclose(both.low_res, expected, atol=1e-5)
    assert both.predicted_iou == alone.predicted_iou
    (three,) = decode_lesions(sam, images, [prompt], [0], ["a/0"], replace(options, kind=BOTH, num_members=3))
    assert 0 < three.agreement <= 1
    assert not torch.equal(three.low_res, both.low_res)


def test_other_lesions_of_the_image_take_no_part_in_the_colours() -> None:
    sam = tiny_sam(sharpness=8.0)
    image = picture()
    image[10:38, 46:62] = (40, 90, 160)  # beside the box, in its band
    images = EncodedImages.of([image], sam.frame)
    neighbour = LesionPrompt(np.array([46.0, 10, 62, 38]), np.array([50.0, 18, 58, 30]))
    one, other = with_others([LesionPrompt(BIG, SMALL), neighbour])
    assert one.others.tolist() == [[46, 10, 62, 38]]
    assert other.others.tolist() == [BIG.tolist()]
    options = DecodeOptions(BOTH)
    told, untold = (
        decode_lesions(sam, images, [prompt], [0], ["a/0"], options)[0].low_res
        for prompt in (one, LesionPrompt(BIG, SMALL))
    )
    assert float((told - untold).abs().max()) > 1e-3


def test_a_row_of_both_boxes_depends_on_the_other_rows_of_its_image() -> None:
    def key(kind: str, siblings: list[Lesion]) -> str:
        options = PredictOptions(
            "w", Source("boxes", prompt=kind), 0.5, DecodeOptions(kind), 1, "cpu", overlays=False, shapes=False
        )
        return options.key("i", siblings[0], siblings)

    one, two = (Lesion(name, name, rows=((2, {"lesion_id": name}),)) for name in "ab")
    assert key(BOTH, [one]) != key(BOTH, [one, two])
    assert key("box", [one]) == key("box", [one, two])


def test_the_outline_of_the_training_travels_with_the_weights() -> None:
    outline = Outline(0.25, 1.182)
    assert Outline.of_metadata({OUTLINE: outline.to_text()}) == outline
    assert DecodeOptions.of_metadata({OUTLINE: outline.to_text()}).outline == outline
    assert Outline.of_metadata({}) == Outline.of_metadata({OUTLINE: "damaged"}) == Outline(FOUND_OFFSET)

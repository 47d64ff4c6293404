"""The generated shapes and the prompts drawn from them."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from skimage.measure import regionprops

from lesionsam.pretraining import shape_prompts, shapes
from lesionsam.pretraining.shape_prompts import Targets

SIDE, GRID = 64, 32


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn() -> shapes.Shapes:
    return shapes.generate_shapes(64, SIDE, seeded())


@pytest.fixture(scope="module")
def targets() -> Targets:
    return shape_prompts.make_targets(SIDE, GRID, seeded(1), num_images=32)


def test_a_seed_gives_the_same_images_and_another_seed_others() -> None:
    first, again, other = (shapes.generate_shapes(4, SIDE, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.images, other.images)


def test_generating_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    shapes.generate_shapes(2, SIDE, seeded())
    assert torch.equal(before, torch.get_rng_state())


def test_objects_do_not_overlap_and_usable_ones_have_their_size(drawn: shapes.Shapes) -> None:
    assert drawn.images.shape == (64, 3, SIDE, SIDE)
    assert drawn.images.dtype == torch.uint8
    assert drawn.masks.shape == (64, shapes.NUM_OBJECTS, SIDE, SIDE)
    assert not (drawn.masks.sum(1) > 1).any()
    share = drawn.masks.float().mean((2, 3))
    assert (share[drawn.usable] >= shapes.MIN_AREA).all()
    assert (share[drawn.usable] <= 0.85).all()


def test_shapes_are_varied(drawn: shapes.Shapes) -> None:
    """Small and large objects, some cut by the frame, dark and bright ones, low and high contrast."""
    masks = drawn.masks[:, 0][drawn.usable[:, 0]]
    share = masks.float().mean((1, 2))
    assert share.min() < 0.04
    assert share.max() > 0.4
    boxes = shape_prompts.tight_boxes(masks)
    cut = (boxes[:, :2].amin(1) == 0) | (boxes[:, 2:].amax(1) == SIDE)
    assert 0.1 < cut.float().mean() < 0.8
    light = drawn.images[drawn.usable[:, 0]].float().mean(1)
    inside, outside = masks.float(), 1 - masks.float()
    step = (light * inside).sum((1, 2)) / inside.sum((1, 2)) - (light * outside).sum((1, 2)) / outside.sum((1, 2))
    assert step.min() < -25
    assert step.max() > 25
    assert (step.abs() < 12).any()


def test_no_lesion_generator_is_imported() -> None:
    for module in (shapes, shape_prompts):
        tree = ast.parse(Path(module.__file__).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert not {name for name in imported if "synthetic" in name or "artefacts" in name or "frames" in name}


def test_block_compression_rounds_an_orthonormal_cosine_transform() -> None:
    image = torch.rand(1, 3, 16, 16, generator=seeded())
    fine = shapes._block_compress(image, torch.full((1, 1, 1, 1), 1e-6))
    torch.testing.assert_close(fine, image, atol=1e-4, rtol=0)
    step = 0.1
    coarse = shapes._block_compress(image, torch.full((1, 1, 1, 1), step))
    coefficients = dctn(coarse[0, 0, :8, 8:].double().numpy(), norm="ortho")
    scale = step * (1 + np.arange(8)[:, None] + np.arange(8))
    np.testing.assert_allclose(coefficients / scale, np.round(coefficients / scale), atol=1e-3)


def test_tight_boxes_are_those_of_scikit_image(drawn: shapes.Shapes) -> None:
    masks = drawn.masks[:, 0][drawn.usable[:, 0]]
    for mask, box in zip(masks.numpy(), shape_prompts.tight_boxes(masks), strict=True):
        y0, x0, y1, x1 = regionprops(mask.astype(np.uint8))[0].bbox
        assert box.tolist() == [x0, y0, x1, y1]
    assert shape_prompts.tight_boxes(torch.zeros(1, 8, 8, dtype=torch.bool)).tolist() == [[0, 0, 8, 8]]


def test_core_boxes_lie_wholly_inside(targets: Targets) -> None:
    for mask, box in zip(targets.masks, targets.small.long().tolist(), strict=True):
        x0, y0, x1, y1 = box
        assert x1 > x0
        assert y1 > y0
        assert mask[y0:y1, x0:x1].all()


def test_loosened_boxes_follow_their_rule() -> None:
    boxes = torch.tensor([[400.0, 400.0, 500.0, 600.0]]).repeat(4000, 1)
    grown = shape_prompts.loosen(boxes, 1000, seeded())
    width = (grown[:, 2] - grown[:, 0]) / 100
    assert 0.97 <= width.min() < 0.99
    assert 1.48 < width.max() <= 1.5
    # Mixture of U(1.05, 1.25) and U(0.97, 1.5): mean (1.15 + 1.235) / 2.
    assert width.mean().item() == pytest.approx(1.1925, abs=0.01)
    cut = shape_prompts.loosen(torch.tensor([[0.0, 0.0, 64.0, 64.0]]), 64, seeded())
    assert cut.min() >= 0
    assert cut.max() <= 64


def test_augmentation_moves_image_mask_prior_and_boxes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that is its own box, painted white, with its mask as prior, stays all of that."""
    monkeypatch.setattr(shape_prompts, "pad", lambda batch, generator: batch)
    box = torch.tensor([[6.0, 10.0, 30.0, 18.0]])
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, 10:18, 6:30] = True
    image = (mask[:, None] * torch.tensor([255, 254, 253], dtype=torch.uint8)[None, :, None, None]).expand(1, 3, -1, -1)
    batch = Targets(
        image, torch.tensor([[SIDE, SIDE]]), mask, box, box.clone(), F.adaptive_avg_pool2d(mask.float(), GRID)
    )
    places = set()
    for seed in range(40):
        moved = shape_prompts.augment(batch, seeded(seed))
        assert torch.equal(moved.big, shape_prompts.tight_boxes(moved.masks))
        assert torch.equal(moved.small, moved.big)
        assert torch.equal(moved.images[:, 0] > 0, moved.masks)
        assert sorted(moved.images.amax((0, 2, 3)).tolist()) == [253, 254, 255]
        torch.testing.assert_close(moved.priors, F.adaptive_avg_pool2d(moved.masks.float(), GRID))
        places.add(tuple(moved.big[0].tolist()))
    assert len(places) == 8
    assert batch.big.tolist() == box.tolist()


def test_padding_blanks_what_lies_outside_and_keeps_most_of_the_object(targets: Targets) -> None:
    padded = shape_prompts.pad(targets, seeded())
    assert (padded.sizes.amax(1) == SIDE).all()
    assert (padded.sizes.amin(1) < SIDE).any()
    for index, (height, width) in enumerate(padded.sizes.tolist()):
        assert not padded.images[index, :, height:].any()
        assert not padded.images[index, :, :, width:].any()
        assert not padded.masks[index, height:].any()
        assert not padded.masks[index, :, width:].any()
        assert torch.equal(padded.images[index, :, :height, :width], targets.images[index, :, :height, :width])
        assert padded.big[index, 2] <= width
        assert padded.big[index, 3] <= height
    extent = shape_prompts.tight_boxes(targets.masks)
    kept = shape_prompts.tight_boxes(padded.masks)
    ratio = (kept[:, 2:] - kept[:, :2]) / (extent[:, 2:] - extent[:, :2])
    assert ratio.min() >= 0.7
    assert torch.equal(padded.small, targets.small)  # the core is never cut


def test_points_lie_where_their_labels_say(targets: Targets) -> None:
    generator, kinds = seeded(), set()
    for _ in range(30):
        prompts = shape_prompts.point_prompts(targets, generator)
        assert prompts.points is not None
        assert prompts.labels is not None
        column, row = prompts.points.floor().long().clamp(max=SIDE - 1).unbind(-1)
        inside = targets.masks[torch.arange(len(targets))[:, None], row, column]
        assert torch.equal(inside, prompts.labels == 1)
        kinds.add((prompts.points.shape[1] == 1, bool((prompts.labels == 0).any())))
    assert kinds == {(True, False), (False, False), (False, True)}


def test_prior_prompts_carry_the_prior_with_a_box_or_a_point(targets: Targets) -> None:
    generator, kinds = seeded(), set()
    for _ in range(30):
        prompts = shape_prompts.prior_prompts(targets, generator)
        assert prompts.masks is not None
        ratio = prompts.masks[:, 0] / torch.where(targets.priors == 0, 1, targets.priors)
        assert torch.allclose(ratio.flatten(1).amax(1), ratio.flatten(1).median(1).values)  # one slope an image
        kinds.add((prompts.boxes is None, prompts.points is None))
    assert kinds == {(False, True), (False, False), (True, False)}


def test_a_correction_points_at_an_error_and_says_what_is_there(targets: Targets) -> None:
    truth = F.adaptive_avg_pool2d(targets.masks.float(), GRID)[:, None] * 2 - 1
    for wrong, label in ((-torch.ones_like(truth), 1), (torch.ones_like(truth), 0)):  # all missed; all claimed
        prompts = shape_prompts.correction_prompts(targets, wrong, None, seeded())
        assert prompts.labels is not None
        assert (prompts.labels == label).all()
        assert prompts.masks is wrong
    flawless = replace(targets, masks=torch.ones_like(targets.masks))
    prompts = shape_prompts.correction_prompts(flawless, torch.ones_like(truth), targets.big, seeded())
    assert prompts.points is not None
    assert (prompts.points[:, 0] >= targets.small[:, :2]).all()
    assert (prompts.points[:, 0] <= targets.small[:, 2:]).all()


def test_points_are_uniform_over_the_region() -> None:
    region = torch.zeros(1, 4, 4, dtype=torch.bool)
    region[0, 1, :2] = True
    points = shape_prompts.points_in(region, 4000, seeded())
    assert set(map(tuple, points[0].tolist())) == {(0.0, 1.0), (1.0, 1.0)}
    assert points[0, :, 0].mean().item() == pytest.approx(0.5, abs=0.04)  # sd of the mean .008

"""Prompts from masks: where boxes and points fall, what pads them, and clicks where an answer is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare

from helpers.tiny import SIDE, tiny_data, tiny_sam
from lesionsam.models.decoder import decode_groups
from lesionsam.models.sam import Sam, encode
from lesionsam.prompts import PADDING, points_in, prompts_from_masks, tight_boxes, with_correction
from lesionsam.types import Batch, Prompts

QUIET = {"box_jitter": 0.0, "max_points": 3, "point_jitter": 0.0, "negative": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(count: int = 6) -> tuple[Batch, torch.Tensor]:
    batch = tiny_data(count).batch(range(count))
    assert batch.masks is not None
    return batch, batch.masks > 0.5


def drawn(kind: str, batch: Batch, masks: torch.Tensor, seed: int = 0, **changes: float) -> Prompts:
    settings: dict = QUIET | changes
    return prompts_from_masks(
        kind, masks, batch.valid, batch.sizes, batch.big_boxes, generator=generator(seed), **settings
    )


def test_points_are_uniform_over_the_region_and_nowhere_else() -> None:
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    region[0, 2:5, 1:7] = True
    region[0, 3, 3] = False
    points = points_in(region, torch.rand(1, 34_000, generator=generator()))[0].long()
    counts = np.zeros((8, 8))
    np.add.at(counts, (points[:, 1].numpy(), points[:, 0].numpy()), 1)
    assert counts[~region[0].numpy()].sum() == 0
    assert chisquare(counts[region[0].numpy()]).pvalue > 1e-3
    ends = points_in(region, torch.tensor([[0.0, 1 - 1e-7]]))[0].tolist()
    assert ends == [[1, 2], [6, 4]], "the first and the last pixel"
    assert points_in(torch.zeros(1, 8, 8, dtype=torch.bool), torch.rand(1, 2)).tolist() == [[[0, 0], [0, 0]]]


def test_a_box_without_jitter_is_the_masks_own() -> None:
    batch, masks = some()
    prompts = drawn("box", batch, masks)
    assert prompts.points is None
    for box, mask in zip(prompts.boxes.tolist() if prompts.boxes is not None else [], masks.numpy(), strict=True):
        rows, columns = np.nonzero(mask)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_each_side_of_a_box_moves_by_itself_within_its_share_and_the_image() -> None:
    batch, masks = some()
    tight, share = tight_boxes(masks), 0.2
    extent = (tight[:, 2:] - tight[:, :2]).repeat(1, 2)
    moves = []
    for seed in range(60):
        boxes = drawn("box", batch, masks, seed, box_jitter=share).boxes
        assert boxes is not None
        assert bool((boxes >= 0).all())
        assert bool((boxes <= batch.sizes.flip(1).repeat(1, 2)).all())
        assert bool((boxes[:, 2:] > boxes[:, :2]).all())
        moves.append((boxes - tight) / extent)
    stacked = torch.stack(moves).flatten(0, 1)
    assert bool((stacked.abs() <= share + 1e-6).all())
    assert bool((stacked.abs().amax(0) > 0.9 * share).all())
    assert float(torch.corrcoef(stacked.T).fill_diagonal_(0).abs().max()) < 0.25


def test_points_lie_in_the_mask_and_their_number_is_drawn_for_each_image() -> None:
    batch, masks = some()
    numbers = []
    for seed in range(100):
        prompts = drawn("points", batch, masks, seed)
        assert prompts.boxes is None
        assert prompts.points is not None
        assert prompts.labels is not None
        assert set(prompts.labels.unique().tolist()) <= {1, PADDING}
        for k in range(len(masks)):
            own = prompts.points[k][prompts.labels[k] == 1].long()
            numbers.append(len(own))
            assert bool(masks[k, own[:, 1], own[:, 0]].all())
    assert chisquare(np.bincount(numbers, minlength=4)[1:]).pvalue > 1e-3


def test_points_move_by_up_to_so_many_pixels() -> None:
    batch, masks = some()
    far = 0.0
    for seed in range(40):
        still, moved = (drawn("points", batch, masks, seed, point_jitter=jitter).points for jitter in (0.0, 2.0))
        assert still is not None
        assert moved is not None
        far = max(far, float((moved - still).abs().max()))
        assert bool((moved >= 0).all())
        assert bool((moved <= batch.sizes.flip(1)[:, None] - 1).all())
    assert 1.8 < far <= 2.0


def test_a_point_outside_comes_with_its_probability_and_lies_outside() -> None:
    batch, masks = some()
    found = []
    for seed in range(200):
        prompts = drawn("box+points", batch, masks, seed, negative=0.3)
        assert prompts.points is not None
        assert prompts.labels is not None
        for k in range(len(masks)):
            wrong = prompts.points[k][prompts.labels[k] == 0].long()
            found.append(len(wrong))
            assert bool((~masks[k] & batch.valid[k])[wrong[:, 1], wrong[:, 0]].all())
    assert max(found) == 1
    assert abs(np.mean(found) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / len(found))


def test_an_image_without_a_mask_gets_its_big_box_and_that_boxs_centre() -> None:
    batch, masks = some()
    masks = masks.clone()
    masks[2] = False
    prompts = drawn("box+points", batch, masks, negative=1.0)
    assert prompts.boxes is not None
    assert prompts.points is not None
    assert prompts.labels is not None
    assert torch.allclose(prompts.boxes[2], batch.big_boxes[2])
    assert prompts.labels[2].tolist().count(1) == 1
    assert prompts.labels[2].tolist().count(0) == 0
    centre = (batch.big_boxes[2, :2] + batch.big_boxes[2, 2:]) / 2
    assert torch.allclose(prompts.points[2][prompts.labels[2] == 1][0], centre)


@torch.no_grad()
def test_every_image_keeps_its_own_prompts_as_segment_anything_pads_them() -> None:
    """The batched answer equals segment_anything's own decoder, image by image, given the same padded points."""
    sam: Sam = tiny_sam()
    batch, masks = some(5)
    features = encode(sam, sam.normalize(batch.images, batch.sizes))
    for kind in ("points", "box+points"):
        prompts = drawn(kind, batch, masks, seed=3, negative=0.5)
        assert prompts.points is not None
        assert prompts.labels is not None
        assert PADDING in prompts.labels
        logits, quality = decode_groups(sam, features, [(None, prompts)], slice(0, 1))
        for k in range(5):
            box = None if prompts.boxes is None else prompts.boxes[k : k + 1]
            sparse, dense = sam.prompt_encoder(
                points=(prompts.points[k : k + 1], prompts.labels[k : k + 1]), boxes=box, masks=None
            )
            wanted, iou = sam.mask_decoder(features[k : k + 1], sam.prompt_encoder.get_dense_pe(), sparse, dense, False)
            assert torch.allclose(logits[k : k + 1], wanted, atol=1e-4)
            assert torch.allclose(quality[k : k + 1], iou, atol=1e-5)


def test_a_click_falls_where_the_answer_is_wrong_and_says_how() -> None:
    batch, masks = some(4)
    logits = torch.full((4, SIDE, SIDE), -5.0)
    logits[0] = torch.where(masks[0], 5.0, -5.0)  # right everywhere
    logits[1] = 5.0  # lesion everywhere: only background is wrong
    prompts = with_correction(Prompts(boxes=batch.big_boxes), logits, masks, batch.valid, generator())
    assert prompts.points is not None
    assert prompts.labels is not None
    assert prompts.masks is not None
    assert prompts.boxes is batch.big_boxes
    assert prompts.labels[:, 0].tolist() == [PADDING, 0, 1, 1]
    for k in (1, 2, 3):
        column, row = prompts.points[k, 0].long().tolist()
        assert bool(masks[k, row, column]) is (k > 1)
        assert bool(batch.valid[k, row, column])
    assert torch.equal(prompts.masks[:, 0], logits)
    twice = with_correction(prompts, logits, masks, batch.valid, generator(1))
    assert twice.points is not None
    assert twice.points.shape == (4, 2, 2)
    assert torch.equal(twice.points[:, :1], prompts.points), "the clicks before it stay"


def test_clicks_are_uniform_over_the_error_at_the_size_of_the_image() -> None:
    masks, valid = torch.zeros(1, 8, 8, dtype=torch.bool), torch.ones(1, 8, 8, dtype=torch.bool)
    masks[0, :, :3] = True
    valid[0, 6:] = False
    answer = torch.full((1, 4, 4), -3.0)
    counts = np.zeros((8, 8))
    low = F.interpolate(answer[:, None], (8, 8), mode="bilinear")[:, 0] > 0
    for seed in range(1500):
        prompts = with_correction(Prompts(boxes=torch.zeros(1, 4)), answer, masks, valid, generator(seed))
        assert prompts.points is not None
        column, row = prompts.points[0, 0].long().tolist()
        counts[row, column] += 1
    wrong = ((low != masks) & valid)[0].numpy()
    assert wrong.sum() == 18
    assert counts[~wrong].sum() == 0
    assert chisquare(counts[wrong]).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["box", "points", "box+points"])
def test_draws_are_a_function_of_the_generator(kind: str) -> None:
    batch, masks = some()
    first, same, other = (drawn(kind, batch, masks, seed, negative=0.3, box_jitter=0.1) for seed in (0, 0, 1))
    for name in ("points", "labels", "boxes"):
        a, b = getattr(first, name), getattr(same, name)
        assert (a is None and b is None) or torch.equal(a, b)
    assert any(
        getattr(first, n) is not None
        and (
            getattr(first, n).shape != getattr(other, n).shape or not torch.equal(getattr(first, n), getattr(other, n))
        )
        for n in ("points", "boxes")
    )

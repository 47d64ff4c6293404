"""Every term of the loss against plain numbers and plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lesionsam import losses
from lesionsam.models.projection import spread

T = 6


def random(shape: tuple[int, ...], seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, m, w: (3, T, T); the last image has no usable pixel."""
    y, m = random((3, T, T), 0), torch.rand(3, T, T, generator=torch.Generator().manual_seed(1))
    w = (torch.rand(3, T, T, generator=torch.Generator().manual_seed(2)) > 0.3).float()
    w[2] = 0
    return y, m, w


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_entropy_by_hand_and_at_extreme_logits() -> None:
    y = torch.tensor([0.0, math.log(3.0), -math.log(3.0), 100.0, -100.0, 1e4, -1e4, 3e38])
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    found = losses.binary_entropy(y)
    assert found[:3].tolist() == pytest.approx([math.log(2), quarter, quarter], abs=1e-6)
    assert found[3:].tolist() == pytest.approx([0.0] * 5, abs=1e-6)
    assert bool((found >= -1e-6).all())


def test_entropy_of_half_precision_is_computed_in_full() -> None:
    y = random((500,), 3)
    assert losses.binary_entropy(y.half()).dtype == torch.float32
    assert torch.allclose(losses.binary_entropy(y.half()), losses.binary_entropy(y.half().float()))


def test_weighted_mean_by_hand() -> None:
    values, weights = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]), torch.tensor([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    assert losses.weighted_mean(values, weights).tolist() == [15 / 4, 0.0]


def test_bce_dice_and_their_sum_equal_numpy(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    y, m, w = case
    for k in range(2):
        a, b, c = y[k].double().numpy(), m[k].double().numpy(), w[k].double().numpy()
        p = sigmoid(a)
        cross = -(c * (b * np.log(p) + (1 - b) * np.log(1 - p))).sum() / c.sum()
        overlap = 1 - (2 * (c * p * b).sum() + 1) / ((c * p).sum() + (c * b).sum() + 1)
        assert losses.bce(y, m, w)[k].item() == pytest.approx(cross, abs=1e-5)
        assert losses.dice(y, m, w)[k].item() == pytest.approx(overlap, abs=1e-5)
        assert losses.soft_mask_loss(y, m, w)[k].item() == pytest.approx(2 * cross + overlap, abs=1e-5)


def test_bce_and_dice_by_hand() -> None:
    y, w = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    m = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert losses.bce(y, m, w).item() == pytest.approx(math.log(2))
    assert losses.dice(y, m, w).item() == pytest.approx(1 - 3 / 5)  # 2 * 1 + 1 over 2 + 2 + 1
    assert losses.dice(m * 200 - 100, m, w).item() == pytest.approx(0, abs=1e-6)
    assert losses.bce(m * 200 - 100, m, w).item() == pytest.approx(0, abs=1e-6)
    assert losses.bce(100 - m * 200, m, w).item() == pytest.approx(100)


def test_hard_iou_by_hand() -> None:
    y = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    m = torch.tensor([[[0.6, 0.4], [0.9, 0.0]], [[0.0, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 1.0]]])
    w = torch.ones(3, 2, 2)
    w[2, 0, 0] = 0
    assert losses.hard_iou(y, m, w).tolist() == pytest.approx([1 / 3, 1.0, 1 / 3])
    assert losses.hard_iou(y, m, torch.zeros(3, 2, 2)).tolist() == [1.0, 1.0, 1.0]


def test_projection_loss_equals_loops_over_columns_and_rows() -> None:
    y, generator = random((3, T, T), 5), torch.Generator().manual_seed(6)
    state = torch.randint(3, (3, 2, T), generator=generator)  # 0 free, 1 misses the big box, 2 crosses the core
    miss, cross = (state[:, 0] == 1, state[:, 1] == 1), (state[:, 0] == 2, state[:, 1] == 2)
    found = losses.projection_loss(y, miss, cross)
    for k in range(3):
        p, values = sigmoid(y[k].double().numpy()), []
        for axis in (0, 1):
            for index in range(T):
                highest = (p[:, index] if axis == 0 else p[index]).max()
                values += [-math.log(1 - highest)] if state[k, axis, index] == 1 else []
                values += [-math.log(highest)] if state[k, axis, index] == 2 else []
        assert found[k].item() == pytest.approx(float(np.mean(values)), abs=1e-5)


def test_projection_loss_is_zero_for_a_mask_that_keeps_to_both_boxes_and_where_nothing_is_constrained() -> None:
    y = torch.full((1, T, T), -100.0)
    y[0, 2:4, 1:5] = 100
    columns, rows = torch.zeros(1, T, dtype=torch.bool), torch.zeros(1, T, dtype=torch.bool)
    columns[0, [0, 5]], rows[0, [0, 5]] = True, True
    core_columns, core_rows = torch.zeros_like(columns), torch.zeros_like(rows)
    core_columns[0, 2:4], core_rows[0, 2:4] = True, True
    assert losses.projection_loss(y, (columns, rows), (core_columns, core_rows)).item() == pytest.approx(0, abs=1e-6)
    assert losses.projection_loss(-y, (columns, rows), (core_columns, core_rows)).item() == pytest.approx(50)
    free = (torch.zeros_like(columns), torch.zeros_like(rows))
    assert losses.projection_loss(y, free, free).item() == 0


def unit(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(random(shape, seed), dim=-1)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_info_nce_equals_the_formula_with_explicit_sums(temperature: float) -> None:
    a, p, n = unit((2, 5, 8), 0), unit((2, 5, 8), 1), unit((2, 7, 8), 2)
    anchor_valid, negative_valid = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    anchor_valid[0, 3:], negative_valid[1, :4] = False, False
    found = losses.info_nce(a, p, n, anchor_valid, negative_valid, temperature)
    for k in range(2):
        values = []
        for i in range(5):
            if not anchor_valid[k, i]:
                continue
            positive = math.exp(float(a[k, i].double() @ p[k, i].double()) / temperature)
            others = sum(
                math.exp(float(a[k, i].double() @ n[k, j].double()) / temperature)
                for j in range(7)
                if negative_valid[k, j]
            )
            values.append(-math.log(positive / (positive + others)))
        assert found[k].item() == pytest.approx(float(np.mean(values)), rel=1e-4, abs=1e-5)


def test_info_nce_by_hand() -> None:
    a = torch.tensor([[[1.0, 0.0]]])
    orthogonal, opposite = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[-1.0, 0.0]]])
    yes = torch.ones(1, 1, dtype=torch.bool)
    assert losses.info_nce(a, a, a, yes, yes, 0.5).item() == pytest.approx(math.log(2))
    assert losses.info_nce(a, a, orthogonal, yes, yes, 0.5).item() == pytest.approx(
        math.log(1 + math.exp(-2)), rel=1e-5
    )
    assert losses.info_nce(a, opposite, a, yes, yes, 0.001).item() == pytest.approx(2000, rel=1e-5), "no overflow"


def test_info_nce_without_negatives_or_anchors_is_zero_and_finite() -> None:
    a, n = unit((1, 4, 8), 0).requires_grad_(), unit((1, 3, 8), 1).requires_grad_()
    none, all_of_it = torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    for anchors, negatives in ((all_of_it, none[:, :3]), (none, all_of_it[:, :3]), (none, none[:, :3])):
        value = losses.info_nce(a, unit((1, 4, 8), 2), n, anchors, negatives, 0.1)
        assert value.item() == pytest.approx(0, abs=1e-6)
        for gradient in torch.autograd.grad(value.sum(), (a, n)):
            assert bool(torch.isfinite(gradient).all())
    empty = losses.info_nce(a, unit((1, 4, 8), 2), n[:, :0], all_of_it, none[:, :0], 0.1)
    assert empty.item() == 0


@pytest.mark.parametrize("images", [1, 2], ids=["shared negatives", "negatives of each image"])
def test_gradients_of_info_nce_are_those_that_autograd_finds(images: int) -> None:
    parts = [unit((2, 5, 8), 0), unit((2, 5, 8), 1), unit((images, 7, 8), 2)]
    parts = [part.requires_grad_() for part in parts]
    anchor_valid, negative_valid = torch.ones(2, 5, dtype=torch.bool), torch.ones(images, 7, dtype=torch.bool)
    negative_valid[0, :3] = False
    a, p, n = parts
    near = (a * p).sum(-1, keepdim=True) / 0.1
    far = (a @ n.mT / 0.1).masked_fill(~negative_valid[:, None], float("-inf"))
    plain = torch.logsumexp(torch.cat([near, far], -1), -1).mean(1) - near[..., 0].mean(1)
    weights = torch.tensor([1.0, 3.0])
    wanted = torch.autograd.grad((plain * weights).sum(), parts)
    found = losses.info_nce(a, p, n, anchor_valid, negative_valid, 0.1)
    assert torch.allclose(found, plain, rtol=1e-5)
    for one, other in zip(torch.autograd.grad((found * weights).sum(), parts), wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_info_nce_is_float32_under_autocast() -> None:
    a, p, n = unit((2, 5, 8), 0), unit((2, 5, 8), 1), unit((2, 7, 8), 2)
    valid = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses.info_nce(a, p, n, *valid, 0.1)
    assert torch.equal(found, losses.info_nce(a, p, n, *valid, 0.1))


def test_info_nce_shares_negatives_between_images() -> None:
    a, p, n = unit((2, 3, 8), 0), unit((2, 3, 8), 1), unit((1, 6, 8), 2)
    valid, negative_valid = torch.ones(2, 3, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool)
    shared = losses.info_nce(a, p, n, valid, negative_valid, 0.1)
    repeated = losses.info_nce(a, p, n.expand(2, 6, 8), valid, negative_valid.expand(2, 6), 0.1)
    assert torch.allclose(shared, repeated)


def test_gradients_are_finite_at_extreme_logits_and_on_empty_selections() -> None:
    y = torch.tensor([[[1e4, -1e4], [0.0, 88.0]], [[1e4, -1e4], [0.0, 88.0]]], requires_grad=True)
    m = torch.tensor([[[0.0, 1.0], [0.5, 1.0]]]).expand(2, 2, 2)
    w = torch.ones(2, 2, 2)
    w[1] = 0
    none = torch.zeros(2, 2, dtype=torch.bool)
    for value in (
        losses.bce(y, m, w),
        losses.dice(y, m, w),
        losses.soft_mask_loss(y, m, w),
        losses.binary_entropy(y),
        losses.projection_loss(y, (~none, none), (none, ~none)),
    ):
        assert bool(torch.isfinite(value).all())
        (gradient,) = torch.autograd.grad(value.sum(), y, retain_graph=True)
        assert bool(torch.isfinite(gradient).all())
    assert losses.bce(y, m, w)[1].item() == 0
    assert losses.dice(y, m, w)[1].item() == 0


def test_sampled_pixels_are_distinct_candidates_and_uniform() -> None:
    candidates = torch.zeros(2, 50, dtype=torch.bool)
    candidates[0, 10:30], candidates[1, :3] = True, True
    hits = torch.zeros(50)
    for seed in range(400):
        uniforms = torch.rand(2, 50, generator=torch.Generator().manual_seed(seed))
        index, valid = losses.sample_pixels(candidates, 5, uniforms)
        assert index.shape == valid.shape == (2, 5)
        assert valid.sum(1).tolist() == [5, 3]
        assert len(set(index[0].tolist())) == 5
        assert set(index[1][valid[1]].tolist()) == {0, 1, 2}
        hits[index[0]] += 1
    assert hits[:10].sum() == hits[30:].sum() == 0
    assert hits[10:30].min() > 60, "100 each on average"
    assert hits[10:30].max() < 145


def test_sampling_more_than_there_is_gives_what_there_is() -> None:
    index, valid = losses.sample_pixels(torch.tensor([[True, False, True]]), 9, torch.zeros(1, 3))
    assert sorted(index[0][valid[0]].tolist()) == [0, 2]
    assert losses.sample_pixels(torch.zeros(1, 3, dtype=torch.bool), 2, torch.rand(1, 3))[1].sum() == 0


def test_spread_tells_a_collapsed_head_from_a_lively_one() -> None:
    lively = torch.nn.functional.normalize(random((4, 64, 12, 12), 0), dim=1)
    found = spread(lively)
    assert found["channel_std"] == pytest.approx(1 / 8, rel=0.02)
    assert abs(found["mean_cosine"]) < 0.02
    collapsed = spread(lively[:1, :, :1, :1].expand(4, 64, 12, 12))
    assert collapsed["channel_std"] == pytest.approx(0, abs=1e-6)
    assert collapsed["mean_cosine"] == pytest.approx(1, abs=1e-5)


def test_dropping_unused_columns_leaves_the_contrast_and_its_gradient_as_they_were() -> None:
    """Against the same function on every column; the last bits differ, as sums of fewer zeros run in another order."""
    z, p = unit((3, 12, 8), 0).requires_grad_(), unit((3, 12, 8), 1)
    generator = torch.Generator().manual_seed(2)
    index = torch.stack([torch.randperm(12, generator=generator) for _ in range(3)])
    anchors, negatives = (torch.rand(3, 12, generator=generator) < share for share in (0.3, 0.5))
    anchors[:, 4], negatives[:, 7] = False, False

    def contrast(*kept: torch.Tensor) -> torch.Tensor:
        at, at_valid, away, away_valid = kept
        a, positive, n = (v.gather(1, k[..., None].expand(-1, -1, 8)) for v, k in ((z, at), (p, at), (z, away)))
        return losses.info_nce(a, positive, n, at_valid, away_valid, 0.1).sum()

    full = contrast(index, anchors, index, negatives)
    at, away = losses.drop_unused(index, anchors), losses.drop_unused(index, negatives)
    trimmed = contrast(*at, *away)
    assert at[0].shape[1] == int(anchors.any(0).sum()) < 12
    assert away[0].shape[1] == int(negatives.any(0).sum()) < 12
    assert trimmed.item() == pytest.approx(full.item(), rel=1e-6)
    wanted, found = (torch.autograd.grad(value, z)[0] for value in (full, trimmed))
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    nothing = losses.drop_unused(index, torch.zeros(3, 12, dtype=torch.bool))
    assert contrast(*nothing, *away).item() == 0

"""Prompts from two boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from lesionsam.prompts import KINDS, draw_prompts, prompts_from_uniforms, ring_points, seeded_prompts, uniforms_needed

BIG, SMALL = torch.tensor([[10.0, 20.0, 110.0, 80.0]]), torch.tensor([[30.0, 30.0, 90.0, 70.0]])
IDS = ("a/0", "b/0", "b/1", "c/0")


def boxes(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` big boxes of at least 20 pixels and small ones inside them."""
    rng = np.random.default_rng(seed)
    low, size = rng.uniform(0, 50, (count, 2)), rng.uniform(20, 60, (count, 2))
    small_low = low + size * rng.uniform(0, 0.4, (count, 2))
    big = np.concatenate([low, low + size], 1)
    small = np.concatenate([small_low, small_low + size * rng.uniform(0.1, 0.6, (count, 2))], 1)
    return torch.tensor(big, dtype=torch.float32), torch.tensor(small, dtype=torch.float32)


def is_in(points: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """(B, N, 2), (B, 4) -> (B, N) bool; outline included."""
    return ((points >= box[:, None, :2]) & (points <= box[:, None, 2:])).all(-1)


def is_strictly_in(points: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    return ((points > box[:, None, :2] + 1e-4) & (points < box[:, None, 2:] - 1e-4)).all(-1)


def test_ring_points_are_uniform_over_the_ring() -> None:
    points = ring_points(BIG, SMALL, torch.rand(1, 40_000, 3, generator=torch.Generator().manual_seed(0)))[0].numpy()
    # 10 x 6 tiles of 10 x 10 pixels; 6 x 4 of them are the core and must stay empty.
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=(np.arange(20, 81, 10), np.arange(10, 111, 10)))
    assert counts.sum() == 40_000
    core = np.zeros((6, 10), bool)
    core[1:5, 2:8] = True
    assert counts[core].sum() == 0
    assert chisquare(counts[~core]).pvalue > 1e-3


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_ring_points_lie_in_the_big_box_and_not_in_the_core(seed: int) -> None:
    big, small = boxes(8, seed)
    prompts = draw_prompts("ring", big, small, num_points=10, generator=torch.Generator().manual_seed(seed))
    assert prompts.points is not None
    assert prompts.labels is not None
    assert prompts.points.shape == (8, 10, 2)
    assert prompts.boxes is None
    assert bool((prompts.labels == 1).all())
    assert bool(is_in(prompts.points, big).all())
    assert not bool(is_strictly_in(prompts.points, small).any())


def test_degenerate_rings() -> None:
    uniforms = torch.rand(1, 2000, 3, generator=torch.Generator().manual_seed(0))
    nothing_left = ring_points(BIG, BIG, uniforms)
    assert bool(is_in(nothing_left, BIG).all()), "no ring: uniform in the big box"
    assert nothing_left[0].std(0) == pytest.approx(np.array([100, 60]) / np.sqrt(12), rel=0.05)
    right_half = torch.tensor([[10.0, 20.0, 60.0, 80.0]])
    points = ring_points(BIG, right_half, uniforms)
    assert points[..., 0].min() >= 60, "the core takes the left half"
    beyond = torch.tensor([[-50.0, 20.0, 60.0, 300.0]])
    assert torch.equal(ring_points(BIG, beyond, uniforms), points), "a core that sticks out is cut at the big box"
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert bool((ring_points(point, point, uniforms) == 5).all())


def test_extreme_uniforms_stay_in_the_ring() -> None:
    for value in (0.0, 1 - 2**-24):
        points = ring_points(BIG, SMALL, torch.full((1, 3, 3), value))
        assert bool(is_in(points, BIG).all())
        assert not bool(is_strictly_in(points, SMALL).any())


def test_each_kind_is_what_it_says() -> None:
    big, small = boxes(4)
    generator = torch.Generator().manual_seed(0)
    drawn = {kind: draw_prompts(kind, big, small, num_points=7, generator=generator) for kind in (*KINDS, "tight")}
    centre = drawn["centre"].points
    assert centre is not None
    assert torch.allclose(centre[:, 0], (small[:, :2] + small[:, 2:]) / 2)
    assert centre.shape == (4, 1, 2)
    for kind, count in (("core", 5), ("box+core", 3)):
        points = drawn[kind].points
        assert points is not None
        assert points.shape == (4, count, 2)
        assert bool(is_in(points, small).all())
        assert len(torch.unique(points)) == points.numel()
    for kind in ("box", "box+core", "tight"):
        found = drawn[kind].boxes
        assert found is not None
        assert torch.equal(found, big)
    assert drawn["core"].boxes is None
    assert drawn["box"].points is None


def test_uniforms_are_consumed_as_announced() -> None:
    big, small = boxes(2)
    for kind in KINDS:
        count = uniforms_needed(kind, 6)
        low, high = (prompts_from_uniforms(kind, big, small, torch.full((2, count), v)) for v in (0.0, 0.9))
        if count:
            assert low.points is not None
            assert high.points is not None
            assert not torch.equal(low.points, high.points)


def test_draws_follow_the_generator() -> None:
    big, small = boxes(3)
    first, again, other = (
        draw_prompts("ring", big, small, num_points=4, generator=torch.Generator().manual_seed(s)).points
        for s in (0, 0, 1)
    )
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["ring", "core", "box+core"])
def test_seeded_prompts_do_not_depend_on_the_batch(kind: str) -> None:
    big, small = boxes(4)

    def points(rows: list[int], seed: int = 3) -> torch.Tensor:
        found = seeded_prompts(kind, big[rows], small[rows], [IDS[k] for k in rows], num_points=10, seed=seed).points
        assert found is not None
        return found

    whole = points([0, 1, 2, 3])
    assert torch.equal(points([3, 1, 0, 2]), whole[[3, 1, 0, 2]])
    assert torch.equal(points([2]), whole[[2]])
    assert not torch.equal(points([0, 1, 2, 3], seed=4), whole)


def test_seeded_prompts_differ_between_lesions_and_an_empty_batch_is_one() -> None:
    same, core = BIG.expand(4, 4), SMALL.expand(4, 4)
    points = seeded_prompts("ring", same, core, IDS, num_points=10, seed=0).points
    assert points is not None
    assert len(torch.unique(points[:, 0], dim=0)) == 4
    nobody = seeded_prompts("ring", same[:0], core[:0], [], num_points=10, seed=0).points
    assert nobody is not None
    assert nobody.shape == (0, 10, 2)

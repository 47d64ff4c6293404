"""Outlines found by colour: on discs of known looseness, without colours, and on real images beside being told."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from lesionsam.boxes.annotator import simulate_boxes
from lesionsam.boxes.geometry import model_frame_size
from lesionsam.boxes.outline import EDGE_SHARE, FOUND_OFFSET, Outline, colour_edge, find_outline
from lesionsam.boxes.prior import box_prior, outline_offset
from lesionsam.data.frames import prior_at
from lesionsam.methods.targets import tightness_logits
from lesionsam.types import Frame
from lesionsam.utils.images import read_image, read_mask

SIDE = 96
Set = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]


def discs(looseness: float, count: int = 7) -> Set:
    """Priors, big boxes and cores of dark discs on light skin, with noise."""
    rng, found = np.random.default_rng(0), ([], [], [])
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    for _ in range(count):
        radius, centre = rng.uniform(18, 22), rng.uniform(46, 50, 2)
        image = np.full((SIDE, SIDE, 3), 200.0) + rng.normal(0, 6, (SIDE, SIDE, 3))
        image[np.hypot(rows - centre[1], columns - centre[0]) < radius] -= 110
        big, small = (
            np.concatenate([centre - half, centre + half]) for half in (radius * (1 + looseness), 0.5 * radius)
        )
        prior = box_prior(image.clip(0, 255).astype(np.uint8), big, small)
        for values, one in zip(found, (prior, big, small), strict=True):
            values.append(one)
    return found


@pytest.mark.parametrize("looseness", [0.0, 0.15, 0.4, 0.8])
def test_the_colour_edge_of_a_disc_is_its_radius_in_the_box(looseness: float) -> None:
    for prior, big, small in zip(*discs(looseness), strict=True):
        assert colour_edge(prior, big, small) == pytest.approx(1 / (1 + looseness), abs=0.05)


def test_looser_boxes_make_the_shape_term_tighter() -> None:
    found = [find_outline(*discs(looseness), None) for looseness in (0.0, 0.15, 0.4, 0.8)]
    assert {outline.offset for outline in found} == {FOUND_OFFSET}
    assert all(a.tightness < b.tightness for a, b in pairwise(found))
    assert found[2].tightness == pytest.approx(EDGE_SHARE * 1.4, rel=0.06)


def test_told_it_is_the_offset_alone() -> None:
    priors, bigs, smalls = discs(0.2)
    assert find_outline(priors, bigs, smalls, 0.2) == Outline(outline_offset(priors, bigs, 0.2))


def test_without_colours_and_with_cut_boxes_the_shape_stays() -> None:
    priors, bigs, smalls = discs(0.4)
    grey = [box_prior(np.full((SIDE, SIDE, 3), 128, np.uint8), *pair) for pair in zip(bigs, smalls, strict=True)]
    assert np.isnan(colour_edge(grey[0], bigs[0], smalls[0]))
    assert find_outline(grey, bigs, smalls, None) == Outline(FOUND_OFFSET)
    cut = [np.array([0.0, *big[1:]]) for big in bigs]
    assert find_outline(priors, cut, smalls, None) == Outline(FOUND_OFFSET)


def test_a_correction_acts_inside_the_big_box_and_is_the_method_s() -> None:
    priors, bigs, smalls = discs(0.8, count=2)
    outline = find_outline(priors, bigs, smalls, None)
    batched = tightness_logits(torch.from_numpy(np.stack(bigs)).float(), SIDE, outline.tightness) + outline.offset
    for k, (prior, big) in enumerate(zip(priors, bigs, strict=True)):
        shifted = outline.shift(prior, big)
        x0, y0, x1, y1 = np.rint(big).astype(int)
        assert np.array_equal(shifted[: y0 - 1], prior[: y0 - 1])
        inside = (slice(y0 + 1, y1 - 1), slice(x0 + 1, x1 - 1))
        assert np.allclose((shifted - prior)[inside], batched[k].numpy()[inside], atol=1e-4)
        assert (shifted - prior)[inside].min() < -0.1, "the shape term has become tighter"
    assert np.array_equal(Outline().shift(priors[0], bigs[0]), priors[0])


@pytest.mark.parametrize(
    ("margin", "told"), [((0.0, 0.05), 0.025), ((0.1, 0.2), 0.15), ((0.3, 0.5), 0.4), ((0.7, 0.9), 0.8)]
)
def test_on_real_images_nothing_told_costs_little(isic_sample: Path, margin: tuple[float, float], told: float) -> None:
    images = sorted((isic_sample / "images" / "train").glob("*.jpg"))[::15][:60]
    rng, priors, bigs, smalls, masks = np.random.default_rng(0), [], [], [], []
    for path in images:
        mask = read_mask(next((isic_sample / "masks" / "train").glob(f"{path.stem}*.png")), threshold=True)
        pair = simulate_boxes(mask, rng, margin=margin, core=(0.45, 0.55), jitter=0.03, min_area=16)
        assert pair is not None
        image = read_image(path)
        shape = model_frame_size(image.shape[1], image.shape[0], Frame(128))
        scale = np.array([shape[1] / image.shape[1], shape[0] / image.shape[0]] * 2)
        priors.append(prior_at(image, *pair, np.zeros((0, 4)), shape))
        bigs.append(pair[0] * scale)
        smalls.append(pair[1] * scale)
        rows, columns = ((np.arange(n) + 0.5) * m / n for n, m in zip(shape, mask.shape, strict=True))
        masks.append(mask[rows.astype(int)][:, columns.astype(int)])

    def score(outline: Outline) -> float:
        found = [outline.shift(prior, big) > 0 for prior, big in zip(priors, bigs, strict=True)]
        return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(found, masks, strict=True)]))

    known, nothing = (score(find_outline(priors, bigs, smalls, looseness)) for looseness in (told, None))
    assert nothing > known - 0.02, f"told {known:.4f}, told nothing {nothing:.4f}"


@pytest.mark.parametrize(
    ("outline", "words"),
    [
        (Outline(0.15, 1.02, 40), []),
        (Outline(1.0, num_boxes=40), ["outline offset .1.00 is at the end of its range"]),
        (Outline(-0.8, num_boxes=40), ["outline offset -0.80 is at the end"]),
        (Outline(0.15, 0.7, 40), ["smaller than the lesions"]),
        (Outline(0.15, 2.4, 3), ["more than twice as long", "from 3 boxes only; from 20 on"]),
    ],
)
def test_what_makes_a_correction_unlikely_is_said(outline: Outline, words: list[str]) -> None:
    doubts = outline.doubts()
    assert len(doubts) == len(words)
    for doubt, pattern in zip(doubts, words, strict=True):
        assert re.search(pattern, doubt)


def test_boxes_drawn_inside_the_lesions_are_noticed() -> None:
    outline = find_outline(*discs(-0.25, count=30), None)
    assert outline.num_boxes == 30
    assert any("smaller than the lesions" in doubt for doubt in outline.doubts()), outline

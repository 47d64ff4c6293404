"""The published step that speed is measured against computes what ours computes; nothing is timed here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cache
import naive_step
import record
import step
from lesionsam.losses import info_nce
from lesionsam.models.compact import CompactArchitecture
from lesionsam.prompts import ring_points
from lesionsam.types import Batch, Frame

SIDE, WIDTH, DEPTH = 96, 64, 6  # blocks 0 and 3 have windows, larger than the map
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return step.generated_batch(Frame(SIDE), 2, CPU)


def pair(last_k: int, batch: Batch) -> step.Pair:
    return step.Pair(step.random_sam("field", SIDE, WIDTH, DEPTH), last_k, batch)


@pytest.mark.parametrize("last_k", [1, 3, 0])
@pytest.mark.parametrize("cached", [False, True], ids=["shared", "cached"])
def test_our_step_is_the_published_one(last_k: int, cached: bool, batch: Batch) -> None:
    both = pair(last_k, batch)
    both.agreement(both.cached if cached else batch).check()


def test_after_whole_steps_the_terms_are_still_the_same(batch: Batch) -> None:
    """Clipping, AdamW and the teacher's average too: with a learning rate that moves the terms within two steps."""
    both = pair(2, batch)
    for optimizer in (both.optimizer, both.naive.optimizer):
        optimizer.param_groups[0]["lr"] = 1e-3
    before = both.agreement(batch)
    for _ in range(2):
        both.our_step(batch)
        both.naive_step()
    after = both.agreement(batch)
    assert abs(after.terms["contrast"] - before.terms["contrast"]) > 1e-3
    assert after.loss < 1e-4  # AdamW divides rounding errors of gradients near zero by themselves


def test_an_error_in_either_step_would_be_seen(batch: Batch) -> None:
    both = pair(2, batch)
    both.agreement(batch).check()
    both.draws = replace(both.draws, points=both.draws.points + 4)
    with pytest.raises(ValueError, match="nothing is timed"):
        both.agreement(batch).check()
    both = pair(2, batch)
    both.naive.entropy_thresh = 0.0
    with pytest.raises(ValueError, match=r"nothing is timed.*naive_trusted=0\.0"):
        both.agreement(batch).check()


def test_the_published_forms_of_parts_compute_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    a, p, n = (torch.nn.functional.normalize(torch.randn(k, 8, generator=generator), dim=1) for k in (5, 5, 7))
    used = torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 7, dtype=torch.bool)
    ours = info_nce(a[None], p[None], n[None], *used, naive_step.TEMPERATURE)[0]
    torch.testing.assert_close(naive_step.image_info_nce(a, p, n), ours)
    torch.testing.assert_close(naive_step.info_nce_by_anchor(a, p, n), ours)


def test_the_published_ring_has_the_mean_of_the_closed_form() -> None:
    """Both are uniform on the ring: over 4000 points the means differ by less than four of their standard errors."""
    big, small = torch.tensor([[8.0, 10, 50, 60]]), torch.tensor([[12.0, 30, 30, 50]])
    torch.manual_seed(0)
    theirs = torch.cat([naive_step.ring_points_from_mask(big[0], small[0], 64) for _ in range(400)])
    ours = ring_points(big, small, torch.rand(1, 4000, 3))[0]
    for points in (theirs, ours):
        inside = ((points > small[0, :2]) & (points < small[0, 2:])).all(1)
        assert not inside.any()
    error = (ours.var(0) / 4000 + theirs.var(0) / 4000).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error).all()


def test_entries_are_put_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results.md")
    record.record("first", "one")
    record.record("second", "two")
    text = record.RESULTS.read_text()
    assert text.startswith("# Measured")
    assert text.index(" second\n\ntwo\n") < text.index(" first\n\none\n")
    assert record.ratio([2.0, 6, 4], [1.0, 1, 1]) == (4.0, 2.0, 6.0)


def test_a_missed_limit_is_said_and_ends_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    limits = record.Limits()
    assert limits.cell("a ratio", 3.0, 2.5, spread=(2.0, 4.0)) == "**3.00** (2.00 to 4.00), at least 2.5"
    assert limits.cell("a share", 0.5, 0.6, most=True) == "**0.50**, at most 0.6"
    assert limits.cell("free", 1.0, None) == "**1.00**"
    assert limits.exit_code() == 0
    assert limits.cell("another share", 0.7, 0.6, most=True) == "**0.70**, at most 0.6, MISSED"
    assert limits.exit_code() == 1
    assert capsys.readouterr().err == "missed: another share: 0.70, at most 0.6\n"


def test_work_is_counted_by_multiplications() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert step.multiplications(lambda: a @ b) == 2 * 3 * 5 * 7


def test_trainings_with_and_without_cache_are_timed(tmp_path: Path) -> None:
    architecture = CompactArchitecture(
        image_size=64, patch_size=16, width=64, depth=2, num_heads=1, prompt_width=32, decoder_mlp=64
    )
    bench = cache.Bench(tmp_path, "compact", architecture, 4, 2, "fp32", CPU)
    config = bench.config(model__unfreeze_last_k=1, method__weights__distil=0.1)
    for folder, found in ((None, 0.0), (tmp_path / "cache", 0.0), (tmp_path / "cache", 1.0)):
        spent, _, share = bench.train(config, folder, epochs=1, augment=False)
        assert len(spent) == 1
        assert share == found

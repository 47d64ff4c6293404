"""Pretraining: what a step trains, that it learns, that a run resumes, and the scores on the card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lesionsam.errors import UserError
from lesionsam.models.checkpoint import build_sam, save_sam
from lesionsam.models.compact import CompactArchitecture
from lesionsam.pretraining import run as foundation
from lesionsam.pretraining.shape_prompts import Targets, make_targets

TINY = CompactArchitecture(image_size=32, patch_size=8, width=16, depth=2, num_heads=2, prompt_width=16, decoder_mlp=32)
FOLDER = Path(__file__).parents[2] / "foundation"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def targets() -> Targets:
    return make_targets(TINY.image_size, 4 * TINY.grid, seeded(), num_images=16)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of seconds: few shapes, measured on few."""
    monkeypatch.setattr(foundation, "FIRST_CHUNKS", 1)
    monkeypatch.setattr(foundation, "held_out_shapes", lambda a: make_targets(a.image_size, 4 * a.grid, seeded(5), 8))


def test_every_parameter_is_trained(targets: Targets) -> None:
    torch.manual_seed(0)
    sam, generator = build_sam("compact", architecture=TINY).train(), seeded()
    for _ in range(12):  # until every kind of prompt came by
        foundation.step_loss(sam, targets[torch.arange(4)], generator).backward()
    still = [name for name, p in sam.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    heads = {name.split(".")[2] for name in still if name.startswith("mask_decoder.output_hypernetworks_mlps.")}
    assert all("output_hypernetworks_mlps" in name for name in still)
    assert heads < {"1", "2", "3"}  # only the best of the three candidates trains, so some may wait for their turn


def test_a_few_steps_lower_the_loss(targets: Targets) -> None:
    torch.manual_seed(0)
    sam = build_sam("compact", architecture=TINY).train()
    optimiser = torch.optim.AdamW(sam.parameters(), lr=2e-3)
    losses = []
    for step in range(80):
        loss = foundation.step_loss(sam, targets[torch.arange(8)], seeded(step % 8))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-8:]) < 0.75 * np.mean(losses[:8])


def test_a_run_ends_in_time_resumes_and_writes_weights(short: None, tmp_path: Path) -> None:
    state, lines = tmp_path / "state.pt", []
    options = {"seed": 3, "state_path": state, "architecture": TINY, "bfloat16": False, "log": lines.append}
    _, first = foundation.pretrain(minutes=0.02, **options)
    assert first.step > 0
    assert set(first.scores) == {f"shapes/{kind}" for kind in ("prior", "box", "centre", "ring", "box+prior")}
    sam, second = foundation.pretrain(minutes=first.seconds / 60 + 0.02, resume=True, **options)
    assert second.step > first.step
    assert second.seconds > first.seconds + 0.6  # the clock goes on where it stood
    assert any(f"resumed at step {first.step}" in line for line in lines)
    out = tmp_path / "weights.safetensors"
    save_sam(sam.half(), out, name="compact")
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["architecture"])["width"] == TINY.width
    again = build_sam("compact", architecture=TINY)
    again.load_state_dict(load_file(out))
    for name, value in sam.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.float())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.pt", "weights.safetensors"]
    with pytest.raises(UserError, match=r"state\.pt.*seed"):
        foundation.pretrain(minutes=0.05, resume=True, **{**options, "seed": 4})


def test_resuming_a_finished_run_changes_no_weight(short: None, tmp_path: Path) -> None:
    options = {"minutes": 0.01, "seed": 0, "state_path": tmp_path / "state.pt", "architecture": TINY, "log": print}
    first, _ = foundation.pretrain(**options)
    again, _ = foundation.pretrain(resume=True, **options)
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="minutes must be above 0"):
        foundation.pretrain(minutes=0, seed=0, state_path=tmp_path / "state.pt")


def test_a_chunk_of_a_run_is_always_the_same(short: None) -> None:
    first, again, later = (foundation._Pool(TINY, 7, chunks).parts[-1] for chunks in (0, 0, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images[:4], later.images[:4])


def test_measured_scores_are_those_of_the_masks(targets: Targets) -> None:
    """Priors that are the truth score 1, their opposite 0."""
    sam = build_sam("compact", architecture=TINY)
    large = targets[targets.masks.flatten(1).float().mean(1) > 0.1]
    logits = torch.nn.functional.adaptive_avg_pool2d(large.masks.float(), 4 * TINY.grid) * 2 - 1
    scores = foundation.measure(sam, {"right": replace(large, priors=logits), "wrong": replace(large, priors=-logits)})
    assert scores["right/prior"] > 0.9
    assert scores["wrong/prior"] < 0.1
    assert all(0 <= value <= 1 for value in scores.values())

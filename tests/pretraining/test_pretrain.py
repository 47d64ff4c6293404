"""Pretraining: what a step trains, that it learns, that a run resumes, and the scores on the card."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.tiny import tiny_data
from lesionsam.config.load import default_values, validate
from lesionsam.errors import UserError
from lesionsam.models.checkpoint import build_sam, load_sam, save_sam
from lesionsam.models.compact import CompactArchitecture
from lesionsam.pretraining import run as foundation
from lesionsam.pretraining.card import card_text, current_commit
from lesionsam.pretraining.data import DataPool, open_pool, targets_of
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
    monkeypatch.setattr(foundation, "held_out_shapes", lambda sam: make_targets(sam.side, 4 * sam.grid, seeded(5), 8))


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
    first, again, later = (
        foundation._Pool(build_sam("compact", architecture=TINY), 7, chunks).parts[-1] for chunks in (0, 0, 2)
    )
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


def test_the_progress_line_says_how_far_and_how_good() -> None:
    progress = foundation.PretrainProgress(step=120, seconds=90, cpu_seconds=60, scores={"shapes/box": 0.5})
    assert foundation._line(progress, 3, math.pi, 1e-3) == (
        "step 120 1.5/3 min (cpu 1.0) loss 3.142 lr 1.0e-03 shapes/box 0.500"
    )


def test_the_cards_scores_are_those_of_the_shipped_weights() -> None:
    """foundation/card.md, rows `| held-out shapes, PROMPT | IoU |`; other processors differ by rounding."""
    rows = re.findall(r"^\| held-out shapes, (\S+) \| ([.\d]+) \|", (FOLDER / "card.md").read_text(), re.MULTILINE)
    assert {kind for kind, _ in rows} == {"box", "centre", "ring", "box+prior", "prior"}
    architecture = CompactArchitecture()
    sam = build_sam("compact", architecture=architecture)
    sam.load_state_dict(load_file(FOLDER / "compact.safetensors"))
    scores = foundation.measure(sam, {"shapes": foundation.held_out_shapes(sam)})
    for kind, value in rows:
        assert scores[f"shapes/{kind}"] == pytest.approx(float(value), abs=0.005), kind


TINY_WORDS = [
    "--image-size",
    "32",
    "--width",
    "16",
    "--depth",
    "2",
    "--num-heads",
    "2",
    "--prompt-width",
    "16",
    "--decoder-mlp",
    "32",
    "--params",
    str(FOLDER.parent / "params.yaml"),
]


def test_the_command_writes_weights_and_card(short: None, tmp_path: Path) -> None:
    out = tmp_path / "new" / "compact.safetensors"
    threads = torch.get_num_threads()
    words = ["--minutes", "0.01", "--seed", "9", "--threads", "1", "--out", str(out), "--state", str(tmp_path / "s.pt")]
    words += TINY_WORDS
    foundation.main(words)
    torch.set_num_threads(threads)
    held = load_sam("compact", out)
    assert (held.side, len(held.blocks)) == (32, 2)
    card = (tmp_path / "new" / "card.md").read_text()
    assert f"; {sum(p.numel() for p in held.parameters()):,} parameters)" in card
    assert "| seed | 9 |" in card
    assert " ".join(words) in card
    assert re.search(r"^\| held-out shapes, box\+prior \| 0\.\d{4} \|$", card, re.MULTILINE)
    assert hashlib.sha256(out.read_bytes()).hexdigest() in card


def test_sizes_that_do_not_fit_and_another_runs_state_are_one_line(short: None, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "a.safetensors"), "--state", str(tmp_path / "s.pt"), "--minutes", "0.001"]
    with pytest.raises(UserError, match=r"foundation\.width: expected a multiple of .*num_heads \(2\), got 17$"):
        foundation.main([*out, *TINY_WORDS, "--width", "17"])
    with pytest.raises(UserError, match=r"foundation\.depth: expected an integer from 1 to 64, got 0"):
        foundation.main([*out, *TINY_WORDS, "--depth", "0"])
    foundation.main([*out, *TINY_WORDS])
    assert (tmp_path / "a.md").exists(), "a card of its own beside weights of another name"
    with pytest.raises(UserError, match=r"s\.pt: belongs to a run with depth 2, not 1; --fresh starts anew"):
        foundation.main([*out, *TINY_WORDS, "--depth", "1"])


def test_a_folder_or_any_other_source_is_trained_on_in_place_of_shapes(tmp_path: Path) -> None:
    data = tiny_data(12)
    pool = DataPool(data, 4 * TINY.grid)
    held = targets_of(tiny_data(6, seed=9), np.arange(6), 4 * TINY.grid)
    assert held.masks.dtype == torch.bool
    assert held.priors.shape == (6, 16, 16)
    drawn = pool.draw(64, seeded())
    centre = (drawn.small[:, :2] + drawn.small[:, 2:]).long() // 2
    assert bool(drawn.masks[torch.arange(64), centre[:, 1], centre[:, 0]].all()), "boxes turn with their masks"
    assert not torch.equal(pool.draw(8, seeded(1)).images, pool.draw(8, seeded(2)).images)
    sam, progress = foundation.pretrain(
        minutes=0.02,
        seed=0,
        state_path=tmp_path / "s.pt",
        architecture=TINY,
        images=(pool, held),
        log=lambda line: None,
    )
    assert progress.step > 0
    assert {"data/box", "data/centre"} <= set(progress.scores)
    assert "training images and masks" in card_text(
        command="",
        commit="",
        seed=0,
        machine="",
        progress=progress,
        sha256="",
        architecture=TINY,
        images="data",
        num_parameters=sum(p.numel() for p in sam.parameters()),
    )


def test_without_the_stages_that_make_the_data_it_says_which_to_run(tmp_path: Path) -> None:
    config = validate(default_values())
    with pytest.raises(UserError, match=r"foundation\.images: data needs data/boxes\.csv .* run `dvc repro boxes`"):
        open_pool(config, 32, 16, tmp_path)


def test_the_commit_is_read_from_git_and_unknown_outside(tmp_path: Path) -> None:
    assert current_commit(tmp_path) == "unknown"
    assert re.match(r"[0-9a-f]{40}", current_commit(FOLDER)) or not (FOLDER.parent / ".git").exists()

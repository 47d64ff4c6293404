"""Every way to train, with SAM 2.1, EdgeTAM and SAM 3: what moves, the cache, resuming, merging; and what docs say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.families import FAMILIES, tiny_family
from helpers.tiny import tiny_data, tiny_sam
from helpers.training import Stop, stop_at
from lesionsam.config.edit import fit
from lesionsam.config.load import Config, default_values, unflatten, validate
from lesionsam.config.presets import preset_values
from lesionsam.config.zoo import ZOO
from lesionsam.experiment.build import prepare_sam
from lesionsam.experiment.run import Data, Trained, train
from lesionsam.export.formats import FORMATS, open_format
from lesionsam.models import adapters, lora
from lesionsam.models.checkpoint import load_sam, save_sam
from lesionsam.models.sam import Sam, encode
from lesionsam.models.sam1 import Sam1
from lesionsam.training.progress import Log

CPU = torch.device("cpu")
NAME = "some/model"
SHORT = {
    "model.name": NAME,
    "model.checkpoint": "weights.safetensors",
    "train.epochs": 2,
    "train.batch_size": 4,
    "runtime.device": "cpu",
    "runtime.num_threads": 0,
    "evaluate.batch_size": 8,
    "method.gate.entropy_thresh": 0.69,
}
EVERY_TERM = {"method.weights.contrast": 0.1, "method.weights.distil": 0.1, "method.weights.projection": 0.1}
family = pytest.fixture(params=list(FAMILIES))(lambda request: request.param)


def configured(preset: str = "", **changes: Any) -> Config:
    values = preset_values(preset, default_values()) if preset else default_values()
    short = {key: value for key, value in SHORT.items() if not (preset and key.startswith("method."))}
    return validate(fit(unflatten(short | changes, values)))


@pytest.fixture
def weights(family: str, tmp_path: Path) -> Path:
    save_sam(tiny_family(family), tmp_path / "weights.safetensors", name=NAME)
    return tmp_path / "weights.safetensors"


def nothing(values: object, step: int) -> None:
    """Log nothing."""


def trained(config: Config, weights: Path, folder: Path, *, cached: bool = False, log: Log = nothing) -> Trained:
    frame = load_sam(NAME, weights).frame
    activations = folder.parent / "activations" if cached else None
    data = Data(tiny_data(8, frame=frame), tiny_data(4, seed=1, frame=frame), activations)
    return train(config, data, weights, folder=folder, log=log, say=lambda line: None)


def what_moved(sam: Sam, config: Config, weights: Path) -> set[str]:
    before = dict(prepare_sam(config, weights, CPU).named_parameters())
    return {name for name, p in sam.named_parameters() if not torch.equal(p.detach(), before[name].detach())}


def selected(sam: Sam) -> set[str]:
    return {name for name, p in sam.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("target", ["fused", "prior", "teacher", "ellipse"])
def test_the_two_box_method_with_every_target_and_term(family: str, weights: Path, tmp_path: Path, target: str) -> None:
    config = configured(**EVERY_TERM, **{"method.target.kind": target, "model.unfreeze_last_k": 1})
    result = trained(config, weights, tmp_path / "run")
    moved = what_moved(result.sam, config, weights)
    assert moved <= selected(result.sam)
    for part in ("vision_encoder.neck.", "mask_decoder.conv_s0", "mask_decoder.transformer."):
        assert any(part in name for name in moved), part
    assert any(id(p) in {id(q) for q in result.sam.blocks[-1].parameters()} for p in result.sam.parameters())


@pytest.mark.parametrize(
    "preset", ["supervised", "supervised-decoder", "supervised-full", "supervised-lora", "supervised-adapter"]
)
def test_supervised_training_of_every_part(family: str, weights: Path, tmp_path: Path, preset: str) -> None:
    if family == "edgetam" and preset in ("supervised-lora", "supervised-adapter"):
        pytest.skip("EdgeTAM's backbone has no attention")
    config = configured(preset)
    result = trained(config, weights, tmp_path / "run")
    moved = what_moved(result.sam, config, weights)
    assert moved
    assert moved <= selected(result.sam)
    mark = {"lora": lora.MARK, "adapter": adapters.MARK}.get(config.model.encoder)
    if mark:
        assert any(mark in name for name in moved)
    if config.model.encoder == "none":
        assert not any(name.startswith(("vision_encoder.", "mask_decoder.conv_s")) for name in moved)


def test_cached_activations_give_the_same_weights_and_a_cut_training_resumes(
    family: str, weights: Path, tmp_path: Path
) -> None:
    config = configured(**EVERY_TERM, **{"model.unfreeze_last_k": 1, "runtime.cache_gb": 1.0})
    plain = trained(config, weights, tmp_path / "plain" / "run")
    cached = trained(config, weights, tmp_path / "cached" / "run", cached=True)
    again = trained(config, weights, tmp_path / "cached" / "again", cached=True)  # every activation is there
    for name, value in plain.sam.state_dict().items():
        assert torch.equal(value, cached.sam.state_dict()[name]), name
        assert torch.equal(value, again.sam.state_dict()[name]), name
    with pytest.raises(Stop):
        trained(config, weights, tmp_path / "cut" / "run", log=stop_at(lambda values, step: step == 3))
    resumed = trained(config, weights, tmp_path / "cut" / "run")
    for name, value in plain.sam.state_dict().items():
        assert torch.equal(value, resumed.sam.state_dict()[name]), name


def test_weights_of_a_training_come_back(family: str, weights: Path, tmp_path: Path) -> None:
    result = trained(configured(**{"model.unfreeze_last_k": 1}), weights, tmp_path / "run")
    save_sam(result.sam, tmp_path / "best.safetensors", name=NAME)
    shown = torch.randn(1, 3, result.sam.side, result.sam.side)
    with torch.no_grad():
        assert torch.equal(encode(load_sam(NAME, tmp_path / "best.safetensors"), shown), encode(result.sam, shown))


# ---- what docs/howto/other-sams.md says ------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "other-sams.md"


def capabilities(sam: Sam) -> list[str]:
    """The cells of a row: last K, LoRA, adapters, and the formats of export."""
    formats = [name for name in FORMATS if open_format(name).any_sam or isinstance(sam, Sam1)]
    last_k = f"1 to {len(sam.blocks)}" if len(sam.blocks) > 1 else "all or none"
    return [
        "squashed" if sam.frame.squash else "padded",
        last_k,
        "yes" if sam.lora_targets else "no",
        {2: "yes", 1: "MLP", 0: "no"}[len(sam.adapted_parts)],
        ", ".join(formats),
    ]


def test_the_table_of_families_says_what_each_can_do() -> None:
    rows = {
        cells[0]: cells[2:]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 7
    }
    families = {"SAM, MedSAM, SlimSAM, compact": tiny_sam()}
    families |= {"SAM 2.1": tiny_family("sam2"), "EdgeTAM": tiny_family("edgetam"), "SAM 3": tiny_family("sam3")}
    for name, sam in families.items():
        told, found = rows[name], capabilities(sam)
        assert [re.sub(r"\d+ to \d+", "K", told[1]), told[0], *told[2:]] == [
            re.sub(r"\d+ to \d+", "K", found[1]),
            found[0],
            *found[2:],
        ]
    names = set(re.findall(r"`([\w.-]+)`", PAGE.read_text(encoding="utf-8").split("## Names")[1].split("##")[0]))
    assert set(ZOO) <= names

"""What trains, from params.yaml to a trained model: presets, runs of the loop, checkpoints, and ViT-B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny import SIDE, tiny_data, tiny_sam
from helpers.training import Stop, run, stop_at
from lesionsam.config.edit import fit
from lesionsam.config.load import Config, default_values, flatten, unflatten, validate
from lesionsam.config.presets import preset_values
from lesionsam.experiment import caches
from lesionsam.experiment.build import build_method, choose_trained, learning_groups, prepare_sam, strategy_of
from lesionsam.experiment.run import Data, Trained, train
from lesionsam.models import adapters, lora, prefix
from lesionsam.models.checkpoint import build_sam, load_sam, read_weights, save_sam
from lesionsam.models.finetuned import merged_state, save_tuned
from lesionsam.models.sam import Sam, encode
from lesionsam.models.trainable import trained_counts, trained_parameters
from lesionsam.training.gradients import step_generator, total_loss

CPU = torch.device("cpu")
PRESETS = ("supervised-decoder", "supervised-full", "supervised-adapter", "supervised-lora")
SHORT = {
    "train.epochs": 2,
    "train.batch_size": 4,
    "runtime.device": "cpu",
    "runtime.num_threads": 0,
    "evaluate.batch_size": 8,
}


def configured(preset: str, **changes: Any) -> Config:
    values = preset_values(preset, default_values()) if preset else default_values()
    return validate(fit(unflatten(SHORT | {key.replace("__", "."): value for key, value in changes.items()}, values)))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_sam(tiny_sam(sharpness=20), tmp_path / "sam.safetensors", name="compact")
    return tmp_path / "sam.safetensors"


def trained(
    config: Config,
    weights: Path,
    folder: Path,
    lines: list[str] | None = None,
    logged: list[dict[str, float]] | None = None,
) -> Trained:
    data = Data(tiny_data(8), tiny_data(4, seed=1))
    return train(
        config,
        data,
        weights,
        folder=folder,
        log=lambda values, _: (logged or []).append(dict(values)),
        say=(lines if lines is not None else []).append,
    )


def what_moved(trained_sam: Sam, config: Config, weights: Path) -> set[str]:
    before = dict(prepare_sam(config, weights, CPU).named_parameters())
    return {name for name, p in trained_sam.named_parameters() if not torch.equal(p.detach(), before[name].detach())}


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_trains_what_it_says_and_nothing_else(preset: str, weights: Path, tmp_path: Path) -> None:
    config, lines, logged = configured(preset), [], [{}]
    result = trained(config, weights, tmp_path / "run", lines, logged)
    moved = what_moved(result.sam, config, weights)
    part = {"none": None, "blocks": "image_encoder.", "adapter": adapters.MARK, "lora": lora.MARK}[config.model.encoder]
    selected = {name for name, p in result.sam.named_parameters() if p.requires_grad}
    assert selected == {
        name
        for name, _ in result.sam.named_parameters()
        if name.startswith(("mask_decoder.", "prompt_encoder.")) or (part and part in name)
    }
    assert moved <= selected, "what is frozen is as it was, to the last bit"
    for mark in filter(None, (part, "mask_decoder.")):
        assert any(mark in name for name in moved)
    counts = trained_counts(result.sam)
    assert result.trained == sum(counts.values())
    assert lines[0].startswith(f"training {result.trained:,} of ")
    assert all(f"{count:,}" in lines[0] for count in counts.values())
    assert {"parameters_trained", "parameters"} <= set(logged[1])
    assert logged[1]["parameters_trained"] == result.trained


@pytest.mark.parametrize("encoder", ["lora", "adapter"])
def test_both_serve_the_two_box_method_with_its_teacher(encoder: str, weights: Path, tmp_path: Path) -> None:
    config = configured("", model__encoder=encoder, method__gate__entropy_thresh=0.69, method__weights__contrast=0.1)
    result = trained(config, weights, tmp_path / "run")
    teacher = getattr(result.method, "teacher", None)
    assert teacher is not None
    student = dict(result.method.model.named_parameters())
    mark = lora.MARK if encoder == "lora" else adapters.MARK
    for name, p in teacher.module.named_parameters():
        shared = p.data_ptr() == student[name].data_ptr()
        assert shared is not student[name].requires_grad, name
    assert any(mark in name for name in what_moved(result.sam, config, weights))
    rates = {group.name: group.learning_rate for group in learning_groups(config, result.method)}
    assert rates == {
        "head": config.train.lr_head,
        "encoder": config.train.lr_encoder,
        "decoder": config.train.lr_decoder,
    }


@pytest.mark.parametrize("preset", ["supervised-lora", "supervised-adapter"])
def test_the_last_blocks_alone_share_the_frozen_prefix(preset: str, weights: Path) -> None:
    key = {"supervised-lora": "model__lora_last_k", "supervised-adapter": "model__adapter_last_k"}[preset]
    config = configured(preset, **{key: 1})
    sam = prepare_sam(config, weights, CPU)
    ran: list[int] = []
    for k, block in enumerate(sam.image_encoder.blocks):
        block.mlp.register_forward_hook(lambda *_, k=k: ran.append(k))
    method, _ = build_method(config, sam, weights, tiny_data(4), CPU)
    batch = tiny_data(4).batch(range(4))
    terms, _ = method.losses(batch, step_generator(0, 0))
    total_loss(terms).backward()
    assert ran == [0, 0, 0, 0, 1], "the frozen block image by image, as the cache keeps it, and once"
    added = {name: p for name, p in sam.named_parameters() if p.requires_grad and "image_encoder" in name}
    assert added
    assert all(".blocks.1." in name and p.grad is not None for name, p in added.items())


@pytest.mark.parametrize("last_k", [0, 1])
@pytest.mark.parametrize("encoder", ["lora", "adapter"])
def test_a_later_epoch_reads_the_reference_and_the_prefix_from_the_cache(
    encoder: str, last_k: int, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"method__weights__distil": 0.1, "train__augment": False, "train__widen": 0.0}
    changes |= {"method__gate__entropy_thresh": 0.69, f"model__{encoder}_last_k": last_k}
    config = configured("", model__encoder=encoder, **changes)
    ran: list[bool] = []  # of each pass of a frozen part: whether it computed the reference's features
    real = prefix.encode_frozen

    def counted(sam: Sam, images: torch.Tensor, num_blocks: int, reference: Sam | None = None) -> Any:
        ran.append(reference is not None or not any(p.requires_grad for p in sam.parameters()))
        return real(sam, images, num_blocks, reference)

    monkeypatch.setattr(prefix, "encode_frozen", counted)
    monkeypatch.setattr(caches, "encode_frozen", counted)
    train_on = Data(tiny_data(8), tiny_data(4, seed=1), tmp_path / "activations")
    result = train(config, train_on, weights, folder=tmp_path / "run", log=lambda values, _: None, say=[].append)
    num_batches = 2
    assert sum(ran) == num_batches, "the first epoch alone"
    uncached = train(
        config, Data(tiny_data(8), tiny_data(4, seed=1)), weights, folder=tmp_path / "plain", log=lambda values, _: None
    )
    for name, value in uncached.sam.state_dict().items():
        assert torch.equal(value, result.sam.state_dict()[name]), name


def test_dropout_is_resumed_bit_for_bit(weights: Path, tmp_path: Path) -> None:
    config = configured("supervised-lora", model__lora_dropout=0.5)

    def method() -> Any:
        return build_method(config, prepare_sam(config, weights, CPU), weights, tiny_data(8), CPU)[0]

    whole, again = method(), method()
    run(whole, tiny_data(8), tmp_path / "whole", epochs=2)
    with pytest.raises(Stop):
        run(method(), tiny_data(8), tmp_path / "cut", epochs=2, log=stop_at(lambda values, step: step == 3))
    torch.manual_seed(123)
    run(again, tiny_data(8), tmp_path / "cut", epochs=2)
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in whole.model.state_dict().items())


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_predicts_as_what_was_trained(preset: str, weights: Path, tmp_path: Path) -> None:
    config = configured(preset)
    result = trained(config, weights, tmp_path / "run")
    batch = tiny_data(3).batch(range(3))
    images = result.sam.normalize(batch.images, batch.sizes)
    wanted = encode(result.sam, images).detach()
    save_sam(result.sam, tmp_path / "best.safetensors", name="compact")
    save_tuned(
        result.sam,
        tmp_path / "tuned.safetensors",
        name="compact",
        strategy=strategy_of(config),
        base=weights,
        base_state=read_weights(weights)[0],
    )
    for sam in (
        load_sam(None, tmp_path / "best.safetensors"),
        load_sam(None, tmp_path / "tuned.safetensors", base=weights),
    ):
        assert torch.allclose(encode(sam, images), wanted, atol=1e-4)
    if preset != "supervised-adapter":
        assert merged_state(result.sam).keys() == tiny_sam().state_dict().keys()


# ---- ViT-B -----------------------------------------------------------------------------------------------------------

DEPTH, WIDTH, GRID = 12, 768, SIDE * 4 // 16
RELATIVE = sum(2 * (2 * (64 if k in (2, 5, 8, 11) else 14) - 1) * 64 for k in range(DEPTH))
BLOCK = 4 * WIDTH + (3 * WIDTH**2 + 3 * WIDTH) + (WIDTH**2 + WIDTH) + (8 * WIDTH**2 + 5 * WIDTH)
NECK = WIDTH * 256 + 2 * 256 + 256 * 256 * 9 + 2 * 256
EMBEDDING = 3 * 16 * 16 * WIDTH + WIDTH + GRID * GRID * WIDTH
DECODER, PROMPTS = 4_058_340, 6_220  # of SAM's own decoder and prompt encoder, as `sam_model_registry` builds them
LAST_2 = 2 * BLOCK + sum(2 * (2 * size - 1) * 64 for size in (14, 64)) + NECK
ENCODER = DEPTH * BLOCK + RELATIVE + NECK + EMBEDDING
VIT_B = {
    "decoder": ("supervised-decoder", {}, {"decoder": DECODER, "prompt_encoder": PROMPTS}),
    "last 2": (
        "supervised-full",
        {"model__unfreeze_last_k": 2},
        {"encoder": LAST_2, "decoder": DECODER, "prompt_encoder": PROMPTS},
    ),
    "full": ("supervised-full", {}, {"encoder": ENCODER, "decoder": DECODER, "prompt_encoder": PROMPTS}),
    "adapter": (
        "supervised-adapter",
        {"model__train_decoder": False, "model__train_prompt_encoder": False},
        {"adapters": DEPTH * 2 * (2 * 32 * WIDTH + 32 + WIDTH)},
    ),
    "lora": (
        "supervised-lora",
        {"model__train_prompt_encoder": False},
        {"lora": DEPTH * 8 * (4 * WIDTH + 2 * WIDTH), "decoder": DECODER},
    ),
}


@pytest.fixture(scope="module")
def vit_b() -> dict[str, torch.Tensor]:
    """SAM ViT-B's weights at random, of a standard deviation that keeps activations finite."""
    with torch.device("meta"):
        sam = build_sam("vit_b", image_size=SIDE * 4)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in sam.state_dict().items():
        state[name] = torch.empty(value.shape).normal_(0, 0.02, generator=generator)
        if value.ndim == 1 and name.endswith("weight"):
            state[name] += 1
    return state


@pytest.mark.parametrize("strategy", VIT_B)
def test_each_strategy_builds_on_vit_b_and_takes_a_finite_step(strategy: str, vit_b: dict[str, torch.Tensor]) -> None:
    preset, changes, counts = VIT_B[strategy]
    config = configured(preset, model__name="vit_b", model__image_size=SIDE * 4, **changes)
    with torch.device("meta"):
        sam = build_sam("vit_b", image_size=SIDE * 4)
    sam.load_state_dict({key: value.clone() for key, value in vit_b.items()}, assign=True)
    choose_trained(config, sam)
    assert trained_counts(sam) == counts
    method, _ = build_method(config, sam, Path("unused"), tiny_data(1), CPU)
    batch = larger(tiny_data(1).batch([0]), 4)
    terms, _ = method.losses(batch, step_generator(0, 0))
    total_loss(terms).backward()
    parameters = trained_parameters(method.model)
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in parameters)
    assert sum(p.grad is not None and bool((p.grad != 0).any()) for p in parameters) > len(parameters) / 4
    before = {name: p.detach().clone() for name, p in sam.named_parameters() if not p.requires_grad}
    torch.optim.SGD(parameters, lr=1e-3).step()
    assert all(bool(torch.isfinite(p).all()) for p in parameters)
    assert all(torch.equal(p, before[name]) for name, p in sam.named_parameters() if name in before)


def larger(batch: Any, factor: int) -> Any:
    """A batch of `factor` times the side, every pixel repeated."""
    from dataclasses import replace

    def repeated(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(factor, -1).repeat_interleave(factor, -2)

    return replace(
        batch,
        images=repeated(batch.images),
        valid=repeated(batch.valid),
        masks=repeated(batch.masks),
        prior=repeated(batch.prior),
        sizes=batch.sizes * factor,
        big_boxes=batch.big_boxes * factor,
        small_boxes=batch.small_boxes * factor,
    )


def test_flattened_parameters_name_the_strategy() -> None:
    """MLflow's side-by-side view shows these as parameters of the run."""
    assert flatten(configured("supervised-lora"))["model.lora_rank"] == 8
    assert flatten(configured("supervised-adapter"))["model.adapter_dim"] == 32

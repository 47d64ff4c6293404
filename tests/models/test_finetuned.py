"""Adapters and low-rank updates: the identity at start, against peft and a plain computation, on disk and back."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from helpers.tiny import ARCHITECTURE, SIDE, tiny_sam
from lesionsam.errors import UserError
from lesionsam.models import adapters, lora
from lesionsam.models.checkpoint import build_sam, load_sam, read_weights, save_sam
from lesionsam.models.finetuned import Strategy, attach, merged_state, save_tuned
from lesionsam.models.prefix import num_frozen_blocks
from lesionsam.models.sam import Sam, encode
from lesionsam.models.teacher import Teacher
from lesionsam.models.trainable import select_trainable, trained_counts, trained_parameters

LORA = Strategy("lora", lora_rank=3, lora_alpha=6.0)
ADAPTER = Strategy("adapter", adapter_dim=5)
BOTH = pytest.mark.parametrize("strategy", [LORA, ADAPTER], ids=["lora", "adapter"])
WIDTH, DEPTH = ARCHITECTURE.width, ARCHITECTURE.depth


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def adapted(strategy: Strategy, *, moved: bool = True, decoder: bool = False) -> Sam:
    """The tiny SAM with this strategy attached and selected; moved off its identity at start, unless told otherwise."""
    sam = tiny_sam()
    attach(sam, strategy)
    select_trainable(sam, encoder=strategy.encoder, train_decoder=decoder)
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in trained_parameters(sam):
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return sam


@BOTH
@torch.no_grad()
def test_it_starts_as_the_pretrained_model_to_the_last_bit(strategy: Strategy) -> None:
    plain, sam = tiny_sam(), adapted(strategy, moved=False)
    assert torch.equal(encode(plain, images()), encode(sam, images()))
    assert not torch.allclose(encode(plain, images()), encode(adapted(strategy), images()), atol=1e-2)


@BOTH
def test_only_what_was_added_trains_and_nothing_else_moves(strategy: Strategy) -> None:
    sam = adapted(strategy, moved=False)
    before = {name: p.detach().clone() for name, p in sam.named_parameters()}
    optimizer = torch.optim.AdamW(sam.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        encode(sam, images()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    mark = lora.MARK if strategy.encoder == "lora" else adapters.MARK
    moved = {name for name, p in sam.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if mark in name}, "each of them moved, and nothing else"


def test_counts_are_those_of_the_formulas() -> None:
    updates = DEPTH * 3 * ((WIDTH + 3 * WIDTH) + (WIDTH + WIDTH))  # rank x (in + out), of qkv and of proj
    bottlenecks = DEPTH * 2 * (WIDTH * 5 + 5 + 5 * WIDTH + WIDTH)  # down and up with biases, two a block
    assert trained_counts(adapted(LORA)) == {"lora": updates}
    assert trained_counts(adapted(ADAPTER)) == {"adapters": bottlenecks}
    decoder = sum(p.numel() for p in tiny_sam().mask_decoder.parameters())
    prompts = sum(p.numel() for p in tiny_sam().prompt_encoder.parameters())
    assert trained_counts(adapted(LORA, decoder=True)) == {
        "lora": updates,
        "decoder": decoder,
        "prompt_encoder": prompts,
    }
    sam = adapted(LORA)
    select_trainable(sam, encoder="lora", train_decoder=True, train_prompt_encoder=False)
    assert trained_counts(sam) == {"lora": updates, "decoder": decoder}


@pytest.mark.parametrize(
    "strategy",
    [Strategy("lora", last_k=1, lora_rank=2, lora_alpha=2.0), Strategy("adapter", last_k=1, adapter_dim=2)],
    ids=["lora", "adapter"],
)
def test_on_the_last_blocks_alone_the_prefix_stays_frozen(strategy: Strategy) -> None:
    sam = adapted(strategy)
    assert num_frozen_blocks(sam) == DEPTH - 1
    assert all(f"blocks.{DEPTH - 1}." in name for name, p in sam.named_parameters() if p.requires_grad)


@torch.no_grad()
def test_the_low_rank_update_equals_a_plain_computation() -> None:
    """W x + (alpha / rank) B A x, with the factors taken out of peft's layers."""
    sam = adapted(LORA)
    attention = sam.image_encoder.blocks[0].attn
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(2))
    for name in ("qkv", "proj"):
        base, layer = tiny_sam().image_encoder.blocks[0].attn.get_submodule(name), attention.get_submodule(name)
        a, b = (layer.get_parameter(f"lora_{factor}.default.weight") for factor in "AB")
        assert a.shape == (3, WIDTH)
        wanted = F.linear(x, base.weight, base.bias) + 6.0 / 3 * x @ a.T @ b.T
        assert torch.allclose(layer(x), wanted, atol=1e-5)
        assert torch.allclose(lora.update_of(layer), 2.0 * b @ a, atol=1e-6)


@torch.no_grad()
def test_it_is_what_peft_alone_makes_of_the_same_factors() -> None:
    """peft's own way in (`get_peft_model`, targets by suffix) and out (`merge_and_unload`) as the oracle."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    sam = adapted(LORA)
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["qkv", "proj"],
        bias="none",
        exclude_modules=r".*(mask_decoder|patch_embed).*",
    )
    theirs = get_peft_model(tiny_sam().image_encoder, config)
    ours = {
        f"base_model.model.{key.removeprefix('image_encoder.').replace('.default.', '.')}": value
        for key, value in sam.state_dict().items()
        if lora.MARK in key
    }
    assert set(ours) == set(get_peft_model_state_dict(theirs)), "the same layers, under peft's names"
    set_peft_model_state_dict(theirs, ours)
    assert torch.allclose(theirs(images()), encode(sam, images()), atol=1e-5)
    merged = theirs.merge_and_unload().state_dict()
    for key, value in merged_state(sam).items():
        if key.startswith("image_encoder."):
            assert torch.allclose(merged[key.removeprefix("image_encoder.")], value, atol=1e-6), key


@torch.no_grad()
def test_merged_equals_attached_in_plain_segment_anything_and_in_place() -> None:
    sam = adapted(LORA)
    before = {key: value.clone() for key, value in sam.state_dict().items()}
    plain = build_sam("compact", architecture=ARCHITECTURE)
    plain.load_state_dict(merged_state(sam), strict=True)
    assert torch.allclose(encode(plain, images()), encode(sam, images()), atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in sam.state_dict().items()), "the model is left alone"
    lora.merge_lora(sam)
    assert sam.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(encode(sam, images()), encode(plain, images()))


@torch.no_grad()
def test_adapters_equal_a_plain_computation_of_the_block() -> None:
    """segment_anything's block written out, with the adapters where Houlsby et al. put them: before each shortcut."""
    sam = adapted(ADAPTER)
    block, plain = sam.image_encoder.blocks[0], tiny_sam().image_encoder.blocks[0]
    x = torch.randn(2, 8, 8, WIDTH, generator=torch.Generator().manual_seed(2))

    def bottleneck(part: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        weights = {key: value for key, value in part.state_dict().items() if key.startswith("adapter.")}
        hidden = F.gelu(y @ weights["adapter.down.weight"].T + weights["adapter.down.bias"])
        return y + hidden @ weights["adapter.up.weight"].T + weights["adapter.up.bias"]

    half = x + bottleneck(block.attn, plain.attn(plain.norm1(x)))
    whole = half + bottleneck(block.mlp, plain.mlp(plain.norm2(half)))
    assert torch.allclose(block(x), whole, atol=1e-5)


def test_adapters_cannot_be_merged_and_the_pretrained_keys_keep_their_names() -> None:
    sam = adapted(ADAPTER)
    with pytest.raises(UserError, match="adapters cannot be merged into SAM's own weights"):
        merged_state(sam)
    own = tiny_sam().state_dict()
    assert {key for key in sam.state_dict() if adapters.MARK not in key} == set(own)
    assert all(torch.equal(value, own[key]) for key, value in sam.state_dict().items() if key in own)


@BOTH
@torch.no_grad()
def test_the_whole_file_comes_back(strategy: Strategy, tmp_path: Path) -> None:
    sam, path = adapted(strategy, decoder=True), tmp_path / "best.safetensors"
    save_sam(sam, path, name="compact")
    again = load_sam(None, path)
    assert torch.allclose(encode(again, images()), encode(sam, images()), atol=1e-5)
    assert not any(lora.MARK in key or "base_layer" in key for key in again.state_dict())
    if strategy.encoder == "lora":
        build_sam("compact", architecture=ARCHITECTURE).load_state_dict(again.state_dict(), strict=True)
    save_sam(again, tmp_path / "again.safetensors", name="compact")
    twice = load_sam("compact", tmp_path / "again.safetensors").state_dict()
    assert all(torch.equal(value, twice[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    "strategy",
    [LORA, ADAPTER, Strategy("none"), Strategy("adapter", last_k=1, adapter_dim=2)],
    ids=["lora", "adapter", "decoder", "last adapter"],
)
@torch.no_grad()
def test_the_small_file_holds_what_was_trained_and_comes_back_beside_its_base(
    strategy: Strategy, tmp_path: Path
) -> None:
    base, small = tmp_path / "sam.safetensors", tmp_path / "tuned.safetensors"
    save_sam(tiny_sam(), base, name="compact")
    sam = adapted(strategy, decoder=strategy.encoder == "none")
    save_tuned(sam, small, name="compact", strategy=strategy, base=base, base_state=read_weights(base)[0])
    again = load_sam(None, small, base=base)
    assert torch.allclose(encode(again, images()), encode(sam, images()), atol=1e-5)
    for key, value in again.mask_decoder.state_dict().items():
        assert torch.equal(value, sam.mask_decoder.state_dict()[key])
    with safe_open(small, framework="pt") as file:
        held = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert held == sum(trained_counts(sam).values())
    assert small.stat().st_size < base.stat().st_size


def test_a_base_that_was_written_anew_is_the_same_base(tmp_path: Path) -> None:
    base, again, small = tmp_path / "base.safetensors", tmp_path / "again.safetensors", tmp_path / "tuned.safetensors"
    save_sam(tiny_sam(), base, name="compact")
    save_sam(tiny_sam(), again, name="compact", metadata={"note": "other bytes"})
    save_tuned(adapted(LORA), small, name="compact", strategy=LORA, base=base, base_state=read_weights(base)[0])
    assert base.read_bytes() != again.read_bytes()
    for key, value in load_sam(None, small, base=again).state_dict().items():
        assert torch.equal(value, load_sam(None, small, base=base).state_dict()[key])


def test_what_is_wrong_with_a_small_file_is_said_in_a_line(tmp_path: Path) -> None:
    base, other, small = (tmp_path / f"{name}.safetensors" for name in ("base", "other", "small"))
    save_sam(tiny_sam(), base, name="compact")
    save_sam(tiny_sam(1), other, name="compact")
    save_tuned(adapted(LORA), small, name="compact", strategy=LORA, base=base, base_state=read_weights(base)[0])
    with pytest.raises(UserError, match=r"holds only the trained parameters and needs .* base\.safetensors of compact"):
        load_sam(None, small)
    with pytest.raises(UserError, match=r"belongs to base\.safetensors of compact .*, got .*other"):
        load_sam(None, small, base=other)
    broken = adapted(LORA)
    with torch.no_grad():
        trained_parameters(broken)[0][0, 0] = float("nan")
    save_tuned(broken, small, name="compact", strategy=LORA, base=base, base_state=read_weights(base)[0])
    with pytest.raises(UserError, match=r"lora_A\.weight holds values that are not finite"):
        load_sam(None, small, base=base)
    save_tuned(
        adapted(Strategy("lora", last_k=1, lora_rank=3, lora_alpha=6.0)),
        small,
        name="compact",
        strategy=LORA,
        base=base,
        base_state=read_weights(base)[0],
    )
    with pytest.raises(UserError, match=r"does not fit base\.safetensors: .*blocks\.0\.attn\.qkv\.lora_A\.weight"):
        load_sam(None, small, base=base)


def test_numbers_that_a_model_does_not_allow_are_refused() -> None:
    for strategy, message in (
        (Strategy("lora", lora_rank=0), r"model\.lora_rank: expected at least 1, got 0"),
        (Strategy("lora", last_k=3, lora_rank=1), r"model\.lora_last_k: expected 0 to 2 .*, got 3"),
        (Strategy("adapter", adapter_dim=0), r"model\.adapter_dim: expected at least 1 hidden unit, got 0"),
        (Strategy("adapter", last_k=9, adapter_dim=1), r"model\.adapter_last_k: expected 0 to 2 .*, got 9"),
    ):
        with pytest.raises(UserError, match=message):
            attach(tiny_sam(), strategy)


@BOTH
def test_the_teacher_averages_what_trains_and_shares_the_rest(strategy: Strategy) -> None:
    sam = adapted(strategy)
    teacher = Teacher(sam, 0.5)
    own = dict(teacher.module.named_parameters())
    with torch.no_grad():
        for p in trained_parameters(sam):
            p.add_(1.0)
    teacher.update()
    for name, p in sam.named_parameters():
        if p.requires_grad:
            assert torch.allclose(own[name], p - 0.5, atol=1e-6), name
        else:
            assert own[name].data_ptr() == p.data_ptr(), name
    with torch.no_grad():
        half = deepcopy(sam)
        for p in trained_parameters(half):
            p.sub_(0.5)
        assert isinstance(teacher.module, Sam)
        assert torch.allclose(encode(teacher.module, images()), encode(half, images()), atol=1e-5)


def test_seeds_decide_what_starts_at_random_and_leave_the_global_state_alone() -> None:
    for strategy in (LORA, ADAPTER):
        models = [tiny_sam(), tiny_sam(), tiny_sam()]
        torch.manual_seed(5)
        before = torch.get_rng_state()
        for sam, seed in zip(models, (0, 0, 1), strict=True):
            attach(sam, strategy, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        first, same, other = (sam.state_dict() for sam in models)
        assert all(torch.equal(first[key], same[key]) for key in first)
        assert any(not torch.equal(first[key], other[key]) for key in first)


def test_dropout_acts_in_training_alone() -> None:
    sam = adapted(Strategy("lora", lora_rank=3, lora_alpha=6.0, lora_dropout=0.5))
    quiet = encode(sam, images())
    assert torch.equal(encode(sam, images()), quiet)
    sam.train()
    assert not torch.allclose(encode(sam, images()), quiet, atol=1e-4)

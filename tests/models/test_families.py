"""SAM 2.1, EdgeTAM and SAM 3 beside transformers itself: features, masks, what trains, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from helpers.families import FAMILIES, SIDE, tiny_family, tiny_model, write_hub_folder
from helpers.tiny import tiny_sam
from lesionsam.errors import UserError
from lesionsam.models import adapters, lora
from lesionsam.models.checkpoint import load_sam, save_sam
from lesionsam.models.finetuned import Strategy, attach, merged_state, save_tuned
from lesionsam.models.hub import to_transformers
from lesionsam.models.identity import frozen_identity
from lesionsam.models.prefix import encode_frozen, encode_prefix, encode_suffix, num_frozen_blocks
from lesionsam.models.sam import Sam, at_size, decode, encode
from lesionsam.models.trainable import select_trainable, trained_counts
from lesionsam.models.transforms import model_frames, upscale
from lesionsam.types import Prompts

family = pytest.fixture(params=list(FAMILIES))(lambda request: request.param)


def pixels(sam: Sam, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, sam.side, sam.side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("encoder", ["blocks", "lora", "adapter"])
@pytest.mark.parametrize("name", ["compact", *FAMILIES])
def test_checkpointing_keeps_fewer_activations_and_gives_the_same_gradients(name: str, encoder: str) -> None:
    if name == "edgetam" and encoder != "blocks":
        pytest.skip("EdgeTAM's backbone has no attention")

    def step(checkpointing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        sam = tiny_sam() if name == "compact" else tiny_family(name)
        attach(sam, Strategy(encoder, lora_rank=2, lora_alpha=4.0, lora_dropout=0.5, adapter_dim=4), seed=0)
        select_trainable(sam, encoder=encoder, train_decoder=False)
        sam.checkpointing, kept = checkpointing, 0
        sam.train()

        def pack(value: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += value.nbytes
            return value

        torch.manual_seed(1)  # of the dropout
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            features = encode(sam, pixels(sam, 2))
        features.square().mean().backward()
        return features.detach(), {key: p.grad for key, p in sam.named_parameters() if p.grad is not None}, kept

    plain, recomputed = step(False), step(True)
    assert torch.equal(plain[0], recomputed[0])
    assert plain[1].keys() == recomputed[1].keys()
    assert plain[1]
    assert all(torch.equal(value, recomputed[1][key]) for key, value in plain[1].items())
    assert recomputed[2] < 0.8 * plain[2]  # the neck keeps its own


def some_prompts(count: int, side: int, seed: int = 0) -> dict[str, Prompts]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side / 2
    boxes = torch.cat([corner, corner + side / 3], 1)
    points, labels = torch.rand(count, 3, 2, generator=generator) * side, torch.tensor([[1, 0, 1]]).expand(count, -1)
    masks = torch.randn(count, 1, 16, 16, generator=generator)
    return {
        "box": Prompts(boxes=boxes),
        "points": Prompts(points, labels),
        "box and points": Prompts(points, labels, boxes),
        "box and mask": Prompts(boxes=boxes, masks=masks),
        "none": Prompts(),
    }


def given(prompts: Prompts) -> dict[str, Any]:
    """The arguments of a model of transformers; one prompt per image."""
    named = {"input_points": prompts.points, "input_labels": prompts.labels, "input_boxes": prompts.boxes}
    found = {name: value[:, None] for name, value in named.items() if value is not None}
    return found | ({} if prompts.masks is None else {"input_masks": prompts.masks})


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_features_and_masks_equal_those_of_transformers(family: str, count: int) -> None:
    theirs, ours = tiny_model(family), tiny_family(family)
    shown = pixels(ours, count)
    features, maps = encode(ours, shown), theirs.get_image_embeddings(shown)
    assert features.shape == (count, 4 * ours.embed_dim, ours.grid, ours.grid)
    assert torch.allclose(ours.image_embedding(features), maps[-1], atol=1e-6)
    for name, prompts in some_prompts(count, ours.side).items():
        for multimask in (False, True):
            wanted = theirs(image_embeddings=maps, multimask_output=multimask, **given(prompts))
            logits, predicted = decode(ours, features, prompts, multimask)
            assert torch.allclose(logits, wanted.pred_masks[:, 0], atol=1e-6), name
            assert torch.allclose(predicted, wanted.iou_scores[:, 0], atol=1e-6), name
            assert wanted.pred_masks.std() > 1e-3, "masks that could tell a difference"


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64), (31, 200)])
@torch.no_grad()
def test_frames_boxes_and_masks_at_original_size_equal_the_models_own_processor(
    family: str, size: tuple[int, int]
) -> None:
    ours = tiny_family(family)
    theirs, processor = to_transformers(ours, ours.state_dict())
    height, width = size
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    frames, sizes = model_frames([image], ours.frame)
    assert sizes.tolist() == [[ours.side, ours.side]]
    box = [0.2 * width, 0.3 * height, 0.8 * width, 0.9 * height]
    inputs = processor(images=image, input_boxes=[[box]], return_tensors="pt")
    from lesionsam.boxes.geometry import to_model_frame

    framed = torch.tensor(to_model_frame(np.array(box), width, height, ours.frame), dtype=torch.float32)[None]
    assert torch.allclose(inputs["input_boxes"][0].float(), framed, atol=1e-4)
    normal = ours.normalize(frames, sizes)
    # torchvision and Pillow round pixels differently: a level of 255 is at most 0.018 after normalisation.
    assert (inputs["pixel_values"] - normal).abs().max() < 0.06
    assert (inputs["pixel_values"] - normal).abs().mean() < 0.01
    wanted = theirs(
        image_embeddings=theirs.get_image_embeddings(normal), input_boxes=framed[:, None], multimask_output=False
    )
    logits, _ = decode(ours, encode(ours, normal), Prompts(boxes=framed))
    (whole,) = processor.image_processor.post_process_masks(wanted.pred_masks, inputs["original_sizes"], binarize=False)
    assert torch.allclose(upscale(logits[0], (ours.side, ours.side), size, ours.frame), whole[0], atol=1e-5)


@torch.no_grad()
def test_prompts_on_chosen_images_equal_one_at_a_time_and_groups_keep_their_order(family: str) -> None:
    sam = tiny_family(family)
    features = encode(sam, pixels(sam, 3))
    prompts, rows = some_prompts(4, sam.side)["box"], [2, 0, 0, 1]
    together, _ = decode(sam, features, prompts, rows=rows)
    for k, row in enumerate(rows):
        alone, _ = decode(sam, features[row : row + 1], prompts[k : k + 1])
        assert torch.allclose(together[k], alone[0], atol=1e-5)
    points = some_prompts(2, sam.side)["points"]
    groups = [(torch.tensor([1, 2]), points), (torch.tensor(rows), prompts)]
    logits, predicted = sam.decode_groups(features, groups)
    assert (len(logits), logits.shape[1], len(predicted)) == (6, 4, 6)
    assert torch.allclose(logits[2:, 1:], decode(sam, features, prompts, multimask=True, rows=rows)[0], atol=1e-5)


@torch.no_grad()
def test_the_encoder_may_be_split_after_any_block(family: str) -> None:
    sam = tiny_family(family)
    shown = pixels(sam, 2)
    whole = encode(sam, shown)
    for num_blocks in range(len(sam.blocks) + 2):
        assert torch.equal(encode_suffix(sam, encode_prefix(sam, shown, num_blocks), num_blocks), whole), num_blocks
    tokens, reference = encode_frozen(sam, shown, 1, sam)
    assert reference is not None
    assert torch.allclose(reference, whole, atol=1e-5)
    assert torch.allclose(encode_suffix(sam, tokens, 1), whole, atol=1e-5)


def trained_names(sam: Sam) -> set[str]:
    return {name for name, p in sam.named_parameters() if p.requires_grad}


NECK = ("vision_encoder.neck.", "mask_decoder.conv_s", "no_memory_embedding")


def test_the_last_blocks_the_neck_and_the_decoder_train_and_nothing_else(family: str) -> None:
    sam = tiny_family(family)
    select_trainable(sam, encoder="none", train_decoder=True)
    assert num_frozen_blocks(sam) == len(sam.blocks) + 1, "the neck's part of the decoder is frozen with the encoder"
    assert trained_names(sam) == {
        name
        for name, _ in sam.named_parameters()
        if name.startswith(("mask_decoder.", "prompt_encoder.")) and not name.startswith(NECK)
    }
    select_trainable(sam, encoder="blocks", unfreeze_last_k=1, train_decoder=False)
    last = {id(p) for p in sam.blocks[-1].parameters()}
    wanted = {name for name, p in sam.named_parameters() if id(p) in last or name.startswith(NECK)}
    assert trained_names(sam) == wanted
    assert num_frozen_blocks(sam) == len(sam.blocks) - 1
    select_trainable(sam, encoder="blocks", train_decoder=True)
    if family != "edgetam":  # whose backbone has no stem of its own
        assert num_frozen_blocks(sam) == -1
    assert trained_counts(sam)["encoder"] > 0
    with pytest.raises(UserError, match=f"expected 0 to {len(sam.blocks)}"):
        select_trainable(sam, encoder="blocks", unfreeze_last_k=len(sam.blocks) + 1, train_decoder=True)


@pytest.mark.parametrize("encoder", ["lora", "adapter"])
def test_added_parts_start_as_the_pretrained_model_and_train_alone(family: str, encoder: str) -> None:
    sam = tiny_family(family)
    shown = pixels(sam, 1)
    before = encode(sam, shown).detach()
    strategy = Strategy(encoder, last_k=2, adapter_dim=4, lora_rank=2, lora_alpha=4)
    if family == "edgetam":
        with pytest.raises(UserError, match=r"edgetam has no .*; choose blocks or none"):
            attach(sam, strategy)
        return
    attach(sam, strategy)
    select_trainable(sam, encoder=encoder, train_decoder=False)
    mark = lora.MARK if encoder == "lora" else adapters.MARK
    names = {name for name in trained_names(sam) if not name.startswith("prompt_encoder.")}
    assert names
    assert all(mark in name for name in names)
    assert num_frozen_blocks(sam) == len(sam.blocks) - 2
    assert torch.allclose(encode(sam, shown).detach(), before, atol=1e-6)
    with torch.no_grad():
        for name, p in sam.named_parameters():
            if name in names:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    assert not torch.allclose(encode(sam, shown).detach(), before, atol=1e-4)


@torch.no_grad()
def test_merged_low_rank_updates_equal_attached_ones_and_small_files_come_back(family: str, tmp_path: Path) -> None:
    if family == "edgetam":
        pytest.skip("EdgeTAM's backbone is convolutional")
    base = tmp_path / "base.safetensors"
    save_sam(tiny_family(family), base, name=family)
    sam = load_sam(family, base)
    strategy = Strategy("lora", lora_rank=2, lora_alpha=4)
    attach(sam, strategy)
    select_trainable(sam, encoder="lora", train_decoder=True)
    for name, p in sam.named_parameters():
        if p.requires_grad:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    shown = pixels(sam, 1)
    wanted = encode(sam, shown)
    save_sam(sam, tmp_path / "best.safetensors", name=family)
    assert torch.allclose(encode(load_sam(family, tmp_path / "best.safetensors"), shown), wanted, atol=1e-5)
    assert set(merged_state(sam)) == set(tiny_family(family).state_dict())
    small = tmp_path / "tuned.safetensors"
    save_tuned(sam, small, name=family, strategy=strategy, base=base, base_state=tiny_family(family).state_dict())
    assert small.stat().st_size < base.stat().st_size / 2
    assert torch.allclose(encode(load_sam(None, small, base=base), shown), wanted, atol=1e-5)


@torch.no_grad()
def test_weights_come_back_bit_for_bit_at_any_side(family: str, tmp_path: Path) -> None:
    sam, path = tiny_family(family), tmp_path / "sam.safetensors"
    save_sam(sam, path, name="models/mine")
    again = load_sam(None, path)
    assert (again.name, again.side, again.training) == ("models/mine", SIDE[family], False)
    assert again.state_dict().keys() == sam.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), sam.state_dict().values(), strict=True))
    larger = at_size(load_sam(None, path), 2 * sam.side)
    shown = pixels(larger, 1)
    wanted = encode(larger, shown)
    assert wanted.shape[-1] == 2 * sam.grid
    save_sam(larger, path, name="models/mine")
    assert torch.equal(encode(load_sam(None, path), shown), wanted)
    assert torch.equal(encode(load_sam(None, path, image_size=sam.side), pixels(sam, 1)), encode(sam, pixels(sam, 1)))
    with pytest.raises(UserError, match=r"expected a multiple of \d+"):
        at_size(sam, sam.side + 1)


def test_a_changed_weight_or_side_of_the_frozen_part_is_another_identity(family: str) -> None:
    sam = tiny_family(family)
    select_trainable(sam, encoder="none", train_decoder=True)
    split = num_frozen_blocks(sam)
    known = frozen_identity(sam, split)
    assert frozen_identity(tiny_family(family), split) == known
    assert frozen_identity(at_size(tiny_family(family), 2 * sam.side), split) != known
    with torch.no_grad():
        next(sam.mask_decoder.iou_prediction_head.parameters()).add_(1)
    assert frozen_identity(sam, split) == known, "the decoder is no part of it"
    with torch.no_grad():
        sam.mask_decoder.conv_s0.bias.add_(1)
    assert frozen_identity(sam, split) != known


def test_training_mode_leaves_the_statistics_of_batch_norms_alone() -> None:
    sam = tiny_family("edgetam").train()
    before = {name: value.clone() for name, value in sam.named_buffers()}
    encode(sam, pixels(sam, 2))
    assert all(torch.equal(value, before[name]) for name, value in sam.named_buffers())
    assert sam.training


# ---- the form of the Hub ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_folder_of_the_hub_is_the_same_model(family: str, tmp_path: Path) -> None:
    folder = write_hub_folder(family, tmp_path / "theirs")
    sam, wanted = load_sam(None, folder), tiny_family(family)
    assert sam.name == "theirs"
    assert torch.equal(encode(sam, pixels(sam, 1)), encode(wanted, pixels(sam, 1)))


@pytest.mark.parametrize(
    "numbers", [{"hidden_size": 32, "mlp_dim": 64}, {"hidden_size": 24, "mlp_dim": 36, "num_attention_heads": 2}]
)
@torch.no_grad()
def test_sam_1_of_the_hub_loads_into_segment_anythings_classes(numbers: dict[str, int], tmp_path: Path) -> None:
    """Pruned models such as SlimSAM too: widths and hidden units of their own."""
    torch.manual_seed(0)
    vision = transformers.SamVisionConfig(
        **{"num_attention_heads": 4} | numbers,
        num_hidden_layers=3,
        output_channels=32,
        image_size=64,
        patch_size=8,
        window_size=3,
        global_attn_indexes=[1],
        num_pos_feats=16,
    )
    config = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config=transformers.SamPromptEncoderConfig(
            hidden_size=32, image_size=64, patch_size=8, image_embedding_size=8
        ),
        mask_decoder_config=transformers.SamMaskDecoderConfig(
            hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32, layer_norm_eps=1e-5
        ),
    )
    theirs = transformers.SamModel(config).eval()
    for p in theirs.parameters():
        if p.ndim > 1:
            p.copy_(0.2 * torch.randn(p.shape))
    theirs.save_pretrained(tmp_path / "slim")
    sam = load_sam(None, tmp_path / "slim")
    assert type(sam.encoder).__module__.startswith("segment_anything.")
    shown, prompts = pixels(sam, 2), some_prompts(2, 64)["box"]
    maps = theirs.get_image_embeddings(shown)
    assert torch.allclose(encode(sam, shown), maps, atol=1e-4)
    wanted = theirs(image_embeddings=maps, multimask_output=False, **given(prompts))
    assert torch.allclose(decode(sam, maps, prompts)[0], wanted.pred_masks[:, 0], atol=1e-4)
    save_sam(sam, tmp_path / "sam.safetensors", name="slim")
    again = load_sam("slim", tmp_path / "sam.safetensors")
    assert torch.equal(encode(again, shown), encode(sam, shown))
    back, _ = to_transformers(sam, sam.state_dict())
    assert torch.equal(back.get_image_embeddings(shown), maps)


def test_folders_that_hold_no_model_are_said_in_one_line(tmp_path: Path) -> None:
    folder = write_hub_folder("sam2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            load_sam(None, folder)
        assert "\n" not in str(caught.value)

    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("cannot be read as a Sam2Model")
    (folder / "model.safetensors").unlink()
    refused("cannot be read as a Sam2Model")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    refused("holds a model of type 'bert'; expected one of sam, sam2")
    (folder / "config.json").write_text("{")
    refused("states no model_type")
    (folder / "config.json").unlink()
    refused(r"a folder without config\.json")


def test_weights_of_another_family_or_name_are_refused(tmp_path: Path) -> None:
    save_sam(tiny_family("sam2"), tmp_path / "sam.safetensors", name="sam2.1-tiny")
    with pytest.raises(UserError, match=r"holds weights of sam2\.1-tiny, expected sam3; change model\.name"):
        load_sam("sam3", tmp_path / "sam.safetensors")
    state = tiny_family("sam2").state_dict()
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(UserError, match=r"holds no SAM.*a model of the Hub is named by its folder"):
        load_sam(None, tmp_path / "sam.pth")

"""The compact SAM against segment_anything's own calls, and the weights that ship with the project."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lesionsam.errors import UserError
from lesionsam.models.checkpoint import build_sam
from lesionsam.models.compact import CompactArchitecture
from lesionsam.models.decoder import decode_groups
from lesionsam.models.sam import Sam
from lesionsam.types import Prompts

TINY = CompactArchitecture(image_size=32, patch_size=8, width=16, depth=2, num_heads=2, prompt_width=16, decoder_mlp=32)
WEIGHTS = Path(__file__).parents[2] / "foundation" / "compact.safetensors"


def tiny_sam(seed: int = 0) -> Sam:
    torch.manual_seed(seed)
    return build_sam("compact", architecture=TINY)


def prompts_of_every_kind(num: int, seed: int = 1) -> dict[str, Prompts]:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(num, 3, 2, generator=generator) * TINY.image_size
    labels = torch.tensor([[1, 1, 0]]).expand(num, -1)
    boxes = torch.cat([torch.full((num, 2), 3.0), 12 + 18 * torch.rand(num, 2, generator=generator)], 1)
    masks = torch.randn(num, 1, 4 * TINY.grid, 4 * TINY.grid, generator=generator)
    return {
        "points": Prompts(points, labels),
        "box": Prompts(boxes=boxes),
        "box and points": Prompts(points, labels, boxes),
        "box and mask": Prompts(boxes=boxes, masks=masks),
        "all": Prompts(points, labels, boxes, masks),
    }


def test_default_architecture_is_a_million_parameters_of_plain_segment_anything() -> None:
    sam = build_sam("compact", architecture=CompactArchitecture())
    assert sum(p.numel() for p in sam.parameters()) == 1_096_904
    assert {type(part).__module__.split(".")[0] for part in sam.modules() if part is not sam} <= {
        "segment_anything",
        "torch",
    }
    assert sam.image_format == "RGB"
    assert sam.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])  # segment_anything.build_sam


def test_shapes_and_frames() -> None:
    sam = tiny_sam()
    features = sam.image_encoder(torch.randn(3, 3, 32, 32))
    assert features.shape == (3, 16, 4, 4)
    logits, predicted_iou = decode_groups(sam, features, [(None, prompts_of_every_kind(3)["box"])])
    assert logits.shape == (3, 4, 16, 16)
    assert predicted_iou.shape == (3, 4)


@pytest.mark.parametrize("kind", ["points", "box", "box and points", "box and mask", "all"])
def test_batched_decoding_equals_segment_anything_one_by_one(kind: str) -> None:
    sam, num = tiny_sam(), 3
    features = sam.image_encoder(torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    prompts = prompts_of_every_kind(num)[kind]
    logits, predicted_iou = decode_groups(sam, features, [(None, prompts)])
    for index in range(num):
        one = prompts[slice(index, index + 1)]
        points = None if one.points is None or one.labels is None else (one.points, one.labels)
        sparse, dense = sam.prompt_encoder(points=points, boxes=one.boxes, masks=one.masks)
        common = {
            "image_embeddings": features[index : index + 1],
            "image_pe": sam.prompt_encoder.get_dense_pe(),
            "sparse_prompt_embeddings": sparse,
            "dense_prompt_embeddings": dense,
        }
        single, single_iou = sam.mask_decoder(**common, multimask_output=False)
        three, three_iou = sam.mask_decoder(**common, multimask_output=True)
        torch.testing.assert_close(logits[index], torch.cat([single, three], 1)[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(predicted_iou[index], torch.cat([single_iou, three_iou], 1)[0], atol=1e-5, rtol=1e-4)


def test_coordinates_keep_their_precision_under_bfloat16() -> None:
    """A prompt's embedding is the same with and without autocast."""
    sam = tiny_sam()
    found = []
    for enabled in (False, True):
        tokens: list[torch.Tensor] = []
        hook = sam.mask_decoder.transformer.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda _, inputs, tokens=tokens: tokens.append(inputs[0].detach().float())
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            decode_groups(
                sam, torch.zeros(1, 16, 4, 4), [(None, Prompts(boxes=torch.tensor([[3.0, 4.0, 20.0, 22.5]])))]
            )
        hook.remove()
        found += tokens
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("image_size", 100, "image_size"),
        ("width", 130, "width"),
        ("prompt_width", 40, "prompt_width"),
        ("depth", 0, "depth"),
        ("num_heads", 2.5, "num_heads"),
    ],
)
def test_impossible_numbers_are_named(field: str, value: object, named: str) -> None:
    with pytest.raises(UserError, match=named):
        replace(CompactArchitecture(), **{field: value})


def test_architecture_of_a_file_needs_exactly_the_known_keys() -> None:
    numbers = asdict(TINY)
    assert CompactArchitecture.from_mapping(numbers, "file") == TINY
    with pytest.raises(UserError, match=r"file.*depth"):
        CompactArchitecture.from_mapping({k: v for k, v in numbers.items() if k != "depth"}, "file")
    with pytest.raises(UserError, match="windows"):
        CompactArchitecture.from_mapping({**numbers, "windows": 1}, "file")


def test_shipped_weights_are_small_half_precision_and_fit_their_stated_architecture() -> None:
    assert WEIGHTS.stat().st_size < 4_000_000
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["name"] == "compact"
    architecture = CompactArchitecture.from_mapping(json.loads(metadata["architecture"]), str(WEIGHTS))
    sam = build_sam("compact", architecture=architecture)
    state = load_file(WEIGHTS)
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert sam.load_state_dict(state).missing_keys == []
    assert all(torch.isfinite(value).all() for value in state.values())

"""Batched decoding against segment_anything's own prompt encoder and decoder, one prompt at a time, with gradients."""

from __future__ import annotations

import pytest
import torch

from helpers.tiny import SIDE, tiny_sam
from lesionsam.models.decoder import decode_groups, embed_points_and_boxes, output_upscaling
from lesionsam.models.sam import Sam
from lesionsam.types import Prompts

CELLS = SIDE // 4


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def boxes(count: int, seed: int) -> torch.Tensor:
    return torch.cat([10 * random(count, 2, seed=seed), 12 + 18 * random(count, 2, seed=seed + 1)], 1)


def kinds() -> dict[str, tuple[torch.Tensor, Prompts]]:
    """Rows of a batch of 3 images and prompts of different lengths, images 0 and 2 several times."""
    mixed = torch.tensor([[1, 0, 1, -1, 1]]).expand(2, -1)
    return {
        "points": (torch.tensor([0, 2]), Prompts(SIDE * random(2, 5, 2, seed=1), mixed)),
        "box": (torch.tensor([2]), Prompts(boxes=boxes(1, 2))),
        "boxes in another order": (torch.tensor([2, 0, 0]), Prompts(boxes=boxes(3, 2))),
        "no prompt": (torch.tensor([1, 2]), Prompts()),
        "box and points": (
            torch.tensor([1, 0, 0]),
            Prompts(SIDE * random(3, 2, 2, seed=3), torch.ones(3, 2).long(), boxes(3, 4)),
        ),
        "box and mask": (
            torch.tensor([0, 1]),
            Prompts(boxes=boxes(2, 6), masks=random(2, 1, 4 * CELLS, 4 * CELLS, seed=7) - 0.5),
        ),
    }


def one_by_one(
    sam: Sam, features: torch.Tensor, rows: torch.Tensor, prompts: Prompts
) -> tuple[torch.Tensor, torch.Tensor]:
    """All four tokens of segment_anything's decoder for each row."""
    masks, qualities = [], []
    for k, row in enumerate(rows.tolist()):
        one = prompts[k : k + 1]
        points = None if one.points is None or one.labels is None else (one.points, one.labels)
        sparse, dense = sam.prompt_encoder(points=points, boxes=one.boxes, masks=one.masks)
        mask, quality = sam.mask_decoder.predict_masks(
            image_embeddings=features[row : row + 1],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        masks.append(mask)
        qualities.append(quality)
    return torch.cat(masks), torch.cat(qualities)


def gradients(sam: Sam, features: torch.Tensor, logits: torch.Tensor, quality: torch.Tensor) -> list[torch.Tensor]:
    parameters = [*sam.mask_decoder.parameters(), *sam.prompt_encoder.parameters()]
    total = (logits * (random(*logits.shape, seed=8) - 0.5)).sum() + (quality * random(*quality.shape, seed=9)).sum()
    found = torch.autograd.grad(total, [features, *parameters], allow_unused=True, materialize_grads=True)
    return list(found)


MIXTURES = [
    ["points"],
    ["box"],
    ["boxes in another order"],
    ["points", "box and points"],
    ["points", "box", "box and points"],
    ["box", "box and mask", "points"],
    ["no prompt"],
    ["box", "no prompt", "box and mask"],
]


@pytest.mark.parametrize("chosen", MIXTURES, ids="+".join)
def test_prompts_of_several_lengths_at_once_equal_segment_anything_one_by_one(chosen: list[str]) -> None:
    sam = tiny_sam(sharpness=5)
    features = torch.randn(3, 32, CELLS, CELLS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    groups = [kinds()[name] for name in chosen]
    logits, quality = decode_groups(sam, features, groups)
    parts = [one_by_one(sam, features, *group) for group in groups]
    wanted, wanted_quality = (torch.cat(one) for one in zip(*parts, strict=True))
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(quality, wanted_quality, atol=1e-5, rtol=1e-4)
    exact = gradients(sam, features, wanted, wanted_quality)
    near_zero = 1e-6 * max(float(g.norm()) for g in exact)  # a bias of keys has none but by rounding
    for found, g in zip(gradients(sam, features, logits, quality), exact, strict=True):
        assert (found - g).norm() <= 2e-5 * g.norm() + near_zero


@pytest.mark.parametrize("tokens", [slice(0, 1), slice(1, None), slice(None)])
def test_the_tokens_asked_for_come_back(tokens: slice) -> None:
    sam, features = tiny_sam(), torch.randn(2, 32, CELLS, CELLS, generator=torch.Generator().manual_seed(0))
    prompts = Prompts(boxes=boxes(2, 2))
    every, quality = decode_groups(sam, features, [(None, prompts)])
    some, some_quality = decode_groups(sam, features, [(None, prompts)], tokens)
    torch.testing.assert_close(some, every[:, tokens], atol=1e-6, rtol=1e-5)
    assert torch.equal(some_quality, quality[:, tokens])


def test_embeddings_of_points_and_boxes_equal_the_prompt_encoders_to_the_bit() -> None:
    sam = tiny_sam()
    for _, prompts in kinds().values():
        points = None if prompts.points is None or prompts.labels is None else (prompts.points, prompts.labels)
        sparse, _ = sam.prompt_encoder(points=points, boxes=prompts.boxes, masks=prompts.masks)
        assert torch.equal(embed_points_and_boxes(sam.prompt_encoder, prompts), sparse)
    assert embed_points_and_boxes(sam.prompt_encoder, Prompts()).shape == (1, 0, 32)


def test_an_absent_token_takes_part_in_nothing() -> None:
    """Beside a longer prompt, a short one's answer is its own to rounding; beside none it is another's length."""
    sam, features = tiny_sam(sharpness=5), torch.randn(3, 32, CELLS, CELLS, generator=torch.Generator().manual_seed(0))
    short, longer = kinds()["box"], kinds()["points"]
    alone = decode_groups(sam, features, [short])[0]
    torch.testing.assert_close(decode_groups(sam, features, [short, longer])[0][:1], alone, atol=1e-5, rtol=1e-4)


def test_upscaling_equals_the_transposed_convolutions() -> None:
    layers, x = tiny_sam().mask_decoder.output_upscaling, random(2, 32, 3, 5, seed=0)
    wanted = layers(x)  # (2, 4, 12, 20)
    found = output_upscaling(layers, x.flatten(2).transpose(1, 2)).view(2, 3, 5, 2, 2, 2, 2, 4)
    found = found.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(2, 4, 12, 20)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)

"""Predict the memory of a training step from the model's shapes.

Four parts. What the method holds: weights, and for trained parameters gradients, two moments of AdamW and the teacher's
average. What autograd saves in the forward pass, which is most of it: `block_bytes`, `neck_bytes` and `decoder_bytes`
count the tensors that torch saves, layer by layer. What exists only during the step: the teacher's pass over the batch.
And the device's own: context, workspaces, fragmentation.

In the formulas N = H' W' tokens, D their width, h heads, C channels of the features, a bytes of a number in a matrix
product (2 under half precision), r = 4 bytes of one in the residual stream, norms and losses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lesionsam.models.attention import choose
from lesionsam.models.prefix import num_frozen_blocks
from lesionsam.models.sam import Sam, patch_size

R = 4
SMALL = 1.08  # factor for head, losses and prompts, which are not counted separately
MAPS = 12  # float maps of the model's input size that targets and losses hold per image
CUDA_BYTES = 700 << 20  # context, cuBLAS and cuDNN workspaces; from public reports, not measured here
CUDA_SLACK = 1.06  # of the allocator's blocks that are split; likewise


@dataclass(frozen=True)
class Step:
    """Bytes of a training step by purpose.

    Attributes:
        held: weights and what is kept per trained parameter. saved: for the backward pass. passing: at the peak beside
            these. overhead: of the device.
    """

    held: int
    saved: int
    passing: int
    overhead: int

    @property
    def total(self) -> int:
        """Return the peak."""
        return self.held + self.saved + self.passing + self.overhead


def predict_step(
    sam: Sam, *, held: int, batch_size: int, answers: int, precision: str, device: str, teacher: bool
) -> Step:
    """Predict the peak memory of a training step.

    Args:
        sam: the student, what trains selected; shapes alone are read. held: bytes, see `held_bytes`.
        batch_size: images in memory at once. answers: decoder passes with a gradient per image; 0 = none has one.
        precision: fp32, bf16 or fp16. device: cpu or cuda. teacher: whether a teacher encodes the batch too.
    """
    encoder: Any = sam.image_encoder
    a, split, num_blocks = 4 if precision == "fp32" else 2, num_frozen_blocks(sam), len(encoder.blocks)
    side = int(encoder.img_size)
    grid, channels = side // patch_size(sam), sam.prompt_encoder.embed_dim
    costs = [block_bytes(block, grid, a, device) for block in encoder.blocks]
    trained = costs[max(split, 0) :] if split <= num_blocks else []
    per_image = sum(trained)
    if split <= num_blocks:
        per_image += neck_bytes(grid, channels, a)
    casts = 2 * sum(p.numel() for p in sam.parameters() if p.requires_grad) if a == 2 else 0
    per_image += answers * decoder_bytes(grid, channels, a)
    passing = MAPS * side * side * R * batch_size
    if teacher and trained:
        passing += max(trained) * batch_size
    elif split > 0:
        passing += max(costs[: min(split, num_blocks)])  # the frozen part, an image at a time
    saved = round(SMALL * per_image) * batch_size + casts
    overhead = CUDA_BYTES + round((CUDA_SLACK - 1) * (held + saved + passing)) if device == "cuda" else 0
    return Step(held, saved, passing, overhead)


def held_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes that modules hold through a training.

    Shared storage counts once; trained parameters count four times, for gradient and AdamW's moments.
    """
    storages: dict[int, int] = {}
    trained = 0
    for module in modules:
        for value in [*module.parameters(), *module.buffers()]:
            storage = value.untyped_storage()
            if storage._cdata not in storages:
                storages[storage._cdata] = storage.nbytes()
                trained += 3 * value.nbytes * value.requires_grad
    return sum(storages.values()) + trained


def block_bytes(block: Any, grid: int, a: int, device: str) -> int:
    """Return the bytes that torch saves of one image in one block of the encoder.

    Args:
        grid: H' = W'. a: bytes of a number in a matrix product.
    """
    width, heads = block.attn.qkv.in_features, block.attn.num_heads
    hidden = block.mlp.lin1.out_features
    window = block.window_size or grid
    padded = -(-grid // window) * window
    count, real, keys = padded * padded, grid * grid, window * window
    dtype = torch.bfloat16 if a == 2 else torch.float32
    wide = width + heads * 2 * window  # channels of q or k beside which the position terms lie
    of_attention = {
        "folded": 4 * count * wide * a,
        "sdpa": count * keys * heads * a + 4 * count * width * a,
        "plain": count * keys * heads * a + 2 * count * wide * a + count * width * a,
    }[choose(device, dtype, needs_grad=True, num_tokens=keys)]
    # Inputs of the two norms and of the four linear layers, the MLP before its activation, q twice for the positions.
    return real * (2 * width * R + 3 * width * a + 2 * hidden * a) + 2 * count * width * a + of_attention


def neck_bytes(grid: int, channels: int, a: int) -> int:
    """Return the bytes that torch saves of one image in the neck: two convolutions, each with a norm written out."""
    return 8 * grid * grid * channels * a


def decoder_bytes(grid: int, channels: int, a: int) -> int:
    """Return the bytes that torch saves of one prompt in the decoder.

    Two layers of attention over the features, and the upscaling to four times the grid; fitted at C = 128 and 256,
    within 5 %.
    """
    return grid * grid * channels * (16 + 21 * a)

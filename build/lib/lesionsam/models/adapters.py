"""Bottleneck adapters in SAM's image encoder (Houlsby et al. 2019, arXiv:1902.00751).

Two in every chosen transformer block, as in the paper's figure 2: one on the attention's output and one on the MLP's,
each before the block adds its shortcut. a(x) = x + up(GELU(down(x))); `up` starts at zero, so that the adapted model
begins as the pretrained one. Unlike in the paper the layer norms stay frozen.

The blocks stay segment_anything's own: an adapter hangs on its part as the submodule `adapter` and acts through a
forward hook, so that every key of the pretrained weights keeps its name and the adapters add theirs
(`image_encoder.blocks.0.attn.adapter.down.weight`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import nn

from lesionsam.errors import UserError

PARTS = ("attn", "mlp")  # of a block: what carries an adapter
MARK = ".adapter."  # in the names of their parameters


class Bottleneck(nn.Module):
    """x + up(GELU(down(x))) over the last axis; the identity until it is trained.

    Args:
        width: channels of the tokens. dim: hidden units.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, dim), nn.Linear(dim, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width)."""
        return tokens + self.up(F.gelu(self.down(tokens)))


def _adapt(part: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
    """Forward hook of an attention or MLP that carries an adapter."""
    return part.get_submodule("adapter")(output)


def chosen_blocks(sam: Sam, last_k: int, key: str) -> list[nn.Module]:
    """The last K transformer blocks, 0 = all.

    Raises:
        UserError: K beyond the number of blocks; `key` is the parameter that it names.
    """
    blocks = list(sam.image_encoder.blocks)
    if not 0 <= last_k <= len(blocks):
        raise UserError(f"{key}: expected 0 to {len(blocks)} (the encoder's blocks), got {last_k}")
    return blocks[len(blocks) - last_k :] if last_k else blocks


def insert_adapters(sam: Sam, *, dim: int, last_k: int, seed: int) -> None:
    """Put adapters into the last K blocks, 0 = all, on the device of the weights.

    Args:
        dim: hidden units of each. seed: of `down`'s weights.
    Raises:
        UserError: fewer than one hidden unit, or more blocks than there are.
    """
    if dim < 1:
        raise UserError(f"model.adapter_dim: expected at least 1 hidden unit, got {dim}")
    position = sam.image_encoder.get_parameter("pos_embed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in chosen_blocks(sam, last_k, "model.adapter_last_k"):
            for name in PARTS:
                part = block.get_submodule(name)
                with torch.device("meta" if position.is_meta else "cpu"):
                    adapter = Bottleneck(position.shape[-1], dim)
                part.add_module("adapter", adapter if position.is_meta else adapter.to(position.device))
                part.register_forward_hook(_adapt)
    sam.train(sam.training)


def has_adapters(sam: nn.Module) -> bool:
    """Whether a model, or part of one, carries adapters."""
    return any(MARK in name for name, _ in sam.named_parameters())


def adapters_held(state: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
    """Hidden units, and first block with adapters, of a state dict; None where it holds none."""
    downs = {key: value for key, value in state.items() if key.endswith(f"{MARK}down.weight")}
    if not downs:
        return None
    first = min(int(key.split("blocks.")[1].split(".")[0]) for key in downs)
    return next(iter(downs.values())).shape[0], first

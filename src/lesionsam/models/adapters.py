"""Bottleneck adapters in SAM's image encoder (Houlsby et al. 2019, arXiv:1902.00751).

Two in every chosen transformer block, as in the paper's figure 2: one on the attention's output and one on the MLP's
(SAM 3: on the MLP's alone), each before the block adds its shortcut. a(x) = x + up(GELU(down(x))); `up` starts at zero,
so that the adapted model begins as the pretrained one. Unlike in the paper the layer norms stay frozen.

The blocks stay the library's own: an adapter hangs on its part as the submodule `adapter` and acts through a
forward hook, so that every key of the pretrained weights keeps its name and the adapters add theirs
(`image_encoder.blocks.0.attn.adapter.down.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from lesionsam.errors import UserError
from lesionsam.models.sam import Sam

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
        """Add the bottleneck's output to the tokens, (..., width) -> (..., width)."""
        return tokens + self.up(F.gelu(self.down(tokens)))


def _adapt(part: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
    """Apply the adapter to a part's output (forward hook)."""
    return part.get_submodule("adapter")(output)


def chosen_blocks(sam: Sam, last_k: int, key: str) -> list[nn.Module]:
    """Return the last K transformer blocks, 0 = all.

    Raises:
        UserError: K beyond the number of blocks; `key` is the parameter that it names.
    """
    blocks = list(sam.blocks)
    if not 0 <= last_k <= len(blocks):
        raise UserError(f"{key}: expected 0 to {len(blocks)} (the encoder's blocks), got {last_k}")
    return blocks[len(blocks) - last_k :] if last_k else blocks


def insert_adapters(sam: Sam, *, dim: int, last_k: int, seed: int) -> None:
    """Insert adapters into the last K blocks, 0 = all, on the device of the weights.

    Args:
        dim: hidden units of each. seed: of `down`'s weights.
    Raises:
        UserError: fewer than one hidden unit, or more blocks than there are.
    """
    if dim < 1:
        raise UserError(f"model.adapter_dim: expected at least 1 hidden unit, got {dim}")
    if not sam.adapted_parts:
        raise UserError(f"model.encoder: {sam.name} has no transformer blocks for adapters; choose blocks or none")
    on_meta = next(sam.parameters()).is_meta
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in chosen_blocks(sam, last_k, "model.adapter_last_k"):
            for name in sam.adapted_parts:
                part = block.get_submodule(name)
                with torch.device("meta" if on_meta else "cpu"):
                    adapter = Bottleneck(output_width(part), dim)
                part.add_module("adapter", adapter if on_meta else adapter.to(next(sam.parameters()).device))
                part.register_forward_hook(_adapt)
    sam.train(sam.training)


def output_width(part: nn.Module) -> int:
    """Return the channels that a block's part puts out: those of its last linear layer."""
    return [layer for layer in part.modules() if isinstance(layer, nn.Linear)][-1].out_features


def has_adapters(sam: nn.Module) -> bool:
    """Return whether a model, or part of one, has adapters."""
    return any(MARK in name for name, _ in sam.named_parameters())


def adapter_shape(state: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
    """Return the hidden units and the first block with adapters of a state dict; None without adapters."""
    downs = {key: value for key, value in state.items() if key.endswith(f"{MARK}down.weight")}
    if not downs:
        return None
    first = min(int(found[1]) for key in downs if (found := re.search(r"\.(?:blocks|layers)\.(\d+)\.", key)))
    return next(iter(downs.values())).shape[0], first

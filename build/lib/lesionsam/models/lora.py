"""Low-rank updates of the attention's qkv and proj (LoRA, Hu et al. 2021, arXiv:2106.09685), by peft; only here.

W x becomes W x + (alpha / rank) B A dropout(x) with A (rank, in) random and B (out, rank) zero, so that the model
begins as the pretrained one. peft wraps each layer: its weight is then called `qkv.base_layer.weight` and the factors
`qkv.lora_A.default.weight`, `qkv.lora_B.default.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from segment_anything.modeling import Sam
from torch import nn

from lesionsam.errors import UserError
from lesionsam.models.adapters import chosen_blocks

TARGETS = ("qkv", "proj")  # of a block's attention
MARK = ".lora_"  # in the names of the factors
ADAPTER_NAME = "default"  # peft's


def attach_lora(sam: Sam, *, rank: int, alpha: float, dropout: float, last_k: int, seed: int) -> None:
    """Put low-rank updates on qkv and proj of the last K blocks, 0 = all; everything else is left as it is.

    Args:
        rank: of the update. alpha: the update counts alpha / rank times. dropout: of the update's input, in training.
        seed: of the factors A.
    Raises:
        UserError: a rank below 1, or more blocks than there are.
    """
    if rank < 1:
        raise UserError(f"model.lora_rank: expected at least 1, got {rank}; model.encoder: none trains no encoder part")
    chosen = [id(block) for block in chosen_blocks(sam, last_k, "model.lora_last_k")]
    numbers = [k for k, block in enumerate(sam.image_encoder.blocks) if id(block) in chosen]
    from peft import LoraConfig, inject_adapter_in_model  # here, as it takes seconds to import

    targets = [f"image_encoder.blocks.{k}.attn.{name}" for k in numbers for name in TARGETS]
    trains = {name: p.requires_grad for name, p in sam.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # it divides, and takes any number
            lora_dropout=dropout,
            target_modules=targets,
            bias="none",
        )
        inject_adapter_in_model(config, sam, adapter_name=ADAPTER_NAME)
    for name, p in sam.named_parameters():  # peft freezes what it does not add
        p.requires_grad_(trains.get(name.replace(".base_layer.", "."), True))
    sam.train(sam.training)


def has_lora(sam: nn.Module) -> bool:
    """Whether a model, or part of one, carries low-rank updates."""
    return any(MARK in name for name, _ in sam.named_parameters())


def lora_layers(sam: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every layer that carries an update."""
    if has_lora(sam):
        from peft.tuners.lora import Linear

        yield from ((name, module) for name, module in sam.named_modules() if isinstance(module, Linear))


def update_of(layer: nn.Module) -> torch.Tensor:
    """(alpha / rank) B A of a layer, (out, in), as peft computes it."""
    return layer.get_delta_weight(ADAPTER_NAME)  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def merged_lora_state(sam: nn.Module) -> dict[str, torch.Tensor]:
    """State dict under the keys that the model had before `attach_lora`, updates added to the weights; a copy of those.

    A model without updates gives its state dict as it is.
    """
    state = {k.replace(".base_layer.", "."): v for k, v in sam.state_dict().items() if MARK not in k}
    for name, layer in lora_layers(sam):
        state[f"{name}.weight"] = state[f"{name}.weight"] + update_of(layer)
    return state


@torch.no_grad()
def merge_lora(sam: Sam) -> None:
    """Add the updates to the weights in place and take peft's layers out again."""
    for name, layer in list(lora_layers(sam)):
        linear = layer.get_submodule("base_layer")
        linear.weight.add_(update_of(layer))  # pyright: ignore[reportCallIssue]
        parent, _, child = name.rpartition(".")
        setattr(sam.get_submodule(parent), child, linear)
    if hasattr(sam, "peft_config"):
        del sam.peft_config

"""Low-rank updates of the attention's linear layers (LoRA, Hu et al. 2021, arXiv:2106.09685).

Only this module imports peft.

W x becomes W x + (alpha / rank) B A dropout(x) with A (rank, in) random and B (out, rank) zero, so that the model
starts as the pretrained one. peft wraps each layer: its weight is then called `qkv.base_layer.weight` and the factors
`qkv.lora_A.default.weight`, `qkv.lora_B.default.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lesionsam.errors import UserError
from lesionsam.models.adapters import chosen_blocks
from lesionsam.models.sam import Sam

MARK = ".lora_"  # in the names of the factors
ADAPTER_NAME = "default"  # peft's


def attach_lora(sam: Sam, *, rank: int, alpha: float, dropout: float, last_k: int, seed: int) -> None:
    """Attach low-rank updates to the attention of the last K blocks, 0 = all; nothing else changes.

    Args:
        rank: of the update. alpha: the update counts alpha / rank times. dropout: of the update's input, in training.
        seed: of the factors A.
    Raises:
        UserError: a rank below 1, or more blocks than there are.
    """
    if rank < 1:
        raise UserError(f"model.lora_rank: expected at least 1, got {rank}; model.encoder: none trains no encoder part")
    if not sam.lora_targets:
        raise UserError(f"model.encoder: {sam.name} has no attention for low-rank updates; choose blocks or none")
    chosen = [id(block) for block in chosen_blocks(sam, last_k, "model.lora_last_k")]
    from peft import LoraConfig, inject_adapter_in_model  # here, as it takes seconds to import

    blocks = [name for name, module in sam.named_modules() if id(module) in chosen]
    targets = [f"{block}.{name}" for block in blocks for name in sam.lora_targets]
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
    """Return whether a model, or part of one, has low-rank updates."""
    return any(MARK in name for name, _ in sam.named_parameters())


def lora_layers(sam: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every layer with an update."""
    if has_lora(sam):
        from peft.tuners.lora import Linear

        yield from ((name, module) for name, module in sam.named_modules() if isinstance(module, Linear))


def update_of(layer: nn.Module) -> torch.Tensor:
    """Return (alpha / rank) B A of a layer, (out, in), as peft computes it."""
    return layer.get_delta_weight(ADAPTER_NAME)  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def merged_lora_state(sam: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict with updates added to the weights, under the keys from before `attach_lora`.

    Updated weights are copies; a model without updates gives its state dict as it is. Adapters keep keys of their own.
    """
    state = {k.replace(".base_layer.", "."): v for k, v in sam.state_dict().items() if MARK not in k}
    for name, layer in lora_layers(sam):
        state[f"{name}.weight"] = state[f"{name}.weight"] + update_of(layer)
    return state


@torch.no_grad()
def merge_lora(sam: Sam) -> None:
    """Add the updates to the weights in place and remove peft's layers."""
    for name, layer in list(lora_layers(sam)):
        linear = layer.get_submodule("base_layer")
        linear.weight.add_(update_of(layer))  # pyright: ignore[reportCallIssue]
        parent, _, child = name.rpartition(".")
        setattr(sam.get_submodule(parent), child, linear)
    if hasattr(sam, "peft_config"):
        del sam.peft_config

"""Select which parameters of a SAM train."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lesionsam.errors import UserError
from lesionsam.models import adapters, lora
from lesionsam.models.sam import Sam, parameters_of

# In names of parameters: the encoder with its neck, of either library.
ENCODER = ("image_encoder.", "vision_encoder.", "mask_decoder.conv_s", "no_memory_embedding")


def select_trainable(
    sam: Sam, *, encoder: str, unfreeze_last_k: int = 0, train_decoder: bool, train_prompt_encoder: bool | None = None
) -> None:
    """Set `requires_grad` of every parameter.

    Args:
        encoder: `none`; `blocks` for blocks and the neck; `adapter` or `lora` for what
            `models.finetuned.attach` put in.
        unfreeze_last_k: with blocks: the last K blocks and the neck; 0 = the whole encoder.
        train_decoder: the mask decoder trains. train_prompt_encoder: the prompt encoder; None = as the decoder.
    Raises:
        UserError: K beyond the number of blocks, or nothing left to train.
    """
    blocks = sam.blocks
    if unfreeze_last_k > len(blocks):
        raise UserError(
            f"model.unfreeze_last_k: expected 0 to {len(blocks)} (the encoder's blocks), got {unfreeze_last_k}"
        )
    sam.requires_grad_(False)
    if encoder == "blocks":
        parts: Iterable[nn.Module] = blocks[len(blocks) - unfreeze_last_k :] if unfreeze_last_k else [sam.encoder]
        for part in parts:
            part.requires_grad_(True)
    mark = {"adapter": adapters.MARK, "lora": lora.MARK}.get(encoder)
    for name, p in sam.named_parameters():
        if mark is not None and mark in name:
            p.requires_grad_(True)
    sam.mask_decoder.requires_grad_(train_decoder)
    for p in parameters_of(sam.neck()):
        p.requires_grad_(encoder == "blocks")
    sam.prompt_encoder.requires_grad_(train_decoder if train_prompt_encoder is None else train_prompt_encoder)
    if not any(p.requires_grad for p in sam.parameters()):
        raise UserError(
            f"model.encoder: `{encoder}` with model.train_decoder: false leaves nothing to train; change one of them"
        )


def trained_counts(module: nn.Module) -> dict[str, int]:
    """Return the number of trained parameters by part: encoder, adapters, lora, decoder, prompt_encoder, head, other.

    Parts without trained parameters are left out.
    """
    marks = {
        adapters.MARK: "adapters",
        lora.MARK: "lora",
        **dict.fromkeys(ENCODER, "encoder"),
        "mask_decoder.": "decoder",
        "prompt_encoder.": "prompt_encoder",
        "head.": "head",
    }
    counts: dict[str, int] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            part = next((part for mark, part in marks.items() if mark in name), "other")
            counts[part] = counts.get(part, 0) + p.numel()
    return counts


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]

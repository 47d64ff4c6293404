"""Which parameters of a SAM train, and the encoder split at the first of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from segment_anything.modeling import Sam
from torch import nn

from lesionsam.errors import UserError
from lesionsam.models import adapters, lora
from lesionsam.models.attention import run_blocks
from lesionsam.models.sam import embed, encode, preprocess
from lesionsam.types import Batch


def select_trainable(
    sam: Sam, *, encoder: str, unfreeze_last_k: int = 0, train_decoder: bool, train_prompt_encoder: bool | None = None
) -> None:
    """Set `requires_grad` of every parameter.

    Args:
        encoder: `none`; `blocks` for transformer blocks and the neck; `adapter` or `lora` for what
            `models.adapted.attach` put in.
        unfreeze_last_k: with blocks: the last K blocks and the neck; 0 = the whole encoder.
        train_decoder: the mask decoder trains. train_prompt_encoder: the prompt encoder; None = as the decoder.
    Raises:
        UserError: K beyond the number of blocks, or nothing left to train.
    """
    blocks = sam.image_encoder.blocks
    if unfreeze_last_k > len(blocks):
        raise UserError(
            f"model.unfreeze_last_k: expected 0 to {len(blocks)} (the encoder's blocks), got {unfreeze_last_k}"
        )
    sam.requires_grad_(False)
    if encoder == "blocks":
        parts: Iterable[nn.Module] = [sam.image_encoder]
        if unfreeze_last_k:
            parts = [*blocks[len(blocks) - unfreeze_last_k :], sam.image_encoder.neck]
        for part in parts:
            part.requires_grad_(True)
    mark = {"adapter": adapters.MARK, "lora": lora.MARK}.get(encoder)
    for name, p in sam.named_parameters():
        if mark is not None and mark in name:
            p.requires_grad_(True)
    sam.mask_decoder.requires_grad_(train_decoder)
    sam.prompt_encoder.requires_grad_(train_decoder if train_prompt_encoder is None else train_prompt_encoder)
    if not any(p.requires_grad for p in sam.parameters()):
        raise UserError(
            f"model.encoder: `{encoder}` with model.train_decoder: false leaves nothing to train; change one of them"
        )


def trained_counts(module: nn.Module) -> dict[str, int]:
    """Number of trained parameters by part: encoder, adapters, lora, decoder, prompt_encoder, head, other; no zeros."""
    marks = {
        "adapters": adapters.MARK,
        "lora": lora.MARK,
        "encoder": "image_encoder.",
        "decoder": "mask_decoder.",
        "prompt_encoder": "prompt_encoder.",
        "head": "head.",
    }
    counts: dict[str, int] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            part = next((part for part, mark in marks.items() if mark in name), "other")
            counts[part] = counts.get(part, 0) + p.numel()
    return counts


def num_frozen_blocks(sam: Sam) -> int:
    """Number of leading blocks that, with the patch embedding, train nothing; -1 if the embedding trains.

    The neck counts as one block more: blocks + 1 where nothing of the encoder trains.
    """
    encoder = sam.image_encoder
    if any(p.requires_grad for p in encoder.patch_embed.parameters()) or (
        encoder.pos_embed is not None and encoder.pos_embed.requires_grad
    ):
        return -1
    stages = [*encoder.blocks, encoder.neck]
    training = (k for k, stage in enumerate(stages) if any(p.requires_grad for p in stage.parameters()))
    return next(training, len(stages))


def encode_prefix(sam: Sam, images: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The encoder's leading part.

    Args:
        images: (B, 3, S, S) preprocessed. num_blocks: as `num_frozen_blocks` counts them, the neck as the last.
    Returns:
        (B, H', W', width) tokens after patch embedding and `num_blocks` blocks; features (B, C, H', W') with the neck.
    """
    encoder = sam.image_encoder
    tokens = run_blocks(encoder, embed(sam, images), 0, num_blocks)
    return encoder.neck(tokens.permute(0, 3, 1, 2)) if num_blocks > len(encoder.blocks) else tokens


def encode_suffix(sam: Sam, tokens: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """What `encode_prefix` left of the encoder: tokens after `num_blocks` blocks -> features (B, C, H', W').

    Tokens in half precision are continued in the precision of the weights, as the encoder's residual stream is.
    """
    encoder = sam.image_encoder
    tokens = tokens.to(torch.promote_types(tokens.dtype, encoder.get_parameter("patch_embed.proj.weight").dtype))
    tokens = run_blocks(encoder, tokens, num_blocks)
    return tokens if num_blocks > len(encoder.blocks) else encoder.neck(tokens.permute(0, 3, 1, 2))


@torch.no_grad()
def encode_frozen(
    sam: Sam, images: torch.Tensor, num_blocks: int, reference: Sam | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The frozen prefix of a batch, and the pretrained model's features from the same pass.

    Image by image, so that what comes out for an image depends on that image alone, to the last bit: a kernel may add
    up in another order for a batch of another size. So a value may be kept and used again beside any other images.
    Under bfloat16 autocast both are rounded to bfloat16 (the features after they were computed from exact tokens).

    Args:
        images: (B, 3, S, S) preprocessed. num_blocks: from 0, see `num_frozen_blocks`.
        reference: the pretrained SAM, whose leading `num_blocks` blocks equal the student's; None: no features wanted.
    Returns:
        what `encode_prefix` gives, contiguous; features (B, C, H', W') of `reference`, contiguous, or None.
    """
    tokens, features = [], []
    for image in images.contiguous().split(1):  # one layout: kernels, and so last bits, may differ by it
        exact = encode_prefix(sam, image, num_blocks)
        tokens.append(as_kept(exact))
        if reference is not None:
            features.append(as_kept(encode_suffix(reference, exact, num_blocks)))
    return torch.cat(tokens), torch.cat(features) if features else None


def as_kept(values: torch.Tensor) -> torch.Tensor:
    """Values in the layout and precision in which they are used and kept: contiguous, bfloat16 under its autocast."""
    device = values.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        values = values.to(torch.bfloat16)
    return values.contiguous()


def frozen_part(
    sam: Sam, batch: Batch, num_blocks: int, reference: Sam | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`encode_frozen` of a batch, or what the batch already carries of it."""
    if batch.prefix is not None and (batch.reference is not None or reference is None):
        return batch.prefix, batch.reference
    return encode_frozen(sam, preprocess(batch.images, batch.sizes), num_blocks, reference)


def encode_batch(sam: Sam, batch: Batch) -> torch.Tensor:
    """(B, C, H', W') features of a batch, its frozen part as `frozen_part` has it."""
    split = num_frozen_blocks(sam)
    if split < 0:
        return encode(sam, preprocess(batch.images, batch.sizes))
    return encode_suffix(sam, frozen_part(sam, batch, split)[0], split)


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]


def copy_trained(module: nn.Module) -> nn.Module:
    """A copy that shares storage with the original where it is frozen; its own where it trains."""
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, dict(shared))


class Teacher:
    """Exponential moving average of a module (arXiv:1703.01780) with its buffers (arXiv:2101.08482).

    Starts equal to the student, in eval mode, without gradient; frozen parameters are the student's own storage.

    Args:
        student: module whose trained parameters are followed.
        decay: d of t <- d t + (1 - d) s, per update. Half-life: ln 2 / -ln d updates.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.module, self.decay = copy_trained(student), decay
        own, theirs = dict(self.module.named_parameters()), dict(student.named_parameters())
        names = [name for name, p in theirs.items() if p.requires_grad]
        self._averages: list[torch.Tensor] = [own[n] for n in names]
        self._sources: list[torch.Tensor] = [theirs[n] for n in names]
        buffers = dict(self.module.named_buffers())
        self._buffers = [(buffers[n], b) for n, b in student.named_buffers()]
        for p in self._averages:
            p.requires_grad_(False)
        self.module.eval()

    @torch.no_grad()
    def update(self) -> None:
        """One averaging step, after the student's optimiser step."""
        torch._foreach_lerp_(self._averages, [p.detach() for p in self._sources], 1 - self.decay)
        for average, source in self._buffers:
            if average.is_floating_point():
                average.lerp_(source, 1 - self.decay)
            else:
                average.copy_(source)

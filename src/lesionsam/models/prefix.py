"""Split the encoder into its frozen leading part and the rest."""

from __future__ import annotations

import torch

from lesionsam.models.sam import Sam, encode, encode_tokens, parameters_of
from lesionsam.types import Batch


def num_frozen_blocks(sam: Sam) -> int:
    """Return the number of frozen leading blocks (with the stem); -1 if the stem trains.

    The neck counts as one block more: blocks + 1 where nothing of the encoder trains.
    """
    if any(p.requires_grad for p in parameters_of(sam.stem())):
        return -1
    stages = [*(block.parameters() for block in sam.blocks), parameters_of(sam.neck())]
    return next((k for k, stage in enumerate(stages) if any(p.requires_grad for p in stage)), len(stages))


def encode_prefix(sam: Sam, images: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Run the encoder's leading part.

    Args:
        images: (B, 3, S, S) normalised. num_blocks: as `num_frozen_blocks` counts them, the neck as the last.
    Returns:
        tokens (B, ...) after the stem and `num_blocks` blocks; features (B, C, H', W') with the neck.
    """
    tokens = sam.run_blocks(sam.run_stem(images), 0, num_blocks)
    return sam.run_neck(tokens) if num_blocks > len(sam.blocks) else tokens


def encode_suffix(sam: Sam, tokens: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Run the rest of the encoder: tokens after `num_blocks` blocks -> features (B, C, H', W').

    Tokens in half precision are continued in the precision of the weights, as the encoder's residual stream is.
    """
    tokens = tokens.to(torch.promote_types(tokens.dtype, next(sam.encoder.parameters()).dtype))
    return tokens if num_blocks > len(sam.blocks) else encode_tokens(sam, tokens, num_blocks)


@torch.no_grad()
def encode_frozen(
    sam: Sam, images: torch.Tensor, num_blocks: int, reference: Sam | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the frozen prefix of a batch, and the pretrained model's features from the same pass.

    It runs image by image, so that an image's output depends on that image alone, to the last bit: a kernel may sum in
    another order for another batch size. So a value may be cached and reused beside any other images. Under bfloat16
    autocast both are rounded to bfloat16 (the features after they were computed from exact tokens).

    Args:
        images: (B, 3, S, S) normalised. num_blocks: from 0, see `num_frozen_blocks`.
        reference: the pretrained SAM, whose leading `num_blocks` blocks equal the student's; None: no features wanted.
    Returns:
        what `encode_prefix` gives, contiguous; features (B, C, H', W') of `reference`, contiguous, or None.
    """
    tokens, features = [], []
    for image in images.contiguous().split(1):  # one layout: kernels, and so last bits, may differ by it
        exact = encode_prefix(sam, image, num_blocks)
        tokens.append(to_cache_form(exact))
        if reference is not None:
            features.append(to_cache_form(encode_suffix(reference, exact, num_blocks)))
    return torch.cat(tokens), torch.cat(features) if features else None


def to_cache_form(values: torch.Tensor) -> torch.Tensor:
    """Return values in the layout and precision of the cache: contiguous, bfloat16 under bfloat16 autocast."""
    device = values.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        values = values.to(torch.bfloat16)
    return values.contiguous()


def frozen_part(
    sam: Sam, batch: Batch, num_blocks: int, reference: Sam | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return `encode_frozen` of a batch; what the batch carries from a cache is not computed."""
    tokens, features = batch.prefix, None if reference is None else batch.reference
    if tokens is None or (features is None and reference is not None):
        lacking = reference if features is None else None
        tokens, computed = encode_frozen(sam, sam.normalize(batch.images, batch.sizes), num_blocks, lacking)
        features = computed if features is None else features
    return tokens, features


def encode_batch(sam: Sam, batch: Batch) -> torch.Tensor:
    """Return the features (B, C, H', W') of a batch; its frozen part comes from `frozen_part`."""
    split = num_frozen_blocks(sam)
    if split < 0:
        return encode(sam, sam.normalize(batch.images, batch.sizes))
    return encode_suffix(sam, frozen_part(sam, batch, split)[0], split)

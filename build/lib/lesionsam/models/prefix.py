"""The frozen leading part of the encoder and what follows it."""

from __future__ import annotations

import torch
from segment_anything.modeling import Sam

from lesionsam.models.attention import run_blocks
from lesionsam.models.sam import embed, encode
from lesionsam.models.transforms import preprocess
from lesionsam.types import Batch


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

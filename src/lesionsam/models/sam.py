"""Build, encode and decode SAM in batches, with segment_anything's own modules.

Nothing of segment_anything is changed: `models.attention` and `models.decoder` run its modules' weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from segment_anything import modeling, sam_model_registry

from lesionsam.errors import UserError
from lesionsam.models.attention import run_blocks
from lesionsam.models.compact import CompactArchitecture, build_compact
from lesionsam.models.decoder import decode_groups
from lesionsam.types import Prompts, to_device

Sam: TypeAlias = modeling.Sam  # segment_anything's own class, for the modules that may not import it
WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # of the encoder's tokens
POSITION = "image_encoder.pos_embed"
SHOWN_KEYS = 3  # of those that a message could name


def build_sam(name: str, *, image_size: int = 0, architecture: CompactArchitecture | None = None) -> Sam:
    """Build a SAM with random weights, in eval mode.

    Args:
        name: compact, vit_b, vit_l or vit_h. image_size: side S of the input, pixels; 0 = the model's own.
        architecture: of the compact one.
    """
    sam = build_compact(architecture or CompactArchitecture()) if name == "compact" else sam_model_registry[name]()
    return at_size(sam, image_size).eval()


def at_size(sam: Sam, image_size: int) -> Sam:
    """Set the side of the model's input: position embeddings are interpolated.

    Relative positions keep their size, that of the grid they were trained on: SAM's blocks interpolate those of global
    attention as they run, and windows do not change.

    Args:
        image_size: S, pixels; 0 leaves the model as it is.
    Raises:
        UserError: a side that the patch does not divide.
    """
    encoder = sam.image_encoder
    if image_size in (0, encoder.img_size):
        return sam
    patch = patch_size(sam)
    if image_size < patch or image_size % patch:
        raise UserError(f"model.image_size: expected a multiple of the patch, {patch}, got {image_size}")
    grid = image_size // patch
    position = encoder.get_parameter("pos_embed")
    # Antialiased also where it grows: torch's other bicubic kernel turns a ramp into stairs.
    resized = F.interpolate(
        position.detach().permute(0, 3, 1, 2), size=(grid, grid), mode="bicubic", align_corners=False, antialias=True
    )
    encoder.pos_embed = torch.nn.Parameter(resized.permute(0, 2, 3, 1).contiguous(), position.requires_grad)
    encoder.img_size = image_size
    prompt_encoder = sam.prompt_encoder
    prompt_encoder.image_embedding_size, prompt_encoder.input_image_size = (grid, grid), (image_size, image_size)
    prompt_encoder.mask_input_size = (4 * grid, 4 * grid)
    return sam


def patch_size(sam: Sam) -> int:
    """Return the side of a patch, pixels."""
    return sam.image_encoder.get_parameter("patch_embed.proj.weight").shape[-1]


def encode(sam: Sam, images: torch.Tensor) -> torch.Tensor:
    """Encode preprocessed images, (B, 3, S, S) -> (B, C, H', W')."""
    encoder = sam.image_encoder
    return encoder.neck(run_blocks(encoder, embed(sam, images), 0).permute(0, 3, 1, 2))


def embed(sam: Sam, images: torch.Tensor) -> torch.Tensor:
    """Return the tokens before the first block, (B, 3, S, S) preprocessed -> (B, H', W', width), positions added."""
    tokens, position = sam.image_encoder.patch_embed(images), sam.image_encoder.pos_embed
    return tokens if position is None else tokens + position


def decode(
    sam: Sam, features: torch.Tensor, prompts: Prompts, multimask: bool = False, *, rows: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode prompts, each on its image of a batch.

    Args:
        features: (B, C, H', W'). prompts: R prompt sets of one kind. multimask: three candidates instead of one mask.
        rows: R images of the batch, the one that each prompt set is about; what depends on an image alone is computed
            once for all of its prompts. None: R = B, each image has one.
    Returns:
        low_res_masks (R, 1 or 3, 4H', 4W') logits and iou_predictions (R, 1 or 3).
    """
    images = None if rows is None else to_device(torch.tensor(rows, dtype=torch.int64), features.device)
    return decode_groups(sam, features, [(images, prompts)], slice(1, None) if multimask else slice(0, 1))

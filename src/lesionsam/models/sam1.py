"""SAM on segment_anything's own modules: ViT-B, ViT-L, ViT-H, MedSAM, SlimSAM and the compact SAM.

Nothing of segment_anything is changed: `models.attention` and `models.decoder` run its modules' weights. Kirillov et
al. 2023, arXiv:2304.02643.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything import modeling, sam_model_registry
from torch import Tensor, nn

from lesionsam.models import standalone
from lesionsam.models.attention import run_blocks
from lesionsam.models.compact import MAX_STATED, CompactArchitecture
from lesionsam.models.decoder import decode_groups
from lesionsam.models.sam import PromptGroups, Sam
from lesionsam.types import Frame

WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # of the encoder's tokens
POSITION = "image_encoder.pos_embed"


class Sam1(modeling.Sam, Sam):
    """segment_anything's Sam behind the interface; the keys of its state dict are segment_anything's."""

    image_encoder: Any
    prompt_encoder: Any
    mask_decoder: Any
    lora_targets = ("attn.qkv", "attn.proj")

    @classmethod
    def of(cls, sam: modeling.Sam, name: str) -> Sam1:
        """Wrap a Sam of segment_anything; the modules are shared."""
        own = cls(sam.image_encoder, sam.prompt_encoder, sam.mask_decoder)
        own.pixel_mean, own.pixel_std, own.name = sam.pixel_mean, sam.pixel_std, name
        return own.eval()

    @property
    def frame(self) -> Frame:
        """Return the frame: longest side S, padded."""
        return Frame(int(self.image_encoder.img_size))

    @property
    def grid(self) -> int:
        """Return H' = W'."""
        return int(self.prompt_encoder.image_embedding_size[0])

    @property
    def embed_dim(self) -> int:
        """Return the channels of the features."""
        return int(self.prompt_encoder.embed_dim)

    @property
    def encoder(self) -> nn.Module:
        """Return the image encoder."""
        return self.image_encoder

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Return the transformer blocks."""
        return self.image_encoder.blocks

    @property
    def patch_size(self) -> int:
        """Return the side of a patch, pixels."""
        return self.image_encoder.get_parameter("patch_embed.proj.weight").shape[-1]

    @property
    def multiple(self) -> int:
        """Return what the side must be a multiple of: the patch."""
        return self.patch_size

    def stem(self) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """Yield patch embedding and position embedding."""
        yield "patch_embed", self.image_encoder.patch_embed
        if self.image_encoder.pos_embed is not None:
            yield "pos_embed", self.image_encoder.pos_embed

    def neck(self) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """Yield the neck."""
        yield "neck", self.image_encoder.neck

    def architecture(self) -> dict:
        """Return the numbers of `standalone.build`, for the side of the input that the relative positions belong to."""
        tables = [block.attn.rel_pos_h for block in self.image_encoder.blocks if block.window_size == 0]
        side = (len(tables[0]) + 1) // 2 * self.patch_size if tables else self.side
        return standalone.numbers_of(self) | {"image_size": side}

    def resize_input(self, side: int) -> None:
        """Interpolate the position embedding.

        Relative positions keep their size, that of the grid they were trained on: SAM's blocks interpolate those of
        global attention as they run, and windows do not change.
        """
        encoder, grid = self.image_encoder, side // self.patch_size
        position = encoder.get_parameter("pos_embed")
        # Antialiased also where it grows: torch's other bicubic kernel turns a ramp into stairs.
        resized = F.interpolate(
            position.detach().permute(0, 3, 1, 2),
            size=(grid, grid),
            mode="bicubic",
            align_corners=False,
            antialias=True,
        )
        encoder.pos_embed = nn.Parameter(resized.permute(0, 2, 3, 1).contiguous(), position.requires_grad)
        encoder.img_size = side
        prompts = self.prompt_encoder
        prompts.image_embedding_size, prompts.input_image_size = (grid, grid), (side, side)
        prompts.mask_input_size = (4 * grid, 4 * grid)

    def run_stem(self, pixels: Tensor) -> Tensor:
        """Return patch embeddings with positions, (B, 3, S, S) -> (B, H', W', width)."""
        tokens, position = self.image_encoder.patch_embed(pixels), self.image_encoder.pos_embed
        return tokens if position is None else tokens + position

    def run_blocks(self, tokens: Tensor, start: int, stop: int | None = None) -> Tensor:
        """Run (B, H', W', width) tokens through blocks `start` to `stop`."""
        return run_blocks(self.image_encoder, tokens, start, stop)

    def run_neck(self, tokens: Tensor) -> Tensor:
        """Run the neck, (B, H', W', width) -> (B, C, H', W')."""
        return self.image_encoder.neck(tokens.permute(0, 3, 1, 2))

    def decode_groups(
        self, features: Tensor, groups: PromptGroups, chosen: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Decode groups of prompts in one pass; see `models.decoder`."""
        return decode_groups(self, features, groups, chosen)


def build_registered(name: str) -> Sam1:
    """Build vit_b, vit_l or vit_h with random weights."""
    return Sam1.of(sam_model_registry[name](), name)


def registered(sam: Sam1, name: str) -> bool:
    """Return whether segment_anything's registry builds this architecture under a name, at any side of the input."""
    with torch.device("meta"):
        wanted = standalone.numbers_of(sam_model_registry[name]())
    return sam.architecture() | {"image_size": 0} == wanted | {"image_size": 0}


def build_numbers(numbers: Mapping[str, Any], name: str = "compact") -> Sam1:
    """Build the architecture of `standalone.numbers_of` with random weights (torch's global generator).

    Raises:
        ValueError: keys that are missing or unknown, or a number that no model has.
    """
    if wrong := set(numbers) ^ set(CompactArchitecture().numbers()):
        raise ValueError(f"missing or unknown: {', '.join(sorted(wrong))}")
    for key, value in numbers.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, int) and 0 <= one <= MAX_STATED for one in values):
            raise ValueError(f"{key}: expected whole numbers from 0 to {MAX_STATED}, got {str(value)[:40]}")
    sam = Sam1.of(standalone.build(dict(numbers)), name)
    position = sam.image_encoder.get_parameter("pos_embed")
    if not position.is_meta:  # segment_anything starts it at 0, for checkpoints to fill
        torch.nn.init.trunc_normal_(position, std=0.02)
    return sam

"""State the architecture of the compact SAM.

It replaces SAM where published weights cannot be fetched, in tests, and for a first try within a minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lesionsam.errors import UserError

MAX_STATED = 16_384  # of any number in a file's metadata: beyond it a model would not be built, but the memory filled


@dataclass(frozen=True)
class CompactArchitecture:
    """Architecture of a compact SAM.

    Attributes:
        image_size: side S of the square input, pixels; a multiple of patch_size.
        patch_size: side of a patch, pixels; the feature grid has S / patch_size cells a side.
        width: channels of the image encoder's tokens; a multiple of num_heads.
        depth: transformer blocks of the image encoder, all with global attention.
        num_heads: attention heads of each block.
        prompt_width: channels C of the features, of the prompt encoder and of the mask decoder; a multiple of 16
            (four decoder heads, and upscaling to C / 8 channels).
        decoder_mlp: hidden units in the decoder's two-way transformer.
    """

    image_size: int = 128
    patch_size: int = 8
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    prompt_width: int = 64
    decoder_mlp: int = 256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"compact architecture: {name} must be a whole number above 0, got {value!r}")
        for name, divisor in (("image_size", self.patch_size), ("width", self.num_heads), ("prompt_width", 16)):
            if getattr(self, name) % divisor:
                raise UserError(
                    f"compact architecture: {name} must be a multiple of {divisor}, got {getattr(self, name)}"
                )

    @property
    def grid(self) -> int:
        """Return the side H' = W' of the feature grid, cells."""
        return self.image_size // self.patch_size

    @classmethod
    def from_mapping(cls, numbers: Mapping[str, int], source: str) -> CompactArchitecture:
        """Return the architecture that a weights file states; `source` names the file in errors."""
        expected = set(cls.__dataclass_fields__)
        if set(numbers) != expected:
            raise UserError(
                f"{source}: compact architecture needs exactly the keys {sorted(expected)}, got {sorted(numbers)}"
            )
        if giants := [name for name, value in numbers.items() if isinstance(value, int) and value > MAX_STATED]:
            raise UserError(
                f"{source}: compact architecture: {giants[0]} must be at most {MAX_STATED}, got {numbers[giants[0]]}"
            )
        try:
            return cls(**numbers)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def numbers(self) -> dict:
        """Return the numbers of `standalone.build`."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "width": self.width,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_dim": 4 * self.width,
            "window_size": 0,
            "global_attn_indexes": list(range(self.depth)),
            "prompt_width": self.prompt_width,
            "mask_in_chans": 16,
            "decoder_depth": 2,
            "decoder_num_heads": 4,
            "decoder_mlp": self.decoder_mlp,
            "num_multimask_outputs": 3,
            "iou_head_depth": 3,
            "iou_head_hidden_dim": 64,
        }

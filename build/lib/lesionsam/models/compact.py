"""The compact SAM: segment_anything's own modules, unmodified, with small numbers.

The stand-in for SAM where published weights cannot be fetched, where tests run and where a first try takes a minute.
Kirillov et al. 2023, arXiv:2304.02643, built as in segment_anything.build_sam.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from lesionsam.errors import UserError

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
MAX_STATED = 16_384  # of any number in a file's metadata: beyond it a model would not be built, but the memory filled


@dataclass(frozen=True)
class CompactArchitecture:
    """The numbers of a compact SAM.

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
        """Side H' = W' of the feature grid, cells."""
        return self.image_size // self.patch_size

    @classmethod
    def from_mapping(cls, numbers: Mapping[str, int], source: str) -> CompactArchitecture:
        """The architecture that a weights file states; `source` names the file in the error."""
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


def build_compact(architecture: CompactArchitecture) -> Sam:
    """A segment_anything Sam of these numbers with random weights (torch's global generator), in eval mode."""
    a = architecture
    encoder = ImageEncoderViT(
        img_size=a.image_size,
        patch_size=a.patch_size,
        embed_dim=a.width,
        depth=a.depth,
        num_heads=a.num_heads,
        mlp_ratio=4,
        out_chans=a.prompt_width,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=0,
        global_attn_indexes=tuple(range(a.depth)),
    )
    prompt_encoder = PromptEncoder(
        embed_dim=a.prompt_width,
        image_embedding_size=(a.grid, a.grid),
        input_image_size=(a.image_size, a.image_size),
        mask_in_chans=16,
    )
    decoder = MaskDecoder(
        num_multimask_outputs=3,
        transformer_dim=a.prompt_width,
        iou_head_depth=3,
        iou_head_hidden_dim=64,
        transformer=TwoWayTransformer(depth=2, embedding_dim=a.prompt_width, mlp_dim=a.decoder_mlp, num_heads=4),
    )
    sam = Sam(encoder, prompt_encoder, decoder, pixel_mean=list(PIXEL_MEAN), pixel_std=list(PIXEL_STD))
    # segment_anything starts the position embedding at 0, for checkpoints to fill.
    nn.init.trunc_normal_(encoder.get_parameter("pos_embed"), std=0.02)
    return sam.eval()

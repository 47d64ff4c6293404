"""List the models that params.yaml knows by a short name, with the numbers that its checks need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A pretrained model.

    Attributes:
        repo: of the Hugging Face Hub; empty = SAM's own checkpoints, or a file of the user's.
        blocks: of the image encoder. multiple: the side of the input is a multiple of this, pixels.
        side: its own side, pixels; 0 = stated by its file. attention: whether adapters and LoRA find attention in it.
    """

    repo: str = ""
    blocks: int = 12
    multiple: int = 16
    side: int = 1024
    attention: bool = True


ZOO = {
    "compact": Known(blocks=64, multiple=1, side=0),
    "vit_b": Known(blocks=12),
    "vit_l": Known(blocks=24),
    "vit_h": Known(blocks=32),
    "medsam": Known("wanglab/medsam-vit-base"),
    "slimsam-50": Known("nielsr/slimsam-50-uniform"),
    "slimsam-77": Known("nielsr/slimsam-77-uniform"),
    "sam2.1-tiny": Known("facebook/sam2.1-hiera-tiny", multiple=32),
    "sam2.1-small": Known("facebook/sam2.1-hiera-small", blocks=16, multiple=32),
    "sam2.1-base-plus": Known("facebook/sam2.1-hiera-base-plus", blocks=24, multiple=32),
    "sam2.1-large": Known("facebook/sam2.1-hiera-large", blocks=48, multiple=32),
    "edgetam": Known("yonigozlan/EdgeTAM-hf", blocks=1, multiple=32, attention=False),
    "sam3": Known("facebook/sam3", blocks=32, multiple=14, side=1008),
}
OTHER = Known(blocks=64, multiple=1, side=0)  # of the Hub or a folder: known once it is fetched


def known(name: object) -> Known:
    """Return what is known of a model.name."""
    return ZOO.get(str(name), OTHER)

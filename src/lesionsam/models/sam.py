"""Define the common interface of all SAM implementations: encode images, decode prompts, list parts that may train.

Implementations: `models.sam1` on segment_anything's modules (SAM, MedSAM, SlimSAM, the compact SAM) and `models.sam2`
on transformers' (SAM 2.1, EdgeTAM, SAM 3). Nothing outside this package asks which one it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lesionsam.errors import UserError
from lesionsam.models.transforms import image_region
from lesionsam.types import Frame, Prompts, to_device

PromptGroups = Sequence[tuple[Tensor | None, Prompts]]


class Sam(nn.Module, ABC):
    """A SAM: image encoder, prompt encoder and mask decoder.

    The encoder is a stem, a list of blocks and a neck. Its features are one tensor (B, C, H', W') whose first
    `embed_dim` channels are the image embedding; finer feature maps that a decoder takes follow, each folded to the
    embedding's resolution by pixel_unshuffle.

    Attributes:
        name: the model.name in params.yaml that selects this model.
        pixel_mean, pixel_std: (3,) or (3, 1, 1), of RGB in 0..255.
        mask_threshold: logit above which a pixel is foreground.
        lora_targets: names of the linear layers of a block's attention. adapted_parts: names of the parts of a block
            whose outputs carry an adapter. Both are empty if the encoder has no transformer blocks.
        checkpointing: blocks keep no activations for the backward pass, which runs them again.
    """

    name: str
    pixel_mean: Tensor
    pixel_std: Tensor
    mask_threshold: float = 0.0
    prompt_encoder: Any
    mask_decoder: Any
    lora_targets: tuple[str, ...]
    adapted_parts: tuple[str, ...] = ("attn", "mlp")
    checkpointing: bool = False

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def frame(self) -> Frame:
        """Return the frame that the model takes images in."""

    @property
    @abstractmethod
    def grid(self) -> int:
        """Return H' = W', the side of the image embedding in cells; low-resolution masks have 4 H' a side."""

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Return the channels of the image embedding."""

    @property
    @abstractmethod
    def encoder(self) -> nn.Module:
        """Return the image encoder."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Return the encoder's blocks in their order."""

    @abstractmethod
    def stem(self) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """Yield name and module or parameter of the layers before the first block."""

    @abstractmethod
    def neck(self) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """Yield name and module or parameter of the layers that turn the last tokens into features."""

    @abstractmethod
    def resize_input(self, side: int) -> None:
        """Set the side of the input; `at_size` checks it first."""

    @property
    @abstractmethod
    def multiple(self) -> int:
        """Return the number of pixels that every possible side of the input is a multiple of."""

    @abstractmethod
    def architecture(self) -> dict:
        """Return JSON values from which `checkpoint.build_architecture` makes the same model with random weights."""

    @property
    def side(self) -> int:
        """Return S, the side of the input, pixels."""
        return self.frame.side

    # ---- what it computes --------------------------------------------------------------------------------------------

    def normalize(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Return pixels as the encoder takes them.

        Args:
            images: (B, 3, S, S) uint8 RGB. sizes: (B, 2) height and width of the image part.
        Returns:
            (B, 3, S, S) float32: (x - mean) / std inside the image part, 0 on the padding.
        """
        mean, std = (value.to(images.device).view(1, 3, 1, 1) for value in (self.pixel_mean, self.pixel_std))
        return (images.float() - mean) / std * image_region(sizes, images.shape[-1])[:, None]

    @abstractmethod
    def run_stem(self, pixels: Tensor) -> Tensor:
        """Return the tokens before the first block, (B, 3, S, S) normalised -> (B, ...)."""

    @abstractmethod
    def run_blocks(self, tokens: Tensor, start: int, stop: int | None = None) -> Tensor:
        """Run tokens through blocks `start` to `stop` (exclusive; None = all)."""

    @abstractmethod
    def run_neck(self, tokens: Tensor) -> Tensor:
        """Run the neck: tokens after the last block -> features (B, C, H', W')."""

    @abstractmethod
    def decode_groups(
        self, features: Tensor, groups: PromptGroups, chosen: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Decode groups of prompts, each group of one kind.

        Args:
            features: (B, C, H', W'). groups: pairs (image_index, prompts), prompts in the model frame. image_index:
                (G,) int64, the image that each of the G prompt sets belongs to; may repeat. None, with a single group
                only: prompt set i belongs to image i.
            chosen: which of the mask tokens; token 0 is the single mask, the others are the candidates of an ambiguous
                prompt.
        Returns:
            low-resolution logits (R, K, 4H', 4W') and predicted IoUs (R, K) of the K chosen tokens, R the sum of all
            G, group by group.
        """

    def image_embedding(self, features: Tensor) -> Tensor:
        """Return the image embedding (B, embed_dim, H', W') of features."""
        return features[:, : self.embed_dim]


def at_size(sam: Sam, image_size: int) -> Sam:
    """Set the side of the model's input.

    Args:
        image_size: S, pixels; 0 leaves the model as it is.
    Raises:
        UserError: a side that the patch does not divide.
    """
    if image_size not in (0, sam.side):
        if image_size < sam.multiple or image_size % sam.multiple:
            raise UserError(f"model.image_size: expected a multiple of {sam.multiple} ({sam.name}), got {image_size}")
        sam.resize_input(image_size)
    return sam


def encode(sam: Sam, pixels: Tensor) -> Tensor:
    """Encode normalised images, (B, 3, S, S) -> features (B, C, H', W')."""
    return encode_tokens(sam, sam.run_stem(pixels), 0)


def encode_tokens(sam: Sam, tokens: Tensor, start: int) -> Tensor:
    """Run blocks from `start` on and the neck: tokens -> features (B, C, H', W')."""
    if not (sam.checkpointing and torch.is_grad_enabled()):
        return sam.run_neck(sam.run_blocks(tokens, start))
    for block in range(start, len(sam.blocks)):  # one at a time: its input is all that is kept
        tokens = checkpoint(sam.run_blocks, tokens, block, block + 1, use_reentrant=False)
    return sam.run_neck(tokens)


def decode(
    sam: Sam, features: Tensor, prompts: Prompts, multimask: bool = False, *, rows: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Decode prompts, each on its image of a batch.

    Args:
        features: (B, C, H', W'). prompts: R prompt sets of one kind. multimask: three candidates instead of one mask.
        rows: R images of the batch, the one that each prompt set is about; what depends on an image alone is computed
            once for all of its prompts. None: R = B, each image has one.
    Returns:
        low_res_masks (R, 1 or 3, 4H', 4W') logits and iou_predictions (R, 1 or 3).
    """
    images = None if rows is None else to_device(torch.tensor(rows, dtype=torch.int64), features.device)
    return sam.decode_groups(features, [(images, prompts)], slice(1, None) if multimask else slice(0, 1))


def parameters_of(parts: Iterator[tuple[str, nn.Module | nn.Parameter]]) -> Iterator[nn.Parameter]:
    """Yield the parameters of the stem or neck."""
    for _, part in parts:
        yield from (part.parameters() if isinstance(part, nn.Module) else [part])


def sam_of(module: nn.Module) -> Sam:
    """Return the SAM of a method's model, which holds it as the submodule `sam`."""
    sam = module.get_submodule("sam")
    if not isinstance(sam, Sam):
        raise TypeError(f"sam: expected a Sam, got {type(sam).__name__}")
    return sam

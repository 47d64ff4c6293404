"""SAM as this project uses it: segment_anything's own modules, loaded, fed and decoded in batches.

Nothing of segment_anything is changed: `models.attention` and `models.decoder` run its modules' weights.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from segment_anything import modeling, sam_model_registry

from lesionsam.boxes.geometry import model_frame_size
from lesionsam.errors import UserError
from lesionsam.models import adapters
from lesionsam.models.adapted import apply_tuned, base_wanted, own_state
from lesionsam.models.attention import run_blocks
from lesionsam.models.compact import PIXEL_MEAN, PIXEL_STD, CompactArchitecture, build_compact
from lesionsam.models.decoder import decode_groups
from lesionsam.types import Prompts, sent
from lesionsam.utils.files import whole_number, write_bytes_atomic

__all__ = [
    "Sam",
    "build_sam",
    "decode",
    "embed",
    "encode",
    "load_sam",
    "model_frames",
    "preprocess",
    "resize_longest",
    "save_sam",
    "upscale",
]

Sam: TypeAlias = modeling.Sam  # segment_anything's own class, for the modules that may not import it
WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # of the encoder's tokens
POSITION = "image_encoder.pos_embed"
SHOWN_KEYS = 3  # of those that a message could name


def build_sam(name: str, *, image_size: int = 0, architecture: CompactArchitecture | None = None) -> Sam:
    """A SAM with random weights, in eval mode.

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
    """Side of a patch, pixels."""
    return sam.image_encoder.get_parameter("patch_embed.proj.weight").shape[-1]


def load_sam(name: str | None, checkpoint: Path, *, image_size: int = 0, base: Path | None = None) -> Sam:
    """A SAM with the weights of a file, on the CPU, in float32, in eval mode.

    Args:
        name: compact, vit_b, vit_l or vit_h; None = whichever the file holds.
        checkpoint: SAM's .pth (or a file with the same keys, such as MedSAM's), a .safetensors of `save_sam` (with
            adapters, where it holds some), or the small file of `models.adapted.save_tuned`.
        image_size: side S of the input, pixels; 0 = that of the file.
        base: the pretrained weights that a small file belongs to; no other file needs it.
    Raises:
        UserError: no such file, an HTML page, a damaged file, weights of another model or values that are not finite.
    """
    state, metadata = read_weights(checkpoint)
    if (wanted := base_wanted(metadata)) is not None:
        if base is None:
            raise UserError(
                f"{checkpoint}: holds only what was trained, and needs the weights it was trained on: "
                f"{wanted}; name them as base, or use best.safetensors beside it, which is whole"
            )
        size = whole_number(metadata.get("image_size", ""))
        sam = load_sam(name or metadata.get("name"), base, image_size=size or 0)
        apply_tuned(sam, checkpoint, state, metadata, base)
        return at_size(sam, image_size).eval()
    held = model_held(checkpoint, state, metadata)
    if name not in (None, held):
        raise UserError(
            f"{checkpoint}: holds weights of {held}, but {name} was asked for; change model.name or model.checkpoint"
        )
    architecture = stated_architecture(checkpoint, metadata) if held == "compact" else None
    with torch.device("meta"):  # no time for random weights: every tensor comes from the file
        sam = build_compact(architecture) if architecture is not None else sam_model_registry[held]()
        sam = at_size(sam, state[POSITION].shape[1] * patch_size(sam))
        if (bottleneck := adapters.adapters_held(state)) is not None:
            dim, first = bottleneck
            depth = len(sam.image_encoder.blocks)
            adapters.insert_adapters(sam, dim=dim, last_k=max(depth - first, 0), seed=0)
    expected = sam.state_dict()
    faults = [
        f"{len(keys)} {what} ({', '.join(keys[:SHOWN_KEYS])}{', ...' if len(keys) > SHOWN_KEYS else ''})"
        for what, keys in (
            ("missing", [k for k in expected if k not in state]),
            ("unknown", [k for k in state if k not in expected]),
            ("of another shape", [k for k in expected if k in state and state[k].shape != expected[k].shape]),
        )
        if keys
    ]
    if faults:
        raise UserError(f"{checkpoint}: does not fit {held}: keys {', '.join(faults)}")
    for key, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{checkpoint}: {key} holds values that are not finite; the training that wrote it failed")
    # A copy: the model must not lie on a file that something may write over.
    sam.load_state_dict({k: v.to(expected[k].dtype, copy=True) for k, v in state.items()}, assign=True)
    return at_size(sam, image_size).eval()


def model_held(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Which model these weights are: as the file says, or by the width of the encoder's tokens."""
    if POSITION not in state or state[POSITION].ndim != 4:
        keys = ", ".join(list(state)[:SHOWN_KEYS])
        raise UserError(
            f"{path}: holds no SAM: expected the key {POSITION} among others, found {len(state)} keys "
            f"({keys}{', ...' if len(state) > SHOWN_KEYS else ''})"
        )
    stated = metadata.get("name")
    return stated if stated in (*WIDTHS.values(), "compact") else WIDTHS.get(state[POSITION].shape[-1], "compact")


def stated_architecture(path: Path, metadata: dict[str, str]) -> CompactArchitecture:
    """The numbers of a compact SAM, from its file's metadata."""
    try:
        numbers = json.loads(metadata.get("architecture", ""))
    except json.JSONDecodeError:
        numbers = None
    if not isinstance(numbers, dict):
        raise UserError(
            f"{path}: weights of no published SAM, and no compact architecture stated; expected a file "
            "that `make foundation` or a training wrote"
        )
    return CompactArchitecture.from_mapping(numbers, str(path))


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a weights file, on the CPU, and its metadata (empty for .pth)."""
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip()
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file; run `dvc repro weights`, or name another") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected a weights file") from None
    if re.match(rb"\s*<[!?a-zA-Z]", head):  # a safetensors file too may begin with "<": its header's length
        raise UserError(f"{path}: an HTML page, not weights; fetch the file again and check its address")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise UserError(
            f"{path}: not a plain file of weights: damaged, or it would run code when loaded; fetch it again"
        ) from None
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        OverflowError,
        MemoryError,
        struct.error,
        OSError,
    ) as error:  # what readers make of damage
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path}: cannot be read as weights, damaged or cut short ({reason}); fetch it again") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}; expected tensors by name, as SAM's .pth files do")
    if other := [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]:
        raise UserError(
            f"{path}: expected tensors alone, as in SAM's .pth files; {', '.join(other[:SHOWN_KEYS])} "
            "holds something else; save the model's state_dict by itself"
        )
    return loaded, {}


def weights_metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says of itself, its tensors unread; empty for any other file."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def save_sam(sam: Sam, path: Path, *, name: str, metadata: dict[str, str] | None = None) -> None:
    """Write plain segment_anything keys as safetensors, atomically; adapters, where there are any, under keys of
    their own beside them, low-rank updates merged.

    Args:
        name: compact, vit_b, vit_l or vit_h. metadata: further entries; the compact one's architecture is added.
    """
    encoder, decoder = sam.image_encoder, sam.mask_decoder
    notes = {"name": name, "image_size": str(encoder.img_size)} | (metadata or {})
    if name == "compact":
        attention = encoder.blocks[0].attn
        trained_grid = (attention.rel_pos_h.shape[0] + 1) // 2  # whatever side `at_size` has set since
        numbers = {
            "image_size": trained_grid * patch_size(sam),
            "patch_size": patch_size(sam),
            "width": encoder.get_parameter("pos_embed").shape[-1],
            "depth": len(encoder.blocks),
            "num_heads": attention.num_heads,
            "prompt_width": decoder.transformer_dim,
            "decoder_mlp": decoder.transformer.layers[0].mlp.lin1.out_features,
        }
        notes["architecture"] = json.dumps(numbers)
    state = {key: value.detach().cpu().contiguous() for key, value in own_state(sam).items()}
    write_bytes_atomic(path, save(state, notes))


def preprocess(images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """SAM's normalisation and padding.

    Args:
        images: (B, 3, S, S) uint8 RGB. sizes: (B, 2) height and width of the image part.
    Returns:
        (B, 3, S, S) float32: (x - mean) / std inside the image part, 0 on the padding.
    """
    mean, std = (sent(torch.tensor(v), images.device).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    position = torch.arange(images.shape[-1], device=images.device)
    inside = (position < sizes[:, 0:1])[:, :, None] & (position < sizes[:, 1:2])[:, None]
    return (images.float() - mean) / std * inside[:, None]


def encode(sam: Sam, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) preprocessed -> features (B, C, H', W'); its blocks as `attention.Execution` has them."""
    encoder = sam.image_encoder
    return encoder.neck(run_blocks(encoder, embed(sam, images), 0).permute(0, 3, 1, 2))


def embed(sam: Sam, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) preprocessed -> (B, H', W', width) tokens with their positions, before the first block."""
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
    images = None if rows is None else sent(torch.tensor(rows, dtype=torch.int64), features.device)
    return decode_groups(sam, features, [(images, prompts)], slice(1, None) if multimask else slice(0, 1))


def resize_longest(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3) uint8, longest side `side`; equals ResizeLongestSide.apply_image.

    Raises:
        UserError: an image so long and thin that nothing of its shorter side would be left.
    """
    height, width = model_frame_size(image.shape[1], image.shape[0], side)
    if min(height, width) < 1:
        raise UserError(
            f"an image of {image.shape[1]}x{image.shape[0]} px is too thin for a model input of {side} px; "
            "crop it to the lesion's surroundings"
        )
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def model_frames(images: Sequence[np.ndarray], side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of any sizes in the model frame, one batch.

    Args:
        images: B of (H, W, 3) uint8 RGB, original frame. side: S.
    Returns:
        (B, 3, S, S) uint8, padded with 0 right and bottom, and (B, 2) int64 height and width of the image part: what
        `preprocess` takes.
    """
    frames = torch.zeros(len(images), 3, side, side, dtype=torch.uint8)
    sizes = torch.zeros(len(images), 2, dtype=torch.int64)
    for k, image in enumerate(images):
        small = resize_longest(image, side)
        height, width = small.shape[:2]
        frames[k, :, :height, :width] = torch.tensor(small).permute(2, 0, 1)
        sizes[k] = torch.tensor([height, width])
    return frames, sizes


def upscale(low_res: torch.Tensor, size: tuple[int, int], original: tuple[int, int], side: int) -> torch.Tensor:
    """([B, C,] T, T) logits -> ([B, C,] H, W) at the original size; equals Sam.postprocess_masks.

    Args:
        size: (h, w) of the image part of the model frame. original: (H, W). side: S.
    """
    masks = low_res.float()[(None,) * (4 - low_res.ndim)]
    masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    masks = F.interpolate(masks, original, mode="bilinear", align_corners=False)
    return masks.reshape(*low_res.shape[:-2], *original)

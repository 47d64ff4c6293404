"""SAM as this project uses it: segment_anything's own modules, loaded, fed and decoded in batches.

Nothing of segment_anything is changed; `decode` runs its decoder's parts so that every image of a batch keeps a prompt
of its own (MaskDecoder.forward repeats the features by the number of prompts instead).
"""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError  # noqa: S403  (the name of torch.load's refusal; nothing is unpickled here)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from segment_anything import sam_model_registry
from segment_anything.modeling import PromptEncoder, Sam

from lesionsam.boxes import model_frame_size
from lesionsam.errors import UserError
from lesionsam.files import write_bytes_atomic
from lesionsam.models.compact import PIXEL_MEAN, PIXEL_STD, CompactArchitecture, build_compact, decode_candidates
from lesionsam.types import Prompts

__all__ = ["PUBLISHED", "Sam", "build_sam", "decode", "encode", "load_sam", "preprocess", "read_metadata", "resize_longest",
           "save_sam", "upscale"]

PUBLISHED = ("vit_b", "vit_l", "vit_h")
WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # of the encoder's tokens


def build_sam(name: str, *, image_size: int = 0, architecture: CompactArchitecture | None = None) -> Sam:
    """A SAM with random weights.

    Args:
        name: compact, vit_b, vit_l or vit_h. image_size: side S of the input, pixels; 0 = the model's own.
        architecture: of the compact one.
    """
    sam = build_compact(architecture or CompactArchitecture()) if name == "compact" else sam_model_registry[name]()
    return at_size(sam, image_size).eval()


def at_size(sam: Sam, image_size: int) -> Sam:
    """Set the side of the model's input: position embeddings are interpolated (relative ones by SAM itself).

    Raises:
        UserError: a side that the patch does not divide.
    """
    encoder = sam.image_encoder
    if image_size in (0, encoder.img_size):
        return sam
    patch = encoder.patch_embed.proj.kernel_size[0]
    if image_size % patch:
        raise UserError(f"model.image_size: expected a multiple of the patch, {patch}, got {image_size}")
    grid = image_size // patch
    position = encoder.pos_embed.detach().permute(0, 3, 1, 2)
    resized = F.interpolate(position, size=(grid, grid), mode="bicubic", align_corners=False, antialias=grid < position.shape[-1])
    encoder.pos_embed = torch.nn.Parameter(resized.permute(0, 2, 3, 1).contiguous())
    encoder.img_size = image_size
    old: PromptEncoder = sam.prompt_encoder
    old.image_embedding_size, old.input_image_size = (grid, grid), (image_size, image_size)
    old.mask_input_size = (4 * grid, 4 * grid)
    return sam


def load_sam(name: str, checkpoint: Path, *, image_size: int = 0) -> Sam:
    """A SAM with the weights of a file, in eval mode.

    Args:
        checkpoint: SAM's .pth (or a file with the same keys, such as MedSAM's), or .safetensors.
    Raises:
        UserError: no such file, an HTML page, a damaged file, or weights of another model.
    """
    state, metadata = read_weights(checkpoint)
    held = WIDTHS.get(state["image_encoder.pos_embed"].shape[-1], "compact") if "image_encoder.pos_embed" in state else None
    if held is None:
        raise UserError(f"{checkpoint}: holds no SAM: the key image_encoder.pos_embed is missing among its {len(state)} keys")
    if held != name:
        raise UserError(f"{checkpoint}: holds weights of {held}, but model.name is {name}; change one of them")
    if name == "compact":
        numbers = json.loads(metadata.get("architecture", "null"))
        if numbers is None:
            raise UserError(f"{checkpoint}: compact weights without a stated architecture; use a file that `make foundation` "
                            "or a training wrote")
        sam = build_compact(CompactArchitecture.from_mapping(numbers, str(checkpoint)))
    else:
        sam = sam_model_registry[name]()
    own = state["image_encoder.pos_embed"].shape[1] * sam.image_encoder.patch_embed.proj.kernel_size[0]
    sam = at_size(sam, own)
    expected = sam.state_dict()
    wrong = [k for k in expected if k not in state] + [k for k in state if k not in expected]
    wrong += [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if wrong:
        raise UserError(f"{checkpoint}: does not fit {name}: {len(wrong)} keys differ, first {wrong[0]}")
    sam.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return at_size(sam, image_size).eval()


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a weights file, on the CPU, and its metadata (empty for .pth)."""
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip()
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file; run `dvc repro weights`, or set model.checkpoint") from None
    if head[:1] == b"<":
        raise UserError(f"{path}: an HTML page, not weights; fetch the file again and check its address")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{path}: cannot be read as weights ({str(error).splitlines()[0][:120]}); fetch it again") from None
    except UnpicklingError:
        raise UserError(f"{path}: not a plain file of weights (it would run code when loaded, or is damaged)") from None
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise UserError(f"{path}: expected a dictionary of tensors, as SAM's .pth files are")
    return loaded, {}


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a weights file."""
    return read_weights(path)[1]


def save_sam(sam: Sam, path: Path, *, name: str, metadata: dict[str, str] | None = None) -> None:
    """Write plain segment_anything keys as safetensors, atomically.

    Args:
        name: compact, vit_b, vit_l or vit_h. metadata: further entries; the compact one's architecture is added.
    """
    notes = {"name": name, "image_size": str(sam.image_encoder.img_size)} | (metadata or {})
    if name == "compact":
        e, d = sam.image_encoder, sam.mask_decoder
        numbers = {"image_size": e.img_size, "patch_size": e.patch_embed.proj.kernel_size[0], "width": e.pos_embed.shape[-1],
                   "depth": len(e.blocks), "num_heads": e.blocks[0].attn.num_heads, "prompt_width": d.transformer_dim,
                   "decoder_mlp": d.transformer.layers[0].mlp.lin1.out_features}
        notes["architecture"] = json.dumps(numbers)
    state = {key: value.detach().cpu().contiguous() for key, value in sam.state_dict().items()}
    write_bytes_atomic(path, save(state, notes))


def preprocess(images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """SAM's normalisation and padding.

    Args:
        images: (B, 3, S, S) uint8 RGB. sizes: (B, 2) height and width of the image part.
    Returns:
        (B, 3, S, S) float32: (x - mean) / std inside the image part, 0 on the padding.
    """
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    position = torch.arange(images.shape[-1], device=images.device)
    inside = (position < sizes[:, 0:1])[:, :, None] & (position < sizes[:, 1:2])[:, None]
    return (images.float() - mean) / std * inside[:, None]


def encode(sam: Sam, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) preprocessed -> features (B, C, H', W')."""
    return sam.image_encoder(images)


def decode(sam: Sam, features: torch.Tensor, prompts: Prompts, multimask: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode each image of a batch under its own prompt.

    Args:
        features: (B, C, H', W'). prompts: B prompt sets of one kind. multimask: three candidates instead of one mask.
    Returns:
        low_res_masks (B, 1 or 3, 4H', 4W') logits and iou_predictions (B, 1 or 3).
    """
    return decode_candidates(sam, features, prompts, slice(1, None) if multimask else slice(0, 1))


def resize_longest(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3) uint8, longest side `side`; equals ResizeLongestSide.apply_image."""
    height, width = model_frame_size(image.shape[1], image.shape[0], side)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def upscale(low_res: torch.Tensor, size: tuple[int, int], original: tuple[int, int], side: int) -> torch.Tensor:
    """(..., T, T) logits -> (..., H, W) at the original size; equals Sam.postprocess_masks.

    Args:
        size: (h, w) of the image part of the model frame. original: (H, W). side: S.
    """
    flat = low_res.reshape(-1, 1, *low_res.shape[-2:]).float()
    frame = F.interpolate(flat, (side, side), mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    full = F.interpolate(frame, original, mode="bilinear", align_corners=False)
    return full.reshape(*low_res.shape[:-2], *original)

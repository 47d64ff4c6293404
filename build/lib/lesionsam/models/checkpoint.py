"""Read, load and save SAM checkpoints."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from segment_anything import sam_model_registry

from lesionsam.errors import UserError
from lesionsam.models import adapters
from lesionsam.models.compact import CompactArchitecture, build_compact
from lesionsam.models.finetuned import apply_tuned, base_wanted, own_state
from lesionsam.models.sam import POSITION, SHOWN_KEYS, WIDTHS, Sam, at_size, patch_size
from lesionsam.utils.files import whole_number, write_bytes_atomic


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

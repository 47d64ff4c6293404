"""Read, load and save SAM checkpoints."""

from __future__ import annotations

import functools
import json
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from segment_anything import sam_model_registry

from lesionsam.errors import UserError
from lesionsam.models import adapters
from lesionsam.models.compact import CompactArchitecture, build_compact
from lesionsam.models.finetuned import TUNED, apply_tuned, required_base, safetensors_bytes
from lesionsam.models.lora import merged_lora_state
from lesionsam.models.sam import POSITION, SHOWN_KEYS, WIDTHS, Sam, at_size, patch_size
from lesionsam.utils.files import whole_number, write_bytes_atomic

WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training tools store the weights
PREFIXES = {"module", "sam_model", "model", "sam"}  # put before SAM's keys by DataParallel, Lightning and others
COMPILED = "_orig_mod."  # by torch.compile
ARCHITECTURE = "architecture.json"  # written beside the weights by `lesionsam export`


def load_sam(name: str | None, checkpoint: Path, *, image_size: int = 0, base: Path | None = None) -> Sam:
    """Load a SAM with the weights of a file, on the CPU, in float32, in eval mode.

    Args:
        name: compact, vit_b, vit_l or vit_h; None = whichever the file holds.
        checkpoint: SAM's .pth (or a file with the same keys, such as MedSAM's), a .safetensors of `save_sam` (with
            adapters, where it holds some), or the small file of `models.finetuned.save_tuned`.
        image_size: side S of the input, pixels; 0 = that of the file.
        base: the pretrained weights that a small file belongs to; no other file needs it.
    Raises:
        UserError: no such file, an HTML page, a damaged file, weights of another model or values that are not finite.
    """
    state, metadata = read_weights(checkpoint)
    if (wanted := required_base(metadata)) is not None:
        if base is None:
            raise UserError(
                f"{checkpoint}: holds only the trained parameters and needs the weights it was trained on: "
                f"{wanted}; pass them as base, or use best.safetensors beside it, which is complete"
            )
        size = whole_number(metadata.get("image_size", ""))
        sam = load_sam(name or metadata.get("name"), base, image_size=size or 0)
        apply_tuned(sam, checkpoint, state, metadata, base, read_weights(base)[0])
        return at_size(sam, image_size).eval()
    held = detect_model(checkpoint, state, metadata)
    if name not in (None, held):
        raise UserError(
            f"{checkpoint}: holds weights of {held}, expected {name}; change model.name or model.checkpoint"
        )
    architecture = read_architecture(checkpoint, metadata) if held == "compact" else None
    with torch.device("meta"):  # no time for random weights: every tensor comes from the file
        sam = build_compact(architecture) if architecture is not None else sam_model_registry[held]()
        sam = at_size(sam, state[POSITION].shape[1] * patch_size(sam))
        if (bottleneck := adapters.adapter_shape(state)) is not None:
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


def detect_model(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Return the model that weights belong to: the file's own statement, or by the width of the encoder's tokens."""
    if POSITION not in state or state[POSITION].ndim != 4:
        keys = ", ".join(list(state)[:SHOWN_KEYS])
        raise UserError(
            f"{path}: holds no SAM: expected the key {POSITION} among others, found {len(state)} keys "
            f"({keys}{', ...' if len(state) > SHOWN_KEYS else ''})"
        )
    stated = metadata.get("name")
    return stated if stated in (*WIDTHS.values(), "compact") else WIDTHS.get(state[POSITION].shape[-1], "compact")


def read_architecture(path: Path, metadata: dict[str, str]) -> CompactArchitecture:
    """Return the architecture of a compact SAM from its file's metadata."""
    try:
        numbers = json.loads(metadata.get("architecture", ""))
    except json.JSONDecodeError:
        numbers = None
    exported = path.with_name(ARCHITECTURE)
    if numbers is None and exported.is_file():
        try:
            stated = json.loads(exported.read_text(encoding="utf-8"))
            numbers = {name: stated[name] for name in CompactArchitecture.__dataclass_fields__}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{exported}: not an export's architecture ({error}); export the model again") from None
    if not isinstance(numbers, dict):
        raise UserError(
            f"{path}: holds a SAM of another size than ViT-B, ViT-L and ViT-H, and does not state its architecture; "
            f"keep {ARCHITECTURE} of the export beside it, or use the .safetensors file of the training or export"
        )
    return CompactArchitecture.from_mapping(numbers, str(path))


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a weights file: its tensors on the CPU, and its metadata (empty for .pth)."""
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
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = dict(file.metadata() or {})
            return (state if TUNED in metadata else unwrap(path, state)), metadata
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if pickled := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: holds a Python object ({pickled[1]}) beside the weights, and loading it could run code; save "
                "the weights alone, where you trust the file: torch.save(model.state_dict(), PATH)"
            ) from None
        raise UserError(f"{path}: cannot be read as weights: no checkpoint, or cut short; copy it again") from None
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
    loaded = unwrap(path, loaded)
    if other := [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]:
        raise UserError(
            f"{path}: expected tensors alone, as in SAM's .pth files; {', '.join(other[:SHOWN_KEYS])} "
            "holds something else; save the model's state_dict by itself"
        )
    return loaded, {}


def unwrap(path: Path, loaded: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the tensors of a checkpoint that a training tool has wrapped, without the tool's key prefixes.

    Unwrapped are dictionaries under `WRAPPERS` and the prefixes of `PREFIXES` before SAM's keys; torch.compile's
    `_orig_mod.` also inside a key. A note on stderr says what was done.
    """
    state, notes = dict(loaded), []
    while name := next((name for name in WRAPPERS if isinstance(state.get(name), Mapping)), None):
        others = [str(key) for key in state if key != name]
        notes.append(f"took the weights under {name!r}" + (f", ignored {', '.join(others[:4])}" if others else ""))
        state = dict(state[name])
    if any(isinstance(key, str) and COMPILED in key for key in state):
        state = {key.replace(COMPILED, "") if isinstance(key, str) else key: value for key, value in state.items()}
        notes.append(f"removed {COMPILED!r} from keys")
    found = next((key for key in state if isinstance(key, str) and key.endswith(f".{POSITION}")), "")
    prefix = found.removesuffix(POSITION)
    if prefix and set(prefix.rstrip(".").split(".")) <= PREFIXES:
        state = {key.removeprefix(prefix) if isinstance(key, str) else key: value for key, value in state.items()}
        notes.append(f"removed the prefix {prefix!r} from keys")
    if notes and POSITION in state:  # otherwise the error that follows says all
        _note(f"{path}: {'; '.join(notes)}")
    return state


@functools.cache  # a command may read a file several times
def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def weights_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a .safetensors file without reading its tensors; empty for any other file."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def save_sam(sam: Sam, path: Path, *, name: str, metadata: dict[str, str] | None = None) -> None:
    """Write segment_anything's keys as safetensors, atomically, low-rank updates merged; adapters keep keys of their
    own.

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
    state = {key: value.detach().cpu().contiguous() for key, value in merged_lora_state(sam).items()}
    write_bytes_atomic(path, safetensors_bytes(state, notes))

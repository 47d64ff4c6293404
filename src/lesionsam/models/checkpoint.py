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

from lesionsam.errors import UserError
from lesionsam.models import adapters, standalone
from lesionsam.models.compact import CompactArchitecture
from lesionsam.models.finetuned import SHOWN_KEYS, TUNED, apply_tuned, required_base, safetensors_bytes
from lesionsam.models.hub import read_hub_folder
from lesionsam.models.lora import merged_lora_state
from lesionsam.models.sam import Sam, at_size
from lesionsam.models.sam1 import POSITION, WIDTHS, Sam1, build_numbers, build_registered, registered
from lesionsam.models.sam2 import Sam2, build_sam2_model, no_random_weights
from lesionsam.utils.files import whole_number, write_bytes_atomic
from lesionsam.utils.hub import CONFIG, notes_of

WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training tools store the weights
PREFIXES = {"module", "sam_model", "model", "sam"}  # put before SAM's keys by DataParallel, Lightning and others
ORIGIN = ("source", "revision", "licence")  # metadata of weights from the Hub, passed on to what is trained from them
COMPILED = "_orig_mod."  # by torch.compile


def build_sam(name: str, *, image_size: int = 0, architecture: CompactArchitecture | None = None) -> Sam:
    """Build a SAM of segment_anything with random weights, in eval mode.

    Args:
        name: compact, vit_b, vit_l or vit_h. image_size: side S of the input, pixels; 0 = the model's own.
        architecture: of the compact one.
    """
    if name == "compact":
        return at_size(build_numbers((architecture or CompactArchitecture()).numbers()), image_size)
    return at_size(build_registered(name), image_size)


def build_architecture(numbers: Mapping[str, Any], name: str, source: str) -> Sam:
    """Build the model of `Sam.architecture` with random weights.

    Raises:
        UserError: numbers of no model; `source` names the file.
    """
    try:
        if "transformers" in numbers:
            return Sam2(build_sam2_model(numbers["transformers"]), name)
        if set(numbers) == set(CompactArchitecture.__dataclass_fields__):
            return build_numbers(CompactArchitecture.from_mapping(numbers, source).numbers(), name)
        return build_numbers(numbers, name)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"{source}: the architecture that it states cannot be built ({reason}); fetch it again"
        ) from None


def load_sam(name: str | None, checkpoint: Path, *, image_size: int = 0, base: Path | None = None) -> Sam:
    """Load a SAM with the weights of a file, on the CPU, in float32, in eval mode.

    Args:
        name: model.name of params.yaml; None = whichever the file holds.
        checkpoint: SAM's .pth (or a file with the same keys, such as MedSAM's), a .safetensors of `save_sam` (with
            adapters, where it holds some), the small file of `models.finetuned.save_tuned`, or a folder in the form of
            the Hugging Face Hub (config.json, model.safetensors).
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
    sam = _skeleton(checkpoint, state, metadata)
    if name not in (None, sam.name):
        raise UserError(
            f"{checkpoint}: holds weights of {sam.name}, expected {name}; change model.name or model.checkpoint"
        )
    if (bottleneck := adapters.adapter_shape(state)) is not None:
        dim, first = bottleneck
        adapters.insert_adapters(sam, dim=dim, last_k=max(len(sam.blocks) - first, 0), seed=0)
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
        raise UserError(f"{checkpoint}: does not fit {sam.name}: keys {', '.join(faults)}")
    for key, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{checkpoint}: {key} holds values that are not finite; the training that wrote it failed")
    # A copy: the model must not lie on a file that something may write over.
    sam.load_state_dict({k: v.to(expected[k].dtype, copy=True) for k, v in state.items()}, assign=True)
    return at_size(sam, image_size).eval()


def _skeleton(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Sam:
    """Build the model that weights belong to, at their side of the input: as the file states, or by its shapes."""
    numbers, stated = read_architecture(path, metadata), metadata.get("name", "")
    if numbers is not None and "transformers" in numbers:
        with no_random_weights():
            sam = build_architecture(numbers, stated, str(path))
        return at_size(sam, whole_number(metadata.get("image_size", "")) or 0)
    if POSITION not in state or state[POSITION].ndim != 4:
        keys = ", ".join(list(state)[:SHOWN_KEYS])
        raise UserError(
            f"{path}: holds no SAM: expected the key {POSITION} among others, found {len(state)} keys "
            f"({keys}{', ...' if len(state) > SHOWN_KEYS else ''}); a model of the Hub is named by its folder, with "
            "config.json"
        )
    registered = stated if stated in WIDTHS.values() else WIDTHS.get(state[POSITION].shape[-1])
    with torch.device("meta"):  # no time for random weights: every tensor comes from the file
        if numbers is not None and registered is None:
            sam = build_architecture(numbers, stated or "compact", str(path))
        elif registered is not None and stated in ("", registered):
            sam = build_registered(registered)
        elif numbers is not None:
            sam = build_architecture(numbers, stated, str(path))
        else:
            raise UserError(
                f"{path}: holds a SAM of another size than ViT-B, ViT-L and ViT-H, and does not state its "
                f"architecture; keep {standalone.ARCHITECTURE} of the export beside it, or use the .safetensors file "
                "of the training or export"
            )
        return at_size(sam, state[POSITION].shape[1] * sam.multiple)


def read_architecture(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the architecture that a weights file states, or `architecture.json` beside it; None without one."""
    beside = path.with_name(standalone.ARCHITECTURE)
    source = path
    try:
        if "architecture" in metadata:
            numbers = json.loads(metadata["architecture"])
        elif beside.is_file():
            source, numbers = beside, json.loads(beside.read_text(encoding="utf-8"))
        else:
            return None
    except ValueError as error:
        raise UserError(f"{source}: no readable architecture ({error}); export the model again") from None
    if not isinstance(numbers, dict):
        raise UserError(f"{source}: no readable architecture; export the model again")
    return numbers


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a weights file: its tensors on the CPU, and its metadata (empty for .pth)."""
    if (path / CONFIG).is_file():
        return read_hub_folder(path)
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip()
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file; run `dvc repro weights`, or name another") from None
    except IsADirectoryError:
        raise UserError(
            f"{path}: is a folder without {CONFIG}; expected a weights file or a model of the Hub"
        ) from None
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
    """Return the metadata of a .safetensors file, or of a folder in the form of the Hub, without reading tensors."""
    if path.is_dir():
        return notes_of(path)
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def save_sam(sam: Sam, path: Path, *, name: str, metadata: dict[str, str] | None = None) -> None:
    """Write the model's own keys as safetensors, atomically, low-rank updates merged; adapters keep keys of their own.

    Args:
        name: model.name of params.yaml. metadata: further entries; name, side and architecture are added.
    """
    notes = {"name": name, "image_size": str(sam.side)} | (metadata or {})
    if not (isinstance(sam, Sam1) and name in WIDTHS.values() and registered(sam, name)):
        notes["architecture"] = json.dumps(sam.architecture(), sort_keys=True)
    state = {key: value.detach().cpu().contiguous() for key, value in merged_lora_state(sam).items()}
    write_bytes_atomic(path, safetensors_bytes(state, notes))

"""Store a fine-tuned SAM: as plain weights, or as a small file beside the pretrained ones.

Low-rank updates are added to the weights that they update and leave no trace. Bottleneck adapters hold a non-linearity
and cannot be merged: they keep keys of their own, and only this project reads them.

The small file (`tuned.safetensors`) holds the trained parameters only, under the model's own names (low-rank factors as
peft names them in its files, `....qkv.lora_A.weight`). Its metadata name the base: `tuned` (none, blocks, adapter or
lora), `name`, `image_size`, `base_sha256`, `base`, `base_tensors_sha256` and the strategy's numbers.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from lesionsam.errors import UserError
from lesionsam.models import adapters, lora
from lesionsam.models.sam import Sam
from lesionsam.utils.files import sha256_file, write_bytes_atomic

TUNED = "tuned"  # metadata key that marks a small file
SHOWN_KEYS = 3  # of those that a message could name


@dataclass(frozen=True)
class Strategy:
    """Which parameters of the encoder train; the keys of section `model` in params.yaml, which documents each.

    Attributes:
        encoder: none, blocks, adapter or lora. last_k: the last K blocks, 0 = all (with blocks: and all before them).
        adapter_dim: with adapter. lora_rank, lora_alpha, lora_dropout: with lora.
    """

    encoder: str
    last_k: int = 0
    adapter_dim: int = 0
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0


def attach(sam: Sam, strategy: Strategy, *, seed: int = 0) -> None:
    """Insert adapters or low-rank updates into a SAM, in place; nothing for the other strategies.

    Args:
        seed: of the random initial values; the model's output does not depend on it.
    Raises:
        UserError: numbers that this model does not allow.
    """
    if strategy.encoder == "adapter":
        adapters.insert_adapters(sam, dim=strategy.adapter_dim, last_k=strategy.last_k, seed=seed)
    elif strategy.encoder == "lora":
        lora.attach_lora(
            sam,
            rank=strategy.lora_rank,
            alpha=strategy.lora_alpha,
            dropout=strategy.lora_dropout,
            last_k=strategy.last_k,
            seed=seed,
        )


def merged_state(sam: Sam) -> dict[str, torch.Tensor]:
    """Return a state dict that loads into the plain model: its keys, shapes and behaviour.

    Raises:
        UserError: the model carries adapters, which no plain model can hold.
    """
    if adapters.has_adapters(sam):
        raise UserError(
            "model.encoder: adapters cannot be merged into SAM's own weights (they hold a GELU of their own), so there "
            "is no plain file of this model; train with lora, blocks or none to export one"
        )
    return lora.merged_lora_state(sam)


def safetensors_bytes(state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Serialise tensors as safetensors; the same tensors and metadata always give the same bytes.

    `safetensors.torch.save` writes the metadata in random order, so that hashes of equal files would differ. Sorting
    keeps the header's length, and so the offsets and their alignment.
    """
    data = bytearray(save(dict(state), dict(metadata)))
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-max(len(text), size) // 8) * 8)
    data[: 8 + size] = struct.pack("<Q", len(text)) + text
    return bytes(data)


def tensors_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values of tensors, whatever file format holds them."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tuned(
    sam: Sam, path: Path, *, name: str, strategy: Strategy, base: Path, base_state: Mapping[str, torch.Tensor]
) -> None:
    """Write the trained parameters with the identity of their base as one small file, atomically.

    Args:
        sam: with its adapters or updates attached; what requires a gradient is saved.
        name: model.name of params.yaml. base: the pretrained weights file that was trained on.
        base_state: its tensors, see `checkpoint.read_weights`.
    """
    state = {_short(key): p.detach().cpu().contiguous() for key, p in sam.named_parameters() if p.requires_grad}
    notes = {
        TUNED: strategy.encoder,
        "name": name,
        "image_size": str(sam.side),
        "base": base.name,
        "base_sha256": sha256_file(base),
        "base_tensors_sha256": tensors_sha256(base_state),
        "strategy": json.dumps(asdict(strategy)),
    }
    write_bytes_atomic(path, safetensors_bytes(state, notes))


def required_base(metadata: Mapping[str, str]) -> str | None:
    """Return a description of the base that a small file needs; None for any other weights file."""
    if TUNED not in metadata:
        return None
    return f"{metadata.get('base', 'its base')} of {metadata.get('name')} (SHA-256 {metadata.get('base_sha256')})"


def apply_tuned(
    sam: Sam,
    path: Path,
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    base: Path,
    base_state: Mapping[str, torch.Tensor],
) -> None:
    """Load a small file's weights into its base, in place; low-rank updates are merged.

    Args:
        sam: loaded from `base`, at the size that the metadata names. state, metadata: of the small file `path`.
        base_state: the tensors of `base`; they decide where its file was rewritten since.
    Raises:
        UserError: another base, or keys that do not fit.
    """
    found = sha256_file(base)
    if found != metadata.get("base_sha256") and tensors_sha256(base_state) != metadata.get("base_tensors_sha256"):
        raise UserError(
            f"{path}: belongs to {required_base(metadata)}, got {base} (SHA-256 {found}); name the file that "
            "was trained on"
        )
    try:
        strategy = Strategy(**json.loads(metadata["strategy"]))
    except (KeyError, TypeError, json.JSONDecodeError):
        raise UserError(f"{path}: metadata key `strategy` is missing or unreadable; copy the file again") from None
    attach(sam, strategy)
    names = {_short(key): key for key in sam.state_dict()}
    sizes = {_short(key): value.shape for key, value in sam.state_dict().items()}
    wrong = [key for key in state if key not in names or sizes[key] != state[key].shape]
    wrong += [key for key in sizes if (lora.MARK in key or adapters.MARK in key) and key not in state]
    if wrong:
        raise UserError(
            f"{path}: does not fit {base.name}: {', '.join(wrong[:SHOWN_KEYS])} missing, unknown or of another shape"
        )
    if infinite := [key for key, value in state.items() if not bool(torch.isfinite(value).all())]:
        raise UserError(f"{path}: {infinite[0]} holds values that are not finite; the training that wrote it failed")
    sam.load_state_dict({names[key]: value for key, value in state.items()}, strict=False)
    lora.merge_lora(sam)


def _short(key: str) -> str:
    """Return a key without peft's additions."""
    return key.replace(f".{lora.ADAPTER_NAME}.", ".").replace(".base_layer.", ".")

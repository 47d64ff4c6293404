"""A fine-tuned SAM on disk: as plain segment_anything weights, or as a small file beside the pretrained ones.

What may be plain: low-rank updates are added to the weights that they update, and nothing remains of them. Bottleneck
adapters hold a non-linearity and cannot be added to anything: their keys stay, and only this project reads them.

The small file (`tuned.safetensors`) holds what was trained and nothing else, under the model's own names (low-rank
factors as peft names them in its files, `....qkv.lora_A.weight`), and in its metadata what it belongs to: `tuned`
(none, blocks, adapter or lora), `name`, `image_size`, `base_sha256`, `base` and the strategy's numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from segment_anything.modeling import Sam

from lesionsam.errors import UserError
from lesionsam.models import adapters, lora
from lesionsam.utils.files import sha256_file, write_bytes_atomic

TUNED = "tuned"  # key of the metadata that tells such a file
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
    """Put adapters or low-rank updates into a SAM, in place; nothing for the other strategies.

    Args:
        seed: of what starts at random; the model's output is the same whatever it is.
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


def own_state(sam: Sam) -> dict[str, torch.Tensor]:
    """State dict with low-rank updates merged; adapters, where there are any, under keys of their own."""
    return lora.merged_lora_state(sam)


def merged_state(sam: Sam) -> dict[str, torch.Tensor]:
    """State dict that loads into plain segment_anything: its keys, shapes and behaviour.

    Raises:
        UserError: the model carries adapters, which no plain model can hold.
    """
    if adapters.has_adapters(sam):
        raise UserError(
            "model.encoder: adapters cannot be merged into SAM's own weights (they hold a GELU of their own), so there "
            "is no plain segment_anything file of this model; train with lora, blocks or none to export one"
        )
    return own_state(sam)


def save_tuned(sam: Sam, path: Path, *, name: str, strategy: Strategy, base: Path) -> None:
    """Write what was trained, with what it belongs to, as one small file, atomically.

    Args:
        sam: with its adapters or updates attached; what requires a gradient is saved.
        name: compact, vit_b, vit_l or vit_h. base: the pretrained weights file that was trained on.
    """
    state = {_short(key): p.detach().cpu().contiguous() for key, p in sam.named_parameters() if p.requires_grad}
    notes = {
        TUNED: strategy.encoder,
        "name": name,
        "image_size": str(sam.image_encoder.img_size),
        "base": base.name,
        "base_sha256": sha256_file(base),
        "strategy": json.dumps(asdict(strategy)),
    }
    write_bytes_atomic(path, save(state, notes))


def base_wanted(metadata: Mapping[str, str]) -> str | None:
    """The base of a small file in words, None for any other weights file."""
    if TUNED not in metadata:
        return None
    return f"{metadata.get('base', 'its base')} of {metadata.get('name')} (SHA-256 {metadata.get('base_sha256')})"


def apply_tuned(
    sam: Sam, path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str], base: Path
) -> None:
    """Put a small file's weights into its base, in place; low-rank updates are merged.

    Args:
        sam: loaded from `base`, at the size that the metadata names. state, metadata: of the small file `path`.
    Raises:
        UserError: another base, or keys that do not fit.
    """
    found = sha256_file(base)
    if found != metadata.get("base_sha256"):
        raise UserError(
            f"{path}: belongs to {base_wanted(metadata)}, got {base} (SHA-256 {found}); name the file that "
            "was trained on"
        )
    try:
        strategy = Strategy(**json.loads(metadata["strategy"]))
    except (KeyError, TypeError, json.JSONDecodeError):
        raise UserError(f"{path}: its metadata says nothing readable of its strategy; the file is damaged") from None
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
    """A key without peft's additions."""
    return key.replace(f".{lora.ADAPTER_NAME}.", ".").replace(".base_layer.", ".")

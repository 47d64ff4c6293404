"""Find the weights that a name stands for: a file, a folder with one, a model of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lesionsam.errors import UserError
from lesionsam.utils.files import sha256_file
from lesionsam.utils.hub import CONFIG, WEIGHTS, fetch_model, is_hub_name

NAMES = ("best.safetensors", "sam.safetensors", "sam.pth")  # of a stage or an export, in order of preference
SUFFIXES = WEIGHTS


def find_weights(path: Path) -> Path:
    """Return a weights file (the path itself, or the file in the folder that it names) or a folder in the Hub's form.

    Args:
        path: also OWNER/NAME of the Hub, where nothing of that name lies here.
    Raises:
        UserError: the path does not exist, or the folder holds none of `NAMES` and not exactly one other weights file.
    """
    if not path.exists() and is_hub_name(path):
        return fetch_model(path.as_posix()).folder
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; expected a weights file, or a folder that holds one")
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    if (path / CONFIG).is_file():
        return path
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(
            f"{path}: expected {', '.join(NAMES)} or one other file ending in {' or '.join(SUFFIXES)}, "
            f"found {names}; name the file"
        )
    return found[0]


def weights_sha256(path: Path) -> str:
    """Return the SHA-256, 64 hex digits, of a weights file; of a folder in the Hub's form, over its files."""
    if not path.is_dir():
        return sha256_file(path)
    files = sorted(file for file in path.iterdir() if file.suffix in (".json", *SUFFIXES))
    return hashlib.sha256("".join(f"{file.name} {sha256_file(file)}\n" for file in files).encode()).hexdigest()


def weights_bytes(path: Path) -> int:
    """Return the size of a weights file, or of the weights in a folder."""
    files = [file for file in path.iterdir() if file.suffix in SUFFIXES] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty where it is not one, or is cut short."""
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}

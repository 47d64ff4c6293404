"""Where the steps of the pipeline read and write, relative to the project's folder, which is the current one."""

from __future__ import annotations

from pathlib import Path

from lesionsam.config.rules import experiment_copy
from lesionsam.errors import UserError

RAW, INDEX, BOXES = Path("data/raw"), Path("data/raw/index.csv"), Path("data/boxes.csv")
PRETRAINED, ADAPTED = Path("models/pretrained"), Path("models/adapted")
RESULTS, REPORT = Path("results"), Path("report")
LOCK = Path("archives.lock.json")  # hashes of downloads
SCRATCH, CACHE = Path(".scratch"), Path(".cache/frames")
BOARDS = Path("tensorboard")


def archives_folder() -> Path:
    """Return the folder of downloads that are kept; copies of the project use the project's own."""
    return (experiment_copy(Path.cwd()) or Path()) / ".archives"


def pretrained_weights(folder: Path = PRETRAINED) -> Path:
    """Return the checkpoint that `prepare_weights` left in the folder.

    Raises:
        UserError: there is none.
    """
    found = [folder / name for name in ("sam.safetensors", "sam.pth") if (folder / name).exists()]
    if not found:
        raise UserError(f"{folder}: expected sam.safetensors or sam.pth, found neither; run `dvc repro weights`")
    return found[0]

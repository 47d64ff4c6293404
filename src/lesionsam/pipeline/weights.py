"""Step weights: parameters -> models/pretrained/: the checkpoint to start from, verified, and what it is."""

from __future__ import annotations

import os
from pathlib import Path

from lesionsam.config.load import Config
from lesionsam.config.zoo import known
from lesionsam.data.sources.download import Remote, fetch
from lesionsam.errors import UserError
from lesionsam.models.published import BASE_URL, CHECKPOINTS
from lesionsam.pipeline.paths import PRETRAINED, archives_folder
from lesionsam.utils.files import copy_atomic, sha256_file, whole_number, write_json_atomic
from lesionsam.utils.processes import stage_lock
from lesionsam.utils.progress import human_bytes, human_seconds, say
from lesionsam.utils.weights import safetensors_metadata

ADDRESS = "LESIONSAM_WEIGHTS_URL"  # environment variable: another place that holds the same files
PUBLISHED_SIDE = 1024  # of SAM's input, pixels
ASSUMED_SPEED = 12.5e6  # bytes/s, a line of 100 Mbit/s


@stage_lock("weights")
def prepare_weights(config: Config) -> None:
    """Write the checkpoint to models/pretrained."""
    write_weights(config, PRETRAINED)


def write_weights(config: Config, folder: Path) -> None:
    """Write the checkpoint to a folder, and weights.json last: while it is missing, the step has not ended."""
    model = config.model
    for name in ("weights.json", "sam.pth", "sam.safetensors", "architecture.json"):
        (folder / name).unlink(missing_ok=True)
    if model.checkpoint != "published":
        facts = _own(model.name, Path(model.checkpoint), folder)
    elif model.name in CHECKPOINTS:
        facts = _published(model.name, folder)
    else:
        facts = _from_hub(model.name, known(model.name).repo or model.name, model.revision, folder)
    write_json_atomic(folder / "weights.json", facts)
    say(f"{facts['name']}: {facts['source']}, SHA-256 {str(facts['sha256'])[:16]}...")


def _published(name: str, folder: Path) -> dict[str, object]:
    """Fetch SAM's own checkpoint of that name; return the content of weights.json."""
    known = CHECKPOINTS[name]
    file, size, sha256 = known.file, known.size, known.sha256
    base = os.environ.get(ADDRESS, BASE_URL).rstrip("/")
    kept = archives_folder() / "weights"
    if not (kept / file).exists():
        say(f"{file}: {human_bytes(size)} to download, about {human_seconds(size / ASSUMED_SPEED)} at 100 Mbit/s")
    path = fetch(Remote(file, (f"{base}/{file}",), size, sha256), kept)
    copy_atomic(path, folder / "sam.pth", link=True)
    return {"name": name, "sha256": sha256, "source": f"{base}/{file}", "image_size": PUBLISHED_SIDE}


def _from_hub(name: str, place: str, revision: str, folder: Path) -> dict[str, object]:
    """Fetch a model of the Hugging Face Hub, or read a folder in its form; return the content of weights.json."""
    from lesionsam.models.checkpoint import load_sam, save_sam  # here, as they take seconds to import
    from lesionsam.utils.hub import fetch_model

    fetched = fetch_model(place, revision, key="model.name")
    sam, target = load_sam(None, fetched.folder), folder / "sam.safetensors"
    if known(name).side and (len(sam.blocks), sam.side) != (known(name).blocks, known(name).side):
        raise UserError(
            f"model.checkpoint: {place} holds a model of {len(sam.blocks)} blocks at {sam.side} px; {name} has "
            f"{known(name).blocks} at {known(name).side} px; change model.name or model.checkpoint"
        )
    save_sam(sam, target, name=name, metadata={"source": place, **fetched.facts})
    return {"name": name, "sha256": sha256_file(target), "source": place, "image_size": sam.side, **fetched.facts}


def _own(name: str, checkpoint: Path, folder: Path) -> dict[str, object]:
    """Copy the user's file, once it has proved to hold that model; return the content of weights.json."""
    if (checkpoint / "config.json").is_file():
        return _from_hub(name, checkpoint.as_posix(), "", folder)
    if not checkpoint.is_file():
        raise UserError(f"model.checkpoint: expected a weights file, or `published`, got {checkpoint} (no such file)")
    notes = safetensors_metadata(checkpoint)
    if notes.get("name") == name and "image_size" in notes and "tuned" not in notes:
        side = whole_number(notes["image_size"])
        if not side:
            raise UserError(
                f"{checkpoint}: image_size in its metadata: expected a number of pixels, got "
                f"{notes['image_size'][:20]!r}; fetch it again"
            )
    else:
        from lesionsam.models.checkpoint import load_sam  # here, as it takes seconds to import and is seldom needed

        side = load_sam(name, checkpoint).side
    target = folder / ("sam.safetensors" if checkpoint.suffix == ".safetensors" else "sam.pth")
    copy_atomic(checkpoint, target)
    if (architecture := checkpoint.with_name("architecture.json")).is_file():  # a compact SAM's exported .pth needs it
        copy_atomic(architecture, folder / architecture.name)
    return {"name": name, "sha256": sha256_file(target), "source": checkpoint.as_posix(), "image_size": side}

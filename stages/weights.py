"""Stage weights: parameters -> models/pretrained/: the checkpoint to start from, verified, and what it is."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lesionsam.config.load import load_config
from lesionsam.data.sources.download import Remote, fetch
from lesionsam.errors import UserError, run_guarded
from lesionsam.models.published import BASE_URL, CHECKPOINTS, check_image_size
from lesionsam.utils.files import copy_atomic, sha256_file, whole_number, write_json_atomic
from lesionsam.utils.processes import stage_lock
from lesionsam.utils.progress import human_bytes, human_seconds, say

OUTPUT, ARCHIVES = Path("models/pretrained"), Path(".archives/weights")
ADDRESS = "LESIONSAM_WEIGHTS_URL"  # environment variable: another place that holds the same files
PUBLISHED_SIDE = 1024  # of SAM's input, pixels
ASSUMED_SPEED = 12.5e6  # bytes/s, a line of 100 Mbit/s


def published(name: str) -> dict[str, object]:
    """Fetch SAM's own checkpoint of that name; what weights.json says about it."""
    known = CHECKPOINTS[name]
    file, size, sha256 = known.file, known.size, known.sha256
    base = os.environ.get(ADDRESS, BASE_URL).rstrip("/")
    if not (ARCHIVES / file).exists():
        say(f"{file}: {human_bytes(size)} to download, about {human_seconds(size / ASSUMED_SPEED)} at 100 Mbit/s")
    path = fetch(Remote(file, (f"{base}/{file}",), size, sha256), ARCHIVES)
    copy_atomic(path, OUTPUT / "sam.pth", link=True)
    return {"name": name, "sha256": sha256, "source": f"{base}/{file}", "image_size": PUBLISHED_SIDE}


def header(path: Path) -> dict[str, str]:
    """What this project wrote into a safetensors file of its own, or nothing; a cut file is found by its length."""
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def own(name: str, checkpoint: Path) -> dict[str, object]:
    """Copy a file of the user's, once it has proved to hold that model; what weights.json says about it."""
    if not checkpoint.is_file():
        raise UserError(f"model.checkpoint: expected a weights file, or `published`, got {checkpoint} (no such file)")
    notes = header(checkpoint)
    if notes.get("name") == name and "image_size" in notes and "tuned" not in notes:
        side = whole_number(notes["image_size"])
        if not side:
            raise UserError(
                f"{checkpoint}: image_size in its metadata: expected a number of pixels, got "
                f"{notes['image_size'][:20]!r}; fetch it again"
            )
    else:
        from lesionsam.models.checkpoint import load_sam  # here, as it takes seconds to import and is seldom needed

        side = load_sam(name, checkpoint).image_encoder.img_size
    target = OUTPUT / ("sam.safetensors" if checkpoint.suffix == ".safetensors" else "sam.pth")
    copy_atomic(checkpoint, target)
    if (architecture := checkpoint.with_name("architecture.json")).is_file():  # a compact SAM's exported .pth needs it
        copy_atomic(architecture, OUTPUT / architecture.name)
    return {"name": name, "sha256": sha256_file(target), "source": checkpoint.as_posix(), "image_size": side}


def main() -> None:
    """Write weights.json last: while it is missing, the stage has not ended."""
    model = load_config().model
    check_image_size(model.name, model.image_size)
    for name in ("weights.json", "sam.pth", "sam.safetensors", "architecture.json"):
        (OUTPUT / name).unlink(missing_ok=True)
    told = published(model.name) if model.checkpoint == "published" else own(model.name, Path(model.checkpoint))
    write_json_atomic(OUTPUT / "weights.json", told)
    say(f"{told['name']}: {told['source']}, SHA-256 {str(told['sha256'])[:16]}...")


if __name__ == "__main__":
    run_guarded(stage_lock("weights")(main))

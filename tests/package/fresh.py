"""Install the wheel and each extra into fresh environments, use them far from the repository, and print the costs.

`make package` builds the wheel; `python tests/package/fresh.py` needs the network or a filled uv cache, and minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "foundation" / "compact.safetensors"
# Extra -> what must run with it, in a folder that holds photo/, boxes.csv and model/best.safetensors.
COMMANDS = {
    "": ["lesionsam --version", "lesionsam predict photo --boxes boxes.csv --model model --out base --device cpu"],
    "annotate": ["lesionsam annotate --help", "python -c 'from lesionsam.annotation import annotate'"],
    "export": ["lesionsam export --all --model model --out exports"],
    "lora": ["python -c 'from lesionsam.models.lora import attach_lora; import peft'"],
    "train": [
        "lesionsam doctor || test $? -eq 1",
        "python -c 'from lesionsam.experiment import train; from lesionsam.sweep import sweep'",
    ],
    "all": ["python -c 'import fastapi, mlflow, onnx, optuna, peft, dvc'"],
}


def run(command: str, folder: Path, environment: dict[str, str]) -> float:
    """Run a shell command; return its seconds, or end with its output."""
    begun = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: {command}\n{done.stdout}{done.stderr}")
    return time.monotonic() - begun


def size(folder: Path) -> float:
    """Return the GB of a folder's files, hard links counted once."""
    seen = {(stat.st_dev, stat.st_ino): stat.st_size for path in folder.rglob("*") if (stat := path.lstat())}
    return sum(seen.values()) / 1e9


def prepare(folder: Path) -> None:
    """Write one image, its box and the weights."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (320, 240), (224, 178, 150))
    ImageDraw.Draw(image).ellipse((110, 70, 210, 170), fill=(110, 60, 40))
    (folder / "photo").mkdir()
    image.save(folder / "photo" / "a.png")
    (folder / "boxes.csv").write_text(
        "image_id,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1\na,100,60,220,180,140,100,180,140\n"
    )
    (folder / "model").mkdir()
    shutil.copy(WEIGHTS, folder / "model" / "best.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extras", nargs="*", default=list(COMMANDS), help="Which; '' is the wheel alone.")
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    arguments = parser.parse_args()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    } | {"MLFLOW_DISABLE_TELEMETRY": "true", "DVC_NO_ANALYTICS": "true"}
    with tempfile.TemporaryDirectory() as text:
        place = Path(text)
        prepare(place)
        seconds = run(f"uv build --wheel --quiet --out-dir {place / 'dist'} {ROOT}", place, environment)
        (wheel,) = (place / "dist").glob("*.whl")
        print(f"wheel: {wheel.stat().st_size / 1e6:.2f} MB in {seconds:.0f} s")
        print("| installed | packages | GB | install, s | commands, s |\n|---|---|---|---|---|")
        for extra in arguments.extras:
            venv = place / "venv"
            run(f"uv venv --quiet --clear --python {arguments.python} {venv}", place, environment)
            inside = environment | {"VIRTUAL_ENV": str(venv), "PATH": f"{venv / 'bin'}:{environment['PATH']}"}
            target = f"'{wheel}[{extra}]'" if extra else str(wheel)
            install = run(f"uv pip install --quiet {target}", place, inside)
            work = [run(command, place, inside) for command in COMMANDS[extra]]
            num = len(list(venv.glob("lib/python*/site-packages/*.dist-info")))
            name = f"`lesionsam[{extra}]`" if extra else "`lesionsam`"
            print(f"| {name} | {num} | {size(venv):.2f} | {install:.0f} | {sum(work):.0f} |", flush=True)
        masks = list((place / "base" / "masks").glob("*.png"))
        if "" in arguments.extras and len(masks) != 1:
            sys.exit(f"error: expected one mask in {place / 'base'}, found {len(masks)}")


if __name__ == "__main__":
    main()

"""Golden losses: the terms of ten steps of `fit` on the tiny SAM, for each way of training.

    python tests/golden/make.py --check   # exit 1 unless every value equals losses.json to the last digit
    python tests/golden/make.py --write   # after a change that is meant to move losses; the commit goes into the file

A refactor leaves them identical. Other processors round otherwise, so the test suite compares with a tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402

from helpers.tiny import tiny_data, tiny_sam  # noqa: E402
from lesionsam.config.edit import fit as fit_values  # noqa: E402
from lesionsam.config.load import default_values, unflatten, validate  # noqa: E402
from lesionsam.config.presets import preset_values  # noqa: E402
from lesionsam.experiment.run import Data, train  # noqa: E402
from lesionsam.models.checkpoint import save_sam  # noqa: E402

GOLDEN = Path(__file__).with_name("losses.json")
COMMAND = "python tests/golden/make.py --write"
# Five epochs of two batches of four. The gate's threshold lets the random model's uncertain masks pass.
SHORT = {
    "train.epochs": 5,
    "train.batch_size": 4,
    "runtime.device": "cpu",
    "runtime.num_threads": 1,
    "evaluate.batch_size": 4,
}
OPEN_GATE = {"method.gate.entropy_thresh": 0.6931}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("demo", OPEN_GATE),
    "published": ("published", OPEN_GATE),
    "supervised-decoder": ("supervised-decoder", {}),
    "supervised-lora": ("supervised-lora", {}),
}


def ten_steps(preset: str, changes: dict[str, Any]) -> list[dict[str, float]]:
    """Return the values that `fit` logs in each of ten steps, without the total and the learning rates."""
    values = preset_values(preset, default_values())
    config = validate(fit_values(unflatten(SHORT | changes, values)))
    rows: list[dict[str, float]] = []

    def log(values: Any, step: int) -> None:
        if step and "epoch" not in values:
            rows.append({name: v for name, v in values.items() if name.partition("/")[0] not in ("loss", "lr")})

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "sam.safetensors"
        save_sam(tiny_sam(sharpness=20), weights, name="compact")
        train(
            config,
            Data(tiny_data(8), tiny_data(4, seed=1)),
            weights,
            folder=Path(folder) / "run",
            log=log,
            say=lambda line: None,
        )
    return rows


def measure() -> dict[str, list[dict[str, float]]]:
    """Return the ten steps of every case."""
    torch.set_num_threads(1)
    return {name: ten_steps(*case) for name, case in CASES.items()}


def differences(golden: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return a line for each value that is not equal to the last digit."""
    return [
        f"{case}, step {k + 1}: expected {before}, found {after}"
        for case in golden
        for k, (before, after) in enumerate(zip(golden[case], found[case], strict=True))
        if before != after
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with losses.json, to the last digit")
    action.add_argument("--write", action="store_true", help="write losses.json")
    arguments, losses = parser.parse_args(), measure()
    if arguments.write:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        record = {"command": COMMAND, "commit": commit.stdout.strip(), "torch": torch.__version__, "losses": losses}
        GOLDEN.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    else:
        wrong = differences(json.loads(GOLDEN.read_text(encoding="utf-8"))["losses"], losses)
        sys.stdout.write("".join(f"{line}\n" for line in wrong) or "identical to the last digit\n")
        sys.exit(bool(wrong))

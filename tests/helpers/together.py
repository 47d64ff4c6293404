"""Ten steps of `fit` of each case: `python tests/helpers/together.py FOLDER`, in one process or several under torchrun.

The first process writes FOLDER/steps.pt: case -> the values logged at each step and all gradients.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: E402

from golden.make import OPEN_GATE, SHORT  # noqa: E402
from helpers.tiny import tiny_data, tiny_sam  # noqa: E402
from lesionsam.config.edit import fit as fit_values  # noqa: E402
from lesionsam.config.load import Config, default_values, unflatten, validate  # noqa: E402
from lesionsam.config.presets import preset_values  # noqa: E402
from lesionsam.experiment.launch import is_joining, joined  # noqa: E402
from lesionsam.experiment.run import Data, train  # noqa: E402
from lesionsam.models.checkpoint import save_sam  # noqa: E402
from lesionsam.parallel.collectives import barrier, is_main  # noqa: E402

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("demo", OPEN_GATE),
    "part trusted": ("demo", {"method.gate.entropy_thresh": 0.17}),
    "published": ("published", OPEN_GATE),
    "supervised, LoRA": ("supervised-lora", {}),
    "supervised, corrected points": ("supervised", {"method.corrections": 1, "method.prompts.source": "masks"}),
    "accumulated": ("demo", OPEN_GATE | {"train.accumulate": 2}),
    "placebo": ("demo", OPEN_GATE | {"method.target.placebo": "warped"}),
    "distorted": ("demo", OPEN_GATE | {"train.distort.scale": 0.2, "train.distort.hue": 0.1}),
}


def config_of(case: str) -> Config:
    """Return the parameters of a case."""
    preset, changes = CASES[case]
    return validate(fit_values(unflatten(SHORT | changes, preset_values(preset, default_values()))))


def ten_steps(case: str, folder: Path) -> dict[str, Any]:
    """Return the logged values and the gradients of ten steps, of this process alone or of its part."""
    rows: list[dict[str, float]] = []
    gradients: list[dict[str, torch.Tensor]] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: gradients.append(gradients_of(optimizer)))
    train(
        config_of(case),
        Data(tiny_data(8), tiny_data(5, seed=1)),
        folder / "sam.safetensors",
        folder=folder / case,
        log=lambda values, step: rows.append(dict(values)) if step else None,
        say=lambda line: None,
    )
    hook.remove()
    return {"rows": rows, "gradients": gradients}


def gradients_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return copies of the gradients by group and number."""
    return {
        f"{group['name']}.{k}": p.grad.clone()
        for group in optimizer.param_groups
        for k, p in enumerate(group["params"])
        if p.grad is not None
    }


def main(folder: Path) -> None:
    """Run all cases."""
    with joined(config_of("default")) if is_joining() else nullcontext():
        torch.set_num_threads(1)
        if is_main():
            torch.manual_seed(0)
            save_sam(tiny_sam(sharpness=20), folder / "sam.safetensors", name="compact")
        barrier()
        found = {case: ten_steps(case, folder) for case in CASES}
        if is_main():
            torch.save(found, folder / "steps.pt")
        barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

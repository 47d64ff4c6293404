"""A folder to sweep in: a few generated images and a tiny SAM, as `dvc repro boxes weights` leaves them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import optuna

from helpers.tiny import tiny_sam
from lesionsam.boxes.annotator import annotate
from lesionsam.boxes.table import write_boxes
from lesionsam.config.edit import edit_text, fit
from lesionsam.config.load import default_values, load_config, parse_yaml, to_values, unflatten, validate
from lesionsam.config.presets import apply_preset
from lesionsam.data.index import read_index, write_index
from lesionsam.data.sources.synthetic import write_dataset
from lesionsam.models.checkpoint import save_sam
from lesionsam.sweep.storage import open_storage
from lesionsam.sweep.study import is_finished

ROOT = Path(__file__).resolve().parents[2]
SPACE = {"train.lr_encoder": {"low": 1e-5, "high": 1e-3, "log": True}, "model.unfreeze_last_k": {"low": 0, "high": 2}}
# What the default is may change; these tests are about a configuration with a prior as target and no contrast.
BASE = {
    "method.weights.contrast": 0.0,
    "method.weights.pseudo": 1.0,
    "method.target.kind": "prior",
    "method.temperature": 0.1,
}
FAST = BASE | {
    "sweep.sampler": "random",
    "sweep.pruner": "none",
    "sweep.epochs": 0,
    "sweep.confirm_seeds": 0,
    "tracking.enabled": False,
    "runtime.num_threads": 1,
    "runtime.device": "cpu",
    "train.epochs": 2,
    "data.num_train": 8,
    "data.num_dev": 4,
    "data.num_test": 1,
    "data.max_side": 48,
}


def configured(space: dict[str, Any] | None = None, **changes: Any) -> Any:
    """The default configuration with a space and some dotted keys (their dots as __) changed."""
    base = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    values = unflatten(base, default_values())
    if space is not None:
        values["sweep"]["space"] = space
    return validate(fit(values))


def set_params(**changes: Any) -> None:
    """Change dotted keys (their dots as __) of params.yaml in the current folder."""
    path = Path("params.yaml")
    text = path.read_text("utf-8")
    values = parse_yaml(text, "params.yaml")
    space = changes.pop("sweep__space", None)
    values = unflatten({key.replace("__", "."): value for key, value in changes.items()}, values)
    if space is not None:
        values["sweep"]["space"] = space
    path.write_text(edit_text(text, values), "utf-8")


def prepare(folder: Path) -> Path:
    """Fill an empty folder."""
    text, config = apply_preset("tiny", (ROOT / "params.yaml").read_text("utf-8"))
    values = unflatten(FAST, to_values(config))
    values["sweep"]["space"] = SPACE
    values = to_values(validate(fit(values)))
    (folder / "params.yaml").write_text(edit_text(text, values), "utf-8")
    with contextlib.chdir(folder):
        raw = Path("data/raw")
        raw.mkdir(parents=True)
        write_index(
            raw / "index.csv", write_dataset(raw, seed=0, counts={"train": 8, "dev": 4, "test": 1}, max_side=48)
        )
        b = load_config().boxes
        write_boxes(
            Path("data/boxes.csv"),
            annotate(
                read_index(raw / "index.csv"),
                root=Path(),
                seed=b.seed,
                margin=(b.margin_low, b.margin_high),
                core=(b.core_low, b.core_high),
                jitter=b.jitter,
                min_area=b.min_area,
            ),
        )
        Path("models/pretrained").mkdir(parents=True)
        save_sam(tiny_sam(sharpness=20), Path("models/pretrained/sam.safetensors"), name="compact")
    return folder


def only_study(url: str = "sqlite:///sweeps/sweeps.db") -> optuna.Study:
    storage = open_storage(url)
    return optuna.load_study(study_name=None, storage=storage)


def tried(study: optuna.Study) -> list[dict[str, Any]]:
    """Values of the finished trials, in their order."""
    return [t.user_attrs["values"] for t in study.get_trials(deepcopy=False) if is_finished(t)]

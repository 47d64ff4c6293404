"""Names and descriptions that tell runs apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesionsam.experiment.tracked import grouped
from lesionsam.tracking.naming import reproduction, run_name
from lesionsam.tracking.tracker import Tracker

PARAMS = {"method.name": "contrastive", "method.temperature": 0.1, "train.epochs": 10, "runtime.device": "auto"}


def train(root: Path, name: str, **changes: object) -> str:
    """Log a training with changed parameters, as the train stage does, and return its run's name."""
    params = PARAMS | {key.replace("__", "."): value for key, value in changes.items()}
    named = run_name(root, root / name, params, "first")
    settings = {"uri": "", "experiment": "e", "root": root, "tags": {}, "system_metrics": False, "send": False}
    Tracker.open(root / name, run_name=named, params=params, is_training=True, **settings).close()  # pyright: ignore
    return named


def test_a_run_is_named_by_what_differs_from_the_previous_one(tmp_path: Path) -> None:
    assert train(tmp_path, "a") == "first"
    assert train(tmp_path, "b", method__temperature=0.2, train__epochs=20) == "temperature=0.2 epochs=20"
    assert train(tmp_path, "c", method__temperature=0.2, train__epochs=20, runtime__device="cpu") == (
        "repeat of temperature=0.2 epochs=20"
    ), "the device changes no result"
    assert train(tmp_path, "d", method__temperature=0.2, train__epochs=20) == "repeat of temperature=0.2 epochs=20"
    supervised = {"method__name": "supervised", "method__loss": "dice", "method__temperature": 0.2}
    assert train(tmp_path, "e", **supervised) == "method=supervised epochs=10"


def test_a_sweeps_trials_name_no_run(tmp_path: Path) -> None:
    train(tmp_path, "a")
    settings = {"uri": "", "experiment": "e", "root": tmp_path, "tags": {}, "system_metrics": False, "send": False}
    trial = PARAMS | {"method.temperature": 0.7}
    Tracker.open(tmp_path / "t", run_name="003 temperature=0.7", params=trial, **settings).close()  # pyright: ignore
    assert train(tmp_path, "b", train__epochs=20) == "epochs=20"


def test_a_resumed_run_keeps_its_name_and_an_experiment_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, "a")
    assert train(tmp_path, "b", train__epochs=20) == "epochs=20"
    assert train(tmp_path, "b", train__epochs=20) == "epochs=20"
    monkeypatch.setenv("DVC_EXP_NAME", "calm-moth")
    assert train(tmp_path, "c", train__epochs=30) == "calm-moth"


def test_keys_of_one_name_are_told_apart(tmp_path: Path) -> None:
    train(tmp_path, "a", model__encoder__rank=2, method__target__rank=2)
    changed = train(tmp_path, "b", model__encoder__rank=4, method__target__rank=8)
    assert sorted(changed.split()) == ["method.target.rank=8", "model.encoder.rank=4"]


def test_metrics_are_grouped() -> None:
    values = {"loss": 1.0, "lr_decoder": 2.0, "train_loss": 3.0, "dev_objective": 4.0, "epoch": 1.0}
    assert grouped(values) == {
        "train/loss": 1.0,
        "train/lr_decoder": 2.0,
        "train/loss_epoch": 3.0,
        "dev/objective": 4.0,
        "train/epoch": 1.0,
    }


def test_the_description_says_how_to_reproduce() -> None:
    text = reproduction({"mlflow.source.git.commit": "abc", "git.dirty": "true", "dvc_exp_name": "calm-moth"})
    assert "git checkout abc   # it also had changes" in text
    assert "dvc exp apply calm-moth" in text
    assert text.index("git checkout") < text.index("dvc repro")
    assert "git checkout" not in reproduction({})

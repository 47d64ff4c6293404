"""The sweep: its space, its study under kills, Ctrl-C and several workers, storages, what it compares and writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest

from helpers.sweep_project import ROOT, SPACE, configured, only_study, prepare, set_params, tried
from lesionsam.config.load import default_text, flatten, load_config, parse_yaml, validate
from lesionsam.config.presets import apply_preset
from lesionsam.config.upgrade import upgrade
from lesionsam.data.contents import load_image
from lesionsam.data.index import read_index
from lesionsam.errors import UserError
from lesionsam.evaluation.statistics import interval
from lesionsam.models.checkpoint import load_sam
from lesionsam.sweep.charts import draw_pictures
from lesionsam.sweep.prepared import held_out, open_prepared
from lesionsam.sweep.report import Verdict, comparisons, judge, rank_correlation
from lesionsam.sweep.samplers import build_pruner, build_sampler, draw, finished
from lesionsam.sweep.search import Request, apply_best, sweep
from lesionsam.sweep.space import Dimension, combinations, dead_keys, from_json, read_space, to_json
from lesionsam.sweep.storage import open_storage
from lesionsam.sweep.study import is_finished, state_name
from lesionsam.sweep.trial import START, WINNER, StudyFolder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; tests copy it."""
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to sweep in, as the current folder."""
    folder = Path(shutil.copytree(prepared, tmp_path / "project"))
    monkeypatch.chdir(folder)
    return folder


# ---- the space ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "expected at least one key"),
        ({"method.temprature": {"low": 0.1, "high": 1.0}}, "did you mean method.temperature"),
        ({"data.seed": {"low": 0, "high": 3}}, "expected a key that a training reads"),
        ({"model.name": ["compact", "vit_b"]}, "expected a key that a training reads"),
        ({"train.seed": {"low": 0, "high": 9}}, "a seed is chance, no setting"),
        ({"train.epochs": {"low": 5, "high": 30}}, "a longer trial would win by its length"),
        ({"method.gate": [1, 2]}, "a section of keys; name one of its keys"),
        ({"method.temperature": 0.1}, "expected {low, high} or [choices]"),
        ({"method.temperature": {"low": 0.1}}, "expected high"),
        ({"method.temperature": {"low": 0.1, "high": 1.0, "lgo": True}}, "lgo: expected only low, high, log, step"),
        ({"method.temperature": {"low": 1.0, "high": 0.1}}, "low below high"),
        ({"method.temperature": {"low": 0.0, "high": 1.0}}, "low: expected a number above 0"),
        (
            {"method.gate.entropy_thresh": {"low": 0.1, "high": 0.9}},
            "high: expected a number from 0 to 0.6932, got 0.9",
        ),
        ({"method.weights.contrast": {"low": 0.0, "high": 1.0, "log": True}}, "above 0 where log is true"),
        (
            {"method.weights.contrast": {"low": 0.0, "high": 1.0, "step": 2.0}},
            "step: expected a number above 0 and at most",
        ),
        ({"train.lr_head": {"low": 1e-5, "high": 1e-3, "log": True, "step": 1e-5}}, "expected log or step"),
        ({"method.num_points": {"low": 1.5, "high": 20}}, "low: expected an integer"),
        ({"method.temperature": {"low": 0.2, "high": 1.0}}, "params.yaml has 0.1, which lies outside"),
        ({"train.schedule": {"low": 0, "high": 1}}, "expected a list of choices for one of cosine, linear, constant"),
        ({"train.schedule": ["cosine"]}, "at least two different choices"),
        ({"train.schedule": ["cosine", "cosinus"]}, "choice cosinus: expected one of"),
        ({"method.head.norm": ["batch", 1]}, "choice 1"),
    ],
)
def test_a_space_that_is_wrong_is_refused(space: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"^sweep\.space") as caught:
        read_space(configured(space))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_space_of_every_kind_is_read() -> None:
    config = configured(
        {
            "method.temperature": {"low": 0.02, "high": 1.0, "log": True},
            "method.num_points": {"low": 1, "high": 20, "step": 3},
            "train.augment": [True, False],
            "method.target.offset": ["boxes", "none", 0.25],
            "method.target.kind": ["prior", "teacher"],
            "train.clip": {"low": 0.5, "high": 2.0, "step": 0.25},
        }
    )
    space = read_space(config)
    assert [d.values() for d in space] == [
        None,
        [1, 4, 7, 10, 13, 16, 19],
        [True, False],
        ["boxes", "none", 0.25],
        ["prior", "teacher"],
        [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0],
    ]
    assert from_json(to_json(space)) == space
    assert combinations(space) is None
    points = combinations(space[2:4])
    assert points is not None
    assert len(points) == 6
    assert 1 not in space[2], "true is not 1"


def test_numbers_are_rounded_within_their_range() -> None:
    free = Dimension("train.lr_head", low=0.00012345, high=0.9, log=True)
    assert free.rounded(0.123456) == 0.123
    assert free.rounded(0.00012345) == 0.00012345, "three digits would leave the range"
    assert Dimension("train.clip", low=0.5, high=2.0, step=0.1).rounded(0.5 + 7 * 0.1) == 1.2
    assert Dimension("a", low=0, high=4, step=1, whole=True).rounded(3.0) == 3


@pytest.mark.parametrize(
    ("changes", "space", "dead"),
    [
        (
            {"method__weights__contrast": 0.0},
            ["method.temperature", "method.head.ema", "train.lr_head", "method.gate.entropy_thresh"],
            ["method.temperature", "method.head.ema", "train.lr_head"],
        ),
        (
            {"method__weights__contrast": 0.5},
            ["method.temperature", "method.ema_decay", "method.teacher_prompt"],
            ["method.teacher_prompt"],
        ),
        (
            {"method__weights__contrast": 0.0, "method__weights__pseudo": 0.0, "method__weights__projection": 1.0},
            ["method.gate.entropy_thresh", "method.prompts.ring"],
            ["method.gate.entropy_thresh"],
        ),
        (
            {"method__weights__contrast": 1.0, "method__weights__pseudo": 0.0},
            ["method.prompts_per_image", "method.gate.entropy_thresh"],
            ["method.prompts_per_image"],
        ),
        (
            {"method__weights__contrast": 0.0, "method__target__kind": "fused"},
            ["method.ema_decay", "method.teacher_prompt"],
            [],
        ),
        ({"method__target__offset": 0.1}, ["method.target.looseness"], ["method.target.looseness"]),
        ({"train__schedule": "constant"}, ["train.final_lr", "train.warmup"], ["train.final_lr"]),
        ({"model__train_decoder": False}, ["train.lr_decoder", "train.lr_encoder"], []),
        (
            {"model__train_decoder": False, "model__train_prompt_encoder": False},
            ["train.lr_decoder", "train.lr_encoder"],
            ["train.lr_decoder"],
        ),
        ({}, ["method.monitor_masks", "train.overlays"], ["method.monitor_masks", "train.overlays"]),
        (
            {"method__name": "supervised"},
            ["train.lr_head", "train.lr_encoder", "method.prompts.ring", "method.weights.iou"],
            ["train.lr_head", "method.weights.iou"],
        ),
    ],
)
def test_dead_keys(changes: dict[str, Any], space: list[str], dead: list[str]) -> None:
    found = dead_keys(configured(**changes), [Dimension(key, low=0.1, high=0.5) for key in space])
    assert list(found) == dead
    assert all(found.values())


def test_a_key_that_another_dimension_brings_to_life_is_not_dead() -> None:
    config = configured(method__weights__contrast=0.0)
    both = [Dimension("method.temperature", low=0.1, high=1.0), Dimension("method.weights.contrast", low=0.0, high=1.0)]
    assert dead_keys(config, both) == {}
    assert list(dead_keys(config, both[:1])) == ["method.temperature"]


def test_a_space_of_dead_keys_is_refused_and_dead_ones_are_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params(method__weights__contrast=0.0, sweep__space={"method.temperature": {"low": 0.1, "high": 1.0}})
    with pytest.raises(UserError, match="every key changes nothing under this configuration"):
        sweep(Request(dry_run=True))
    assert (
        "method.temperature changes nothing now and is left out: method.weights.contrast is 0"
        in capsys.readouterr().out
    )
    set_params(sweep__space={"model.unfreeze_last_k": {"low": 0, "high": 3}})
    with pytest.raises(UserError, match="expected at most 2, the encoder's blocks, got 3"):
        sweep(Request(dry_run=True))


def test_keys_of_another_variant_are_named_and_the_rest_is_searched(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default space on a preset that has no temperature, no gate and no target; a typing error stays one."""
    space = {
        "method.temperature": {"low": 0.02, "high": 1.0, "log": True},
        "method.gate.entropy_thresh": {"low": 0.05, "high": 0.65},
        "model.unfreeze_last_k": {"low": 0, "high": 2},
    }
    path = Path("params.yaml")
    before = path.read_text("utf-8")
    path.write_text(apply_preset("supervised", before)[0], "utf-8")
    set_params(sweep__space=space)
    sweep(Request(dry_run=True))
    out = capsys.readouterr().out
    for key in ("method.temperature", "method.gate.entropy_thresh"):
        assert f"{key} changes nothing now and is left out: method.name is supervised, and only contrastive" in out
    assert "model.unfreeze_last_k from 0 to 2" in out
    path.write_text(before, "utf-8")
    set_params(sweep__space={"method.target.teacher_weight": {"low": 0.1, "high": 0.9}})
    with pytest.raises(UserError, match="every key changes nothing under this configuration"):
        sweep(Request(dry_run=True))
    out = capsys.readouterr().out
    assert "method.target.kind is prior, and only fused reads it" in out
    set_params(sweep__space={"method.target.teacher_wait": {"low": 0.1, "high": 0.9}})
    with pytest.raises(UserError, match=r"sweep\.space: method\.target\.teacher_wait: unknown key"):
        sweep(Request(dry_run=True))


# ---- draws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gp", "tpe", "random"])
def test_draws_depend_on_number_and_history_alone(kind: str) -> None:
    """Two workers that take turns draw what one would have drawn, and nothing twice."""
    space = [Dimension("train.clip", low=0.1, high=1.0), Dimension("method.weights.iou", low=0.01, high=1.0, log=True)]

    def drawn(num_workers: int) -> list[dict[str, Any]]:
        storage = optuna.storages.InMemoryStorage()
        optuna.create_study(study_name="one", storage=storage, direction="maximize")
        workers = [optuna.load_study(study_name="one", storage=storage) for _ in range(num_workers)]
        found = []
        for k in range(6):
            workers[k % num_workers].sampler = build_sampler(kind, 7, k, 9)
            trial = workers[k % num_workers].ask()
            found.append(draw(trial, space))
            workers[k % num_workers].tell(trial, -((found[-1]["train.clip"] - 0.5) ** 2))
        return found

    alone = drawn(1)
    assert drawn(2) == alone
    assert len({str(values) for values in alone}) == 6


def test_what_was_pruned_is_not_proposed_again() -> None:
    """Values rise towards the upper end, where two trials were pruned; each gained 0.1 after its first epoch."""
    kinds = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}

    def proposed(with_pruned: bool) -> list[float]:
        study = optuna.create_study(direction="maximize", sampler=build_sampler("gp", 0, 7, 9))
        points = [(x, 0.5 + 0.3 * x, optuna.trial.TrialState.COMPLETE) for x in (0.1, 0.3, 0.5, 0.6, 0.7)]
        if with_pruned:
            points += [(x, 0.3, optuna.trial.TrialState.PRUNED) for x in (0.9, 1.0)]
        for x, value, state in points:
            first = value if state == optuna.trial.TrialState.PRUNED else value - 0.1
            study.add_trial(
                optuna.trial.create_trial(
                    state=state, value=value, params={"x": x}, distributions=kinds, intermediate_values={1: first}
                )
            )
        found = []
        for _ in range(3):
            trial = study.ask()
            found.append(trial.suggest_float("x", 0.0, 1.0))
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return found

    assert min(proposed(False)) > 0.9
    assert max(proposed(True)) < 0.9
    complete = optuna.trial.create_trial(value=0.8, intermediate_values={1: 0.7, 2: 0.75})
    pruned = optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED,
        value=0.3,
        params={"x": 1.0},
        distributions=kinds,
        intermediate_values={1: 0.3},
    )
    assert finished(pruned, [complete]).value == pytest.approx(0.4)


def test_pruners_are_built_for_the_budget() -> None:
    median = build_pruner(configured(sweep__pruner="median", sweep__epochs=12))
    assert isinstance(median, optuna.pruners.MedianPruner)
    assert (median._n_startup_trials, median._n_warmup_steps) == (5, 4)
    assert isinstance(build_pruner(configured(sweep__pruner="hyperband")), optuna.pruners.HyperbandPruner)
    assert isinstance(build_pruner(configured(sweep__pruner="none")), optuna.pruners.NopPruner)


# ---- a sweep -----------------------------------------------------------------------------------------------------


def test_a_sweep_from_start_to_applied_values(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_params(sweep__confirm_seeds=2, sweep__epochs=1)
    before = Path("params.yaml").read_text("utf-8")
    sweep(Request(dry_run=True, trials=4))
    assert not Path("sweeps").exists()
    read = set()
    opened = read_index(Path("data/raw/index.csv"))
    test_images = {str(row["image_path"]) for row in opened.values() if row["split"] == "test"}
    monkeypatch.setattr("lesionsam.sweep.prepared.load_image", lambda s: read.add(str(s.image_path)) or load_image(s))
    sweep(Request(trials=4, apply=True, anyway=True))
    study = only_study()
    first = study.get_trials()[0]
    start = {"train.lr_encoder": 1e-3, "model.unfreeze_last_k": 0}
    assert first.user_attrs["values"] == first.user_attrs["start"] == start, "trial 0 is params.yaml as it stands"
    assert [state_name(t) for t in study.get_trials()] == ["complete"] * 4
    assert len({str(values) for values in tried(study)}) == 4
    assert all(
        len(t.intermediate_values) == 1 and t.value == max(t.intermediate_values.values()) for t in study.get_trials()
    )
    place = StudyFolder.of(study.study_name)
    assert not (place.scratch / "trials").exists(), "nothing of a finished trial is left but the best weights"
    load_sam("compact", place.out / "best.safetensors")
    table = pd.read_csv(place.out / "trials.csv")
    best = study.best_trial
    assert list(table["value"]) == [round(t.value or 0, 4) for t in study.get_trials()]
    pictures = {path.stem for path in place.out.glob("*.png")}
    assert pictures == {"history", "curves", "importance", "parallel"}
    out = capsys.readouterr().out
    assert f"best: trial {best.number}" in out
    assert "budget of a trial 1 of 2 epochs" in out
    assert not read & test_images
    changed = {
        key for key, value in flatten(load_config()).items() if value != flatten(validate(parse_yaml(before, "a")))[key]
    }
    if best.number == 0:
        assert "nothing to compare" in out
        assert not changed
    else:
        assert "2 new seeds each at 2 epochs" in out
        assert "the test split was not read" in out
        assert "2 development images no trial saw" in out
        assert read, "the comparison reads the images that no trial saw"
        assert changed <= set(SPACE)
        for line, old in zip(Path("params.yaml").read_text("utf-8").splitlines(), before.splitlines(), strict=True):
            assert line.partition("#")[2] == old.partition("#")[2], "comments stay"

    sweep(Request(trials=4, study=study.study_name, params=unchanged(before)))
    assert len(only_study().get_trials()) == 4, "the same command again trains nothing"
    Path("params.yaml").write_text(before, "utf-8")
    set_params(train__weight_decay=0.1)
    with pytest.raises(UserError, match=r"trials had other values of train\.weight_decay"):
        sweep(Request(trials=4, study=study.study_name))
    Path("params.yaml").write_text(before, "utf-8")
    set_params(sweep__space={"model.unfreeze_last_k": {"low": 0, "high": 2}})
    with pytest.raises(UserError, match="its search space is another one"):
        sweep(Request(trials=4, study=study.study_name))


def real_read(path: Path) -> np.ndarray:
    from lesionsam.utils.images import read_image

    return read_image(path)


def unchanged(text: str) -> Path:
    """Another parameter file with a text."""
    Path("before.yaml").write_text(text, "utf-8")
    return Path("before.yaml")


def test_what_changed_during_a_sweep_stays_when_the_winner_is_applied(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values, comments and layout of params.yaml are those it has then."""
    best = optuna.trial.create_trial(value=1.0, user_attrs={"values": {"train.lr_encoder": 0.00025}})
    path = Path("params.yaml")
    path.write_text(path.read_text("utf-8").replace("clip: 1.0 ", "clip: 0.7 ") + "# mine\n", "utf-8")
    before = path.read_text("utf-8").splitlines()
    sure = Verdict(0.6, 0.5, 0.1, 0.05, 0.2, 12, 5, 0.01)
    apply_best(Request(), best, sure)
    changed = [(old, new) for old, new in zip(before, path.read_text("utf-8").splitlines(), strict=True) if old != new]
    assert [(old.split("#")[0].split(), new.split("#")[0].split()) for old, new in changed] == [
        (["lr_encoder:", "1.0e-3"], ["lr_encoder:", "0.00025"])
    ]
    assert "+  lr_encoder: 0.00025" in capsys.readouterr().out


def test_only_a_winner_that_is_better_on_unseen_images_is_applied(project: Path) -> None:
    best = optuna.trial.create_trial(value=1.0, user_attrs={"values": {"train.clip": 0.1}})
    clip = load_config().train.clip
    for verdict, words in (
        (
            Verdict(0.5, 0.6, -0.1, -0.2, -0.05, 12, 5, 0.01),
            r"is worse than the start .*-0\.1000 \[-0\.2000, -0\.0500\]",
        ),
        (Verdict(0.6, 0.5, 0.1, -0.1, 0.2, 12, 5, 0.01), "is not surely better"),
        (Verdict(0.6, 0.5, 0.1, 0.0, 0.2, 12, 5, 0.01), "is not surely better"),
        (None, "is not compared"),
    ):
        with pytest.raises(UserError, match=f"{words}.*--apply --anyway applies it"):
            apply_best(Request(), best, verdict)
        assert load_config().train.clip == clip
    apply_best(Request(anyway=True), best, None)
    assert load_config().train.clip == 0.1


def test_apply_alone_closes_the_study_as_it_stands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no trial has finished, nothing to apply; give --trials to search"):
        sweep(Request(apply=True))
    assert optuna.get_all_study_names(open_storage("sqlite:///sweeps/sweeps.db")) == [], "no empty study is left"
    bad = {"train.lr_encoder": [0.3, 1e-4]}
    set_params(sweep__space=bad, train__lr_encoder=0.3, model__unfreeze_last_k=2, sweep__confirm_seeds=1)
    set_params(sweep__holdout=0.0)
    sweep(Request(trials=2))
    assert only_study().best_trial.number == 1, "a rate of 0.3 loses"
    capsys.readouterr()
    with pytest.raises(UserError, match="trial 1 is not compared with the start"):
        sweep(Request(apply=True))
    assert load_config().train.lr_encoder == 0.3
    sweep(Request(apply=True, anyway=True))
    assert load_config().train.lr_encoder == 1e-4
    assert len(only_study().get_trials()) == 2, "neither call runs a trial"


def test_a_finite_space_is_tried_to_its_end_once(project: Path) -> None:
    set_params(sweep__space={"model.unfreeze_last_k": {"low": 0, "high": 2}}, train__epochs=1)
    sweep(Request(trials=9))
    assert sorted(values["model.unfreeze_last_k"] for values in tried(only_study())) == [0, 1, 2]


def test_a_trial_that_fails_counts_and_is_named(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: Any, *args: Any, **kwargs: Any) -> Any:
        if config.model.unfreeze_last_k == 1:
            raise RuntimeError("out of memory: made up")
        return real_train(config, *args, **kwargs)

    from lesionsam.sweep.trial import train as real_train

    monkeypatch.setattr("lesionsam.sweep.trial.train", failing)
    set_params(sweep__space={"model.unfreeze_last_k": {"low": 0, "high": 2}}, train__epochs=1)
    sweep(Request(trials=3))
    assert sorted(state_name(t) for t in only_study().get_trials() if is_finished(t)) == [
        "complete",
        "complete",
        "failed",
    ]
    assert "out of memory: made up" in capsys.readouterr().out


def test_data_prepared_with_other_parameters_is_refused(project: Path) -> None:
    """DVC's record says what the stages had; without one nothing can be compared."""
    held = {"data": {**parse_yaml(Path("params.yaml").read_text("utf-8"), "")["data"], "num_train": 99}}
    stages = {"download": {"params": {"params.yaml": held}}, "train": {"params": {"params.yaml": {"train": {}}}}}
    Path("dvc.lock").write_text(json.dumps({"stages": stages}), "utf-8")
    with pytest.raises(UserError, match=r"^data\.num_train: expected 99, which .* prepared with, got 8; run `dvc "):
        sweep(Request(dry_run=True))
    held["data"]["num_train"] = 8
    Path("dvc.lock").write_text(json.dumps({"stages": stages}), "utf-8")
    sweep(Request(dry_run=True))


def test_trials_on_other_images_or_masks_are_another_studys(project: Path) -> None:
    """Boxes of people's own stay the same when pictures are exchanged."""

    def digest() -> str:
        return open_prepared(load_config()).digest()

    index = Path("data/raw/index.csv")
    whole, first = index.read_text("utf-8"), digest()
    rows = list(read_index(index).values())
    for split, same in (("train", False), ("dev", False), ("test", True)):
        row = next(row for row in rows if row["split"] == split)
        index.write_text(whole.replace(row["sha256"], "0" * 64), "utf-8")
        assert (digest() == first) is same, split
    index.write_text(whole, "utf-8")
    assert digest() == first
    mask = next(row["mask_sha256"] for row in rows if row["split"] == "dev")
    index.write_text(whole.replace(mask, "0" * 64), "utf-8")
    assert digest() != first


def test_a_trial_cut_short_begins_anew_under_other_code(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, config = open_prepared(load_config()), load_config()
    first = bench.run_key(config)
    assert bench.run_key(config) == first
    monkeypatch.setattr("lesionsam.sweep.prepared.training_digest", lambda: "other")
    assert bench.run_key(config) != first


def test_the_folders_of_an_earlier_study_are_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that was deleted, or another one: its runs, states and best weights are no part of this study."""
    monkeypatch.chdir(tmp_path)
    place = StudyFolder.of("s")
    place.adopt("one", alone=True)
    for path in (place.scratch / "parent" / "run.json", place.scratch / "confirm" / "a.csv", place.out / "best.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    place.adopt("one", alone=False)
    assert (place.scratch / "parent" / "run.json").exists()
    with pytest.raises(UserError, match="another sweep of this name, in another storage, runs in this folder"):
        place.adopt("two", alone=False)
    place.adopt("two", alone=True)
    assert not (place.scratch / "parent").exists()
    assert not (place.scratch / "confirm").exists()
    assert not (place.out / "best.json").exists()


def test_nothing_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    shutil.copy2(root / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"data/raw/index.csv: expected what the pipeline prepares, found nothing; run `dvc repro"
    ):
        sweep(Request())


# ---- the comparison ------------------------------------------------------------------------------------------------


def test_the_verdict_is_paired_over_images_with_seeds_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = configured(sweep__confirm_seeds=3)
    trainings = comparisons(config, {"method.temperature": 0.2}, {"method.temperature": 0.1})
    assert sorted({training.seed for training in trainings}) == [1000, 1001, 1002]
    rng = np.random.default_rng(0)
    images = [f"{k:03d}" for k in range(12)]
    level = rng.uniform(0.2, 0.9, len(images))  # images differ far more than winner and start
    place, expected = StudyFolder.of("s"), []
    for training in trainings:
        gain = (
            np.full(len(images), 0.02 + 0.01 * (training.seed - 1001))
            if training.kind == WINNER
            else np.zeros(len(images))
        )
        score = level + gain
        expected.append((training, score.mean()))
        training.path(place).parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"run": training.seed, "image_id": name, "prompt": p, "score": s}
            for name, s in zip(images, score, strict=True)
            for p in ("ring", "box")
        ]
        pd.DataFrame(rows).to_csv(training.path(place), index=False)
    verdict = judge(config, place, trainings)
    assert verdict is not None
    assert verdict.difference == pytest.approx(0.02)
    assert verdict.seeds_sd == pytest.approx(0.01)
    assert (verdict.low, verdict.high) == pytest.approx(interval(np.full(12, 0.02), num_bootstrap=50, confidence=0.95))
    assert (verdict.num_images, verdict.num_seeds) == (12, 3)
    assert "better" in verdict.line(config, True)
    trainings[0].path(place).unlink()
    assert judge(config, place, trainings) is None, "no verdict before every training is there"
    unsure = Verdict(0.6, 0.59, 0.01, -0.01, 0.03, 12, 3, 0.01)
    assert "not told apart" in unsure.line(config, True)
    assert START in {training.kind for training in trainings}


def test_an_older_file_gets_the_section(root: Path) -> None:
    text = default_text()
    head, _, rest = text.partition("sweep: ")
    assert upgrade(head + rest[rest.index("tracking:") :])[0] == text


def test_unseen_images_are_a_stable_share() -> None:
    names = [f"image{k}" for k in range(40)]
    held = held_out(names, 0.5)
    assert len(held) == 20
    assert held == held_out(reversed(names), 0.5)  # pyright: ignore[reportArgumentType]
    assert held_out(names, 0.0) == set()
    assert len(held_out(names[:2], 0.9)) == 1
    assert held_out(names[:1], 0.5) == set()


def test_pictures_show_every_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = configured({"train.clip": {"low": 0.1, "high": 2.0}, "train.augment": [True, False]})
    space = read_space(config)
    study = optuna.create_study(direction="maximize")
    kinds = {
        "train.clip": optuna.distributions.FloatDistribution(0.1, 2.0),
        "train.augment": optuna.distributions.CategoricalDistribution([True, False]),
    }
    states = [optuna.trial.TrialState.COMPLETE] * 8 + [optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.FAIL]
    for k, state in enumerate(states):
        values = {"train.clip": 1.0 if k == 0 else 0.2 * k, "train.augment": k % 3 == 0}
        attributes = {"values": values, **({"start": values} if k == 0 else {}), **({"error": "x"} if k == 9 else {})}
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=None if k == 9 else 1.0 if values["train.augment"] else 0.0,
                params=values,
                distributions=kinds,
                user_attrs=attributes,
            )
        )
    paths = draw_pictures(study, Path("pictures"), space, "value")
    assert set(paths) == {"history", "curves", "importance", "parallel"}
    for path in paths.values():
        assert real_read(path).std() > 10, "not an empty page"


def test_rank_correlation_of_the_label_free_score() -> None:
    study = optuna.create_study(direction="maximize")
    for label_free, miou in ((0.1, 0.2), (0.2, 0.1), (0.3, 0.3), (0.4, 0.4)):
        study.add_trial(
            optuna.trial.create_trial(value=miou, user_attrs={"scores": {"label_free": label_free, "miou": miou}})
        )
    assert rank_correlation(study) == (pytest.approx(1 - 6 * 2 / (4 * 15)), 4)  # 1 - 6 sum d^2 / (n (n^2 - 1))


def test_help_is_quick_and_names_every_option() -> None:
    program = (
        "import sys, runpy; sys.argv = ['tune.py', '--help']\ntry:\n"
        f"    runpy.run_path({str(ROOT / 'src' / 'tune.py')!r}, "
        "run_name='__main__')\nexcept SystemExit:\n    print(*sorted({'torch', 'optuna', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    for option in ("--trials", "--timeout", "--workers", "--study", "--storage", "--apply", "--anyway", "--dry-run"):
        assert option in done.stdout
    assert done.stdout.strip().endswith("╯"), "no heavy library was imported"

"""What an unfinished training goes on under: the same parameters, data and code, or a line that says what differs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.package_copy import package_copy, recoded, reworded
from lesionsam.config.load import Config, default_values, unflatten, validate
from lesionsam.errors import UserError
from lesionsam.experiment.history import History
from lesionsam.experiment.resume import ANYWAY, ORIGIN, begin, finish, origin_of, run_key, training_digest
from lesionsam.tracking.tracker import NullTracker
from lesionsam.types import Sample
from lesionsam.utils import code
from lesionsam.utils.code import PACKAGE, module_files


class Inputs:
    """A data set of two lesions, each with an image and a mask, and weights."""

    def __init__(self, folder: Path) -> None:
        self.image, self.mask, self.weights = folder / "image.png", folder / "mask.png", folder / "sam.safetensors"
        for path in (self.image, self.mask, self.weights):
            path.write_text(path.name)
        box = np.array([1.0, 2.0, 30.0, 40.0])
        self.samples = [
            Sample(f"image{k}", "0", split, self.image, self.mask, 64, 48, box, box)
            for k, split in enumerate(("train", "dev"))
        ]

    def config(self, **changes: Any) -> Config:
        values = {key.replace("__", "."): value for key, value in changes.items()}
        return validate(unflatten(values, default_values()))

    def origin(self, **changes: Any) -> dict[str, Any]:
        return origin_of(self.config(**changes), self.samples, self.weights)

    def key(self) -> str:
        return run_key(self.config(), self.samples, self.weights)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.delenv(ANYWAY, raising=False)
    return Inputs(tmp_path)


def begun(folder: Path, origin: dict[str, Any]) -> Path:
    """A training that was cut short."""
    folder.mkdir(parents=True)
    begin(folder, origin)
    (folder / "state-000000001-000000.pt").touch()
    return folder


def test_the_code_is_that_of_the_modules_which_give_the_result(inputs: Inputs) -> None:
    code = inputs.origin()["code"]
    assert {"training.loop", "losses", "models.decoder", "data.frames", "utils.images"} <= set(code)
    assert not [name for name in code if name.startswith(("tracking", "errors", "config", "utils.processes"))]


def test_a_docstring_refuses_no_resume_and_a_change_of_a_loss_does(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under copies of the package: in every module another docstring and comments; then one statement more."""
    folder = begun(tmp_path / "runs" / "one", inputs.origin())
    worded = package_copy(tmp_path / "worded", dict.fromkeys(module_files(PACKAGE), reworded))
    monkeypatch.setattr(code, "PACKAGE", worded)
    begin(folder, inputs.origin())
    beside = dict.fromkeys(("tracking.spool", "config.schema", "sweep.search", "report.page", "cli.app"), recoded)
    monkeypatch.setattr(code, "PACKAGE", package_copy(tmp_path / "beside", beside))
    begin(folder, inputs.origin())
    monkeypatch.setattr(code, "PACKAGE", package_copy(tmp_path / "changed", {"losses": recoded}))
    with pytest.raises(UserError, match=r"the code has changed since \(losses\)"):
        begin(folder, inputs.origin())


def test_the_same_goes_on_without_a_word(tmp_path: Path, inputs: Inputs) -> None:
    lines: list[str] = []
    folder = begun(tmp_path / "runs" / "one", inputs.origin())
    begin(folder, inputs.origin(), lines.append)
    assert lines == []


def test_other_code_is_refused_by_name_unless_told_to(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = inputs.origin()
    old["code"]["losses"] = "0" * 16
    folder, lines = begun(tmp_path / "runs" / "one", old), []
    for _ in range(2):  # and the refusal leaves all as it was
        says = rf"the code has changed since \(losses\); delete the folder .* {ANYWAY}=anyway"
        with pytest.raises(UserError, match=says):
            begin(folder, inputs.origin(), lines.append)
    monkeypatch.setenv(ANYWAY, "anyway")
    begin(folder, inputs.origin(), lines.append)
    assert len(lines) == 1
    assert "going on all the same" in lines[0]
    monkeypatch.delenv(ANYWAY)
    begin(folder, inputs.origin(), lines.append)
    assert len(lines) == 1, "from then on it is this code's"


@pytest.mark.parametrize("kind", ["image", "mask", "weights"])
def test_other_contents_are_another_run(tmp_path: Path, inputs: Inputs, kind: str) -> None:
    """Though path, size, date and boxes stay: an unfinished run of the old contents is left alone, and named."""
    begun(tmp_path / "runs" / inputs.key(), inputs.origin())
    before, path = inputs.key(), getattr(inputs, kind)
    assert inputs.key() == before
    status, text = path.stat(), path.read_text()
    path.write_text(text[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert inputs.key() != before
    lines: list[str] = []
    (tmp_path / "runs" / inputs.key()).mkdir()
    begin(tmp_path / "runs" / inputs.key(), inputs.origin(), lines.append)
    assert len(lines) == 1
    assert lines[0].endswith(f"({kind.removesuffix('s')}s); this one begins anew")


def test_hashes_of_the_index_spare_a_second_look_at_the_files(inputs: Inputs) -> None:
    inputs.samples = [replace(s, image_sha256="a" * 64, mask_sha256="b" * 64) for s in inputs.samples]
    inputs.image.unlink()
    inputs.mask.unlink()
    before = inputs.key()
    inputs.samples[1] = replace(inputs.samples[1], mask_sha256="c" * 64)
    assert inputs.key() != before


def test_points_of_other_code_are_not_gone_on_with_where_there_is_no_state_yet(tmp_path: Path, inputs: Inputs) -> None:
    """Killed before its first state: a point that is there already would not be written again."""
    folder = tmp_path / "runs" / "one"
    begin(folder, inputs.origin())
    tracker = NullTracker(folder / "run")
    tracker.log({"loss": 1.0}, 0)
    tracker.close()
    begin(folder, inputs.origin())
    assert (folder / "run" / "metrics.jsonl").exists(), "the same code: the same points"
    other = inputs.origin()
    other["code"]["losses"] = "0" * 16
    begin(folder, other)
    assert [path.name for path in folder.iterdir()] == [ORIGIN]


def test_a_finished_run_that_is_killed_while_its_scratch_is_removed_begins_anew(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "runs" / "one", inputs.origin())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, **options: (folder / ORIGIN).unlink())
        finish(folder)
    begin(folder, inputs.origin())
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    finish(folder)
    assert list(folder.parent.iterdir()) == []


def test_what_killed_processes_were_writing_is_removed(tmp_path: Path, inputs: Inputs) -> None:
    """A state may have gigabytes, and a night many kills."""
    folder = begun(tmp_path / "runs" / "one", inputs.origin())
    (folder / ".state-000000002-000001.pt.0123456789abcdef.tmp").touch()
    begin(folder, inputs.origin())
    assert sorted(path.name for path in folder.iterdir()) == [ORIGIN, "state-000000001-000000.pt"]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_states_of_unknown_code_are_refused(tmp_path: Path, inputs: Inputs, content: str | None) -> None:
    folder = begun(tmp_path / "runs" / "one", inputs.origin())
    (folder / ORIGIN).unlink() if content is None else (folder / ORIGIN).write_text(content)
    with pytest.raises(UserError, match="it is not noted by which code"):
        begin(folder, inputs.origin())


def test_what_another_run_was_begun_with_is_named(tmp_path: Path, inputs: Inputs) -> None:
    begun(tmp_path / "runs" / "one", inputs.origin())
    inputs.samples = [replace(s, big_box=s.big_box + 1) for s in inputs.samples]
    lines: list[str] = []
    (tmp_path / "runs" / "two").mkdir()
    begin(tmp_path / "runs" / "two", inputs.origin(train__seed=3, runtime__num_threads=2), lines.append)
    assert len(lines) == 1
    assert lines[0].endswith("runs/one (train.seed: 0 -> 3, boxes); this one begins anew")
    noted = json.loads((tmp_path / "runs" / "two" / ORIGIN).read_text())
    assert noted["parameters"]["train.seed"] == 3
    lines.clear()
    begin(tmp_path / "runs" / "two", inputs.origin(train__seed=3), lines.append)
    assert len(lines) == 1, "no state of its own yet: said again"


def test_the_code_that_gives_a_result_has_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = training_digest()
    monkeypatch.setattr(code, "PACKAGE", package_copy(tmp_path / "in", {"models.attention": recoded}))
    assert training_digest() != first
    beside = ("cli.app", "tracking.spool", "annotation.server", "inference.rank", "experiment.auto")
    monkeypatch.setattr(code, "PACKAGE", package_copy(tmp_path / "beside", dict.fromkeys(beside, recoded)))
    assert training_digest() == first


def test_a_resumed_history_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    epochs = [({"epoch": 1, "train_loss": 0.1, "dev_objective": 1.0}, 8), ({"epoch": 2, "train_loss": 1e-7}, 16)]
    straight = History(tmp_path / "straight.csv")
    for values, step in epochs:
        straight.log(values, step)
        straight.log({"loss": 1.0}, step)
        History(tmp_path / "resumed.csv").log(values, step)
    assert (tmp_path / "resumed.csv").read_text() == (tmp_path / "straight.csv").read_text()
    assert (tmp_path / "straight.csv").read_text().splitlines() == [
        "epoch,step,loss,objective,ring,centre,box,label_free",
        "1,8,0.1,1.0,,,,",
        "2,16,1e-07,,,,,",
    ]
    straight.log({"epoch": 1, "train_loss": 0.5}, 8)
    assert [row["epoch"] for row in straight.rows] == [1], "epochs after a repeated one are dropped"

"""What an unfinished training goes on under: the same parameters, data and code, or a line that says what differs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lesionsam import losses
from lesionsam.config.load import default_values, unflatten, validate
from lesionsam.errors import UserError
from lesionsam.experiment.resume import ANYWAY, ORIGIN, begin, finish, origin_of
from lesionsam.tracking.tracker import NullTracker
from lesionsam.training import loop as training


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    monkeypatch.delenv(ANYWAY, raising=False)
    paths = tmp_path / "index.csv", tmp_path / "boxes.csv", tmp_path / "sam.safetensors"
    for path in paths:
        path.write_text(path.name)
    return paths


def origin(inputs: tuple[Path, Path, Path], **changes: Any) -> dict[str, Any]:
    values = {key.replace("__", "."): value for key, value in changes.items()}
    return origin_of(validate(unflatten(values, default_values())), *inputs)


def begun(folder: Path, origin: dict[str, Any]) -> Path:
    """A training that was cut short."""
    folder.mkdir(parents=True)
    begin(folder, origin)
    (folder / "state-000000001-000000.pt").touch()
    return folder


def test_the_code_is_that_of_the_modules_which_give_the_result(inputs: tuple[Path, Path, Path]) -> None:
    code = origin(inputs)["code"]
    assert {"training", "losses", "config"} <= set(code), (training, losses)
    assert not [name for name in code if name.startswith(("tracking", "guard", "errors", "lineage"))]


def test_the_same_goes_on_without_a_word(tmp_path: Path, inputs: tuple[Path, Path, Path]) -> None:
    lines: list[str] = []
    folder = begun(tmp_path / "runs" / "one", origin(inputs))
    begin(folder, origin(inputs), lines.append)
    assert lines == []


def test_other_code_is_refused_by_name_unless_told_to(
    tmp_path: Path, inputs: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = origin(inputs)
    old["code"]["losses"] = "0" * 16
    folder, lines = begun(tmp_path / "runs" / "one", old), []
    for _ in range(2):  # and the refusal leaves all as it was
        says = rf"the code has changed since \(losses\); delete the folder .* {ANYWAY}=anyway"
        with pytest.raises(UserError, match=says):
            begin(folder, origin(inputs), lines.append)
    monkeypatch.setenv(ANYWAY, "anyway")
    begin(folder, origin(inputs), lines.append)
    assert len(lines) == 1
    assert "going on all the same" in lines[0]
    monkeypatch.delenv(ANYWAY)
    begin(folder, origin(inputs), lines.append)
    assert len(lines) == 1, "from then on it is this code's"


def test_other_images_are_refused(tmp_path: Path, inputs: tuple[Path, Path, Path]) -> None:
    """Their boxes may be the same: the name of the folder does not tell."""
    folder = begun(tmp_path / "runs" / "one", origin(inputs))
    inputs[0].write_text("another image")
    with pytest.raises(UserError, match="the images have changed since; delete the folder"):
        begin(folder, origin(inputs))


def test_other_masks_are_refused(tmp_path: Path, inputs: tuple[Path, Path, Path]) -> None:
    """The index has no hash of them, and a user's own boxes do not follow them."""

    def with_mask(content: str) -> dict[str, Any]:
        (tmp_path / "mask.png").write_text(content)
        return origin_of(validate(unflatten({}, default_values())), *inputs, [tmp_path / "mask.png"])

    folder = begun(tmp_path / "runs" / "one", with_mask("one"))
    begin(folder, with_mask("one"))
    with pytest.raises(UserError, match="the masks have changed since; delete the folder"):
        begin(folder, with_mask("another"))


def test_points_of_other_code_are_not_gone_on_with_where_there_is_no_state_yet(
    tmp_path: Path, inputs: tuple[Path, Path, Path]
) -> None:
    """Killed before its first state: a point that is there already would not be written again."""
    folder = tmp_path / "runs" / "one"
    begin(folder, origin(inputs))
    tracker = NullTracker(folder / "run")
    tracker.log({"loss": 1.0}, 0)
    tracker.close()
    begin(folder, origin(inputs))
    assert (folder / "run" / "metrics.jsonl").exists(), "the same code: the same points"
    other = origin(inputs)
    other["code"]["losses"] = "0" * 16
    begin(folder, other)
    assert [path.name for path in folder.iterdir()] == [ORIGIN]


def test_a_finished_run_that_is_killed_while_its_scratch_is_removed_begins_anew(
    tmp_path: Path, inputs: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "runs" / "one", origin(inputs))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, **options: (folder / ORIGIN).unlink())
        finish(folder)
    begin(folder, origin(inputs))
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    finish(folder)
    assert list(folder.parent.iterdir()) == []


def test_what_killed_processes_were_writing_is_removed(tmp_path: Path, inputs: tuple[Path, Path, Path]) -> None:
    """A state may have gigabytes, and a night many kills."""
    folder = begun(tmp_path / "runs" / "one", origin(inputs))
    (folder / f".state-000000002-000001.pt.{2**22 + 1}-00000000.tmp").touch()  # more than any process number
    begin(folder, origin(inputs))
    assert sorted(path.name for path in folder.iterdir()) == [ORIGIN, "state-000000001-000000.pt"]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_states_of_unknown_code_are_refused(
    tmp_path: Path, inputs: tuple[Path, Path, Path], content: str | None
) -> None:
    folder = begun(tmp_path / "runs" / "one", origin(inputs))
    (folder / ORIGIN).unlink() if content is None else (folder / ORIGIN).write_text(content)
    with pytest.raises(UserError, match="it is not noted by which code"):
        begin(folder, origin(inputs))


def test_what_another_run_was_begun_with_is_named(tmp_path: Path, inputs: tuple[Path, Path, Path]) -> None:
    begun(tmp_path / "runs" / "one", origin(inputs))
    inputs[1].write_text("other boxes")
    lines: list[str] = []
    (tmp_path / "runs" / "two").mkdir()
    begin(tmp_path / "runs" / "two", origin(inputs, train__seed=3, runtime__num_threads=2), lines.append)
    assert len(lines) == 1
    assert lines[0].endswith("runs/one (train.seed: 0 -> 3, boxes); this one begins anew")
    noted = json.loads((tmp_path / "runs" / "two" / ORIGIN).read_text())
    assert noted["parameters"]["train.seed"] == 3
    lines.clear()
    begin(tmp_path / "runs" / "two", origin(inputs, train__seed=3), lines.append)
    assert len(lines) == 1, "no state of its own yet: said again"


def test_the_code_that_gives_a_result_has_a_digest(tmp_path: Path) -> None:
    package = tmp_path / "lesionsam"
    shutil.copytree(Path(losses.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        script = "from lesionsam.experiment.resume import code_digest; print(code_digest())"
        return subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    first = digest()
    for beside in ("cli.py", "tracking_spool.py", "annotation/server.py", "inference_rank.py"):
        with (package / beside).open("a") as file:
            file.write("# changed\n")
    assert digest() == first
    seen = {first}
    for module in ("losses.py", "methods/contrastive.py"):
        with (package / module).open("a") as file:
            file.write("# changed\n")
        seen.add(digest())
    assert len(seen) == 3

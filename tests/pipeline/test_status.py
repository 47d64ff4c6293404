"""What `dvc status` says after a change of code or parameters, in a copy of the repository."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.package_copy import recoded, reworded
from helpers.pipeline import repository_copy, run, set_parameter

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose stages count as run, with outputs of a few bytes: `dvc status` compares no more than hashes."""
    folder = repository_copy(tmp_path_factory.mktemp("committed"))
    for name in ("data/raw/index.csv", "data/boxes.csv", "models/pretrained/x", "models/adapted/history.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in ("results/metrics.json", "report/index.html"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    run(folder, "dvc", "commit", "--force")
    assert changed_stages(folder) == set()
    return folder


def changed_stages(folder: Path) -> set[str]:
    """Stages that `dvc repro` would run for a reason of their own, not for that of a stage before."""
    return set(json.loads(run(folder, "dvc", "status", "--json").stdout))


Edit = Callable[[dict[str, Callable[[str], str]]], set[str]]


@pytest.fixture
def edit(committed: Path) -> Edit:
    """Changes files, asks for the status, and puts the files back."""

    def edited(changes: dict[str, Callable[[str], str]]) -> set[str]:
        before = {committed / name: (committed / name).read_text(encoding="utf-8") for name in changes}
        try:
            for name, change in changes.items():
                (committed / name).write_text(change(before[committed / name]), encoding="utf-8")
            return changed_stages(committed)
        finally:
            for path, text in before.items():
                path.write_text(text, encoding="utf-8")

    return edited


def test_new_parameters_elsewhere_leave_the_training(edit: Edit) -> None:
    """The keys in params.yaml, and the code of the configuration that would read them."""

    def added(text: str) -> str:
        for section in ("sweep", "report", "auto", "runtime", "cluster"):
            head = re.compile(rf"^{section}:.*$", re.MULTILINE)
            text = head.sub(r"\g<0>\n  added: 1", text) if head.search(text) else f"{text}{section}:\n  added: 1\n"
        return text

    code = dict.fromkeys(("schema.py", "load.py", "rules.py"), recoded) | {"schema_method.py": reworded}
    changes = {f"src/lesionsam/config/{name}": change for name, change in code.items()}
    presets = {"src/lesionsam/config/presets/demo.yaml": lambda text: f"{text}# more\n"}
    assert edit({"params.yaml": added, **changes, **presets}) <= {"evaluate"}, "which reads `auto`"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("losses.py", {"train"}),
        ("models/decoder.py", {"weights", "train", "evaluate"}),
        ("data/sources/isic.py", {"download"}),
        ("inference/rank.py", {"evaluate"}),
    ],
)
def test_a_change_of_code_runs_the_stages_that_it_makes(module: str, expected: set[str], edit: Edit) -> None:
    assert edit({f"src/lesionsam/{module}": recoded}) == expected


def test_code_that_no_stage_runs_for_its_result_runs_none(edit: Edit) -> None:
    modules = ("sweep/search", "annotation/server", "tracking/tracker", "data/check/checks", "utils/progress", "errors")
    assert edit({f"src/lesionsam/{module}.py": recoded for module in modules}) == set()


def test_a_parameter_of_the_training_runs_it(committed: Path, edit: Edit) -> None:
    def warmer(text: str) -> str:
        set_parameter(committed, "method.temperature", 0.2)
        return (committed / "params.yaml").read_text(encoding="utf-8")

    assert edit({"params.yaml": warmer}) == {"train", "evaluate"}


def test_other_masks_run_what_comes_after(edit: Edit) -> None:
    """The index, whose hashes of masks change, lies in data/raw."""
    assert edit({"data/raw/index.csv": lambda text: f"{text}other"}) >= {"boxes", "train", "evaluate"}

"""The command line: instant help, one-line errors, a parameter file written whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from helpers.cli import lesionsam
from lesionsam.cli.app import app
from lesionsam.config.load import default_text, default_values, load_config
from lesionsam.config.presets import preset_names

HEAVY = (
    "torch",
    "torchvision",
    "segment_anything",
    "numpy",
    "pandas",
    "scipy",
    "skimage",
    "matplotlib",
    "mlflow",
    "optuna",
    "pydantic",
    "ruamel.yaml",
)


EPOCHS = default_values()["train"]["epochs"]
NEGATIVE = default_text().replace("patience: 0", "patience: -1")


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """params.yaml in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text(default_text(), "utf-8")
    return path


def test_help_as_a_module_loads_nothing_heavy(root: Path) -> None:
    program = (
        "import runpy, sys; sys.argv = ['lesionsam', '--help']\n"
        "try: runpy.run_module('lesionsam', run_name='__main__')\n"
        f"finally: print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root / "src", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    assert all(name in done.stdout for name in ("preset", "check", "params", "predict", "smoke", "foundation"))


@pytest.mark.parametrize(
    "command",
    [
        ["annotate"],
        ["engine"],
        ["preset"],
        ["check"],
        ["params"],
        ["params", "upgrade"],
        ["predict"],
        ["smoke"],
        ["foundation"],
        ["data"],
        ["data", "convert"],
        ["data", "check"],
        ["data", "show"],
        ["cache"],
        ["cache", "clear"],
        ["promote"],
        ["export"],
        ["doctor"],
        ["submit"],
        ["submit", "train"],
        ["submit", "tune"],
        ["submit", "predict"],
        ["submit", "evidence"],
        ["submit", "status"],
    ],
)
def test_every_command_has_help(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lesionsam(monkeypatch, *command, "--help") == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_every_option_says_what_it_is() -> None:
    def commands(group: object) -> list[object]:
        inner = getattr(group, "commands", {}).values()
        return [group, *(below for command in inner for below in commands(command))]

    for command in commands(typer.main.get_command(app)):
        for parameter in command.params:  # pyright: ignore[reportAttributeAccessIssue]
            assert parameter.help or parameter.name == "help", f"{command}: {parameter.name}"


def test_preset_lists(params: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert lesionsam(monkeypatch, "preset") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == preset_names()
    assert all(len(line.split()) > 4 for line in lines)
    assert params.read_text("utf-8") == default_text()


def test_preset_writes_and_shows_the_difference(
    params: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lesionsam(monkeypatch, "preset", "tiny", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "+  epochs: 2" in shown
    assert "not written" in shown
    assert params.read_text("utf-8") == default_text()
    assert lesionsam(monkeypatch, "preset", "tiny") == 0
    assert "+  epochs: 2" in capsys.readouterr().out
    assert load_config(params).train.epochs == 2
    assert [path.name for path in params.parent.iterdir()] == ["params.yaml"], "no temporary file is left"
    assert lesionsam(monkeypatch, "preset", "tiny") == 0
    assert "nothing to change" in capsys.readouterr().out


def test_preset_makes_a_file_where_there_is_none(params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params.unlink()
    assert lesionsam(monkeypatch, "preset", "demo") == 0
    assert params.read_text("utf-8") == default_text()
    assert lesionsam(monkeypatch, "preset", "published", "--params", "other.yaml") == 0
    assert load_config(params.with_name("other.yaml")).train.epochs == 30


def test_preset_tells_which_files_are_still_to_come(
    params: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lesionsam(monkeypatch, "preset", "folder-csv") == 0
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(":")[1].strip() for note in notes] == ["inputs.boxes", "inputs.folder"]
    assert lesionsam(monkeypatch, "check") == 2
    assert capsys.readouterr().err.startswith("error: params.yaml: 2 issues\n")


@pytest.mark.parametrize(
    ("text", "command", "words"),
    [
        (default_text(), ["preset", "nonesuch"], "preset nonesuch: expected one of demo"),
        (default_text().replace(f"\n  epochs: {EPOCHS}\n", "\n  epochs: many\n"), ["preset", "published"], ""),
        (NEGATIVE, ["preset", "published"], "train.patience: expected an integer"),
        (NEGATIVE, ["params", "upgrade"], "train.patience: expected an integer"),
        (NEGATIVE, ["check"], "train.patience: expected an integer"),
        ("train: [\n", ["preset", "demo"], "expected YAML"),
        ("train: [\n", ["check"], "expected YAML"),
    ],
)
def test_errors_are_one_line_and_change_nothing(
    params: Path,
    text: str,
    command: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    params.write_text(text, "utf-8")
    status = lesionsam(monkeypatch, *command)
    printed = capsys.readouterr().err
    if not words:  # the preset replaces the key that was wrong
        assert status == 0
        return
    assert status == 2
    assert printed.startswith("error: ")
    assert words in printed
    assert printed.count("\n") == 1
    assert params.read_text("utf-8") == text


def test_check_sums_up(params: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert lesionsam(monkeypatch, "check") == 0
    printed = capsys.readouterr().out
    for words in ("synthetic", "simulated", "compact", "contrastive", f"{EPOCHS} epochs"):
        assert words in printed
    params.unlink()
    assert lesionsam(monkeypatch, "check") == 2
    assert "lesionsam preset demo" in capsys.readouterr().err


def test_upgrade_writes(params: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    older = "".join(line for line in default_text().splitlines(keepends=True) if not line.startswith("  temperature:"))
    assert older != default_text()
    params.write_text(older, "utf-8")
    assert lesionsam(monkeypatch, "params", "upgrade", "--dry-run") == 0
    assert params.read_text("utf-8") == older
    assert lesionsam(monkeypatch, "params", "upgrade") == 0
    assert "+  temperature: 0.1             # temperature of InfoNCE" in capsys.readouterr().out
    assert params.read_text("utf-8") == default_text()


def test_upgrade_of_a_named_file(params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = params.with_name("other.yaml")
    other.write_text(default_text().replace("version: 2", "version: 1"), "utf-8")
    assert lesionsam(monkeypatch, "params", "upgrade", "other.yaml") == 0
    assert other.read_text("utf-8") == params.read_text("utf-8") == default_text()


def test_show(params: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert lesionsam(monkeypatch, "params", "show", "method.weights.contrast") == 0
    line = "method.weights.contrast: 0.02  (a number of at least 0)  # contrastive term, InfoNCE (published: alpha)\n"
    assert capsys.readouterr().out == line
    assert lesionsam(monkeypatch, "params", "show") == 0
    assert len(capsys.readouterr().out.splitlines()) > 100
    assert lesionsam(monkeypatch, "params", "show", "method.weight") == 2
    assert "did you mean method.weights?" in capsys.readouterr().err


def test_check_notes_emulated_bf16(
    params: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params.write_text(default_text().replace("precision: fp32", "precision: bf16"), "utf-8")
    monkeypatch.setattr("lesionsam.utils.devices.slow_precision", lambda precision, device: f"{precision} on {device}")
    assert lesionsam(monkeypatch, "params", "check") == 0
    assert capsys.readouterr().err.startswith("note: bf16 on c")


def test_missing_arguments_are_usage_errors(
    params: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lesionsam(monkeypatch, "smoke") == 2
    assert "--model" in capsys.readouterr().err
    assert lesionsam(monkeypatch, "predict", "image.png") == 2
    assert "--boxes" in capsys.readouterr().err

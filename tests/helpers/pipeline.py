"""Copies of the repository in which stages run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


WEIGHTS = ("best.safetensors", "last.safetensors", "head.safetensors")


LIMIT_S = 600  # for one command; ten times what it takes


def environment() -> dict[str, str]:
    """The test's own, without its MLflow store: a stage must find the one in the copy's root by itself."""
    return {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "PYTHONPATH")}


def run(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the folder; a failure shows what it printed."""
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def lesionsam(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line of the copy, installed or not."""
    program = "import sys; sys.path.insert(0, 'src'); from lesionsam.cli.app import main; main()"
    return run(folder, sys.executable, "-c", program, *arguments)


def set_parameter(folder: Path, key: str, value: object) -> None:
    """Change one value of params.yaml, comments kept."""
    yaml = YAML()
    params = yaml.load((folder / "params.yaml").read_text(encoding="utf-8"))
    section, name = key.split(".")
    assert name in params[section], key
    params[section][name] = value
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def repository_copy(folder: Path) -> Path:
    """The files git knows or would take, as a repository of their own with one commit, set to the tiny preset.

    `dvc.lock` stays behind: where `make demo` has run it speaks of that run.
    """
    listed = run(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    lesionsam(folder, "preset", "tiny")
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "init.defaultBranch=main")
    run(folder, *git, "init", "--quiet")
    run(folder, "git", "config", "user.name", "test")
    run(folder, "git", "config", "user.email", "test@localhost")
    run(folder, "git", "add", "--all")
    run(folder, *git, "commit", "--quiet", "--message", "copy")
    return folder


def kill_in_training(folder: Path, *, whole_group: bool) -> None:
    """Start `dvc repro train` and kill -9 it (or only DVC, not the stage) once a first epoch's state is on disk."""
    with (folder / "killed.log").open("w") as log:
        process = subprocess.Popen(
            ["dvc", "repro", "train"], cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + LIMIT_S
        while not list(folder.glob(".scratch/**/state-*.pt")):
            printed = (folder / "killed.log").read_text(encoding="utf-8")
            assert process.poll() is None, f"training ended before it could be killed:\n{printed}"
            assert time.monotonic() < deadline, "no state was saved"
            time.sleep(0.02)
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
    assert not (folder / "models" / "adapted" / "best.safetensors").exists(), "it was killed too late to prove anything"


def same_weights(one: Path, other: Path) -> None:
    """Every tensor of every weight file equal, bit for bit."""
    for name in WEIGHTS:
        left, right = load_file(one / "models" / "adapted" / name), load_file(other / "models" / "adapted" / name)
        assert left.keys() == right.keys()
        different = [key for key in left if not left[key].equal(right[key])]
        assert not different, f"{name}: {different[:3]}"

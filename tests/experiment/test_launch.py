"""Refusals of a training in several processes, and how it ends: really started, really killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.pipeline import environment, repository_copy, run, same_weights, set_parameter
from lesionsam.config.edit import fit
from lesionsam.config.load import Config, default_values, unflatten, validate
from lesionsam.errors import UserError
from lesionsam.experiment import launch

WORKER = "lesionsam.pipeline.worker"


def config(**changes: object) -> Config:
    keys = {name.replace("__", "."): value for name, value in changes.items()}
    return validate(fit(unflatten({"runtime.device": "cpu"} | keys, default_values())))


def test_more_processes_than_cores_are_refused() -> None:
    there = os.cpu_count() or 1
    with pytest.raises(UserError, match=rf"runtime\.devices: {there + 1} asked for, this machine has {there} CPU"):
        launch.devices_here(config(runtime__devices=there + 1))
    assert launch.devices_here(config(runtime__devices="auto")) == 1, "on a CPU"


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size: 8 images cannot be shared equally by 3 processes"):
        launch.check_batch(config(), 3)
    launch.check_batch(config(), 4)


def test_several_machines_need_slurm_or_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    with pytest.raises(UserError, match=r"runtime\.nodes: 2 machines, but this is no Slurm job; .*torchrun --nnodes 2"):
        launch.launch(config(runtime__nodes=2))
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    with pytest.raises(UserError, match="this Slurm job has 1"):
        launch.launch(config(runtime__nodes=2))


def test_tasks_of_slurm_join_and_a_batch_script_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_ID", "4294967291")
    assert not launch.is_joining()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert launch.is_joining()


def test_the_reason_is_the_first_process_that_failed_by_itself() -> None:
    ended, killed, lost = (
        SimpleNamespace(exitcode=code, error_file_data={}) for code in (-signal.SIGTERM, -signal.SIGKILL, 1)
    )
    lost.error_file_data = {"message": {"message": f"{launch.LOST}, or cannot be reached (reset)"}}
    assert launch._reason({0: ended, 1: killed, 2: lost}).startswith("process 1 was ended by SIGKILL")
    assert "(another process of this training has ended, or cannot be reached (reset))" in launch._reason({0: lost})
    told = SimpleNamespace(exitcode=2, error_file_data={"message": {"message": "data/boxes.csv: no such file"}})
    assert launch._reason({0: lost, 1: told}) == "data/boxes.csv: no such file"


# ---- a whole training --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose data and weights are there; two processes train it."""
    folder = repository_copy(tmp_path_factory.mktemp("prepared") / "project")
    for key, value in {"tracking.enabled": False, "runtime.device": "cpu", "runtime.devices": 2}.items():
        set_parameter(folder, key, value)
    run(folder, "dvc", "repro", "weights", "boxes")
    return folder


def workers(folder: Path) -> list[int]:
    """The numbers of the training's processes."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            here = entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder)
            if here and WORKER in (entry / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


@pytest.mark.pipeline
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_process_ends_all_and_any_number_goes_on(prepared: Path, tmp_path: Path) -> None:
    whole, killed, alone = (
        Path(shutil.copytree(prepared, tmp_path / name, symlinks=True)) for name in ("whole", "killed", "alone")
    )
    run(whole, sys.executable, "stages/train.py")
    log = tmp_path / "killed.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "stages/train.py"], cwd=killed, env=environment(), stdout=file, stderr=file
        )
    deadline = time.monotonic() + 600
    while not list(killed.glob(".scratch/**/state-*.pt")):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(workers(killed)[-1], signal.SIGKILL)
    assert process.wait(120) == 2
    assert not workers(killed), "no process is left"
    assert "was ended by SIGKILL" in log.read_text()
    assert "Traceback" not in log.read_text()
    shutil.rmtree(alone)
    shutil.copytree(killed, alone, symlinks=True)
    assert "resuming after" in run(killed, sys.executable, "stages/train.py").stdout
    same_weights(killed, whole)
    set_parameter(alone, "runtime.devices", 1)
    assert "resuming after" in run(alone, sys.executable, "stages/train.py").stdout, "a state of two goes on as one"


@pytest.mark.pipeline
def test_a_fault_is_one_line(prepared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "project", symlinks=True))
    (folder / "data" / "boxes.csv").unlink()
    done = run(folder, sys.executable, "stages/train.py", check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "data/boxes.csv" in done.stderr

"""Jobs on a real Slurm of one node: time limits, requeued trainings, sweeps and predictions in arrays; refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import optuna
import psutil
import pytest
from PIL import Image

from helpers.cli import lesionsam
from helpers.pipeline import repository_copy, run, same_weights, set_parameter
from helpers.postgres_server import postgres
from helpers.postgres_server import why_not as why_no_postgres
from helpers.slurm_server import SlurmServer, slurm_server, why_not
from helpers.sweep_project import prepare, tried
from helpers.tiny import tiny_sam
from lesionsam.cluster.slurm import submit
from lesionsam.config.load import default_values, load_config, validate
from lesionsam.config.presets import apply_preset
from lesionsam.inference.files import predict_files
from lesionsam.models.checkpoint import save_sam
from lesionsam.sweep.storage import opened

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900.0
RESOURCES = ("--gpus", "0", "--cpus", "2", "--memory-gb", "1.5")
# Notes Ctrl-C, and that it came for the second time.
NOTES = """
import signal, sys, time
from pathlib import Path
again = Path("interrupted").exists()
def interrupted(number, frame):
    Path("interrupted").write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGINT, interrupted)
Path("begun").write_text("")
time.sleep(0 if again else 300)
Path("done").write_text("")
"""


@pytest.fixture(scope="module")
def server() -> Iterator[SlurmServer]:
    """A running cluster."""
    if reason := why_not():
        pytest.skip(reason)
    with slurm_server() as running:
        yield running


@pytest.fixture
def cluster(server: SlurmServer, monkeypatch: pytest.MonkeyPatch) -> SlurmServer:
    """The same, with its configuration in this process's environment."""
    monkeypatch.setenv("SLURM_CONF", server.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", server.environment["PATH"])
    return server


def call(folder: Path, cluster: SlurmServer, *arguments: str) -> str:
    """Return what `lesionsam submit` prints in a folder."""
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "lesionsam", "submit", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(is_done: Callable[[], object], folder: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_done():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in folder.glob("slurm/*_log.out"))
            raise AssertionError(f"not done after {LIMIT_S:.0f} s:\n{logs}")
        time.sleep(0.1)


def ended(cluster: SlurmServer, job: str) -> bool:
    return cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def start_again(cluster: SlurmServer, job: str, folder: Path) -> None:
    """Wait until a job was queued again, and start it at once: Slurm holds such a job back for two minutes.

    Its node must have ended the first run, or Slurm cannot launch the second.
    """
    wait_for(
        lambda: cluster.state(job) == "PENDING" and cluster.call("sinfo", "-h", "-o", "%T").strip() == "idle", folder
    )
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")


def log(folder: Path, job: str) -> str:
    return (folder / "slurm" / f"{job}_0_log.out").read_text()


@pytest.mark.pipeline
def test_a_time_limit_interrupts_a_command_which_is_queued_again(
    cluster: SlurmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params.yaml").write_text("")
    (tmp_path / "notes.py").write_text(NOTES)
    values = default_values()
    values["cluster"] |= {"minutes": 1, "gpus": 0, "cpus": 1, "memory_gb": 0.5, "requeues": 2}
    section = validate(values).cluster
    begun = time.monotonic()
    job = submit([[sys.executable, "notes.py"]], name="notes", cluster=section, root=tmp_path)
    wait_for((tmp_path / "interrupted").exists, tmp_path)
    assert time.monotonic() - begun < 90
    start_again(cluster, job, tmp_path)
    wait_for(lambda: ended(cluster, job), tmp_path)
    assert (cluster.state(job), cluster.field(job, "Restarts")) == ("COMPLETED", "1")
    assert (tmp_path / "done").exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").unlink()
    lost = submit([[sys.executable, "notes.py"]], name="lost", cluster=section, root=tmp_path)
    wait_for(lambda: ended(cluster, lost), tmp_path)
    assert cluster.field(lost, "ExitCode") == "2:0"
    assert "params.yaml: no such file on node" in log(tmp_path, lost)
    states = call(tmp_path, cluster, "status").splitlines()
    assert [line.split()[0] for line in states] == [job, lost]
    assert "COMPLETED" in states[0]
    assert f"slurm/{job}_0_log.out" in states[0]
    assert "ENDED" in states[1]


@pytest.mark.pipeline
def test_a_training_that_is_queued_again_ends_as_an_undisturbed_one(cluster: SlurmServer, tmp_path: Path) -> None:
    whole = repository_copy(tmp_path / "whole")
    for key, value in (("runtime.device", "cpu"), ("runtime.devices", 2), ("tracking.enabled", False)):
        set_parameter(whole, key, value)
    run(whole, "dvc", "init", "--quiet", "--force")
    run(whole, "dvc", "repro", "--quiet", "weights")
    shutil.copytree(whole, tmp_path / "job", symlinks=True)
    folder = tmp_path / "job"
    job = call(folder, cluster, "train", *RESOURCES, "train").split()[1].rstrip(":")
    wait_for(lambda: list(folder.glob(".scratch/**/state-*.pt")) or ended(cluster, job), folder)
    assert cluster.state(job) == "RUNNING", log(folder, job)
    cluster.call("scancel", "--batch", "--signal=USR2", job)
    start_again(cluster, job, folder)
    assert not (folder / "models" / "adapted" / "best.safetensors").exists(), "it was interrupted too late"
    run(whole, "dvc", "repro", "--quiet", "train")
    wait_for(lambda: ended(cluster, job), folder)
    assert (cluster.state(job), cluster.field(job, "Restarts")) == ("COMPLETED", "1"), log(folder, job)
    assert "ending after this step, whose state is saved" in log(folder, job)
    same_weights(folder, whole)


@pytest.mark.pipeline
def test_two_workers_finish_the_exact_number_of_trials(
    cluster: SlurmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := why_no_postgres():
        pytest.skip(reason)
    folder = prepare(tmp_path)
    (folder / "src").symlink_to(ROOT / "src")
    with postgres() as url:
        said = call(folder, cluster, "tune", "--tasks", "2", *RESOURCES, "--trials", "5", "--storage", url)
        job = said.split()[1].rstrip(":")
        wait_for(lambda: all(ended(cluster, f"{job}_{task}") for task in (0, 1)), folder)
        logs = "\n".join(log(folder, f"{job}_{task}") for task in (0, 1))
        assert [cluster.state(f"{job}_{task}") for task in (0, 1)] == ["COMPLETED"] * 2, logs
        with opened(url) as storage:
            study = optuna.load_study(study_name=None, storage=storage)
            assert len(tried(study)) == len(study.get_trials(deepcopy=False)) == 5
            assert len({json.dumps(values, sort_keys=True) for values in tried(study)}) == 5


def images(folder: Path, count: int) -> None:
    """Weights, images of their boxes, and params.yaml."""
    save_sam(tiny_sam(sharpness=40.0), folder / "weights.safetensors", name="compact")
    (folder / "images").mkdir()
    rng, lines = np.random.default_rng(0), ["image_id,big_x0,big_y0,big_x1,big_y1"]
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / "images" / f"{k:04d}.png")
        lines.append(f"{k:04d},{5 + k % 20},6,{50 + k % 20},52")
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    shutil.copy(ROOT / "params.yaml", folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.pipeline
def test_a_prediction_with_a_killed_shard_ends_as_in_one_process(
    cluster: SlurmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path, 96)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    call_of = [
        "images",
        "--boxes",
        "boxes.csv",
        "--model",
        "weights.safetensors",
        "--device",
        "cpu",
        "--batch-size",
        "4",
    ]
    said = call(tmp_path, cluster, "predict", "--tasks", "3", *RESOURCES, *call_of, "--out", "out")
    job, merge = (line.split()[1].rstrip(":") for line in said.splitlines())
    shard = f"{job}_1"
    wait_for(lambda: (tmp_path / "out/masks/0034.png").exists(), tmp_path)
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if process.info["cwd"] == str(tmp_path) and "2/3" in (process.info["cmdline"] or ()):
            process.kill()
    for one in (f"{job}_0", shard, f"{job}_2", merge):
        wait_for(lambda one=one: ended(cluster, one), tmp_path)
    assert [cluster.state(f"{job}_{task}") for task in (0, 1, 2)] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert cluster.state(merge) == "FAILED"
    assert "shards unfinished: 2/3; run the same command with --shard 2/3" in log(tmp_path, merge)
    cluster.call("scontrol", "requeue", shard)
    start_again(cluster, shard, tmp_path)
    wait_for(lambda: ended(cluster, shard), tmp_path)
    assert cluster.state(shard) == "COMPLETED", log(tmp_path, shard)
    cluster.call("scontrol", "requeue", merge)
    start_again(cluster, merge, tmp_path)
    wait_for(lambda: ended(cluster, merge), tmp_path)
    assert cluster.state(merge) == "COMPLETED", log(tmp_path, merge)
    monkeypatch.chdir(tmp_path)
    predict_files(
        ["images"], boxes=Path("boxes.csv"), model=Path("weights.safetensors"), out=Path("whole"), batch_size=4
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_slurm_says_which_partitions_there_are(
    cluster: SlurmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert lesionsam(monkeypatch, "submit", "train", "--partition", "gpu") == 2
    assert "cluster.partition: expected one of main, got 'gpu'" in capsys.readouterr().err
    assert lesionsam(monkeypatch, "submit", "train", *RESOURCES, "--memory-gb", "9000") == 2
    assert "error: sbatch: error: " in (said := capsys.readouterr().err)
    assert "see section cluster of params.yaml" in said
    assert lesionsam(monkeypatch, "submit", "status") == 2
    assert "slurm: no jobs; `lesionsam submit` starts some" in capsys.readouterr().err
    (tmp_path / "empty.conf").write_text("")  # Slurm waits a minute for a file that is not there
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "empty.conf"))
    assert lesionsam(monkeypatch, "submit", "train") == 2
    assert "is Slurm's controller running, and SLURM_CONF right?" in capsys.readouterr().err


def test_what_cannot_be_submitted_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lesionsam(monkeypatch, "submit", "train") == 2
    assert "params.yaml: expected a parameter file, found none" in capsys.readouterr().err
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for arguments, message in {
        ("train",): "sbatch: no such command; submit where Slurm's commands are, or try --dry-run",
        ("tune",): "--storage: 4 workers share one study; expected postgresql://USER@HOST/NAME",
        ("tune", "--storage", "a.log"): "src/tune.py: no such file; submit from the root of the repository",
        ("evidence", "pairs"): "pairs: no such folder; expected images/{train,val} and masks/{train,val} in it",
        ("predict", "a.png", "--auto", "--shard", "1/2"): "--shard: the tasks of the array are the shards",
        ("predict", "a.png", "--auto", "--devices", "2"): "--devices: the tasks of the array are the shards",
        ("train", "--partition", "a b"): "cluster.partition: expected a name without blanks, or empty",
        ("status",): "slurm: no jobs; `lesionsam submit` starts some",
    }.items():
        assert lesionsam(monkeypatch, "submit", *arguments) == 2, arguments
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1
    assert lesionsam(monkeypatch, "submit", "predict", "a.png", "--auto", "--batchsize", "2") == 2
    assert "No such option: --batchsize" in capsys.readouterr().err
    assert not (tmp_path / "slurm").exists()


def test_a_dry_run_shows_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, _ = apply_preset("tiny", (ROOT / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(text.replace("  nodes: 1 ", "  nodes: 2 "))
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    section = load_config().cluster
    assert lesionsam(monkeypatch, "submit", "train", "--partition", "gpu", "--dry-run", "train") == 0
    script = capsys.readouterr().out
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --nodes=2",
        f"#SBATCH --time={section.minutes}",
        f"#SBATCH --cpus-per-task={section.cpus}",
        f"#SBATCH --gpus-per-node={section.gpus}",
        "#SBATCH --signal=B:USR2@120",
        f"#SBATCH --output={tmp_path}/slurm/%j_0_log.out",
        f"exec {sys.executable} -u -m submitit.core._submit {tmp_path}/slurm",
        f"# task 0: {sys.executable} -m dvc repro train",
    ):
        assert line in script.splitlines()
    (tmp_path / "check.sh").write_text(script)
    assert subprocess.run(["/bin/bash", "-n", "check.sh"], check=False).returncode == 0
    assert lesionsam(monkeypatch, "submit", "predict", "x", "--auto", "--tasks", "3", "--dry-run", "--out", "o") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-2%3" in script
    assert f"# task 2: {sys.executable} -m lesionsam predict x --auto --out o --shard 3/3" in script
    assert "#SBATCH --dependency=afterany:ARRAY" in script
    assert f"# task 0: {sys.executable} -m lesionsam predict --merge o" in script
    assert lesionsam(monkeypatch, "submit", "tune", "--storage", "a.log", "--trials", "7", "--dry-run") == 0
    assert "src/tune.py --trials 7 --storage a.log" in capsys.readouterr().out
    assert os.listdir(tmp_path).count("slurm") == 0

"""Submit commands to Slurm and say how they are doing.

The job's process is the batch script's own (`exec`), on the first node: the signal before the time limit reaches it
alone, and a training starts its processes on the other nodes itself.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths, pickle_load
from submitit.slurm.slurm import _make_sbatch_string

from lesionsam.cluster.job import Command
from lesionsam.config.schema import Cluster
from lesionsam.errors import UserError, listed

FOLDER = Path("slurm")  # of scripts, logs and the list of jobs, in the project's folder
JOBS = "jobs.jsonl"
SIGNAL_SECONDS = 120  # before the time limit, or half of it where that is less
SOURCE = Path(__file__).resolve().parents[2]
ENDED = {"success": "COMPLETED", "error": "FAILED"}  # by what submitit stored


def submit(
    commands: Sequence[Sequence[str]],
    *,
    name: str,
    cluster: Cluster,
    root: Path,
    nodes: int = 1,
    after: str = "",
    dry_run: bool = False,
) -> str:
    """Submit a job, or an array with a task for each command; with `dry_run`, print the script.

    Args:
        name: of the job. root: the project's folder, which holds params.yaml. nodes: of the job.
        after: number of a job whose end is waited for, whatever it is.
    Returns:
        the job's number; of a dry run: empty.
    Raises:
        UserError: no Slurm, an unknown partition, a folder that cannot be written to, or Slurm refuses the job.
    """
    root = root.resolve()
    folder = root / FOLDER
    parameters = _parameters(name, cluster, root, nodes, after)
    if dry_run:
        text = _make_sbatch_string(
            command=f"{_python()} -u -m submitit.core._submit {shlex.quote(str(folder))}",
            folder=folder,
            map_count=len(commands) if len(commands) > 1 else None,
            **parameters,
        )
        print(text)
        for number, command in enumerate(commands):
            print(f"# task {number}: {shlex.join(command)}")
        return ""
    check_slurm(cluster.partition)
    try:
        folder.mkdir(exist_ok=True)
        executor = submitit.SlurmExecutor(folder, max_num_timeout=cluster.requeues, python=_python())
        executor.update_parameters(**parameters)
        with executor.batch():
            jobs = [executor.submit(Command(command, root)) for command in commands]
        number = jobs[0].job_id.partition("_")[0]
        record = {"job": number, "name": name, "tasks": len(jobs), "submitted": time.strftime("%Y-%m-%d %H:%M:%S")}
        with (folder / JOBS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if "error:" in line] or str(error).splitlines()
        raise UserError(f"sbatch: {lines[-1].removeprefix('sbatch: ')}; see section cluster of params.yaml") from None
    except PermissionError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror}); submit from a folder of your own"
        ) from None
    return number


def _python() -> str:
    """Return the interpreter as the last command of the batch script, whose place it takes."""
    return f"exec {shlex.quote(sys.executable)}"


def _parameters(name: str, cluster: Cluster, root: Path, nodes: int, after: str) -> dict[str, Any]:
    """Return the parameters of submitit's Slurm executor."""
    params = shlex.quote(str(root / "params.yaml"))
    missing = "no such file on node $(hostname); put the project into a folder that all nodes share"
    parameters: dict[str, Any] = {
        "job_name": f"lesionsam-{name}",
        "time": cluster.minutes,
        "nodes": nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cluster.cpus,
        "mem": f"{round(1000 * cluster.memory_gb)}M",
        "setup": [
            f'params={params}; test -f "$params" || {{ echo "error: $params: {missing}" >&2; exit 2; }}',
            f"export PYTHONPATH={shlex.quote(str(SOURCE))}:$PYTHONPATH",
        ],
        "use_srun": False,
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own default, which a cluster that checks such keys does not know
        "additional_parameters": {
            "signal": f"B:USR2@{min(SIGNAL_SECONDS, 30 * cluster.minutes)}",
            "requeue": True,
            "chdir": str(root),
        },
    }
    optional = {
        "partition": cluster.partition,
        "gpus_per_node": cluster.gpus,
        "dependency": f"afterany:{after}" if after else "",
    }
    return parameters | {key: value for key, value in optional.items() if value}


def check_slurm(partition: str) -> None:
    """Raise UserError unless Slurm answers and has the partition; empty: its default."""
    if missing := [name for name in ("sbatch", "squeue", "sinfo") if shutil.which(name) is None]:
        raise UserError(f"{missing[0]}: no such command; submit where Slurm's commands are, or try --dry-run")
    known = _lines("sinfo", "--noheader", "--format=%R")
    if partition and (unknown := set(partition.split(",")) - set(known)):
        raise UserError(
            f"cluster.partition: expected one of {listed(sorted(set(known)))}, got {sorted(unknown)[0]!r}; set it in "
            "params.yaml or by --partition"
        )


def _lines(*command: str) -> list[str]:
    """Return what one of Slurm's commands prints.

    Raises:
        UserError: it fails, as it does without an answer from the controller.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(f"{why}; is Slurm's controller running, and SLURM_CONF right?")
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def job_states(root: Path) -> list[dict[str, str]]:
    """Return name, task, state and log of every job that was submitted from a project's folder, oldest first.

    The state is Slurm's while the job is known to it as waiting or running, then COMPLETED or FAILED as the job noted
    it, or ENDED where it could not note anything: it was cancelled or killed.

    Raises:
        UserError: no job was submitted here, or Slurm does not answer.
    """
    folder = root.resolve() / FOLDER
    try:
        records = [json.loads(line) for line in (folder / JOBS).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise UserError(f"{folder}: no jobs; `lesionsam submit` starts some from the folder of params.yaml") from None
    check_slurm("")
    queued = dict(line.split("|", 1) for line in _lines("squeue", "--me", "--array", "--noheader", "--format=%i|%T|%r"))
    states = []
    for record in records:
        many = record["tasks"] > 1
        for task in range(record["tasks"]):
            job = f"{record['job']}_{task}" if many else record["job"]
            states.append(
                {
                    "job": job,
                    "name": record["name"],
                    "submitted": record["submitted"],
                    "state": _queue_state(queued[job]) if job in queued else _end_state(folder, job),
                    "log": str(FOLDER / f"{job}_0_log.out"),
                }
            )
    return states


def _queue_state(text: str) -> str:
    """Return `PENDING (Resources)` for `PENDING|Resources`, and the state alone where the reason is None."""
    state, _, reason = text.partition("|")
    return state if reason in ("", "None") else f"{state} ({reason})"


def _end_state(folder: Path, job: str) -> str:
    path = JobPaths(folder, job_id=job, task_id=0).result_pickle
    if not path.is_file():
        return "ENDED"
    outcome, _ = pickle_load(path)
    return ENDED[outcome]

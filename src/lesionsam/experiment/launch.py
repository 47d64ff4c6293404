"""Start the processes of a training on several devices, or join those that torchrun or Slurm has started.

A training's processes share one project folder. The first one writes, tracks and prints.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from lesionsam.config.load import Config
from lesionsam.errors import Interrupted, UserError
from lesionsam.parallel.collectives import gather_objects, process_group, rank
from lesionsam.utils.devices import torch_device
from lesionsam.utils.processes import exit_without

WORKER = "lesionsam.pipeline.worker"
PARENT = "LESIONSAM_LAUNCHER"  # environment variable: process number of the launcher, which its processes end with
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
JOIN_SECONDS = 300.0  # to wait for the other processes
SHUTDOWN_SECONDS = 120  # for a step to end and its state to be saved, after a signal
BATCH_STEP = 2**32 - 16  # Slurm's numbers from here on are a job's batch script and other steps without tasks
LOST = "another process of this training has ended"


# ---- how many --------------------------------------------------------------------------------------------------------


def devices_here(config: Config) -> int:
    """Return the number of processes that train on this machine.

    Raises:
        UserError: more than there are devices, or one device asked for by name.
    """
    wanted, name = config.runtime.devices, config.runtime.device
    on_gpu = torch_device(name).type == "cuda"
    there = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    if wanted == "auto":
        return there if on_gpu and ":" not in name else 1
    if wanted > 1 and ":" in name:
        raise UserError(f"runtime.devices: {wanted} processes, but runtime.device {name!r} names one GPU; use auto")
    if wanted > there:
        what = "GPU(s)" if on_gpu else "CPU core(s)"
        raise UserError(f"runtime.devices: {wanted} asked for, this machine has {there} {what}; lower it or use auto")
    return wanted


def check_batch(config: Config, num_processes: int) -> None:
    """Check that a batch is shared equally.

    Raises:
        UserError: the number of processes does not divide the batch.
    """
    if config.train.batch_size % num_processes:
        raise UserError(
            f"train.batch_size: {config.train.batch_size} images cannot be shared equally by {num_processes} "
            f"processes; use a multiple of {num_processes}, or another runtime.devices"
        )


# ---- join ------------------------------------------------------------------------------------------------------------


def is_joining() -> bool:
    """Return whether this process is one of several that torchrun, Slurm's srun or `launch` has started."""
    e = os.environ
    is_step = int(e.get("SLURM_STEP_ID", BATCH_STEP)) < BATCH_STEP
    return int(e.get("WORLD_SIZE", "1")) > 1 or (is_step and int(e.get("SLURM_NTASKS", "1")) > 1)


@contextmanager
def joined(config: Config) -> Iterator[None]:
    """Join the other processes while the block runs.

    Raises:
        UserError: they do not come, the batch cannot be shared, or one of them ends.
    """
    if parent := os.environ.get(PARENT):
        exit_without(int(parent))
    e = os.environ
    if "WORLD_SIZE" not in e:
        e.update(slurm_environment(e))
    check_batch(config, int(e["WORLD_SIZE"]))
    device, local = torch_device(config.runtime.device), int(e.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine finds {torch.cuda.device_count()} GPU(s); start at most as many "
                "processes as there are GPUs"
            )
        device = torch.device("cuda", local)
    elif not config.runtime.num_threads:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(e.get("LOCAL_WORLD_SIZE", e["WORLD_SIZE"]))))
    try:
        with process_group(device, join_seconds=JOIN_SECONDS):
            yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"{LOST}, or cannot be reached ({reason})", exit_code=1) from None


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed since another process is gone."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "gloo", "NCCL", "Gloo", "process group watchdog")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def slurm_environment(e: Mapping[str, str]) -> dict[str, str]:
    """Return torch's variables for a task that srun has started."""
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", e.get("SLURM_STEP_NODELIST", e.get("SLURM_JOB_NODELIST", ""))],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    port = 20_000 + (101 * int(e["SLURM_JOB_ID"]) + int(e["SLURM_STEP_ID"])) % 20_000
    per_node = e.get("SLURM_STEP_TASKS_PER_NODE", e["SLURM_NTASKS"]).partition("(")[0]
    return {
        "RANK": e["SLURM_PROCID"],
        "WORLD_SIZE": e["SLURM_NTASKS"],
        "LOCAL_RANK": e["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": per_node,
        "MASTER_ADDR": e.get("MASTER_ADDR") or (nodes[0] if nodes else "127.0.0.1"),
        "MASTER_PORT": e.get("MASTER_PORT") or str(port),
    }


def check_agreement(what: Mapping[str, str]) -> None:
    """Compare values of all processes, such as digests of parameters and code.

    Args:
        what: name of a thing -> its value in this process.
    Raises:
        UserError: a process has another value.
    """
    for number, (host, other) in enumerate(gather_objects((socket.gethostname(), dict(what)))):
        if differing := [name for name in what if other.get(name) != what[name]]:
            raise UserError(
                f"process {rank()} on {socket.gethostname()} and process {number} on {host} differ in "
                f"{' and '.join(differing)}; start all of them in the same project folder and environment"
            )


# ---- launch ----------------------------------------------------------------------------------------------------------


def launch(config: Config) -> None:
    """Train in `runtime.devices` processes on each of `runtime.nodes` machines; return when all of them are done.

    Raises:
        UserError: the message of the first process that failed. Interrupted: a signal; the state is saved.
    """
    count, nodes = devices_here(config), config.runtime.nodes
    check_batch(config, count * nodes)
    if nodes > 1:
        _launch_on_nodes(count, nodes)
    else:
        _launch_here(count)


def _launch_here(count: int) -> None:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failure is told in one line
    print(f"starting {count} processes", flush=True)
    folder = tempfile.mkdtemp(prefix="lesionsam-launch-")
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_SECONDS,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )
    os.environ |= {PARENT: str(os.getpid()), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    try:
        elastic_launch(settings, sys.executable)("-m", WORKER)
    except ChildFailedError as error:
        raise UserError(_reason(error.failures)) from None
    except SignalException as error:
        raise Interrupted(error.sigval) from None
    finally:
        os.environ.pop(PARENT, None)
        shutil.rmtree(folder, ignore_errors=True)


def _reason(failures: Mapping[int, object]) -> str:
    """Return why a training failed: a process's own message, else the signal or status that ended one."""
    told, ended = [], []
    # The launcher ends the others with SIGTERM, and those that lose a connection end by themselves.
    for number, failure in sorted(failures.items(), key=lambda item: (_ending(item[1]), item[0])):
        content = getattr(failure, "error_file_data", {}) or {}
        message = content.get("message") if isinstance(content, dict) else None
        if isinstance(message, dict):
            told.append(str(message["message"]))
        code = getattr(failure, "exitcode", 1)
        ended.append(
            f"process {number} was ended by {signal.Signals(-code).name}" if code < 0 else f"process {number} failed"
        )
    own = [message for message in told if not message.startswith(LOST)]
    if own:
        return own[0]
    lost = f" ({told[0]})" if told and "failed" in ended[0] else ""
    return f"{ended[0]}{lost}, and the others with it; the same command goes on from the last saved state"


def _ending(failure: object) -> int:
    """Return 0 for a process that a signal has ended, 1 for one that failed, 2 for one that the launcher has ended."""
    code = getattr(failure, "exitcode", 1)
    return 2 if code == -signal.SIGTERM else 0 if code < 0 else 1


def _launch_on_nodes(count: int, nodes: int) -> None:
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", "0"))
    module = f"-m {WORKER}"
    if not allocated:
        raise UserError(
            f"runtime.nodes: {nodes} machines, but this is no Slurm job; submit one (lesionsam submit train), or start "
            f"on each machine: torchrun --nnodes {nodes} --nproc-per-node {count} --rdzv-backend c10d "
            f"--rdzv-endpoint HOST:29500 {module}"
        )
    if allocated < nodes:
        raise UserError(f"runtime.nodes: {nodes} machines, this Slurm job has {allocated}; ask for more, or lower it")
    command = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks-per-node={count}", "--kill-on-bad-exit=1"]
    command += [sys.executable, *module.split()]
    print(f"starting {nodes} x {count} processes: {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if code:
        raise UserError("a process of this training failed, see above; the same command goes on from the saved state")


def is_launched() -> bool:
    """Return whether `launch` of this machine has started this process; it prints for it."""
    return PARENT in os.environ


def write_error(error: UserError) -> bool:
    """Write a process's message to where its launcher reads it; return False without a launcher."""
    if not (path := os.environ.get(ERROR_FILE)):
        return False
    content = {"message": {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}}
    Path(path).write_text(json.dumps(content), encoding="utf-8")
    return True


def num_processes(config: Config) -> int:
    """Return how many processes a training is to have, on all machines together."""
    return devices_here(config) * config.runtime.nodes

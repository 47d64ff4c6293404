"""Prediction on several devices of this machine: a process with a shard for each, then the merge."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lesionsam.errors import UserError, run_guarded
from lesionsam.inference.auto import AutoMaskOptions
from lesionsam.inference.files import predict_files
from lesionsam.inference.shards import Shard, merge_shards
from lesionsam.utils.processes import exit_without, start_python

POLL_SECONDS = 0.1
WHOLE_EXITS = (0, 1)  # of a shard that ran to its end; 1: with faults
ERROR = "error: "  # begins the line of a `UserError`


def num_devices(text: str, device: str) -> int:
    """Return the number of processes.

    Args:
        text: a number, or auto: all GPUs, 1 without any. device: auto, cpu or cuda.
    Raises:
        UserError: more GPUs than there are, or a device of one index.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--devices: each process has a device of its own; use --device auto, cpu or cuda, not {device!r}"
        )
    num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if text == "auto":
        return max(1, num_gpus)
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise UserError(f"--devices: expected a number from 1 to 1024, or auto, got {text!r}")
    if (num_gpus or device == "cuda") and int(text) > num_gpus:
        raise UserError(f"--devices {text}: expected at most {num_gpus}, the number of GPUs here; or use --device cpu")
    return int(text)


def predict_on_devices(count: int, *, device: str, out: Path, **options: Any) -> int:
    """Predict with a process and a device for each of `count` shards, and merge them.

    On a CPU the processes share its cores.

    Args:
        device: auto, cpu or cuda. options: the other arguments of `predict_files`.
    Returns:
        exit code, as `predict_files`.
    Raises:
        UserError: a process failed; the others are ended, and the same call goes on where they were.
    """
    is_gpu = device != "cpu" and torch.cuda.is_available()
    values = options | {"out": out, "device": "cuda" if is_gpu else "cpu"}
    text = json.dumps(values, default=lambda value: asdict(value) if isinstance(value, AutoMaskOptions) else str(value))
    workers = [Worker(Shard(k, count), text, is_gpu) for k in range(1, count + 1)]
    try:
        failed = _wait(workers)
    finally:  # Ctrl-C, too
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.terminate()
        for worker in workers:
            worker.process.wait()
            worker.reader.join()
    if failed is not None:
        raise UserError(failed.failure())
    for worker in workers:
        worker.print_last()
    return merge_shards(out)


class Worker:
    """A process that predicts a shard; what it prints on stderr is printed here, the last line at its end."""

    def __init__(self, shard: Shard, values: str, is_gpu: bool) -> None:
        self.shard, self.last = shard, ""
        self.process = _start(shard, values, is_gpu)
        self.reader = threading.Thread(target=self._forward, daemon=True)
        self.reader.start()

    def _forward(self) -> None:
        if self.process.stderr is not None:
            with self.process.stderr as lines:
                for line in lines:
                    self.print_last()
                    self.last = line

    def print_last(self) -> None:
        """Print the line that is held back, in case it names the reason why the process failed."""
        if self.last:
            print(self.last, end="", file=sys.stderr, flush=True)
        self.last = ""

    def failure(self) -> str:
        """Return why the process failed; workers that fail alike are reported once."""
        if self.last.startswith(ERROR):
            return self.last.removeprefix(ERROR)
        self.print_last()
        return f"--devices: shard {self.shard} ended with status {self.process.returncode}; the same command goes on"


def _start(shard: Shard, values: str, is_gpu: bool) -> subprocess.Popen[str]:
    """Start the process of a shard."""
    if is_gpu:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment = {"CUDA_VISIBLE_DEVICES": visible[shard.index - 1] if visible else str(shard.index - 1)}
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // shard.count)))}
    return start_python(
        __name__,
        str(shard),
        values,
        environment=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait(workers: list[Worker]) -> Worker | None:
    """Wait for all processes to end; return the first that fails, None if none does."""
    waiting = list(workers)
    while waiting:
        for worker in list(waiting):
            try:
                status = worker.process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            if status not in WHOLE_EXITS:
                return worker
            waiting.remove(worker)
    return None


def _run(shard: str, text: str) -> None:
    """Predict a shard, in a process that `predict_on_devices` started."""
    values: Mapping[str, Any] = json.loads(text)
    paths = {name: Path(values[name]) for name in ("model", "out", "boxes", "points") if values.get(name)}
    options = AutoMaskOptions(**values["options"])
    sys.exit(predict_files(**{**values, **paths, "options": options, "shard": Shard.parse(shard)}))


if __name__ == "__main__":
    exit_without(int(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGTERM))
    run_guarded(lambda: _run(*sys.argv[2:]))

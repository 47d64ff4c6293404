"""The workers of a sweep on this machine: started, replaced when killed, interrupted together."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from lesionsam.errors import UserError
from lesionsam.sweep.worker import END_SECONDS, WorkerSpec, run, to_text

MAX_RESTARTS = 3  # of workers that were killed


def run_workers(spec: WorkerSpec) -> None:
    """Run the workers of a spec until they are done, one in this process, several each in its own.

    Raises:
        KeyboardInterrupt: after every worker has handed back its trial. UserError: all workers gave up.
    """
    if spec.workers == 1:
        run(spec)
        return
    threads = 0 if spec.values["runtime"]["num_threads"] else max(1, num_cores() // spec.workers)
    devices = torch.cuda.device_count() if spec.values["runtime"]["device"] == "auto" else 0
    specs = [
        replace(spec, threads=threads, device=f"cuda:{k % devices}" if devices else "") for k in range(spec.workers)
    ]
    processes: list[subprocess.Popen[str]] = []
    restarts = 0
    try:
        for one in specs:
            processes.append(start(one))
        while True:
            for k in [k for k, process in enumerate(processes) if (process.poll() or 0) < 0]:
                if restarts < MAX_RESTARTS and not spec.is_past_deadline():
                    restarts += 1
                    print(
                        f"worker {k + 1} was killed (signal {-processes[k].returncode}); another takes its place",
                        flush=True,
                    )
                    processes[k] = start(specs[k])
            if all(process.poll() is not None for process in processes):
                break
            time.sleep(0.2)
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()  # before a worker has loaded its libraries this ends it, later it hands back its trial
        for process in processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        raise
    if all(process.returncode for process in processes):
        raise UserError("every worker gave up, see above; the same command goes on", exit_code=1)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(spec: WorkerSpec) -> subprocess.Popen[str]:
    """Start a worker process in a session of its own: Ctrl-C reaches it once, through `run_workers`."""
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if spec.threads:
        environment |= {"OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", "lesionsam.sweep.worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it died at once: `run_workers` sees that
            process.stdin.write(to_text(spec))
            process.stdin.close()
    return process

"""The workers of a sweep on this machine: started and interrupted together."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from dataclasses import asdict, replace

import torch

from lesionsam.errors import UserError
from lesionsam.sweep.worker import END_SECONDS, WorkerSpec, run
from lesionsam.utils.processes import start_python


def run_workers(spec: WorkerSpec) -> None:
    """Run the workers of a spec until they are done, one in this process, several each in its own.

    Raises:
        KeyboardInterrupt: after every worker has handed back its trial. UserError: all workers gave up.
    """
    if spec.workers == 1:
        run(spec)
        return
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = 0 if spec.values["runtime"]["num_threads"] else max(1, num_cores // spec.workers)
    devices = torch.cuda.device_count() if spec.values["runtime"]["device"] == "auto" else 0
    specs = [
        replace(spec, threads=threads, device=f"cuda:{k % devices}" if devices else "") for k in range(spec.workers)
    ]
    processes: list[subprocess.Popen[str]] = []
    try:
        for one in specs:
            processes.append(start(one))
        for k, process in enumerate(processes, 1):
            if process.wait() < 0:
                print(f"worker {k} was killed (signal {-process.returncode}); the others took its trials", flush=True)
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


def start(spec: WorkerSpec) -> subprocess.Popen[str]:
    """Start a worker process; Ctrl-C reaches it once, through `run_workers`."""
    threads = {"OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)} if spec.threads else {}
    process = start_python("lesionsam.sweep.worker", environment=threads, stdin=subprocess.PIPE, text=True)
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it died at once: `run_workers` sees that
            process.stdin.write(json.dumps(asdict(spec)))
            process.stdin.close()
    return process

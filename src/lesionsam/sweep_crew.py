"""The workers of a sweep on this machine: started, replaced when killed, interrupted together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from lesionsam.errors import UserError
from lesionsam.sweep_worker import Plan, run, to_text

END_SECONDS = 120.0  # patience with workers that were interrupted
MAX_RESTARTS = 3  # of workers that were killed


def is_late(plan: Plan) -> bool:
    """Whether the time is over."""
    return bool(plan.deadline) and time.time() > plan.deadline


def crew(plan: Plan, workers: int) -> None:
    """Work on a plan, alone or with others, until it is done; workers that were killed are replaced.

    Raises:
        KeyboardInterrupt: after every worker has closed its trial. UserError: the workers gave up.
    """
    if workers == 1:
        run(plan)
        return
    threads = 0 if plan.values["runtime"]["num_threads"] else max(1, (os.cpu_count() or 1) // workers)
    devices = torch.cuda.device_count() if plan.values["runtime"]["device"] == "auto" else 0
    plans = [replace(plan, threads=threads, device=f"cuda:{k % devices}" if devices else "") for k in range(workers)]
    processes = [start(one) for one in plans]
    restarts = 0
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.2)
            killed = [k for k, process in enumerate(processes) if (process.poll() or 0) < 0]
            for k in killed:
                if restarts < MAX_RESTARTS and not is_late(plan):
                    restarts += 1
                    print(
                        f"worker {k + 1} was killed (signal {-processes[k].returncode}); another takes its place",
                        flush=True,
                    )
                    processes[k] = start(plans[k])
    except KeyboardInterrupt:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        raise
    if all(process.returncode for process in processes):
        raise UserError("every worker gave up, see above; the same command goes on", exit_code=1)


def start(plan: Plan) -> subprocess.Popen[str]:
    """A worker process in a session of its own: Ctrl-C reaches it once, through `crew`."""
    paths = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if plan.threads:
        environment |= {"OMP_NUM_THREADS": str(plan.threads), "MKL_NUM_THREADS": str(plan.threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", "lesionsam.sweep_worker"],
        stdin=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    if process.stdin is not None:
        process.stdin.write(to_text(plan))
        process.stdin.close()
    return process

"""A training of two processes, struck once and then started again: all of it ends, and it goes on to the last bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from chaos.chain import processes, processor_seconds, tracebacks
from chaos.run import LIMIT_S, Run
from helpers.pipeline import WEIGHTS, environment, repository_copy, run, set_parameter

FIRST, SECOND, LAUNCHER, TERM, INT = (
    "kill -9 of the first process",
    "kill -9 of the second process",
    "kill -9 of the launcher",
    "SIGTERM to the launcher",
    "Ctrl-C",
)
FAULTS = {FIRST: 3, SECOND: 3, LAUNCHER: 2, TERM: 1, INT: 1}
WORKER = "lesionsam.pipeline.worker"
END_S = 60.0  # for what is left to end; it takes a second on a free core
SHARE = 0.4, 0.97  # of the processor time of an undisturbed training, after which it is struck


class Campaign:
    """Copies of a project on the tiny preset whose data and weights are there, with `runtime.devices: 2`."""

    def __init__(self, folder: Path, *, without: str = "") -> None:
        if without:
            raise SystemExit(f"no protection {without!r} to take out of this campaign")
        self.template, self.undisturbed = folder / "template", folder / "undisturbed"
        self.template.mkdir(parents=True)
        repository_copy(self.template)
        for key, value in {
            "tracking.enabled": False,
            "runtime.devices": 2,
            "runtime.device": "cpu",
            "train.epochs": 6,
        }.items():
            set_parameter(self.template, key, value)
        run(self.template, "dvc", "repro", "weights", "boxes")
        shutil.copytree(self.template, self.undisturbed, symlinks=True)
        started = sum(os.times()[2:4])
        run(self.undisturbed, sys.executable, "stages/train.py")
        self.seconds = sum(os.times()[2:4]) - started

    def run(self, rng: random.Random, folder: Path) -> Run:
        """One training: a strike, then the same command to its end."""
        shutil.copytree(self.template, folder, symlinks=True)
        fault = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
        done, log = Run(fault), folder.with_suffix(".log")
        self.strike(rng, fault, folder, log, done)
        last = run(folder, sys.executable, "stages/train.py", check=False)
        with log.open("a") as file:
            file.write(last.stdout + last.stderr)
        if last.returncode:
            done.broken.append(f"cannot go on: {(last.stdout + last.stderr).splitlines()[-1]}")
        else:
            for name in WEIGHTS:
                ours, theirs = (load_file(each / "models" / "adapted" / name) for each in (folder, self.undisturbed))
                if ours.keys() != theirs.keys() or not all(ours[key].equal(theirs[key]) for key in ours):
                    done.broken.append(f"{name} differs")
            if "resuming after" in last.stdout:
                done.numbers["resumed from a saved state"] = 1
        done.broken += [f"traceback: {ending}" for ending in tracebacks(log)]
        if not done.broken:
            shutil.rmtree(folder)
        return done

    def strike(self, rng: random.Random, fault: str, folder: Path, log: Path, done: Run) -> None:
        """Start the training and strike it after some processor time."""
        limit = self.seconds * rng.uniform(*SHARE)
        with log.open("ab") as file:
            launcher = subprocess.Popen(
                [sys.executable, "stages/train.py"],
                cwd=folder,
                env=environment(),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        while launcher.poll() is None and processor_seconds(list(processes(folder))) < limit:
            time.sleep(0.02)
        workers = sorted(pid for pid, command in processes(folder).items() if WORKER in command)
        if launcher.poll() is not None:
            done.numbers["over before the strike"] = 1
            return
        if fault in (FIRST, SECOND) and len(workers) == 2:
            os.kill(workers[fault == SECOND], signal.SIGKILL)
        elif fault == INT:
            os.killpg(launcher.pid, signal.SIGINT)
        else:
            launcher.send_signal(signal.SIGTERM if fault == TERM else signal.SIGKILL)
        done.kills += 1
        struck = time.monotonic()
        launcher.wait(LIMIT_S)
        while (left := processes(folder)) and time.monotonic() < struck + END_S:
            time.sleep(0.05)
        done.numbers["seconds until all had ended, summed"] = time.monotonic() - struck
        if left:
            done.broken.append(f"orphans after {fault}: {', '.join(left.values())}")
            for pid in left:
                os.kill(pid, signal.SIGKILL)

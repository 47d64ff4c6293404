"""Trainings that are killed at any moment, inside saves above all, and go on to the same weights bit for bit."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from chaos.run import Run, has_traceback, in_child
from helpers.tiny import tiny_data
from helpers.training import CPU, contrastive, run, weights
from lesionsam.data.loader import Loader
from lesionsam.tracking.spool import read_lines
from lesionsam.tracking.tracker import NullTracker
from lesionsam.training import state as training_state
from lesionsam.training.state import load_best
from lesionsam.utils.processes import graceful_stop

EPOCHS, SCORES = 3, (0.1, 0.3, 0.2)
NUM_SAVES = 5  # of one run: the best weights of epochs 1 and 2, the state of each epoch
MOMENT, SAVE, TERM, INT, DAMAGE = (
    "killed at any moment",
    "killed inside a save",
    "SIGTERM",
    "Ctrl-C",
    "killed, newest state damaged",
)
WEIGHTS = {MOMENT: 0.4, SAVE: 0.35, TERM: 0.08, INT: 0.07, DAMAGE: 0.1}
STATUS = {TERM: 143, INT: 130}


def die() -> None:
    """At once, as by the system."""
    os.kill(os.getpid(), signal.SIGKILL)


class Campaign:
    """Small trainings with everything a state holds: teacher, batch norm, AdamW; 0 or 2 threads that load.

    Args:
        without: `in-place` writes one state file over itself, as is often done; `direct` only leaves out the temporary
            file. faults: those to draw from, with weights.
    """

    def __init__(self, folder: Path, *, without: str = "", faults: dict[str, float] | None = None) -> None:
        self.without, self.faults = without, faults or (WEIGHTS if not without else {SAVE: 1.0})
        self.data = tiny_data(8)
        begun = os.times()
        if in_child(lambda: self.train(folder / "undisturbed", 0), folder / "log"):
            raise RuntimeError((folder / "log").read_text())
        ended = os.times()
        self.seconds = ended.children_user + ended.children_system - begun.children_user - begun.children_system
        self.expected = (folder / "undisturbed" / "digest").read_text()
        self.points = points(folder / "undisturbed")

    def train(self, folder: Path, num_workers: int, arm: Callable[[], object] = lambda: None) -> None:
        """One training, as the train stage drives it; what came out is noted beside its states."""
        if self.without:
            training_state.write_tensors = in_place if self.without == "in-place" else direct
        tracker = NullTracker(folder)
        with graceful_stop() as stop_requested:
            method: Any = contrastive()
            arm()
            run(
                method,
                Loader(self.data, device=CPU, num_workers=num_workers),
                folder,
                epochs=EPOCHS,
                evaluate=lambda epoch: {"objective": SCORES[epoch - 1]},
                log=tracker.log,
                say=print,
                stop_requested=stop_requested,
            )
        tracker.close()
        load_best(folder, method.model)
        (folder / "digest").write_text(digest_of(method))

    def run(self, rng: random.Random, folder: Path) -> Run:
        """One training with a fault in it, then the same command again."""
        done = Run(rng.choices(list(self.faults), list(self.faults.values()))[0])
        num_workers, again = rng.choice((0, 2)), rng.choice((0, 2))
        log = folder.with_suffix(".log")
        arm = self.inside_a_save(rng, done) if done.fault == SAVE else self.at_a_moment(rng, done.fault)
        status = in_child(lambda: self.train(folder, num_workers, arm), log)
        done.kills = int(status != 0)
        if done.fault in STATUS and status not in (0, STATUS[done.fault]):
            done.broken.append(f"exit status {status}, expected {STATUS[done.fault]}")
        if done.fault not in STATUS and status == 0:
            done.numbers["over before the kill"] = 1
        if done.fault == DAMAGE and (states := sorted(folder.glob("state-*.pt")))[:-1]:
            content = bytearray(states[-1].read_bytes())
            cut, place = rng.random() < 0.5, rng.randrange(len(content) // 8, len(content) * 3 // 4)
            content[place] ^= 0x40
            states[-1].write_bytes(content[:place] if cut else content)
        status = in_child(lambda: self.train(folder, again), log)
        text = log.read_text()
        done.numbers["resumed"] = int("resuming after" in text)
        if status:
            done.broken.append("cannot go on: " + text.splitlines()[-1])
        else:
            if (folder / "digest").read_text() != self.expected:
                done.broken.append("other weights")
            if points(folder) != self.points:
                done.broken.append("points lost, doubled or changed")
        if has_traceback(log):
            done.broken.append("traceback")
        if not done.broken:
            shutil.rmtree(folder)
        return done

    def at_a_moment(self, rng: random.Random, fault: str) -> Callable[[], object]:
        """After some of the processor time that the training takes; a timer whose signal ends the process, uncaught."""
        number = {TERM: signal.SIGTERM, INT: signal.SIGINT}.get(fault)
        seconds = rng.uniform(0.02, 0.95) * self.seconds

        def arm() -> None:
            if number is not None:
                signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), number))
            signal.setitimer(signal.ITIMER_PROF, seconds)

        return arm

    def inside_a_save(self, rng: random.Random, done: Run) -> Callable[[], object]:
        """At a byte of a file that is being written, before it is synced, before or after it is renamed."""
        place = rng.choice(("bytes", "bytes", "bytes", "fsync", "before the rename", "after the rename"))
        chosen, share = rng.randrange(NUM_SAVES), rng.random()
        done.numbers[f"in a save, {place}"] = 1

        def arm() -> None:
            saves, sync, rename = iter(range(NUM_SAVES)), os.fsync, os.replace
            save: Any = torch.save
            under_way = False

            def dying_save(state: object, file: Any) -> None:
                nonlocal under_way
                under_way = next(saves) == chosen
                if under_way and (place == "bytes" or self.without):  # a direct save knows no other place
                    whole = io.BytesIO()
                    save(state, whole)
                    file.write(whole.getvalue()[: int(share * whole.tell())])
                    file.flush()
                    die()
                save(state, file)

            def dying_sync(descriptor: int) -> None:
                if under_way and place == "fsync":
                    die()
                sync(descriptor)

            def dying_rename(source: Any, target: Any) -> None:
                if under_way and place == "before the rename":
                    die()
                rename(source, target)
                if under_way and place == "after the rename":
                    die()

            torch.save, os.fsync, os.replace = dying_save, dying_sync, dying_rename  # type: ignore[assignment]

        return arm


def digest_of(method: Any) -> str:
    """Hash of every weight and buffer of student and teacher."""
    digest = hashlib.sha256()
    for name, value in sorted(weights(method).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def points(folder: Path) -> list[tuple[int, str, object]]:
    """Every point that a run has logged, doubled ones twice."""
    lines = [entry for entry, _ in read_lines(folder / "metrics.jsonl") if entry is not None]
    return sorted((entry["step"], name, value) for entry in lines for name, value in entry["values"].items())


def direct(path: Path, state: dict[str, Any]) -> None:
    """Without the temporary file."""
    with path.open("wb") as file:
        torch.save(state, file)


def in_place(path: Path, state: dict[str, Any]) -> None:
    """One file of states, written over itself."""
    direct(path.with_name("state-000000000-000000.pt") if path.name.startswith("state-") else path, state)

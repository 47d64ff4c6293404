"""Measure the cost of the protections: `python benchmarks/protections.py`; minutes on one core, no data needed.

An epoch as the demo has it, three ways in turn: the first of a run, in which each term is watched for gradient; a later
one, with loss and gradient checked, a moment to go back to in each step, and a state saved; and one with none of that,
its best weights written straight to their place. From them the share of the demo's training. Beside it that of the
tracker's calls for as many values, when its server is dead; what waits is kept for another process to send.
"""

from __future__ import annotations

import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from lesionsam.cli.smoke import generated_samples
from lesionsam.config.load import flatten, load_config
from lesionsam.data.augment import Augmentation
from lesionsam.data.dataset import open_dataset
from lesionsam.experiment.build import build_method, learning_groups, prepare_sam, training_settings
from lesionsam.experiment.resume import begin, origin_of
from lesionsam.tracking.tracker import Tracker
from lesionsam.training import liveness
from lesionsam.training import loop as training
from lesionsam.training.oom import Snapshot
from lesionsam.utils.files import sha256_file
from lesionsam.utils.locks import file_lock
from lesionsam.utils.progress import progress
from record import Limits, interleaved, provenance, table

ROOT = Path(__file__).resolve().parents[1]
STEPS, ROUNDS, TURNS = 20, 5, 2  # of an epoch, as in the demo; repeated; of each way in a round
LIMIT, DEAD_LIMIT = 3.0, 5.0  # per cent of the demo's training
T_95 = 2.776  # Student's t for 4 degrees of freedom, two-sided
CPU = torch.device("cpu")


@contextmanager
def straight(path: Path | str, mode: str = "wb") -> Iterator[Any]:
    """Write as `atomic_write` does, without temporary file and fsync."""
    with Path(path).open(mode) as file:
        yield file


@contextmanager
def unprotected() -> Iterator[None]:
    """Switch off resume state, rewinding and the checks of loss, gradients and disk."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(liveness, "LIVENESS_STEPS", range(0)))
        for name in ("save_state", "load_state"):
            stack.enter_context(patch.object(training, name, lambda *_: None))
        stack.enter_context(patch.object(Snapshot, "take", lambda *_: None))
        stack.enter_context(patch.object(training.Steps, "take", lambda steps, *_: steps.optimizer.step() or True))
        stack.enter_context(patch("lesionsam.training.state.atomic_write", straight))
        yield


def main() -> int:
    """Measure, print."""
    torch.set_num_threads(1)
    config, limits = load_config(ROOT / "params.yaml"), Limits()
    t, weights = config.train, ROOT / config.model.checkpoint
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = [s for s in generated_samples(folder / "images", STEPS * t.batch_size, 0) if s.split == "train"]
        sam = prepare_sam(config, weights, CPU)
        data = open_dataset(samples, sam.frame, folder / "frames", with_masks=True)
        method, _ = build_method(config, sam, weights, data, CPU)
        runs, points = 0, []

        def epoch(around: Callable[[], Any]) -> None:
            nonlocal runs
            runs += 1
            place = folder / f"run{runs}"
            place.mkdir()
            with around():
                training.fit(
                    method,
                    data,
                    learning_groups(config, method),
                    replace(
                        training_settings(config, data),
                        epochs=1,
                        accumulate=1,
                        patience=0,
                        schedule=lambda step: 1.0,
                        augmentation=Augmentation(flips=t.augment, widen=t.widen),
                    ),
                    evaluate=lambda number: {"objective": 0.5},
                    log=lambda values, step: points.append((dict(values), step)),
                    folder=place,
                    say=lambda line: None,
                )

        def once() -> None:
            """Do what a run does before its first step: take its lock, store its initial state."""
            place = folder / "origin"
            place.mkdir(exist_ok=True)
            with file_lock(place / "lock", "training"):
                begin(place, origin_of(config, [], weights))
                sha256_file(weights)

        def tracked() -> None:
            """Make the tracker calls of a whole training with a server that is down; another process sends."""
            nonlocal runs
            runs += 1
            with socket.socket() as nobody:
                nobody.bind(("127.0.0.1", 0))
                tracker = Tracker.open(
                    folder / f"run{runs}",
                    uri=f"http://127.0.0.1:{nobody.getsockname()[1]}",
                    experiment="protections",
                    root=folder,
                    run_name="dead",
                    params=flatten(config),
                    tags={},
                    system_metrics=config.tracking.system_metrics,
                )
                for number in range(t.epochs):
                    for values, step in points[-logged:]:
                        tracker.log(values, number * STEPS + step)
                tracker.close("FINISHED")

        ways = {
            "first": nullcontext,
            "later": lambda: patch.object(liveness, "LIVENESS_STEPS", range(0)),
            "off": unprotected,
        }
        calls = {way: lambda around=around: epoch(around) for way, around in ways.items()}
        calls |= {"once": once, "tracked": tracked}
        found: dict[str, list[float]] = {way: [] for way in calls}
        epoch(nullcontext)
        logged = len(points)
        for number in progress(range(ROUNDS + 1), total=ROUNDS + 1, title="rounds"):
            for way, spent in interleaved(calls, TURNS if number else 1, CPU, warm=0).items():
                found[way] += [statistics.mean(spent)] if number else []  # the first round warms up
    epochs = t.epochs
    per_round = []
    for first, later, off, before in zip(*(found[way] for way in ("first", "later", "off", "once")), strict=True):
        per_round.append(100 * (before + (first - later) + epochs * (later - off)) / (epochs * off))
    calls_of = [100 * spent / (epochs * off) for spent, off in zip(found["tracked"], found["off"], strict=True)]
    rows = [[way, *(f"{seconds:.3f}" for seconds in found[way])] for way in found]
    print(provenance(CPU))
    print(table(["CPU s", *(f"round {k + 1}" for k in range(ROUNDS))], rows))
    whole = f"of the demo's training ({epochs} epochs of {STEPS} steps), %: "
    for name, each, limit in (("protections", per_round, LIMIT), ("tracking, its server dead", calls_of, DEAD_LIMIT)):
        mean, half = statistics.mean(each), T_95 * statistics.stdev(each) / len(each) ** 0.5
        print(f"{name}, share {whole}" + limits.cell(name, mean, limit, most=True, spread=(mean - half, mean + half)))
    return limits.exit_code()


if __name__ == "__main__":
    sys.exit(main())

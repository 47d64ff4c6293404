"""Faults on purpose, and what must hold all the same: `python tests/chaos/run.py`, or `make chaos RUNS=40 SEED=0`.

Six campaigns, each of real processes that are really killed: trainings, downloads, tracked runs whose server is dead,
predictions into one folder, trainings of two processes, and the whole chain under `dvc repro` on the `tiny` preset.
Every run draws its fault from (seed, number), so that `--only` repeats one. Printed are counts by fault, and the number
of each run that broke a promise; the exit status is then 1. `tests/chaos/test_chaos.py` is the short form.

`--without PROTECTION` takes one out (of trainings: `in-place`, `direct`; of downloads: `range-check`; of
predictions: `keys`; of the chain: `lock`): then promises must break, or the campaign proves nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"  # before torch: a process with threads cannot be forked safely
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from lesionsam.errors import run_guarded  # noqa: E402
from lesionsam.utils.progress import progress  # noqa: E402

CAMPAIGNS = ("training", "downloads", "tracking", "predict", "together", "chain")
LIMIT_S = 3600.0  # for one process; it takes seconds on a free core


@dataclass
class Run:
    """What became of one run.

    Attributes:
        fault: what was done to it. broken: promises that did not hold, in words. kills: processes killed in it.
        numbers: figures that are added up over the runs.
    """

    fault: str
    broken: list[str] = field(default_factory=list)
    kills: int = 0
    numbers: dict[str, float] = field(default_factory=dict)


def in_child(body: Callable[[], object], log: Path) -> int:
    """Run a function in a forked process as a command runs; its exit status as `subprocess` gives it."""
    return status_of(start(body, log), log)


def start(body: Callable[[], object], log: Path) -> int:
    """Begin to run a function in a forked process, whose words go to a file; its number."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with log.open("ab", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                try:
                    run_guarded(body)
                    status = 0
                except SystemExit as ended:
                    status = int(ended.code or 0)
                except BaseException:
                    os.write(2, traceback.format_exc().encode())
                sys.stdout.flush()
                sys.stderr.flush()
        finally:
            os._exit(status)
    return pid


def status_of(pid: int, log: Path) -> int:
    """Exit status of a child when it has ended; it is killed when it does not."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with log.open("a") as file:
        file.write(f"still running after {LIMIT_S:.0f} s\n")
    return 1


def has_traceback(log: Path) -> bool:
    """Whether a process ended in one."""
    return log.exists() and "Traceback (most recent call last)" in log.read_text(encoding="utf-8", errors="replace")


def rng_of(seed: int, campaign: str, number: int) -> random.Random:
    """The source of all that a run draws."""
    return random.Random(f"{seed}/{campaign}/{number}")


def run_campaign(
    name: str, folder: Path, *, runs: int, seed: int, only: int | None = None, **options: Any
) -> Iterator[tuple[int, Run]]:
    """The runs of a campaign with their numbers. options: of its class."""
    folder.mkdir(parents=True, exist_ok=True)
    campaign = importlib.import_module(f"chaos.{name}").Campaign(folder, **options)
    numbers = range(runs) if only is None else (only,)
    for number in progress(numbers, total=len(numbers), title=name):
        yield number, campaign.run(rng_of(seed, name, number), folder / str(number))


def table(name: str, found: list[tuple[int, Run]]) -> str:
    """Counts by fault, as Markdown, then what broke."""
    faults = Counter(run.fault for _, run in found)
    lines = [f"| {name}: fault | runs | processes killed | all promises held |", "|---|---|---|---|"]
    for fault in sorted(faults):
        those = [run for _, run in found if run.fault == fault]
        held = sum(not run.broken for run in those)
        lines.append(f"| {fault} | {len(those)} | {sum(run.kills for run in those)} | {held} |")
    whole = [run for _, run in found]
    lines.append(f"| **all** | {len(whole)} | {sum(run.kills for run in whole)} | {sum(not r.broken for r in whole)} |")
    sums: Counter[str] = Counter()
    for run in whole:
        sums.update(run.numbers)
    lines += [f"{key}: {value:g}" for key, value in sums.items()]
    lines += [f"run {number} ({run.fault}): {'; '.join(run.broken)}" for number, run in found if run.broken]
    return "\n".join(lines)


def main() -> None:
    """The campaigns that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", default=list(CAMPAIGNS), help=", ".join(CAMPAIGNS))
    parser.add_argument("--runs", type=int, default=20, help="of each campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this run alone")
    parser.add_argument("--without", default="", help="a protection to take out")
    parser.add_argument("--keep", type=Path, help="folder for what the runs leave; else a temporary one, removed")
    asked = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
    broken = False
    for name in asked.campaigns or CAMPAIGNS:
        if name not in CAMPAIGNS:
            parser.error(f"campaign: expected {', '.join(CAMPAIGNS)}, got {name}")
        with tempfile.TemporaryDirectory(prefix="lesionsam-chaos-") as folder:
            found: list[tuple[int, Run]] = []
            try:
                found.extend(
                    run_campaign(
                        name,
                        (asked.keep or Path(folder)) / name,
                        runs=asked.runs,
                        seed=asked.seed,
                        without=asked.without,
                        only=asked.only,
                    )
                )
            finally:  # also after Ctrl-C
                print(f"\n{table(name, found)}\n", flush=True)
        broken |= any(run.broken for _, run in found)
    sys.exit(int(broken))


if __name__ == "__main__":
    sys.modules["chaos.run"] = sys.modules["__main__"]  # the campaigns import it by this name
    run_guarded(main)

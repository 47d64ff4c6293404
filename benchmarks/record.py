"""Write dated entries of benchmarks/results.md, newest on top, and time calls."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.md"
HEAD = "# Measured\n\nWritten by the scripts of this folder, newest first; ratios are of one machine at one time.\n"


def record(title: str, text: str) -> None:
    """Put an entry on top of the results."""
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    head, mark, rest = old.partition("\n## ")
    RESULTS.write_text(
        f"{head.rstrip()}\n\n## {datetime.date.today()} {title}\n\n{text.strip()}\n{mark}{rest}", encoding="utf-8"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))


def provenance(device: torch.device) -> str:
    """Return command, commit, machine and library in one line."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "src", "benchmarks/*.py"], cwd=ROOT, capture_output=True, text=True
    )
    where = commit.stdout.strip() + " and changes since" * bool(changed.stdout.strip()) if commit.stdout else "unknown"
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{os.cpu_count()}-core {platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), "
        f"{torch.get_num_threads()} thread(s)"
    )
    return f"commit {where}; {machine}; torch {torch.__version__}"


class Limits:
    """Collect figures and their limits; `missed` names the limits that were missed."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def cell(
        self,
        name: str,
        value: float,
        limit: float | None,
        *,
        most: bool = False,
        form: str = ".2f",
        spread: tuple[float, float] | None = None,
    ) -> str:
        """Return a table cell: a figure, bold, with least and greatest if known, and its limit (`least` or `most`)."""
        text = f"**{value:{form}}**" + (f" ({spread[0]:{form}} to {spread[1]:{form}})" if spread else "")
        if limit is None:
            return text
        bound = f"at {'most' if most else 'least'} {limit}"
        if value <= limit if most else value >= limit:
            return f"{text}, {bound}"
        self.missed.append(f"{name}: {value:{form}}, {bound}")
        return f"{text}, {bound}, MISSED"

    def exit_code(self) -> int:
        """Print missed limits on standard error; return 1 if any was missed."""
        for line in self.missed:
            print(f"missed: {line}", file=sys.stderr)
        return 1 if self.missed else 0


def multiplications(run: Callable[[], object]) -> int:
    """Count the floating-point operations of a call's matrix products and convolutions (torch's counter).

    Ratios of these are the floor that a step's time would have if all arithmetic ran at one speed and nothing else
    took time.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def now(device: torch.device) -> float:
    """Return seconds: CPU time of this process, which other processes disturb least; on a GPU wall-clock time after
    synchronising.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the CPU time of a call, see `now`; GPU time by CUDA events."""
    if device.type == "cuda":
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        run()
        ended.record()
        torch.cuda.synchronize(device)
        return begun.elapsed_time(ended) / 1000
    before = now(device)
    run()
    return now(device) - before


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, *, warm: int = 1, repeats: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round; a round runs every call once (or `repeats` times and takes the
    mean).
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm + rounds):
        for name, run in runs.items():
            spent = seconds(lambda run=run: [run() for _ in range(repeats)], device) / repeats
            if number >= warm:
                found[name].append(spent)
    return found


def ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Return median, least and greatest of the rounds' ratios."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(each), min(each), max(each)

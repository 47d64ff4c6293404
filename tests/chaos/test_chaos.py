"""The short form of `make chaos`: a few faults of each kind, and that without a protection the promises break."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.run import ROOT, Run, table

PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
from chaos import run as chaos
from chaos.training import DAMAGE, INT, MOMENT, SAVE, TERM, Campaign
folder, found = Path(sys.argv[1]), {}
def campaign(title, name, **options):
    runs = chaos.run_campaign(name, folder / title, seed=0, **options)
    found[title] = [(run.fault, run.kills, run.broken) for _, run in runs]
trainings, found["training"] = Campaign(folder), []
for number, fault in enumerate((MOMENT, SAVE, TERM, INT, DAMAGE)):
    trainings.faults = {fault: 1.0}
    run = trainings.run(chaos.rng_of(0, "training", number), folder / str(number))
    found["training"].append((run.fault, run.kills, run.broken))
campaign("downloads", "downloads", runs=6)
campaign("predictions", "predict", runs=4)
campaign("training in place", "training", runs=2, without="in-place")
campaign("downloads unchecked", "downloads", runs=2, without="range-check")
campaign("predictions unkeyed", "predict", runs=6, without="keys")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, int, list[str]]]]:
    """(fault, processes killed, broken promises) of each run; in a process of its own, which forks."""
    folder = tmp_path_factory.mktemp("chaos")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads signals as Linux sends them")
def test_promises_hold(found: dict[str, list[tuple[str, int, list[str]]]]) -> None:
    runs = found["training"] + found["downloads"] + found["predictions"]
    assert [run for run in runs if run[2]] == []
    assert len(runs) == 15
    assert sum(killed for _, killed, _ in runs) >= 8, "processes were killed"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads signals as Linux sends them")
def test_without_a_protection_they_break(found: dict[str, list[tuple[str, int, list[str]]]]) -> None:
    for title, words in (
        ("training in place", "cannot go on"),
        ("downloads unchecked", "not fetched"),
        ("predictions unkeyed", "other rows"),
    ):
        assert any(words in broken for run in found[title] for broken in run[2]), found[title]


def test_the_table_counts_by_fault_and_names_what_broke(tmp_path: Path) -> None:
    runs = [(0, Run("a", kills=2, numbers={"MB": 1.5})), (1, Run("b", ["other weights"], 1, {"MB": 2}))]
    lines = table("training", runs).splitlines()
    assert lines[2:] == [
        "| a | 1 | 2 | 1 |",
        "| b | 1 | 1 | 0 |",
        "| **all** | 2 | 3 | 1 |",
        "MB: 3.5",
        "run 1 (b): other weights",
    ]

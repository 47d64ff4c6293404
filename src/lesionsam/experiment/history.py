"""history.csv: a training's values by epoch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from lesionsam.evaluation.statistics import OBJECTIVE_PROMPTS
from lesionsam.utils.files import atomic_write

SCORES = ("objective", *OBJECTIVE_PROMPTS, "label_free")


class History:
    """The values of each epoch, one row each, written after every epoch; those of a resumed run are gone on with.

    Args:
        path: the CSV.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = [
                    {name: _number(text) for name, text in row.items() if text} for row in csv.DictReader(file)
                ]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Put the values of an epoch, those with the key `epoch`, in their row; rows of later epochs are dropped."""
        if "epoch" not in values:
            return
        epoch = int(values["epoch"])
        row: dict[str, float] = {"epoch": epoch, "step": step}
        for name, value in values.items():
            if name != "epoch":
                row[name.removeprefix("train_").removeprefix("dev_")] = value
        self.rows[epoch - 1 :] = [row]
        # dvc.yaml plots all scores, so all columns are there.
        names = list(dict.fromkeys([*(name for row in self.rows for name in row), *SCORES]))
        with atomic_write(self.path, "w") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def _number(text: str) -> float:
    """Return a number; a whole one stays an int, so that a resumed run writes what an undisturbed one does."""
    return int(text) if text.isdigit() else float(text)

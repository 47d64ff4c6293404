"""The review queue: what the model proposes for images without boxes, made ahead, kept in a file, ordered by doubt."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lesionsam.annotation.assist import PRIOR_SIDE
from lesionsam.annotation.catalogue import Catalogue, Entry
from lesionsam.annotation.model import Model
from lesionsam.annotation.pictures import Pictures
from lesionsam.annotation.proposals import LOOSENESS, Proposed, doubt, propose
from lesionsam.annotation.records import AUTOMATIC, OPEN, Box, rounded
from lesionsam.annotation.store import Store
from lesionsam.data.index import id_hash
from lesionsam.errors import UserError

QUIET = 0.4  # seconds without a person's action before proposals are worked on
FILLED = math.pi / 4 / (1 + LOOSENESS) ** 2  # of a big box's area that its lesion takes: an ellipse in a loose box
SPOT_CHECK = 4  # every so manieth image of the queue is drawn from all of them
RETRY = 5.0  # seconds after which an empty list of work is looked at again


@dataclass(frozen=True)
class Found:
    """What was proposed for one image.

    Attributes:
        stamp: of the image file, see `Pictures.stamp`. size: (width, height) of the image.
        lesion: None where nothing looks like one.
    """

    image_id: str
    stamp: tuple[int, int]
    size: tuple[int, int]
    lesion: Proposed | None


def proposals_path(table_path: Path) -> Path:
    """boxes.csv -> boxes.proposals.jsonl."""
    return table_path.with_name(f"{table_path.stem}.proposals.jsonl")


def look(model: Model, pictures: Pictures, entry: Entry) -> Found:
    """Propose for one image.

    Raises:
        UserError: an image that cannot be read.
    """
    size = pictures.size(entry)
    lesion = propose(model, model.features(entry), pictures.small(entry, PRIOR_SIDE), size, entry.image_id)
    return Found(entry.image_id, pictures.stamp(entry), size, lesion)


class Proposals:
    """Everything that one model has proposed, in a file of one JSON line each; lines of other models are left alone.

    Args:
        name: label of the model, which names the lines that are read.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.found: dict[str, Found] = {}
        self._lock = threading.Lock()
        for values in _lines(path):
            if values.get("model") == self.name:
                numbers: dict[str, Any] = dict(values["lesion"] or {})
                numbers |= {key: tuple(numbers[key]) for key in ("big", "small") if key in numbers}
                lesion = Proposed(**numbers) if numbers else None
                self.found[values["image_id"]] = Found(
                    values["image_id"], tuple(values["stamp"]), tuple(values["size"]), lesion
                )

    def add(self, found: Found) -> None:
        """Keep one more; a line that a crash cuts short is made again, so nothing waits for the disk."""
        line = json.dumps(
            {
                "image_id": found.image_id,
                "model": self.name,
                "stamp": found.stamp,
                "size": found.size,
                "lesion": found.lesion and asdict(found.lesion),
            },
            ensure_ascii=False,
        )
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self.found[found.image_id] = found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.split("\n"):
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut short by a crash
        if isinstance(values, dict) and {"image_id", "stamp", "size", "lesion"} <= values.keys():
            yield values


def usual_areas(store: Store, proposals: Proposals) -> list[float]:
    """Log of the shares of the image that lesions take, from their boxes, where sizes are known; only of lesions that a
    person has seen: those accepted unseen are of usual sizes because they had to be."""
    areas = []
    for state in store.all_states():
        found = proposals.found.get(state.image_id)
        if found is not None:
            whole = found.size[0] * found.size[1]
            areas += [
                math.log(FILLED * _area(lesion.big) / whole) for lesion in state.lesions if lesion.source != AUTOMATIC
            ]
    return areas


def with_spot_checks(doubts: Sequence[tuple[str, float]], done: int = 0) -> list[tuple[str, float]]:
    """By falling doubt, but every fourth drawn from all by hash: what nobody ever looks at could not be trusted.

    Args:
        doubts: (key, doubt) of what waits. done: how many were decided before, so that the order of the rest stays.
    """
    by_doubt = iter(sorted(doubts, key=lambda pair: (-pair[1], pair[0])))
    by_hash = iter(sorted(doubts, key=lambda pair: id_hash(pair[0])))
    ordered: dict[str, float] = {}
    for place in range(done, done + len(doubts)):
        source = by_hash if place % SPOT_CHECK == SPOT_CHECK - 1 else by_doubt
        key, value = next(pair for pair in source if pair[0] not in ordered)
        ordered[key] = value
    return list(ordered.items())


def _area(box: Box) -> float:
    return max(1e-6, (box[2] - box[0]) * (box[3] - box[1]))


class Review:
    """Proposals of the images to do, and the thread that makes them while nobody is busy (`start`)."""

    def __init__(self, catalogue: Catalogue, store: Store, pictures: Pictures, model: Model) -> None:
        self.catalogue, self.store, self.pictures, self.model = catalogue, store, pictures, model
        self.proposals = Proposals(proposals_path(store.path), model.label)
        self._failed: set[str] = set()
        self._first: list[Entry] = []
        self._busy_until = 0.0
        self._ordered: tuple[tuple[int, int], list[tuple[str, float]]] = ((-1, -1), [])
        self._areas: tuple[tuple[int, int], list[float]] = ((-1, -1), [])
        self._end = threading.Event()

    def start(self) -> None:
        """Begin to propose, until `stop`."""
        threading.Thread(target=self._work, daemon=True, name="proposing").start()

    @property
    def count(self) -> int:
        """Grows with every proposal."""
        return len(self.proposals.found)

    def busy(self) -> None:
        """Somebody is drawing: wait a little."""
        self._busy_until = time.monotonic() + QUIET

    def soon(self, entries: Sequence[Entry]) -> None:
        """These images will be looked at next."""
        self._first = list(entries)

    def stop(self) -> None:
        """End the thread after the image it is at."""
        self._end.set()

    def proposal(self, entry: Entry) -> dict[str, Any] | None:
        """For the page: lesions, doubt and why; None where there is none or the file has changed since."""
        if (lesion := self._lesion(entry)) is None:
            return None
        value, why = doubt(lesion, self.usual())
        return {"lesions": [{"big": lesion.big, "small": lesion.small}], "doubt": value, "why": why}

    def _lesion(self, entry: Entry) -> Proposed | None:
        found = self.proposals.found.get(entry.image_id)
        return None if found is None or found.stamp != self.pictures.stamp(entry) else found.lesion

    def usual(self) -> list[float]:
        """`usual_areas`, read again only where something has changed."""
        now = (self.count, self.store.clock)
        if self._areas[0] != now:
            self._areas = now, usual_areas(self.store, self.proposals)
        return self._areas[1]

    def boxes(self, entry: Entry) -> tuple[Box, Box] | None:
        """What is proposed for an image as it is now."""
        lesion = self._lesion(entry)
        return None if lesion is None else (rounded(lesion.big), rounded(lesion.small))

    def queue(self) -> list[tuple[str, float]]:
        """(key, doubt) of the images to do that have a proposal, the most doubtful first, with spot checks between."""
        now = (self.count, self.store.clock)
        if self._ordered[0] != now:
            usual = self.usual()
            known = [
                (entry.key, found)
                for found in list(self.proposals.found.values())
                if found.lesion is not None and (entry := self.catalogue.by_id.get(found.image_id)) is not None
            ]
            doubts = [
                (key, doubt(found.lesion, usual)[0])
                for key, found in known
                if found.lesion is not None and self.store.state(found.image_id).status == OPEN
            ]
            self._ordered = now, with_spot_checks(doubts, len(known) - len(doubts))
        return self._ordered[1]

    def left(self) -> int:
        """Images to do that nothing has been proposed for yet."""
        return sum(1 for entry in self.catalogue.by_id.values() if self._needs(entry))

    def _needs(self, entry: Entry) -> bool:
        return (
            entry.image_id not in self.proposals.found
            and entry.key not in self._failed
            and self.store.state(entry.image_id).status == OPEN
        )

    def _work(self) -> None:
        ahead = iter(self.catalogue.by_id.values())
        while not self._end.is_set():
            if time.monotonic() < self._busy_until:
                self._end.wait(QUIET / 2)
                continue
            entry = next((entry for entry in self._first if self._needs(entry)), None)
            while entry is None and (candidate := next(ahead, None)) is not None:
                entry = candidate if self._needs(candidate) else None
            if entry is None:
                ahead = iter(self.catalogue.by_id.values())
                self._end.wait(RETRY)
                continue
            try:
                self.proposals.add(look(self.model, self.pictures, entry))
            except (UserError, OSError):
                self._failed.add(entry.key)  # said when the image itself is opened

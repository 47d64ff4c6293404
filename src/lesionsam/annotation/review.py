"""Compute and store the model's proposals for images without boxes, and queue these images by doubt."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lesionsam.annotation.catalogue import Catalogue, Entry
from lesionsam.annotation.model import Model
from lesionsam.annotation.pictures import Pictures, Stamp
from lesionsam.annotation.proposals import LOOSENESS, Proposed, doubt, propose
from lesionsam.annotation.records import AUTOMATIC, OPEN, Box, rounded
from lesionsam.annotation.store import Store
from lesionsam.boxes.prior import PRIOR_SIDE
from lesionsam.data.index import id_hash
from lesionsam.errors import UserError

QUIET = 0.4  # seconds without a person's action before proposals are worked on
FILLED = math.pi / 4 / (1 + LOOSENESS) ** 2  # of a big box's area that its lesion takes: an ellipse in a loose box
SPOT_CHECK = 4  # every so manieth image of the queue is drawn from all of them
TEXT = "text"  # label of the proposals that `lesionsam propose` has found by text, whatever the detector
RETRY = 5.0  # seconds after which an empty list of work is looked at again


@dataclass(frozen=True)
class ImageProposal:
    """The proposal for one image.

    Attributes:
        stamp: of the image file, see `Pictures.stamp`. size: (width, height) of the image.
        lesion: None where nothing looks like one. more: others of the same image.
    """

    image_id: str
    stamp: Stamp
    size: tuple[int, int]
    lesion: Proposed | None
    more: tuple[Proposed, ...] = ()


def proposals_path(table_path: Path) -> Path:
    """Return the file of proposals beside a table: boxes.csv -> boxes.proposals.jsonl."""
    return table_path.with_name(f"{table_path.stem}.proposals.jsonl")


def propose_for_image(model: Model, pictures: Pictures, entry: Entry) -> ImageProposal:
    """Compute the proposal for one image.

    Raises:
        UserError: an image that cannot be read.
    """
    stamp = pictures.stamp(entry)  # before anything is read: a file replaced meanwhile is proposed for again
    size = pictures.size(entry)
    lesion = propose(model, model.features(entry), pictures.small(entry, PRIOR_SIDE), size)
    return ImageProposal(entry.image_id, stamp, size, lesion)


class Proposals:
    """The proposals of one model, kept in a file with one JSON line each; lines of other models are left unchanged.

    Args:
        name: label of the model, which names the lines that are read.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.found: dict[str, ImageProposal] = {}
        self.version = 0  # grows with every change of `found`
        self._lock = threading.Lock()
        self._is_cut = path.is_file() and not path.read_bytes().endswith(b"\n")  # by a crash
        for values in _lines(path):
            if values.get("model") == self.name:
                self.found[values["image_id"]] = TypeAdapter(ImageProposal).validate_python(values)

    def add(self, found: ImageProposal) -> None:
        """Add a proposal and append it to the file, without fsync: a line cut by a crash is computed again."""
        line = json.dumps({"model": self.name, **asdict(found)}, ensure_ascii=False)
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._is_cut else "") + line + "\n")
            self._is_cut = False
            self.found[found.image_id] = found
            self.version += 1

    def discard(self, image_id: str) -> None:
        """Forget the proposal for an image; its line stays in the file until one follows it."""
        with self._lock:
            if self.found.pop(image_id, None) is not None:
                self.version += 1


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


def confirmed_log_areas(store: Store, proposals: Proposals) -> list[float]:
    """Return the log area of each lesion, as a share of its image, estimated from its boxes; only of lesions that a
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
    """Sort by falling doubt, but draw every fourth image from all by hash: confident proposals are checked too.

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
    """Hold the proposals for open images, and compute them in a thread while no annotator is drawing (`start`).

    Args:
        model: that proposes; None: what `lesionsam propose` has found by text is shown, and nothing is computed.
    """

    def __init__(self, catalogue: Catalogue, store: Store, pictures: Pictures, model: Model | None) -> None:
        self.catalogue, self.store, self.pictures, self.model = catalogue, store, pictures, model
        self.proposals = Proposals(proposals_path(store.path), TEXT if model is None else model.label)
        self._failed: set[str] = set()
        self._first: list[Entry] = []
        self._busy_until = 0.0
        self._seen = (-1, -1)  # versions of proposals and table that the next two are of
        self._areas: list[float] = []
        self._ordered: list[tuple[str, float]] | None = None
        self._end = threading.Event()

    def start(self) -> None:
        """Start the thread, which runs until `stop`; without a model there is none."""
        if self.model is not None:
            threading.Thread(target=self._work, args=(self.model,), daemon=True, name="proposing").start()

    @property
    def count(self) -> int:
        """Number of images with a proposal."""
        return len(self.proposals.found)

    def busy(self) -> None:
        """Pause the thread for `QUIET` seconds, as an annotator is drawing."""
        self._busy_until = time.monotonic() + QUIET

    def soon(self, entries: Sequence[Entry]) -> None:
        """Compute the proposals for these images first."""
        self._first = list(entries)

    def stop(self) -> None:
        """Stop the thread after its current image."""
        self._end.set()

    def proposal(self, entry: Entry) -> dict[str, Any] | None:
        """Return lesions, doubt and reasons for the page; None where there is no proposal for the file as it is now."""
        if not (lesions := self._lesions(entry)):
            return None
        value, why = doubt(lesions[0], self.usual())
        return {"lesions": [{"big": one.big, "small": one.small} for one in lesions], "doubt": value, "why": why}

    def _lesions(self, entry: Entry) -> list[Proposed]:
        found = self.proposals.found.get(entry.image_id)
        if found is not None and found.stamp != self.pictures.stamp(entry):
            self.proposals.discard(entry.image_id)
            return []
        return [] if found is None or found.lesion is None else [found.lesion, *found.more]

    def usual(self) -> list[float]:
        """Return `confirmed_log_areas`, computed again after a change."""
        now = (self.proposals.version, self.store.clock)
        if self._seen != now:
            self._areas, self._ordered, self._seen = confirmed_log_areas(self.store, self.proposals), None, now
        return self._areas

    def boxes(self, entry: Entry) -> list[tuple[Box, Box]]:
        """Return the two boxes of each proposed lesion for an image as it is now."""
        return [(rounded(one.big), rounded(one.small)) for one in self._lesions(entry)]

    def queue(self) -> list[tuple[str, float]]:
        """Return (key, doubt) of the open images with a proposal, see `with_spot_checks`."""
        usual = self.usual()
        if self._ordered is None:
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
            self._ordered = with_spot_checks(doubts, len(known) - len(doubts))
        return self._ordered

    def left(self) -> int:
        """Return the number of open images without a proposal."""
        return sum(1 for entry in self.catalogue.by_id.values() if self._needs(entry)) if self.model else 0

    def _needs(self, entry: Entry) -> bool:
        return (
            entry.image_id not in self.proposals.found
            and entry.key not in self._failed
            and self.store.state(entry.image_id).status == OPEN
        )

    def _work(self, model: Model) -> None:
        for entry in self.catalogue.by_id.values():
            with suppress(UserError):  # a file that is gone is said when it is opened
                self._lesions(entry)  # discards what was proposed for another file
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
                self.proposals.add(propose_for_image(model, self.pictures, entry))
            except (UserError, OSError):
                self._failed.add(entry.key)  # said when the image itself is opened

"""Store the state of all images: a change is saved once it is in the journal and in the table.

One process owns a table (a lock says so); within it one change at a time. Every image has a revision: whoever changes
it says which revision was looked at, and is refused where that is no longer the last one. The table may be edited by
hand meanwhile: what changed in it is taken over as a change of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from lesionsam.annotation.catalogue import Catalogue
from lesionsam.annotation.journal import Journal
from lesionsam.annotation.records import Box, ImageState, Lesion, checked_boxes, merged
from lesionsam.annotation.table import Table, digest_of, read_table
from lesionsam.boxes.marks import journal_path
from lesionsam.errors import UserError
from lesionsam.utils.files import atomic_write
from lesionsam.utils.images import image_size

OUTSIDE = "edited in the table"  # who changed an image, where its rows were edited by hand
TRIES = 5  # of a change while somebody writes the table over and over


class EditedMeanwhile(Exception):
    """The table was edited by hand between reading and replacing it."""


class Conflict(Exception):
    """Another page changed the image since `base`.

    Attributes:
        state: what stands there now.
    """

    def __init__(self, state: ImageState) -> None:
        who, when = state.changed_by or "somebody", state.changed_at[11:19]
        super().__init__(f"{who} changed this image{f' at {when} UTC' if when else ''} while you were drawing")
        self.state = state


@dataclass(frozen=True)
class Change:
    """The state that a page asks an image to have.

    Attributes:
        base: revision that the page had before it. lesions: boxes, core and proposal; the rest is known here.
        seconds: lesion_id -> a person's time spent on it since the last change, "" for the image itself.
        change: a name for this change. automatic: no person looked; proposals are taken as they are.
        shown: label of the model whose proposal the person had in sight, or empty.
    """

    base: int
    who: str
    change: str
    mark: str = ""
    lesions: tuple[Lesion, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    automatic: bool = False
    shown: str = ""


def utc_now() -> str:
    """Return the current UTC time, ISO 8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Store:
    """States of the images of a catalogue, their table and their journal.

    Args:
        path: the two-box CSV; made with the first change where it is missing.
        catalogue: images at hand; rows of others are kept as they are.
        now: time of a change, for tests.
    Raises:
        UserError: a table or a journal that cannot be read.
    """

    def __init__(self, path: Path, catalogue: Catalogue, now: Callable[[], str] = utc_now) -> None:
        self.path, self.catalogue, self.now = path, catalogue, now
        self.journal = Journal(journal_path(path))
        self._lock = threading.RLock()
        self._states: dict[str, ImageState] = self.journal.states()
        self._gone: dict[tuple[str, str], Lesion] = {}  # lesions that an undo may bring back
        self._touched: dict[str, int] = {}  # image_id -> clock of its last change
        self.clock = 0
        self._seen: tuple[int, ...] | None = None
        self._digest = ""
        self._table = Table()
        with self._lock:
            self._roll_forward()
            self._reread(first=True)

    # ------------------------------------------------------------------------------------------------------- reading

    def state(self, image_id: str) -> ImageState:
        """Return the current state of an image."""
        return self._states.get(image_id) or ImageState(image_id)

    def all_states(self) -> list[ImageState]:
        """Return the states of all images that have one."""
        with self._lock:
            return list(self._states.values())

    def changes_since(self, clock: int) -> tuple[int, list[str]]:
        """Return the current clock and the ids of images that changed after `clock`."""
        with self._lock:
            return self.clock, [image_id for image_id, when in self._touched.items() if when > clock]

    def refresh(self) -> None:
        """Read the table again if it was edited by hand.

        Raises:
            UserError: the table cannot be read as it is now; nothing is written until it can.
        """
        with self._lock:
            if self._stat() != self._seen:
                self._reread()

    # ------------------------------------------------------------------------------------------------------- changing

    def save(self, image_id: str, change: Change, size: tuple[int, int]) -> ImageState:
        """Save a change of an image; journal and table are on disk when this returns.

        Args:
            size: (width, height) of the image.
        Raises:
            Conflict: `change.base` is not the image's revision.
            UserError: boxes that are wrong, or a table that was edited by hand and cannot be read.
            OSError: it could not be written; nothing has changed.
        """
        with self._lock:
            for _ in range(TRIES):
                self.refresh()
                old = self.state(image_id)
                if change.change and change.change == old.change:
                    return old  # sent twice, because the first answer got lost
                if change.base != old.revision:
                    raise Conflict(old)
                new = self._next(old, change, size)
                try:
                    self._commit(new, size)
                except EditedMeanwhile:
                    continue
                self._gone |= {(image_id, lesion.lesion_id): lesion for lesion in old.lesions}
                return new
        raise UserError(f"{self.path}: another program keeps writing it; close it there, then go on")

    def _next(self, old: ImageState, change: Change, size: tuple[int, int]) -> ImageState:
        when, seconds = self.now(), dict(change.seconds)
        known = {lesion.lesion_id: lesion for lesion in old.lesions}
        lesions = []
        for lesion in change.lesions:
            big, small = checked_boxes(lesion.big, lesion.small, *size)
            before = known.get(lesion.lesion_id) or self._gone.get((old.image_id, lesion.lesion_id))
            lesions.append(
                merged(
                    before,
                    replace(lesion, big=big, small=small),
                    change.who,
                    when,
                    seconds.pop(lesion.lesion_id, 0.0),
                    automatic=change.automatic,
                )
            )
        return ImageState(
            old.image_id,
            old.revision + 1,
            "" if lesions else change.mark,
            tuple(lesions),
            round(old.seconds + sum(seconds.values()), 2),
            change.who,
            when,
            change.change,
            change.shown or old.shown,
        )

    def _commit(self, state: ImageState, size: tuple[int, int]) -> None:
        """Write the journal, then the table; a crash in between is rolled forward when the table is next opened."""
        if boxes_of(state) == self._table.boxes.get(state.image_id, {}):
            self.journal.append([state], self._digest, self._digest)
            self._note([state])
            return
        table = self._table.with_image(state.image_id, state.lesions, size)
        data = table.text().encode()
        digest = digest_of(data)
        journal_size = self.journal.append([state], self._digest, digest)
        try:
            self._replace(data)
        except BaseException:
            self.journal.cut_back(journal_size)
            raise
        self._table, self._digest = table, digest
        self._seen = self._stat()
        if self._bytes() != data:
            self._seen = None  # edited the moment it was written: read again before the next change
        self._note([state])

    def _replace(self, data: bytes) -> None:
        """Replace the table unless it was edited since it was read."""
        with atomic_write(self.path) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if self._stat() != self._seen:
                raise EditedMeanwhile

    def _note(self, states: Iterable[ImageState]) -> None:
        self.clock += 1
        for state in states:
            self._states[state.image_id] = state
            self._touched[state.image_id] = self.clock

    # ------------------------------------------------------------------------------------------------------- the file

    def _stat(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns

    def _bytes(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _roll_forward(self) -> None:
        """Finish a change that is in the journal but not in the table, because the process was killed in between."""
        tail, data = self.journal.tail, self._bytes()
        if not tail or tail[-1]["after"] == tail[-1]["before"]:
            return
        if tail[-1]["before"] != (digest_of(data) if data is not None else ""):
            return
        table = read_table(self.path) if data is not None else Table()
        for entry in tail:
            state = self.state(entry["image_id"])
            if boxes_of(state) != table.boxes.get(state.image_id, {}):
                table = table.with_image(state.image_id, state.lesions, self._size_of(state.image_id))
        with atomic_write(self.path) as file:
            file.write(table.text().encode())

    def _size_of(self, image_id: str) -> tuple[int, int]:
        entry = self.catalogue.by_id.get(image_id)
        if entry is None:
            raise UserError(
                f"{self.journal.path}: the last change is of {image_id!r}, which was not given; give the "
                "same images as before once, so that it can be finished"
            )
        return image_size(entry.path)

    def _read(self, data: bytes | None) -> Table:
        """Read the table; refuse one that is gone although it held boxes."""
        known = sum(1 for state in self._states.values() if state.lesions)
        if (data is None or not data.strip()) and known:
            raise UserError(
                f"{self.path}: {'gone' if data is None else 'empty'}, but {self.journal.path.name} knows "
                f"of {known} images with boxes; put the table back, or remove the journal too to begin "
                "anew"
            )
        return read_table(self.path) if data is not None else Table()

    def _reread(self, *, first: bool = False) -> None:
        """Read the table and apply rows that differ from the known state."""
        seen, data = self._stat(), self._bytes()
        digest = digest_of(data) if data is not None else ""
        if digest == self._digest and not first:
            self._seen = seen
            return
        table = self._read(data)
        found, edited = {}, []
        for image_id in dict.fromkeys((*table.boxes, *self._states)):
            old, rows = self.state(image_id), table.boxes.get(image_id, {})
            if boxes_of(old) == rows:
                continue
            if first and image_id not in self._states:  # nothing is known of it but its rows: no change
                found[image_id] = with_rows(old, rows, 0, "", "")
            else:
                edited.append(with_rows(old, rows, old.revision + 1, OUTSIDE, self.now()))
        if edited:
            self.journal.append(edited, digest, digest)
        self._states |= found
        if edited:
            self._note(edited)
        self._table, self._digest, self._seen = table, digest, seen


def boxes_of(state: ImageState) -> dict[str, tuple[Box, Box]]:
    """Return lesion_id -> (big, small), as the table holds them."""
    return {lesion.lesion_id: lesion.boxes for lesion in state.lesions}


def with_rows(old: ImageState, rows: Mapping[str, tuple[Box, Box]], revision: int, who: str, when: str) -> ImageState:
    """Return the state of an image with its lesions replaced by the rows of a table."""
    known = {lesion.lesion_id: lesion for lesion in old.lesions}
    lesions = []
    for lesion_id, (big, small) in rows.items():
        before = known.get(lesion_id)
        core = before.core if before is not None and before.small == small else "drawn"
        lesions.append(merged(before, Lesion(lesion_id, big, small, core=core), who, when, 0.0))
    return replace(
        old,
        revision=revision,
        lesions=tuple(lesions),
        mark="" if lesions else old.mark,
        changed_by=who,
        changed_at=when,
        change="",
    )

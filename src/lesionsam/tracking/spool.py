"""Keep what a run logs as files: the training process writes the journal, the sender reads it.

A spool is the folder `<root>/.scratch/tracking/<local id>/` of one run:

    meta.json      where the run belongs: tracking URI, experiment, name, parent (mode 0600: a URI may hold a password)
    journal.jsonl  every operation in order, one JSON object a line, appended only
    system.jsonl   system metrics, appended by the sender
    files/         what waits to be uploaded: hard links where the file system has them, so nothing is copied
    state.json     how far the sender got: MLflow's run id, bytes of both journals that the server has answered for
    sender.log     what the sender printed
    closing        exists while the owner waits for the sender to finish

No process waits for another: the owner appends, the sender reads what is complete. A torn last line (a kill within a
write, a full disk) is closed off by the next append and skipped by every reader.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lesionsam.errors import UserError
from lesionsam.utils.files import atomic_write
from lesionsam.utils.locks import lock_exclusive, lock_shared

JOURNALS = ("journal", "system")


def clean_name(name: str) -> str:
    """Return a metric, tag or picture name that MLflow accepts: `box+core` becomes `box_core`, `a//b` becomes `a/b`."""
    parts = re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII).split("/")
    return "/".join(part for part in parts if part.strip(". "))[:250]


def encode_number(value: float) -> float | str:
    """Return a float as valid JSON: NaN and infinities become strings, which `float` reads back."""
    return value if math.isfinite(value) else str(value)


def now_ms() -> int:
    """Return the time as MLflow counts it, ms since the epoch."""
    return int(time.time() * 1000)


def metrics_entry(sequence: int, step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """Return the entry of a journal for the metrics of one step."""
    encoded = {name: encode_number(value) for name, value in values.items()}
    return {"seq": sequence, "kind": "metrics", "step": int(step), "time": now_ms(), "values": encoded}


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Yield the complete lines of a journal from byte `offset` on, each with its end offset; None for a torn line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            yield (entry if isinstance(entry, dict) else None), offset


class Appender:
    """Append lines to a file, one `write` call a line, so that a kill tears at most the last line.

    What a full disk does not take is kept in memory and written before the next line.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab", buffering=0)
        self._waiting: deque[bytes] = deque()
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(size - 1, 0))
            self._torn = size > 0 and file.read(1) != b"\n"

    def append(self, entry: Mapping[str, object]) -> None:
        """Append one line; raise OSError while the disk does not take it."""
        self._waiting.append(json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self._write()

    def _write(self) -> None:
        while self._waiting:
            line = (b"\n" if self._torn else b"") + self._waiting[0]
            self._torn = True
            if self._file.write(line) != len(line):
                raise OSError(f"{self._file.name}: short write")
            self._torn = False
            self._waiting.popleft()

    def close(self) -> int:
        """Close the file and return the number of lines that the disk never took."""
        with contextlib.suppress(OSError):
            self._write()
        self._file.close()
        return len(self._waiting)


class Spool:
    """Folder of one run, see the module docstring. Holds no open file except its locks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def all(cls, root: Path) -> list[Spool]:
        """Return every spool below the repository root, oldest first."""
        folders = [path.parent for path in spool_root(root).glob("*/meta.json")]
        return [cls(folder) for folder in sorted(folders, key=lambda path: path.stat().st_mtime)]

    @property
    def root(self) -> Path:
        """Return the project's root, also where the project was copied or moved."""
        return self.folder.parents[len(spool_root(Path()).parts)].resolve()

    @property
    def local_id(self) -> str:
        """Return the id that the run has from its first moment, with or without a server."""
        return self.folder.name

    def path(self, journal: str) -> Path:
        """Return the file of one of `JOURNALS`."""
        return self.folder / f"{journal}.jsonl"

    def read_json(self, name: str) -> dict[str, Any]:
        """Read meta.json or state.json; empty if it is missing or unreadable (the server is then queried)."""
        try:
            content = json.loads((self.folder / name).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        """Write meta.json or state.json atomically, readable by its owner only."""
        with atomic_write(self.folder / name) as file:
            os.chmod(file.name, 0o600)
            file.write(json.dumps(content, indent=1).encode())

    def pending(self) -> tuple[int, int]:
        """Return the number of operations and of files that the server has not confirmed."""
        sent = self.read_json("state.json").get("sent", {})
        num_lines = num_files = 0
        for journal in JOURNALS:
            for entry, _ in read_lines(self.path(journal), sent.get(journal, 0)):
                num_lines += entry is not None
                num_files += entry is not None and "file" in entry
        return num_lines, num_files

    def status(self) -> str:
        """Return the last status that the owner logged; RUNNING before any."""
        entries = [entry for entry, _ in read_lines(self.path("journal")) if entry is not None]
        return next((entry["status"] for entry in reversed(entries) if entry["kind"] == "status"), "RUNNING")

    def is_closed(self) -> bool:
        """Return whether the owner logged the run's end, or the server knows that it was killed."""
        return self.status() != "RUNNING" or bool(self.read_json("state.json").get("killed"))

    def is_abandoned(self) -> bool:
        """Return whether the owner died without closing the run."""
        return not self.is_closed() and not self.has_owner()

    def has_owner(self) -> bool:
        """Return whether a process has the run open."""
        if (lock := self.lock("owner")) is None:
            return True
        lock.close()
        return False

    def stash(self, source: Path, sequence: int) -> str:
        """Keep a file's current content for upload and return its path below the spool.

        Uses a hard link, or a copy across file systems. The link keeps the old content because every file here is
        replaced, never written into.
        """
        target = self.folder / "files" / f"{sequence:06d}" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(source, target)
        return target.relative_to(self.folder).as_posix()

    def drop(self, file: str) -> None:
        """Delete a stashed file that the server has."""
        target = self.folder / file
        target.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            target.parent.rmdir()

    def lock(self, name: str, *, shared: bool = False, wait: bool = False) -> IO[bytes] | None:
        """Take the lock `owner` or `sender` of this spool; None if another process holds it. Close it to release it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / f"{name}.lock").open("ab")
        take = lock_shared if shared else lock_exclusive
        if take(file.fileno(), wait=wait):
            return file
        file.close()
        return None


def spool_root(root: Path) -> Path:
    """Return the folder of all spools: in the repository root, outside every stage's outputs."""
    return root / ".scratch" / "tracking"


def read_record(folder: Path) -> dict[str, Any]:
    """Read run.json of a folder; empty if there is none."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got a damaged file ({error}); delete it to start a new run") from error
    name = record.get("local_id") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name.isalnum():
        raise UserError(f"{path}: expected a key local_id of letters and digits, got {name!r}; delete the file")
    return record


def write_record(folder: Path, local_id: str, run_id: str | None, experiment: str) -> None:
    """Write run.json, which identifies the run: by its local id here and by its run id on the server."""
    with atomic_write(folder / "run.json") as file:
        file.write(json.dumps({"local_id": local_id, "run_id": run_id, "experiment": experiment}, indent=1).encode())


def prepare_spool(root: Path, local_id: str, meta: Mapping[str, object], run_id: str | None) -> Spool:
    """Create the spool of a run, or recreate it if it was deleted."""
    spool = Spool(spool_root(root) / local_id)
    spool.folder.mkdir(parents=True, exist_ok=True)
    known = spool.read_json("meta.json")
    spool.write_json("meta.json", {"start_time": now_ms(), **known, **meta})
    if run_id and not (spool.folder / "state.json").exists():
        spool.write_json("state.json", {"run_id": run_id, "sent": {}})
    return spool


def repair_journal(spool: Spool, folder: Path) -> None:
    """Append the points of metrics.jsonl that the journal lacks, after a kill between the two writes or a deleted
    spool.
    """
    known = {entry["seq"] for entry, _ in read_lines(spool.path("journal")) if entry is not None}
    points = [entry for entry, _ in read_lines(folder / "metrics.jsonl") if entry is not None]
    missing = [entry for entry in points if entry["seq"] not in known]
    if missing:
        appender = Appender(spool.path("journal"))
        for entry in missing:
            appender.append({"kind": "metrics", **entry})  # which entries of earlier versions lack
        appender.close()

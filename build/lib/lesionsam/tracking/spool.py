"""What a run has logged, as files: the journal that the training process writes and the sender reads.

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
    """A metric, tag or picture name that MLflow takes: `box+core` becomes `box_core`, `a//b` becomes `a/b`."""
    parts = re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII).split("/")
    return "/".join(part for part in parts if part.strip(". "))[:250]


def encode_number(value: float) -> float | str:
    """A float as valid JSON: NaN and the infinities become strings, which `float` reads back."""
    return value if math.isfinite(value) else str(value)


def encode_line(entry: Mapping[str, object]) -> bytes:
    """One line of a journal."""
    return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """The complete lines of a journal from byte `offset` on, each with the offset after it; None for a torn one."""
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
    """An append-only file of lines. One `write` call a line, so that a kill tears at most the last one.

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
        """Append one line; raises OSError when the disk does not take it yet."""
        self._waiting.append(encode_line(entry))
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
        """Close the file; returns the number of lines that the disk did not take to the end."""
        with contextlib.suppress(OSError):
            self._write()
        self._file.close()
        return len(self._waiting)


class Spool:
    """The folder of one run, see the module's text. Holds no open file except its locks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def all(cls, root: Path) -> list[Spool]:
        """Every spool below the repository root, oldest first."""
        folders = [path.parent for path in spool_root(root).glob("*/meta.json")]
        return [cls(folder) for folder in sorted(folders, key=lambda path: path.stat().st_mtime)]

    @property
    def local_id(self) -> str:
        """The id that the run has from its first moment, with or without a server."""
        return self.folder.name

    def path(self, journal: str) -> Path:
        """File of one of `JOURNALS`."""
        return self.folder / f"{journal}.jsonl"

    def read_json(self, name: str) -> dict[str, Any]:
        """meta.json or state.json; empty where it is missing or unreadable (then the server is asked what it has)."""
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
        """Number of operations and of files that the server has not answered for."""
        sent = self.read_json("state.json").get("sent", {})
        num_lines = num_files = 0
        for journal in JOURNALS:
            for entry, _ in read_lines(self.path(journal), sent.get(journal, 0)):
                num_lines += entry is not None
                num_files += entry is not None and "file" in entry
        return num_lines, num_files

    def is_closed(self) -> bool:
        """Whether the owner said how the run ended, or the server was told that it was killed."""
        statuses = [
            entry["status"]
            for entry, _ in read_lines(self.path("journal"))
            if entry is not None and entry["kind"] == "status"
        ]
        return bool(statuses and statuses[-1] != "RUNNING") or bool(self.read_json("state.json").get("killed"))

    def is_abandoned(self) -> bool:
        """Whether the owner died without closing the run."""
        return not self.is_closed() and not self.has_owner()

    def has_owner(self) -> bool:
        """Whether a process has the run open."""
        if (lock := self.lock("owner")) is None:
            return True
        lock.close()
        return False

    def stash(self, source: Path, sequence: int) -> str:
        """Keep a file as it is now; returns its path below the spool. A hard link, or a copy across file systems.

        The link stays the old content because every file here is replaced, never written into.
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
        """Forget a stashed file that the server has."""
        target = self.folder / file
        target.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            target.parent.rmdir()

    def lock(self, name: str, *, shared: bool = False, wait: bool = False) -> IO[bytes] | None:
        """The lock `owner` or `sender` of this spool, or None where another process has it. Close it to release it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / f"{name}.lock").open("ab")
        take = lock_shared if shared else lock_exclusive
        if take(file.fileno(), wait=wait):
            return file
        file.close()
        return None


def spool_root(root: Path) -> Path:
    """Folder of all spools: in the repository root, outside every stage's outputs."""
    return root / ".scratch" / "tracking"


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a folder; empty where there is none."""
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
    """run.json: what finds the run again, here by its local id and on the server by its run id."""
    with atomic_write(folder / "run.json") as file:
        file.write(json.dumps({"local_id": local_id, "run_id": run_id, "experiment": experiment}, indent=1).encode())


def prepare_spool(root: Path, local_id: str, meta: Mapping[str, object], run_id: str | None) -> Spool:
    """The spool of a run, made again where somebody cleaned it away."""
    spool = Spool(spool_root(root) / local_id)
    spool.folder.mkdir(parents=True, exist_ok=True)
    known = spool.read_json("meta.json")
    spool.write_json("meta.json", {"start_time": int(time.time() * 1000), **known, **meta})
    if run_id and not (spool.folder / "state.json").exists():
        spool.write_json("state.json", {"run_id": run_id, "sent": {}})
    return spool


def repair_journal(spool: Spool, folder: Path) -> None:
    """Add what metrics.jsonl has and the journal lacks: a kill between the two writes, or a spool cleaned away."""
    known = {entry["seq"] for entry, _ in read_lines(spool.path("journal")) if entry is not None}
    points = [entry for entry, _ in read_lines(folder / "metrics.jsonl") if entry is not None]
    missing = [entry for entry in points if entry["seq"] not in known]
    if missing:
        appender = Appender(spool.path("journal"))
        for entry in missing:
            appender.append({"kind": "metrics", **entry})
        appender.close()

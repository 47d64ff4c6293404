"""Track experiments without waiting for a server: every call appends a line to a file and returns.

`metrics.jsonl` in the run's folder is written first, then the spool's journal (`tracking.spool`); a process of its own
(`tracking.sender`) uploads the journal to MLflow. It is a process and not a thread: importing mlflow costs 3 s of CPU,
sending competes for the interpreter's lock, and a loader worker forked during an import can hang. Whatever the server
does, the journal is complete, and the next start of any run below the same root sends what is missing.
"""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from lesionsam.tracking.lineage import lineage_tags
from lesionsam.tracking.spool import (
    Appender,
    Spool,
    clean_name,
    encode_number,
    metrics_entry,
    now_ms,
    prepare_spool,
    read_lines,
    read_record,
    repair_journal,
    spool_root,
    write_record,
)
from lesionsam.tracking.store import refuse_optuna_database
from lesionsam.utils.processes import start_python

Scalar = str | int | float | bool | None
FAILURE_TAG, DESCRIPTION_TAG = "lesionsam.failure", "mlflow.note.content"  # the second is shown on MLflow's page
MAX_PARAM_CHARS = MAX_FAILURE_CHARS = 500
STALL_SECONDS = 60.0  # `close` kills a sender that made no progress for so long


class NullTracker:
    """Same interface with tracking switched off. Metrics still go to `metrics.jsonl` in the run's folder, if any."""

    def __init__(self, folder: Path | None) -> None:
        self._seen: dict[str, dict[int, tuple[int, float]]] = {}  # name -> step -> (time in ms, value)
        self._sequence = 0
        self._has_warned = False
        self._metrics: Appender | None = None
        if folder is not None:
            for entry, _ in read_lines(folder / "metrics.jsonl"):
                if entry is not None:
                    self._remember(entry)
            self._metrics = Appender(folder / "metrics.jsonl")

    def _remember(self, entry: Mapping[str, Any]) -> None:
        self._sequence = max(self._sequence, entry["seq"] + 1)
        if entry.get("kind", "metrics") == "metrics":
            for name, value in entry["values"].items():
                self._seen.setdefault(name, {})[entry["step"]] = (entry["time"], float(value))

    def _is_new(self, name: str, step: int, value: float) -> bool:
        return step not in self._seen.get(name, ())

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step. A full disk or a dead server raises nothing; a value that is no number does."""
        values = {clean_name(name): float(value) for name, value in metrics.items()}
        values = {name: value for name, value in values.items() if self._is_new(name, step, value)}
        if not values:
            return
        entry = metrics_entry(self._sequence, step, values)
        self._remember(entry)
        self._write(self._metrics, entry)
        self._journal(entry)

    def _write(self, appender: Appender | None, entry: Mapping[str, object]) -> None:
        if appender is None:
            return
        try:
            appender.append(entry)
        except OSError as error:
            if not self._has_warned:
                print(
                    f"warning: tracking cannot write: {error.strerror or error}; training goes on, and what cannot "
                    "be written is kept in memory",
                    file=sys.stderr,
                )
            self._has_warned = True

    def _close_file(self, appender: Appender) -> None:
        if num_lost := appender.close():
            print(f"warning: the disk did not take {num_lost} tracking entries; they are lost", file=sys.stderr)

    def _journal(self, entry: Mapping[str, object]) -> None:
        """Do nothing: without tracking there is no journal."""

    def set_tags(self, tags: Mapping[str, Scalar]) -> None:
        """Set tags of the run."""

    def log_picture(self, path: Path, name: str, step: int) -> None:
        """Log a picture file under a name; MLflow's page shows it with a step slider."""

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Log a data set input: its digest (SHA-256 or shorter), source and use."""

    def log_checkpoint(self, path: Path, name: str, metrics: Mapping[str, float], step: int) -> None:
        """Log a weights file as a logged model with its metrics. The file may be replaced, but never written into."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Log a file, or every file below a folder, into a folder of the run's artifacts."""

    @property
    def local_id(self) -> str | None:
        """Return the id that the run has from its first moment, with or without a server; None without tracking."""
        return None

    def run_id(self, timeout: float = 0.0) -> str | None:
        """Return MLflow's id of the run, waiting at most `timeout` seconds; None while no server has answered."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the run with how the block ended."""
        self.close(
            "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", error
        )

    def close(self, status: str = "FINISHED", reason: BaseException | None = None) -> None:
        """End the run as FINISHED, FAILED or KILLED; `reason` is the error that ended it, if any."""
        if self._metrics is not None:
            self._close_file(self._metrics)
            self._metrics = None


class Tracker(NullTracker):
    """One MLflow run. Use `Tracker.open` for training and `Tracker.reopen` to add to a finished run."""

    def __init__(self, spool: Spool, folder: Path | None, *, send: bool) -> None:
        super().__init__(folder)
        self._spool = spool
        self._folder = folder
        self._reopened = folder is None
        self._closes_run = folder is not None
        self._stage = "train"  # step of the pipeline that writes
        self._failure = ""  # of an earlier start of this run
        self._description = ""
        for entry, _ in read_lines(spool.path("journal")):
            if entry is not None:
                self._remember(entry)
                if entry["kind"] == "tags":
                    self._failure = entry["values"].get(FAILURE_TAG, self._failure)
        self._owner = spool.lock("owner", shared=True, wait=True)
        self._log_file: IO[bytes] | None = None
        self._sender: subprocess.Popen[bytes] | None = None
        self._events = Appender(spool.path("journal"))
        (spool.folder / "closing").unlink(missing_ok=True)
        if send:
            self._log_file = (spool.folder / "sender.log").open("wb")
            self._sender = _start(self._log_file, str(spool.folder))

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        uri: str,
        experiment: str,
        root: Path,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Scalar],
        system_metrics: bool,
        parent: str | None = None,
        local_id: str | None = None,
        is_training: bool = False,
        send: bool = True,
    ) -> Tracker:
        """Start a run, or continue the one whose run.json lies in the folder.

        Args:
            folder: of the run; gets metrics.jsonl and run.json. Close the tracker before the folder is moved.
            uri: MLflow tracking URI; empty = `sqlite:///<root>/mlflow.db`.
            root: repository root, see `repository_root`; holds the spool, and without a URI database and artifacts.
            params: by dotted key. A parameter that was logged with another value before becomes a tag `changed.<key>`.
            system_metrics: sample processor, memory, disk, network and GPU every 10 s.
            parent: `local_id` of the run that this one belongs to, known before any server has answered.
            local_id: of this run, if another process or machine knows it and run.json may be missing.
            is_training: the next training is named by how it differs from this run, see `naming.run_name`.
            send: False leaves sending to the next start or to `sync`.
        """
        refuse_optuna_database(uri or f"sqlite:///{root / 'mlflow.db'}")
        folder.mkdir(parents=True, exist_ok=True)
        record = read_record(folder)
        resumed = bool(record or local_id)
        own_id: str = record.get("local_id") or local_id or uuid.uuid4().hex
        meta = {
            "uri": uri,
            "experiment": experiment,
            "run_name": run_name,
            "parent": parent,
            "system_metrics": system_metrics,
            "is_training": is_training,
        }
        spool = prepare_spool(root, own_id, meta, record.get("run_id"))
        repair_journal(spool, folder)
        tracker = cls(spool, folder, send=send)
        tracker._write_record()
        if resumed:
            tracker._add("status", status="RUNNING")
        tracker._add("params", values={clean_name(key): str(value)[:MAX_PARAM_CHARS] for key, value in params.items()})
        tracker.set_tags({**lineage_tags(root), **tags})
        return tracker

    @classmethod
    def reopen(
        cls,
        folder: Path,
        *,
        uri: str,
        experiment: str,
        root: Path,
        tags: Mapping[str, str] | None = None,
        stage: str = "evaluate",
        send: bool = True,
    ) -> Tracker:
        """Add to the run whose run.json lies in the folder, without touching the folder or the run's status.

        A point logged before is logged again only with another value. Settings belong into tags: parameters are
        immutable. Where MLflow no longer has the run, a new one takes all that is known and names the old one. Where
        the training was not tracked (no run.json), a new run is made.

        Args:
            stage: step of the pipeline that adds; the tag `STAGE.status` will hold how it ended.
        """
        record = read_record(folder)
        local_id = record.get("local_id") or uuid.uuid4().hex
        known = spool_root(root) / local_id / "meta.json"
        meta = {"run_name": stage} if not known.exists() else {}
        meta |= {"uri": uri, "experiment": experiment, "system_metrics": False}
        spool = prepare_spool(root, local_id, meta, record.get("run_id"))
        tracker = cls(spool, None, send=send)
        tracker._stage = stage
        tracker._closes_run = not record
        if tags:
            tracker.set_tags(tags)
        return tracker

    def _is_new(self, name: str, step: int, value: float) -> bool:
        known = self._seen.get(name, {}).get(step)
        return known is None or (self._reopened and known[1] != value)

    def _journal(self, entry: Mapping[str, object]) -> None:
        self._write(self._events, entry)

    def _add(self, kind: str, **content: object) -> None:
        self._journal({"seq": self._sequence, "kind": kind, "time": now_ms(), **content})
        self._sequence += 1

    def _add_file(self, kind: str, path: Path, **content: object) -> None:
        try:
            file = self._spool.stash(path, self._sequence)
        except OSError as error:
            print(f"warning: tracking cannot keep {path}: {error.strerror or error}; training goes on", file=sys.stderr)
            return
        self._add(kind, file=file, **content)

    def _is_repeated(self, kind: str, name: str, step: int) -> bool:
        """Return whether a picture or checkpoint of this step is already logged; remember it otherwise."""
        steps = self._seen.setdefault(f"{kind}:{name}", {})
        if step in steps and not self._reopened:
            return True
        steps[step] = (0, 0.0)
        return False

    def _remember(self, entry: Mapping[str, Any]) -> None:
        super()._remember(entry)
        if entry.get("kind") in ("picture", "checkpoint"):
            self._seen.setdefault(f"{entry['kind']}:{entry['name']}", {})[entry["step"]] = (0, 0.0)

    def set_tags(self, tags: Mapping[str, Scalar]) -> None:
        self._description = str(tags.get(DESCRIPTION_TAG, self._description))
        self._add("tags", values={clean_name(key): str(value) for key, value in tags.items()})

    def log_picture(self, path: Path, name: str, step: int) -> None:
        if not self._is_repeated("picture", clean_name(name), step):
            self._add_file("picture", Path(path), name=clean_name(name), step=step)

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        self._add("dataset", name=name, digest=digest, source=source, context=context)

    def log_checkpoint(self, path: Path, name: str, metrics: Mapping[str, float], step: int) -> None:
        name = clean_name(name).replace("/", "-").replace(".", "-")
        if self._is_repeated("checkpoint", name, step):
            return
        points = {}
        for key, value in metrics.items():  # reuse the run's own point, or the curve would get it twice
            number, key = float(value), clean_name(key)
            when, known = self._seen.get(key, {}).get(step, (now_ms(), number))
            points[key] = [encode_number(known), when]
        self._add_file("checkpoint", Path(path), name=name, step=step, values=points)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        path = Path(path)
        if not path.is_dir():
            self._add_file("artifact", path, folder=folder)
            return
        for file in sorted(child for child in path.rglob("*") if child.is_file()):
            below = file.parent.relative_to(path).as_posix()
            self._add_file("artifact", file, folder="/".join(part for part in (folder, below) if part not in ("", ".")))

    @property
    def local_id(self) -> str | None:
        return self._spool.local_id

    def run_id(self, timeout: float = 0.0) -> str | None:
        deadline = time.monotonic() + timeout
        while not (found := self._spool.read_json("state.json").get("run_id")) and time.monotonic() < deadline:
            if self._sender is None or self._sender.poll() is not None:
                break
            time.sleep(0.1)
        return found

    def close(self, status: str = "FINISHED", reason: BaseException | None = None) -> None:
        """End the run: log its status and wait for the sender. What cannot be sent stays for the next start.

        A reopened run keeps its status; the tag `STAGE.status`, such as `evaluate.status`, holds that of the step.
        """
        super().close(status)
        if self._owner is None:
            return
        failure = "" if reason is None else " ".join(f"{type(reason).__name__}: {reason}".split()).rstrip(":")
        failure = failure[:MAX_FAILURE_CHARS]
        if failure != self._failure and not self._reopened:
            description = f"{status}: {failure}" if failure else self._description
            self.set_tags({FAILURE_TAG: failure, DESCRIPTION_TAG: description})
        if self._reopened:
            self.set_tags({f"{self._stage}.status": status})
        self._add("status", status=status, only_new=not self._closes_run)
        self._close_file(self._events)
        self._finish_sender()
        self._write_record()
        self._owner.close()
        self._owner = None
        num_lines, num_files = self._spool.pending() if self._sender is not None else (0, 0)
        if num_lines:
            problem = self._spool.read_json("state.json").get("problem") or self._last_words()
            print(
                f"warning: {num_lines} tracking entries ({num_files} of them files) are not on the MLflow server yet "
                f"({problem}); they are kept and sent at the next start",
                file=sys.stderr,
            )
        state = self._spool.read_json("state.json")
        if num_refused := state.get("rejected"):
            print(
                f"warning: the MLflow server refused {num_refused} entries of this run, which are not there; the "
                f"last one: {state.get('refusal')}",
                file=sys.stderr,
            )

    def _finish_sender(self) -> None:
        """Wait for the sender while it makes progress; kill it when it stalls."""
        if self._sender is None:
            return
        (self._spool.folder / "closing").touch()
        progress, moved = None, time.monotonic()
        while self._sender.poll() is None:
            if (now := self._progress()) != progress:
                progress, moved = now, time.monotonic()
            if time.monotonic() - moved > STALL_SECONDS:
                self._sender.kill()
                self._sender.wait()
            time.sleep(0.05)
        if self._log_file is not None:
            self._log_file.close()

    def _progress(self) -> object:
        state = self._spool.folder / "state.json"
        return state.stat().st_mtime_ns if state.exists() else None

    def _last_words(self) -> str:
        lines = (self._spool.folder / "sender.log").read_text(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "no answer in time")

    def _write_record(self) -> None:
        if self._folder is not None and self._folder.exists():
            experiment = self._spool.read_json("meta.json")["experiment"]
            write_record(self._folder, self._spool.local_id, self.run_id(), experiment)


def _start(log: IO[bytes], *arguments: str) -> subprocess.Popen[bytes]:
    return start_python("lesionsam.tracking.sender", *arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def sync(root: Path, timeout: float = 120.0) -> int:
    """Send the waiting entries of earlier runs below the root and close runs whose process died.

    Returns:
        the number of entries still waiting.
    """
    if any(spool.pending()[0] or spool.is_abandoned() for spool in Spool.all(root)):
        with (spool_root(root) / "sync.log").open("wb") as log:
            process = _start(log, "--all", str(root))
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return sum(spool.pending()[0] for spool in Spool.all(root))

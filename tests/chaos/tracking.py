"""Trainings whose MLflow server is not there, and what the next start sends: every point, once."""

from __future__ import annotations

import random
import resource
import shutil
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from chaos import training as chaos_training
from chaos.run import LIMIT_S, Run, has_traceback, in_child
from helpers.tiny import tiny_data
from helpers.training import CPU, contrastive, run
from lesionsam.data.loader import Loader
from lesionsam.tracking.spool import Spool
from lesionsam.tracking.tracker import NullTracker, Tracker, sync
from lesionsam.training.state import load_best

EPOCHS = 10
NOBODY, ERRORS, SILENT = "nobody listens", "answers 500", "never answers"


class Broken(BaseHTTPRequestHandler):
    """Answers every question with status 500."""

    def handle_any(self) -> None:
        """Whatever is asked."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(500)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def dead_server(fault: str) -> Iterator[str]:
    """The address of a server that is of no use."""
    if fault == ERRORS:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if fault == SILENT:
            listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class Campaign:
    """Each run trains twice, tracked by a server that is dead the whole time, and not tracked at all."""

    def __init__(self, folder: Path, *, without: str = "") -> None:
        self.data = tiny_data(16)
        self.store = folder / "store"  # an empty database, made once: that takes MLflow seconds
        self.store.mkdir()
        status = in_child(lambda: self.train(self.store, "", epochs=1, tracked=True), folder / "log")
        if status or sync(self.store, LIMIT_S):
            raise RuntimeError((folder / "log").read_text())
        self.known = self.rows(self.store)

    def train(self, root: Path, uri: str, *, epochs: int = EPOCHS, tracked: bool, begin: bool = True) -> None:
        """A training as the train stage tracks it; notes the processor time of this process and of its children."""
        folder = root / "run"
        settings = {"run_name": "r", "params": {}, "tags": {}, "system_metrics": False}
        before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        tracker = (
            Tracker.open(folder, uri=uri, experiment="chaos", root=root, **settings)  # type: ignore[arg-type]
            if tracked
            else NullTracker(folder)
        )
        if begin:
            method = contrastive()
            run(
                method,
                Loader(self.data, device=CPU),
                folder,
                epochs=epochs,
                log=tracker.log,
                evaluate=lambda epoch: {"objective": epoch / epochs},
            )
            load_best(folder, method.model)
            (root / "digest").write_text(chaos_training.digest_of(method))
        tracker.close()
        after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        spent = [b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True)]
        (root / "seconds").write_text(" ".join(map(str, spent)))

    def run(self, rng: random.Random, folder: Path) -> Run:
        """A server that is dead for a whole run; then a store that answers."""
        done, log = Run(rng.choice((NOBODY, ERRORS, SILENT))), folder.with_suffix(".log")
        plain, tracked = folder / "plain", folder / "tracked"
        plain.mkdir(parents=True)
        tracked.mkdir()
        with dead_server(done.fault) as uri:
            jobs = [lambda: self.train(plain, "", tracked=False), lambda: self.train(tracked, uri, tracked=True)]
            for job in rng.sample(jobs, 2):
                if in_child(job, log):
                    done.broken.append("the training failed: " + log.read_text().splitlines()[-1])
                    return done
        (own, _), (with_tracking, senders) = (
            map(float, (each / "seconds").read_text().split()) for each in (plain, tracked)
        )
        done.numbers = {
            "CPU s of trainings, not tracked": own,
            "CPU s of trainings, server dead": with_tracking,
            "CPU s of senders beside them": senders,
        }
        if (plain / "digest").read_text() != (tracked / "digest").read_text():
            done.broken.append("other weights")
        if has_traceback(log):
            done.broken.append("traceback")
        (spool,) = Spool.all(tracked)
        done.numbers["entries that waited"] = spool.pending()[0]
        shutil.copy(self.store / "mlflow.db", tracked / "mlflow.db")
        status = in_child(lambda: self.train(tracked, "", tracked=True, begin=False), log)  # the next start
        if status or sync(tracked, LIMIT_S):
            done.broken.append("not sent by the next start")
        expected = Counter((step, name) for step, name, _ in chaos_training.points(tracked / "run"))
        found = self.rows(tracked) - self.known
        done.numbers |= {"points logged": expected.total(), "points in the store": found.total()}
        if found != expected:
            done.broken.append(f"{(expected - found).total()} points lost, {(found - expected).total()} too many")
        return done

    def rows(self, root: Path) -> Counter[tuple[int, str]]:
        """(step, name) of every point in a local store, with how often it is there."""
        database = sqlite3.connect(f"file:{root / 'mlflow.db'}?mode=ro", uri=True)
        try:
            return Counter(tuple(row) for row in database.execute("select step, key from metrics"))
        finally:
            database.close()

"""Downloads that are killed at any byte, from a real server, and the file that is under its name at last."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import time
from pathlib import Path

from chaos.run import LIMIT_S, Run, has_traceback, in_child, start
from helpers.web_server import Site, serve
from lesionsam.data.sources import download
from lesionsam.data.sources.download import Remote, fetch

DATA = random.Random(0).randbytes(4_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
KILL, FLIP, GROW, CHANGED, NO_RANGE, FULL, UNPUBLISHED = (
    "killed at a byte",
    "killed, a byte of the part flipped",
    "killed, the part made longer",
    "killed, another ETag",
    "killed, no Range",
    "full disk, then room",
    "killed, no published hash",
)
WEIGHTS = {KILL: 6, FLIP: 1, GROW: 1, CHANGED: 1, NO_RANGE: 1, FULL: 1, UNPUBLISHED: 2}


class Campaign:
    """One file of 4 MB, fetched by processes of which the first one to three are killed.

    Args:
        without: `range-check` takes any answer for the bytes that were asked for.
    """

    def __init__(self, folder: Path, *, without: str = "") -> None:
        self.without, self.faults = without, {NO_RANGE: 1} if without else WEIGHTS

    def fetch(self, site: Site, folder: Path, published: bool, most: int | None = None) -> None:
        """What the download stage does for each file. most: bytes that the disk has for a file."""
        if self.without:
            check = download._check_answer
            download._check_answer = lambda remote, answer, have: (have, check(remote, answer, have)[1])
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        remote = Remote("a.zip", (f"{site.url}/a.zip",), len(DATA), SHA256 if published else None)
        fetch(remote, folder, lock_path=folder.parent / "lock.json", backoff=0.01)

    def run(self, rng: random.Random, folder: Path) -> Run:
        """One file, fetched in spite of a fault."""
        done = Run(rng.choices(list(self.faults), list(self.faults.values()))[0])
        folder = folder / "archives"
        folder.mkdir(parents=True)
        log, part, published = folder.parent / "log", folder / "a.zip.part", done.fault != UNPUBLISHED
        with serve(Site(files={"/a.zip": DATA}, ranges=done.fault != NO_RANGE)) as site:
            for offset in sorted(rng.randrange(len(DATA)) for _ in range(rng.randint(1, 4))):
                if done.fault == FULL:
                    status = in_child(lambda most=offset: self.fetch(site, folder, published, most), log)
                    if status != 2:
                        done.broken.append(f"exit status {status} on a full disk, expected 2")
                else:
                    self.kill_at(site, offset, folder, published, log, settled=rng.random() < 0.5)
                    done.kills += 1
                if (folder / "a.zip").exists():
                    done.broken.append("a file under its name before it is whole")
            if part.exists() and part.stat().st_size and done.fault in (FLIP, GROW):
                content = bytearray(part.read_bytes())
                content[rng.randrange(len(content))] ^= 1
                part.write_bytes(bytes(content) if done.fault == FLIP else DATA + b"more")
            if done.fault == CHANGED:
                site.etag = '"v2"'
            held = part.stat().st_size if part.exists() else 0
            before, status = site.sent, in_child(lambda: self.fetch(site, folder, published), log)
            if status:
                done.broken.append("not fetched: " + log.read_text().splitlines()[-1])
            elif hashlib.sha256((folder / "a.zip").read_bytes()).hexdigest() != SHA256:
                done.broken.append("a wrong file under the right name")
            if (
                not published
                and json.loads((folder.parent / "lock.json").read_text())[f"{site.url}/a.zip"]["sha256"] != SHA256
            ):
                done.broken.append("a wrong hash recorded")
            done.numbers["MB of the files"] = len(DATA) / 1e6
            if done.fault == KILL:
                done.numbers |= {"of these, killed at a byte": len(DATA) / 1e6, "MB sent for them": site.sent / 1e6}
                if site.sent - before != len(DATA) - held:
                    done.broken.append(f"{site.sent - before} bytes asked for, {len(DATA) - held} were missing")
        if has_traceback(log):
            done.broken.append("traceback")
        if not done.broken and (
            left := {path.name for path in folder.iterdir()}
            - {"a.zip", "a.zip.verified.json", ".a.zip.lock", ".hashes.lock"}
        ):
            done.broken.append(f"left behind: {', '.join(sorted(left))}")
        return done

    def kill_at(self, site: Site, offset: int, folder: Path, published: bool, log: Path, *, settled: bool) -> None:
        """A fetching process that is sent so many bytes of the file and then killed, where it has settled once those
        that were still under way have come."""
        site.stall_at = offset
        pid = start(lambda: self.fetch(site, folder, published), log)
        site.stalled.wait(LIMIT_S)
        deadline = time.monotonic() + LIMIT_S
        while settled and download._length(folder / "a.zip.part") < offset and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        site.stalled.clear()

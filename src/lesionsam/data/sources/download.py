"""Fetch large files over HTTP so that the right file, or none, appears under its name.

A download goes to `NAME.part`, with a note of where it came from in `NAME.part.json`. After a kill or a dropped
connection it goes on from the last byte (Range, guarded by If-Range), it is hashed while it arrives, and it is renamed
to `NAME` only when size and SHA-256 are right. Where no hash is published, the first one seen is recorded in a lock
file and every later download must equal it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesionsam.errors import UserError
from lesionsam.utils.files import CHUNK, free_disk_bytes, fsync_folder, remove_leftovers, sha256_file, write_json_atomic
from lesionsam.utils.locks import file_lock
from lesionsam.utils.progress import Meter, human_bytes, say

TIMEOUT_SECONDS = 60.0  # of silence on the line
MAX_FRUITLESS = 5  # attempts in a row that bring no byte; each that brings some starts the count again
MAX_BACKOFF_SECONDS = 60.0
SPARE_BYTES = 64 << 20  # left free on the disk
USER_AGENT = "lesionsam (downloads for research; Python urllib)"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PART, NOTE, SEAL = ".part", ".part.json", ".verified.json"  # endings of what lies beside a download


@dataclass(frozen=True)
class Remote:
    """A file to fetch.

    Attributes:
        name: file name it gets. urls: where it is, the preferred place first; all hold the same bytes.
        size: bytes, or None where not published. sha256: hex, or None: recorded on first use.
    """

    name: str
    urls: tuple[str, ...]
    size: int | None = None
    sha256: str | None = None


class Refused(Exception):
    """A permanent refusal: another request to this address will not yield the file."""


class Dropped(Exception):
    """A temporary fault: worth another attempt, `wait` seconds from now at the earliest."""

    def __init__(self, message: str, *, unreachable: bool = False, wait: float = 0.0) -> None:
        super().__init__(message)
        self.unreachable = unreachable
        self.wait = wait


class _NoPlainHttp(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme != "https":
            raise Refused(f"redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # not build_opener: that also opens file: and ftp:
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _NoPlainHttp(),
    ):
        opener.add_handler(handler)
    return opener


@contextmanager
def request(
    url: str, *, method: str = "GET", headers: dict[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    """Open a response (status 200 or 206); every fault becomes `Refused` or `Dropped`.

    Plain http is accepted from this very machine only, and from nowhere after a redirect.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise Refused("is not an https address; plain http could be changed on its way")
    asked = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **(headers or {})}
    question = urllib.request.Request(url, method=method, headers=asked)  # noqa: S310 (scheme checked above)
    try:
        with _opener().open(question, timeout=TIMEOUT_SECONDS) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (408, 425, 429) or error.code >= 500:
            wait = error.headers.get("Retry-After", "0")
            raise Dropped(f"answers {error.code} {error.reason}", wait=float(wait) if wait.isdigit() else 0.0) from None
        raise Refused(f"answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise Refused(f"has no valid certificate: {error.reason.verify_message}") from None
        away = isinstance(error.reason, (socket.gaierror, ConnectionRefusedError)) or "unreachable" in str(error.reason)
        raise Dropped(f"cannot be reached: {error.reason}", unreachable=away) from None
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise Dropped(f"broke off: {type(error).__name__} {error}".rstrip()) from None


def fetch(remote: Remote, folder: Path, *, lock_path: Path | None = None, backoff: float = 1.0) -> Path:
    """Return the verified file `folder/NAME`, downloaded unless it is already there.

    Args:
        folder: made where missing; partial downloads stay in it.
        lock_path: JSON file of recorded hashes, needed where `remote.sha256` is None.
        backoff: seconds before the second attempt; doubles with each fruitless one.
    Raises:
        UserError: no address gives the right file, or the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / remote.name
    with file_lock(folder / f".{remote.name}.lock", remote.name, waiting=say):
        remove_leftovers(folder)
        expected = remote.sha256 or (_recorded(lock_path).get(remote.urls[0], {}).get("sha256") if lock_path else None)
        if target.exists():
            if _still_verified(target, expected):
                return target
            found = _hash_existing(target)
            if expected in (None, found) and remote.size in (None, target.stat().st_size):
                _finish(remote, target, found, lock_path)
                return target
            raise UserError(
                f"{target}: SHA-256 is {found}, expected {expected} (the file is damaged or another one); "
                "delete it and run again"
            )
        digest = _download(remote, target, expected, backoff)
        part = _beside(target, PART)
        os.replace(part, target)
        fsync_folder(folder)
        _beside(target, NOTE).unlink(missing_ok=True)
        _finish(remote, target, digest, lock_path)
    return target


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


def _recorded(lock_path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(lock_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{lock_path}: not valid JSON ({error}); restore it from git or delete it") from None


def _hash_existing(path: Path) -> str:
    with Meter(f"checking {path.name}", path.stat().st_size) as meter:
        return sha256_file(path, meter.at)


def _still_verified(target: Path, expected: str | None) -> bool:
    """Return whether the file is, by size and time, the one hashed before; saves hashing 11 GB each time."""
    try:
        seal = json.loads(_beside(target, SEAL).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    state = target.stat()
    return (seal.get("size"), seal.get("mtime_ns")) == (state.st_size, state.st_mtime_ns) and seal["sha256"] == expected


def _finish(remote: Remote, target: Path, digest: str, lock_path: Path | None) -> None:
    state = target.stat()
    write_json_atomic(_beside(target, SEAL), {"sha256": digest, "size": state.st_size, "mtime_ns": state.st_mtime_ns})
    if remote.sha256 is None and lock_path is not None:
        with file_lock(target.parent / ".hashes.lock", lock_path.name, waiting=say):
            known = _recorded(lock_path)
            if remote.urls[0] not in known:
                known[remote.urls[0]] = {"sha256": digest, "size": state.st_size}
                write_json_atomic(lock_path, dict(sorted(known.items())))
                say(f"{remote.name}: no hash is published; recorded {digest[:16]}... in {lock_path.name}")


def _download(remote: Remote, target: Path, expected: str | None, backoff: float) -> str:
    """Fill the part file to its end and return its SHA-256, verified; addresses are tried in turn."""
    reasons: list[str] = []
    part = _beside(target, PART)
    for url in remote.urls:
        fruitless, received = 0, False
        while True:
            before = _length(part)
            try:
                resumed, digest = _attempt(remote, url, target, expected)
            except Refused as error:
                reasons.append(f"{url} {error}")
                break
            except Dropped as error:
                gained = _length(part) > before
                received, fruitless = received or gained, 0 if gained else fruitless + 1
                if fruitless >= MAX_FRUITLESS or (error.unreachable and not received):
                    reasons.append(f"{url} {error}")
                    break
                pause = min(MAX_BACKOFF_SECONDS, max(error.wait, backoff * 2**fruitless))
                say(f"{remote.name}: {url} {error}; going on at {human_bytes(_length(part))} in {pause:.0f} s")
                time.sleep(pause)
                continue
            if expected in (None, digest):
                return digest
            _discard(target)
            if resumed:
                say(f"{remote.name}: the resumed file has a wrong SHA-256; starting again from its first byte")
                continue
            reasons.append(f"{url} gives a file of SHA-256 {digest}, expected {expected}")
            break
    raise UserError(
        f"{remote.name}: cannot be downloaded: {'; '.join(reasons)}. Check the network, or put the file at "
        f"{target} yourself"
    )


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _discard(target: Path) -> None:
    for path in (_beside(target, PART), _beside(target, NOTE)):
        path.unlink(missing_ok=True)


def _attempt(remote: Remote, url: str, target: Path, expected: str | None) -> tuple[bool, str]:
    """Make one request; return whether it resumed an earlier part, and the SHA-256 of the complete part file."""
    part = _beside(target, PART)
    note: dict[str, Any] = {}
    with suppress(FileNotFoundError, ValueError):
        note = json.loads(_beside(target, NOTE).read_text(encoding="utf-8"))
    have, total = _length(part), remote.size or note.get("size")
    if have and total and have == total and (expected or note):
        return True, _hash_existing(part)  # killed between the last byte and the rename
    if have and (have > (total or have) or not (expected or (note.get("url") == url and note.get("validator")))):
        _discard(target)  # nothing would tell whether the rest belongs to what is here
        have = 0
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        if note.get("url") == url and note.get("validator"):
            headers["If-Range"] = note["validator"]
    try:
        with request(url, headers=headers) as answer:
            start, size = _check_answer(remote, answer, have)
            if have and not start:
                say(f"{remote.name}: the server starts again from the first byte")
            if start and note.get("size") not in (None, size):
                _discard(target)
                raise Dropped(f"has a file of {size} bytes, the part that is here is of one of {note['size']}")
            if free_disk_bytes(target.parent) < size - have + SPARE_BYTES:
                raise UserError(
                    f"{target}: {human_bytes(size - have)} to download, but only "
                    f"{human_bytes(free_disk_bytes(target.parent))} free on this disk; free some space"
                )
            write_json_atomic(_beside(target, NOTE), {"url": url, "size": size, "validator": validator(answer)})
            return bool(start), _receive(remote, answer, part, start, size)
    except Refused as error:
        cause = error.__cause__
        if have and isinstance(cause, urllib.error.HTTPError) and cause.code == 416:
            _discard(target)  # what is here is longer than the server's file
            raise Dropped("has no such byte range") from None
        raise


def validator(answer: http.client.HTTPResponse) -> str | None:
    """Return the value for If-Range (RFC 9110, 13.1.5): a strong ETag, or else the date of the last change."""
    etag = answer.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")


def _check_answer(remote: Remote, answer: http.client.HTTPResponse, have: int) -> tuple[int, int]:
    """Return (first byte of the response, size of the whole file); a response that cannot be the file is `Refused`."""
    kind = answer.headers.get("Content-Type", "")
    if "html" in kind.lower():
        raise Refused(f"sends a page ({kind}) instead of the file")
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(f"sends the file encoded ({answer.headers['Content-Encoding']})")
    start = 0
    if answer.status == 206:
        unit, _, given = answer.headers.get("Content-Range", "").partition(" ")
        span, _, whole = given.partition("/")
        first = span.split("-")[0]
        if unit != "bytes" or not first.isdigit() or int(first) != have or not whole.isdigit():
            raise Refused(f"answers bytes from {have} on with Content-Range {answer.headers.get('Content-Range')!r}")
        start, size = have, int(whole)
    elif (length := answer.headers.get("Content-Length", "")).isdigit():
        size = int(length)
    elif remote.size:
        size = remote.size
    else:
        raise Refused("does not say how long the file is, so a cut one could not be told from a whole one")
    if remote.size not in (None, size):
        raise Refused(f"has a file of {size} bytes, expected {remote.size}")
    return start, size


def _receive(remote: Remote, answer: http.client.HTTPResponse, part: Path, start: int, size: int) -> str:
    digest = hashlib.sha256()
    with part.open("r+b" if start else "wb") as file, Meter(remote.name, size, start) as meter:
        while file.tell() < start:
            digest.update(file.read(min(CHUNK, start - file.tell())))
        while chunk := answer.read1(min(CHUNK, size - file.tell() + 1)):  # what has come: a kill loses no more
            if file.tell() == 0 and chunk.lstrip()[:1] == b"<":
                file.truncate()
                raise Refused("sends a page (it begins with '<') instead of the file")
            file.write(chunk)
            digest.update(chunk)
            meter.at(file.tell())
        file.flush()
        os.fsync(file.fileno())
        got = file.tell()
    if got > size:
        raise Refused(f"sends more than the {size} bytes it announced")
    if got < size:
        raise Dropped(f"broke off at {human_bytes(got)} of {human_bytes(size)}")
    return digest.hexdigest()

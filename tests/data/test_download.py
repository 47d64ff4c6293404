"""Downloads against a real server that misbehaves: the right file under its name, or a clear error and no file."""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.web_server import Site, serve
from lesionsam.data.sources import download
from lesionsam.data.sources.download import Remote, fetch
from lesionsam.errors import UserError

DATA = random.Random(0).randbytes(1_500_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(Site(files={"/a.zip": DATA})) as running:
        yield running


def remote(site: Site, **changes: object) -> Remote:
    values = {"name": "a.zip", "urls": (f"{site.url}/a.zip",), "size": len(DATA), "sha256": SHA256, **changes}
    return Remote(**values)  # type: ignore[arg-type]


def get(wanted: Remote, folder: Path, **options: object) -> Path:
    return fetch(wanted, folder, backoff=0.01, **options)  # type: ignore[arg-type]


def refused(wanted: Remote, folder: Path, message: str, **options: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        get(wanted, folder, **options)
    assert "\n" not in str(caught.value)
    assert not (folder / wanted.name).exists()


def test_whole_file_then_nothing_more_is_asked(site: Site, tmp_path: Path) -> None:
    path = get(remote(site), tmp_path / "new")
    assert path.read_bytes() == DATA
    assert not list(path.parent.glob("*.part*"))
    asked = len(site.asked)
    assert get(remote(site), tmp_path / "new") == path
    assert len(site.asked) == asked


def test_drops_are_resumed_without_fetching_twice(site: Site, tmp_path: Path) -> None:
    site.drop_after = 100_000  # of every answer: 15 requests in all
    assert get(remote(site), tmp_path).read_bytes() == DATA
    assert site.sent == len(DATA)
    assert [asked[2] for asked in site.asked][:3] == ["", "bytes=100000-", "bytes=200000-"]


def test_a_line_that_brings_nothing_ends(site: Site, tmp_path: Path) -> None:
    site.drop_after = 0
    refused(remote(site), tmp_path, "broke off at 0 B of 2 MB")
    assert len(site.asked) == download.MAX_FRUITLESS


def test_server_without_range_starts_again(site: Site, tmp_path: Path) -> None:
    site.ranges, site.drop_after, site.drops = False, 700_000, 2
    assert get(remote(site), tmp_path).read_bytes() == DATA
    assert site.sent == 2 * 700_000 + len(DATA)


@pytest.mark.parametrize("etag", ['"v1"', ""])
def test_file_changed_between_two_attempts(site: Site, tmp_path: Path, etag: str) -> None:
    site.etag = etag
    (tmp_path / "a.zip.part").write_bytes(b"z" * 500_000)  # of an older file
    note = {"url": f"{site.url}/a.zip", "size": len(DATA), "validator": '"v0"' if etag else None}
    (tmp_path / "a.zip.part.json").write_text(json.dumps(note))
    lock = tmp_path / "lock.json"
    assert get(remote(site, sha256=None), tmp_path, lock_path=lock).read_bytes() == DATA


def test_resumed_file_of_wrong_hash_is_fetched_anew_once(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(b"z" * 500_000)
    assert get(remote(site), tmp_path).read_bytes() == DATA
    assert [asked[2] for asked in site.asked] == ["bytes=500000-", ""]


def test_part_longer_than_the_file(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(DATA + b"more")
    assert get(remote(site), tmp_path).read_bytes() == DATA
    (tmp_path / "a.zip").unlink()
    (tmp_path / "a.zip.part").write_bytes(DATA + b"more")
    assert get(remote(site, size=None), tmp_path).read_bytes() == DATA  # found out by status 416
    assert site.asked[-2][2] == f"bytes={len(DATA) + 4}-"


def test_killed_between_last_byte_and_rename(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(DATA)
    assert get(remote(site), tmp_path).read_bytes() == DATA
    assert site.asked == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusals_are_not_repeated(site: Site, tmp_path: Path, status: int) -> None:
    site.statuses["/a.zip"] = status
    refused(remote(site), tmp_path, f"answers {status}")
    assert len(site.asked) == 1


def test_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.statuses["/a.zip"] = 503
    refused(remote(site), tmp_path, "answers 503")
    assert len(site.asked) == download.MAX_FRUITLESS
    timer = threading.Timer(0.05, site.statuses.clear)
    timer.start()
    assert get(remote(site), tmp_path).read_bytes() == DATA
    timer.join()


def test_mirror_takes_over(site: Site, tmp_path: Path) -> None:
    site.files["/mirror/a.zip"] = DATA
    site.statuses["/a.zip"] = 404
    both = remote(site, urls=(f"{site.url}/a.zip", f"{site.url}/mirror/a.zip"))
    assert get(both, tmp_path).read_bytes() == DATA


def test_mirror_goes_on_where_the_dead_host_stopped(site: Site, tmp_path: Path) -> None:
    with serve(Site(files={"/a.zip": DATA}, etag='"other"')) as mirror:
        site.drop_after, site.status_after_drop = 600_000, 403
        both = remote(site, urls=(f"{site.url}/a.zip", f"{mirror.url}/a.zip"))
        assert get(both, tmp_path).read_bytes() == DATA
        assert [asked[2] for asked in site.asked + mirror.asked] == ["", "bytes=600000-", "bytes=600000-"]
        assert mirror.sent == len(DATA) - 600_000


def test_dead_host_and_no_network(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    dead = Remote("a.zip", (f"http://127.0.0.1:{port}/a.zip", "https://no-such-host.invalid/a.zip"), 5, SHA256)
    refused(dead, tmp_path, r"127\.0\.0\.1.*cannot be reached.*no-such-host\.invalid.*Check the network")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("headers", [{"Content-Type": "text/html; charset=utf-8"}, {}])
def test_page_with_status_200(site: Site, tmp_path: Path, headers: dict[str, str]) -> None:
    site.files["/a.zip"] = b"\n<!DOCTYPE html><html>Please log in</html>"
    site.headers = headers
    refused(remote(site, size=None), tmp_path, "sends a page .* instead of the file")
    assert not (tmp_path / "a.zip.part").exists() or (tmp_path / "a.zip.part").stat().st_size == 0


def test_wrong_hash_and_wrong_size(site: Site, tmp_path: Path) -> None:
    refused(remote(site, sha256="0" * 64), tmp_path, f"SHA-256 {SHA256}, expected 0000")
    refused(remote(site, size=7), tmp_path, f"has a file of {len(DATA)} bytes, expected 7")
    assert not (tmp_path / "a.zip.part").exists()


def test_file_that_grows_beyond_its_length(site: Site, tmp_path: Path) -> None:
    site.length = False
    refused(remote(site, size=len(DATA) - 10), tmp_path, "sends more than")


def test_unknown_length(site: Site, tmp_path: Path) -> None:
    site.length = False
    refused(remote(site, size=None), tmp_path, "does not say how long the file is")
    assert get(remote(site), tmp_path).read_bytes() == DATA


def test_encoded_answer(site: Site, tmp_path: Path) -> None:
    site.headers = {"Content-Encoding": "gzip"}
    refused(remote(site), tmp_path, r"sends the file encoded \(gzip\)")


def test_wrong_content_range(site: Site, tmp_path: Path) -> None:
    whole = f"bytes 0-{len(DATA) - 1}/{len(DATA)}"
    for wrong in (whole, "bytes 1000-1999/*", "items 1000-1/2", "bytes 1000-1001/2000"):
        (tmp_path / "a.zip.part").write_bytes(DATA[:1000])
        site.content_range = wrong
        refused(remote(site), tmp_path, "answers bytes from 1000 on with Content-Range|has a file of 2000 bytes")


def test_redirects(site: Site, tmp_path: Path) -> None:
    site.redirects["/a.zip"] = "http://127.0.0.1:1/elsewhere.zip"
    refused(remote(site), tmp_path, "redirects to http://127.0.0.1:1/elsewhere.zip, which is not https")


@pytest.mark.parametrize("url", ["http://example.org/a.zip", "ftp://example.org/a.zip", "file:///etc/hostname"])
def test_other_schemes(tmp_path: Path, url: str) -> None:
    refused(Remote("a.zip", (url,), None, SHA256), tmp_path, "is not an https address")


def test_first_hash_is_recorded_and_later_files_must_equal_it(site: Site, tmp_path: Path) -> None:
    lock, unpublished = tmp_path / "lock.json", remote(site, size=None, sha256=None)
    get(unpublished, tmp_path / "a", lock_path=lock)
    assert json.loads(lock.read_text())[f"{site.url}/a.zip"] == {"sha256": SHA256, "size": len(DATA)}
    get(unpublished, tmp_path / "b", lock_path=lock)
    site.files["/a.zip"] = DATA[::-1]
    refused(unpublished, tmp_path / "c", f"expected {SHA256}", lock_path=lock)
    lock.write_text("{")
    refused(unpublished, tmp_path / "d", r"lock\.json: not valid JSON", lock_path=lock)


def test_existing_file_is_checked(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(DATA)
    assert get(remote(site), tmp_path) == path
    path.write_bytes(DATA[:-1] + b"?")
    with pytest.raises(UserError, match=r"a\.zip: SHA-256 is .*; delete it and run again"):
        get(remote(site), tmp_path)
    assert site.asked == []


def test_disk_too_small_is_found_at_once(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "free_disk_bytes", lambda _: 1_000_000)
    refused(remote(site), tmp_path, "2 MB to download, but only 1 MB free")
    assert not (tmp_path / "a.zip.part").exists()


PROGRAM = """
import sys
from pathlib import Path
from lesionsam.data.sources.download import Remote, fetch
url, folder, size, sha256 = sys.argv[1:]
fetch(Remote("a.zip", (url,), int(size), sha256), Path(folder), backoff=0.01)
"""


def start(site: Site, folder: Path) -> subprocess.Popen[bytes]:
    source = str(Path(__file__).parent.parent.parent / "src")
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, f"{site.url}/a.zip", str(folder), str(len(DATA)), SHA256],
        env={**os.environ, "PYTHONPATH": source},
    )


def test_killed_at_several_places_and_then_completed(site: Site, tmp_path: Path) -> None:
    site.slice_bytes, site.delay = 15_000, 0.002
    part, reached = tmp_path / "a.zip.part", []
    for goal in (1, 400_000, 1_000_000):
        child = start(site, tmp_path)
        deadline = time.monotonic() + 30
        while (not part.exists() or part.stat().st_size < goal) and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
        reached.append(part.stat().st_size)
        assert not (tmp_path / "a.zip").exists()
    site.delay = 0.0
    assert get(remote(site), tmp_path).read_bytes() == DATA
    assert reached == sorted(reached)
    assert site.asked[-1][2] == f"bytes={reached[-1]}-"


def test_two_at_once_fetch_the_file_once(site: Site, tmp_path: Path) -> None:
    site.slice_bytes, site.delay = 50_000, 0.01
    children = [start(site, tmp_path) for _ in range(2)]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    assert (tmp_path / "a.zip").read_bytes() == DATA
    assert site.sent == len(DATA)

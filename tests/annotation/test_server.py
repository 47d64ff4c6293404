"""The annotation page's server over real HTTP: saving, two at once, kills, attacks, bad files."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.annotating import BIG, SIZE, SMALL, Served, command, draw_images, sent, serving
from lesionsam.annotation import pictures as pictures_module
from lesionsam.annotation import store as store_module
from lesionsam.annotation.catalogue import Catalogue, key_of
from lesionsam.annotation.gate import HEADERS, MAX_BODY, is_loopback
from lesionsam.annotation.pictures import LEVELS, Pictures
from lesionsam.annotation.serve import annotate, default_table, listen
from lesionsam.errors import UserError
from lesionsam.models.checkpoint import build_sam, save_sam
from lesionsam.models.compact import CompactArchitecture

NASTY = '<img src=x onerror="document.title=1">'
NAMES = ("a", "b c", "病变 é", NASTY)
TINY = CompactArchitecture(image_size=64, patch_size=8, width=32, depth=2, num_heads=2, prompt_width=32, decoder_mlp=64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_sam(build_sam("compact", architecture=TINY), path, name="compact")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_images(tmp_path / "images", NAMES)
    return tmp_path


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with serving(folder) as found:
        yield found


@pytest.fixture(scope="module")
def fort(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all who must not get through; nothing is ever written beside it."""
    folder = tmp_path_factory.mktemp("fort")
    draw_images(folder / "images", NAMES)
    with serving(folder) as found:
        yield found
    assert sorted(path.name for path in folder.iterdir()) == ["images"]


def rows(folder: Path) -> dict[tuple[str, str], list[float]]:
    """(image_id, lesion_id) -> the eight numbers."""
    with (folder / "boxes.csv").open(newline="") as file:
        return {
            (row["image_id"], row["lesion_id"]): [float(row[name]) for name in list(row)[-8:]]
            for row in csv.DictReader(file)
        }


# ------------------------------------------------------------------------------------------------------ the page


@pytest.mark.parametrize("is_moved", [True, False])
def test_an_image_replaced_with_its_time_and_size_kept_is_shown_anew(folder: Path, is_moved: bool) -> None:
    """As `cp -p` and archives with fixed times leave it; uncompressed formats keep the size."""
    path = folder / "images" / "replaced.bmp"
    Image.new("RGB", (64, 48), (250, 10, 10)).save(path)
    before = path.stat()
    with serving(folder) as served:
        address = f"/api/images/{served.key('replaced')}/picture?level=thumb"
        first = served.client.get(address).content
        other = path.with_suffix(".tmp") if is_moved else path
        Image.new("RGB", (64, 48), (10, 10, 250)).save(other, "BMP")
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(path)
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        second = served.client.get(address).content
    red, blue = (np.asarray(Image.open(io.BytesIO(data))).mean((0, 1)) for data in (first, second))
    assert red[0] > 200 > red[2]
    assert blue[2] > 200 > blue[0]


def test_every_answer_has_its_kind_and_its_guards(fort: Served) -> None:
    key = fort.key("a")
    kinds = {
        "/": "text/html; charset=utf-8",
        "/annotate.js": "text/javascript; charset=utf-8",
        "/annotate.css": "text/css; charset=utf-8",
        "/icon.svg": "image/svg+xml",
        "/api/session": "application/json",
        f"/api/images/{key}": "application/json",
        f"/api/images/{key}/picture": "image/jpeg",
        "/nothing": "application/json",
        "/api/images/0": "application/json",
        "/docs": "application/json",
        "/openapi.json": "application/json",
    }
    for address, kind in kinds.items():
        answer = fort.client.get(address)
        assert answer.headers["content-type"] == kind, address
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS, address
        assert "server" not in answer.headers or "uvicorn" in answer.headers["server"]
    page = fort.client.get("/").text
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing from elsewhere: it works offline
    assert "style=" not in page  # which the content security policy would refuse
    assert "<script>" not in page


def test_the_session_lists_every_image(fort: Served) -> None:
    said = fort.client.get("/api/session").json()
    assert {name for _, name, *_ in said["images"]} == set(NAMES)
    assert all(key == key_of(name) for key, name, *_ in said["images"])
    assert (said["table"], said["model"], said["problem"]) == ("boxes.csv", None, "")
    assert str(fort.desk.store.path.parent.parent) not in fort.client.get("/api/session").text


def test_pictures_are_small_upright_and_right(folder: Path) -> None:
    turned = Image.new("RGB", (2400, 1200), (10, 200, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "images" / "turned.jpg", exif=exif)
    with serving(folder) as served:
        found = served.client.get(f"/api/images/{served.key('turned')}").json()
        assert (found["width"], found["height"]) == (1200, 2400)
        for level, longest in (("thumb", 160), ("view", 1600), ("full", 2400)):
            data = served.client.get(f"/api/images/{served.key('turned')}/picture?level={level}").content
            with Image.open(__import__("io").BytesIO(data)) as image:
                assert (image.format, image.size) == ("JPEG", (longest // 2, longest))
                assert np.abs(np.asarray(image)[10, 10].astype(int) - (10, 200, 30)).max() < 8
        assert served.client.get(f"/api/images/{served.key('turned')}/picture?level=../x").status_code == 422


def test_one_large_image_is_decoded_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for at once: four decoders at work on 95 megapixels took 4.2 GB."""
    draw_images(tmp_path / "images", ["a", "b", "c"])
    at_work, most, decode = [0], [0], pictures_module.read_reduced

    def counted(path: Path, longest: int) -> Any:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        time.sleep(0.1)
        at_work[0] -= 1
        return decode(path, longest)

    monkeypatch.setattr(pictures_module, "read_reduced", counted)
    entries = list(Catalogue([tmp_path / "images"]).by_key.values())
    for large_pixels, expected in ((SIZE[0] * SIZE[1] - 1, [1]), (SIZE[0] * SIZE[1], [2, 3, 4, 5, 6])):
        monkeypatch.setattr(pictures_module, "LARGE_PIXELS", large_pixels)
        most[0], pictures = 0, Pictures()
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(pictures.jpeg, entry, level) for entry in entries for level in LEVELS]
            asked += [pool.submit(pictures.small, entry, 100) for entry in entries]  # type: ignore[misc]
            assert all(len(future.result()) for future in asked)
        assert most[0] in expected


def test_what_is_saved_is_in_the_table(served: Served, folder: Path) -> None:
    for k, name in enumerate(NAMES):
        answer = served.save(name, 0, f"c{k}", [sent(), sent("1", [0, 0, 50.123, 40], [1, 1, 9, 9], core="suggested")])
        assert answer.status_code == 200, answer.text
        assert answer.json()["state"]["revision"] == 1
    assert rows(folder) == {
        (name, key): values
        for name in NAMES
        for key, values in (("0", [*BIG, *SMALL]), ("1", [0, 0, 50.12, 40, 1, 1, 9, 9]))
    }
    said = served.client.get("/api/changes?clock=0").json()
    assert said["clock"] == len(NAMES)
    assert sorted(said["changed"]) == sorted([served.key(name), "done", 2, 1] for name in NAMES)
    assert served.client.get(f"/api/changes?clock={len(NAMES)}").json()["changed"] == []


def test_two_tabs_never_overwrite_each_other(served: Served, folder: Path) -> None:
    assert served.save("a", 0, "first", [sent()], who="ann").status_code == 200
    refused = served.save("a", 0, "second", [sent(big=[70, 50, 240, 180])], who="bob")
    assert refused.status_code == 409
    assert refused.json()["problem"].startswith("ann changed this image at")
    assert refused.json()["state"]["lesions"][0]["big"] == BIG
    assert rows(folder)["a", "0"][:4] == BIG
    assert served.save("a", 0, "first", [sent()], who="ann").json()["state"]["revision"] == 1  # sent twice
    assert served.save("a", 1, "third", [sent(big=[70, 50, 240, 180])], who="bob").status_code == 200
    assert rows(folder)["a", "0"][0] == 70


@pytest.mark.parametrize(
    "body",
    [
        {"base": -1},
        {"base": 0.5},
        {"change": "../x"},
        {"change": ""},
        {"who": "x" * 81},
        {"mark": "maybe"},
        {"more": 1},
        {"lesions": [sent(big=[1, 2, 3])]},
        {"lesions": [sent(big=[1, 2, 3, "4;"])]},
        {"lesions": [sent("")]},
        {"lesions": [sent(big=[1e300, 2, 3, 4])]},
        {"lesions": [sent("a\nb")]},
        {"lesions": [sent(), sent()]},
        {"lesions": [sent(big=[300, 10, 100, 50])]},
        {"lesions": [sent(small=[0, 0, 10, 10])]},
        {"seconds": -1},
        {"lesions": [sent(str(k)) for k in range(201)]},
        {"who": "a\u2028b"},
        {"lesions": [sent(seconds=1e9)]},
        {"lesions": [sent(core="<b>")]},
        {"lesions": [{"id": "0", "big": BIG}]},
    ],
)
def test_a_wrong_change_is_refused_with_a_sentence(fort: Served, body: dict[str, Any]) -> None:
    values = {"base": 0, "change": "x", "lesions": [sent()]} | body
    answer = fort.client.put(f"/api/images/{fort.key('a')}", json=values)
    assert answer.status_code == 422
    assert len(answer.json()["problem"]) > 10


def test_numbers_that_are_none(fort: Served) -> None:
    body = json.dumps({"base": 0, "change": "x", "lesions": [sent(big=[1, float("nan"), 3, float("inf")])]})
    answer = fort.client.put(f"/api/images/{fort.key('a')}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    deep = "[" * 100_000 + "]" * 100_000
    answer = fort.client.put(f"/api/images/{fort.key('a')}", content=deep, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)


# ------------------------------------------------------------------------------------------------------ masks


def test_masks_follow_the_boxes(folder: Path, weights: Path) -> None:
    with serving(folder, weights=weights) as served:
        address = f"/api/images/{served.key('a')}/preview"
        assert served.client.post("/api/prepare", json={"keys": [served.key("a"), key_of("gone")]}).status_code == 200
        deadline = time.monotonic() + 20
        while True:
            found = served.client.post(address, json={"big": BIG, "small": SMALL}).json()
            if not found["pending"] or time.monotonic() > deadline:
                break
        assert found["small"] == SMALL
        assert set(found["model"]) == {"rings", "iou", "entropy"}
        assert 0 <= found["agreement"] <= 1
        ring = np.array(found["prior"]["rings"][0]).reshape(-1, 2)  # the drawn ellipse's outline, from its colour
        assert np.abs(ring.min(0) - (96, 67)).max() < 8
        assert np.abs(ring.max(0) - (224, 173)).max() < 8


def test_a_core_is_suggested_on_the_lesion(served: Served) -> None:
    answer = served.client.post(f"/api/images/{served.key('a')}/preview", json={"big": [60, 40, 300, 220]})
    x0, y0, x1, y1 = answer.json()["small"]
    corners = np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]])
    assert ((((corners - (160, 120)) / (64, 52.8)) ** 2).sum(1) < 1.05).all()  # wholly inside the drawn ellipse
    assert (x1 - x0) * (y1 - y0) > 0.15 * 128 * 106
    outside = served.client.post(f"/api/images/{served.key('a')}/preview", json={"big": [0, 0, 30, 30]}).json()["small"]
    assert 0 <= outside[0] < outside[2] <= 30  # a box without a lesion still gets a core inside it
    for wrong in ([50, 50, 50, 60], [60, 50, 40, 60]):
        answer = served.client.post(f"/api/images/{served.key('a')}/preview", json={"big": wrong})
        assert (answer.status_code, "x0 < x1" in answer.json()["problem"]) == (422, True)


# ------------------------------------------------------------------------------------------------------ bad files


def bomb(path: Path) -> None:
    """A PNG that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    )


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:9000])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b""), "file is empty"),
        (lambda path: path.write_text("<html>"), "an HTML or XML page"),
        (lambda path: path.write_bytes(b"PK\x03\x04zip"), "a zip archive"),
        (bomb, "3600 megapixels; expected at most 200"),
        (truncated, "truncated or damaged"),
        (lambda path: path.unlink(), "was it moved or renamed?"),
    ],
)
def test_a_bad_image_is_a_sentence_and_the_page_goes_on(folder: Path, spoil: Any, said: str) -> None:
    bad = folder / "images" / "bad.jpg"
    bad.write_bytes(b"x")
    with serving(folder) as served:
        spoil(bad)
        address = f"/api/images/{served.key('bad')}/picture"
        answer = served.client.get(address)
        assert answer.status_code == 422
        assert said in answer.json()["problem"]
        assert answer.json()["problem"].startswith("bad.jpg: ")
        assert str(folder) not in answer.text  # no folder of this machine goes out
        assert served.client.get(f"/api/images/{served.key('a')}/picture").status_code == 200
        assert served.save("a", 0, "x", [sent()]).status_code == 200


def test_a_name_that_cannot_be_annotated_says_so(folder: Path) -> None:
    Image.new("RGB", SIZE).save(folder / "images" / "a.jpg")
    with serving(folder) as served:
        said = served.client.get("/api/session").json()["images"]
        (key,) = [each[0] for each in said if each[2] == "faulty"]
        answer = served.client.get(f"/api/images/{key}")
        assert answer.status_code == 422
        assert "has the same name apart from folder or ending" in answer.json()["problem"]
        assert served.client.put(f"/api/images/{key}", json={"base": 0, "change": "x"}).status_code == 422


def test_boxes_outside_an_image_are_named(folder: Path) -> None:
    (folder / "boxes.csv").write_text(
        "image_id,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1\na,10,10,900,200,20,20,30,30\n"
    )
    with serving(folder) as served:
        assert (
            "lesion 0 of boxes.csv lies outside this image of 320x240 px"
            in served.client.get(f"/api/images/{served.key('a')}").json()["problem"]
        )


def test_a_table_broken_by_hand_is_said_everywhere_and_heals(served: Served, folder: Path) -> None:
    assert served.save("a", 0, "x", [sent()]).status_code == 200
    good = (folder / "boxes.csv").read_text()
    (folder / "boxes.csv").write_text(good.replace("80.00", "eighty"))
    refused = served.save("b c", 0, "y", [sent()])
    assert refused.status_code == 503
    for said in (
        refused.json(),
        served.client.get("/api/changes?clock=0").json(),
        served.client.get("/api/session").json(),
    ):
        assert "line 2, big_x0: expected a number of pixels, got 'eighty'" in said["problem"]
        assert "Nothing is written until that is right" in said["problem"]
        assert said["problem"].startswith("boxes.csv: line 2")
    (folder / "boxes.csv").write_text(good)
    assert served.save("b c", 0, "y", [sent()]).status_code == 200
    assert set(rows(folder)) == {("a", "0"), ("b c", "0")}


def test_a_full_disk_is_said_and_survived(served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device", str(folder / "boxes.csv"))

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "atomic_write", full)
        refused = served.save("a", 0, "x", [sent()])
    assert refused.status_code == 503
    assert refused.json()["problem"] == "boxes.csv cannot be written: the disk is full; free some space"
    assert served.save("a", 0, "x", [sent()]).status_code == 200
    assert rows(folder) == {("a", "0"): [*BIG, *SMALL]}


# ------------------------------------------------------------------------------------------------------ attacks


def raw(served: Served, request: bytes) -> tuple[int, bytes]:
    """Status and everything that comes back for bytes as they are."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(request)
        line.settimeout(20)
        data = b""
        while b"\r\n\r\n" not in data and (part := line.recv(1 << 16)):
            data += part
    return (int(data.split()[1]) if data else 0), data


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/..%2f..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/annotate.js/../server.py",
        "/api/images/../../boxes.csv",
        "/api/images/..%2f..%2fboxes.csv/picture",
        "/api/images/a/picture",
        "//etc/passwd",
        "/api/images/a%20.png",
        "/images/a.png",
        "/boxes.csv",
        "/boxes.journal.jsonl",
        "/api/images/%00",
        "/api/images/0123456789abcdef/picture",
        "/web/main.ts",
        "/static/annotate.js",
        "/annotate.js%00.png",
        "/..\\..\\x",
        "http://127.0.0.1/etc/passwd",
        "/api/images/0123456789ABCDEF",
    ],
)
def test_paths_lead_nowhere(fort: Served, path: str) -> None:
    host = fort.url.removeprefix("http://")
    status, data = raw(fort, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert status in (400, 404, 422)
    for secret in (b"root:", b"image_id", b"\x89PNG", b"import "):
        assert secret not in data


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.0.0.1:{port}.evil.example",
        "localhost",
        "localhost.evil.example:{port}",
        "192.168.1.5:{port}",
        "",
        "[::1",
        "127.0.0.1:{port}@evil.example",
        "evil.example#127.0.0.1:{port}",
        "2130706433:{port}",
        "0.0.0.0:{port}",
    ],
)
def test_other_hosts_are_refused(fort: Served, host: str) -> None:
    """A name of an attacker that resolves to this machine (DNS rebinding) gets nothing, whatever it asks."""
    port = fort.url.rsplit(":", 1)[1]
    header = f"Host: {host.format(port=port)}\r\n"
    status, data = raw(fort, f"GET /api/session HTTP/1.1\r\n{header}Connection: close\r\n\r\n".encode())
    assert status in (400, 421)
    assert b"image" not in data
    body = json.dumps({"base": 0, "change": "x", "lesions": [sent()]}).encode()
    head = (
        f"PUT /api/images/{fort.key('a')} HTTP/1.1\r\n{header}Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    assert raw(fort, head.encode() + body)[0] in (400, 421)


def test_one_host_and_ours(fort: Served) -> None:
    host = fort.url.removeprefix("http://")
    twice = f"GET / HTTP/1.1\r\nHost: {host}\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert raw(fort, twice.encode())[0] in (400, 421)
    assert raw(fort, b"GET / HTTP/1.0\r\n\r\n")[0] in (400, 421)
    port = host.split(":")[1]
    for name in (host, f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert raw(fort, f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())[0] == 200, name


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://{host}"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://localhost:{port}"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://{host}.evil.example"},
        {"origin": ""},
        {"origin": "file://"},
    ],
)
def test_other_origins_are_refused(fort: Served, headers: dict[str, str]) -> None:
    host = fort.url.removeprefix("http://")
    shown = {name: value.format(host=host, port=host.split(":")[1]) for name, value in headers.items()}
    body = {"base": 0, "change": "x", "lesions": [sent()]}
    answers = [
        fort.client.put(f"/api/images/{fort.key('a')}", json=body, headers=shown),
        fort.client.get("/api/session", headers=shown),
        fort.client.get(f"/api/images/{fort.key('a')}/picture", headers=shown),
    ]
    assert [answer.status_code for answer in answers] == [403] * 3


def test_our_own_page_and_a_link_to_it_are_taken(fort: Served) -> None:
    ours = {"origin": fort.url, "sec-fetch-site": "same-origin"}
    assert fort.client.post("/api/prepare", json={"keys": []}, headers=ours).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert fort.client.get("/", headers=link).status_code == 200
    assert fort.client.get("/api/session", headers=link).status_code == 403
    assert "access-control-allow-origin" not in fort.client.get("/api/session", headers=ours).headers


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n\r\nfile\r\n--x--", 415),
        ({"content-type": "text/plain"}, b'{"base": 0}', 415),
        ({"content-type": "application/x-www-form-urlencoded"}, b"base=0", 415),
        ({"content-type": "application/octet-stream"}, b"\x89PNG", 415),
        ({"content-type": "application/json"}, b" " * (MAX_BODY + 1), 413),
        ({"content-type": "application/json", "transfer-encoding": "chunked"}, b"2\r\n{}\r\n0\r\n\r\n", 411),
        ({"content-type": "application/json"}, b"\xff\xfe", 422),
        ({"content-type": "application/json"}, b"[]", 422),
    ],
)
def test_uploads_are_refused(fort: Served, headers: dict[str, str], body: bytes, status: int) -> None:
    host = fort.url.removeprefix("http://")
    lines = [f"{name}: {value}" for name, value in headers.items()]
    lines += [] if "transfer-encoding" in headers else [f"content-length: {len(body)}"]
    head = "\r\n".join([f"PUT /api/images/{fort.key('a')} HTTP/1.1", f"host: {host}", "connection: close", *lines])
    found, _ = raw(fort, head.encode() + b"\r\n\r\n" + body[: 1 << 16])
    assert found in (status, 400)


@pytest.mark.parametrize("method", ["DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_refused(fort: Served, method: str) -> None:
    assert fort.client.request(method, f"/api/images/{fort.key('a')}").status_code in (400, 405)


def test_a_websocket_is_refused(fort: Served) -> None:
    host = fort.url.removeprefix("http://")
    head = (
        f"GET /api/changes HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert raw(fort, head.encode())[0] in (400, 403, 404, 422, 426)


def test_other_machines_need_the_token(folder: Path) -> None:
    with serving(folder, host="0.0.0.0", token="secret") as served:  # noqa: S104, S106
        port = served.url.rsplit(":", 1)[1]
        bare = httpx.Client(base_url=served.url)
        for address in ("/", "/api/session", "/?token=", "/?token=wrong", "/api/session?token=secret"):
            assert bare.get(address).status_code == 401, address
        assert bare.get("/", headers={"cookie": f"lesionsam_{port}=wrong"}).status_code == 401
        admitted = bare.get("/?token=secret")
        assert (admitted.status_code, admitted.headers["location"]) == (303, "/")
        assert "HttpOnly" in admitted.headers["set-cookie"]
        assert "samesite=strict" in admitted.headers["set-cookie"].lower()
        assert bare.get("/api/session").status_code == 200  # the cookie is in the client now
        assert bare.get("/api/session", headers={"host": f"192.168.0.7:{port}"}).status_code in (200, 401)
        assert bare.get("/api/session", headers={"host": f"evil.example:{port}"}).status_code == 421
        bare.close()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.8.9.1", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("192.168.1.1", False),
        ("example.org", False),
        ("127.0.0.1.evil.example", False),
    ],
)
def test_what_counts_as_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# ------------------------------------------------------------------------------------------------------ start


def test_a_port_in_use_is_one_line_or_another_port() -> None:
    with listen("127.0.0.1", 0) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port: {number} is in use by another program"):
            listen("127.0.0.1", number)
    with pytest.raises(UserError, match=r"cannot listen on 203\.0\.113\.7"):
        listen("203.0.113.7", 0)
    with pytest.raises(UserError, match="port 70000"):
        listen("127.0.0.1", 70000)


def test_a_second_page_on_the_same_table_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lesionsam.utils import locks

    monkeypatch.setattr(locks, "HANDOVER_SECONDS", 0.1)
    with locks.file_lock(folder / ".boxes.csv.lock", "annotation"), pytest.raises(UserError, match="already running"):
        annotate([folder / "images"], browser=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": Path("nowhere.safetensors")}, "no such weights file"),
        ({"model": Path("images", "a.png")}, "cannot be read as weights|not a plain file of weights"),
        ({"threshold": 0.0}, "--threshold: expected a probability"),
        ({"boxes": Path("images")}, "is a folder"),
    ],
)
def test_what_cannot_start_says_why(
    folder: Path, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=said):
        annotate(["images"], browser=False, **options)


def test_where_the_table_goes(folder: Path) -> None:
    assert default_table(folder / "images") == folder / "boxes.csv"
    assert default_table(folder / "images" / "a.png") == folder / "images" / "boxes.csv"
    assert default_table(folder / "images" / "*.png") == folder / "images" / "boxes.csv"


# ------------------------------------------------------------------------------------------------------ kill -9


class Tab(threading.Thread):
    """A page that saves one change after the other on its images and remembers what was acknowledged."""

    def __init__(
        self,
        url: str,
        who: str,
        images: list[str],
        state: dict[str, tuple[int, list[float]]],
        left: list[int],
        seed: int,
    ) -> None:
        super().__init__(daemon=True)
        self.url, self.who, self.images, self.state, self.left = url, who, images, state, left
        self.rng = random.Random(seed)
        self.lost = 0

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=20) as client:
            while self.left[0] > 0:
                name = self.rng.choice(self.images)
                base, _ = self.state.get(name, (0, []))
                x, y = round(self.rng.uniform(0, 100), 2), round(self.rng.uniform(0, 100), 2)
                big, small = [x, y, x + 120, y + 100], [x + 20, y + 20, x + 60.5, y + 70.25]
                self.left[0] -= 1
                body = {
                    "base": base,
                    "change": f"{self.who}-{self.left[0]}-{self.rng.random()}".replace(".", ""),
                    "who": self.who,
                    "lesions": [sent(big=big, small=small)],
                }
                try:
                    answer = client.put(f"/api/images/{key_of(name)}", json=body)
                except httpx.HTTPError:
                    return  # the server is dead; whether this change counts is open, as it was not acknowledged
                if answer.status_code == 409:
                    theirs = answer.json()["state"]
                    values = [*theirs["lesions"][0]["big"], *theirs["lesions"][0]["small"]]
                    self.state[name] = theirs["revision"], values
                elif answer.status_code == 200:
                    self.state[name] = answer.json()["state"]["revision"], [*big, *small]


def kill_campaign(folder: Path, saves: int, kills: int, seed: int) -> tuple[int, int]:
    """Saves from two tabs over shared images; kill -9 now and then; after each, nothing acknowledged may be missing.

    Returns:
        acknowledged revisions, kills.
    """
    names = [f"im{k}" for k in range(6)]
    draw_images(folder / "images", names)
    rng = random.Random(seed)
    left, done = [saves], 0
    acknowledged: dict[str, tuple[int, list[float]]] = {}
    while left[0] > 0 or done < kills:
        left[0] = max(left[0], 20)
        with command(folder / "images", "--port", "0") as (process, url):
            check_state(folder, url, acknowledged)
            states = [dict(acknowledged), dict(acknowledged)]
            tabs = [
                Tab(url, who, names, state, left, seed + done * 2 + k)
                for k, (who, state) in enumerate(zip(("ann", "bob"), states, strict=True))
            ]
            for tab in tabs:
                tab.start()
            if done < kills:
                time.sleep(rng.uniform(0.05, 0.05 + 2.0 * saves / max(kills, 1) / 100))
                process.send_signal(signal.SIGKILL)
                done += 1
            for tab in tabs:
                tab.join(60)
        for state in states:
            for name, (revision, values) in state.items():
                if revision > acknowledged.get(name, (0, []))[0]:
                    acknowledged[name] = revision, values
    with command(folder / "images", "--port", "0") as (_, url):
        check_state(folder, url, acknowledged)
    return sum(revision for revision, _ in acknowledged.values()), done


def check_state(folder: Path, url: str, acknowledged: dict[str, tuple[int, list[float]]]) -> None:
    """The table is whole, and holds what was acknowledged or something newer that was under way."""
    if acknowledged:
        held = rows(folder)
    for name, (revision, values) in acknowledged.items():
        state = httpx.get(f"{url}/api/images/{key_of(name)}", timeout=20).json()["state"]
        now = [*state["lesions"][0]["big"], *state["lesions"][0]["small"]]
        assert state["revision"] >= revision, f"{name}: {revision} acknowledged, {state['revision']} there"
        assert state["revision"] > revision or now == pytest.approx(values, abs=0.006), name
        assert held[name, "0"] == pytest.approx(now, abs=0.006)


def test_kill_nine_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """The short form; `python tests/annotation/test_server.py FOLDER 1000 30` is the long one."""
    acknowledged, kills = kill_campaign(tmp_path, saves=60, kills=2, seed=1)
    assert kills == 2
    assert acknowledged >= 20


if __name__ == "__main__":
    import sys

    print(kill_campaign(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), seed=0))

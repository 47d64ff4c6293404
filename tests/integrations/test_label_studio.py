"""Label Studio's calls over real HTTP, as its server sends them; its own files come from a stand-in for it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from helpers.annotating import SECONDS
from helpers.tiny import draw_lesion, tiny_sam
from lesionsam.annotation.serve import listen
from lesionsam.errors import UserError
from lesionsam.formats.brush import encode_brush
from lesionsam.formats.rle import decode
from lesionsam.inference.predictor import Predictor
from lesionsam.integrations.addresses import ImageSources
from lesionsam.integrations.label_studio import Backend, create_app
from lesionsam.integrations.serve import MAX_BODY, PASSWORD, USER, Guard, login_of, serve
from lesionsam.models.checkpoint import save_sam

HEIGHT, WIDTH = 60, 80
IMAGE = draw_lesion(np.random.default_rng(1), HEIGHT, WIDTH).image
PREDICTOR = Predictor(tiny_sam(sharpness=20))
BRUSH = """<View>
  <Image name="img" value="$photo" zoom="true"/>
  <BrushLabels name="mask" toName="img"><Label value="naevus"/><Label value="lesion"/></BrushLabels>
  <RectangleLabels name="box" toName="img" smart="true"><Label value="naevus"/></RectangleLabels>
</View>"""
POLYGON = BRUSH.replace("BrushLabels", "PolygonLabels")
KEY, PAT, ACCESS = "0123456789abcdef", "head.body.tail", "access-for-five-minutes"


def png(image: np.ndarray = IMAGE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def decode_brush(rle: list[int], height: int, width: int) -> np.ndarray:
    """Read a brush region as label-studio-converter's `decode_rle` does, bit by bit; the alpha channel is the mask."""
    bits = iter("".join(f"{byte:08b}" for byte in rle))

    def read(count: int) -> int:
        return int("".join(next(bits) for _ in range(count)), 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        repeats = read(1)
        length = 1 + read(sizes[read(2)])
        values += [read(word)] * length if repeats else [read(word) for _ in range(length)]
    return np.array(values).reshape(height, width, 4)[:, :, 3] > 0


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_brush_regions_decode_to_their_mask(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_brush(encode_brush(mask), *mask.shape), mask)


def test_long_runs_are_cut() -> None:
    mask = np.zeros((150, 200), bool)
    mask[100:, 7] = True
    np.testing.assert_array_equal(decode_brush(encode_brush(mask), 150, 200), mask)


@dataclass
class Stand:
    """A stand-in for Label Studio or a cloud: path -> bytes, or path -> address to go to.

    Attributes:
        asked: (path with query, Authorization) of each request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def standing(stand: Stand) -> Iterator[Stand]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            stand.asked.append((self.path, self.headers.get("Authorization", "")))
            if target := stand.redirects.get(self.path):
                self.send_response(303)
                self.send_header("Location", target)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = stand.files.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (self.path, sent) == ("/api/token/refresh", {"refresh": PAT})
            body = json.dumps({"access": ACCESS}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stand.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stand
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(images: ImageSources, **guard: Any) -> Iterator[httpx.Client]:
    """A backend on a free port, in a thread."""
    listener = listen("127.0.0.1", 0)
    app = Guard(create_app(Backend(PREDICTOR, images, "tiny-1")), **{"login": None, "any_host": False} | guard)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + SECONDS
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=SECONDS) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images, an image beside it, and a link from one to the other."""
    (tmp_path / "root" / "ward 1").mkdir(parents=True)
    (tmp_path / "root" / "ward 1" / "spot #1.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "root" / "notes.txt").write_text("no image")
    return tmp_path / "root"


def body(address: str, *drawn: dict[str, Any], interface: str = BRUSH) -> dict[str, Any]:
    """What Label Studio sends to /predict: for a batch without context, for a smart tool with it."""
    context = {"context": {"result": list(drawn), "user_id": 1, "lead_time": 1.5}} if drawn else {}
    return {
        "tasks": [
            {
                "id": 12,
                "data": {"photo": address, "note": "left arm"},
                "meta": {},
                "is_labeled": False,
                "project": 3,
                "annotations": [],
                "predictions": [],
            }
        ],
        "model_version": "tiny-1",
        "project": "3.1764541846",
        "label_config": interface,
        "params": {"login": None, "password": None, **context},
    }


def rectangle(**value: Any) -> dict[str, Any]:
    return {
        "id": "drawn-box",
        "type": "rectanglelabels",
        "from_name": "box",
        "to_name": "img",
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "image_rotation": 0,
        "value": {"x": 20, "y": 10, "width": 60, "height": 75, "rotation": 0, "rectanglelabels": ["naevus"]} | value,
    }


def point(x: float, y: float, is_positive: int) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": 0.5, "keypointlabels": ["lesion"]}
    return {"type": "keypointlabels", "is_positive": is_positive, "value": value}


DATA_URL = "data:image/png;base64," + base64.b64encode(png()).decode()


def test_health_setup_and_webhook_answer() -> None:
    with serving(ImageSources()) as client:
        assert client.get("/health").json()["status"] == client.get("/").json()["status"] == "UP"
        assert client.get("/versions").json() == {"versions": ["tiny-1"]}
        setup = {"project": "3.1764541846", "schema": BRUSH, "hostname": "http://evil.example", "access_token": "abc"}
        assert client.post("/setup", json=setup).json() == {"model_version": "tiny-1"}
        without = client.post("/setup", json=setup | {"schema": "<View><Text name='a' value='$t'/></View>"})
        assert without.status_code == 422
        assert "expected BrushLabels or PolygonLabels for an Image" in without.json()["error"]
        webhook = client.post("/webhook", json={"action": "ANNOTATION_CREATED", "project": {"id": 3}})
        assert webhook.status_code == 200


def test_a_plain_prediction_is_the_lesion_of_auto() -> None:
    (expected,) = PREDICTOR.predict(IMAGE, auto=True)
    with serving(ImageSources()) as client:
        (answer,) = client.post("/predict", json=body(DATA_URL)).json()["results"]
    (region,) = answer["result"]
    assert (answer["model_version"], region["from_name"], region["to_name"]) == ("tiny-1", "mask", "img")
    assert (region["type"], region["value"]["format"], region["value"]["brushlabels"]) == (
        "brushlabels",
        "rle",
        ["lesion"],
    )
    assert (region["original_width"], region["original_height"]) == (WIDTH, HEIGHT)
    assert expected.area
    np.testing.assert_array_equal(decode_brush(region["value"]["rle"], HEIGHT, WIDTH), expected.mask)
    assert 0 <= answer["score"] <= 1


def test_a_drawn_rectangle_is_the_prompt_and_its_label_is_kept() -> None:
    (expected,) = PREDICTOR.predict(IMAGE, boxes=[16, 6, 64, 51])  # 20 % of 80, 10 % of 60, and so on
    with serving(ImageSources()) as client:
        (answer,) = client.post("/predict", json=body(DATA_URL, rectangle())).json()["results"]
        turned = client.post("/predict", json=body(DATA_URL, rectangle(rotation=30)))
    (region,) = answer["result"]
    assert region["value"]["brushlabels"] == ["naevus"]
    np.testing.assert_array_equal(decode_brush(region["value"]["rle"], HEIGHT, WIDTH), expected.mask)
    assert (turned.status_code, turned.json()["error"]) == (422, "context: the rectangle is turned; draw it upright")


def test_points_are_the_prompt_inside_or_outside() -> None:
    (expected,) = PREDICTOR.predict(IMAGE, points=[[40, 30], [4, 6]], labels=[1, 0])
    with serving(ImageSources()) as client:
        sent = body(DATA_URL, point(50, 50, 1), point(5, 10, 0))
        (answer,) = client.post("/predict", json=sent).json()["results"]
    drawn = [decode_brush(region["value"]["rle"], HEIGHT, WIDTH) for region in answer["result"]]
    np.testing.assert_array_equal(drawn[0] if drawn else np.zeros((HEIGHT, WIDTH), bool), expected.mask)


def test_polygons_are_drawn_where_the_interface_has_them() -> None:
    (expected,) = PREDICTOR.predict(IMAGE, auto=True)
    with serving(ImageSources()) as client:
        (answer,) = client.post("/predict", json=body(DATA_URL, interface=POLYGON)).json()["results"]
    assert {region["type"] for region in answer["result"]} == {"polygonlabels"}
    scale = np.array([WIDTH, HEIGHT]) / 100
    rings = [(np.array(region["value"]["points"]) * scale).ravel().tolist() for region in answer["result"]]
    drawn = decode(rings, HEIGHT, WIDTH)
    assert np.count_nonzero(drawn & expected.mask) / np.count_nonzero(expected.mask) > 0.97  # outlines are simplified


def test_local_and_uploaded_files_are_read_below_their_folders(root: Path) -> None:
    (root / "3").mkdir()
    (root / "3" / "1a2b3c4d-spot.png").write_bytes(png())
    images = ImageSources(local_root=root, upload_root=root)
    for address in (
        "/data/local-files/?d=ward%201/spot%20%231.png",
        "/data/local-files/?d=ward 1/spot #1.png",
        "/data/upload/3/1a2b3c4d-spot.png",
    ):
        np.testing.assert_array_equal(images.read(address, 12), IMAGE)


@pytest.mark.parametrize(
    "address",
    [
        "/data/local-files/?d=../secret.png",
        "/data/local-files/?d=ward%201/../../secret.png",
        "/data/local-files/?d=%2e%2e/secret.png",
        "/data/local-files/?d=link.png",
        "/data/upload/../secret.png",
        "/data/upload/%2e%2e/secret.png",
        "/data/upload/link.png",
        "/data/local-files/?d=\0.png",
    ],
)
def test_no_file_outside_the_folders_is_read(root: Path, address: str) -> None:
    images = ImageSources(local_root=root, upload_root=root)
    with pytest.raises(UserError, match="leads out of the folder"):
        images.read(address, 12)
    absolute = f"/data/local-files/?d={root.parent}/secret.png"  # taken as below the root, where it is not
    with pytest.raises(UserError, match="no such file"):
        images.read(absolute, 12)


def test_messages_name_the_address_and_no_folder_of_the_server(root: Path) -> None:
    with serving(ImageSources(local_root=root)) as client:
        for name, expected in (("notes.txt", "not an image"), ("none.png", "no such file"), ("", "is a folder")):
            answer = client.post("/predict", json=body(f"/data/local-files/?d={name}"))
            assert answer.status_code == 422
            assert expected in answer.json()["error"]
            assert str(root) not in answer.json()["error"]


REFUSED = {
    "https://bucket.s3.amazonaws.com/a.png?X-Amz-Signature=secret": "amazonaws.com: not allowed .*--allow-host bucket",
    "http://169.254.169.254/latest/meta-data": "169.254.169.254: not allowed to be fetched from",
    "http://127.0.0.1:1/a.png": "127.0.0.1:1: not allowed to be fetched from",
    "file:///etc/passwd": "expected a file of Label Studio",
    "ftp://host/a.png": "expected a file of Label Studio",
    "s3://bucket/a.png": "cloud storage is read through Label Studio; give --url and LABEL_STUDIO_API_KEY",
    "/data/local-files/?d=a.png": "give --local-root or --url",
    "/data/upload/3/a.png": "give --upload-root or --url",
    "/etc/passwd": "a file of Label Studio; give --url",
    "data:image/png,abc": "data URL: empty, or not base64",
    "data:image/png;base64,AAAA": "data URL: not an image",
    "photo.png": "expected a file of Label Studio",
}


@pytest.mark.parametrize("address", REFUSED)
def test_what_is_not_allowed_is_neither_read_nor_fetched(address: str) -> None:
    with pytest.raises(UserError, match=REFUSED[address]) as caught:
        ImageSources().read(address, 12)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("key", "shown"), [(KEY, f"Token {KEY}"), (PAT, f"Bearer {ACCESS}"), ("", "")])
def test_label_studio_is_asked_for_its_files_and_its_cloud(key: str, shown: str) -> None:
    uri = base64.urlsafe_b64encode(b"s3://bucket/ward/a b?.png").decode()
    resolve = f"/tasks/12/resolve/?fileuri={uri}"
    with standing(Stand()) as cloud, standing(Stand()) as studio:
        cloud.files["/signed?X-Amz-Signature=abc"] = png()
        studio.redirects[resolve] = f"{cloud.url}/signed?X-Amz-Signature=abc"
        studio.files = dict.fromkeys(("/data/upload/3/a.png", "/data/local-files/?d=a.png"), png())
        host = cloud.url.removeprefix("http://")
        images = ImageSources(url=studio.url, api_key=key, hosts=[host])
        for address in (
            "s3://bucket/ward/a b?.png",
            "/data/upload/3/a.png",
            "/data/local-files/?d=a.png",
            f"{studio.url}/data/upload/3/a.png",
            f"{cloud.url}/signed?X-Amz-Signature=abc",
        ):
            np.testing.assert_array_equal(images.read(address, 12), IMAGE)
        assert [path for path, _ in studio.asked][:2] == [resolve, "/data/upload/3/a.png"]
        assert {authorization for _, authorization in studio.asked} == {shown}
        assert {authorization for _, authorization in cloud.asked} == {""}  # the key goes to Label Studio alone
        with pytest.raises(UserError, match=r"a\.png: the server answers 404"):
            images.read("/data/upload/4/a.png", 12)


def test_a_redirect_leads_to_no_host_that_is_not_allowed() -> None:
    with standing(Stand()) as other, standing(Stand()) as studio:
        other.files["/a.png"] = png()
        studio.redirects = {
            "/data/upload/3/a.png": f"{other.url}/a.png",
            "/data/upload/3/b.png": "file:///etc/passwd",
            "/data/upload/3/c.png": "/data/upload/3/c.png",
        }
        images = ImageSources(url=studio.url)
        with pytest.raises(UserError, match="not allowed to be fetched from"):
            images.read("/data/upload/3/a.png", 12)
        with pytest.raises(UserError, match="expected a file of Label Studio"):
            images.read("/data/upload/3/b.png", 12)
        with pytest.raises(UserError, match="redirected more than 4 times"):
            images.read("/data/upload/3/c.png", 12)
        assert not other.asked


def test_one_bad_task_costs_the_others_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    sent = body(DATA_URL)
    sent["tasks"].append({"id": 13, "data": {"photo": "/data/upload/3/a.png"}})
    with serving(ImageSources()) as client:
        answer = client.post("/predict", json=sent)
        good, bad = answer.json()["results"]
        assert (answer.status_code, len(good["result"]), bad["result"]) == (200, 1, [])
        missing = client.post("/predict", json=sent | {"tasks": [{"id": 14, "data": {"text": "a"}}]})
        assert missing.json()["error"] == "task 14: data.photo: expected the image's address"
    assert "error: task 13: /data/upload/3/a.png: a file of Label Studio" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"tasks": []}, "body.label_config: Field required"),
        (body(DATA_URL) | {"tasks": [{"id": 1}]}, "body.tasks.0.data: Field required"),
        (body(DATA_URL) | {"label_config": "<View"}, "label_config: line 1: not XML"),
        (body(DATA_URL) | {"label_config": "<!DOCTYPE a [<!ENTITY b 'c'>]><View/>"}, "label_config: line 1: holds a"),
        (
            body(DATA_URL, rectangle() | {"value": [1, 2]}),
            "body.params.context.result.0.value: Input should be a valid",
        ),
        (body(DATA_URL, rectangle(x="left")), "context: x: expected a finite number"),
        (body(DATA_URL, rectangle(width=0)), "big_x1"),
        (body(DATA_URL, point(50, 50, 0)), "label: no point has label 1"),
    ],
)
def test_malformed_requests_are_one_line(sent: dict[str, Any], expected: str) -> None:
    with serving(ImageSources()) as client:
        answer = client.post("/predict", json=sent)
    assert answer.status_code == 422
    assert expected in answer.json()["error"]


def test_pages_strangers_and_masses_of_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ImageSources()) as client:
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 421
        assert client.get("/health", headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.post("/predict", content=iter([b"{}"])).status_code == 411
        raw = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=SECONDS)
        raw.putrequest("POST", "/predict")
        raw.putheader("Content-Length", str(MAX_BODY + 1))
        raw.endheaders()
        assert raw.getresponse().status == 413
        raw.close()
    monkeypatch.setenv(USER, "ann")
    monkeypatch.setenv(PASSWORD, "long:enough")
    with serving(ImageSources(), login=login_of("0.0.0.0"), any_host=True) as client:  # noqa: S104
        asked = client.get("/health")
        assert (asked.status_code, asked.headers["WWW-Authenticate"]) == (401, 'Basic realm="lesionsam"')
        assert client.get("/health", auth=("ann", "wrong")).status_code == 401
        assert client.get("/health", auth=("ann", "long:enough"), headers={"Host": "clinic:9090"}).status_code == 200


def test_without_a_password_one_is_printed_for_other_machines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(USER, raising=False)
    assert login_of("127.0.0.1") is None
    login = login_of("0.0.0.0")  # noqa: S104
    assert login is not None
    assert len(login[1]) >= 20
    assert login[1] in capsys.readouterr().err


def test_the_command_answers_at_the_address_that_it_prints(tmp_path: Path) -> None:
    save_sam(tiny_sam(sharpness=20), tmp_path / "tiny.safetensors", name="compact")
    (tmp_path / "photo.png").write_bytes(png())
    arguments = ["--model", str(tmp_path / "tiny.safetensors"), "--local-root", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lesionsam", "label-studio", *arguments, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        with process, process.stdout or io.StringIO() as lines:
            printed = ""
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", printed)) and (line := lines.readline()):
                printed += line
            assert found, printed
            answer = httpx.post(f"{found[0]}/predict", json=body("/data/local-files/?d=photo.png"), timeout=SECONDS)
            (result,) = answer.json()["results"]
            (expected,) = PREDICTOR.predict(IMAGE, auto=True)
            np.testing.assert_array_equal(
                decode_brush(result["result"][0]["value"]["rle"], HEIGHT, WIDTH), expected.mask
            )
            process.terminate()
            process.wait(SECONDS)
    finally:
        process.kill()


def test_folders_that_are_not_there_are_named(tmp_path: Path) -> None:
    save_sam(tiny_sam(), tmp_path / "tiny.safetensors", name="compact")
    with pytest.raises(UserError, match=r"--local-root .*: no such folder"):
        serve(tmp_path / "tiny.safetensors", ImageSources(local_root=tmp_path / "nowhere"))

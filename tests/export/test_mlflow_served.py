"""The MLflow export: reloaded by MLflow, and served by `mlflow models serve` to a real HTTP request."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from helpers.tiny import tiny_sam
from lesionsam.errors import UserError
from lesionsam.export.base import export, open_subject
from lesionsam.inference.image import ImagePredictor
from lesionsam.models.checkpoint import load_sam, save_sam
from lesionsam.models.finetuned import Strategy, attach
from repo import import_graph
from repo.import_graph import imported_names, project_imports

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: nothing to serve with")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:::(mlflow|sqlalchemy|alembic)"),
]
ROOT = Path(__file__).resolve().parents[2]
START_S = 900  # for a server on a slow machine that does much else


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)


def as_base64(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder; a model with adapters, which no plain format can hold."""
    from lesionsam.export.mlflow import FORMAT

    folder = tmp_path_factory.mktemp("served")
    sam = tiny_sam(sharpness=4)
    attach(sam, Strategy("adapter", adapter_dim=4))
    save_sam(sam, folder / "best.safetensors", name="compact")
    (outcome,) = export(open_subject(folder / "best.safetensors"), [FORMAT], folder, pictures=[picture])
    assert outcome.faults == []
    assert outcome.check is not None
    assert outcome.check.largest_difference < 1e-4
    assert outcome.check.lowest_iou == 1
    return folder / "mlflow"


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[str]:
    """Address of a real server process; it and what it started end with the tests."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # the model brings its code
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        str(exported),
        "--env-manager",
        "local",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with (exported.parent / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=exported.parent, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_S
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{address}/ping", timeout=5):
                    break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    pytest.fail((exported.parent / "server.log").read_text()[-3000:])
                time.sleep(0.3)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(address: str, *rows: dict) -> tuple[int, dict]:
    body = json.dumps({"dataframe_records": list(rows)}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_an_image_and_boxes_give_masks_over_http(exported: Path, server: str) -> None:
    """Image and boxes in, PNGs out, equal to what the Predictor says; and one clear line for each kind of nonsense."""
    image, boxes = picture(), [[10, 8, 50, 40], [5.5, 3, 30, 44]]
    points = {"points": [[30, 20], [3, 3]], "labels": [1, 0]}
    status, answer = ask(server, {"image": as_base64(image), "boxes": boxes})
    assert status == 200, answer
    predictor = ImagePredictor(load_sam(None, exported.parent / "best.safetensors"))
    predictor.set_image(image)
    (row,) = answer["predictions"]
    assert len(row["masks"]) == len(row["predicted_iou"]) == 2
    for box, text, quality in zip(boxes, row["masks"], row["predicted_iou"], strict=True):
        logits, expected, _ = predictor.predict(box=np.array(box), multimask_output=False, return_logits=True)
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        assert mask.shape == image.shape[:2]
        assert set(np.unique(mask)) <= {0, 255}
        sure = np.abs(logits[0]) > 1e-4
        assert np.array_equal(mask[sure] > 0, logits[0][sure] > 0)
        assert quality == pytest.approx(float(expected[0]), abs=1e-5)
    status, answer = ask(server, {"image": as_base64(image), **points})
    assert status == 200, answer
    assert len(answer["predictions"][0]["masks"]) == 1
    example = json.loads((exported / "serving_input_example.json").read_text())
    assert (
        ask(
            server,
            *[
                dict(zip(example["dataframe_split"]["columns"], row, strict=True))
                for row in example["dataframe_split"]["data"]
            ],
        )[0]
        == 200
    )
    for nonsense, words in (
        ({"image": as_base64(image), "boxes": [[10, 8, 500, 40]]}, "row 0: boxes: expected 0 <= x0 < x1 <= 61"),
        ({"image": "no image", "boxes": boxes}, "expected the bytes of an image file as base64"),
        ({"image": base64.b64encode(b"text").decode(), "boxes": boxes}, "image: not an image"),
        ({"image": as_base64(image)}, "expected one of them, got neither"),
    ):
        status, answer = ask(server, nonsense)
        assert status == 400, answer
        assert words in answer["message"], answer


def test_requests_at_once_get_the_masks_of_their_own_images(tmp_path: Path) -> None:
    """The server answers every request in a thread of its own, with one model."""
    from lesionsam.export.mlflow_served import PromptedSam

    save_sam(tiny_sam(sharpness=40), tmp_path / "best.safetensors", name="compact")
    model = PromptedSam()
    model.load_context(SimpleNamespace(artifacts={"weights": tmp_path / "best.safetensors"}))
    images = [np.random.default_rng(k).integers(0, 256, (45 + 7 * k, 61, 3), dtype=np.uint8) for k in range(3)]
    boxes: list[np.ndarray | None] = [np.array([3.0 + k, 4, 50, 40]) for k in range(4)]
    alone = [model.predict_prompts(image, boxes, None, None) for image in images]
    wrong: list[str] = []

    def ask_again(k: int) -> None:
        for _ in range(15):
            try:
                found = model.predict_prompts(images[k], boxes, None, None)
                for (logits, _, _), (expected, _, _) in zip(found, alone[k], strict=True):
                    np.testing.assert_allclose(logits, expected, atol=1e-3)
            except (AssertionError, RuntimeError, ValueError) as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=ask_again, args=(k,)) for k in range(3)]
    try:
        for thread in threads:
            thread.start()
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    assert not wrong, f"{len(wrong)} of 45 answers are another image's: {wrong[0]}"


def test_the_model_is_self_describing(exported: Path) -> None:
    text = (exported / "MLmodel").read_text()
    assert "boxes" in text
    assert "predicted_iou" in text
    assert (exported / "code" / "lesionsam" / "models" / "sam.py").is_file()
    for path in (ROOT, exported.parent):
        assert str(path) not in text, "no path of this machine"
    assert "mlflow models serve" in (exported / "README.md").read_text()


def test_the_stated_packages_cover_what_the_code_imports() -> None:
    """Every library that loading the served file imports is in the model's requirements."""
    from lesionsam.export.mlflow import REQUIREMENTS, SCRIPT

    todo, seen = [import_graph.SOURCE / "lesionsam" / SCRIPT], set()
    libraries: set[str] = set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += [import_graph.module_files()[name] for name in project_imports(path, top_level_only=True)]
            libraries |= {name.split(".")[0] for name in imported_names(path, top_level_only=True)}
    libraries -= {"lesionsam", *sys.stdlib_module_names}
    assert {"torch", "segment_anything"} <= libraries
    owners = {
        "PIL": "pillow",
        "segment_anything": "segment-anything",
        "skimage": "scikit-image",
        "ruamel": "ruamel.yaml",
        "yaml": "pyyaml",
    }
    stated = {re.split("[<>=]", line)[0] for line in REQUIREMENTS}
    assert {owners.get(name, name) for name in libraries} <= stated


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"boxes": [[1, 2, 3]]}, "list of"),
        ({"boxes": [[1, 2, 3, 4]], "points": [[1, 1, 1]]}, r"points: expected a list of \[x, y\]"),
        ({"points": [[1, 100]]}, "places inside the image"),
        ({"points": [[1, 1]], "labels": [2]}, "labels: expected a 0 or 1"),
        ({"points": [[1, 1]], "labels": [1, 0]}, "labels: expected a 0 or 1"),
        ({"points": [[1, 1]], "boxes": [[0, 0, 5, 5], [1, 1, 4, 4]]}, "belong to one box at most"),
        ({"boxes": [], "points": float("nan")}, "got neither"),
        ({"boxes": 5}, "boxes: expected lists of numbers, got 5"),
        ({"boxes": 5.0}, "boxes: expected lists of numbers, got 5.0"),
        ({"boxes": [{"x0": 1}]}, "boxes: expected lists of numbers"),
        ({"boxes": [[1, 2, 3, 4]], "labels": [1]}, "labels: expected points"),
    ],
)
def test_prompts_that_are_none_are_named(row: dict, words: str) -> None:
    from lesionsam.export.mlflow_served import prompts_of

    with pytest.raises(ValueError, match=words):
        prompts_of(row, 60, 40)


def test_an_image_must_be_base64_of_an_image() -> None:
    from lesionsam.export.mlflow_served import decode_image

    assert np.array_equal(decode_image(as_base64(picture())), picture())
    for wrong in (None, 3, "", "é", "abc"):
        with pytest.raises(UserError, match="as base64"):
            decode_image(wrong)

"""Models of the Hugging Face Hub, from a server on the loopback interface: fetch, resume, predict, push."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.detectors import write_detector
from helpers.families import tiny_family, write_hub_folder
from helpers.hub_server import COMMIT, Hub, serve
from lesionsam.models.checkpoint import save_sam
from lesionsam.prompts import TRAINED_WITH

NAME = "somebody/tiny-sam2"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with one model."""
    folder = write_hub_folder("sam2", tmp_path / "theirs")
    with serve() as server:
        server.models[NAME] = {path.name: path.read_bytes() for path in folder.iterdir()}
        server.models[NAME]["README.md"] = b"---\nlicense: apache-2.0\n---\n# A model\n"
        yield server


def python(hub: Hub, folder: Path, program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in an empty folder, with a cache of its own and this Hub."""
    own = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    work = folder / "work"
    work.mkdir(exist_ok=True)
    known = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=work,
        env=known | own | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


FETCH = """
from lesionsam.errors import UserError
from lesionsam.utils.hub import fetch_model
try:
    found = fetch_model({name!r}, {revision!r})
    print(sorted(path.name for path in found.folder.iterdir()), found.facts)
except UserError as error:
    print("ERROR", error)
"""


def fetched(hub: Hub, folder: Path, name: str = NAME, revision: str = "main", **variables: str) -> str:
    done = python(hub, folder, FETCH.format(name=name, revision=revision), **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_model_is_fetched_once_and_then_works_offline(hub: Hub, tmp_path: Path) -> None:
    expected = f"['README.md', 'config.json', 'model.safetensors'] {{'revision': '{COMMIT}', 'licence': 'apache-2.0'}}"
    assert fetched(hub, tmp_path) == expected
    hub.asked.clear()
    assert fetched(hub, tmp_path, HF_HUB_OFFLINE="1") == expected
    assert not hub.asked


def test_a_download_that_broke_off_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.cut.add(NAME)
    first = fetched(hub, tmp_path)
    assert "model.safetensors" in (first if "ERROR" not in first else fetched(hub, tmp_path))
    (held,) = (tmp_path / "cache" / "hub").rglob("snapshots/*/model.safetensors")
    assert held.read_bytes() == hub.models[NAME]["model.safetensors"]


def test_what_is_wrong_with_a_name_is_one_line_with_the_remedy(hub: Hub, tmp_path: Path) -> None:
    hub.models["meta/gated"], hub.models["some/pickle"] = dict(hub.models[NAME]), {"config.json": b"{}"}
    hub.gated.add("meta/gated")
    for name, revision, words in (
        ("nobody/nothing", "main", "nobody/nothing does not exist, or is private, and no file or folder of that name"),
        ("meta/gated", "main", "access to meta/gated must be granted: accept its licence at http"),
        ("some/pickle", "main", "some/pickle holds no weights as safetensors"),
        (NAME, "v9", f"model.revision: {NAME} has no branch, tag or commit 'v9'"),
        ("no//name", "main", "no name of a model of the Hub (OWNER/NAME)"),
    ):
        said = fetched(hub, tmp_path, name, revision)
        assert said.startswith("ERROR "), said
        assert words in said
        assert "\n" not in said
    said = fetched(hub, tmp_path / "..", "far/away", HF_HUB_OFFLINE="1")
    assert "far/away is not in the cache" in said


PREDICT = """
from lesionsam import Predictor
(one,) = Predictor({name!r}).predict("image.png", boxes=[[8, 10, 50, 40]])
print(one.mask.shape, int(one.mask.sum()), round(one.predicted_iou, 5))
"""


def picture(folder: Path) -> None:
    (folder / "work").mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "work" / "image.png")


def test_a_pushed_model_predicts_under_its_name_as_the_weights_did(hub: Hub, tmp_path: Path) -> None:
    """And it keeps which prompts it was trained with, which decide how it looks for a lesion by itself."""
    weights = tmp_path / "best.safetensors"
    save_sam(tiny_family("sam2"), weights, name="sam2.1-tiny", metadata={TRAINED_WITH: "ring box none"})
    picture(tmp_path)
    words = ["lesionsam", "export", "--model", str(weights), "--push", "me/mine", "--num-images", "2"]
    push = f"import sys; sys.argv = {words!r}; from lesionsam.cli.app import main; main()"
    refused = python(hub, tmp_path, push)
    assert refused.returncode
    assert "--push" in refused.stderr
    assert "hf auth login" in refused.stderr
    done = python(hub, tmp_path, push, HF_TOKEN="hf_loopback")  # noqa: S106
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.address}/me/mine" in done.stdout
    assert {"config.json", "model.safetensors", "README.md", "processor_config.json"} <= set(hub.models["me/mine"])
    here, there = (python(hub, tmp_path, PREDICT.format(name=name)) for name in (str(weights), "me/mine"))
    assert here.returncode == there.returncode == 0, there.stderr
    assert here.stdout == there.stdout
    kept = python(
        hub,
        tmp_path,
        "from lesionsam.utils.weights import find_weights; from pathlib import Path; "
        "from lesionsam.models.checkpoint import weights_metadata; "
        f"print(weights_metadata(find_weights(Path('me/mine')))['{TRAINED_WITH}'])",
    )
    assert kept.stdout.strip() == "ring box none", kept.stderr


def test_commands_take_a_folder_in_the_hubs_form(hub: Hub, tmp_path: Path) -> None:
    folder = write_hub_folder("edgetam", tmp_path / "edge")
    picture(tmp_path)
    (tmp_path / "work" / "boxes.csv").write_text(
        "image_id,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1\nimage,8,10,50,40,20,20,30,30\n"
    )
    words = ["lesionsam", "predict", "image.png", "--boxes", "boxes.csv", "--model", str(folder), "--out", "out"]
    run_main = "import sys; sys.argv = {!r}; from lesionsam.cli.app import main; main()"
    done = python(hub, tmp_path, run_main.format(words))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "out" / "masks").is_dir()
    words = ["lesionsam", "export", "--all", "--model", str(folder), "--num-images", "1"]
    done = python(hub, tmp_path, run_main.format(words))
    assert done.returncode == 0, done.stderr
    assert "edge: hf and mlflow" in done.stdout
    card = (tmp_path / "work" / "exports" / "hf" / "README.md").read_text()
    assert "license: other" in card, "whose licence is not known is not ours to give"


def test_a_detector_of_the_hub_gives_the_boxes_of_a_prediction(hub: Hub, tmp_path: Path) -> None:
    detector = write_detector("owlv2", tmp_path / "detector")
    hub.models["somebody/owl"] = {path.name: path.read_bytes() for path in detector.iterdir()}
    hub.models["meta/gated"] = hub.models["somebody/owl"]
    hub.gated.add("meta/gated")
    picture(tmp_path)
    weights = tmp_path / "sam.safetensors"
    save_sam(tiny_family("sam2"), weights, name="sam2.1-tiny")
    run_main = "import sys; sys.argv = {!r}; from lesionsam.cli.app import main; main()"
    words = ["lesionsam", "predict", "image.png", "--text", "mole, spot", "--model", str(weights), "--out", "out"]
    done = python(hub, tmp_path, run_main.format([*words, "--detector", "somebody/owl"]))
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "work" / "out" / "text_boxes.csv").read_text().splitlines()
    assert len(list((tmp_path / "work" / "out" / "masks").iterdir())) == len(rows) - 1 > 0
    done = python(hub, tmp_path, run_main.format([*words, "--detector", "meta/gated"]))
    assert done.returncode == 2
    *before, last = done.stderr.strip().splitlines()
    assert last.startswith("error: --detector: access to meta/gated must be granted: accept its licence")
    assert all("so far" in line for line in before), "progress of a slow machine, and nothing else"
    words = ["lesionsam", "propose", "image.png", "--model", "meta/gated"]
    done = python(hub, tmp_path, run_main.format(words))
    assert done.returncode == 2
    assert "--model: access to meta/gated must be granted" in done.stderr

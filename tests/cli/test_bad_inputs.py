"""Every bad input of the catalogue ends in one line: file, place, expected, got; no traceback, nothing written."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from helpers import bad_inputs
from helpers.bad_inputs import CASES, DOORS, IN_PROJECT, WEIGHTS, Case, encoded, picture, tiff
from lesionsam.cli import app as cli
from lesionsam.errors import run_guarded
from lesionsam.utils.images import read_mask

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 20.0  # of processor, first imports included: a bomb that goes off takes minutes
# What may be made before a fault is found: folders, and the locks of stages.
OUTPUTS = (
    "out",
    "data",
    "data/raw",
    "models",
    "models/pretrained",
    ".scratch",
    ".scratch/boxes.lock",
    ".scratch/download.lock",
    ".scratch/weights.lock",
)

TURNS = {  # EXIF orientation -> what shows the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The two sound projects: with params.yaml (True) and without."""
    folder = tmp_path_factory.mktemp("sound")
    bad_inputs.make_new(folder / "new")
    bad_inputs.make_own(folder / "own")
    return {True: folder / "own", False: folder / "new"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """The tiny model, made when the first case asks for it."""
    path = tmp_path_factory.mktemp("weights") / "sam.safetensors"

    def made() -> Path:
        if not path.exists():
            bad_inputs.make_weights(path)
        return path

    return made


@cache
def stage(name: str) -> Callable[[], None]:
    """The main function of a stage's file."""
    spec = importlib.util.spec_from_file_location(f"bad_inputs_stage_{name}", ROOT / "stages" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.main


@cache
def command() -> Callable[[], None]:
    """The command line, whose parser is made once: Typer makes it anew for each call, half of what a refusal costs."""
    return get_command(cli.app)


def enter(door: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of a door, run in this process as its command runs; any other exception is a traceback."""
    if door.startswith("stage "):
        try:
            run_guarded(stage(arguments[0]))
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0
    monkeypatch.setattr(sys, "argv", ["lesionsam", *arguments])
    monkeypatch.setattr(cli, "app", command())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, and every folder, but what a door may make."""
    return {
        name: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if (name := path.relative_to(folder).as_posix()) not in OUTPUTS
    }


@pytest.fixture
def project(
    sound: dict[bool, Path], weights: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """A copy of the sound project that a door works in, entered."""

    def copy(door: str) -> Path:
        folder = tmp_path / "project"
        shutil.copytree(sound[door in IN_PROJECT], folder)
        if door == "stage download":
            shutil.rmtree(folder / "data")  # the stage begins by emptying it
        if door in WEIGHTS:
            shutil.copy(weights(), folder / WEIGHTS[door])
        monkeypatch.chdir(folder)
        return folder

    return copy


@pytest.mark.parametrize("case", CASES, ids=[f"{case.door}: {case.name}" for case in CASES])
def test_one_line(
    case: Case, project: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project(case.door)
    case.spoil(folder)
    before, began = tree(folder), time.process_time()
    status = enter(case.door, case.arguments or DOORS[case.door], monkeypatch)
    seconds, lines = time.process_time() - began, capsys.readouterr().err.splitlines()
    assert status != 0
    assert len(lines) == 1, lines
    for words in case.says:
        assert re.search(words, lines[0]), lines[0]
    assert tree(folder) == before, "nothing written"
    assert seconds < MOST_SECONDS


# Ten of them as real commands: another process, its own start, its own streams.
REAL = (
    "upgrade: params: anchors",
    "stage boxes: table: NaN",
    "stage boxes: index: endless width",
    "stage download: image: PNG cut at 99 %",
    "stage download: mask: colours",
    "check: params: a billion laughs",
    "check: params: a python object",
    "convert coco: COCO: deep",
    "convert cvat: CVAT: bomb",
    "convert yolo: YOLO: pixels",
)


@pytest.mark.parametrize("name", REAL)
def test_real_command(name: str, project: Callable[[str], Path]) -> None:
    case = next(case for case in CASES if f"{case.door}: {case.name}" == name)
    folder = project(case.door)
    case.spoil(folder)
    before, arguments = tree(folder), case.arguments or DOORS[case.door]
    is_stage = case.door.startswith("stage ")
    program = [str(ROOT / "stages" / f"{arguments[0]}.py")] if is_stage else ["-m", "lesionsam", *arguments]
    done = subprocess.run(
        [sys.executable, *program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    lines = [line for line in done.stderr.splitlines() if not line.endswith("so far")]  # progress of a slow machine
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, lines
    assert all(re.search(words, lines[0]) for words in case.says), lines[0]
    assert tree(folder) == before, "nothing written"


# ---------------------------------------------------------------------- odd but sound: taken, with the right numbers


def turned(orientation: int) -> bytes:
    """The picture as a camera held that way stores it, with the EXIF note that says so."""
    back = {
        None: None,
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    upright, exif = Image.fromarray(GREY), Image.Exif()
    turn = TURNS.get(orientation)
    exif[0x0112] = orientation
    stored = upright if turn is None else upright.transpose(back.get(turn, turn))
    return encoded(np.asarray(stored), exif=exif)


GREY = np.repeat(picture(1)[..., :1], 3, axis=2)  # three equal channels: the same picture in every kind of file
ODD: dict[str, Callable[[], bytes]] = {
    "grey": lambda: encoded(GREY[..., 0]),
    "grey of 16 bits": lambda: encoded(GREY[..., 0].astype(np.uint16) * 257),
    "deep TIFF": lambda: tiff(GREY.astype(np.uint16)[..., 0] * 257),
    "palette": lambda: encoded(GREY[..., 0], mode="P"),
    "alpha": lambda: encoded(GREY, mode="RGBA"),
    "grey and alpha": lambda: encoded(GREY[..., 0], mode="LA"),
    "CMYK": lambda: encoded(GREY, "TIFF", mode="CMYK"),
    "BMP": lambda: encoded(GREY, "BMP"),
    "TIFF": lambda: encoded(GREY, "TIFF"),
    "packed TIFF": lambda: encoded(GREY, "TIFF", compression="tiff_lzw"),
    **{f"EXIF {k}": (lambda k=k: turned(k)) for k in range(2, 9)},
}


def test_odd_images_give_the_mask_of_the_plain_one(
    project: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project("predict")
    (folder / "photos" / "a.png").write_bytes(encoded(GREY))
    rows = [bad_inputs.HEADER, f"a,0,,48,32,{bad_inputs.BOXES}"]
    for name, content in ODD.items():
        (folder / "photos" / f"{name}.png").write_bytes(content())
        rows.append(f"{name},0,,48,32,{bad_inputs.BOXES}")
    (folder / "boxes.csv").write_text("\n".join(rows))
    arguments = (*DOORS["predict"], "--no-overlays", "--no-shapes")
    assert enter("predict", arguments, monkeypatch) == 0
    assert capsys.readouterr().err == ""
    plain = (folder / "out" / "masks" / "a.png").read_bytes()
    assert 0 < read_mask(folder / "out" / "masks" / "a.png", (48, 32)).mean() < 1
    assert [
        name for name in ODD if (folder / "out" / "masks" / f"{name.replace(' ', '_')}.png").read_bytes() != plain
    ] == []


def reordered(text: str) -> str:
    """The columns the other way round."""
    return "".join(",".join(line.split(",")[::-1]) + "\n" for line in text.splitlines())


ODD_TABLES: dict[str, Callable[[str], str | bytes]] = {
    "BOM": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "BOM and CRLF": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r"),
    "no last line end": lambda text: text.rstrip("\n"),
    "blank lines": lambda text: text.replace("\n", "\n\n ,\n").replace(" ,\n", "\n"),
    "empty rows of a spreadsheet": lambda text: text + "," * 12 + "\n",
    "blanks": lambda text: text.replace(",", " , "),
    "quotes": lambda text: "".join(
        ",".join(f'"{cell}"' for cell in line.split(",")) + "\n" for line in text.splitlines()
    ),
    "other order": reordered,
    "fractions": lambda text: text.replace("10,6,40,28", "10.0,6.00,4e1,+28"),
    "without what is known": lambda text: "".join(
        ",".join(line.split(",")[:1] + line.split(",")[5:]) + "\n" for line in text.splitlines()
    ),
}


@pytest.mark.parametrize("name", ODD_TABLES)
def test_odd_tables_give_the_same_boxes(
    name: str, project: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project("stage boxes")
    assert enter("stage boxes", ("boxes",), monkeypatch) == 0
    expected = (folder / "data" / "boxes.csv").read_bytes()
    assert expected.count(b"\n") == 5
    (folder / "data" / "boxes.csv").unlink()
    bad_inputs.rewritten(ODD_TABLES[name])(folder)
    assert enter("stage boxes", ("boxes",), monkeypatch) == 0
    assert (folder / "data" / "boxes.csv").read_bytes() == expected


@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_the_sound_project(
    door: str, project: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the catalogue would prove nothing."""
    project(door)
    assert enter(door, DOORS[door], monkeypatch) == 0
    assert "error" not in capsys.readouterr().err


def test_the_catalogue_is_as_long_as_it_should_be() -> None:
    names = [f"{case.door}: {case.name}" for case in CASES]
    assert len(set(names)) == len(names) >= 120
    assert set(REAL) <= set(names)
    assert {case.door for case in CASES} == set(DOORS)

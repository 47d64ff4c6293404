"""The folder source, the index, and the two stages that begin the chain."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML

from helpers.web_server import Site, serve
from lesionsam.config.load import load_config
from lesionsam.data.index import COLUMNS, Row, check_rows, dev_ids, read_index, write_index
from lesionsam.data.sources.folder import index_folder
from lesionsam.errors import UserError
from lesionsam.pipeline import weights as weights_module
from lesionsam.pipeline.download import prepare_data
from lesionsam.pipeline.weights import prepare_weights
from lesionsam.utils.images import read_mask

BLOB = np.zeros((30, 40), np.uint8)
BLOB[5:20, 10:30] = 255


def image(path: Path, seed: int, size: tuple[int, int] = (40, 30), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def mask(path: Path, pixels: np.ndarray = BLOB) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of six training, two validation and two test images, with masks, below the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path("own")
    for split, first, count in (("train", 0, 6), ("val", 10, 2), ("test", 20, 2)):
        for n in range(first, first + count):
            image(folder / "images" / split / f"p{n}.png", n)
            mask(folder / "masks" / split / f"p{n}.png")
    return folder


def rows_of(folder: Path, dev_fraction: float = 0.0, test_split: str = "test", **options: Any) -> list[Row]:
    return index_folder(folder, dev_fraction=dev_fraction, test_split=test_split, **options)  # type: ignore[arg-type]


def ids(rows: list[Row], split: str) -> set[str]:
    return {row["image_id"] for row in rows if row["split"] == split}


def test_three_folders(own: Path) -> None:
    rows = rows_of(own)
    assert ids(rows, "train") == {f"p{n}" for n in range(6)}
    assert ids(rows, "dev") == {"p10", "p11"}
    assert ids(rows, "test") == {"p20", "p21"}
    row = next(row for row in rows if row["image_id"] == "p10")
    assert row == {
        "image_id": "p10",
        "split": "dev",
        "image_path": "own/images/val/p10.png",
        "mask_path": "own/masks/val/p10.png",
        "width": 40,
        "height": 30,
        "sha256": hashlib.sha256(Path("own/images/val/p10.png").read_bytes()).hexdigest(),
    }


def test_dev_by_hash_and_val_as_test(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(own, dev_fraction=0.3, test_split="val")
    by_hash = sorted((f"p{n}" for n in range(6)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert ids(rows, "dev") == set(by_hash[:2])
    assert ids(rows, "train") == set(by_hash[2:])
    assert ids(rows, "test") == {"p10", "p11"}
    assert "own/images/test is not used" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"data\.dev_fraction: expected a number above 0 when data\.test_split is val"):
        rows_of(own, dev_fraction=0, test_split="val")


@given(st.sets(st.text(min_size=1, max_size=6), min_size=1, max_size=30), st.floats(0, 1))
def test_dev_ids_do_not_depend_on_order_and_are_nested(names: set[str], fraction: float) -> None:
    chosen = dev_ids(sorted(names), fraction)
    assert chosen == dev_ids(sorted(names, reverse=True), fraction)
    assert len(chosen) == round(fraction * len(names))
    assert dev_ids(names, fraction / 2) <= chosen <= names


def test_nine_hundred_give_750_and_150() -> None:
    assert len(dev_ids((f"ISIC_{n:07d}" for n in range(900)), 1 / 6)) == 150


def test_kinds_of_names(own: Path) -> None:
    image(own / "images" / "train" / "A.JPG", 30, format="JPEG")
    image(own / "images" / "train" / "B.Jpeg", 31, format="JPEG")
    image(own / "images" / "train" / "C.TIF", 32, format="TIFF")
    image(own / "images" / "train" / "D.bmp", 33)
    mask(own / "masks" / "train" / "a_Segmentation.PNG")
    mask(own / "masks" / "train" / "B.png")
    (own / "images" / "train" / ".DS_Store").write_bytes(b"x")
    (own / "images" / "train" / "notes.txt").write_text("x")
    rows = {row["image_id"]: row for row in rows_of(own)}
    assert rows["A"]["mask_path"].endswith("a_Segmentation.PNG")
    assert rows["B"]["mask_path"].endswith("B.png")
    assert [rows[name]["mask_path"] for name in "CD"] == ["", ""]
    assert len(ids(list(rows.values()), "train")) == 10


def test_without_masks(own: Path) -> None:
    shutil.rmtree(own / "masks")
    assert {row["mask_path"] for row in rows_of(own)} == {""}


def test_exif_turned_image_has_its_upright_size(own: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image(own / "images" / "train" / "turned.jpg", 40, (40, 30), exif=exif)
    mask(own / "masks" / "train" / "turned.png", BLOB.T)
    row = next(row for row in rows_of(own) if row["image_id"] == "turned")
    assert (row["width"], row["height"]) == (30, 40)


def test_grey_masks_become_copies_of_two_levels(own: Path) -> None:
    soft = np.where(BLOB > 0, 240, 7).astype(np.uint8)
    for path in (own / "masks").rglob("*.png"):
        mask(path, soft)
    with pytest.raises(UserError, match=r"p0\.png: mask has 2 grey levels .* \(and 9 more faulty files\)"):
        rows_of(own)
    rows = rows_of(own, threshold_masks=True, masks_out=Path("out"))
    for row in rows:
        assert row["mask_path"] == f"out/{row['split']}/{row['image_id']}.png"
        assert np.array_equal(read_mask(row["mask_path"]), BLOB > 0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda own: shutil.rmtree(own / "images" / "train"), r"own/images/train: no such folder"),
    "no val": (lambda own: shutil.rmtree(own / "images" / "val"), r"own/images/val: no such folder"),
    "no images": (lambda own: [p.unlink() for p in (own / "images" / "test").iterdir()], r"test: no images in it"),
    "truncated": (lambda own: cut(own / "images" / "train" / "p3.png"), r"images/train/p3\.png: image is truncated"),
    "html": (lambda own: (own / "images" / "test" / "p20.png").write_text("<html>"), r"p20\.png: not an image.*HTML"),
    "empty": (lambda own: (own / "images" / "test" / "p20.png").write_text(""), r"p20\.png: file is empty"),
    "same stem": (lambda own: image(own / "images" / "train" / "P1.jpg", 50), r"p1\.png: same name as P1\.jpg"),
    "same id": (lambda own: image(own / "images" / "test" / "p1.png", 50), r"image id 'p1' stands for"),
    "same bytes": (
        lambda own: shutil.copy(own / "images" / "train" / "p2.png", own / "images" / "test" / "z.png"),
        r"test/z\.png: same bytes as own/images/train/p2\.png, but one is in split test and one in train",
    ),
    "mask size": (lambda own: mask(own / "masks" / "val" / "p10.png", BLOB.T), r"p10\.png: mask is 30x40 px; expected"),
    "mask empty": (lambda own: mask(own / "masks" / "val" / "p10.png", BLOB * 0), r"p10\.png: mask is empty"),
    "mask cut": (lambda own: cut(own / "masks" / "val" / "p10.png"), r"masks/val/p10\.png: image is truncated"),
    "two masks": (lambda own: mask(own / "masks" / "val" / "p10_segmentation.png"), r"is a mask of the same image"),
    "names differ": (
        lambda own: [p.rename(p.with_name(f"m{p.name}")) for p in (own / "masks" / "val").iterdir()],
        r"masks/val/mp1[01]\.png: no image of this name",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(own: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(own)
    with pytest.raises(UserError, match=message) as caught:
        rows_of(own)
    assert "\n" not in str(caught.value)


def test_stray_masks_are_told(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask(own / "masks" / "train" / "nobody.png")
    (own / "masks" / "train" / "p4.png").unlink()
    assert len(rows_of(own)) == 10
    told = capsys.readouterr().err
    assert "1 masks in own/masks/train belong to no image, the first is nobody.png" in told
    assert "1 of 6 images have no mask in own/masks/train" in told


def test_real_sample(isic_sample: Path) -> None:
    rows = index_folder(isic_sample, dev_fraction=1 / 6, test_split="val")
    check_rows(rows, "sample")
    assert [len(ids(rows, split)) for split in ("train", "dev", "test")] == [750, 150, 142]
    with (isic_sample / "manifest.csv").open(encoding="utf-8", newline="") as file:
        listed = {row["id"]: row for row in csv.DictReader(file)}
    for row in rows:
        known = listed[row["image_id"]]
        assert (row["width"], row["height"]) == (int(known["width"]), int(known["height"]))


# ------------------------------------------------------------------------------------------------------------ index


def row(image_id: str, split: str, **changes: object) -> Row:
    return {
        "image_id": image_id,
        "split": split,
        "image_path": f"i/{image_id}.jpg",
        "mask_path": "",
        "width": 4,
        "height": 3,
        "sha256": image_id * 8,
        "mask_sha256": "",
        **changes,
    }


def test_index_comes_back_as_written(tmp_path: Path) -> None:
    rows = [
        row("c", "test"),
        row("é,1", "train", mask_path="m, 1.png", mask_sha256="as given"),
        row("b", "dev"),
        row("007", "train"),
    ]
    write_index(tmp_path / "index.csv", rows)
    assert list(read_index(tmp_path / "index.csv").values()) == [rows[3], rows[1], rows[2], rows[0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; run `dvc repro download`"),
        ("", "expected the columns"),
        ("image_id,split\na,train\n", "expected the columns"),
        (",".join(COLUMNS) + "\n", "no rows"),
        (",".join(COLUMNS) + "\na,train,i,m,4,3,x\n", "line 2: expected 8 fields"),
        (",".join(COLUMNS) + "\na,train,i,m,4,3,x,y,z\n", "line 2: expected 8 fields"),
        (",".join(COLUMNS) + "\na,val,i,m,4,3,x,y\n", "line 2, split: expected train, dev, test, got 'val'"),
        (",".join(COLUMNS) + "\na,dev,i,m,4.5,3,x,y\n", "line 2, width: expected a whole number of pixels, got '4.5'"),
        (",".join(COLUMNS) + "\na,dev,i,m,4,0,x,y\n", "line 2, height"),
        (
            ",".join(COLUMNS) + "\na,dev,i,m,4,3,x,y\na,dev,i,m,4,3,x,y\n",
            "line 3, image_id: expected a new id, got 'a'",
        ),
    ],
)
def test_faulty_index(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "index.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_index(tmp_path / "index.csv")


def test_every_split_needs_images() -> None:
    with pytest.raises(UserError, match=r"no images in split dev; got train 1, dev 0, test 1; 0 of 2 images with"):
        check_rows([row("a", "train"), row("b", "test")], "x")


# ----------------------------------------------------------------------------------------------------------- stages


def set_parameters(root: Path, changes: dict[str, dict[str, object]]) -> None:
    yaml = YAML()
    params = yaml.load((root / "src" / "lesionsam" / "config" / "presets" / "demo.yaml").read_text(encoding="utf-8"))
    for section, values in changes.items():
        if "source" in values:
            params[section] = values
        else:
            params[section].update(values)
    with Path("params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


FOLDER = {"source": "folder", "dev_fraction": 0.0, "test_split": "test", "threshold_masks": False}


def test_download_stage_with_folder_and_synthetic(root: Path, own: Path) -> None:
    set_parameters(root, {"data": FOLDER, "inputs": {"folder": "own"}})
    Path("data/raw").mkdir(parents=True)
    Path("data/raw/left_over.txt").write_text("x")
    prepare_data(load_config())
    assert [path.name for path in Path("data/raw").iterdir()] == ["index.csv"]
    assert len(read_index(Path("data/raw/index.csv"))) == 10
    set_parameters(
        root, {"data": {"source": "synthetic", "seed": 1, "num_train": 2, "num_dev": 1, "num_test": 1, "max_side": 64}}
    )
    prepare_data(load_config())
    rows = list(read_index(Path("data/raw/index.csv")).values())
    assert [row["split"] for row in rows] == ["train", "train", "dev", "test"]
    assert all(Path(row["image_path"]).is_file() and Path(row["mask_path"]).is_file() for row in rows)


def test_a_failed_download_leaves_the_data_of_before(root: Path, own: Path) -> None:
    """Also where a kill left a part of new data: what was whole then still waits beside."""
    set_parameters(root, {"data": FOLDER, "inputs": {"folder": "own"}})
    prepare_data(load_config())
    before = Path("data/raw/index.csv").read_bytes()
    cut(own / "images" / "train" / "p3.png")
    with pytest.raises(UserError, match="truncated"):
        prepare_data(load_config())
    assert Path("data/raw/index.csv").read_bytes() == before
    os.replace("data/raw", "data/.raw.before")  # as a kill leaves it
    Path("data/raw").mkdir()
    Path("data/raw/part.txt").touch()
    with pytest.raises(UserError, match="truncated"):
        prepare_data(load_config())
    assert [path.name for path in Path("data").iterdir()] == ["raw"]
    assert Path("data/raw/index.csv").read_bytes() == before


def test_corrected_masks_change_the_index(root: Path, own: Path) -> None:
    """Its hash is all that DVC, caches and resumed trainings see of masks that stay where they are."""
    set_parameters(root, {"data": FOLDER, "inputs": {"folder": "own"}})
    prepare_data(load_config())
    first = read_index(Path("data/raw/index.csv"))
    changed = next(row for row in first.values() if row["mask_path"])
    path = Path(changed["mask_path"])
    assert changed["mask_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    with Image.open(path) as mask:
        mask.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    prepare_data(load_config())
    second = read_index(Path("data/raw/index.csv"))
    assert [name for name in first if first[name] != second[name]] == [changed["image_id"]]


def test_download_stage_fails_in_one_line(root: Path, own: Path) -> None:
    cut(own / "images" / "train" / "p3.png")
    set_parameters(root, {"data": FOLDER, "inputs": {"folder": "own"}})
    done = subprocess.run(
        [sys.executable, str(root / "stages" / "download.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: own/images/train/p3.png: image is truncated")
    assert "Traceback" not in done.stderr
    assert not Path("data/raw/index.csv").exists()


def test_published_weights(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    set_parameters(root, {"model": {"name": "vit_b", "checkpoint": "published"}})
    known = weights_module.CHECKPOINTS["vit_b"]
    name, size, sha256 = known.file, known.size, known.sha256
    with serve(Site(files={f"/sam/{name}": bytes(1000)})) as site:
        monkeypatch.setenv(weights_module.ADDRESS, f"{site.url}/sam/")
        with pytest.raises(UserError, match=f"has a file of 1000 bytes, expected {size}"):
            prepare_weights(load_config())
        assert not Path("models/pretrained/weights.json").exists()
        monkeypatch.setitem(weights_module.CHECKPOINTS, "vit_b", replace(known, size=1000))
        with pytest.raises(UserError, match=f"expected {sha256}"):
            prepare_weights(load_config())
        right = hashlib.sha256(bytes(1000)).hexdigest()
        monkeypatch.setitem(weights_module.CHECKPOINTS, "vit_b", replace(known, size=1000, sha256=right))
        prepare_weights(load_config())
        assert Path("models/pretrained/sam.pth").read_bytes() == bytes(1000)
        assert json.loads(Path("models/pretrained/weights.json").read_text()) == {
            "name": "vit_b",
            "sha256": right,
            "source": f"{site.url}/sam/{name}",
            "image_size": 1024,
        }
        asked = len(site.asked)
        shutil.rmtree("models")  # as DVC does before a rerun
        prepare_weights(load_config())
        assert len(site.asked) == asked


def test_own_weights(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    set_parameters(root, {"model": {"name": "compact", "checkpoint": "mine.safetensors"}})
    with pytest.raises(UserError, match=r"got mine\.safetensors \(no such file\)"):
        prepare_weights(load_config())
    Path("mine.safetensors").write_text("<html>")
    with pytest.raises(UserError, match=r"mine\.safetensors: an HTML page"):
        prepare_weights(load_config())
    shipped = (root / "foundation" / "compact.safetensors").read_bytes()
    Path("mine.safetensors").write_bytes(shipped[:-1])
    with pytest.raises(UserError, match=r"mine\.safetensors: cannot be read as weights"):
        prepare_weights(load_config())
    assert not Path("models/pretrained/weights.json").exists()
    Path("mine.safetensors").write_bytes(shipped)
    set_parameters(root, {"model": {"name": "vit_b", "checkpoint": "mine.safetensors"}})
    with pytest.raises(UserError, match=r"mine\.safetensors: holds weights of compact, expected vit_b"):
        prepare_weights(load_config())
    set_parameters(root, {"model": {"name": "compact", "checkpoint": "mine.safetensors"}})
    prepare_weights(load_config())
    told = json.loads(Path("models/pretrained/weights.json").read_text())
    assert told["sha256"] == hashlib.sha256(Path("models/pretrained/sam.safetensors").read_bytes()).hexdigest()
    assert (told["name"], told["source"], told["image_size"] > 0) == ("compact", "mine.safetensors", True)

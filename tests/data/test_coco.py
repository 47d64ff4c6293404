"""The COCO source: the same numbers as the folder source, every object a lesion, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from lesionsam.boxes.annotator import annotate
from lesionsam.boxes.table import read_boxes, write_boxes
from lesionsam.config.load import ConfigError, default_text, load_config
from lesionsam.config.presets import apply_preset
from lesionsam.data.frames import load_frames
from lesionsam.data.index import read_index, write_index
from lesionsam.data.sources.coco import index_coco
from lesionsam.data.sources.folder import index_folder
from lesionsam.data.sources.synthetic import write_dataset
from lesionsam.errors import UserError
from lesionsam.evaluation.cases import build_cases, by_image
from lesionsam.formats.rle import encode, runs_of
from lesionsam.types import Frame
from lesionsam.utils.images import read_mask

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

ANNOTATOR: dict[str, Any] = {"seed": 0, "margin": (0.1, 0.2), "core": (0.45, 0.55), "jitter": 0.03, "min_area": 16}


def rows_of(folder: Path, raw: Path = Path("raw"), **changes: Any) -> list[dict[str, Any]]:
    options: dict[str, Any] = {
        "annotations": "annotations/{split}.json",
        "images": "images/{split}",
        "categories": [],
        "dev_fraction": 0.0,
        "test_split": "test",
    }
    return index_coco(folder, raw=raw, **options | changes)


# ---------------------------------------------------------------------------------------- as from the folder source


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of the demo's kind in the folder layout, and the same as COCO instances."""
    base = tmp_path_factory.mktemp("generated")
    rows = write_dataset(base / "made", seed=0, counts={"train": 4, "dev": 2, "test": 2}, max_side=96)
    for row in rows:
        split = {"dev": "val"}.get(row["split"], row["split"])
        for kind in ("image", "mask"):
            target = base / "own" / f"{kind}s" / split / Path(row[f"{kind}_path"]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(row[f"{kind}_path"], target)
    for split in ("train", "val", "test"):
        masks = [(path, read_mask(path)) for path in sorted((base / "own" / "masks" / split).iterdir())]
        names = {path.stem: path.name for path in (base / "own" / "images" / split).iterdir()}
        document = {
            "images": [
                {"id": k, "file_name": names[path.stem], "width": mask.shape[1], "height": mask.shape[0]}
                for k, (path, mask) in enumerate(masks)
            ],
            "categories": [{"id": 3, "name": "lesion"}],
            "annotations": [
                {"id": k, "image_id": k, "category_id": 3, "segmentation": encode(mask)}
                for k, (_, mask) in enumerate(masks)
            ],
        }
        path = base / "own" / "annotations" / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document))
    return base


@pytest.mark.parametrize("options", [{}, {"dev_fraction": 0.25, "test_split": "val"}])
def test_same_numbers_as_the_folder_source(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Index, masks and the two-box CSV, byte for byte, of a demo set as COCO instances and as a folder."""
    monkeypatch.chdir(generated)
    plain = index_folder(Path("own"), **{"dev_fraction": 0.0, "test_split": "test"} | options)
    rows = rows_of(Path("own"), tmp_path / "raw", categories=["lesion"], **options)
    texts = []
    for name, found in (("plain", plain), ("raw", rows)):
        write_index(tmp_path / name / "index.csv", found)
        index = read_index(tmp_path / name / "index.csv")
        samples = annotate(index, root=Path(), **ANNOTATOR)
        write_boxes(tmp_path / f"{name}.csv", samples)
        texts.append((tmp_path / f"{name}.csv").read_bytes())
        assert all(sample.own_mask == (name == "raw") for sample in samples)
    assert texts[0] == texts[1]
    for one, other in zip(plain, rows, strict=True):
        assert {**one, "mask_path": ""} == {**other, "mask_path": ""}
        assert np.array_equal(read_mask(one["mask_path"]), read_mask(other["mask_path"]))


def test_same_frames_as_the_folder_source(generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training sees: images, priors and masks in the model frame."""
    monkeypatch.chdir(generated)
    frames = []
    for name, rows in (
        ("a", index_folder(Path("own"), dev_fraction=0.0, test_split="test")),
        ("b", rows_of(Path("own"), tmp_path / "b", categories=["lesion"])),
    ):
        write_index(tmp_path / name / "index.csv", rows)
        samples = annotate(read_index(tmp_path / name / "index.csv"), root=Path(), **ANNOTATOR)
        frames.append(load_frames(samples, Frame(64), tmp_path / "cache" / name))
    for field in ("images", "priors", "masks", "sizes", "big_boxes", "small_boxes"):
        assert np.array_equal(getattr(frames[0], field), getattr(frames[1], field)), field


# --------------------------------------------------------------------------------------- several objects in an image

RING = np.zeros((60, 80), bool)
RING[10:50, 10:60] = True
RING[25:35, 30:40] = False
CORNER = np.zeros((60, 80), bool)
CORNER[40:58, 50:78] = True  # overlaps the ring
POLYGON = [[2.0, 2.0, 22.5, 2.0, 22.5, 9.0, 2.0, 8.5], [60.0, 2.0, 70.0, 2.0, 70.0, 12.0]]


def document(first: int = 0) -> dict[str, Any]:
    """Two images: one of three objects (run lengths of both kinds, polygons) and a crowd, one of none."""
    return {
        "images": [
            {"id": 4, "file_name": f"p{first}.png", "width": 80, "height": 60},
            {"id": 5, "file_name": f"p{first + 1}.png", "width": 80, "height": 60},
        ],
        "categories": [{"id": 1, "name": "nevus"}, {"id": 2, "name": "melanoma"}],
        "annotations": [
            {"id": 12, "image_id": 4, "category_id": 1, "segmentation": POLYGON},
            {"id": 10, "image_id": 4, "category_id": 1, "segmentation": {"size": [60, 80], "counts": runs_of(RING)}},
            {"id": 11, "image_id": 4, "category_id": 2, "segmentation": encode(CORNER), "iscrowd": 0},
            {"id": 13, "image_id": 4, "category_id": 2, "segmentation": encode(~CORNER), "iscrowd": 1},
        ],
    }


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The document in each of three splits, images of noise beside it, below the working folder."""
    monkeypatch.chdir(tmp_path)
    for number, split in enumerate(("train", "val", "test")):
        for k in (10 * number, 10 * number + 1):
            path = Path("own/images") / split / f"p{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(k).integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
        put(split, document(10 * number))
    return Path("own")


def put(split: str, value: dict[str, Any]) -> None:
    path = Path("own/annotations") / f"{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_every_object_is_a_lesion(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masks and areas as pycocotools gives them; ids by annotation id; crowds and empty images counted."""
    rows = rows_of(own)
    told = capsys.readouterr().err
    assert "own/annotations/train.json: 1 crowd annotations (iscrowd) are left out" in told
    assert "own/annotations/train.json: 1 of 2 images have no object and are left out" in told
    assert [(row["image_id"], row["split"]) for row in rows] == [("p0", "train"), ("p20", "test"), ("p10", "dev")]
    write_index(Path("raw/index.csv"), rows)
    index = read_index(Path("raw/index.csv"))
    held = COCO("own/annotations/train.json")
    capsys.readouterr()
    listed = {line.split(",")[3]: line.split(",") for line in Path("raw/lesions.csv").read_text().splitlines()}
    for number, key in enumerate((10, 11, 12)):
        mask = read_mask(index["p0"]["lesions"][str(number)], (80, 60))
        assert np.array_equal(mask, held.annToMask(held.anns[key]).astype(bool)), key
        assert listed[str(key)][5] == str(mask.sum()) == str(int(held.annToMask(held.anns[key]).sum()))
        assert listed[str(key)][4] == held.cats[held.anns[key]["category_id"]]["name"]
    assert np.array_equal(
        read_mask(index["p0"]["mask_path"]),
        np.logical_or.reduce([held.annToMask(held.anns[key]) for key in (10, 11, 12)]),
    )


def test_each_lesion_has_its_own_prompt_and_truth(own: Path, tmp_path: Path) -> None:
    """Through boxes.csv and back: overlapping lesions keep the whole of their own mask, in training and evaluation."""
    write_index(Path("raw/index.csv"), rows_of(own))
    index = read_index(Path("raw/index.csv"))
    write_boxes(Path("boxes.csv"), annotate(index, root=Path(), **ANNOTATOR))
    samples = [s for s in read_boxes(Path("boxes.csv"), index, root=Path()) if s.image_id == "p0"]
    assert [sample.lesion_id for sample in samples] == ["0", "1", "2"]
    assert len({tuple(sample.big_box) for sample in samples}) == 3
    cases = list(build_cases(by_image(samples)[0], lambda s: read_mask(s.mask_path) if s.mask_path else None))
    frames = load_frames(samples, Frame(80), tmp_path / "cache")
    for case, mask, framed in zip(cases, (RING, CORNER), frames.masks, strict=False):
        assert case.truth is not None
        assert np.array_equal(case.truth, mask)
        assert np.array_equal(framed[:60].astype(bool), mask)


def test_own_boxes_for_each_object(own: Path) -> None:
    """A user's two-box CSV names the lesions by their number; another number is refused."""
    write_index(Path("raw/index.csv"), rows_of(own))
    index = read_index(Path("raw/index.csv"))
    head = "image_id,lesion_id,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1\n"
    Path("b.csv").write_text(head + "p0,1,45,35,80,60,55,45,70,55\n")
    sample = read_boxes(Path("b.csv"), index, root=Path())[0]
    assert sample.own_mask
    assert sample.mask_path == Path(index["p0"]["lesions"]["1"])
    Path("b.csv").write_text(head + "p0,7,45,35,80,60,55,45,70,55\n")
    with pytest.raises(UserError, match=r"line 2, lesion_id: '7' is no lesion of image 'p0'; it has 0, 1, 2"):
        read_boxes(Path("b.csv"), index, root=Path())


def test_small_lesions_are_passed_over(own: Path) -> None:
    write_index(Path("raw/index.csv"), rows_of(own))
    index = read_index(Path("raw/index.csv"))
    samples = annotate(index, root=Path(), **ANNOTATOR | {"min_area": 400})
    assert [s.lesion_id for s in samples if s.image_id == "p0"] == ["0", "1"], "the polygons' larger part has 143 px"


def test_categories(own: Path) -> None:
    rows = rows_of(own, categories=["melanoma"])
    assert np.array_equal(read_mask(rows[0]["mask_path"]), CORNER)
    assert sorted(path.name for path in Path("raw/masks/train").iterdir()) == ["p0.png"], "one lesion, one file"
    with pytest.raises(UserError, match=r"train\.json: no category 'x'; it has nevus, melanoma"):
        rows_of(own, categories=["x"])


def test_one_folder_of_images_and_no_val(own: Path) -> None:
    """images: without {split}; dev by hash; val.json is not read."""
    for split in ("train", "test"):
        value = document({"train": 0, "test": 20}[split])
        value["annotations"].append({**value["annotations"][0], "id": 99, "image_id": 5})
        put(split, value)
        for path in Path("own/images", split).iterdir():
            path.rename(Path("own/images") / path.name)
    Path("own/annotations/val.json").unlink()
    rows = rows_of(own, images="images", dev_fraction=0.5)
    assert sorted(row["split"] for row in rows) == ["dev", "test", "test", "train"]


# ------------------------------------------------------------------------------------------------------------ faults


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[], object]:
    def apply() -> None:
        value = document()
        change(value)
        put("train", value)

    return apply


def entry(key: int, **values: Any) -> Callable[[], object]:
    return changed(lambda value: next(e for e in value["annotations"] if e["id"] == key).update(values))


def picture(**values: Any) -> Callable[[], object]:
    return changed(lambda value: value["images"][0].update(values))


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "no JSON": (lambda: Path("own/annotations/val.json").unlink(), r"own/annotations/val\.json: no such file"),
    "broken JSON": (lambda: Path("own/annotations/val.json").write_text("{"), r"val\.json: line 1: not JSON"),
    "image missing": (
        picture(file_name="q.png"),
        r"train\.json: image 4 \('q\.png'\): no such file: own/images/train/q\.png",
    ),
    "image outside": (picture(file_name="../val/p10.png"), "image 4: expected a file name below the folder"),
    "image nameless": (picture(file_name=None), "image 4: expected a file name below the folder of images, got 'None'"),
    "other size": (picture(width=81), r"image 4 \('p0\.png'\): the JSON says 81x60 px, the file has 80x60 px; annot"),
    "turned": (
        picture(width=60, height=80),
        r"says 60x80 px, the file has 80x60 px: width and height are exchanged; correct them in",
    ),
    "damaged image": (
        lambda: Path("own/images/train/p0.png").write_bytes(Path("own/images/train/p0.png").read_bytes()[:80]),
        r"p0\.png: image is truncated",
    ),
    "same stem": (
        changed(lambda value: value["images"][1].update(file_name="p0.jpg")),
        r"images 4 and 5 have the same id 'p0'",
    ),
    "unknown image": (entry(10, image_id=1), "annotation 10: image_id 1 stands for no image"),
    "unknown category": (
        entry(10, category_id=3),
        r"annotation 10: category_id 3 stands for no category; it has 1 \(nevus\), 2 \(melanoma\)",
    ),
    "boxes alone": (entry(10, segmentation=[], bbox=[1, 1, 5, 5]), "annotation 10: no segmentation; .* data convert"),
    "polygon outside": (
        entry(12, segmentation=[[70, 10, 90, 10, 90, 30]]),
        r"train\.json: annotation 12: polygon: leaves the image of 80x60 px by 10\.0 px",
    ),
    "polygon of two": (entry(12, segmentation=[[1, 1, 9, 9]]), "annotation 12: polygon: 4 numbers"),
    "unknown RLE": (entry(11, segmentation={"size": [60, 80], "counts": 7}), "annotation 11: RLE: expected counts"),
    "RLE of another image": (entry(11, segmentation=encode(CORNER.T)), r"annotation 11: RLE: size .* \[80, 60\]"),
    "RLE too long": (entry(10, segmentation={"size": [60, 80], "counts": [9, 10000]}), "annotation 10: RLE: the runs"),
    "no area": (entry(11, segmentation=encode(CORNER & False)), r"annotation 11: its object has no area \(0 pixels"),
    "flat polygon": (entry(12, segmentation=[[5, 5, 9, 5, 7, 5]]), "annotation 12: its object has no area"),
    "two faults": (
        changed(
            lambda value: (
                [e.update(segmentation=[[5, 5, 9, 5, 7, 5]]) for e in value["annotations"]]
                and put(
                    "test",
                    {
                        **document(20),
                        "images": [{"id": k, "file_name": f"x{k}.png", "width": 80, "height": 60} for k in (4, 5)],
                    },
                )
            )
        ),
        r"has no area .* \(and 1 more faulty images or objects\)",
    ),
    "nothing": (changed(lambda value: value.update(annotations=[])), "no image with an object in it"),
    "same picture twice": (lambda: shutil.copy("own/images/train/p0.png", "own/images/test/p20.png"), "same bytes as"),
    "same id in two splits": (
        lambda: (shutil.copy("own/images/val/p10.png", "own/images/val/p0.png"), put("val", document(0))),
        "image id 'p0' stands for",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(own: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage()
    with pytest.raises(UserError, match=message) as caught:
        rows_of(own)
    assert "\n" not in str(caught.value)
    assert not Path("raw/lesions.csv").exists()


def test_lesions_that_belong_to_no_image(own: Path) -> None:
    rows = rows_of(own)
    write_index(Path("raw/index.csv"), [{**rows[0], "image_id": "q"}, *rows[1:]])
    with pytest.raises(UserError, match=r"raw/lesions\.csv: image 'p0' is not in index\.csv"):
        read_index(Path("raw/index.csv"))
    Path("raw/lesions.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"raw/lesions\.csv: expected the columns image_id, lesion_id"):
        read_index(Path("raw/index.csv"))


# ------------------------------------------------------------------------------------------------------- parameters


def test_preset_waits_for_the_files(own: Path) -> None:
    text, _ = apply_preset("coco", default_text())
    Path("params.yaml").write_text(text)
    assert load_config(Path("params.yaml")).data.source == "coco"
    Path("own/annotations/val.json").unlink()
    shutil.rmtree("own/images/test")
    with pytest.raises(ConfigError) as caught:
        load_config(Path("params.yaml"))
    assert caught.value.lines == [
        "data.images: expected a folder images/test in own (inputs.folder), got none",
        "data.annotations: expected annotations/val.json in own (inputs.folder), got no such file",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "annotations: annotations/{split}.json",
            "annotations: a.json",
            "data.annotations: expected a path with {split} in it, got the text 'a.json'",
        ),
        ("categories: []", "categories: [1]", "data.categories: expected a list of category names, got 1 as item 1"),
        (
            "test_split: test ",
            "test_split: val ",
            "data.dev_fraction: expected a number above 0 when data.test_split is",
        ),
    ],
)
def test_faulty_parameters(own: Path, old: str, new: str, message: str) -> None:
    text, _ = apply_preset("coco", default_text())
    assert old in text, text
    Path("params.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_config(Path("params.yaml"))
    assert any(message in line for line in caught.value.lines), caught.value.lines


def test_sample_says_whose_mask_it_is(own: Path) -> None:
    """Without own masks the truth of each of several lesions stays the mask inside its big box."""
    write_index(Path("raw/index.csv"), rows_of(own))
    index = read_index(Path("raw/index.csv"))
    samples = [
        replace(s, own_mask=False, mask_path=Path(index["p0"]["mask_path"]))
        for s in annotate(index, root=Path(), **ANNOTATOR)
        if s.image_id == "p0"
    ]
    case = next(build_cases(samples, lambda s: read_mask(s.mask_path) if s.mask_path else None))
    assert case.truth is not None
    assert case.truth[40:50, 50:60].all(), "the ring's box takes in a part of the other lesion"

"""Looking at a set before training: duplicates, masks, boxes, annotations; the page, the sheet, and exit statuses."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn

from lesionsam.cli.app import main
from lesionsam.config.load import default_text
from lesionsam.config.presets import apply_preset
from lesionsam.data.check.checks import Report, check, summary
from lesionsam.data.check.duplicates import MIN_CORRELATION, fingerprint, hashes, near_pairs, oriented
from lesionsam.data.check.image import inspect
from lesionsam.data.check.items import find_items
from lesionsam.data.check.page import pick, write_page, write_sheet
from lesionsam.data.sources.synthetic import write_dataset
from lesionsam.errors import UserError
from lesionsam.utils.images import image_size, read_image, read_mask

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated lesions in the folder layout: 6 to train, 3 to select on, 3 to test."""
    base = tmp_path_factory.mktemp("made")
    for row in write_dataset(base / "raw", seed=3, counts={"train": 6, "dev": 3, "test": 3}, max_side=128):
        split = {"dev": "val"}.get(row["split"], row["split"])
        for kind in ("image", "mask"):
            target = base / "own" / f"{kind}s" / split / Path(row[f"{kind}_path"]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(row[f"{kind}_path"], target)
    return base / "own"


@pytest.fixture
def own(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it below the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "own")
    return Path("own")


def image_of(own: Path, split: str, number: int = 0) -> Path:
    return sorted((own / "images" / split).iterdir())[number]


def mask_of(own: Path, split: str, number: int = 0) -> Path:
    return sorted((own / "masks" / split).iterdir())[number]


def texts(report: Report, severity: str) -> list[str]:
    return [issue.text for issue in report.issues if issue.severity == severity]


# ---------------------------------------------------------------------------------------------------------- likeness

COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG": lambda image: jpeg(image, 40),
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "other shape": lambda image: image.resize((128, 96)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "flatter": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "paler": lambda image: ImageEnhance.Color(image).enhance(0.7),
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "transverse": lambda image: image.transpose(Image.Transpose.TRANSVERSE),
}


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_hash_by_its_definition() -> None:
    """64 bits of a DCT against the median of all but the first, by a plain computation."""
    frequencies = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    for code, one in zip(hashes(frequencies), frequencies, strict=True):
        median = sorted(one.ravel()[1:])[31]
        bits = "".join("1" if value > median else "0" for value in one.ravel())
        assert int(code).to_bytes(8, sys.byteorder) == int(bits, 2).to_bytes(8, "big")


@pytest.mark.parametrize("orientation", range(8))
def test_turned_hashes_are_those_of_turned_pictures(orientation: int) -> None:
    """Signs and transposition of frequencies are what flips and turns do to the DCT."""
    picture = np.random.default_rng(orientation).normal(size=(32, 32)).astype(np.float32)
    plain = dctn(picture, norm="ortho")[None, :8, :8]
    turned = dctn(np.ascontiguousarray(oriented(picture, orientation)), norm="ortho")[None, :8, :8]
    assert hashes(plain, orientation) == hashes(turned)


def test_pixels_not_files_decide(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for name in ("a.png", "b.bmp"):
        Image.fromarray(pixels).save(tmp_path / name)
    assert len({fingerprint(read_image(tmp_path / name)).pixels for name in ("a.png", "b.bmp")}) == 1
    assert fingerprint(pixels).pixels != fingerprint(pixels.reshape(30, 20, 3)).pixels


def test_copies_are_found_and_others_are_not(made: Path) -> None:
    """Generated lesions: every copy in every form, and no two different ones."""
    images = [Image.open(path).convert("RGB") for path in sorted((made / "images").rglob("*.*"))]
    prints = [fingerprint(np.asarray(image)) for image in images]
    assert near_pairs(prints) == {}
    for name, change in COPIES.items():
        for one, image in zip(prints[:4], images[:4], strict=True):
            pair = near_pairs([one, fingerprint(np.asarray(change(image)))])
            assert list(pair) == [(0, 1)], name
            assert pair[0, 1] >= MIN_CORRELATION


def test_flat_pictures_match_nothing() -> None:
    flat = fingerprint(np.full((40, 40, 3), 128, np.uint8))
    assert flat.detail is None
    assert near_pairs([flat, flat]) == {}
    assert near_pairs([]) == {}


def test_likeness_on_real_images(isic_sample: Path) -> None:
    """The margin that the docstring claims, on a part: different images, and copies of some."""
    paths = sorted((isic_sample / "images").rglob("*.jpg"))[::7]
    prints = [fingerprint(read_image(path)) for path in paths]
    assert max(near_pairs(prints, min_correlation=0.3).values(), default=0) < 0.8
    for path, one in zip(paths[::30], prints[::30], strict=True):
        for change in COPIES.values():
            assert near_pairs([one, fingerprint(np.asarray(change(Image.open(path).convert("RGB"))))])


# ------------------------------------------------------------------------------------------------- a sound set, facts


def test_a_sound_set(own: Path) -> None:
    report = check(find_items(own))
    assert texts(report, "error") == texts(report, "warning") == []
    assert [len([seen for seen in report.own if seen.item.split == split]) for split in SPLITS] == [6, 3, 3]
    assert report.splits() == ["train", "val", "test"]
    assert summary(report)[0] == "images    12 (train 6, val 3, test 3), 12 of them readable"
    for seen in report.own:
        mask = read_mask(seen.item.masks[0])
        assert seen.shares == (mask.mean(),)
        assert seen.cut == bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def test_manifest_of_real_images_agrees(isic_sample: Path) -> None:
    """Shares and lesions cut by the frame, against what the sample's own table says."""
    with (isic_sample / "manifest.csv").open(encoding="utf-8", newline="") as file:
        listed = {row["id"]: row for row in csv.DictReader(file)}
    for item in find_items(isic_sample).items[::40]:
        seen, known = inspect(item), listed[item.image_id]
        assert seen.sha256 == known["image_sha256"]
        assert seen.shares[0] == pytest.approx(float(known["fg_fraction"]), abs=1e-5)
        assert seen.cut == (known["touches_border"] == "1")


def test_pieces_count_from_sixteen_pixels(own: Path) -> None:
    mask = np.zeros_like(read_mask(mask_of(own, "train")), np.uint8)
    mask[2:12, 2:12] = mask[20:24, 2:6] = 255  # 100 and 16 pixels
    mask[30:33, 2:7] = 255  # 15
    Image.fromarray(mask).save(mask_of(own, "train"))
    seen = next(seen for seen in map(inspect, find_items(own).items) if seen.item.masks[0] == mask_of(own, "train"))
    assert seen.pieces == 2
    assert not seen.cut


# ------------------------------------------------------------------------------------------------------------ faults


def save_copy(source: Path, target: Path, change: Callable[[Image.Image], Image.Image], **options: Any) -> None:
    change(Image.open(source).convert("RGB")).save(target, **options)


def top(own: Path) -> np.ndarray:
    """A second label along the upper edge of a mask's frame."""
    label = np.zeros(read_mask(mask_of(own, "val")).shape, np.uint8)
    label[:8] = 50
    return label


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "same file, two splits": (
        lambda own: shutil.copy(image_of(own, "train"), own / "images/val/z.png"),
        "error",
        r"val/z\.png: same file as .*images/train/.*; one is in train, the other in val: remove",
    ),
    "same file, one split": (
        lambda own: shutil.copy(image_of(own, "train"), own / "images/train/z.png"),
        "warning",
        r"train/z\.png: same file as .*; twice in the same split it weighs double",
    ),
    "same pixels": (
        lambda own: save_copy(image_of(own, "train"), own / "images/test/z.bmp", lambda image: image),
        "error",
        r"z\.bmp: same pixels as .*one is in train, the other in test",
    ),
    "near-duplicate": (
        lambda own: save_copy(image_of(own, "train"), own / "images/test/z.jpg", COPIES["turned"]),
        "warning",
        r"z\.jpg: nearly the same picture \(correlation (0\.9|1\.0)\d\) as .*look at both",
    ),
    "ISIC number, near": (
        lambda own: (
            image_of(own, "train").rename(own / "images/train/ISIC_0000001.png"),
            save_copy(
                own / "images/train/ISIC_0000001.png", own / "images/test/isic_0000001_b.jpg", COPIES["brighter"]
            ),
        ),
        "error",
        r"isic_0000001_b\.jpg: nearly the same picture .*remove one, or results would be flattered",
    ),
    "ISIC number": (
        lambda own: (
            image_of(own, "train").rename(own / "images/train/ISIC_0000001.png"),
            image_of(own, "test").rename(own / "images/test/ISIC_0000001_downsampled.png"),
        ),
        "error",
        r"same ISIC number as .*ISIC_0000001.*: the same lesion, so results would be flattered",
    ),
    "id in two splits": (
        lambda own: image_of(own, "test").rename(own / "images/test" / image_of(own, "train").name),
        "error",
        "same id as .*: rename one, as boxes are found",
    ),
    "same stem": (
        lambda own: save_copy(
            image_of(own, "test"), image_of(own, "train").with_suffix(".JPG"), lambda image: image, format="JPEG"
        ),
        "error",
        "same name as .*rename one",
    ),
    "truncated": (
        lambda own: image_of(own, "val").write_bytes(image_of(own, "val").read_bytes()[:-400]),
        "error",
        "images/val/.*: image is truncated",
    ),
    "no image": (lambda own: image_of(own, "val").write_text("<html>"), "error", "not an image; .*HTML"),
    "mask of three values": (
        lambda own: (
            Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3)
            .resize(image_size(image_of(own, "val")), 0)
            .save(mask_of(own, "val"))
        ),
        "error",
        r"3 grey levels \(0, 1, 2\)",
    ),
    "mask size": (lambda own: Image.new("L", (9, 9), 255).save(mask_of(own, "val")), "error", "mask is 9x9 px; expec"),
    "mask empty": (
        lambda own: Image.new("L", image_size(image_of(own, "val"))).save(mask_of(own, "val")),
        "error",
        "masks/val/.*: mask is empty",
    ),
    "mask full": (
        lambda own: Image.new("L", image_size(image_of(own, "val")), 255).save(mask_of(own, "val")),
        "warning",
        r"the lesion covers 100\.00% of the image",
    ),
    "mask inverted": (
        lambda own: Image.fromarray(~read_mask(mask_of(own, "val"))).save(mask_of(own, "val")),
        "warning",
        r"the lesion covers [5-9]\d\.\d\d% of the image .* and touches all four sides; is the mask inverted\?",
    ),
    "mask of labels": (
        lambda own: Image.fromarray(read_mask(mask_of(own, "val")).astype(np.uint8) * 100 + top(own)).save(
            mask_of(own, "val")
        ),
        "error",
        "mask has 3 grey levels .*several labels; expected one lesion on a black background",
    ),
    "image of two pages": (
        lambda own: Image.effect_noise((90, 80), 50).save(
            own / "images/train/z.tif", save_all=True, append_images=[Image.effect_noise((90, 80), 50)]
        ),
        "warning",
        r"z\.tif: 2 pages, of which the first alone is read",
    ),
    "mask missing": (lambda own: mask_of(own, "val").unlink(), "warning", "own/masks/val: 1 of 3 images have no mask"),
    "mask stray": (
        lambda own: shutil.copy(mask_of(own, "val"), own / "masks/val/stray.png"),
        "warning",
        "stray.png: no image of this name in own/images/val",
    ),
    "two masks": (
        lambda own: shutil.copy(
            mask_of(own, "val"), mask_of(own, "val").with_name(f"{mask_of(own, 'val').stem}_Segmentation.png")
        ),
        "error",
        "is a mask of the same image; keep one",
    ),
    "flat": (
        lambda own: Image.new("RGB", (80, 80), (90, 60, 50)).save(own / "images/train/z.png"),
        "warning",
        "one colour all over",
    ),
    "thin": (
        lambda own: Image.effect_noise((500, 90), 50).save(own / "images/train/z.png"),
        "warning",
        "500x90 px is very small or very thin",
    ),
    "superpixels": (
        lambda own: save_copy(image_of(own, "train"), own / "images/train/z_superpixels.png", COPIES["paler"]),
        "warning",
        "by its name a mask or ISIC's superpixels",
    ),
    "other files": (lambda own: (own / "images/train/notes.txt").write_text("x"), "note", "1 files are not images"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(own: Path, fault: str) -> None:
    """Each planted fault is found, at its severity, and the rest of the set is still looked at."""
    damage, severity, message = FAULTS[fault]
    damage(own)
    report = check(find_items(own))
    hits = [text for text in texts(report, severity) if re.search(message, text)]
    assert len(hits) == 1, report.issues
    assert "\n" not in hits[0]
    assert len(report.own) >= 12
    others = {"same stem": 1, "two masks": 0}.get(fault, 0)
    if severity != "error":
        assert texts(report, "error") == []
    else:
        assert len(texts(report, "error")) <= 1 + others


def test_many_equal_pictures_are_told_with_the_first(own: Path) -> None:
    """Of one picture five times, four pairs; a copy in other pixels is compared with the first alone."""
    for number in range(4):
        shutil.copy(image_of(own, "train"), own / f"images/test/z{number}.png")
    save_copy(image_of(own, "train"), own / "images/val/z.jpg", COPIES["JPEG"])
    report = check(find_items(own))
    assert sorted(match.kind for match in report.matches) == ["near-duplicate"] + ["same file"] * 4


def test_against_another_set(own: Path) -> None:
    """Pictures and ISIC numbers of another edition, and no complaint about what is twice in that one alone."""
    other = Path("other/images")
    other.mkdir(parents=True)
    image_of(own, "train").rename(own / "images/train/ISIC_0000007.png")
    save_copy(image_of(own, "train", 1), other / "ISIC_0000008.jpg", COPIES["JPEG"])
    for name in ("ISIC_0000007.jpg", "again.jpg"):
        save_copy(image_of(own, "test"), other / name, COPIES["JPEG"])
    report = check(find_items(own), against=[find_items(Path("other"))])
    assert report.num_own == len(report.own) == 12
    found = texts(report, "error") + texts(report, "warning")
    assert any(re.search(r"other/images/ISIC_0000007\.jpg: same ISIC number", text) for text in found)
    assert any(re.search(r"other/images/ISIC_0000008\.jpg: nearly the same picture", text) for text in found)
    assert sum("again.jpg" in text and "ISIC_0000007" in text for text in found) == 0


# ------------------------------------------------------------------------------------------------------------- boxes

HEAD = "image_id,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1\n"


def boxes_of(own: Path) -> dict[str, list[float]]:
    """Boxes 20 % too large and a core of a third about the deepest row, for every image."""
    rows = {}
    for path in sorted((own / "masks").rglob("*.*")):
        look = read_mask(path)
        ys, xs = np.nonzero(look)
        x0, y0, x1, y1 = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        grow = np.array([x1 - x0, y1 - y0]) * 0.1
        big = [
            max(0, x0 - grow[0]),
            max(0, y0 - grow[1]),
            min(look.shape[1], x1 + grow[0]),
            min(look.shape[0], y1 + grow[1]),
        ]
        from scipy.ndimage import distance_transform_edt

        depth = distance_transform_edt(np.pad(look, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        reach = max(0.5, depth.max() / 2)
        rows[path.stem] = [*big, x + 0.5 - reach, y + 0.5 - reach, x + 0.5 + reach, y + 0.5 + reach]
    return rows


def write_rows(rows: dict[str, list[float]]) -> Path:
    lines = [f"{name},{','.join(f'{value:.2f}' for value in row)}" for name, row in rows.items()]
    Path("boxes.csv").write_text(HEAD + "\n".join(lines) + "\n")
    return Path("boxes.csv")


def test_sound_boxes_and_their_looseness(own: Path) -> None:
    report = check(find_items(own), boxes=write_rows(boxes_of(own)))
    assert texts(report, "error") == texts(report, "warning") == []
    assert len(report.samples) == 12
    assert max(report.looseness) == pytest.approx(0.2, abs=0.01)
    assert "big boxes 20% larger than the lesions" in "\n".join(summary(report))


def test_faulty_boxes_are_all_told(own: Path) -> None:
    rows = boxes_of(own)
    names = list(rows)
    big, small = rows[names[0]][:4], rows[names[0]][4:]
    middle = (small[0] + small[2]) / 2
    rows[names[0]] = [middle - 2, big[1], *big[2:], middle, *small[1:]]  # cuts off the left part
    rows[names[1]] = [
        *rows[names[1]][:4],
        *(rows[names[1]][k] + 0.5 for k in (0, 1)),
        *(rows[names[1]][k] + 5 for k in (0, 1)),
    ]  # a core in the corner
    rows[names[2]] = [5000, 1, 5010, 9, 5002, 2, 5004, 4]
    rows["nobody"] = rows.pop(names[3])
    report = check(find_items(own), boxes=write_rows(rows))
    errors, warnings = texts(report, "error"), texts(report, "warning")
    assert [
        bool(re.search(pattern, text))
        for pattern, text in zip(
            [r"line 4, big_x1: 5010 lies outside", r"line 13, image_id: 'nobody' is not among the 12"],
            errors,
            strict=True,
        )
    ] == [True, True]
    assert re.search(rf"{names[0]}': \d+% of the lesion in the mask lies outside the big box", "\n".join(warnings))
    assert re.search(rf"{names[1]}': \d+% of the core is not lesion", "\n".join(warnings))
    assert texts(report, "note")[0] == "boxes.csv: 2 of 12 images have no row"


def test_a_table_that_is_none(own: Path) -> None:
    Path("boxes.csv").write_text("x;y\n")
    report = check(find_items(own), boxes=Path("boxes.csv"))
    assert texts(report, "error")[0].startswith("boxes.csv: columns are separated by ';'")


# -------------------------------------------------------------------------------- COCO files and what params.yaml names


def coco_file(own: Path, split: str, **changes: Any) -> Path:
    path = image_of(own, split)
    width, height = image_size(path)
    document = {
        "images": [{"id": 1, "file_name": path.name, "width": width, "height": height}],
        "categories": [{"id": 1, "name": "lesion"}],
        "annotations": [
            {"id": 5, "image_id": 1, "category_id": 1, "segmentation": [[5, 5, 30, 5, 30, 30, 5, 30]]},
            {"id": 6, "image_id": 1, "category_id": 1, "segmentation": [[5, 5, 30, 5, 9, 5]]},
            {"id": 7, "image_id": 1, "category_id": 1, "segmentation": [[5, 5, 3000, 5, 30, 30]]},
            {"id": 8, "image_id": 1, "category_id": 1, "segmentation": {"size": [1, 1], "counts": [1]}, "iscrowd": 1},
        ],
    } | changes
    target = own / "annotations" / f"{split}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(document))
    return target


def test_coco_file_with_every_faulty_object(own: Path) -> None:
    report = check(find_items(coco_file(own, "train"), images=own / "images/train"))
    errors = texts(report, "error")
    assert len(errors) == 2
    assert re.search(r"train\.json: annotation 6: its object has no area", errors[0])
    assert re.search(r"train\.json: annotation 7: polygon: leaves the image", errors[1])
    assert texts(report, "note")[0].endswith("1 crowd annotations (iscrowd) are left out")
    assert len(report.own[0].shares) == 1


def test_coco_file_with_faulty_images(own: Path) -> None:
    name = image_of(own, "train").name
    entries = [
        {"id": 1, "file_name": name, "width": 7, "height": 9},
        {"id": 2, "file_name": "q.png"},
        {"id": 3, "file_name": "/etc/passwd"},
    ]
    report = check(find_items(coco_file(own, "train", images=entries, annotations=[]), images=own / "images/train"))
    errors = "\n".join(texts(report, "error"))
    assert re.search(r"train\.json says 7x9 px, the file has", errors)
    assert re.search(r"q\.png: no such file", errors)
    assert "image 3: expected a file name below the folder" in errors
    broken = check(find_items(coco_file(own, "train", annotations=None)))
    assert re.search(r"expected COCO instances JSON", texts(broken, "error")[0])


def test_what_parameters_name(own: Path) -> None:
    """Splits as training would have them; with COCO each split's file; with the generated set its index and boxes."""
    Path("params.yaml").write_text(apply_preset("folder", default_text())[0])
    report = check(find_items(Path("params.yaml")))
    assert report.splits() == ["train", "dev", "test"]
    assert texts(report, "error") == []
    for split in SPLITS:
        coco_file(own, split)
    Path("params.yaml").write_text(apply_preset("coco", default_text())[0])
    report = check(find_items(Path("params.yaml")))
    assert [seen.item.split for seen in report.own] == ["train", "test", "dev"]
    assert len(texts(report, "error")) == 6
    Path("params.yaml").write_text(default_text())
    with pytest.raises(UserError, match=r"data/raw/index\.csv: no such file; run `dvc repro download`"):
        find_items(Path("params.yaml"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "nothing: no such file or folder; expected a folder of images, a COCO JSON or params.yaml"),
        ("empty", "empty: no images in it"),
        ("boxes.csv", "boxes.csv"),
        ("x.json", r"x\.json: no such file"),
    ],
)
def test_nothing_to_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("boxes.csv").write_text(HEAD)
    try:
        told = find_items(Path(target)).issues[0].text
    except UserError as error:
        told = str(error)
    assert re.search(message, told)


# ---------------------------------------------------------------------------------------------------- page and command


class Links(HTMLParser):
    """Every address that a page would fetch, and its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith("data:"):
                self.addresses.append(value)
        self.pictures += tag == "img"


def test_page_is_one_offline_file(own: Path) -> None:
    """Pictures inside, nothing fetched; names from files cannot become markup."""
    shutil.copy(image_of(own, "train"), own / "images" / "val" / "<img src=x>.png")
    (own / "images" / "val" / "z.png").write_text("no image")
    report = check(find_items(own), boxes=write_rows(boxes_of(own)))
    size = write_page(report, Path("page.html"), num_pictures=5)
    text = Path("page.html").read_text("utf-8")
    assert size == len(text.encode())
    links = Links()
    links.feed(text)
    assert links.addresses == []
    assert links.pictures == 5 + 2, "the sample, and both of the pair"
    assert "&lt;img src=x&gt;" in text
    assert "url(" not in text
    shown = pick(report, 3)
    assert shown[0].item.image_id == image_of(own, "train").stem, "those with errors first"
    assert write_page(report, Path("page.html"), num_pictures=0) < size


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lesionsam", "data", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_exit_statuses(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "check", "own", "--out", "a.html") == 0
    assert "found     0 errors, 0 warnings" in capsys.readouterr().out
    mask_of(own, "val").unlink()
    assert run(monkeypatch, "check", "own", "--out", "a.html") == 0
    assert run(monkeypatch, "check", "own", "--out", "a.html", "--strict") == 1
    Image.new("L", (9, 9)).save(mask_of(own, "val"))
    assert run(monkeypatch, "check", "own", "--out", "a.html") == 1
    assert "error: own/masks/val/" in capsys.readouterr().err
    assert run(monkeypatch, "check", "nowhere", "--out", "b.html") == 2
    assert Path("a.html").exists()
    assert not Path("b.html").exists()


def test_show(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = [image_of(own, "train").stem, image_of(own, "test").stem]
    write_rows(boxes_of(own))
    assert run(monkeypatch, "show", *names, "--from", "own", "--boxes", "boxes.csv", "--out", "a.png") == 0
    with_boxes = read_image("a.png")
    assert capsys.readouterr().out == "a.png: 2 images\n"
    assert run(monkeypatch, "show", *names, "--from", "own", "--out", "b.png") == 0
    assert with_boxes.shape == read_image("b.png").shape
    assert not np.array_equal(with_boxes, read_image("b.png"))
    assert write_sheet(find_items(own), Path("c.png"), ids=(), boxes=None, count=5, columns=3) == 5
    assert run(monkeypatch, "show", "q", "--from", "own") == 2
    assert "no image 'q' among its 12" in capsys.readouterr().err
    image_of(own, "train").write_text("x")
    assert run(monkeypatch, "show", names[0], "--from", "own", "--out", "d.png") == 2
    assert not Path("d.png").exists()


def test_convert_command(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(boxes_of(own))
    assert run(monkeypatch, "convert", "boxes.csv", "a.xml", "--images", "own/images") == 0
    assert capsys.readouterr().out == "a.xml: 12 lesions of 12 images\n"
    assert run(monkeypatch, "convert", "a.xml", "b", "--format", "csv") == 0
    assert Path("b").read_text().splitlines()[0].startswith("image_id,lesion_id,width,height,big_x0")
    assert run(monkeypatch, "convert", "a.xml", "b", "--format", "csv") == 2
    assert "error: b: is there already" in capsys.readouterr().err

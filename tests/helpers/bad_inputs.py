"""The catalogue of bad inputs: what is handed in, through which door, and what the one line must say.

A door is the way in that a user takes: a command of `lesionsam` or a stage. Every case starts from a sound project that
the door takes without a word (`make_project`), changes one thing in it, and says which words the error's line holds:
the file, the row, column or key, what was expected and what came. `tests/cli/test_bad_inputs.py` runs them.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
from PIL import Image

from lesionsam.config.edit import edit_text, fit
from lesionsam.config.load import default_text, default_values, unflatten
from lesionsam.data.index import write_index

if TYPE_CHECKING:
    import torch

WIDTH, HEIGHT = 48, 32  # of every sound picture, pixels
HEADER: str = "image_id,lesion_id,split,width,height,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1"
SPLITS = {"train": ("ISIC_0000007", "p2"), "val": ("p3",), "test": ("p4",)}
BOXES = "10,6,40,28,20,12,30,20"
Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        door: of `DOORS`. spoil: makes the sound project unsound, given its folder.
        says: patterns that the one line on stderr matches. arguments: in place of the door's own.
    """

    door: str
    name: str
    spoil: Spoil
    says: tuple[str, ...]
    arguments: tuple[str, ...] = ()


PREDICT = ("predict", "photos", "--boxes", "boxes.csv", "--model", "sam.safetensors", "--out", "out")
DOORS: dict[str, tuple[str, ...]] = {  # a stage is its name alone, a command its arguments
    "predict": PREDICT,
    "predict points": ("predict", "photos", "--points", "points.csv", "--model", "sam.safetensors", "--out", "out"),
    "convert coco": ("data", "convert", "a.json", "new.csv", "--from-format", "coco"),
    "convert studio": ("data", "convert", "studio.json", "new.csv", "--from-format", "label-studio"),
    "convert cvat": ("data", "convert", "a.xml", "new.csv"),
    "convert yolo": ("data", "convert", "yolo", "new.csv", "--images", "photos"),
    "convert csv": ("data", "convert", "boxes.csv", "new.json", "--images", "photos"),
    "check": ("check", "--params", "params.yaml"),
    "upgrade": ("params", "upgrade"),
    "stage download": ("download",),
    "stage boxes": ("boxes",),
    "stage weights": ("weights",),
}
WEIGHTS = {"predict": "sam.safetensors", "predict points": "sam.safetensors", "stage weights": "own/sam.safetensors"}
IN_PROJECT = ("check", "upgrade", "stage download", "stage boxes", "stage weights")  # the others need no params.yaml


# ------------------------------------------------------------------------------------------------- the sound projects


def picture(seed: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(H, W, 3) uint8 noise about grey: no two alike."""
    return np.random.default_rng(seed).integers(60, 200, (height, width, 3), dtype=np.uint8)


def lesion() -> np.ndarray:
    """(H, W) bool: an ellipse between the two boxes of `BOXES`."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return ((columns - 25) / 13) ** 2 + ((rows - 17) / 9) ** 2 <= 1


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    """An image file's bytes."""
    file, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    """A TIFF of any kind of pixel."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def make_new(folder: Path) -> None:
    """What `lesionsam predict` and `data convert` are given: two photos, tables in each format, a tiny model."""
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "a.png").write_bytes(encoded(picture(1)))
    (folder / "boxes.csv").write_text(f"{HEADER}\na,0,,{WIDTH},{HEIGHT},{BOXES}\n")
    (folder / "points.csv").write_text("image_id,lesion_id,x,y,label\na,0,25,16,1\na,0,3,3,0\n")
    (folder / "a.json").write_text(json.dumps(coco()))
    (folder / "studio.json").write_text(json.dumps(studio()))
    (folder / "a.xml").write_text(CVAT)
    (folder / "yolo").mkdir()
    (folder / "yolo" / "a.txt").write_text("0 0.5 0.5 0.6 0.6\n1 0.5 0.5 0.2 0.2\n")


def make_own(folder: Path) -> None:
    """A project of one's own: images, masks and boxes, params.yaml, the index of the first stage, a model to start."""
    rows, table, seed = [], [HEADER], 10
    for split, names in SPLITS.items():
        for name in names:
            seed += 1
            image, mask = (folder / "own" / kind / split / f"{name}.png" for kind in ("images", "masks"))
            for path, pixels in ((image, picture(seed)), (mask, lesion().astype(np.uint8) * 255)):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(pixels))
            known = "dev" if split == "val" else split
            rows.append(
                {
                    "image_id": name,
                    "split": known,
                    "image_path": f"own/images/{split}/{name}.png",
                    "mask_path": f"own/masks/{split}/{name}.png",
                    "width": WIDTH,
                    "height": HEIGHT,
                    "sha256": name,
                }
            )
            table.append(f"{name},0,{known},{WIDTH},{HEIGHT},{BOXES}")
    (folder / "own" / "boxes.csv").write_text("\n".join([*table, ""]))
    with contextlib.chdir(folder):  # the masks, whose hashes are taken, lie relative to the project
        write_index(Path("data/raw/index.csv"), rows)
    (folder / "params.yaml").write_text(params({}))


def make_weights(path: Path) -> None:
    """A tiny SAM, random but sharp; torch is imported only where a door needs it, as it takes seconds."""
    from helpers.tiny import tiny_sam
    from lesionsam.models.checkpoint import save_sam

    save_sam(tiny_sam(sharpness=40), path, name="compact")


OWN = {
    "inputs.folder": "own",
    "inputs.boxes": "own/boxes.csv",
    "boxes.source": "csv",
    "model.checkpoint": "own/sam.safetensors",
}
FOLDER = {"data": {"source": "folder", "dev_fraction": 0.0, "test_split": "test", "threshold_masks": False}}


def params(changes: dict[str, Any]) -> str:
    """The text of a params.yaml for the project of one's own, with changed keys."""
    return edit_text(default_text(), fit(unflatten(OWN | changes, default_values() | FOLDER)))


# --------------------------------------------------------------------------------------------------- ways to spoil it


def put(name: str, content: bytes | str | Callable[[], bytes]) -> Spoil:
    """Write a file, in place of what is there."""

    def spoil(folder: Path) -> None:
        data = content() if callable(content) else content
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return spoil


def edit(name: str, old: str, new: str) -> Spoil:
    """Replace a piece of a text that must be there."""

    def spoil(folder: Path) -> None:
        text = (folder / name).read_text("utf-8")
        if old not in text:
            raise ValueError(f"{name}: expected {old!r} in it")
        (folder / name).write_bytes(text.replace(old, new, 1).encode())

    return spoil


def gone(name: str) -> Spoil:
    """Remove a file or folder."""

    def spoil(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def folder_instead(name: str) -> Spoil:
    """A folder where a file is expected."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""
    return lambda folder: [spoil(folder) for spoil in spoils]


def nothing(folder: Path) -> None:
    """The project stays sound; the arguments are what is wrong."""


# -------------------------------------------------------------------------------------------------------------- images


def png(width: int, height: int, data: bytes = b"", *, depth: int = 8, kind: int = 2, extra: bytes = b"") -> bytes:
    """A PNG from its definition: header, further chunks, compressed pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG's chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def cut(kind: str, share: float) -> Callable[[], bytes]:
    """An image that ends too early."""

    def make() -> bytes:
        data = encoded(picture(1, 160, 120), kind)
        return data[: int(len(data) * share)]

    return make


def flipped(kind: str, at: float) -> Callable[[], bytes]:
    """An image with a wrong byte in it."""

    def make() -> bytes:
        data = bytearray(encoded(picture(1, 160, 120), kind))
        data[int(len(data) * at)] ^= 0xFF
        return bytes(data)

    return make


def bmp_of(width: int, height: int) -> bytes:
    """A BMP that claims a size, without its pixels."""
    data = bytearray(encoded(picture(1), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff_of(width: int) -> bytes:
    """A TIFF whose width is another than its pixels'."""
    data = encoded(picture(1), "TIFF")
    return data.replace(struct.pack("<HHII", 256, 4, 1, WIDTH), struct.pack("<HHII", 256, 4, 1, width)).replace(
        struct.pack("<HHIHH", 256, 3, 1, WIDTH, 0), struct.pack("<HHII", 256, 4, 1, width)
    )


def zip_of() -> bytes:
    """A zip archive with an image in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", encoded(picture(1)))
    return file.getvalue()


def text_bomb() -> bytes:
    """A PNG whose comment grows to 200 MB."""
    bomb = zlib.compress(bytes(200_000_000), 9)
    return png(4, 4, bytes(52), extra=chunk(b"zTXt", b"Comment\0\0" + bomb))


HTML = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"
IMAGES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "empty": (b"", r"file is empty; expected an image \(JPEG"),
    "HTML": (HTML, r"not an image; expected JPEG.*, got an HTML or XML page"),
    "SVG": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "got an HTML or XML page"),
    "text": (b"this is no image\n", "not an image; expected .*, got a file that begins with 74 68"),
    "zip": (zip_of, "got a zip archive"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "got a PDF"),
    "zeros": (bytes(4096), "got a file that begins with 00 00"),
    "GIF": (lambda: encoded(picture(1), "GIF"), "not an image; expected JPEG, PNG, BMP, TIFF, DICOM, got"),
    "WebP": (lambda: encoded(picture(1), "WEBP"), "not an image; expected JPEG, PNG, BMP, TIFF, DICOM, got"),
    "JPEG cut at 5 %": (cut("JPEG", 0.05), r"cannot be read|not an image|truncated or damaged"),
    "JPEG cut at half": (cut("JPEG", 0.5), "image is truncated or damaged: .*; copy or export it again"),
    "JPEG cut at 97 %": (cut("JPEG", 0.97), "image is truncated or damaged"),
    "JPEG of a signature": (b"\xff\xd8\xff", "not an image|cannot be read"),
    "PNG cut at half": (cut("PNG", 0.5), "image is truncated or damaged"),
    "PNG cut at 99 %": (cut("PNG", 0.99), "image is truncated or damaged"),
    "PNG of a signature": (b"\x89PNG\r\n\x1a\n", "cannot be read|not an image"),
    "PNG with a wrong byte": (flipped("PNG", 0.5), "image is truncated or damaged"),
    "PNG whose pixels are no stream": (
        lambda: png(9, 9).replace(zlib.compress(b""), b"notzlib!"),
        "image is truncated or damaged",
    ),
    "PNG with too few pixels": (lambda: png(40, 40, bytes(300)), "image is truncated or damaged"),
    "PNG of no width": (lambda: png(0, 9, b""), r"a\.png: "),
    "BMP cut": (cut("BMP", 0.6), "image is truncated or damaged"),
    "TIFF cut": (cut("TIFF", 0.6), "image is truncated or damaged|cannot be read"),
    "bomb: PNG of 10 gigapixels": (
        lambda: png(100_000, 100_000),
        "100000x100000 = 10000 megapixels; expected at most 200; scale the image down",
    ),
    "bomb: PNG of zeros": (
        lambda: png(20_000, 20_000, bytes(10_000_000)),
        "20000x20000 = 400 megapixels; expected at most 200",
    ),
    "bomb: BMP": (lambda: bmp_of(60_000, 60_000), "60000x60000 = 3600 megapixels; expected at most 200"),
    "bomb: TIFF": (lambda: tiff_of(70_000_000), "70000000x32 = 2240 megapixels; expected at most 200"),
    "bomb: PNG's comment": (text_bomb, "Decompressed data too large"),
    "1 x 20000": (
        lambda: png(1, 20_000, bytes(80_000)),
        "an image of 1x20000 px is too thin for a model input of 32 px",
    ),
    "20000 x 1": (lambda: png(20_000, 1, bytes(60_001)), "an image of 20000x1 px is too thin for a model input"),
    "floats beyond 1": (lambda: tiff(np.full((8, 8), 7.5, np.float32)), r"outside 0\.\.1; expected values of 0\.\.1"),
    "floats that are none": (lambda: tiff(np.full((8, 8), np.nan, np.float32)), r"outside 0\.\.1"),
    "32 bits": (lambda: tiff(np.full((8, 8), 70_000, np.int32)), "32-bit pixels of 70000..70000; expected at most 16"),
    "negative": (lambda: tiff(np.full((8, 8), -5, np.int32)), "32-bit pixels of -5..-5; expected at most 16 bits"),
    "deep, white is 0": (
        lambda: tiff(np.zeros((8, 8), np.uint16), photometric="miniswhite"),
        "TIFF of more than 8 bits in separate planes or with white as 0",
    ),
    "deep, in planes": (
        lambda: tiff(np.zeros((3, 8, 8), np.uint16), photometric="rgb", planarconfig="separate"),
        "TIFF of more than 8 bits in separate planes",
    ),
    "Lab": (lambda: lab(), "pixels of kind LAB are not supported; expected grey, RGB"),
}


def lab() -> bytes:
    """A TIFF in the Lab space."""
    file = io.BytesIO()
    Image.merge("LAB", [Image.fromarray(picture(1)[..., 0])] * 3).save(file, "TIFF")
    return file.getvalue()


TRAINING = (
    "empty",
    "HTML",
    "GIF",
    "JPEG cut at half",
    "PNG cut at 99 %",
    "PNG with a wrong byte",
    "TIFF cut",
    "bomb: PNG of 10 gigapixels",
    "bomb: PNG's comment",
    "zip",
)  # those that the stage is given too

image_cases = [
    *(
        Case("predict", f"image: {name}", put("photos/a.png", content), (r"^error: photos/a\.png: ", words))
        for name, (content, words) in IMAGES.items()
    ),
    *(
        Case(
            "stage download",
            f"image: {name}",
            put("own/images/train/p2.png", IMAGES[name][0]),
            (r"^error: own/images/train/p2\.png: ", IMAGES[name][1]),
        )
        for name in TRAINING
    ),
    Case(
        "predict",
        "image: none of this name",
        nothing,
        ("^error: photos/b.png: no such image file or folder",),
        (PREDICT[0], "photos/b.png", *PREDICT[2:]),
    ),
    Case(
        "predict",
        "image: a link to nothing",
        lambda folder: os.symlink("nowhere", folder / "photos" / "z.png"),
        ("^error: photos/z.png: no such image file",),
        (PREDICT[0], "photos/z.png", *PREDICT[2:]),
    ),
    Case(
        "predict",
        "image: a pipe",
        lambda folder: os.mkfifo(folder / "photos" / "z.png"),
        ("^error: photos/z.png: no such image file",),
        (PREDICT[0], "photos/z.png", *PREDICT[2:]),
    ),
    Case(
        "predict", "image: an empty folder", gone("photos/a.png"), ("^error: photos: folder without images; expected",)
    ),
    Case(
        "predict",
        "image: a folder of other files",
        both(gone("photos/a.png"), put("photos/a.txt", "x")),
        ("^error: photos: folder without images; expected files ending in .jpg",),
    ),
    Case(
        "stage download",
        "image: in two splits",
        lambda folder: [
            shutil.copy(folder / f"own/{kind}/train/p2.png", folder / f"own/{kind}/test/z.png")
            for kind in ("images", "masks")
        ],
        (r"own/images/test/z\.png: same bytes as own/images/train/p2\.png", "one is in split test and one in train"),
    ),
    Case(
        "stage download",
        "image: one name twice",
        put("own/images/train/P2.jpg", lambda: encoded(picture(5), "JPEG")),
        (r"own/images/train/p2\.png: same name as P2\.jpg",),
    ),
    Case("stage download", "image: no folder", gone("own/images/val"), ("inputs.folder: expected .* images/val",)),
    Case(
        "stage download",
        "image: a split without images",
        gone("own/images/test/p4.png"),
        ("own/images/test: no images in it; expected files ending in",),
    ),
]


# --------------------------------------------------------------------------------------------------------------- masks


def grey(values: Sequence[int]) -> Callable[[], bytes]:
    """A mask that holds these grey levels."""

    def make() -> bytes:
        mask = lesion().astype(np.uint8) * 255
        mask[0, : len(values)] = values
        return encoded(mask)

    return make


def coloured(*colours: tuple[int, int, int]) -> Callable[[], bytes]:
    """A mask in colours: the first one everywhere, the others on rows of their own."""

    def make() -> bytes:
        pixels = np.full((HEIGHT, WIDTH, 3), colours[0], np.uint8)
        for row, colour in enumerate(colours[1:]):
            pixels[row] = colour
        return encoded(pixels)

    return make


def palette(count: int) -> bytes:
    """A mask of that many entries of a palette."""
    image = Image.new("P", (WIDTH, HEIGHT))
    image.putpalette([value for k in range(count) for value in (10 * k, 90, 200 - 10 * k)])
    for k in range(count):
        image.putpixel((k, 0), k)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


MASK = "own/masks/train/p2.png"
MASKS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "empty file": (b"", "file is empty"),
    "HTML": (HTML, "an HTML or XML page"),
    "cut": (lambda: grey([])()[:90], "image is truncated or damaged"),
    "without a lesion": (
        lambda: encoded(np.zeros((HEIGHT, WIDTH), np.uint8)),
        "mask is empty; expected at least one lesion pixel; draw it or delete it",
    ),
    "another size": (lambda: encoded(np.full((9, 8), 255, np.uint8)), "mask is 8x9 px; expected 48x32 as its image"),
    "turned": (
        lambda: encoded(np.ascontiguousarray(lesion().T).astype(np.uint8) * 255),
        "mask is 32x48 px; expected 48x32",
    ),
    "one pixel": (lambda: encoded(np.full((1, 1), 255, np.uint8)), "mask is 1x1 px; expected 48x32"),
    "three levels": (grey([128]), r"mask has 3 grey levels \(0, 128, 255\); expected 0 and 255"),
    "one odd level": (grey([7]), r"mask has 3 grey levels \(0, 7, 255\)"),
    "JPEG": (lambda: encoded(lesion().astype(np.uint8) * 255, "JPEG"), "grey levels .*, as JPEG changes them"),
    "16 bits": (lambda: tiff((lesion() * 4095).astype(np.uint16)), r"2 grey levels \(0, 4095\)"),
    "colours": (coloured((0, 0, 0), (255, 0, 0), (0, 255, 0)), r"mask has 3 colours \(#000000, #00ff00, #ff0000\)"),
    "no black": (
        coloured((255, 255, 255), (255, 0, 0)),
        r"mask has 2 colours \(#ff0000, #ffffff\), all on one side of 127",
    ),
    "palette": (lambda: palette(3), "mask has 3 colours"),
    "floats": (lambda: tiff(lesion().astype(np.float32) * 9), r"outside 0\.\.1"),
    "GIF": (lambda: encoded(lesion().astype(np.uint8) * 255, "GIF"), "not an image; expected JPEG"),
    "bomb": (lambda: png(100_000, 100_000, kind=0), "10000 megapixels; expected at most 200"),
}
mask_cases = [
    *(
        Case("stage download", f"mask: {name}", put(MASK, content), (rf"^error: {MASK}: ", words))
        for name, (content, words) in MASKS.items()
    ),
    Case(
        "stage download",
        "mask: two of an image",
        lambda folder: shutil.copy(folder / MASK, folder / "own/masks/train/p2_segmentation.png"),
        (r"p2_segmentation\.png: p2\.png is a mask of the same image; keep one",),
    ),
    Case(
        "stage download",
        "mask: all of other names",
        lambda folder: (folder / "own/masks/val/p3.png").rename(folder / "own/masks/val/x.png"),
        (r"own/masks/val/x\.png: no image of this name; expected masks called as their image",),
    ),
    Case(
        "stage boxes",
        "mask: lesion too small",
        both(
            put("params.yaml", lambda: params({"boxes.source": "simulated"}).encode()),
            put(MASK, lambda: encoded(np.pad(np.full((1, 2), 255, np.uint8), ((0, 31), (0, 46))))),
        ),
        (rf"{MASK}: no lesion of at least 16 pixels \(boxes.min_area\); the mask has 2 foreground",),
    ),
    Case(
        "stage boxes",
        "mask: changed since",
        both(
            put("params.yaml", lambda: params({"boxes.source": "simulated"}).encode()),
            put(MASK, lambda: encoded(np.full((9, 8), 255, np.uint8))),
        ),
        (rf"{MASK}: mask is 8x9 px; expected 48x32",),
    ),
    Case(
        "stage boxes",
        "mask: gone since",
        both(put("params.yaml", lambda: params({"boxes.source": "simulated"}).encode()), gone(MASK)),
        (rf"{MASK}: no such file",),
    ),
]


# ------------------------------------------------------------------------------------------------------ the box CSV

OWN_BOXES = "own/boxes.csv"
ROW = f"p2,0,train,{WIDTH},{HEIGHT},{BOXES}"


def row(new: str) -> Spoil:
    """The second row of the project's own table, line 3, replaced."""
    return edit(OWN_BOXES, ROW, new)


def cells(**changes: str) -> Spoil:
    """Some cells of that row changed."""
    held = dict(zip(HEADER.split(","), ROW.split(","), strict=True)) | changes
    return row(",".join(held.values()))


def rewritten(change: Callable[[str], str | bytes], name: str = OWN_BOXES) -> Spoil:
    """The whole table, as another program writes it."""

    def spoil(folder: Path) -> None:
        new = change((folder / name).read_text())
        (folder / name).write_bytes(new if isinstance(new, bytes) else new.encode())

    return spoil


def without(column: str) -> Callable[[str], str]:
    """A table that lacks a column."""
    place = HEADER.split(",").index(column)

    def change(text: str) -> str:
        return "".join(
            ",".join(cell for k, cell in enumerate(line.split(",")) if k != place) + "\n" for line in text.splitlines()
        )

    return change


TABLES: dict[str, tuple[Spoil, str]] = {
    "no file": (
        gone(OWN_BOXES),
        r"inputs\.boxes: expected a CSV file when boxes\.source is csv, got none at own/boxes",
    ),
    "empty": (put(OWN_BOXES, ""), "empty; expected a header with image_id, big_x0"),
    "blank lines": (put(OWN_BOXES, "\n \n\n"), "empty; expected a header"),
    "header only": (put(OWN_BOXES, HEADER + "\n"), "no rows; expected one row per lesion with the columns image_id"),
    "no header": (rewritten(lambda text: text.partition("\n")[2]), "column image_id is missing"),
    "HTML": (put(OWN_BOXES, HTML), "column image_id is missing .*; found <!DOCTYPE html>"),
    "spreadsheet": (put(OWN_BOXES, zip_of), r"not UTF-8 text \(byte \d+\); save the table as CSV UTF-8"),
    "UTF-16": (
        rewritten(lambda text: text.encode("utf-16")),
        r"not UTF-8 text \(byte 0\); save the table as CSV UTF-8",
    ),
    "Latin-1": (rewritten(lambda text: text.replace("p2", "p\xe9").encode("latin-1")), "not UTF-8 text"),
    "semicolons": (rewritten(lambda text: text.replace(",", ";")), "separated by ';'; expected ',' "),
    "tabs": (rewritten(lambda text: text.replace(",", "\t")), "separated by tabs?; expected ','"),
    "decimal commas": (cells(big_x0="10,5"), "line 3 has 14 fields; expected 13 as the header"),
    "too few fields": (row("p2,0,train,48"), "line 3 has 4 fields; expected 13 as the header"),
    "missing column": (rewritten(without("small_y1")), "column small_y1 is missing .of image_id"),
    "unknown column": (
        rewritten(lambda text: text.replace("split", "fold", 1)),
        "unknown column 'fold'; expected image_id, lesion_id",
    ),
    "column in capitals": (rewritten(lambda text: text.replace("big_x0", "Big_X0")), "column big_x0 is missing"),
    "column twice": (
        rewritten(lambda text: text.replace("split", "lesion_id", 1)),
        "a column stands twice in the header",
    ),
    "x, y, width, height": (
        rewritten(lambda text: text.replace("big_x1", "big_w").replace("big_y1", "big_h")),
        "column big_x1 is missing",
    ),
    "leading zeros lost": (
        edit(OWN_BOXES, "ISIC_0000007", "7"),
        "line 2, image_id: '7' is not among the 4 images; did the leading part of 'ISIC_0000007'",
    ),
    "unknown image": (cells(image_id="nobody"), "line 3, image_id: 'nobody' is not among the 4 images; check the id"),
    "file name for an id": (cells(image_id="p2.png"), r"line 3, image_id: 'p2\.png' is not among the 4 images"),
    "no id": (cells(image_id=""), "line 3, image_id: '' is not among"),
    "duplicate": (row(f"{ROW}\n{ROW}"), "line 4, image_id, lesion_id: 'p2', '0' stands already in line 3"),
    "no number": (cells(big_x1="wide"), "line 3, big_x1: expected a number of pixels, got 'wide'"),
    "empty cell": (cells(small_y0=""), "line 3, small_y0: expected a number of pixels, got ''"),
    "thousands": (cells(big_x1="1_0"), "line 3, big_x1: expected a number of pixels, got '1_0'"),
    "other digits": (cells(big_x1="\u0664\u0660"), "line 3, big_x1: expected a number of pixels, got '\u0664\u0660'"),
    "unit": (cells(big_x1="40 px"), "line 3, big_x1: expected a number of pixels, got '40 px'"),
    "NaN": (cells(big_y0="NaN"), "line 3, big_y0: expected a finite number of pixels, got nan"),
    "infinite": (cells(small_x0="-inf"), "line 3, small_x0: expected a finite number of pixels, got -inf"),
    "overflow": (cells(big_x1="1e999"), "line 3, big_x1: expected a finite number of pixels, got inf"),
    "reversed": (cells(big_x0="40", big_x1="10"), "line 3, big_x0, big_x1: expected big_x0 < big_x1, got 40 and 10"),
    "without area": (cells(small_y1="12"), "line 3, small_y0, small_y1: expected small_y0 < small_y1, got 12 and 12"),
    "outside, right": (cells(big_x1="49"), "line 3, big_x1: 49 lies outside the image 'p2' of 48x32 px"),
    "outside, top": (cells(big_y0="-3"), "line 3, big_y0: -3 lies outside the image 'p2'"),
    "nested the wrong way": (
        row(f"p2,0,train,48,32,{','.join(BOXES.split(',')[4:] + BOXES.split(',')[:4])}"),
        r"line 3, small_x0..small_y1: small box .* leaves the big box .*exchanged\?",
    ),
    "small box half outside": (
        cells(small_x1="44"),
        r"small box \[20, 12, 44, 20\] of 'p2' leaves the big box .* 4.0 px",
    ),
    "another frame's width": (cells(width="256"), "line 3, width: got 256, but image 'p2' is 48x32 px after EXIF"),
    "another split": (cells(split="test"), "line 3, split: got 'test', but image 'p2' is in split 'train'"),
    "split by its folder": (edit(OWN_BOXES, "p3,0,dev", "p3,0,val"), "line 4, split: got 'val', but image 'p3' is in"),
    "a split without rows": (edit(OWN_BOXES, f"p4,0,test,48,32,{BOXES}\n", ""), "no lesion of split 'test'"),
    "an open quote": (row('"' + ROW), "line 3"),
    "a huge cell": (cells(lesion_id="9" * 200_000), r"line 3.*(131072|characters)"),
    "a null character": (cells(lesion_id="\0"), "line 3"),
    "a folder": (folder_instead(OWN_BOXES), r"inputs\.boxes: expected a CSV file"),
}
FOREIGN = ("semicolons", "column twice", "NaN", "reversed", "outside, right", "empty", "UTF-16", "a huge cell")


def moved(spoil: Spoil) -> Spoil:
    """The project's own table, spoilt, as the one that `predict` is given."""

    def apply(folder: Path) -> None:
        (folder / "own").mkdir()
        (folder / OWN_BOXES).write_text(f"{HEADER}\n\n{ROW}\n")
        spoil(folder)
        (folder / "boxes.csv").write_bytes(
            (folder / OWN_BOXES).read_bytes().replace(b"p2", b"a").replace(b"train", b"")
        )
        shutil.rmtree(folder / "own")

    return apply


table_cases = [
    *(
        Case(
            "stage boxes",
            f"table: {name}",
            spoil,
            (r"^error: " + (r"params\.yaml: " if name in ("no file", "a folder") else r"own/boxes\.csv: "), words),
        )
        for name, (spoil, words) in TABLES.items()
    ),
    *(
        Case(
            "predict",
            f"table: {name}",
            moved(TABLES[name][0]),
            (r"^error: boxes\.csv: ", TABLES[name][1].replace("p2", "a")),
        )
        for name in FOREIGN
    ),
    Case("predict", "table: none", gone("boxes.csv"), (r"^error: boxes\.csv: no such file; expected a two-box CSV",)),
    Case(
        "predict",
        "table: below a file",
        nothing,
        ("^error: boxes.csv/b.csv: Not a directory; expected the path of a file or folder",),
        (*PREDICT[:3], "boxes.csv/b.csv", *PREDICT[4:]),
    ),
    Case(
        "predict",
        "table: another size",
        edit("boxes.csv", f"{WIDTH},{HEIGHT}", "96,64"),
        (r"boxes\.csv: line 2, width: got 96, but image 'a' is 48x32 px",),
    ),
    Case(
        "predict",
        "table: no small box for this prompt",
        both(
            edit("boxes.csv", HEADER, "image_id,big_x0,big_y0,big_x1,big_y1"),
            edit("boxes.csv", f"a,0,,{WIDTH},{HEIGHT},{BOXES}", "a,10,6,40,28"),
        ),
        (r"boxes\.csv: column small_x0 is missing",),
        (*PREDICT, "--prompt", "ring"),
    ),
    Case(
        "convert csv",
        "table: no such number",
        edit("boxes.csv", "10,6,40", "10,six,40"),
        (r"boxes\.csv: line 2, big_y0: expected a finite number, got 'six'",),
    ),
    Case(
        "convert csv",
        "table: a raised digit for a size",
        edit("boxes.csv", f"{WIDTH},{HEIGHT}", "4\u00b2,32"),
        (r"boxes\.csv: line 2: the size of image 'a' is unknown",),
        ("data", "convert", "boxes.csv", "new.xml", "--format", "csv"),
    ),
    Case(
        "convert csv",
        "table: half a small box",
        edit("boxes.csv", "30,20\n", "30,\n"),
        (r"boxes\.csv: line 2, small_y1: expected all four numbers of the core, or none",),
    ),
]


# -------------------------------------------------------------------------------------------------------- the index

INDEX = "data/raw/index.csv"
LESION_COLUMNS = "image_id,lesion_id,mask_path,annotation_id,category,area,mask_sha256"
INDEXES: dict[str, tuple[Spoil, str]] = {
    "none": (gone(INDEX), "no such file; run `dvc repro download`"),
    "a folder": (folder_instead(INDEX), "is a folder; run `dvc repro -f download`"),
    "columns": (edit(INDEX, "image_id", "id"), "expected the columns image_id, split, image_path.*, got id, split"),
    "rows": (put(INDEX, "image_id,split,image_path,mask_path,width,height,sha256,mask_sha256\n"), "no rows"),
    "split": (edit(INDEX, ",dev,", ",val,"), "line [2-5], split: expected train, dev, test, got 'val'"),
    "width": (edit(INDEX, ",48,", ",0,"), "line 2, width: expected a whole number of pixels, got '0'"),
    "raised digit": (
        edit(INDEX, ",48,", ",4\u00b2,"),
        "line 2, width: expected a whole number of pixels, got '4\u00b2'",
    ),
    "endless width": (
        edit(INDEX, ",48,", f",{'9' * 5000},"),
        "line 2, width: expected a whole number of pixels, got '99",
    ),
    "cut row": (edit(INDEX, ",48,", "\n,48,"), "line 2: expected 8 fields as in the header"),
    "bytes": (put(INDEX, b"\xff\xfe"), "not UTF-8 text"),
    "a huge cell": (edit(INDEX, "own/images", "x" * 200_000), "line 2"),
    "lesions of no image": (
        put("data/raw/lesions.csv", f"{LESION_COLUMNS}\nzz,0,m.png,1,x,9,{'0' * 64}\n"),
        r"lesions\.csv: image 'zz' is not in index\.csv",
    ),
    "lesions' columns": (put("data/raw/lesions.csv", "image_id,mask\n"), r"lesions\.csv: expected the columns"),
    "lesions' cut row": (
        put("data/raw/lesions.csv", f"{LESION_COLUMNS}\np2,0\n"),
        r"lesions\.csv: line 2: expected 7 fields",
    ),
    "lesions' bytes": (put("data/raw/lesions.csv", b"\xff\xfe"), r"lesions\.csv: not UTF-8 text"),
}
index_cases = [
    Case("stage boxes", f"index: {name}", spoil, (r"^error: data/raw/", words))
    for name, (spoil, words) in INDEXES.items()
]


# --------------------------------------------------------------------------------------------------------- params.yaml


def parameter(old: str, new: str) -> Spoil:
    """One line of params.yaml changed; the value goes to the end of it."""

    def spoil(folder: Path) -> None:
        lines = (folder / "params.yaml").read_text("utf-8").splitlines()
        found = [k for k, line in enumerate(lines) if line.strip().startswith(f"{old}:")]
        if len(found) != 1:
            raise ValueError(f"{old}: expected once, found {len(found)} times")
        indent = lines[found[0]][: len(lines[found[0]]) - len(lines[found[0]].lstrip())]
        lines[found[0]] = indent + new
        (folder / "params.yaml").write_text("\n".join([*lines, ""]), "utf-8")

    return spoil


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 10))
PARAMS: dict[str, tuple[Spoil, str]] = {
    "none": (gone("params.yaml"), "expected a parameter file, found none; `lesionsam preset demo` writes one"),
    "empty": (put("params.yaml", ""), "expected sections, got nothing; `lesionsam preset demo` writes them"),
    "a list": (put("params.yaml", "- 1\n- 2\n"), "expected sections, got the list"),
    "a text": (put("params.yaml", "hello\n"), "expected sections, got"),
    "bytes": (put("params.yaml", b"\xff\xfe\x00"), "expected a text file in UTF-8"),
    "a folder": (folder_instead("params.yaml"), "expected a text file"),
    "tabs": (put("params.yaml", "train:\n\tepochs: 1\n"), "line 2: expected YAML"),
    "an open bracket": (put("params.yaml", "train: [1, 2\n"), "expected YAML"),
    "a null character": (put("params.yaml", "train: \0\n"), "expected YAML"),
    "a python object": (
        put("params.yaml", "a: !!python/object/apply:os.mkdir [pwned]\n"),
        "line 1: expected YAML, got",
    ),
    "a tag": (put("params.yaml", "a: !thing 1\n"), "expected YAML|expected sections"),
    "an alias of nothing": (put("params.yaml", "a: *nothing\n"), "expected YAML"),
    "an alias of itself": (put("params.yaml", "a: &a {b: *a}\n"), r"params\.yaml"),
    "a billion laughs": (put("params.yaml", LAUGHS), r"params\.yaml"),
    "nested deeply": (put("params.yaml", "a: " + "[" * 1100), r"nested too deeply"),
    "a key twice": (put("params.yaml", "train:\n  epochs: 1\n  epochs: 2\n"), "line 3: found duplicate key"),
    "a word for a number": (parameter("patience", "patience: many"), "train.patience: expected an integer .*, got"),
    "a fraction for a count": (parameter("patience", "patience: 2.5"), "patience: expected an integer .*, got 2.5"),
    "a text for a switch": (
        parameter("train_decoder", 'train_decoder: "yes"'),
        "model.train_decoder: expected true or",
    ),
    "a number below": (parameter("patience", "patience: -1"), "train.patience: expected an integer .*, got -1"),
    "not a number": (parameter("lr_encoder", "lr_encoder: .nan"), "train.lr_encoder: expected a number .*, got"),
    "infinite": (parameter("lr_encoder", "lr_encoder: .inf"), "train.lr_encoder: expected a number"),
    "nothing": (parameter("patience", "patience:"), "train.patience: expected an integer .*, got nothing"),
    "a section for a value": (parameter("patience", "patience: {a: 1}"), "train.patience: expected an integer"),
    "a misspelt key": (
        parameter("patience", "patience: 0\n  patiense: 1"),
        "train.patiense: unknown key; did you mean train.pat",
    ),
    "an extra key": (parameter("patience", "patience: 3\n  colour: red"), "train.colour: unknown key; remove it"),
    "another variant": (parameter("kind", "kind: magic"), "expected one of"),
    "a folder that is not there": (gone("own/images/test"), "inputs.folder: expected a folder that holds images/test"),
    "an endless number": (parameter("patience", f"patience: {'9' * 5000}"), r"patience|expected YAML"),
}
params_cases = [
    *(
        Case("check", f"params: {name}", spoil, (r"^error: params\.yaml", words))
        for name, (spoil, words) in PARAMS.items()
    ),
    Case(
        "upgrade",
        "params: anchors",
        put("params.yaml", lambda: params({}).replace("inputs:", "other: &x {a: 1}\ninputs:").encode()),
        (r"params\.yaml",),
    ),
    Case(
        "stage boxes",
        "params: of another stage",
        parameter("patience", "patience: -1"),
        ("train.patience: expected an integer",),
    ),
    Case(
        "check", "params: no such preset", nothing, ("preset nonesuch: expected one of .*demo",), ("preset", "nonesuch")
    ),
]


# --------------------------------------------------------------------------------------------------------- checkpoints


class Runs:
    """A pickle that would call something when it is read."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call, self.arguments


def tensors() -> Any:
    """torch, imported when a case needs it."""
    import torch

    return torch


def saved(value: Callable[[], object]) -> Callable[[], bytes]:
    """What torch.save writes."""

    def make() -> bytes:
        import torch

        file = io.BytesIO()
        torch.save(value(), file)
        return file.getvalue()

    return make


def changed(
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], object], name: str = "sam.safetensors"
) -> Spoil:
    """The sound weights, with tensors or metadata changed."""

    def spoil(folder: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(folder / name, "pt") as file:
            notes = dict(file.metadata())
        state = load_file(folder / name)
        change(state, notes)
        save_file(state, folder / name, notes)

    return spoil


def header(text: str, length: int | None = None) -> bytes:
    """A safetensors file that is a header alone."""
    data = text.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


POSITION = "image_encoder.pos_embed"
PLAIN = "holds a Python object .* beside the weights, and loading it could run code"
DAMAGED = "cannot be read as weights[:,] (no checkpoint, or|damaged or) cut short"
PICKLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "os.system": (saved(lambda: Runs(os.system, "touch pwned")), PLAIN),
    "os.mkdir among tensors": (saved(lambda: {POSITION: Runs(os.mkdir, "pwned")}), PLAIN),
    "eval": (saved(lambda: {"a": Runs(builtins.eval, "__import__('os').mkdir('pwned')")}), PLAIN),
    "open": (saved(lambda: [Runs(builtins.open, "pwned", "w")]), PLAIN),
    "old style": (lambda: pickle.dumps(Runs(os.mkdir, "pwned"), 2), PLAIN),
    "a model object": (saved(lambda: tensors().nn.Linear(2, 2)), PLAIN),
    "numpy": (saved(lambda: {"a": np.ones(3)}), PLAIN),
}
FILES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "empty": (b"", DAMAGED),
    "HTML": (HTML, "an HTML page, not weights; fetch the file again"),
    "text": (b"hello", f"{PLAIN}|{DAMAGED}"),
    "zip of an image": (zip_of, f"{PLAIN}|{DAMAGED}"),
    "an image": (lambda: encoded(picture(1)), f"{PLAIN}|{DAMAGED}"),
    "a list": (saved(lambda: [1, 2]), "holds a list; expected tensors by name"),
    "a tensor": (saved(lambda: tensors().ones(3)), "holds a Tensor; expected tensors by name"),
    "a training's state": (
        saved(lambda: {"model": {"a": tensors().ones(3)}, "epoch": 3}),
        "holds no SAM: expected the key image_encoder.pos_embed among others, found 1 keys",
    ),
    "another model": (
        saved(lambda: {"conv.weight": tensors().ones(3)}),
        r"holds no SAM: expected the key image_encoder.pos_embed among others, found 1 keys \(conv.weight",
    ),
    "a pickle of nothing": (b".", f"{PLAIN}|{DAMAGED}"),
    "a pickle that takes from nothing": (b"\x80\x020.", f"{PLAIN}|{DAMAGED}"),
    "nothing in it": (saved(dict), "holds no SAM: expected the key image_encoder.pos_embed"),
    "cut": (lambda: saved(lambda: {POSITION: tensors().ones(1, 8, 8, 32)})()[:4000], f"{PLAIN}|{DAMAGED}"),
}
SAFE: dict[str, tuple[Spoil, str]] = {
    "empty": (put("sam.safetensors", b""), DAMAGED),
    "HTML": (put("sam.safetensors", HTML), "an HTML page, not weights"),
    "a pickle": (put("sam.safetensors", PICKLES["os.system"][0]), DAMAGED),
    "a header of 2^60 bytes": (put("sam.safetensors", header("{}", 1 << 60)), DAMAGED),
    "a header that is no JSON": (put("sam.safetensors", header("[[[[")), DAMAGED),
    "a tensor beyond the file": (
        put("sam.safetensors", header('{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}')),
        DAMAGED,
    ),
    "cut": (lambda folder: os.truncate(folder / "sam.safetensors", 5000), DAMAGED),
    "a key gone": (
        changed(lambda state, notes: state.pop("mask_decoder.iou_token.weight")),
        r"does not fit compact: keys 1 missing \(mask_decoder.iou_token.weight\)",
    ),
    "a key too many": (
        changed(lambda state, notes: state.update(extra=tensors().ones(1))),
        r"keys 1 unknown \(extra\)",
    ),
    "a shape": (
        changed(lambda state, notes: state.update({"mask_decoder.iou_token.weight": tensors().ones(1, 3)})),
        "of another shape .mask_decoder.iou_token.weight",
    ),
    "NaN": (
        changed(lambda state, notes: state["mask_decoder.iou_token.weight"].fill_(float("nan"))),
        "mask_decoder.iou_token.weight holds values that are not finite",
    ),
    "infinite": (
        changed(lambda state, notes: state["mask_decoder.iou_token.weight"].fill_(float("inf"))),
        "not finite",
    ),
    "position of another rank": (
        changed(lambda state, notes: state.update({POSITION: tensors().ones(3)})),
        "holds no SAM",
    ),
    "position of no grid": (
        changed(lambda state, notes: state.update({POSITION: tensors().ones(1, 0, 0, 32)})),
        r"sam\.safetensors",
    ),
    "no architecture": (changed(lambda state, notes: notes.pop("architecture")), "does not state its architecture"),
    "architecture of text": (
        changed(lambda state, notes: notes.update(architecture="[1]")),
        "no readable architecture; export the model again",
    ),
    "architecture lacks a key": (
        changed(lambda state, notes: notes.update(architecture='{"width": 32}')),
        "the architecture that it states cannot be built .missing or unknown: decoder_depth, decoder_mlp",
    ),
    "architecture of words": (
        changed(
            lambda state, notes: notes.update(
                architecture=json.dumps({**json.loads(notes["architecture"]), "depth": "two"})
            )
        ),
        "depth: expected whole numbers from 0 to 16384, got two",
    ),
    "architecture of giants": (
        changed(
            lambda state, notes: notes.update(
                architecture=json.dumps({**json.loads(notes["architecture"]), "depth": 10**9})
            )
        ),
        r"sam\.safetensors: .*depth",
    ),
    "half of a file": (
        changed(lambda state, notes: notes.update(tuned="lora", base="sam.pth")),
        "holds only the trained parameters and needs the weights it was trained on",
    ),
}
OWN_SAM = "own/sam.safetensors"


def given(model: str) -> tuple[str, ...]:
    """The arguments of `predict` with another model."""
    return tuple(model if part == "sam.safetensors" else part for part in PREDICT)


checkpoint_cases = [
    *(
        Case("predict", f"pickle: {name}", put("bad.pth", make), (r"^error: bad\.pth: ", words), given("bad.pth"))
        for name, (make, words) in PICKLES.items()
    ),
    *(
        Case("predict", f"weights: {name}", put("bad.pth", make), (r"^error: bad\.pth: ", words), given("bad.pth"))
        for name, (make, words) in FILES.items()
    ),
    *(
        Case("predict", f"safetensors: {name}", spoil, (r"^error: sam\.safetensors: ", words))
        for name, (spoil, words) in SAFE.items()
    ),
    Case(
        "predict", "weights: none", nothing, ("^error: nowhere.pth: no such file, folder or run",), given("nowhere.pth")
    ),
    Case(
        "predict",
        "weights: an empty folder",
        nothing,
        ("^error: yolo: expected best.safetensors.*found none",),
        given("yolo"),
    ),
    Case(
        "predict",
        "weights: a model's address",
        nothing,
        ("^error: models:/lesionsam: expected a weights file",),
        given("models:/lesionsam"),
    ),
    Case(
        "stage weights", "weights: none", gone(OWN_SAM), ("model.checkpoint: expected a weights file, or `published`",)
    ),
    Case("stage weights", "weights: HTML", put(OWN_SAM, HTML), (rf"^error: {OWN_SAM}: an HTML page",)),
    Case(
        "stage weights",
        "weights: cut",
        lambda folder: os.truncate(folder / OWN_SAM, 5000),
        (rf"^error: {OWN_SAM}: {DAMAGED}",),
    ),
    Case(
        "stage weights",
        "weights: a side that is none",
        changed(lambda state, notes: notes.update(image_size="big"), OWN_SAM),
        (rf"^error: {OWN_SAM}: .*image_size.*'big'",),
    ),
    Case(
        "stage weights",
        "weights: a pickle",
        both(
            put("own/sam.pth", PICKLES["os.system"][0]),
            put("params.yaml", lambda: params({"model.checkpoint": "own/sam.pth"}).encode()),
        ),
        (rf"^error: own/sam\.pth: {PLAIN}",),
    ),
]


# ---------------------------------------------------------------------------------- points, options, and other formats

POINTS: dict[str, tuple[str, str]] = {
    "x": ("a,0,left,16,1", r"line 2, x: expected a number of pixels, got 'left'"),
    "NaN": ("a,0,nan,16,1", "line 2, x: expected a number of pixels, got 'nan'"),
    "outside": ("a,0,25,33,1", "line 2, y: 33 lies outside the image 'a' of 48x32 px"),
    "label": ("a,0,25,16,2", r"line 2, label: expected 1 \(lesion\) or 0 \(not\), got '2'"),
    "background alone": ("a,0,25,16,0", "line 2, label: lesion '0' of 'a' has no point of label 1"),
    "fields": ("a,0,25", "line 2 has 3 fields; expected 5"),
}
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "threshold": (("--threshold", "nan"), "--threshold: expected a probability between 0 and 1, got nan"),
    "threshold of 50": (("--threshold", "50"), "--threshold: expected a probability between 0 and 1, got 50"),
    "batch": (("--batch-size", "0"), "--batch-size: expected at least 1 image, got 0"),
    "ensemble": (("--ensemble", "0"), r"--ensemble: expected 1 \(none\) or more"),
    "prompt": (("--prompt", "star"), "--prompt: expected one of .*, got 'star'"),
    "two sources": (("--auto",), "expected one of --boxes, --points, --auto, --everything, got --boxes and --auto"),
    "device": (("--device", "tpu"), r"device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
    "device's number": (("--device", "cpu:x"), r"device: expected auto, cpu, cuda or cuda:N, got 'cpu:x'"),
    "no GPU": (("--device", "cuda:99"), r"device: 'cuda:99' asked for, but"),
}


def coco(**changes: Any) -> dict[str, Any]:
    """A sound COCO file of one image with both boxes."""

    def entry(number: int, box: list[float]) -> dict[str, Any]:
        return {"id": number, "image_id": 1, "category_id": number, "bbox": box, "iscrowd": 0}

    return {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 1, "name": "big"}, {"id": 2, "name": "small"}],
        "annotations": [entry(1, [10, 6, 30, 22]), entry(2, [20, 12, 10, 8])],
    } | changes


def annotation(**changes: Any) -> dict[str, Any]:
    """The COCO file with its first annotation changed."""
    document = coco()
    document["annotations"][0] |= changes
    return document


def image(**changes: Any) -> dict[str, Any]:
    """The COCO file with its image changed."""
    document = coco()
    document["images"][0] |= changes
    return document


COCOS: dict[str, tuple[object, str]] = {
    "no JSON": ('{"images": [', r"line 1: not JSON \(.*\); expected COCO instances JSON"),
    "HTML": (HTML.decode(), "line 1: not JSON"),
    "empty": ("", "empty; expected COCO instances JSON"),
    "NaN": ('{"images": [NaN]}', "NaN is no JSON number"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "an endless number": (f'{{"images": [{"9" * 5000}]}}', r"a\.json: "),
    "a list": ([], "expected COCO instances JSON with the lists images, annotations and categories"),
    "no annotations": (coco(annotations=[]), "no boxes in it; expected one or two per lesion"),
    "an image that is none": (annotation(image_id=5), "annotation 1: image_id 5 stands for no image"),
    "a category that is none": (
        annotation(category_id=9),
        r"annotation 1: category_id 9 stands for no category; it has",
    ),
    "an id twice": (annotation(id=2), "annotation 2: this id stands twice"),
    "an id of text": (
        annotation(id="one"),
        "annotation number 1: expected an object with a whole number as id, got one",
    ),
    "no area": (annotation(bbox=[10, 6, 0, 22]), r"annotation 1: bbox has no area \(0 x 22 px\)"),
    "negative": (annotation(bbox=[10, 6, -3, 22]), r"annotation 1: bbox has no area \(-3 x 22 px\)"),
    "three numbers": (annotation(bbox=[10, 6, 30]), r"annotation 1: expected bbox as \[x, y, width, height\]"),
    "a word": (annotation(bbox=[10, 6, "x", 22]), "annotation 1, bbox: expected a finite number, got 'x'"),
    "beyond all numbers": (
        json.dumps(coco()).replace("[10,", "[1e999,"),
        "annotation 1, bbox: expected a finite number",
    ),
    "outside": (annotation(bbox=[10, 6, 90, 22]), "lesion '0', big_x1: 100 lies outside the image 'a' of 48x32 px"),
    "nested the wrong way": (annotation(bbox=[22, 13, 2, 2]), r"annotation 2: the core .* lies inside no big box"),
    "a name that leaves": (image(file_name="../../a.png"), "expected a file name below the folder of images, got"),
    "a name that is none": (image(file_name=["a.png"]), "expected a file name below the folder of images"),
    "no size": (
        image(width=None),
        "image 'a.png': expected width and height in pixels, at most 200 megapixels, got None",
    ),
    "a giant": (image(width=10**6, height=10**6), "expected width and height in pixels, at most 200 megapixels"),
    "runs of another size": (
        annotation(bbox=None, segmentation={"size": [9, 9], "counts": [81]}),
        r"annotation 1: RLE: size \(height, width\) is \[9, 9\]; expected \[32, 48\]",
    ),
    "runs too short": (
        annotation(bbox=None, segmentation={"size": [32, 48], "counts": [5]}),
        "the runs cover 5 pixels",
    ),
    "a polygon of a point": (annotation(bbox=None, segmentation=[[1, 2]]), "annotation 1: "),
}


def studio(**changes: Any) -> list[dict[str, Any]]:
    """A sound Label Studio export of one image with both boxes."""

    def region(name: str, x: float, y: float, w: float, h: float) -> dict[str, Any]:
        return {
            "id": name,
            "type": "rectanglelabels",
            "original_width": WIDTH,
            "original_height": HEIGHT,
            "value": {"x": x, "y": y, "width": w, "height": h, "rotation": 0, "rectanglelabels": [name]},
        }

    regions = [region("big", 20, 20, 60, 60), region("small", 40, 40, 20, 20)]
    regions[0]["value"] |= changes
    return [{"id": 1, "data": {"image": "/data/upload/1/a.png"}, "annotations": [{"result": regions}]}]


STUDIOS: dict[str, tuple[object, str]] = {
    "an object": ({}, "expected Label Studio JSON"),
    "min": ([{"image": "a.png", "label": []}], "task 1: expected data and annotations"),
    "turned": (studio(rotation=30), "task 1, region big: turned; expected an upright rectangle"),
    "nothing": (studio(width=None), "task 1, region big, width: expected a finite number, got 'None'"),
    "outside": (studio(width=90), "big_x1: 52.8 lies outside the image 'a' of 48x32 px"),
}
BOX = '<box label="{}" xtl="{}" ytl="{}" xbr="{}" ybr="{}"/>'
CVAT = (
    f'<annotations><image id="0" name="a.png" width="{WIDTH}" height="{HEIGHT}">{BOX.format("big", 10, 6, 40, 28)}'
    f"{BOX.format('small', 20, 12, 30, 20)}</image></annotations>"
)
CVATS: dict[str, tuple[str, str]] = {
    "bomb": (
        '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotations>&b;</annotations>',
        "line 1: holds a document type or entities",
    ),
    "external": (
        '<!DOCTYPE a SYSTEM "file:///etc/hostname"><annotations/>',
        "line 1: holds a document type or entities",
    ),
    "deep": ("<a>" * 100_000 + "</a>" * 100_000, "<a>: expected CVAT for images"),
    "not XML": ("image_id,big_x0", "line 1: not XML"),
    "video": ("<annotations><track/></annotations>", "<track>: expected CVAT for images"),
    "a word": (CVAT.replace('xtl="10"', 'xtl="left"'), "box 1: xtl: expected a finite number, got 'left'"),
    "reversed": (
        CVAT.replace('xtl="10"', 'xtl="45"').replace("small", "tag"),
        "big_x0, big_x1: expected big_x0 < big_x1, got 45 and 40",
    ),
    "raised digit": (
        CVAT.replace('width="48"', 'width="4\u00b2"'),
        "expected width and height in pixels, .*got 4\u00b2",
    ),
}
YOLOS: dict[str, tuple[str, str]] = {
    "four fields": ("0 0.5 0.5 0.6\n", "line 1: 4 fields; expected class, x, y, width, height"),
    "class": ("2 0.5 0.5 0.6 0.6\n", r"line 1: class '2'; expected 0 to 1 \(big, small\)"),
    "raised digit": ("\u00b9 0.5 0.5 0.6 0.6\n", "line 1: class '\u00b9'; expected 0 to 1"),
    "pixels": ("0 25 16 30 22\n", "line 1: expected shares of 0 to 1 of the image's sides, .*are these pixels"),
    "NaN": ("0 nan 0.5 0.6 0.6\n", "line 1: expected a finite number, got 'nan'"),
    "outside": ("0 0.9 0.5 0.6 0.6\n", "big_x1: 57.6 lies outside the image 'a' of 48x32 px"),
}


def written(content: object) -> str:
    """As a file holds it."""
    return content if isinstance(content, str) else json.dumps(content)


format_cases = [
    *(
        Case(
            "predict points",
            f"points: {name}",
            put("points.csv", f"image_id,lesion_id,x,y,label\n{line}\n"),
            (r"^error: points\.csv: ", words),
        )
        for name, (line, words) in POINTS.items()
    ),
    Case(
        "predict points",
        "points: boxes",
        lambda folder: shutil.copy(folder / "boxes.csv", folder / "points.csv"),
        (r"^error: points\.csv: column x is missing .of image_id, x, y.",),
    ),
    *(
        Case("predict", f"option: {name}", nothing, (r"^error: ", words), (*PREDICT, *more))
        for name, (more, words) in OPTIONS.items()
    ),
    Case(
        "predict",
        "option: no source",
        nothing,
        ("expected one of --boxes.*, got none of them",),
        (*PREDICT[:2], *PREDICT[4:]),
    ),
    Case("predict", "option: a file as folder", put("out", "x"), ("^error: out: cannot be written to",)),
    Case(
        "predict",
        "option: another table in the folder",
        put("out/predictions.csv", "a,b\n1,2\n"),
        (r"^error: out/predictions\.csv: not a table of `lesionsam predict`",),
    ),
    Case(
        "predict",
        "option: bytes in the folder's table",
        put("out/predictions.csv", b"\xff\xfe\x00"),
        (r"^error: out/predictions\.csv: not a table of `lesionsam predict`",),
    ),
    *(
        Case("convert coco", f"COCO: {name}", put("a.json", written(content)), (r"^error: a\.json: ", words))
        for name, (content, words) in COCOS.items()
    ),
    *(
        Case(
            "convert studio",
            f"Label Studio: {name}",
            put("studio.json", written(content)),
            (r"^error: studio\.json: ", words),
        )
        for name, (content, words) in STUDIOS.items()
    ),
    *(
        Case("convert cvat", f"CVAT: {name}", put("a.xml", content), (r"^error: a\.xml: ", words))
        for name, (content, words) in CVATS.items()
    ),
    *(
        Case("convert yolo", f"YOLO: {name}", put("yolo/a.txt", content), (r"^error: yolo", words))
        for name, (content, words) in YOLOS.items()
    ),
    Case(
        "convert yolo",
        "YOLO: a file of no image",
        put("yolo/b.txt", "0 0.5 0.5 0.6 0.6\n"),
        ("yolo/b.txt: no image of the name 'b' among the 1 given",),
    ),
    Case("convert yolo", "YOLO: a damaged image", put("photos/a.png", HTML), ("^error: photos/a.png: not an image",)),
    Case("convert csv", "option: a file that is there", put("new.json", "x"), ("new.json: is there already",)),
    Case(
        "convert csv",
        "option: a format that is none",
        nothing,
        ("format: expected one of .*, got 'voc'",),
        ("data", "convert", "boxes.csv", "new.json", "--format", "voc"),
    ),
    Case(
        "convert csv",
        "option: a share of 0",
        nothing,
        ("share of the core: expected a number between 0 and 1",),
        ("data", "convert", "boxes.csv", "new.json", "--images", "photos", "--core", "0"),
    ),
]

CASES: tuple[Case, ...] = (
    *image_cases,
    *mask_cases,
    *table_cases,
    *index_cases,
    *params_cases,
    *checkpoint_cases,
    *format_cases,
)

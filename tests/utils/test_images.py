"""read_image, check_image and read_mask on the catalogue of odd files: each is read right or ends in one clear line."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from lesionsam.errors import UserError
from lesionsam.utils import images
from lesionsam.utils.images import check_image, image_size, num_pages, read_image, read_mask, read_reduced

RAMP = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
DEEP = np.linspace(0, 65535, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint16)
BLOB = np.zeros((40, 60), bool)
BLOB[10:30, 20:45] = True


SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png16(path: Path, pixels: np.ndarray) -> Path:
    """A 16-bit PNG from its definition (PNG specification, section 5), as Pillow cannot write colour at 16 bits."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    path.write_bytes(SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    return path


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "TIFF", "PNG"])
def test_plain_rgb_is_read_exactly(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(RAMP))
    assert np.array_equal(read_image(path), RAMP)
    assert check_image(path) == (60, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    # EXIF 2.3, tag 0x0112: what must be done to the stored rows and columns to see the picture upright.
    upright = {
        1: RAMP,
        2: RAMP[:, ::-1],
        3: RAMP[::-1, ::-1],
        4: RAMP[::-1],
        5: RAMP.transpose(1, 0, 2),
        6: np.rot90(RAMP, -1),
        7: RAMP[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RAMP),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 100} if kind == "JPEG" else {}
    path = save(tmp_path / "a", Image.fromarray(RAMP), format=kind, exif=exif, **options)
    got, expected = read_image(path), upright[orientation]
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= (12 if kind == "JPEG" else 0)
    assert check_image(path) == image_size(path) == (expected.shape[1], expected.shape[0])


def test_grey_alpha_and_palettes(tmp_path: Path) -> None:
    grey = RAMP[..., 0]
    assert np.array_equal(read_image(save(tmp_path / "l.png", Image.fromarray(grey))), np.dstack([grey] * 3))
    half = np.full((40, 60, 1), 128, np.uint8)
    half[:5] = 0
    over_black = RAMP * (half / 255)
    got = read_image(save(tmp_path / "rgba.png", Image.fromarray(np.concatenate([RAMP, half], 2))))
    assert np.abs(got - over_black).max() <= 1
    assert not got[:5].any()
    got = read_image(save(tmp_path / "la.png", Image.fromarray(np.concatenate([RAMP[..., :1], half], 2))))
    assert np.abs(got[..., 2] - over_black[..., 0]).max() <= 1
    two = Image.fromarray(BLOB.astype(np.uint8)).convert("P")
    two.putpalette([200, 150, 120, 90, 40, 30])
    got = read_image(save(tmp_path / "p.png", two))
    assert np.array_equal(got, np.where(BLOB[..., None], [90, 40, 30], [200, 150, 120]))
    clear = read_image(save(tmp_path / "pt.png", two, transparency=1))
    assert np.array_equal(clear, np.where(BLOB[..., None], 0, [200, 150, 120]))
    got = read_image(save(tmp_path / "1.png", Image.fromarray(BLOB)))
    assert np.array_equal(got, np.dstack([BLOB * np.uint8(255)] * 3))


def test_cmyk_jpeg(tmp_path: Path) -> None:
    flat = np.broadcast_to(np.array([180, 120, 60], np.uint8), (16, 16, 3))
    path = save(tmp_path / "c.jpg", Image.fromarray(np.ascontiguousarray(flat)).convert("CMYK"), quality=100)
    assert np.abs(read_image(path).astype(int) - flat).max() <= 4


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    exact = DEEP / 257
    opaque = np.full_like(DEEP[..., :1], 65535)
    files = {"g.png": DEEP[..., 0], "c.png": DEEP, "a.png": np.concatenate([DEEP, opaque], 2)}
    for name, pixels in files.items():
        got = read_image(write_png16(tmp_path / name, pixels))
        assert np.abs(got - (np.dstack([exact[..., 0]] * 3) if pixels.ndim == 2 else exact)).max() <= 1, name
    tiffs: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        ("g.tif", DEEP[..., 0], {}),
        ("be.tif", DEEP[..., 0], {"byteorder": ">"}),
        ("c.tif", DEEP, {"photometric": "rgb"}),
        ("f.tif", (DEEP[..., 0] / 65535).astype(np.float32), {}),
    ]
    for name, pixels, options in tiffs:
        tifffile.imwrite(tmp_path / name, pixels, **options)
        assert np.abs(read_image(tmp_path / name)[..., 0] - exact[..., 0]).max() <= 1, name


@pytest.mark.parametrize(
    ("shape", "options"),
    [((3, 40, 60), {"photometric": "rgb", "planarconfig": "separate"}), ((40, 60), {"photometric": "miniswhite"})],
)
def test_deep_tiffs_that_pillow_misreads(tmp_path: Path, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(shape, np.uint16), **options)
    with pytest.raises(UserError, match=r"a\.tif: TIFF of more than 8 bits"):
        read_image(tmp_path / "a.tif")


def test_float_and_32_bit_out_of_range(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "f.tif", np.full((4, 4), 7.5, np.float32))
    tifffile.imwrite(tmp_path / "n.tif", np.full((4, 4), np.nan, np.float32))
    tifffile.imwrite(tmp_path / "i.tif", np.full((4, 4), 70_000, np.int32))
    for name, message in (("f.tif", "outside 0..1"), ("n.tif", "outside 0..1"), ("i.tif", "at most 16 bits")):
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name)


def test_names_do_not_matter_and_extreme_shapes_work(tmp_path: Path) -> None:
    assert np.array_equal(read_image(save(tmp_path / "really_png.jpg", Image.fromarray(RAMP), format="PNG")), RAMP)
    for width, height in ((1, 1), (20_000, 1), (1, 20_000)):
        path = save(tmp_path / "thin.png", Image.new("RGB", (width, height), (9, 8, 7)))
        assert read_image(path).shape == (height, width, 3)
        assert check_image(path) == (width, height)


def encoded(kind: str) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description long enough to be stored apart from its tag"
    noise = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.95])
def test_truncated(tmp_path: Path, kind: str, keep: float) -> None:
    data = encoded(kind)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(len(data) * keep)])
    for read in (read_image, check_image, read_mask):
        with pytest.raises(UserError, match=r"cut\.img: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "file is empty"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML or XML page"),
        (b"\n  <?xml version='1.0'?><Error/>", "an HTML or XML page"),
        (b"PK\x03\x04zzzz", "a zip archive"),
        (b"%PDF-1.7", "a PDF"),
        (b"\x00" * 100, "a file that begins with 00 00"),
        (b"GIF89a" + b"\x00" * 40, "not an image; expected JPEG, PNG, BMP, TIFF"),
        (b"II*\x00\xff\xff\xff\x7f", "cannot be read|not an image"),
    ],
)
def test_what_is_no_image(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    for read in (read_image, check_image, read_mask):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "x.jpg")


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg: no such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)


def test_random_damage_never_escapes_as_another_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10**6)
    rng = np.random.default_rng(1)
    path = tmp_path / "x"
    refused = 0
    for kind in ("JPEG", "PNG", "BMP", "TIFF"):
        original = np.frombuffer(encoded(kind), np.uint8)
        for _ in range(60):
            data = original.copy()
            data[rng.integers(0, min(400, len(data)), 4)] = rng.integers(0, 256, 4)
            path.write_bytes(data.tobytes())
            try:
                read_image(path)
            except UserError:
                refused += 1
    assert 40 < refused < 240


def test_pixel_cap_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", b"xxxx"))
    for read in (read_image, check_image, read_mask):
        with pytest.raises(UserError, match="60000x60000 = 3600 megapixels; expected at most 200"):
            read(tmp_path / "bomb.png")
    path = save(tmp_path / "a.png", Image.fromarray(RAMP))
    monkeypatch.setattr(images, "MAX_PIXELS", 2400)
    assert read_image(path).shape == RAMP.shape
    monkeypatch.setattr(images, "MAX_PIXELS", 2399)
    with pytest.raises(UserError, match="expected at most 0"):
        read_image(path)


def test_a_hundred_megapixels_come_without_warning(tmp_path: Path) -> None:
    path = save(tmp_path / "large.png", Image.new("1", (10_000, 10_000)))
    assert check_image(path) == (10_000, 10_000)


# ------------------------------------------------------------------------------------------------------------ masks


def mask_files(folder: Path) -> dict[str, Path]:
    one = BLOB.astype(np.uint8)
    palette = Image.fromarray(one).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    exif = Image.Exif()
    exif[0x0112] = 3
    return {
        "255": save(folder / "255.png", Image.fromarray(one * 255)),
        "1": save(folder / "1.png", Image.fromarray(one)),
        "bool": save(folder / "bool.png", Image.fromarray(BLOB)),
        "palette": save(folder / "palette.png", palette),
        "rgb": save(folder / "rgb.png", Image.fromarray(np.dstack([one * 255] * 3))),
        "rgba": save(folder / "rgba.png", Image.fromarray(np.dstack([one * 255] * 3 + [np.full_like(one, 255)]))),
        "16 bit": write_png16(folder / "16.png", BLOB.astype(np.uint16) * 65535),
        "16 bit of 255": write_png16(folder / "16_255.png", BLOB.astype(np.uint16) * 255),
        "tif": save(folder / "m.tif", Image.fromarray(one * 255)),
        "bmp": save(folder / "m.bmp", Image.fromarray(one * 255)),
        "turned": save(folder / "turned.png", Image.fromarray(one[::-1, ::-1] * np.uint8(255)), exif=exif),
    }


def test_masks_of_every_accepted_kind(tmp_path: Path) -> None:
    for kind, path in mask_files(tmp_path).items():
        mask = read_mask(path, (60, 40))
        assert mask.dtype == bool, kind
        assert np.array_equal(mask, BLOB), kind


def test_empty_and_full_masks(tmp_path: Path) -> None:
    assert not read_mask(save(tmp_path / "e.png", Image.new("L", (5, 4)))).any()
    assert read_mask(save(tmp_path / "f.png", Image.new("L", (5, 4), 255))).all()


def test_mask_of_another_size(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", Image.new("L", (5, 4)))
    with pytest.raises(UserError, match=r"m\.png: mask is 5x4 px; expected 4x5 as its image"):
        read_mask(path, (4, 5))


def test_grey_masks_need_the_threshold(tmp_path: Path) -> None:
    soft = np.where(BLOB, 250, 3).astype(np.uint8)
    soft[0, 0] = 127
    path = save(tmp_path / "grey.png", Image.fromarray(soft))
    with pytest.raises(UserError, match=r"3 grey levels \(3, 127, 250\); expected 0 and 255"):
        read_mask(path)
    assert np.array_equal(read_mask(path, threshold=True), BLOB)
    deep = write_png16(tmp_path / "deep.png", np.where(BLOB, 60_000, 500).astype(np.uint16))
    with pytest.raises(UserError, match="2 grey levels"):
        read_mask(deep)
    assert np.array_equal(read_mask(deep, threshold=True), BLOB)
    one = mask_files(tmp_path)["1"]
    assert np.array_equal(read_mask(one, threshold=True), BLOB)  # 0 and 1 stay what they mean


@pytest.mark.parametrize(
    "palette", [[0, 0, 0, 90, 90, 90], [0, 0, 0, 200, 0, 0], [255, 255, 255, 200, 0, 0], [40, 40, 40, 90, 90, 90]]
)
def test_palettes_of_two(tmp_path: Path, palette: list[int]) -> None:
    """Black is background, wherever it stands; without black, the first entry is."""
    image = Image.fromarray(BLOB.astype(np.uint8), "P")
    image.putpalette(palette)
    assert np.array_equal(read_mask(save(tmp_path / "p.png", image)), BLOB)
    if not any(palette[:3]):
        turned = Image.fromarray((~BLOB).astype(np.uint8), "P")
        turned.putpalette(palette[3:] + palette[:3])
        assert np.array_equal(read_mask(save(tmp_path / "p.png", turned)), BLOB)


def test_palette_of_three_is_refused_with_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3, "P")
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    with pytest.raises(UserError, match=r"p\.png: mask has 3 colours \(#000000, #00c800, #c80000\); expected"):
        read_mask(save(tmp_path / "p.png", image))


def test_coloured_masks_need_the_threshold(tmp_path: Path) -> None:
    path = save(tmp_path / "c.png", Image.fromarray(RAMP))
    with pytest.raises(UserError, match=r"colours \(#.*\.\.\.\); expected black and one other"):
        read_mask(path)
    tinted = np.where(BLOB[..., None], [250, 240, 255], [4, 0, 9]).astype(np.uint8)
    assert np.array_equal(read_mask(save(tmp_path / "t.png", Image.fromarray(tinted)), threshold=True), BLOB)


def test_jpeg_masks_need_the_threshold(tmp_path: Path) -> None:
    path = tmp_path / "m.jpg"
    Image.fromarray(BLOB.astype(np.uint8) * 255).save(path, quality=60)
    with pytest.raises(UserError, match=r"grey levels \(.*\), as JPEG changes them; expected 0 and 255"):
        read_mask(path)
    assert (read_mask(path, threshold=True) != BLOB).mean() < 0.02


def two_ellipses() -> tuple[np.ndarray, np.ndarray]:
    """(60, 90) bool twice: two lesions apart from each other, several pixels wide each."""
    rows, columns = np.mgrid[:60, :90]
    return tuple(((columns - x) / 14) ** 2 + ((rows - 30) / 10) ** 2 <= 1 for x in (22, 66))  # type: ignore[return-value]


@pytest.mark.parametrize("entries", [(0, 255), (0, 86), (100, 255), (86, 171)])
def test_palettes_without_black_keep_their_first_entry_as_background(tmp_path: Path, entries: tuple[int, int]) -> None:
    """Three times an entry of 86 and more exceeds a uint8: 3 * 86 = 258 would read as place 2 of the palette."""
    one, _ = two_ellipses()
    image = Image.fromarray(np.where(one, entries[1], entries[0]).astype(np.uint8), "P")
    image.putpalette([channel for v in range(256) for channel in (68 + 185 * v // 255, 1 + 230 * v // 255, 84)])
    if entries[0]:  # without black and entry 0, the colours decide, and both of these are bright
        with pytest.raises(UserError, match="2 colours"):
            read_mask(save(tmp_path / "p.png", image))
    else:
        assert np.array_equal(read_mask(save(tmp_path / "p.png", image)), one)


def label_masks() -> dict[str, Image.Image]:
    one, two = two_ellipses()
    labels = (one + 2 * two).astype(np.uint8)
    voc = Image.fromarray(labels, "P")
    voc.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    colours = np.where((one | two)[..., None], [255, 0, 0], [255, 255, 255]).astype(np.uint8)
    return {
        "0, 1, 2": Image.fromarray(labels),
        "grey of VOC": Image.fromarray((38 * one + 75 * two).astype(np.uint8)),
        "a label beside white": Image.fromarray((1 * one + 255 * two).astype(np.uint8)),
        "half and full": Image.fromarray((128 * one + 255 * two).astype(np.uint8)),
        "16 bit": Image.fromarray((one * 1 + two * 2).astype(np.uint16)),
        "voc": voc,
        "red and green": Image.fromarray(np.stack([one * 255, two * 255, one * 0], 2).astype(np.uint8)),
        "red on white": Image.fromarray(colours),
    }


@pytest.mark.parametrize("kind", label_masks())
@pytest.mark.parametrize("threshold", [False, True])
def test_masks_of_several_labels_are_never_cut(tmp_path: Path, kind: str, threshold: bool) -> None:
    path = save(tmp_path / "labels.png", label_masks()[kind])
    with pytest.raises(UserError, match=r"labels\.png: mask has .*several labels") as caught:
        read_mask(path, threshold=threshold)
    assert "threshold_masks" not in str(caught.value)


def half_masks() -> dict[str, np.ndarray]:
    """Masks whose levels all lie on one side of half of the range: cut there, they are empty or full."""
    one, _ = two_ellipses()
    rows, columns = np.mgrid[:60, :90]
    soft = np.clip((1.3 - np.hypot((columns - 22) / 14, (rows - 30) / 10)) * 4, 0, 1)
    grey = {
        "0 and 38": (38 * one).astype(np.uint8),
        "0 and 2": (2 * one).astype(np.uint8),
        "1 and 2": (1 + one).astype(np.uint8),
        "254 and 255": (254 + one).astype(np.uint8),
        "0 and 256 of 65535": (256 * one).astype(np.uint16),
        "soft and dark": (100 * soft).astype(np.uint8),
    }
    red = soft[..., None] * [255, 0, 0]
    colours = {"dark soft red": 0.4 * red, "soft red on white": red + (1 - soft[..., None]) * 255}
    return grey | {name: values.astype(np.uint8) for name, values in colours.items()}


@pytest.mark.parametrize("kind", half_masks())
@pytest.mark.parametrize("threshold", [False, True])
def test_masks_that_half_of_the_range_does_not_divide_are_refused(tmp_path: Path, kind: str, threshold: bool) -> None:
    """Neither an empty or full mask comes out, nor the advice to cut them."""
    path = save(tmp_path / "half.png", Image.fromarray(half_masks()[kind]))
    with pytest.raises(UserError, match=r"half\.png: mask has .*all on one side of \d+; expected one lesion") as caught:
        read_mask(path, threshold=threshold)
    assert "threshold_masks" not in str(caught.value)


@pytest.mark.parametrize("colour", [(255, 255, 255), (255, 0, 0), (0, 200, 0)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_soft_edges_of_any_colour_are_cut(tmp_path: Path, colour: tuple[int, int, int], suffix: str) -> None:
    one, _ = two_ellipses()
    large = Image.fromarray(np.where(one[..., None], colour, 0).astype(np.uint8)).resize((270, 180), 0)
    soft = large.resize((90, 60), Image.Resampling.LANCZOS).resize((180, 120), Image.Resampling.BILINEAR)
    path = save(tmp_path / f"soft.{suffix}", soft)
    with pytest.raises(UserError, match=r"where only its edges are soft, set data\.threshold_masks to true"):
        read_mask(path)
    truth = np.repeat(np.repeat(one, 2, 0), 2, 1)
    assert (read_mask(path, threshold=True) != truth).sum() < 0.1 * truth.sum()


def test_a_second_page_of_a_mask_is_said(tmp_path: Path) -> None:
    one, two = (Image.fromarray(mask.astype(np.uint8) * 255) for mask in two_ellipses())
    path = save(tmp_path / "pages.tif", one, save_all=True, append_images=[two])
    with pytest.raises(UserError, match=r"pages\.tif: mask has 2 pages; expected one"):
        read_mask(path)
    assert num_pages(path) == 2
    assert num_pages(save(tmp_path / "one.tif", one)) == 1
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as writer:  # a reduced copy is no second page
        writer.write(np.asarray(one))
        writer.write(np.asarray(one)[::2, ::2], subfiletype=1)
    assert np.array_equal(read_mask(tmp_path / "pyramid.tif"), two_ellipses()[0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_a_black_lesion_on_transparency_is_said(tmp_path: Path, mode: str) -> None:
    one, _ = two_ellipses()
    alpha = Image.fromarray(one.astype(np.uint8) * 255)
    options: dict[str, Any] = {}
    if mode in ("RGBA", "LA"):
        image = Image.new(mode[:-1], alpha.size, 0).convert(mode)
        image.putalpha(alpha)
    else:
        image = Image.fromarray(np.where(one, 0, 255).astype(np.uint8), mode)
        options["transparency"] = 255
        if mode == "P":
            image.putpalette([0, 0, 0] * 256)
    path = save(tmp_path / "black.png", image, **options)
    with pytest.raises(UserError, match=r"black\.png: mask is black wherever it is not transparent"):
        read_mask(path)
    white = Image.new("RGBA", alpha.size, (255, 255, 255, 0))
    white.putalpha(alpha)
    assert np.array_equal(read_mask(save(tmp_path / "white.png", white)), one)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_masks_of_any_mode_are_turned_once(tmp_path: Path, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.rot90(BLOB).astype(np.uint8) * 255).convert(mode)
    assert np.array_equal(read_mask(save(tmp_path / "t.png", stored, exif=exif)), BLOB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_reduced_copies_are_turned_and_name_the_whole_size(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.fromarray(RAMP).resize((240, 160), Image.Resampling.BILINEAR)
    path = save(tmp_path / "a", smooth, format=kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {}))
    whole = read_image(path)
    small, size = read_reduced(path, 60)
    assert size == (whole.shape[1], whole.shape[0]) == image_size(path)
    assert small.shape == (whole.shape[0] // 4, whole.shape[1] // 4, 3)
    means = whole.reshape(small.shape[0], 4, small.shape[1], 4, 3).mean((1, 3))
    assert np.abs(small - means).mean() < 4


PEAK = """
import re, sys
from pathlib import Path
from lesionsam.utils import images
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
path = Path(sys.argv[2])
images.image_size(path)
before = peak()
getattr(images, sys.argv[1])(path)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("read", "mode", "per_pixel"),
    [("read_image", "RGB", 9), ("read_image", "L", 6), ("read_mask", "L", 4), ("read_mask", "P", 7)],
)
def test_peak_memory_per_pixel(tmp_path: Path, read: str, mode: str, per_pixel: float) -> None:
    """Pillow holds an RGB pixel in 4 bytes and a grey one in 1; the array takes 3 or 1 more, a strip the rest."""
    side = 5000
    path = save(tmp_path / "large.png", Image.new(mode, (side, side), 255 if mode == "L" else 0), compress_level=1)
    done = subprocess.run([sys.executable, "-c", PEAK, read, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) / side**2 < per_pixel

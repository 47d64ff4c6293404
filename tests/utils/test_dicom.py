"""DICOM images through `read_image`: each kind is read right or ends in one clear line without patient data."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.pixels import convert_color_space
from pydicom.sequence import Sequence
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)

from helpers.dicom_files import encoded, header, secrets, write_dicom
from helpers.tiny import draw_lesion
from lesionsam.errors import UserError
from lesionsam.formats.dicom_seg import read_references
from lesionsam.utils.dicom import pixel_spacing, read_frame
from lesionsam.utils.images import check_image, image_size, num_pages, read_image, read_mask, read_reduced

HEIGHT, WIDTH = 30, 44
PICTURE = draw_lesion(np.random.default_rng(3), HEIGHT, WIDTH).image


def test_rgb_is_read_as_it_is_whatever_the_planes_and_the_syntax(tmp_path: Path) -> None:
    planes = np.ascontiguousarray(PICTURE.transpose(2, 0, 1)).reshape(HEIGHT, WIDTH, 3)  # R, G, B after one another
    for path in (
        write_dicom(tmp_path / "rgb.dcm", PICTURE),
        write_dicom(tmp_path / "planes.dcm", planes, PlanarConfiguration=1),
        write_dicom(tmp_path / "implicit.dicom", PICTURE, syntax=ImplicitVRLittleEndian),
        write_dicom(tmp_path / "no-ending", PICTURE),
        resaved(write_dicom(tmp_path / "deflated.dcm", PICTURE), DeflatedExplicitVRLittleEndian),
        resaved(write_dicom(tmp_path / "rle.dcm", PICTURE), RLELossless),
    ):
        np.testing.assert_array_equal(read_image(path), PICTURE)
        assert image_size(path) == check_image(path) == (WIDTH, HEIGHT)
        small, size = read_reduced(path, 22)
        assert (small.shape, size) == ((15, 22, 3), (WIDTH, HEIGHT))


def resaved(path: Path, syntax: str) -> Path:
    dataset = dcmread(path)
    if syntax == RLELossless:
        dataset.compress(syntax)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path)
    return path


def test_ybr_becomes_rgb(tmp_path: Path) -> None:
    ybr = convert_color_space(PICTURE, "RGB", "YBR_FULL")
    path = write_dicom(tmp_path / "ybr.dcm", ybr, PhotometricInterpretation="YBR_FULL")
    assert np.abs(read_image(path).astype(int) - PICTURE).max() <= 2  # rounded twice


def test_ybr_of_halved_chroma_becomes_rgb(tmp_path: Path) -> None:
    """422 holds Y, Y, Cb, Cr for two pixels of a row (DICOM PS3.3, C.7.6.3.1.2)."""
    ybr = convert_color_space(PICTURE, "RGB", "YBR_FULL").reshape(HEIGHT, WIDTH // 2, 2, 3)
    shared = ybr.copy()
    shared[:, :, 1, 1:] = ybr[:, :, 0, 1:]
    packed = np.concatenate([ybr[..., 0], ybr[:, :, 0, 1:]], axis=2)
    path = write_dicom(
        tmp_path / "422.dcm",
        packed.reshape(HEIGHT, WIDTH, 2),
        SamplesPerPixel=3,
        PlanarConfiguration=0,
        PhotometricInterpretation="YBR_FULL_422",
    )
    expected = convert_color_space(shared.reshape(HEIGHT, WIDTH, 3), "YBR_FULL", "RGB")
    np.testing.assert_array_equal(read_image(path), expected)


def test_jpegs_are_decoded_as_pillow_decodes_them(tmp_path: Path) -> None:
    path = write_dicom(
        tmp_path / "jpeg.dcm", PICTURE, syntax=JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL_422"
    )
    expected = np.asarray(Image.open(io.BytesIO(encoded(PICTURE, JPEGBaseline8Bit))).convert("RGB"))
    assert np.abs(read_image(path).astype(int) - expected).max() <= 2  # another rounding of the colours
    path = write_dicom(tmp_path / "2000.dcm", PICTURE, syntax=JPEG2000Lossless, PhotometricInterpretation="YBR_RCT")
    np.testing.assert_array_equal(read_image(path), PICTURE)


def test_palettes_and_grey_become_rgb(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    entries = rng.integers(0, 256, (3, 256), np.uint16)
    places = rng.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
    tables = {}
    for name, table in zip(("Red", "Green", "Blue"), entries, strict=True):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tables[f"{name}PaletteColorLookupTableData"] = (table * 257).astype("<u2").tobytes()
    path = write_dicom(tmp_path / "palette.dcm", places, PhotometricInterpretation="PALETTE COLOR", **tables)
    np.testing.assert_array_equal(read_image(path), entries[:, places].transpose(1, 2, 0))

    grey = np.repeat(places[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(read_image(write_dicom(tmp_path / "grey.dcm", places)), grey)
    inverse = write_dicom(tmp_path / "inverse.dcm", 255 - places, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_image(inverse), grey)
    deep = np.array([[0, 2048, 4095]], np.uint16)  # 12 of 16 bits: 2048 * 255 / 4095 = 127.5
    path = write_dicom(tmp_path / "deep.dcm", deep, BitsStored=12, HighBit=11)
    assert read_image(path)[0, :, 0].tolist() == [0, 128, 255]


def test_the_first_of_several_frames_is_read_and_their_number_is_known(tmp_path: Path) -> None:
    frames = np.stack([PICTURE, PICTURE[::-1], 255 - PICTURE])
    for name, options in (
        ("native", {}),
        ("jpeg", {"syntax": JPEGBaseline8Bit, "PhotometricInterpretation": "YBR_FULL_422"}),
    ):
        path = write_dicom(tmp_path / f"{name}.dcm", frames, **options)
        assert num_pages(path) == 3
        for index, frame in enumerate(frames):
            assert np.abs(read_frame(path, index).astype(int) - frame).mean() < 4
        np.testing.assert_array_equal(read_image(path), read_frame(path, 0))
        with pytest.raises(UserError, match=r"frame 3: expected 0 to 2"):
            read_frame(path, 3)
        with pytest.raises(UserError, match="mask has 3 pages; expected one"):
            read_mask(path)


def test_the_scale_is_that_of_the_file(tmp_path: Path) -> None:
    def scale(**attributes: Any) -> float | None:
        return pixel_spacing(write_dicom(tmp_path / "scale.dcm", PICTURE, **attributes))

    measures, group = header(PixelSpacing=[0.05, 0.05]), header()
    group.PixelMeasuresSequence = Sequence([measures])
    assert scale(PixelSpacing=[0.02, 0.02]) == pytest.approx(0.02)
    assert scale(PixelSpacing=[0.02, 0.08]) == pytest.approx(
        0.04
    )  # a pixel of .02 x .08 mm has the area of .04 squared
    assert scale(SharedFunctionalGroupsSequence=Sequence([group])) == pytest.approx(0.05)
    assert scale() is None
    assert scale(PixelSpacing=[0, 0.02]) is None
    Image.fromarray(PICTURE).save(tmp_path / "photo.png")
    assert pixel_spacing(tmp_path / "photo.png") is None


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


BAD = {
    "not DICOM": (lambda path: (path.write_bytes(b"none" * 40), path)[1], "not an image; expected .*DICOM, got"),
    "no pixels": (lambda path: without(path, "PixelData"), "DICOM file without pixel data"),
    "no image": (lambda path: without(path, "Rows", "PixelData"), "DICOM file without an image"),
    "segmentation": (
        lambda path: write_dicom(path, PICTURE[..., 0], SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"),
        "is a DICOM segmentation; expected the image",
    ),
    "video": (lambda path: relabelled(path, MPEG2MPML), "transfer syntax MPEG2 .* is not supported; convert it"),
    "lossless JPEG": (lambda path: relabelled(path, JPEGLosslessSV1), "compressed as JPEG Lossless.*not installed"),
    "cut pixels": (lambda path: cut(write_dicom(path, PICTURE), 0.7), "truncated or damaged"),
    "cut header": (lambda path: cut(write_dicom(path, PICTURE), 0.05), "truncated or damaged|without an image"),
    "cut JPEG": (
        lambda path: cut(
            write_dicom(path, PICTURE, syntax=JPEGBaseline8Bit, PhotometricInterpretation="YBR_FULL_422"), 0.8
        ),
        "truncated or damaged",
    ),
    "signed": (lambda path: write_dicom(path, PICTURE[..., 0], PixelRepresentation=1), "8 bits, signed; expected"),
    "colours unknown": (
        lambda path: write_dicom(path, PICTURE, PhotometricInterpretation="HSV"),
        "pixels of kind HSV.*; expected MONOCHROME1",
    ),
    "too large": (lambda path: write_dicom(path, PICTURE, Rows=60000, Columns=60000), "3600 megapixels; expected at"),
}


def without(path: Path, *names: str) -> Path:
    dataset = dcmread(write_dicom(path, PICTURE))
    for name in names:
        delattr(dataset, name)
    dataset.save_as(path)
    return path


def relabelled(path: Path, syntax: str) -> Path:
    dataset = dcmread(write_dicom(path, PICTURE, syntax=JPEGBaseline8Bit))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_without_patient_data(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, expected = BAD[name]
    path = make(tmp_path / "lesion.dcm")
    for read in (read_image, check_image, read_mask):
        with pytest.raises(UserError, match=expected) as caught:
            read(path)
        assert str(caught.value).startswith(str(path))
        assert not [secret for secret in secrets() if secret.decode() in str(caught.value)]
    assert capfd.readouterr() == ("", "")


def test_damaged_bytes_end_in_one_line_or_in_pixels(tmp_path: Path) -> None:
    """pydicom parses values late and warns of them; whatever byte is wrong, no other error comes through."""
    draw = random.Random(4)
    whole = [
        write_dicom(tmp_path / "rgb.dcm", PICTURE, PixelSpacing=[0.1, 0.1]).read_bytes(),
        write_dicom(tmp_path / "2000.dcm", PICTURE, syntax=JPEG2000Lossless).read_bytes(),
        write_dicom(tmp_path / "grey.dcm", PICTURE[..., 0], syntax=ImplicitVRLittleEndian).read_bytes(),
    ]
    num_read, lines = 0, []
    path = tmp_path / "damaged.dcm"
    for _ in range(200):
        data = bytearray(draw.choice(whole))
        for _ in range(draw.choice([1, 3, 20])):
            data[draw.randrange(132, 1200)] = draw.randrange(256)  # mostly the header
        path.write_bytes(data)
        for read in (read_image, num_pages, pixel_spacing, read_references):
            try:
                read(path)
                num_read += 1
            except UserError as error:
                lines.append(str(error))
    assert num_read
    assert lines
    assert not [line for line in lines if any(secret.decode() in line for secret in secrets())]


def test_without_pydicom_the_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dicom(tmp_path / "lesion.dcm", PICTURE)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"pydicom is not installed; install lesionsam\[dicom\]"):
        read_image(path)


def test_damaged_patient_data_cost_no_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """pydicom warns with the value of an attribute that breaks the rules; only those of the image are read."""
    path = write_dicom(tmp_path / "lesion.dcm", PICTURE)
    data = path.read_bytes()
    assert data.count(b"19510203") == 1
    path.write_bytes(data.replace(b"19510203", b"1951-2-3"))
    np.testing.assert_array_equal(read_image(path), PICTURE)
    assert capfd.readouterr() == ("", "")

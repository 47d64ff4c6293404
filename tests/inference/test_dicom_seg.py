"""DICOM images through the commands, and their masks back as DICOM segmentations, without patient data anywhere."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.uid import JPEGBaseline8Bit, generate_uid

from helpers.annotating import sent, serving
from helpers.cli import lesionsam
from helpers.dicom_files import DERMOSCOPY, INSTANCE, PATIENT, SERIES, STUDY, secrets, write_dicom
from helpers.tiny import draw_lesion, tiny_sam
from lesionsam.formats.dicom_seg import write_segmentation
from lesionsam.inference.files import predict_files
from lesionsam.models.checkpoint import save_sam

HEIGHT, WIDTH = 240, 320
NAMES = ("rgb", "jpeg", "frames")


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    """A folder with weights and three DICOM images: native, JPEG, and two frames."""
    save_sam(tiny_sam(), tmp_path / "weights.safetensors", name="compact")
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(5)
    first, second, third, fourth = (draw_lesion(rng, HEIGHT, WIDTH).image for _ in range(4))
    uids = [{"SOPInstanceUID": generate_uid(entropy_srcs=[name])} for name in NAMES]
    write_dicom(folder / "rgb.dcm", first, PixelSpacing=[0.02, 0.02])
    jpeg = {"syntax": JPEGBaseline8Bit, "PhotometricInterpretation": "YBR_FULL_422", "LossyImageCompression": "01"}
    write_dicom(folder / "jpeg.dcm", second, **jpeg, **uids[1])
    write_dicom(folder / "frames.dcm", np.stack([third, fourth]), **uids[2])
    return tmp_path


def annotate(clinic: Path) -> None:
    """Draw a lesion in each image, two in the first, through the page's server."""
    with serving(clinic) as served:
        for name in NAMES:
            address = f"/api/images/{served.key(name)}"
            assert served.client.get(address).json()["width"] == WIDTH
            assert served.client.get(f"{address}/picture").headers["content-type"] == "image/jpeg"
            more = [sent("1", [5, 5, 90, 90], [30, 30, 60, 60])] if name == "rgb" else []
            assert served.save(name, 0, f"change-{name}", [sent(), *more]).status_code == 200


def predict(clinic: Path, *images: str, **options: object) -> int:
    paths = [clinic / "images" / name for name in images] or [clinic / "images"]
    arguments: dict = {"boxes": clinic / "boxes.csv", "model": clinic / "weights.safetensors", "out": clinic / "out"}
    return predict_files(paths, **arguments | {"dicom_seg": True} | options)


def test_masks_come_back_as_segmentations_of_their_images(clinic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotate(clinic)
    assert predict(clinic) == 0
    assert "frames.dcm: 2 frames, of which the first is segmented" in capsys.readouterr().err
    with (clinic / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    seen = set()
    for row in rows:
        source = dcmread(clinic / "images" / f"{row['image_id']}.dcm")
        segmentation = dcmread(clinic / "out" / row["mask"].replace("masks/", "segmentations/").replace(".png", ".dcm"))
        with Image.open(clinic / "out" / row["mask"]) as mask:
            expected = np.asarray(mask) > 0
        np.testing.assert_array_equal(segmentation.pixel_array.squeeze() > 0, expected)
        assert expected.any()
        assert not expected.all()
        assert (segmentation.Modality, segmentation.SegmentationType) == ("SEG", "BINARY")
        assert segmentation.StudyInstanceUID == source.StudyInstanceUID == STUDY
        (series,) = segmentation.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == source.SeriesInstanceUID == SERIES
        (instance,) = series.ReferencedInstanceSequence
        assert instance.ReferencedSOPClassUID == DERMOSCOPY
        assert instance.ReferencedSOPInstanceUID == source.SOPInstanceUID
        (frame,) = segmentation.PerFrameFunctionalGroupsSequence
        (reference,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert reference.get("ReferencedFrameNumber", 1) == 1
        (segment,) = segmentation.SegmentSequence
        assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Lesion"
        assert {segmentation.get(name) or "" for name in ("PatientName", "PatientID", "PatientBirthDate")} == {""}
        if row["image_id"] == "rgb":
            measures = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
            assert measures.PixelSpacing == [0.02, 0.02]
        assert segmentation.LossyImageCompression == ("01" if row["image_id"] == "jpeg" else "00")
        seen |= {segmentation.SOPInstanceUID, segmentation.SeriesInstanceUID}
    assert len(seen) == 2 * len(rows)
    assert predict(clinic) == 0
    assert "4 kept from before" in capsys.readouterr().out


def test_nothing_written_or_printed_holds_patient_data(
    clinic: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through annotate, data check, predict with boxes and without a prompt, and a conversion of the boxes."""
    assert all(secret in (clinic / "images" / "rgb.dcm").read_bytes() for secret in secrets())
    annotate(clinic)
    assert predict(clinic) == 0
    assert predict(clinic, auto=True, boxes=None, out=clinic / "auto") == 0
    images, boxes = str(clinic / "images"), str(clinic / "boxes.csv")
    page, coco = str(clinic / "page.html"), str(clinic / "coco.json")
    assert lesionsam(monkeypatch, "data", "check", images, "--boxes", boxes, "--out", page) == 0
    assert lesionsam(monkeypatch, "data", "convert", boxes, coco, "--images", images, "--format", "coco") == 0
    printed = "".join(capfd.readouterr())
    written = [path for path in clinic.rglob("*") if path.is_file() and path.parent != clinic / "images"]
    assert {path.suffix for path in written} >= {".csv", ".png", ".dcm", ".json", ".geojson", ".html"}
    for secret in secrets():
        assert secret.decode() not in printed
        assert not [str(path) for path in written if secret in path.read_bytes() or secret.decode() in path.name]
    for path in written:
        if path.suffix == ".dcm":
            text = str(dcmread(path))
            assert not [value for value in PATIENT.values() if value in text]


def test_what_a_segmentation_cannot_refer_to_is_one_line(clinic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotate(clinic)
    pixels = draw_lesion(np.random.default_rng(0), HEIGHT, WIDTH).image
    write_dicom(clinic / "images" / "rgb.dcm", pixels, StudyInstanceUID=None)
    (clinic / "images" / "jpeg.dcm").unlink()
    Image.fromarray(pixels).save(clinic / "images" / "jpeg.png")
    assert predict(clinic) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 2
    assert any("jpeg.png: not a DICOM file, which a DICOM segmentation refers to" in line for line in lines)
    assert any("rgb.dcm: lacks StudyInstanceUID, which a DICOM segmentation refers to" in line for line in lines)
    assert [path.name for path in (clinic / "out" / "segmentations").iterdir()] == ["frames.dcm"]


@pytest.mark.parametrize("num_frames", [1, 2])
def test_an_empty_mask_is_written_too(tmp_path: Path, num_frames: int) -> None:
    pixels = np.zeros((num_frames, 20, 30, 3), np.uint8)
    source = write_dicom(tmp_path / "skin.dcm", pixels if num_frames > 1 else pixels[0])
    write_segmentation(tmp_path / "seg.dcm", np.zeros((20, 30), bool), source)
    segmentation = dcmread(tmp_path / "seg.dcm")
    assert segmentation.pixel_array.shape[-2:] == (20, 30)
    assert not segmentation.pixel_array.any()
    assert segmentation.SourceImageSequence[0].ReferencedSOPInstanceUID == INSTANCE

"""DICOM files as a dermatoscope or a camera writes them, with a patient who does not exist."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit

PHOTOGRAPH = "1.2.840.10008.5.1.4.1.1.77.1.4"  # VL Photographic Image Storage
DERMOSCOPY = "1.2.840.10008.5.1.4.1.1.77.1.7"  # Dermoscopic Photography Image Storage
STUDY, SERIES, INSTANCE = (f"1.2.826.0.1.3680043.8.498.77.{number}" for number in (1, 2, 3))
# What must stand in nothing that is written.
PATIENT = {
    "PatientName": "Quillfeather^Zebedee",
    "PatientID": "MRN-8675309-X",
    "PatientBirthDate": "19510203",
    "PatientComments": "allergic to plasters",
    "ReferringPhysicianName": "Nonesuch^Physician",
    "InstitutionName": "Nowhere Skin Clinic",
    "AccessionNumber": "ACC-4711",
    "StudyDescription": "mole check after holiday",
    "DeviceSerialNumber": "SN-99-ZZ",
}


def header(**attributes: Any) -> Dataset:
    """The attributes of a photograph without pixels; `attributes` replace them, None removes one."""
    dataset = Dataset()
    values = {
        "SOPClassUID": DERMOSCOPY,
        "SOPInstanceUID": INSTANCE,
        "StudyInstanceUID": STUDY,
        "SeriesInstanceUID": SERIES,
        "Modality": "DMS",
        "PatientSex": "O",
        "StudyDate": "20260102",
        "StudyTime": "101112",
        "StudyID": "1",
        "InstanceNumber": 1,
        **PATIENT,
        **attributes,
    }
    for name, value in values.items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.private_block(0x0099, "clinic", create=True).add_new(0x01, "LO", "Quillfeather in private")
    return dataset


def write_dicom(path: Path, pixels: np.ndarray, *, syntax: str = ExplicitVRLittleEndian, **attributes: Any) -> Path:
    """Write pixels, (H, W), (H, W, 3) or several frames of the latter, (N, H, W, 3), as DICOM.

    Compressed syntaxes encode each frame by Pillow. The attributes are those of `header`, and describe the pixels.
    """
    frames = pixels if pixels.ndim == 4 else pixels[None]
    samples = 1 if frames.ndim == 3 else frames.shape[3]
    bits = 8 * pixels.itemsize
    described = {
        "SamplesPerPixel": samples,
        "PhotometricInterpretation": "RGB" if samples == 3 else "MONOCHROME2",
        "Rows": frames.shape[1],
        "Columns": frames.shape[2],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": 0,
    } | ({"PlanarConfiguration": 0} if samples == 3 else {})
    described |= {"NumberOfFrames": len(frames)} if len(frames) > 1 else {}
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset(str(path), header(**described | attributes), file_meta=meta, preamble=b"\0" * 128)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    if syntax in (JPEGBaseline8Bit, JPEG2000Lossless):
        dataset.PixelData = encapsulate([encoded(frame, syntax) for frame in frames])
        dataset["PixelData"].VR = "OB"
    else:
        data = frames.tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
        dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    dataset.save_as(path, enforce_file_format=True)
    return path


def encoded(frame: np.ndarray, syntax: str) -> bytes:
    """A frame as a JPEG or JPEG 2000 code stream; JPEG is YBR with the chroma halved, as cameras have it."""
    buffer = io.BytesIO()
    if syntax == JPEGBaseline8Bit:
        Image.fromarray(frame).save(buffer, "JPEG", quality=95, subsampling="4:2:2")
    else:
        Image.fromarray(frame).save(buffer, "JPEG2000", no_jp2=True, mct=1)
    return buffer.getvalue()


def secrets() -> list[bytes]:
    """The values that nothing written may hold, as bytes."""
    return [value.encode() for text in PATIENT.values() for value in text.split("^")] + [b"in private"]

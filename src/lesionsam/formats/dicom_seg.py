"""Write a mask as a DICOM segmentation that refers to its image. Needs pydicom and highdicom, extra `dicom`."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from lesionsam import __version__
from lesionsam.errors import UserError
from lesionsam.utils.dicom import clear_errors, is_dicom
from lesionsam.utils.files import write_bytes_atomic

# Of the image: what the segmentation refers to, its size, scale and compression.
REFERENCES = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality")
TAGS = (
    *REFERENCES,
    "Rows",
    "Columns",
    "NumberOfFrames",
    "PixelSpacing",
    "FrameOfReferenceUID",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)
# A segmentation must have these, and may leave them empty (type 2 of DICOM PS3.3).
EMPTY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)


def read_references(source: Path) -> Any:
    """Return the attributes of `TAGS` of an image as a pydicom Dataset, those of `EMPTY` empty.

    Raises:
        UserError: no DICOM file, one that lacks a UID to refer to, or highdicom is missing.
    """
    if not is_dicom(source):
        raise UserError(f"{source}: not a DICOM file, which a DICOM segmentation refers to; leave --dicom-seg out")
    try:
        import highdicom  # noqa: F401
        from pydicom import Dataset, dcmread
    except ModuleNotFoundError as error:
        raise UserError(f"--dicom-seg: {error.name} is not installed; install lesionsam[dicom]") from None
    with clear_errors(source):
        known = dcmread(source, stop_before_pixels=True, specific_tags=list(TAGS))
        if missing := [name for name in REFERENCES if not known.get(name)]:
            raise UserError(f"{source}: lacks {', '.join(missing)}, which a DICOM segmentation refers to")
        image = Dataset()
        for name in TAGS:  # pydicom parses a value when it is asked for
            if (value := known.get(name)) is not None:
                setattr(image, name, value)
        image.file_meta = known.file_meta
        for name in EMPTY:
            setattr(image, name, "")
    return image


def write_segmentation(path: Path, mask: np.ndarray, source: Path) -> None:
    """Write a mask as a binary DICOM segmentation with one segment.

    It refers to its image by the UIDs of study, series and instance. The attributes of the patient stay empty.

    Args:
        mask: (H, W) bool. source: the DICOM image, of the mask's size; of several frames the first is segmented.
    Raises:
        UserError: as `read_references`.
    """
    image = read_references(source)
    import highdicom
    from pydicom.sr.codedict import codes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = np.zeros((int(image.get("NumberOfFrames") or 1), *mask.shape), bool)
        masks[0] = mask
        segment = highdicom.seg.SegmentDescription(
            segment_number=1,
            segment_label="Lesion",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=highdicom.AlgorithmIdentificationSequence(
                name="lesionsam", version=__version__, family=codes.cid7162.ArtificialIntelligence
            ),
        )
        made = highdicom.seg.Segmentation(
            [image],
            masks,
            highdicom.seg.SegmentationTypeValues.BINARY,
            [segment],
            series_instance_uid=highdicom.UID(),
            series_number=1,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="LesionSAM",
            manufacturer_model_name="lesionsam",
            software_versions=__version__,
            device_serial_number="none",
            series_description="Lesion segmentation",
            omit_empty_frames=bool(mask.any()),
        )
    buffer = io.BytesIO()
    made.save_as(buffer)
    write_bytes_atomic(path, buffer.getvalue())

"""Read and write annotations by the name of their format, and convert one to another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lesionsam.errors import UserError
from lesionsam.formats.coco import read_coco, write_coco
from lesionsam.formats.cvat import read_cvat, write_cvat
from lesionsam.formats.gather import find_pictures
from lesionsam.formats.label_studio import read_label_studio, write_label_studio
from lesionsam.formats.records import CORE, Annotations, Labels, Picture, need_names, with_small_boxes
from lesionsam.formats.safe import read_bytes
from lesionsam.formats.table import read_table, write_table
from lesionsam.formats.yolo import read_yolo, write_yolo

WRITERS = {
    "csv": write_table,
    "coco": write_coco,
    "yolo": write_yolo,
    "cvat": write_cvat,
    "label-studio": write_label_studio,
}
FORMATS = tuple(WRITERS)


def guess_format(path: Path, *, reading: bool) -> str:
    """Return the format of a path by its ending; of a JSON file that is read, by its first character.

    Raises:
        UserError: the ending says nothing.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or (not reading and not suffix):
        return "yolo"
    if suffix == ".json" and reading:
        return "label-studio" if read_bytes(path, "annotations").lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" else "coco"
    known = {".csv": "csv", ".xml": "cvat", ".json": "coco"}
    if suffix not in known:
        raise UserError(f"{path}: no format is known by this ending; name one of {', '.join(FORMATS)}")
    return known[suffix]


def read_annotations(
    path: Path,
    form: str,
    *,
    pictures: Mapping[str, Picture] | None = None,
    labels: Labels | None = None,
    categories: Sequence[str] = (),
    classes: Sequence[str] | None = None,
) -> Annotations:
    """Read annotations of any format.

    Args:
        form: one of `FORMATS`. pictures: the images at hand (`find_pictures`); YOLO needs them; sizes are compared.
        labels: words for the two boxes. categories: of COCO, those wanted. classes: of YOLO, names by number.
    Raises:
        UserError: names file and place.
    """
    if form == "csv":
        return read_table(path, pictures)
    if form == "yolo":
        if pictures is None:
            raise UserError(f"{path}: YOLO files hold no sizes of images; give the folder of images (--images)")
        return read_yolo(path, pictures, labels, classes)
    if form == "coco":
        return read_coco(path, labels, categories, pictures)
    if form == "cvat":
        return read_cvat(path, labels, pictures)
    if form == "label-studio":
        return read_label_studio(path, pictures, labels)
    raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")


def convert(
    source: Path,
    target: Path,
    *,
    from_form: str = "",
    to_form: str = "",
    images: Path | None = None,
    labels: Labels | None = None,
    categories: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    core: float = CORE,
    overwrite: bool = False,
) -> Annotations:
    """Read annotations, add missing cores, and write them; return what was written, with notes.

    Args:
        from_form, to_form: of `FORMATS`; "" = by the paths' endings. images: folder of the images, where needed.
        core: share of a made core, see `with_small_boxes`. overwrite: whether a file at `target` may go.
    Raises:
        UserError: nothing is written.
    """
    from_form = from_form or guess_format(source, reading=True)
    to_form = to_form or guess_format(target, reading=False)
    if to_form not in FORMATS:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {to_form!r}")
    if target.is_file() and not overwrite:
        raise UserError(f"{target}: is there already; choose another name, or allow it to be replaced (--overwrite)")
    pictures = find_pictures(images) if images is not None else None
    found = read_annotations(
        source, from_form, pictures=pictures, labels=labels, categories=categories, classes=classes
    )
    if not found.lesions:
        raise UserError(f"{source}: no boxes in it; expected one or two per lesion")
    found = with_small_boxes(found, core)
    if to_form != "csv":
        need_names(found, to_form)
    WRITERS[to_form](target, found)
    return Annotations(found.pictures, found.lesions, (*found.notes, *_lost(found, to_form)))


def _lost(annotations: Annotations, form: str) -> Iterator[str]:
    """Yield a note for each kind of data that a format cannot hold."""
    if form == "yolo":
        yield "yolo holds no lesion ids and splits: the lesions of an image are numbered as they stand"
    empty = len(annotations.pictures) - len({lesion.image_id for lesion in annotations.lesions})
    if form == "csv" and empty:
        yield f"csv has a row per lesion: {empty} images without any are not in it"

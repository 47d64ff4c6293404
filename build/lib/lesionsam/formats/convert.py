"""Reading and writing annotations by the name of their format, and from one to another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lesionsam.boxes.geometry import inside
from lesionsam.errors import UserError
from lesionsam.formats.coco import read_coco, write_coco
from lesionsam.formats.cvat import read_cvat, write_cvat
from lesionsam.formats.label_studio import read_label_studio, write_label_studio
from lesionsam.formats.records import CORE, Annotations, Labels, Picture, find_pictures, with_pictures, with_small_boxes
from lesionsam.formats.rle import encode
from lesionsam.formats.safe import read_bytes
from lesionsam.formats.table import read_table, write_table
from lesionsam.formats.yolo import read_yolo, write_yolo
from lesionsam.utils.images import IMAGE_SUFFIXES, read_mask

WRITERS = {
    "csv": write_table,
    "coco": write_coco,
    "yolo": write_yolo,
    "cvat": write_cvat,
    "label-studio": write_label_studio,
}
FORMATS = tuple(WRITERS)
SPLIT = "{split}"  # in a target: a file for each split, called as the COCO source and its like call them
SPLIT_FILES = {"train": "train", "dev": "val", "test": "test"}
HOLDS_MASKS = ("coco", "cvat")


def guess_format(path: Path, *, reading: bool) -> str:
    """The format of a path by its ending; of a JSON file that is read, by what it begins with.

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
    """Annotations of any format.

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
        found = read_coco(path, labels, categories)
    elif form == "cvat":
        found = read_cvat(path, labels)
    elif form == "label-studio":
        found = read_label_studio(path, pictures, labels)
    else:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    return with_pictures(found, pictures) if pictures is not None else found


def with_masks(annotations: Annotations, folder: Path) -> Annotations:
    """The same with the masks of a folder and those within it as run lengths, by the name of the image.

    A mask is called as its image, or with _segmentation added. Of several lesions in an image each gets the part of the
    mask inside its big box. A lesion whose part is empty, or whose image has no mask, stays as it is.

    Raises:
        UserError: no such folder, no mask for any image, two masks for one, or a mask of another size or kind.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the masks")
    wanted = {picture.image_id.lower(): picture for picture in annotations.pictures}
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        stem = path.stem.lower()
        name = stem if stem in wanted else stem.removesuffix("_segmentation")
        if path.suffix.lower() not in IMAGE_SUFFIXES or name not in wanted or not path.is_file():
            continue
        if found.setdefault(name, path) is not path:
            raise UserError(f"{path}: {found[name]} is a mask of the same image; keep one of them")
    if not found:
        raise UserError(f"{folder}: no mask of any of the {len(wanted)} images; expected masks called as their images")
    lesions = []
    for image_id, held in annotations.by_picture().items():
        picture, path = wanted[image_id.lower()], found.get(image_id.lower())
        mask = read_mask(path, (picture.width, picture.height)) if path is not None and held else None
        for lesion in held:
            part = mask
            if mask is not None and len(held) > 1:
                part = mask & inside(lesion.big_box, mask.shape)
            lesions.append(lesion if part is None or not part.any() else replace(lesion, segmentation=encode(part)))
    return replace(annotations, lesions=tuple(lesions))


def convert(
    source: Path,
    target: Path,
    *,
    from_form: str = "",
    to_form: str = "",
    images: Path | None = None,
    masks: Path | None = None,
    labels: Labels | None = None,
    categories: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    core: float = CORE,
    overwrite: bool = False,
) -> Annotations:
    """Read annotations, make the small boxes that are missing, and write them; what was written, with notes.

    Args:
        target: {split} in it stands for train, val and test, a file for each.
        from_form, to_form: of `FORMATS`; "" = by the paths' endings. images: folder of the images, where needed.
        masks: folder of masks to take along, see `with_masks`.
        core: share of a made small box, see `with_small_boxes`. overwrite: whether a file at `target` may go.
    Raises:
        UserError: nothing is written.
    """
    from_form = from_form or guess_format(source, reading=True)
    to_form = to_form or guess_format(target, reading=False)
    if to_form not in FORMATS:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {to_form!r}")
    for place in _places(target):
        if place.is_file() and not overwrite:
            raise UserError(f"{place}: is there already; choose another name, or allow it to be replaced (--overwrite)")
    pictures = find_pictures(images) if images is not None else None
    found = read_annotations(
        source, from_form, pictures=pictures, labels=labels, categories=categories, classes=classes
    )
    if not found.lesions:
        raise UserError(f"{source}: no boxes in it; expected one or two per lesion")
    found = with_small_boxes(found, core)
    if masks is not None:
        found = with_masks(found, masks)
    for place, part in _parts(target, found):
        WRITERS[to_form](place, part)
    return Annotations(found.pictures, found.lesions, (*found.notes, *_lost(found, to_form)))


def _places(target: Path) -> list[Path]:
    """The files that a target stands for: itself, or one per split."""
    if SPLIT not in str(target):
        return [target]
    return [Path(str(target).replace(SPLIT, name)) for name in SPLIT_FILES.values()]


def _parts(target: Path, annotations: Annotations) -> list[tuple[Path, Annotations]]:
    """What goes where.

    Raises:
        UserError: files per split are asked for, and a picture's split is unknown.
    """
    if SPLIT not in str(target):
        return [(target, annotations)]
    parts = []
    for place, split in zip(_places(target), SPLIT_FILES, strict=True):
        pictures = tuple(picture for picture in annotations.pictures if picture.split == split)
        ids = {picture.image_id for picture in pictures}
        lesions = tuple(lesion for lesion in annotations.lesions if lesion.image_id in ids)
        if pictures:
            parts.append((place, Annotations(pictures, lesions)))
    if unknown := next((picture for picture in annotations.pictures if picture.split not in SPLIT_FILES), None):
        raise UserError(
            f"{target}: the split of image {unknown.image_id!r} is unknown (train, dev or test, as "
            "data/boxes.csv has it); name one file without {split}"
        )
    return parts


def _lost(annotations: Annotations, form: str) -> Iterator[str]:
    """What a format has no place for."""
    if form not in HOLDS_MASKS and any(lesion.segmentation is not None for lesion in annotations.lesions):
        yield f"{form} holds no masks: only the boxes were written"
    if form == "yolo":
        yield "yolo holds no lesion ids and splits: the lesions of an image are numbered as they stand"
    empty = len(annotations.pictures) - len({lesion.image_id for lesion in annotations.lesions})
    if form == "csv" and empty:
        yield f"csv has a row per lesion: {empty} images without any are not in it"

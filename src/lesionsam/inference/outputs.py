"""The files of a prediction, each complete or absent: masks, pictures, polygons, the table, and COCO JSON of it all."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from lesionsam.errors import UserError
from lesionsam.formats.dicom_seg import write_segmentation
from lesionsam.formats.geojson import feature
from lesionsam.formats.rle import encode, mask_box
from lesionsam.inference.arguments import needs_small
from lesionsam.inference.jobs import Job, file_stem
from lesionsam.inference.prediction import Prediction
from lesionsam.overlays import overlay, write_png
from lesionsam.utils.files import atomic_write, remove_leftovers, write_text_atomic
from lesionsam.utils.progress import progress

TABLE = "predictions.csv"
BEGUN = ".begun"  # names of masks that the table does not list yet; removed once it does
ENDINGS = {"masks": ".png", "overlays": ".png", "polygons": ".geojson", "segmentations": ".dcm"}
SCORES = ("predicted_iou", "entropy", "stability")  # of `Prediction`
COLUMN_GUIDE = {
    "image_id": "name of the image file without its ending, or as in the CSV of prompts",
    "lesion_id": "as in the CSV of prompts; 0 with --auto; the number of the mask with --everything",
    "width": "of the image [px]",
    "height": "of the image [px]",
    "mask": "file of the mask, below this folder: 255 lesion, 0 not",
    "area": "of the mask [px]",
    "area_mm2": "of the mask [mm2]; empty without a scale (--mm-per-pixel)",
    "predicted_iou": "SAM's own estimate of the mask's IoU, 0 to 1",
    "entropy": "mean uncertainty of the pixels [nats], 0 to 0.693; empty for --everything",
    "stability": "IoU of the masks cut a little tighter and a little wider, 0 to 1",
    "review_reasons": "why a person should check the mask; empty: no reason found",
    "key": "digest of image, prompt, model and options: the row is kept while they stay the same",
}
COLUMNS = tuple(COLUMN_GUIDE)
EARLIER_COLUMNS = tuple(name for name in COLUMNS if name != "area_mm2")
COCO = "coco.json"
CATEGORY = {"id": 1, "name": "lesion", "supercategory": "lesion"}
Row = dict[str, str]


def make_folder(out: Path) -> None:
    """Make the folder of a prediction where it is missing; UserError where it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):  # without a name of its own: several shards do this at once
            pass
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written to ({error.strerror}); choose another --out or change its permissions"
        ) from None


class PredictionFolder:
    """The folder of a prediction's files.

    Args:
        out: the folder, see `make_folder`. overlays, shapes: whether pictures and polygons are wanted.
        segmentations: whether DICOM segmentations are, which only DICOM images have.
        table: of some images only, beside which other processes write theirs; None: that of the whole folder.
    Raises:
        UserError: it holds another table.
    """

    def __init__(
        self, out: Path, *, overlays: bool, shapes: bool, segmentations: bool = False, table: Path | None = None
    ) -> None:
        self.out, self.table = out, table or out / TABLE
        self.begun = table.with_suffix(BEGUN) if table else out / BEGUN
        self.wanted = {"masks": ".png"} | ({"overlays": ".png"} if overlays else {})
        self.wanted |= {"polygons": ".geojson"} if shapes else {}
        self.wanted |= {"segmentations": ".dcm"} if segmentations else {}
        self.shapes = shapes
        self.rows = read_table(self.table)
        self.is_saved = True  # whether the table on disk lists no file that was removed since
        if table is None:
            remove_leftovers(out, *ENDINGS)
        else:  # other processes' temporary files are not this table's to remove
            paths = {path for name in self._begun_names() for path in self._paths(name)}
            for folder in {path.parent for path in paths}:
                remove_leftovers(folder, of=paths)
        self._drop_begun()

    def make_room(self, jobs: Sequence[Job]) -> None:
        """Drop masks of earlier calls on these images that this call does not make, or makes under another name.

        Raises:
            UserError: an earlier call's mask of another image has a name that is needed now.
        """
        wanted = {job.image_id: {lesion.lesion_id: lesion.file_name for lesion in job.lesions} for job in jobs}
        names = {
            name: image_id
            for image_id, of_image in wanted.items()
            for name in of_image.values() or [file_stem(image_id) + "/"]
        }
        outdated = []
        for (image_id, lesion_id), row in self.rows.items():
            stem = _stem(row)
            if of_image := wanted.get(image_id):
                outdated += [(image_id, lesion_id)] if of_image.get(lesion_id) != stem else []
            elif image_id not in wanted and (other := names.get(stem[: stem.find("/") + 1] or stem)) is not None:
                raise UserError(
                    f"{self.out / row['mask']}: is the mask of {image_id}/{lesion_id}, of an earlier call, "
                    f"and one of {other} would have its name; choose another --out or rename one of them"
                )
        for key in outdated:
            self.forget(key)
        if outdated:
            print(
                f"note: removed {len(outdated)} masks of earlier calls on these images from {self.out}: not requested "
                "now, or under another name",
                file=sys.stderr,
            )

    def files(self, file_name: str) -> list[Path]:
        """Return the paths of the files that belong to a mask."""
        return [self.out / folder / (file_name + ending) for folder, ending in self.wanted.items()]

    def is_there(self, row: Row) -> bool:
        """Return whether all files of a row of the table exist."""
        return not row["mask"] or all(path.is_file() for path in self.files(_stem(row)))

    def forget(self, key: tuple[str, str]) -> None:
        """Drop a row and its files, so that no outdated mask stays beside a fault."""
        row = self.rows.pop(key, None)
        if row is not None:
            self._drop_coco()
            self.is_saved = False
        if row is not None and row["mask"]:
            self._unlink(_stem(row))

    def _unlink(self, file_name: str) -> None:
        for path in self._paths(file_name):
            path.unlink(missing_ok=True)

    def _paths(self, file_name: str) -> list[Path]:
        """Return the paths of all files that a mask can have, wanted now or not."""
        return [self.out / folder / (file_name + ending) for folder, ending in ENDINGS.items()]

    def _drop_begun(self) -> None:
        """Remove the files of masks that were begun and are not in the table: an interrupted call made them, with
        options that are not known."""
        known = {_stem(row) for row in self.rows.values()}
        for name in self._begun_names():
            if name not in known:
                self._unlink(name)
        self.begun.unlink(missing_ok=True)

    def _begun_names(self) -> list[str]:
        """Return the file names of masks that were begun since the table was written."""
        names = []
        if self.begun.exists():
            for line in self.begun.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # cut in the middle, before anything was written
                    names.append(json.loads(line))
        return names

    def write(
        self,
        prediction: Prediction,
        image: np.ndarray,
        file_name: str,
        *,
        key: str,
        image_path: Path,
        prompt: str = "box",
        pixel_size: tuple[float, float] | None = None,
    ) -> tuple[object, ...]:
        """Write mask, picture, polygons and DICOM segmentation.

        Args:
            file_name: of all of them, without ending. image_path: of the image's file, whose name later calls' COCO
                JSON has. pixel_size: height and width of a pixel [mm], if known.
        Returns:
            the row of the table, for `record`.
        """
        height, width = prediction.mask.shape
        area = prediction.area
        with self.begun.open("a", encoding="utf-8") as file:
            file.write(json.dumps(file_name) + "\n")
        for (kind, _), path in zip(self.wanted.items(), self.files(file_name), strict=True):
            if kind == "masks":
                write_png(path, prediction.mask.astype(np.uint8) * 255)
            elif kind == "overlays":
                write_png(path, _picture(prediction, image, file_name, prompt))
            elif kind == "segmentations":
                write_segmentation(path, prediction.mask, image_path)
            else:
                properties = {
                    "image_id": prediction.image_id,
                    "image": image_path.name,
                    "lesion_id": prediction.lesion_id,
                    "width": width,
                    "height": height,
                    "area": area,
                    "predicted_iou": round(prediction.predicted_iou, 4),
                    "review_reasons": "; ".join(prediction.review_reasons),
                    "segmentation": encode(prediction.mask),
                    "bbox": _xywh(prediction.mask) if area else [0, 0, 0, 0],
                }
                write_text_atomic(path, json.dumps(feature(prediction.mask, properties)) + "\n")
        numbers = (f"{value:.4f}".replace("nan", "") for value in (getattr(prediction, name) for name in SCORES))
        lesion = prediction.image_id, prediction.lesion_id, width, height
        mask = self.files(file_name)[0].relative_to(self.out).as_posix()
        area_mm2 = "" if pixel_size is None else f"{area * pixel_size[0] * pixel_size[1]:.4g}"
        return (*lesion, mask, area, area_mm2, *numbers, "; ".join(prediction.review_reasons), key)

    def record(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Put rows into the table, all of them at once; see `COLUMNS`."""
        self._drop_coco()
        named: list[Row] = [dict(zip(COLUMNS, map(str, values), strict=True)) for values in rows]
        self.rows.update({(row["image_id"], row["lesion_id"]): row for row in named})

    def save_table(self) -> None:
        """Write the table, if there is anything in it or was before."""
        if self.rows or self.table.exists():
            write_table(self.table, self.rows.values())
        self._drop_begun()
        self.is_saved = True

    def sort(self, jobs: Sequence[Job]) -> None:
        """Order the rows as these jobs, which are of all images of the table."""
        places = {job.image_id: place for place, job in enumerate(jobs)}
        lesions = {(job.image_id, one.lesion_id): k for job in jobs for k, one in enumerate(job.lesions)}
        order = sorted(self.rows, key=lambda key: (places[key[0]], lesions.get(key, 0)))
        self.rows = {key: self.rows[key] for key in order}

    def _drop_coco(self) -> None:
        """Remove what describes the whole table and is written again at the end: COCO JSON and contact sheet."""
        for name in (COCO, "index.html"):
            (self.out / name).unlink(missing_ok=True)

    def save_coco(self, file_names: Mapping[str, str]) -> None:
        """Collect the polygons' files into COCO JSON, one image at a time.

        Args:
            file_names: image_id -> name of the image file, of this call's; others' are in their polygons' files.
        """
        if self.shapes and self.rows:
            with atomic_write(self.out / COCO, "w") as file:
                write_coco(file, self.out, lambda: ((row, file_names.get(key[0])) for key, row in self.rows.items()))


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write a table of predictions."""
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([row[name] for name in COLUMNS] for row in rows)


def write_coco(file: IO[str], out: Path, rows: Callable[[], Iterable[tuple[Row, str | None]]]) -> None:
    """Collect the polygons' files of a folder into COCO JSON; of the images, only names and numbers are held in memory.

    Args:
        rows: called three times; each time returns the rows, each with the name of its image's file. None: the
            polygon's file has it.
    """
    info = {"description": "masks of `lesionsam predict` (RLE, exact); not a medical device"}
    file.write(f'{{"info": {json.dumps(info)}, "licenses": [], "categories": [{json.dumps(CATEGORY)}],\n')
    numbers: dict[str, int] = {}
    total = 0
    for row, _ in rows():
        numbers.setdefault(row["image_id"], len(numbers) + 1)
        total += _has_polygons(row)
    names: dict[str, str] = {}  # that no caller knows
    file.write('"annotations": [')
    number = 0
    drawn = ((row, name) for row, name in rows() if _has_polygons(row))
    for row, name in progress(drawn, total=total, title="collecting COCO JSON"):
        path = out / "polygons" / f"{_stem(row)}.geojson"
        if not path.is_file():  # an earlier call may have left polygons out
            continue
        number += 1
        properties = json.loads(path.read_text(encoding="utf-8"))["properties"]
        if name is None:
            names.setdefault(row["image_id"], properties.get("image", row["image_id"]))
        entry = {
            "id": number,
            "image_id": numbers[row["image_id"]],
            "category_id": 1,
            "iscrowd": 0,
            "bbox": properties["bbox"],
            "area": properties["area"],
            "segmentation": properties["segmentation"],
            "score": properties["predicted_iou"],
            "attributes": {"lesion_id": row["lesion_id"]},
        }
        file.write(("\n" if number == 1 else ",\n") + json.dumps(entry))
    file.write('],\n"images": [\n')
    number = 0
    for row, name in rows():
        image_id = row["image_id"]
        if numbers[image_id] <= number:  # the image's first row had its entry
            continue
        number += 1
        entry = {
            "id": number,
            "file_name": name or names.get(image_id, image_id),
            "width": int(row["width"]),
            "height": int(row["height"]),
        }
        file.write((",\n" if number > 1 else "") + json.dumps(entry))
    file.write("]}\n")


def _has_polygons(row: Row) -> bool:
    """Return whether a row has a mask that is not empty."""
    return bool(row["mask"]) and int(row["area"]) > 0


def _stem(row: Row) -> str:
    """Return `image/3` for `masks/image/3.png`."""
    return row["mask"].removeprefix("masks/").removesuffix(".png")


def _xywh(mask: np.ndarray) -> list[int]:
    x0, y0, x1, y1 = mask_box(mask).astype(int).tolist()
    return [x0, y0, x1 - x0, y1 - y0]


def _picture(prediction: Prediction, image: np.ndarray, file_name: str, kind: str) -> np.ndarray:
    prompt = prediction.prompt
    caption = (
        f"{file_name}: {100 * prediction.area / prediction.mask.size:.1f} % of the image, predicted IoU "
        f"{prediction.predicted_iou:.2f}"
        + (f"\nreview: {'; '.join(prediction.review_reasons)}" if prediction.review_reasons else "")
    )
    return overlay(
        image,
        prediction=prediction.mask,
        big=prompt.big_box,
        small=prompt.small_box if needs_small(kind) else None,
        points=prompt.points,
        labels=prompt.labels,
        caption=caption,
    )


def read_table(path: Path) -> dict[tuple[str, str], Row]:
    """Read an earlier call's predictions.csv by (image_id, lesion_id); no rows if there is no such file."""
    return {(row["image_id"], row["lesion_id"]): row for row in table_rows(path)}


def table_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table of predictions; none if there is no such file.

    Raises:
        UserError: it is another table.
    """
    if not path.exists():
        return
    fault = UserError(
        f"{path}: not a table of `lesionsam predict`, which has the columns {', '.join(COLUMNS)}; move "
        "it away or choose another --out"
    )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) not in (COLUMNS, EARLIER_COLUMNS):
                raise fault
            for row in reader:
                if None in row or None in row.values():
                    raise fault
                yield {"area_mm2": "", **row}
    except (UnicodeDecodeError, csv.Error):
        raise fault from None

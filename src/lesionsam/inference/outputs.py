"""The files of a prediction, each complete or absent: masks, pictures, polygons, the table, and COCO JSON of it all."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from lesionsam.errors import UserError
from lesionsam.formats.geojson import feature
from lesionsam.formats.rle import encode, mask_box
from lesionsam.inference.inputs import Job, file_stem, needs_small
from lesionsam.inference.prediction import Prediction
from lesionsam.overlays import overlay, write_png
from lesionsam.utils.files import atomic_write, remove_leftovers, write_text_atomic
from lesionsam.utils.progress import progress

TABLE = "predictions.csv"
BEGUN = ".begun"  # names of masks that the table does not list yet; removed once it does
ENDINGS = {"masks": ".png", "overlays": ".png", "polygons": ".geojson"}
SCORES = ("predicted_iou", "entropy", "stability")  # of `Prediction`
COLUMNS = ("image_id", "lesion_id", "width", "height", "mask", "area", *SCORES, "review_reasons", "key")
COCO = "coco.json"
CATEGORY = {"id": 1, "name": "lesion", "supercategory": "lesion"}
Row = dict[str, str]


def make_folder(out: Path) -> None:
    """Make the folder of a prediction where it is missing; UserError where it cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomic(out / ".writable", "")
        (out / ".writable").unlink()
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written to ({error.strerror}); choose another --out or change its permissions"
        ) from None


class PredictionFolder:
    """The folder of a prediction's files.

    Args:
        out: the folder, see `make_folder`. overlays, shapes: whether pictures and polygons are wanted.
    Raises:
        UserError: it holds another table.
    """

    def __init__(self, out: Path, *, overlays: bool, shapes: bool) -> None:
        self.out = out
        self.wanted = {"masks": ".png"} | ({"overlays": ".png"} if overlays else {})
        self.wanted |= {"polygons": ".geojson"} if shapes else {}
        self.shapes = shapes
        self.rows = read_table(out / TABLE)
        self.is_saved = True  # whether the table on disk lists no file that was removed since
        remove_leftovers(out, *ENDINGS)
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
        for folder, ending in ENDINGS.items():
            (self.out / folder / (file_name + ending)).unlink(missing_ok=True)

    def _drop_begun(self) -> None:
        """Remove the files of masks that were begun and are not in the table: an interrupted call made them, with
        options that are not known."""
        if (self.out / BEGUN).exists():
            known = {_stem(row) for row in self.rows.values()}
            for line in (self.out / BEGUN).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # cut in the middle, before anything was written
                    if (file_name := json.loads(line)) not in known:
                        self._unlink(file_name)
            (self.out / BEGUN).unlink()

    def write(
        self,
        prediction: Prediction,
        image: np.ndarray,
        file_name: str,
        *,
        key: str,
        image_name: str,
        prompt: str = "box",
    ) -> tuple[object, ...]:
        """Write mask, picture and polygons.

        Args:
            file_name: of all three, without ending. image_name: of the image's file, for later calls' COCO JSON.
        Returns:
            the row of the table, for `record`.
        """
        height, width = prediction.mask.shape
        area = prediction.area
        with (self.out / BEGUN).open("a", encoding="utf-8") as file:
            file.write(json.dumps(file_name) + "\n")
        for (kind, _), path in zip(self.wanted.items(), self.files(file_name), strict=True):
            if kind == "masks":
                write_png(path, prediction.mask.astype(np.uint8) * 255)
            elif kind == "overlays":
                write_png(path, _picture(prediction, image, file_name, prompt))
            else:
                properties = {
                    "image_id": prediction.image_id,
                    "image": image_name,
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
        return (*lesion, mask, area, *numbers, "; ".join(prediction.review_reasons), key)

    def record(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Put rows into the table, all of them at once; see `COLUMNS`."""
        self._drop_coco()
        named: list[Row] = [dict(zip(COLUMNS, map(str, values), strict=True)) for values in rows]
        self.rows.update({(row["image_id"], row["lesion_id"]): row for row in named})

    def save_table(self) -> None:
        """Write the table, if there is anything in it or was before."""
        path = self.out / TABLE
        if self.rows or path.exists():
            with atomic_write(path, "w") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows([row[name] for name in COLUMNS] for row in self.rows.values())
        self._drop_begun()
        self.is_saved = True

    def _drop_coco(self) -> None:
        """Remove the COCO JSON, which describes the whole table; `save_coco` writes it again."""
        (self.out / COCO).unlink(missing_ok=True)

    def save_coco(self, file_names: Mapping[str, str]) -> None:
        """Collect the polygons' files into COCO JSON, one image at a time.

        Args:
            file_names: image_id -> name of the image file, of this call's; others' are in their polygons' files.
        """
        if self.shapes and self.rows:
            with atomic_write(self.out / COCO, "w") as file:
                self._collect(file, file_names)

    def _collect(self, file: IO[str], file_names: Mapping[str, str]) -> None:
        numbers: dict[str, int] = {}
        info = {"description": "masks of `lesionsam predict` (RLE, exact); not a medical device"}
        file.write(f'{{"info": {json.dumps(info)}, "licenses": [], "categories": [{json.dumps(CATEGORY)}],\n')
        for row in self.rows.values():
            numbers.setdefault(row["image_id"], len(numbers) + 1)
        known = dict(file_names)
        file.write('"annotations": [')
        for number, (row, drawn) in enumerate(self._features(), 1):
            properties = drawn["properties"]
            known.setdefault(row["image_id"], properties.get("image", row["image_id"]))
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
        sizes = {row["image_id"]: (int(row["width"]), int(row["height"])) for row in self.rows.values()}
        images = [
            {"id": numbers[image_id], "file_name": known.get(image_id, image_id), "width": width, "height": height}
            for image_id, (width, height) in sizes.items()
        ]
        file.write('],\n"images": [\n' + ",\n".join(map(json.dumps, images)) + "]}\n")

    def _features(self) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Yield rows with a mask that is not empty, and the contents of their polygon files."""
        rows = [row for row in self.rows.values() if row["mask"] and int(row["area"])]
        for row in progress(rows, total=len(rows), title="collecting COCO JSON"):
            path = self.out / "polygons" / f"{_stem(row)}.geojson"
            if path.is_file():  # an earlier call may have left polygons out
                yield row, json.loads(path.read_text(encoding="utf-8"))


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
    if not path.exists():
        return {}
    fault = UserError(
        f"{path}: not a table of `lesionsam predict`, which has the columns {', '.join(COLUMNS)}; move "
        "it away or choose another --out"
    )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader) if tuple(reader.fieldnames or ()) == COLUMNS else None
    except (UnicodeDecodeError, csv.Error):
        raise fault from None
    if rows is None or any(None in row or None in row.values() for row in rows):
        raise fault
    return {(row["image_id"], row["lesion_id"]): dict(row) for row in rows}

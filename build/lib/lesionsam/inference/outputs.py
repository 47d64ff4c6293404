"""The files of a prediction: each whole or not there. Masks, pictures, polygons, the table, and COCO JSON of it all."""

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
from lesionsam.formats.geojson import coco_polygons, feature
from lesionsam.formats.rle import encode, mask_box
from lesionsam.inference.decode import Prediction
from lesionsam.inference.inputs import Job, file_stem, needs_small
from lesionsam.overlays import overlay, write_png
from lesionsam.utils.files import atomic_write, remove_leftovers, write_text_atomic
from lesionsam.utils.progress import progress

TABLE = "predictions.csv"
BEGUN = ".begun"  # names of masks that the table does not have yet; gone once it has them
ENDINGS = {"masks": ".png", "overlays": ".png", "polygons": ".geojson"}
COLUMNS = (
    "image_id",
    "lesion_id",
    "width",
    "height",
    "mask",
    "area",
    "predicted_iou",
    "entropy",
    "stability",
    "look",
    "key",
)
COCO = {"coco.json": "RLE, exact", "coco_polygons.json": "outer rings, without holes"}
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


class Folder:
    """Where a prediction's files go.

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
        self.is_saved = True  # the table on disk tells of no file that has gone since
        remove_leftovers(out, *ENDINGS)
        self._drop_begun()

    def make_room(self, jobs: Sequence[Job]) -> None:
        """Forget what earlier calls have of these images that this one does not ask for, or asks for by another name.

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
                f"note: {len(outdated)} masks of earlier calls on these images, not asked for now or named anew, "
                f"are gone from {self.out}",
                file=sys.stderr,
            )

    def files(self, file_name: str) -> list[Path]:
        """All that is wanted of a mask."""
        return [self.out / folder / (file_name + ending) for folder, ending in self.wanted.items()]

    def is_there(self, row: Row) -> bool:
        """Whether all the files of a row of the table are."""
        return not row["mask"] or all(path.is_file() for path in self.files(_stem(row)))

    def forget(self, key: tuple[str, str]) -> None:
        """Drop a row and its files, so that nothing outdated stands beside a fault."""
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
        """Remove the files of masks that were begun and are not in the table: a call that was cut short made them, and
        none can tell by which options."""
        if (self.out / BEGUN).exists():
            known = {_stem(row) for row in self.rows.values()}
            for line in (self.out / BEGUN).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # cut in the middle, before anything was written
                    if (file_name := json.loads(line)) not in known:
                        self._unlink(file_name)
            (self.out / BEGUN).unlink()

    def write(
        self, found: Prediction, image: np.ndarray, file_name: str, *, key: str, image_name: str, prompt: str = "box"
    ) -> tuple[object, ...]:
        """Mask, picture and polygons.

        Args:
            file_name: of all three, without ending. image_name: of the image's file, for later calls' COCO JSON.
        Returns:
            the row that says they are there, for `record`.
        """
        height, width = found.mask.shape
        area = found.area
        with (self.out / BEGUN).open("a", encoding="utf-8") as file:
            file.write(json.dumps(file_name) + "\n")
        for (kind, _), path in zip(self.wanted.items(), self.files(file_name), strict=True):
            if kind == "masks":
                write_png(path, found.mask.astype(np.uint8) * 255)
            elif kind == "overlays":
                write_png(path, _picture(found, image, file_name, prompt))
            else:
                properties = {
                    "image_id": found.image_id,
                    "image": image_name,
                    "lesion_id": found.lesion_id,
                    "width": width,
                    "height": height,
                    "area": area,
                    "predicted_iou": round(found.predicted_iou, 4),
                    "look": "; ".join(found.look),
                    "segmentation": encode(found.mask),
                    "bbox": _xywh(found.mask) if area else [0, 0, 0, 0],
                }
                write_text_atomic(path, json.dumps(feature(found.mask, properties)) + "\n")
        numbers = (
            "" if np.isnan(value) else f"{value:.4f}" for value in (found.predicted_iou, found.entropy, found.stability)
        )
        mask = self.files(file_name)[0].relative_to(self.out).as_posix()
        return (found.image_id, found.lesion_id, width, height, mask, area, *numbers, "; ".join(found.look), key)

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
        """COCO JSON is of the whole table: it goes with the first change, and `save_coco` makes it anew."""
        for name in COCO:
            (self.out / name).unlink(missing_ok=True)

    def save_coco(self, file_names: Mapping[str, str]) -> None:
        """Collect the polygons' files into COCO JSON, one image at a time.

        Args:
            file_names: image_id -> name of the image file, of this call's; others' are in their polygons' files.
        """
        if not self.shapes or not self.rows:
            return
        for name, about in COCO.items():
            with atomic_write(self.out / name, "w") as file:
                self._collect(file, about, file_names, polygons=name == "coco_polygons.json")

    def _collect(self, file: IO[str], about: str, file_names: Mapping[str, str], *, polygons: bool) -> None:
        numbers: dict[str, int] = {}
        info = {"description": f"masks of `lesionsam predict` ({about}); not a medical device"}
        file.write(f'{{"info": {json.dumps(info)}, "licenses": [], "categories": [{json.dumps(CATEGORY)}],\n')
        for row in self.rows.values():
            numbers.setdefault(row["image_id"], len(numbers) + 1)
        known = dict(file_names)
        file.write('"annotations": [')
        for number, (row, drawn) in enumerate(self._features(), 1):
            properties = drawn["properties"]
            known.setdefault(row["image_id"], properties.get("image", row["image_id"]))
            shape = coco_polygons(drawn["geometry"]["coordinates"]) if polygons else properties["segmentation"]
            entry = {
                "id": number,
                "image_id": numbers[row["image_id"]],
                "category_id": 1,
                "iscrowd": 0,
                "bbox": properties["bbox"],
                "area": properties["area"],
                "segmentation": shape,
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
        """Rows with a mask that is not empty, and their polygons' files."""
        rows = [row for row in self.rows.values() if row["mask"] and int(row["area"])]
        for row in progress(rows, total=len(rows), title="collecting COCO JSON"):
            path = self.out / "polygons" / f"{_stem(row)}.geojson"
            if path.is_file():  # an earlier call may have left polygons out
                yield row, json.loads(path.read_text(encoding="utf-8"))


def _stem(row: Row) -> str:
    """`image/3` of `masks/image/3.png`."""
    return row["mask"].removeprefix("masks/").removesuffix(".png")


def _xywh(mask: np.ndarray) -> list[int]:
    x0, y0, x1, y1 = mask_box(mask).astype(int).tolist()
    return [x0, y0, x1 - x0, y1 - y0]


def _picture(found: Prediction, image: np.ndarray, file_name: str, prompt: str) -> np.ndarray:
    asked = found.asked
    caption = (
        f"{file_name}: {100 * found.area / found.mask.size:.1f} % of the image, predicted IoU "
        f"{found.predicted_iou:.2f}" + (f"\nlook: {'; '.join(found.look)}" if found.look else "")
    )
    return overlay(
        image,
        prediction=found.mask,
        big=asked.big,
        small=asked.small if needs_small(prompt) else None,
        points=asked.points,
        labels=asked.labels,
        caption=caption,
    )


def read_table(path: Path) -> dict[tuple[str, str], Row]:
    """Rows of an earlier call's predictions.csv by (image_id, lesion_id); none where there is no such file."""
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

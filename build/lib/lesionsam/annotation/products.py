"""Masks of the lesions that people have drawn or agreed with: PNG files and one COCO file, with where each comes from.

They follow the table: made in quiet moments from the image as it is, made again when the boxes change, removed with
their lesion, and made up for at the next start. The COCO file is what `lesionsam data convert` reads: categories big,
small and lesion; the attributes of a lesion say who, when, from what, by which model.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lesionsam.annotation.catalogue import Catalogue, Entry
from lesionsam.annotation.model import Model
from lesionsam.annotation.records import ImageState, Lesion
from lesionsam.annotation.store import Store
from lesionsam.errors import UserError
from lesionsam.formats.rle import encode
from lesionsam.metrics import bounding_box
from lesionsam.utils.files import atomic_write, write_text_atomic
from lesionsam.utils.images import read_image
from lesionsam.utils.progress import progress

QUIET = 1.0  # seconds without a person's action before a mask is made
PAUSE = 2.0  # seconds between two writings of the COCO file
CATEGORIES = ("big", "small", "lesion")
COCO = "coco.json"


def masks_folder(table_path: Path) -> Path:
    """boxes.csv -> boxes.masks/."""
    return table_path.with_name(f"{table_path.stem}.masks")


def mask_name(image_id: str, lesion_id: str, *, is_only: bool) -> str:
    """File name of a mask, safe on every system and different for different lesions."""
    label = image_id if is_only else f"{image_id}_{lesion_id}"
    clean = re.sub(r"[^\w.-]+", "_", label)
    return clean + ("" if clean == label else f"-{hashlib.blake2b(label.encode(), digest_size=4).hexdigest()}") + ".png"


class Products:
    """Writes masks of a store's lesions with a model: in a thread of its own (`start`), or at once (`write_all`).

    Args:
        folder: for the PNG files and the COCO file.
    """

    def __init__(self, folder: Path, catalogue: Catalogue, store: Store, model: Model) -> None:
        self.folder, self.catalogue, self.store, self.model = folder, catalogue, store, model
        self.problem = ""
        self._made: dict[str, dict[str, Any]] = _read(folder / COCO)
        self._waiting: deque[str] = deque()
        self._lock = threading.Lock()
        self._busy_until = 0.0
        self._closing, self._end = threading.Event(), threading.Event()
        for image_id in {*self._made, *(state.image_id for state in store.all_states())}:
            self.note(image_id)
        self._thread = threading.Thread(target=self._work, daemon=True, name="writing masks")

    def start(self) -> None:
        """Begin to write, in quiet moments, until `finish`."""
        self._thread.start()

    def write_all(self) -> None:
        """Write everything that is to be written, now; `start` was not called.

        Raises:
            OSError: it cannot be written.
        """
        for image_id in progress(self._waiting, total=len(self._waiting), title="writing masks"):
            self.bring_up_to_date(image_id)
        self.write_coco()

    def note(self, image_id: str) -> None:
        """An image has changed."""
        with self._lock:
            if image_id not in self._waiting:
                self._waiting.append(image_id)

    def busy(self) -> None:
        """Somebody is drawing: wait a little."""
        self._busy_until = time.monotonic() + QUIET

    def finish(self, seconds: float) -> None:
        """Write what is still to be written, for at most so long, and end."""
        self._busy_until = 0.0
        self._closing.set()
        self._thread.join(seconds)
        self._end.set()
        self._thread.join(seconds)

    def _work(self) -> None:
        written, dirty = time.monotonic(), False
        while not self._end.is_set():
            if time.monotonic() < self._busy_until:
                self._end.wait(QUIET / 4)
                continue
            with self._lock:
                image_id = self._waiting.popleft() if self._waiting else None
            if image_id is None and not dirty:
                if self._closing.is_set():
                    return
                self._end.wait(0.05)
                continue
            try:
                if image_id is not None:
                    dirty |= self.bring_up_to_date(image_id)
                if dirty and (image_id is None or time.monotonic() - written > PAUSE):
                    self.write_coco()
                    written, dirty = time.monotonic(), False
                self.problem = ""
            except OSError as error:
                self.problem = f"{self.folder.name}: masks cannot be written: {error.strerror or error}"
                if self._closing.is_set():
                    return
                if image_id is not None:
                    self.note(image_id)
                self._end.wait(PAUSE)

    def bring_up_to_date(self, image_id: str) -> bool:
        """Make the masks of an image that are missing or outdated, remove those of lesions that are gone; an image that
        cannot be read now keeps what it has.

        Returns:
            whether anything changed.
        """
        entry, state = self.catalogue.by_id.get(image_id), self.store.state(image_id)
        before = self._made.get(image_id, {"lesions": {}})
        if entry is None:
            return False
        wanted = {lesion.lesion_id: self._key(entry, lesion) for lesion in state.lesions}
        names = {lesion_id: mask_name(image_id, lesion_id, is_only=len(wanted) == 1) for lesion_id in wanted}
        held: dict[str, dict[str, Any]] = before["lesions"]
        if {name: (made["key"], made["file_name"]) for name, made in held.items()} == {
            name: (key, names[name]) for name, key in wanted.items()
        } and all((self.folder / name).is_file() for name in names.values()):
            return False
        try:
            made = self._make(entry, state, wanted, names) if wanted else None
        except UserError:
            return False  # said when the image is opened
        for name in {each["file_name"] for each in held.values()} - set(names.values()):
            (self.folder / name).unlink(missing_ok=True)
        if made is None:
            return self._made.pop(image_id, None) is not None
        self._made[image_id] = made
        return True

    def _key(self, entry: Entry, lesion: Lesion) -> str:
        """Hash of what a mask and its provenance depend on."""
        parts = (lesion.boxes, lesion.source, self.model.digest, self.model.threshold, self._stamp(entry))
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def _stamp(self, entry: Entry) -> tuple[int, int] | None:
        try:
            return self.model.pictures.stamp(entry)
        except UserError:
            return None

    def _make(self, entry: Entry, state: ImageState, keys: dict[str, str], names: dict[str, str]) -> dict[str, Any]:
        image = read_image(entry.path)
        lesions = {}
        for lesion in state.lesions:
            mask = self.model.full_mask(image, f"{entry.image_id}/{lesion.lesion_id}", lesion.big, lesion.small)
            with atomic_write(self.folder / names[lesion.lesion_id]) as file:
                Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
            lesions[lesion.lesion_id] = {
                "key": keys[lesion.lesion_id],
                "file_name": names[lesion.lesion_id],
                "area": int(mask.sum()),
                "segmentation": encode(mask),
                "bbox": _bounds(mask),
                "big": lesion.big,
                "small": lesion.small,
                "attributes": {
                    "lesion_id": lesion.lesion_id,
                    "source": lesion.source,
                    "mask_by": self.model.digest,
                    "threshold": self.model.threshold,
                    "proposed_by": lesion.model,
                    "changed_by": lesion.changed_by,
                    "changed_at": lesion.changed_at,
                    "seconds": lesion.seconds,
                },
            }
        return {"file_name": entry.path.name, "width": image.shape[1], "height": image.shape[0], "lesions": lesions}

    def write_coco(self) -> None:
        """Write the COCO file."""
        images, annotations = [], []
        for number, made in enumerate(self._made.values(), 1):
            images.append({"id": number, **{name: made[name] for name in ("file_name", "width", "height")}})
            for lesion in made["lesions"].values():
                for category, box in ((1, lesion["big"]), (2, lesion["small"])):
                    x0, y0, x1, y1 = box
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": number,
                            "category_id": category,
                            "bbox": [x0, y0, x1 - x0, y1 - y0],
                            "area": (x1 - x0) * (y1 - y0),
                            "iscrowd": 0,
                            "segmentation": [],
                            "attributes": {"lesion_id": lesion["attributes"]["lesion_id"]},
                        }
                    )
                if lesion["area"]:  # a mask without a pixel is no object
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": number,
                            "category_id": 3,
                            "bbox": lesion["bbox"],
                            "area": lesion["area"],
                            "iscrowd": 0,
                            "segmentation": lesion["segmentation"],
                            "attributes": lesion["attributes"]
                            | {"file_name": lesion["file_name"], "key": lesion["key"]},
                        }
                    )
        document = {
            "info": {
                "description": "masks of two boxes per lesion; attributes say where each comes from",
                "model": self.model.name,
                "sha256": self.model.digest,
            },
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k, "name": name, "supercategory": "lesion"} for k, name in enumerate(CATEGORIES, 1)],
        }
        write_text_atomic(self.folder / COCO, json.dumps(document, ensure_ascii=False) + "\n")


def _bounds(mask: np.ndarray) -> list[float]:
    """x, y, width, height; zeros where the mask is empty."""
    box = bounding_box(mask)
    return [0.0] * 4 if box is None else [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier visit made, by image id; nothing where the file is missing or another program's."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        images = {image["id"]: {**image, "lesions": {}} for image in document["images"]}
        boxes: dict[tuple[int, str], dict[str, Any]] = {}
        for each in document["annotations"]:
            place = each["image_id"], each["attributes"]["lesion_id"]
            if each["category_id"] in (1, 2):
                x, y, w, h = each["bbox"]
                name = CATEGORIES[each["category_id"] - 1]
                boxes.setdefault(place, {})[name] = [x, y, x + w, y + h]
                continue
            attributes = {name: value for name, value in each["attributes"].items() if name not in ("file_name", "key")}
            images[place[0]]["lesions"][place[1]] = {
                **{name: each[name] for name in ("area", "segmentation", "bbox")},
                **boxes[place],
                "file_name": each["attributes"]["file_name"],
                "key": each["attributes"]["key"],
                "attributes": attributes,
            }
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return {Path(image["file_name"]).stem: image for image in images.values()}

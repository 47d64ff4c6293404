"""The files of a tracked clip: masks while it runs; the table, the overlay clip and COCO JSON from them at its end."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from lesionsam.errors import UserError
from lesionsam.formats.rle import encode, mask_box
from lesionsam.inference.jobs import file_stem
from lesionsam.overlays import overlay, write_png
from lesionsam.utils.files import atomic_write
from lesionsam.utils.images import read_mask
from lesionsam.utils.progress import progress
from lesionsam.video.clips import Clip
from lesionsam.video.tracker import Tracked

MASKS, TABLE, OVERLAY, COCO = "masks", "tracks.csv", "overlay.mp4", "coco.json"
ROWS = ".track.jsonl"
COLUMNS = ("frame", "time", "lesion_id", "area", "lost", "score", "mask")
OVERLAY_SIDE = 960  # longer side of the overlay clip, pixels
TICKS = 90_000  # of the overlay clip's clock, per second
CATEGORY = {"id": 1, "name": "lesion", "supercategory": "lesion"}


def mask_name(number: int, lesion_id: str, alone: bool) -> str:
    """Return the name of a mask below the folder: masks/000012.png, masks/LESION/000012.png of several lesions."""
    return f"{MASKS}/{number:06d}.png" if alone else f"{MASKS}/{file_stem(lesion_id)}/{number:06d}.png"


class Rows:
    """The rows of the table while it is made: one JSON line each, appended, cut to a known length when resumed.

    Args:
        num_bytes: of the file that are sound; the rest was written after the last saved state.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._file = path.open("ab")
        self._file.truncate(num_bytes)
        self._file.seek(num_bytes)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self._file.write(json.dumps(row).encode() + b"\n")

    def sync(self) -> int:
        """Bring all rows to the disk; return the length of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a folder in the order of frames."""
    with (out / ROWS).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def write_frame(out: Path, rows: Rows, number: int, time: float, found: Mapping[str, Tracked], alone: bool) -> None:
    """Write the masks of a frame and append its rows."""
    for lesion_id, tracked in found.items():
        name = mask_name(number, lesion_id, alone)
        write_png(out / name, tracked.mask.astype(np.uint8) * 255)
        area, score = int(np.count_nonzero(tracked.mask)), round(tracked.score, 4)
        values = (number, round(time, 6), lesion_id, area, int(tracked.lost), score, name)
        rows.add(dict(zip(COLUMNS, values, strict=True)))


def write_table(out: Path) -> None:
    """Write tracks.csv."""
    with atomic_write(out / TABLE, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([row[name] for name in COLUMNS] for row in read_rows(out))


def write_coco(out: Path, clip: Clip) -> None:
    """Write COCO JSON whose images are frames (`frame_id`, `video_id`) and whose annotations name their `track_id`."""
    width, height = clip.size
    tracks: dict[str, int] = {}
    frames = 0
    with atomic_write(out / COCO, "w") as file:
        info = {"description": "masks of `lesionsam track` (RLE, exact); not a medical device"}
        file.write(f'{{"info": {json.dumps(info)}, "licenses": [], "categories": [{json.dumps(CATEGORY)}],\n')
        file.write('"annotations": [')
        number = 0
        for row in read_rows(out):
            track = tracks.setdefault(row["lesion_id"], len(tracks) + 1)
            if not row["area"]:
                continue
            mask, number = read_mask(out / row["mask"]), number + 1
            x0, y0, x1, y1 = mask_box(mask).astype(int).tolist()
            entry = {
                "id": number,
                "image_id": row["frame"] + 1,
                "track_id": track,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": row["area"],
                "segmentation": encode(mask),
                "score": row["score"],
                "attributes": {"lesion_id": row["lesion_id"]},
            }
            file.write(("\n" if number == 1 else ",\n") + json.dumps(entry))
        file.write('],\n"images": [')
        last = -1
        for row in read_rows(out):
            if row["frame"] == last:
                continue
            last, frames = row["frame"], frames + 1
            entry = {"id": last + 1, "video_id": 1, "frame_id": last, "time": row["time"]}
            entry |= {"file_name": f"{clip.path.name}/{last:06d}", "width": width, "height": height}
            file.write(("\n" if frames == 1 else ",\n") + json.dumps(entry))
        video = {"id": 1, "name": clip.path.name, "width": width, "height": height, "length": frames}
        names = [{"id": track, "lesion_id": lesion_id} for lesion_id, track in tracks.items()]
        file.write(f'],\n"videos": [{json.dumps(video)}],\n"tracks": {json.dumps(names)}}}\n')


def write_overlay(out: Path, clip: Clip, num_frames: int) -> None:
    """Write the clip with outlines drawn on it, at the clip's own times, without sound.

    Args:
        num_frames: that were tracked; the clip may be damaged after them.
    """
    rows = read_rows(out)
    row = next(rows, None)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with atomic_write(out / OVERLAY) as file, av.open(file, "w", format="mp4") as container:
        stream: av.VideoStream | None = None
        last = -1
        for frame in progress(clip.frames(), total=num_frames, title="writing the overlay clip"):
            mask = np.zeros(frame.image.shape[:2], bool)
            while row is not None and row["frame"] == frame.number:
                mask |= read_mask(out / row["mask"], clip.size)
                row = next(rows, None)
            picture = overlay(frame.image, prediction=mask, max_side=OVERLAY_SIDE)
            height, width = (length - length % 2 for length in picture.shape[:2])  # as 4:2:0 colour needs
            if stream is None:
                stream = container.add_stream(codec, rate=30)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base = Fraction(1, TICKS)
                stream.codec_context.thread_count = 1  # the same bytes on every machine with this encoder
            shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
            last = max(last + 1, round(frame.time * TICKS))
            shown.pts, shown.time_base = last, Fraction(1, TICKS)
            container.mux(stream.encode(shown))
            if frame.number + 1 >= num_frames:
                break
        if stream is None:
            raise UserError(f"{clip.path}: no frame can be decoded; copy or convert it again")
        container.mux(stream.encode())

"""Generated clips as video files and tables of boxes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from lesionsam.boxes.geometry import largest_component_box, loosen

TICKS = 1000  # per second


def write_clip(
    path: Path, images: Sequence[np.ndarray], times: Sequence[int] | None = None, codec: str = "libx264rgb"
) -> Path:
    """Write frames, (H, W, 3) uint8, as a video; lossless where the codec is libx264rgb.

    Args:
        times: of the frames, milliseconds; 25 a second if None.
    """
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = {"libx264rgb": "rgb24", "gif": "rgb8"}.get(codec, "yuv420p")
        if codec == "libx264rgb":
            stream.options = {"crf": "0", "preset": "ultrafast"}
        stream.codec_context.time_base = Fraction(1, TICKS)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = 40 * number if times is None else times[number], Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """Write a tenth of a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.planes[0].update(bytes(4096))
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Write a display matrix into the header of an mp4's track: (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4
    offset = start + (40 if data[start] == 0 else 52)
    one = 1 << 16
    data[offset : offset + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def box_of(mask: np.ndarray, looseness: float = 0.15) -> np.ndarray:
    """The big box of a mask, (4,) XYXY."""
    box = largest_component_box(mask)
    if box is None:
        raise ValueError("an empty mask has no box")
    return loosen(box, looseness, (mask.shape[0], mask.shape[1]))


def write_boxes(path: Path, rows: Sequence[tuple[int, str, np.ndarray]]) -> Path:
    """Write (frame, lesion_id, big box) as CSV."""
    lines = ["frame,lesion_id,big_x0,big_y0,big_x1,big_y1"]
    lines += [f"{frame},{lesion},{','.join(f'{value:.2f}' for value in box)}" for frame, lesion, box in rows]
    path.write_text("\n".join(lines) + "\n")
    return path

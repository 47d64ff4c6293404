"""Read clips frame by frame: video files and GIFs through PyAV, folders of images.

Frames come back upright (the display matrix of phone videos applied) with their own times, so that a variable frame
rate needs no care. No more than one decoded frame is held.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.sidedata.sidedata import Type
from av.stream import Disposition

from lesionsam.errors import UserError
from lesionsam.inference.arguments import find_images
from lesionsam.utils.images import read_image

FOLDER_RATE = 25.0  # frames per second of a folder, whose images have no times


@dataclass(frozen=True)
class ClipFrame:
    """One frame: its number from 0, its time in seconds from the first frame, and (H, W, 3) uint8 RGB, upright."""

    number: int
    time: float
    image: np.ndarray


class DamagedClip(UserError):
    """The clip cannot be decoded to its end; what came before is sound."""


class Clip(ABC):
    """Frames of one size in their order.

    Attributes:
        path: file or folder. size: (width, height), upright. num_frames: as the container lists them.
    """

    path: Path
    size: tuple[int, int]
    num_frames: int

    @abstractmethod
    def frames(self, start: int = 0) -> Iterator[ClipFrame]:
        """Yield the frames from number `start` on.

        Raises:
            DamagedClip: frames that cannot be decoded, or of another size.
        """

    def stamp(self) -> str:
        """Return what changes with the files: their names, sizes and times of modification."""
        paths = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        facts = ((path.name, path.stat()) for path in paths)
        return ";".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in facts)


class FolderClip(Clip):
    """The images of a folder, in the order of their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._paths, problems = find_images([path])
        if problems:
            raise UserError(f"{problems[0]}, the frames of a clip")
        first = read_image(self._paths[0])
        self.size, self.num_frames = (first.shape[1], first.shape[0]), len(self._paths)

    def frames(self, start: int = 0) -> Iterator[ClipFrame]:
        """Yield the frames; see `Clip.frames`."""
        for number in range(start, self.num_frames):
            try:
                image = read_image(self._paths[number])
            except UserError as error:
                raise DamagedClip(str(error)) from None
            _check_size(image, self.size, self.path, number)
            yield ClipFrame(number, number / FOLDER_RATE, image)


class VideoClip(Clip):
    """The first video stream of a file.

    Raises:
        UserError: no such file, no video in it, or a first frame that cannot be decoded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with self._open() as container:
                self.num_frames = sum(packet.size > 0 for packet in container.demux(self._stream(container)))
            first = next(self._decoded(), None)
        except FFmpegError as error:
            raise UserError(
                f"{path}: cannot be decoded ({error.strerror}); expected a video (mp4, mov, mkv, webm, avi), a GIF or "
                "a folder of images; copy or convert it again"
            ) from None
        if first is None:
            raise UserError(f"{path}: no frame can be decoded; copy or convert it again")
        self.size = (first.image.shape[1], first.image.shape[0])

    def frames(self, start: int = 0) -> Iterator[ClipFrame]:
        """Yield the frames; see `Clip.frames`. Those before `start` are decoded too: every call gives the same."""
        number = -1
        try:
            for frame in self._decoded(start):
                number = frame.number
                _check_size(frame.image, self.size, self.path, number)
                yield frame
        except FFmpegError as error:
            raise DamagedClip(f"{self.path}: damaged after frame {max(number, 0)} ({error.strerror})") from None

    def _open(self) -> InputContainer:
        return av.open(str(self.path), metadata_errors="replace")

    def _stream(self, container: InputContainer) -> av.VideoStream:
        """Return the first video stream that is no cover picture."""
        pictures = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not pictures:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise UserError(f"{self.path}: holds no video ({kinds} only); expected a clip")
        pictures[0].thread_type = "AUTO"
        return pictures[0]

    def _decoded(self, start: int = 0) -> Iterator[ClipFrame]:
        with self._open() as container:
            stream = self._stream(container)
            rate, begin = float(stream.average_rate or FOLDER_RATE), None
            for number, frame in enumerate(container.decode(stream)):
                moment = frame.time if frame.time is not None else number / rate
                begin = moment if begin is None else begin
                if number >= start:
                    yield ClipFrame(number, moment - begin, upright(frame))


def upright(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame as players show it, (H, W, 3) uint8 RGB: turned and mirrored by its display matrix.

    The matrix maps (x, y) to (a x + c y, b x + d y); one that is no quarter turn is left out.
    """
    image = frame.to_ndarray(format="rgb24")
    sides: Any = frame.side_data  # its stub takes texts alone
    held = sides.get(Type.DISPLAYMATRIX)
    if held is None:
        return image
    a, b, _, c, d = struct.unpack("=5i", bytes(held)[:20])
    if a == d == 0 and b and c:
        image, right, down = image.transpose(1, 0, 2), c, b
    elif b == c == 0 and a and d:
        right, down = a, d
    else:
        return image
    return np.ascontiguousarray(image[:: 1 if down > 0 else -1, :: 1 if right > 0 else -1])


def open_clip(path: Path) -> Clip:
    """Open a clip: a video file, a GIF, or a folder of images.

    Raises:
        UserError: no such file, nothing that can be decoded, sound alone.
    """
    if path.is_dir():
        return FolderClip(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; expected a clip")
    return VideoClip(path)


def _check_size(image: np.ndarray, size: tuple[int, int], path: Path, number: int) -> None:
    if (found := (image.shape[1], image.shape[0])) != size:
        raise DamagedClip(
            f"{path}: frame {number} is {found[0]}x{found[1]} px, the first {size[0]}x{size[1]} px; cut the clip there"
        )

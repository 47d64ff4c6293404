"""Members of zip archives, on this disk or on a server, read one by one and with suspicion.

Nothing is ever extracted by the path that an archive gives: callers ask for members by a strict pattern on the base
name and write them where they like. A remote archive is read by HTTP Range: first its directory (zip64 as well), then
only the members asked for.
"""

from __future__ import annotations

import io
import itertools
import re
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lesionsam.data.sources.download import MAX_FRUITLESS, Dropped, Refused, request, validator
from lesionsam.errors import UserError

MAX_MEMBER_BYTES = 200_000_000  # the largest ISIC image has 30 megapixels and 20 MB
MAX_EXPANSION = 20  # all wanted members together, unpacked, against the archive; JPEG and PNG hardly shrink
SMALL_BYTES = 100_000_000  # below this no archive is a bomb
TAIL_BYTES = 1 << 18  # fetched first: the directory of a few thousand members lies in it


class Archive(Protocol):
    """A zip archive: its name for messages, its size and its members."""

    name: str
    size: int
    infos: list[zipfile.ZipInfo]

    def read(self, info: zipfile.ZipInfo) -> bytes:
        """One member, unpacked, its CRC-32 checked."""
        ...


class LocalArchive:
    """A zip file on this disk; a context manager."""

    def __init__(self, path: Path) -> None:
        self.name, self.size = str(path), path.stat().st_size
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
            raise UserError(f"{path}: not a readable zip archive ({error}); delete it and run again") from None
        self.infos = self._zip.infolist()

    def __enter__(self) -> LocalArchive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def read(self, info: zipfile.ZipInfo) -> bytes:
        try:
            data = self._zip.read(info)
            if len(data) != info.file_size:  # zipfile says nothing where the directory promises more
                raise zipfile.BadZipFile(f"{len(data)} bytes, expected {info.file_size}")
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error) as error:
            raise UserError(
                f"{self.name}: member {info.filename} is damaged ({error}); delete the archive and run again"
            ) from None
        return data


class RemoteArchive:
    """A zip file on a server that honours Range requests.

    Args:
        urls: where it is, the preferred place first. backoff: seconds before a second attempt, doubling.
    """

    def __init__(self, name: str, urls: Sequence[str], backoff: float = 1.0) -> None:
        self.name, self._backoff = name, backoff
        reasons = []
        for url in urls:
            try:
                self._url, self._validator = url, None
                self.size = self._probe()
                directory = _Reader(self)
                with zipfile.ZipFile(directory) as opened:  # type: ignore[arg-type]
                    self.infos = opened.infolist()
                    self._end = opened.start_dir
                break
            except (Refused, Dropped) as error:
                reasons.append(f"{url} {error}")
            except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
                reasons.append(f"{url} is not a readable zip archive ({error})")
        else:
            raise UserError(
                f"{name}: members cannot be fetched: {'; '.join(reasons)}. Check the network, or set "
                "data.subset to 0 to fetch whole archives"
            )
        starts = sorted({info.header_offset for info in self.infos} | {self._end})
        self._next = dict(itertools.pairwise(starts))

    def _probe(self) -> int:
        return self._span(0, 0)[1]

    def range(self, first: int, last: int) -> bytes:
        """Bytes first..last, both included."""
        return self._span(first, last)[0]

    def _span(self, first: int, last: int) -> tuple[bytes, int]:
        for attempt in range(1, MAX_FRUITLESS + 1):
            try:
                return self._ask(first, last)
            except Dropped as error:
                if attempt == MAX_FRUITLESS or error.unreachable:
                    raise
                time.sleep(max(error.wait, self._backoff * 2**attempt))
        raise Refused("gave no answer")

    def _ask(self, first: int, last: int) -> tuple[bytes, int]:
        headers = {"Range": f"bytes={first}-{last}"}
        if self._validator:
            headers["If-Range"] = self._validator
        with request(self._url, headers=headers) as answer:
            if answer.status != 206:
                raise Refused("changed while it was read" if self._validator else "does not answer Range requests")
            span, _, whole = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if span != f"{first}-{last}" or not whole.isdigit():
                raise Refused(f"answers bytes {first}-{last} with Content-Range {answer.headers['Content-Range']!r}")
            self._validator = self._validator or validator(answer)
            data = answer.read(last - first + 2)
        if len(data) != last - first + 1:
            raise Dropped(f"broke off after {len(data)} of {last - first + 1} bytes")
        return data, int(whole)

    def read(self, info: zipfile.ZipInfo) -> bytes:
        begin = info.header_offset
        most = 30 + 2 * 65535 + info.compress_size  # header, name, extra field, data
        try:
            block = self.range(begin, min(begin + most, self._next.get(begin, self._end)) - 1)
        except (Refused, Dropped) as error:
            raise UserError(f"{self.name}: member {info.filename} cannot be fetched: {self._url} {error}") from None
        return _unpack(block, info, f"{self.name}: member {info.filename}")


class _Reader(io.RawIOBase):
    """What zipfile needs to read a directory: a file of which the tail was fetched at once and the rest as asked."""

    def __init__(self, archive: RemoteArchive) -> None:
        self._archive, self._place = archive, 0
        self._tail_at = max(0, archive.size - TAIL_BYTES)
        self._tail = archive.range(self._tail_at, archive.size - 1)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._archive.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = self._archive.size if size < 0 else min(self._archive.size, self._place + size)
        begin, self._place = self._place, max(self._place, end)
        if begin >= end:
            return b""
        if begin >= self._tail_at:
            return self._tail[begin - self._tail_at : end - self._tail_at]
        return self._archive.range(begin, end - 1)


def _unpack(block: bytes, info: zipfile.ZipInfo, where: str) -> bytes:
    """A member from its local header on (APPNOTE 4.3.7: 30 bytes, name, extra field, data)."""
    if len(block) < 30 or block[:4] != b"PK\x03\x04":
        raise UserError(f"{where} is damaged (no local header where the directory says); try again later")
    name_length, extra_length = struct.unpack("<HH", block[26:30])
    begin = 30 + name_length + extra_length
    packed = block[begin : begin + info.compress_size]
    if info.compress_type == zipfile.ZIP_STORED:
        data = packed
    elif info.compress_type == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, info.file_size + 1)
        except zlib.error as error:
            raise UserError(f"{where} is damaged ({error}); try again later") from None
    else:
        raise UserError(f"{where} is packed by method {info.compress_type}; expected stored or deflated")
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise UserError(f"{where} is damaged (CRC-32 or size differ from the directory); try again later")
    return data


def find_members(archive: Archive, pattern: re.Pattern[str]) -> dict[str, zipfile.ZipInfo]:
    """Key -> member, for the members whose base name matches; the pattern's first group is the key.

    Extras (other names, folders, `__MACOSX/`, `._` files) are left out. An archive with any path that climbs out of it,
    a link, a locked or an implausibly large member is refused as a whole.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in archive.infos:
        path = info.orig_filename.replace("\\", "/")
        where = f"{archive.name}: member {info.orig_filename!r}"
        if path.startswith("/") or ".." in path.split("/") or re.match(r"[A-Za-z]:", path) or "\0" in path:
            raise UserError(f"{where} points outside the archive; refused, get the archive from its official address")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{where} is a symbolic link; refused, get the archive from its official address")
        base = path.rsplit("/", 1)[-1]
        match = pattern.fullmatch(base)
        if match is None or "__MACOSX" in path.split("/"):
            continue
        if info.flag_bits & 1:
            raise UserError(f"{where} is encrypted; expected a plain archive")
        total += info.file_size
        if info.file_size > MAX_MEMBER_BYTES or total > max(SMALL_BYTES, MAX_EXPANSION * archive.size):
            raise UserError(
                f"{where} makes {max(info.file_size, total) / 1e6:.0f} MB of an archive of "
                f"{archive.size / 1e6:.0f} MB; refused as a zip bomb"
            )
        if (other := found.setdefault(match[1], info)) is not info:
            raise UserError(f"{where} and {other.filename!r} have the same id; expected each id once")
    return found

"""The ISIC challenge sets of 2016, 2017 and 2018 (task 1): lesion images with masks drawn by experts, CC-0.

Sources: Gutman et al. 2016, arXiv:1605.01397; Codella et al. 2018, arXiv:1710.05006; Codella et al. 2019,
arXiv:1902.03368. The editions overlap: 824 of the 900 training images of 2016 come again in later training sets and 82
training images of 2017 are test images of 2016, so never train on one edition and report on another.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lesionsam.data.index import Row, dev_ids, id_hash
from lesionsam.data.sources.archives import Archive, LocalArchive, RemoteArchive, find_members
from lesionsam.data.sources.download import SPARE_BYTES, Remote, fetch
from lesionsam.errors import UserError
from lesionsam.utils.files import free_disk_bytes, write_bytes_atomic
from lesionsam.utils.images import image_size
from lesionsam.utils.progress import Meter, human_bytes, say

OFFICIAL = ("https://isic-archive.s3.amazonaws.com/challenges", "https://isic-challenge-data.s3.amazonaws.com")
IMAGE = re.compile(r"(ISIC_\d{7})\.jpe?g", re.IGNORECASE)  # the 2017 archives also hold ISIC_..._superpixels.png
MASK = re.compile(r"(ISIC_\d{7})_segmentation\.png", re.IGNORECASE)
NUM_CONNECTIONS = 4
Pairs = dict[str, dict[str, tuple[zipfile.ZipInfo, zipfile.ZipInfo]]]  # split -> image id -> members: image, mask


# SHA-256 of the archives, where the challenge publishes them.
PUBLISHED = {
    "ISIC2018_Task1-2_Training_Input.zip": "80f98572347a2d7a376227fa9eb2e4f7459d317cb619865b8b9910c81446675f",
    "ISIC2018_Task1_Training_GroundTruth.zip": "99f8b2bb3c4d6af483362010715f7e7d5d122d9f6c02cac0e0d15bef77c7604c",
    "ISIC2018_Task1-2_Validation_Input.zip": "0ea920fcfe512d12a6e620b50b50233c059f67b10146e1479c82be58ff15a797",
    "ISIC2018_Task1_Validation_GroundTruth.zip": "f6911e9c0a64e6d687dd3ca466ca927dd5e82145cb2163b7a1e5b37d7a716285",
    "ISIC2018_Task1-2_Test_Input.zip": "e59ae1f69f4ed16f09db2cb1d76c2a828487b63d28f6ab85997f5616869b127d",
    "ISIC2018_Task1_Test_GroundTruth.zip": "2e8f6edce454a5bdee52485e39f92bd6eddf357e81f39018d05512175238ef82",
}


@dataclass(frozen=True)
class Part:
    """One archive of an edition: its file name and its bytes, to about 5 % where `exact` is False."""

    name: str
    bytes: int
    exact: bool = False


@dataclass(frozen=True)
class Split:
    """Images and masks of one split of a challenge, and how many pairs there should be."""

    images: Part
    masks: Part
    count: int


@dataclass(frozen=True)
class Edition:
    """A year's challenge.

    Attributes:
        splits: by train, dev (the challenge's validation set, where it had one) and test.
        overlap: ids in training as well as in test; they are taken out of training.
    """

    year: int
    splits: dict[str, Split]
    overlap: frozenset[str] = frozenset()


EDITIONS = {
    "isic2016": Edition(
        2016,
        {
            "train": Split(
                Part("ISBI2016_ISIC_Part1_Training_Data.zip", 602_000_000),
                Part("ISBI2016_ISIC_Part1_Training_GroundTruth.zip", 6_000_000),
                900,
            ),
            "test": Split(
                Part("ISBI2016_ISIC_Part1_Test_Data.zip", 232_000_000),
                Part("ISBI2016_ISIC_Part1_Test_GroundTruth.zip", 2_000_000),
                379,
            ),
        },
        frozenset({"ISIC_0001184", "ISIC_0001385"}),
    ),
    "isic2017": Edition(
        2017,
        {
            "train": Split(
                Part("ISIC-2017_Training_Data.zip", 5_800_000_000),
                Part("ISIC-2017_Training_Part1_GroundTruth.zip", 9_000_000),
                2000,
            ),
            "dev": Split(
                Part("ISIC-2017_Validation_Data.zip", 878_000_000),
                Part("ISIC-2017_Validation_Part1_GroundTruth.zip", 559_000),
                150,
            ),
            "test": Split(
                Part("ISIC-2017_Test_v2_Data.zip", 5_400_000_000),
                Part("ISIC-2017_Test_v2_Part1_GroundTruth.zip", 18_000_000),
                600,
            ),
        },
        frozenset({"ISIC_0012271", "ISIC_0012175"}),
    ),
    "isic2018": Edition(
        2018,
        {
            "train": Split(
                Part("ISIC2018_Task1-2_Training_Input.zip", 11_165_358_566, exact=True),
                Part("ISIC2018_Task1_Training_GroundTruth.zip", 27_402_895, exact=True),
                2594,
            ),
            "dev": Split(
                Part("ISIC2018_Task1-2_Validation_Input.zip", 239_231_159, exact=True),
                Part("ISIC2018_Task1_Validation_GroundTruth.zip", 759_706, exact=True),
                100,
            ),
            "test": Split(
                Part("ISIC2018_Task1-2_Test_Input.zip", 2_200_000_000),
                Part("ISIC2018_Task1_Test_GroundTruth.zip", 9_000_000),
                1000,
            ),
        },
    ),
}


def fetch_isic(
    source: str,
    *,
    subset: int,
    dev_fraction: float,
    base_url: str,
    raw: Path,
    archives: Path,
    lock_path: Path,
    backoff: float = 1.0,
) -> list[Row]:
    """Fetch an edition and write raw/images/SPLIT/ID.jpg and raw/masks/SPLIT/ID.png.

    Args:
        source: key of `EDITIONS`. subset: images fetched of each archive, those with the smallest SHA-256 of their id;
            0 = whole archives.
        dev_fraction: share of the training images that becomes dev, by hash of the id; 0: the validation set is dev.
        base_url: where BASE/YEAR/ARCHIVE lies; empty: the official addresses. What comes from elsewhere is held against
            the lock file, not against the published hashes.
        archives: folder of the archives, kept between runs. lock_path: JSON of hashes recorded on first use.
    Returns:
        Rows of index.csv.
    """
    edition = EDITIONS[source]
    if dev_fraction == 0 and "dev" not in edition.splits:
        raise UserError(f"data.dev_fraction: expected a number above 0, as {source} has no validation set, got 0")
    splits = {name: split for name, split in edition.splits.items() if name != "dev" or dev_fraction == 0}
    folder = archives / source
    parts = [part for split in splits.values() for part in (split.masks, split.images)]
    remotes = {part.name: _remote(part, edition.year, base_url) for part in parts}
    if not subset:
        if not base_url:
            total = sum(part.bytes for part in parts)
            places = [folder / f"{part.name}{ending}" for part in parts for ending in ("", ".part")]
            here = sum(path.stat().st_size for path in places if path.exists())
            _plan(source, max(0, total - here), total, folder, raw, f"{human_bytes(here)} of it already here")
        for part in sorted(parts, key=lambda part: part.bytes):  # the small ones first, so that a fault shows early
            fetch(remotes[part.name], folder, lock_path=lock_path, backoff=backoff)
    with ExitStack() as stack:
        opened: dict[str, Archive] = {}
        for name, remote in remotes.items():  # of a subset, members by Range requests, unless the archive is here
            if (folder / name).exists():
                opened[name] = stack.enter_context(LocalArchive(folder / name))
            else:
                opened[name] = RemoteArchive(name, remote.urls, backoff)
        pairs = _pairs(splits, opened, subset)
        if not (subset or base_url):
            for name, split in splits.items():
                if len(pairs[name]) != split.count:
                    say(f"warning: {source}: expected {split.count} {name} pairs, got {len(pairs[name])}")
        jobs = list(_jobs(pairs, splits, opened, _leave_out(edition, pairs), dev_fraction))
        if subset:
            remote = [job for job in jobs if isinstance(job.archive, RemoteArchive) and not _kept(job, folder).exists()]
            packed, unpacked = sum(job.info.compress_size for job in remote), sum(job.info.file_size for job in jobs)
            _plan(source, packed, unpacked, folder, raw, f"{len(jobs) // 2} image and mask pairs")
        return _without_copies(_write(jobs, raw, folder if subset else None))


def _remote(part: Part, year: int, base_url: str) -> Remote:
    if base_url:
        return Remote(part.name, (f"{base_url.rstrip('/')}/{year}/{part.name}",))
    urls = tuple(f"{base}/{year}/{part.name}" for base in OFFICIAL)
    return Remote(part.name, urls, part.bytes if part.exact else None, PUBLISHED.get(part.name))


def _pairs(splits: dict[str, Split], opened: dict[str, Archive], subset: int) -> Pairs:
    pairs = {}
    for name, split in splits.items():
        images = find_members(opened[split.images.name], IMAGE)
        masks = find_members(opened[split.masks.name], MASK)
        both = images.keys() & masks.keys()
        if not both:
            raise UserError(
                f"{split.images.name} and {split.masks.name}: no image ISIC_NNNNNNN.jpg with a mask "
                "ISIC_NNNNNNN_segmentation.png in them; are they the right archives?"
            )
        if alone := sorted(images.keys() ^ masks.keys()):
            say(
                f"warning: {split.images.name}: {len(alone)} images without mask or masks without image are left out, "
                f"the first is {alone[0]}"
            )
        chosen = sorted(both, key=id_hash)[:subset] if subset else sorted(both)
        pairs[name] = {image_id: (images[image_id], masks[image_id]) for image_id in chosen}
    return pairs


def _leave_out(edition: Edition, pairs: Pairs) -> set[str]:
    """Return training and dev ids that are also in test, or known to be, and report them in one line."""
    selected_on = set().union(*(pairs[name] for name in pairs if name != "test"))
    doubled = selected_on & (edition.overlap | pairs["test"].keys())
    if "dev" in pairs:
        doubled |= pairs["dev"].keys() & pairs["train"].keys()
    if doubled:
        say(f"note: left out of training, as they are in another split too: {', '.join(sorted(doubled))}")
    return doubled


@dataclass(frozen=True)
class _Job:
    """A member to be written: `key` is its place below images/ or masks/."""

    image_id: str
    split: str
    archive: Archive
    info: zipfile.ZipInfo
    key: str


def _jobs(
    pairs: Pairs, splits: dict[str, Split], opened: dict[str, Archive], left_out: set[str], dev_fraction: float
) -> Iterator[_Job]:
    for name, members in pairs.items():
        ids = [image_id for image_id in members if name == "test" or image_id not in left_out]
        chosen = dev_ids(ids, dev_fraction) if name == "train" else set()
        for image_id in ids:
            split = "dev" if image_id in chosen else name
            image, mask = members[image_id]
            yield _Job(image_id, split, opened[splits[name].images.name], image, f"images/{split}/{image_id}.jpg")
            yield _Job(image_id, split, opened[splits[name].masks.name], mask, f"masks/{split}/{image_id}.png")


def _write(jobs: list[_Job], raw: Path, cache: Path | None) -> list[Row]:
    """Write the members; with `cache`, members fetched one by one are kept there for the next run."""
    rows: dict[str, Row] = {}
    total, done = sum(job.info.file_size for job in jobs), 0
    for folder in sorted({(raw / job.key).parent for job in jobs}):
        folder.mkdir(parents=True, exist_ok=True)
    with Meter("unpacking" if cache is None else "fetching members", total) as meter:
        for job, data in _contents(jobs, cache):
            path = raw / job.key
            path.write_bytes(data)  # not atomically: index.csv, written at the very end, makes the set complete
            row = rows.setdefault(job.image_id, {"image_id": job.image_id, "split": job.split})
            if job.key.startswith("images/"):
                width, height = image_size(path)
                row |= {
                    "image_path": path.as_posix(),
                    "width": width,
                    "height": height,
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            else:
                row["mask_path"] = path.as_posix()
                if (size := image_size(path)) != (row["width"], row["height"]):
                    raise UserError(
                        f"{path}: mask is {size[0]}x{size[1]} px; expected {row['width']}x{row['height']} "
                        "as its image; the archive is not the original one"
                    )
            done += len(data)
            meter.at(done)
    return list(rows.values())


def _contents(jobs: list[_Job], cache: Path | None) -> Iterator[tuple[_Job, bytes]]:
    if cache is None:
        yield from ((job, job.archive.read(job.info)) for job in jobs)
        return
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        try:
            yield from zip(jobs, pool.map(partial(_cached, cache=cache), jobs), strict=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _cached(job: _Job, cache: Path) -> bytes:
    if isinstance(job.archive, LocalArchive):
        return job.archive.read(job.info)
    kept = _kept(job, cache)
    if kept.exists() and zlib.crc32(data := kept.read_bytes()) == job.info.CRC:
        return data
    data = job.archive.read(job.info)
    write_bytes_atomic(kept, data)
    return data


def _kept(job: _Job, cache: Path) -> Path:
    return cache / "members" / Path(job.archive.name).stem / Path(job.key).name


def _without_copies(rows: Iterable[Row]) -> list[Row]:
    """Drop rows of train and dev whose image has the same bytes as one of a split that is reported on."""
    kept: dict[str, Row] = {}
    copies = []
    for row in sorted(rows, key=lambda row: ("test", "dev", "train").index(row["split"])):
        if (other := kept.setdefault(row["sha256"], row)) is row:
            continue
        if other["split"] == row["split"]:
            kept[row["image_id"]] = row  # twice in one split: harmless
            continue
        copies.append(f"{row['image_id']} (same as {other['image_id']})")
        Path(row["image_path"]).unlink()
        Path(row["mask_path"]).unlink()
    if copies:
        say(f"note: left out, as the same picture is in another split under another id: {', '.join(copies)}")
    return list(kept.values())


def _plan(source: str, download: int, unpacked: int, folder: Path, raw: Path, detail: str) -> None:
    """Report what will be fetched; refuse if the disk has no room for it."""
    free = free_disk_bytes(folder)
    needed = download + 2 * unpacked  # unpacked once in the working tree and once in DVC's cache
    say(
        f"{source}: {human_bytes(download)} to download ({detail}); {human_bytes(needed)} of disk with {raw} and DVC's "
        f"copy of it, {human_bytes(free)} free"
    )
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"{folder}: {source} needs {human_bytes(needed)} of disk, only {human_bytes(free)} free; free "
            "some, or set data.subset to fetch fewer images"
        )

"""Parts of one prediction, made by several processes or machines into one folder, and their merge.

A shard is a run of whole batches of the list of images, so that it computes what a single process does. Its table is
kept in blocks of a few hundred images: memory holds the names of all images and the rows of one block. `merge_shards`
writes the files that a single process writes, byte for byte, and removes the folder `shards`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesionsam.errors import UserError, listed
from lesionsam.inference.arguments import Source
from lesionsam.inference.jobs import Job, StoredRows, job_of, match_images
from lesionsam.inference.outputs import (
    COCO,
    TABLE,
    PredictionFolder,
    Row,
    make_folder,
    table_rows,
    write_coco,
    write_table,
)
from lesionsam.inference.run import Counts, PredictOptions, PredictRun, print_marked, print_problems
from lesionsam.inference.sheet import write_sheet
from lesionsam.models.sam import Sam
from lesionsam.utils.files import atomic_write, sha256_file, write_json_atomic, write_text_atomic
from lesionsam.utils.locks import file_lock, folder_lock
from lesionsam.utils.progress import progress, silent

SHARDS, MERGED = "shards", ".shards-merged"  # folders of the parts, and of parts that are merged and being removed
STATE, IMAGES = "shard.json", "images.jsonl"  # of a shard: its settings and counts; [image_id, file name] per line
VERSION = 1  # of the format of a shard's folder
BLOCK_IMAGES = 256  # images per table, rounded up to whole batches


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a prediction; index: 1 to count."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard of a text such as 2/8.

        Raises:
            UserError: anything else.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard: expected I/N with I from 1 to N, such as 2/8, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def folder_name(self) -> str:
        """Return the name of the shard's folder."""
        return f"{self.index:06d}-of-{self.count:06d}"

    def part(self, num_images: int, batch_size: int) -> slice:
        """Return which images belong to the shard: whole batches, as many as in any other shard or one more."""
        num_batches = -(-num_images // batch_size)
        low, high = (num_batches * k // self.count * batch_size for k in (self.index - 1, self.index))
        return slice(low, high)


def refuse_shards(out: Path) -> None:
    """Raise UserError if a folder holds shards that are not merged."""
    if (out / SHARDS).is_dir():
        raise UserError(
            f"{out / SHARDS}: holds shards that are not merged; `lesionsam predict --merge {out}` joins them, or "
            "choose another --out"
        )


def predict_shard(
    paths: Sequence[Path], problems: Sequence[str], sam: Sam, out: Path, how: PredictOptions, shard: Shard
) -> int:
    """Segment a shard of the images; masks of an earlier call for it are kept.

    The first shard prints and counts the faults of the list as such: images without a row, rows that repeat.

    Args:
        paths: of all images. problems: one line for each argument without images. out: folder of all shards.
    Returns:
        exit code: 0, or 1 if an image or a row gave no mask; each is named on stderr.
    Raises:
        UserError: the shard is running already, or the folder holds a whole prediction or another division.
    """
    source = how.source
    lesions = StoredRows(source)
    given, problems, unused, digest = _plan(paths, problems, source, lesions)
    own = given[shard.part(len(given), how.batch_size)]
    counts = Counts()
    if shard.index == 1:
        print_problems(problems, unused, source)
        print_marked(paths, source)
        counts.faults += len(problems)
    make_folder(out)
    with folder_lock(out, "wait for it, or choose another --out", shared=True):
        if (out / TABLE).exists():
            raise UserError(
                f"{out / TABLE}: belongs to a prediction that is whole; leave --shard out, or choose another --out"
            )
        if others := [name for name in _shard_names(out) if not name.endswith(shard.folder_name[6:])]:
            raise UserError(
                f"{out / SHARDS}: holds shards of another division, such as {others[0]}, expected {shard.count} "
                f"shards; remove {out / SHARDS} or choose another --out"
            )
        folder = out / SHARDS / shard.folder_name
        with file_lock(folder / "lock", f"shard {shard} of {out}"):
            state = {
                "version": VERSION,
                "shard": shard.index,
                "of": shard.count,
                "images": digest,
                "num_images": len(given),
                "settings": how.named() | {"prompts file": _csv_sha256(source)},
                "finished": False,
            }
            _begin(folder, state, own, source, lesions)
            _work(folder, own, out, sam, how, lesions, counts, shard)
            write_json_atomic(folder / STATE, state | {"finished": True, "faults": counts.faults})
    print(f"shard {shard}: {counts.summary(out)}")
    return 1 if counts.faults else 0


def _plan(
    paths: Sequence[Path], problems: Sequence[str], source: Source, lesions: Mapping[str, Any]
) -> tuple[list[Path], list[str], list[str], str]:
    """Return images with a row, faults of the list, ids without an image, and a digest of the images' names."""
    given: list[Path] = []
    digest = hashlib.sha256()

    def keep(job: Job) -> None:
        given.append(job.path)
        digest.update(_line(job).encode())

    unmatched, unused = match_images(paths, source, lesions, keep)
    return given, [*problems, *unmatched], unused, digest.hexdigest()


def _line(job: Job) -> str:
    return json.dumps([job.image_id, job.path.name]) + "\n"


def _csv_sha256(source: Source) -> str:
    return sha256_file(source.path) if source.path is not None else ""


def _jobs(paths: Sequence[Path], source: Source, lesions: Mapping[str, Any]) -> list[Job]:
    return [job for path in paths if (job := job_of(path, source, lesions)[0]) is not None]


def _begin(
    folder: Path, state: dict[str, Any], own: Sequence[Path], source: Source, lesions: Mapping[str, Any]
) -> None:
    """Write the shard's state and list of images, or check them where there are such.

    Raises:
        UserError: the shard was begun with other images.
    """
    known = _read_state(folder)
    text = "".join(_line(job) for path in own for job in _jobs([path], source, lesions))
    if known is not None and (folder / IMAGES).exists() and (folder / IMAGES).read_text(encoding="utf-8") != text:
        raise UserError(
            f"{folder}: was begun with another list of images or another --batch-size; give the same, or remove "
            f"{folder.parent} to begin anew"
        )
    write_text_atomic(folder / IMAGES, text)
    write_json_atomic(folder / STATE, state)


def _work(
    folder: Path,
    own: Sequence[Path],
    out: Path,
    sam: Sam,
    how: PredictOptions,
    lesions: Mapping[str, Any],
    counts: Counts,
    shard: Shard,
) -> None:
    """Segment the images of a shard, block by block; the counts are added to."""
    size = -(-BLOCK_IMAGES // how.batch_size) * how.batch_size
    lows = range(0, len(own), size)
    for number, low in enumerate(progress(lows, total=len(lows), title=f"shard {shard}: blocks of {size} images")):
        jobs = _jobs(own[low : low + size], how.source, lesions)
        table = folder / f"{number:06d}.csv"
        part = PredictionFolder(out, overlays=how.overlays, shapes=how.shapes, segmentations=how.dicom_seg, table=table)
        for key in [key for key in part.rows if key[0] not in {job.image_id for job in jobs}]:
            part.forget(key)  # the CSV names the image otherwise now
        run = PredictRun(sam, how, part)
        try:
            with silent():
                run.work(jobs)
            part.sort(jobs)
        finally:
            run.save()
        counts.add(run.counts)


def _shard_names(out: Path) -> list[str]:
    """Return the names of the shards' folders, in order."""
    return sorted(path.name for path in (out / SHARDS).glob("*-of-*") if path.is_dir())


def _read_state(folder: Path) -> dict[str, Any] | None:
    """Return a shard's state; None where it has not begun.

    Raises:
        UserError: a file that is no such state.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        state = None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise UserError(f"{path}: not a shard's state of this version; remove {folder} and run the shard again")
    return state


def merge_shards(out: Path) -> int:
    """Join the tables of all shards, write COCO JSON of them, and remove the folder `shards`.

    Returns:
        exit code: 0, or 1 if an image or a row gave no mask.
    Raises:
        UserError: a shard is missing, unfinished, running, or was made with other settings or images.
    """
    if not out.is_dir():
        raise UserError(f"--merge {out}: no such folder; expected the --out of `lesionsam predict --shard`")
    with folder_lock(out, "a shard is running; merge when it has ended"):
        shutil.rmtree(out / MERGED, ignore_errors=True)
        if not _shard_names(out) and (out / TABLE).exists():
            print(f"{out}: nothing to merge, {TABLE} is whole")
            return 0
        folders, states = _checked(out)
        merged = Merged(out, folders, states)
        num_rows = sum(1 for _ in merged.checked_rows())
        if num_rows:
            if states[0]["settings"]["shapes"]:
                with atomic_write(out / COCO, "w") as file:
                    write_coco(file, out, merged.rows)
            write_table(out / TABLE, (row for row, _ in merged.rows()))
            if states[0]["settings"]["overlays"]:
                write_sheet(out, lambda: (row for row, _ in merged.rows()))
        (out / SHARDS).rename(out / MERGED)
        shutil.rmtree(out / MERGED, ignore_errors=True)
    faults = sum(state["faults"] for state in states)
    named = f"; {faults} faults, named by the shards" if faults else ""
    print(f"{num_rows} rows of {states[0]['num_images']} images, {len(states)} shards merged in {out / TABLE}{named}")
    return 1 if faults else 0


def _checked(out: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """Return the folders and states of all shards, in order, once they are known to be parts of one prediction."""
    names = _shard_names(out)
    if not names:
        raise UserError(f"{out}: no shards to merge; `lesionsam predict ... --shard I/N --out {out}` makes them")
    counts = sorted({int(name.partition("-of-")[2]) for name in names})
    if len(counts) > 1:
        raise UserError(
            f"{out / SHARDS}: holds shards of {' and of '.join(map(str, counts))}; "
            "remove the folders that are not wanted"
        )
    folders = [out / SHARDS / Shard(k, counts[0]).folder_name for k in range(1, counts[0] + 1)]
    states = [_read_state(folder) for folder in folders]
    for what, wrong in (
        ("missing", [k for k, state in enumerate(states, 1) if state is None]),
        ("unfinished", [k for k, state in enumerate(states, 1) if state is not None and not state["finished"]]),
    ):
        if wrong:
            shown = listed([f"{k}/{counts[0]}" for k in wrong])
            raise UserError(f"{out}: shards {what}: {shown}; run the same command with --shard {wrong[0]}/{counts[0]}")
    known = [state for state in states if state is not None]
    for k, state in enumerate(known, 1):
        for name, value in state["settings"].items():
            if value != (first := known[0]["settings"].get(name)):
                raise UserError(
                    f"{out}: shard {k}/{counts[0]} was predicted with another {name}: expected {first} as of shard 1, "
                    f"got {value}; run it again with the same options"
                )
        if state["images"] != known[0]["images"]:
            raise UserError(f"{out}: shard {k}/{counts[0]} was predicted from another list of images than shard 1")
    digest = hashlib.sha256()
    for folder in folders:
        digest.update((folder / IMAGES).read_bytes())
    if digest.hexdigest() != known[0]["images"]:
        raise UserError(f"{out}: the shards' images are not the whole list; run the shards again with one --batch-size")
    return folders, known


@dataclass(frozen=True)
class Merged:
    """The rows of all shards in the order of the images."""

    out: Path
    folders: Sequence[Path]
    states: Sequence[Mapping[str, Any]]

    def rows(self) -> Iterator[tuple[Row, str]]:
        """Yield each row with the name of its image's file."""
        for folder in self.folders:
            rows = (row for table in sorted(folder.glob("*.csv")) for row in table_rows(table))
            row = next(rows, None)
            with (folder / IMAGES).open(encoding="utf-8") as file:
                for line in file:
                    image_id, name = json.loads(line)
                    while row is not None and row["image_id"] == image_id:
                        yield row, name
                        row = next(rows, None)
            if row is not None:
                raise UserError(
                    f"{folder}: image {row['image_id']!r} is twice or out of place in its tables; "
                    "remove the folder and run the shard again"
                )

    def checked_rows(self) -> Iterator[Row]:
        """Yield each row; UserError if its mask is gone."""
        for row, _ in self.rows():
            if row["mask"] and not (self.out / row["mask"]).is_file():
                raise UserError(
                    f"{self.out / row['mask']}: the mask of a finished shard is gone; run the shards again, which "
                    "make what is missing"
                )
            yield row

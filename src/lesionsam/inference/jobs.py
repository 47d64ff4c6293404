"""Find the images of a prediction, as files, folders, patterns or lists, and match each with its lesions."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lesionsam.boxes.table import BIG, SMALL, iter_rows
from lesionsam.errors import UserError
from lesionsam.inference.arguments import Source, needs_small
from lesionsam.inference.inputs import Lesion, Rows

POINT_COLUMNS = ("image_id", "lesion_id", "x", "y", "label", "width", "height")
ONE = "0"  # the lesion_id where an image is known to have one lesion


@dataclass(frozen=True)
class Job:
    """One image and its lesions to segment, in the order of the CSV; none if all its masks are wanted."""

    image_id: str
    path: Path
    lesions: tuple[Lesion, ...]


def read_lesions(source: Source) -> dict[str, Rows]:
    """Read the rows of a CSV by image; columns that the prompt needs are required, lesion_id is not.

    Raises:
        UserError: no row, or as `iter_rows`.
    """
    lesions: dict[str, Rows] = {}
    for line, row in source_rows(source):
        lesions[row["image_id"]] = (*lesions.get(row["image_id"], ()), (line, row))
    return lesions


def source_rows(source: Source) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, column -> text) of the CSV's rows; none without a CSV.

    Raises:
        UserError: no row, or as `iter_rows`.
    """
    if source.path is None:
        return
    if source.kind == "points":
        rows = iter_rows(source.path, ("image_id", "x", "y"), columns=POINT_COLUMNS, what="CSV of points")
    else:
        rows = iter_rows(source.path, ("image_id", *BIG, *(SMALL if needs_small(source.prompt) else ())))
    line = 0
    for line, row in rows:
        yield line, row
    if not line:
        raise UserError(f"{source.path}: expected a row for each lesion below the header, got none")


class StoredRows(Mapping[str, Rows]):
    """Keep the rows of a CSV by image, as `read_lesions` returns them, in a temporary file instead of in memory."""

    def __init__(self, source: Source) -> None:
        self._rows = sqlite3.connect("")  # a file that SQLite removes at its end
        self._rows.execute("CREATE TABLE rows (image_id TEXT, line INTEGER, row TEXT)")
        records = ((row["image_id"], line, json.dumps(row)) for line, row in source_rows(source))
        self._rows.executemany("INSERT INTO rows VALUES (?, ?, ?)", records)
        self._rows.execute("CREATE INDEX by_image ON rows (image_id, line)")

    def __getitem__(self, image_id: str) -> Rows:
        found = self._rows.execute("SELECT line, row FROM rows WHERE image_id = ? ORDER BY line", (image_id,))
        rows = tuple((line, json.loads(row)) for line, row in found)
        if not rows:
            raise KeyError(image_id)
        return rows

    def __iter__(self) -> Iterator[str]:
        for (image_id,) in self._rows.execute("SELECT image_id FROM rows GROUP BY image_id ORDER BY min(line)"):
            yield image_id

    def __len__(self) -> int:
        return int(self._rows.execute("SELECT count(DISTINCT image_id) FROM rows").fetchone()[0])


def _by_lesion(rows: Rows, source: Source) -> tuple[dict[str, Rows], list[str]]:
    """Return lesion_id -> rows of one image's rows, and one line for each box whose lesion_id repeats.

    Of boxes each row is a lesion. Points of one image and one lesion_id are one prompt; without lesion_id all points of
    an image are.
    """
    known: dict[str, Rows] = {}
    problems = []
    for line, row in rows:
        lesion_id = row.get("lesion_id") or (ONE if source.kind == "points" else str(len(known)))
        if source.kind == "points":
            known[lesion_id] = (*known.get(lesion_id, ()), (line, row))
        elif lesion_id in known:
            problems.append(
                f"{source.path}: line {line}, lesion_id: {row['image_id']!r} has a lesion {lesion_id!r} already; "
                "the first is taken"
            )
        else:
            known[lesion_id] = ((line, row),)
    return known, problems


def plan(paths: Sequence[Path], source: Source) -> tuple[list[Job], list[str], list[str]]:
    """Match images with rows: image_id is the file's name, with or without its ending.

    Returns:
        the jobs; one line for each image without a row and for each repeated row; ids without an image.
    Raises:
        UserError: two images of one name, or lesions whose files would have the same name.
    """
    jobs: list[Job] = []
    return jobs, *match_images(paths, source, read_lesions(source), jobs.append)


def match_images(
    paths: Iterable[Path], source: Source, lesions: Mapping[str, Rows], keep: Callable[[Job], None]
) -> tuple[list[str], list[str]]:
    """Hand the job of each image with a row to `keep`; return faults and ids without an image, see `plan`."""
    names, problems = Names(source), []
    for path in paths:
        job, lines = job_of(path, source, lesions)
        problems += lines
        if job is not None:
            names.add(job)
            keep(job)
    return problems, [image_id for image_id in lesions if image_id not in names.paths]


def job_of(path: Path, source: Source, lesions: Mapping[str, Rows]) -> tuple[Job | None, list[str]]:
    """Return the job of an image, None if the CSV has no row of it, and one line for each fault."""
    image_id = path.stem if source.path is None or path.stem in lesions else path.name
    if source.path is not None and image_id not in lesions:
        if path.stem in source.marked:
            return None, []
        return None, [f"{path}: no row of {source.path} has the image_id {path.stem!r}; add its {source.kind}"]
    if source.path is not None:
        rows, problems = _by_lesion(lesions[image_id], source)
    else:
        rows, problems = ({ONE: ()} if source.kind == "auto" else {}), []
    return Job(
        image_id,
        path,
        tuple(
            Lesion(lesion_id, file_stem(image_id if len(rows) == 1 else f"{image_id}_{lesion_id}"), lines)
            for lesion_id, lines in rows.items()
        ),
    ), problems


class Names:
    """Check that each name of an image or file stands for one image or lesion only."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.paths: dict[str, Path] = {}  # image_id -> path
        self._owners: dict[str, str] = {}  # name of files -> image, or image/lesion

    def add(self, job: Job) -> None:
        """Note the names of a job.

        Raises:
            UserError: an earlier job has one of them.
        """
        image_id, path = job.image_id, job.path
        if image_id in self.paths:
            raise UserError(
                f"{path}: the image_id {image_id!r} stands for {self.paths[image_id]} too; predict them in "
                "two calls, with an --out of their own"
            )
        self.paths[image_id] = path
        if not job.lesions:
            folder = file_stem(image_id) + "/"  # for as many masks as there are
            if (other := self._owners.setdefault(folder, image_id)) != image_id:
                raise UserError(f"{path}: its masks would be in masks/{folder}, as those of {other}; rename one")
        for lesion in job.lesions:
            own = f"{image_id}/{lesion.lesion_id}"
            if (other := self._owners.setdefault(lesion.file_name, own)) != own:
                place = f"{self.source.path}: line {lesion.rows[0][0]}" if lesion.rows else str(path)
                raise UserError(
                    f"{place}: the mask of {own} would be {lesion.file_name}.png, as that of "
                    f"{other}; rename one of them"
                )


def file_stem(label: str) -> str:
    """Return a label as part of a file name: letters, digits and . _ - are kept, anything else becomes _."""
    return re.sub(r"[^\w.-]+", "_", label)

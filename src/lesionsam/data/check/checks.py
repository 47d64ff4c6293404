"""Check a data set before training: what is wrong with it, or would lead to a wrong result.

Every image and mask is decoded; pictures are compared by bytes, pixels and looks; boxes are held against masks. Errors
are what training would stop at or what would flatter the results; warnings want a look; notes only tell.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lesionsam.boxes.geometry import box_slices
from lesionsam.boxes.table import scan_boxes
from lesionsam.data.check.duplicates import near_pairs
from lesionsam.data.check.image import Inspection, inspect
from lesionsam.data.check.items import ERROR, NOTE, ORDER, WARNING, ImageSet, Issue, Item
from lesionsam.data.sources.parallel import outcomes
from lesionsam.errors import UserError
from lesionsam.metrics import bounding_box
from lesionsam.types import Sample
from lesionsam.utils.files import whole_number
from lesionsam.utils.progress import progress

ISIC_ID = re.compile(r"ISIC_(\d{7})(?!\d)", re.IGNORECASE)
OUTSIDE, BACKGROUND = 0.02, 0.1  # share of a lesion outside its big box, of a core on background: worth a look
SAME_FILE, SAME_PIXELS, NEAR = "same file", "same pixels", "near-duplicate"
SEVERITIES = (ERROR, WARNING, NOTE)


@dataclass(frozen=True)
class Match:
    """Two images that are the same picture, positions in `Report.inspections`; `kind` says how that was seen."""

    first: int
    second: int
    kind: str
    correlation: float = 1.0


@dataclass
class Report:
    """The result of a check.

    Attributes:
        inspections: one per image, in order. num_own: from here on they belong to sets only compared with.
        samples: rows of the two-box CSV. looseness: of each lesion with mask and big box, by how much the mean of
            width and height of the box exceeds the lesion's.
    """

    name: str
    inspections: list[Inspection]
    num_own: int
    issues: list[Issue] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    looseness: list[float] = field(default_factory=list)

    @property
    def own(self) -> list[Inspection]:
        """Return the images of the set itself."""
        return self.inspections[: self.num_own]

    def count(self, severity: str) -> int:
        """Return the number of issues of a severity."""
        return sum(issue.severity == severity for issue in self.issues)

    def splits(self) -> list[str]:
        """Return the names of the splits, train first."""
        found = {seen.item.split for seen in self.own}
        return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def check(
    found: ImageSet, *, against: Sequence[ImageSet] = (), boxes: Path | None = None, num_threads: int = 4
) -> Report:
    """Check a set.

    Args:
        against: other sets, only compared with: no picture of theirs should be in this one.
        boxes: a two-box CSV; None: the set's own, if it has one. num_threads: that decode.
    """
    items = [*found.items, *(item for other in against for item in other.items)]
    jobs = [partial(inspect, item) for item in items]
    inspections = [
        seen
        for seen in outcomes(jobs, title="looking at images", num_threads=num_threads)
        if not isinstance(seen, UserError)
    ]
    report = Report(found.name, inspections, len(found.items), list(found.issues))
    for seen in report.own:
        report.issues += seen.issues
    _compare(report)
    _names(report)
    if (path := boxes or found.boxes) is not None:
        _boxes(report, path)
    if not report.samples and not any(seen.shares for seen in report.own):
        report.issues.append(Issue(NOTE, "mask", "no masks and no boxes: training needs one or the other"))
    report.issues.sort(key=lambda issue: SEVERITIES.index(issue.severity))
    return report


def _where(seen: Inspection) -> str:
    return seen.item.split or "the set"


def _compare(report: Report) -> None:
    """Find equal pictures under two names: by bytes, then by pixels, then by appearance.

    Of several equal ones each is told with the first alone, and only that is compared by looks.
    """
    first_file: dict[str, int] = {}
    first_pixels: dict[str, int] = {}
    for k, seen in enumerate(report.inspections):
        if seen.fingerprint is None:
            continue
        same_pixels = first_pixels.setdefault(seen.fingerprint.pixels, k)
        same_file = first_file.setdefault(seen.sha256, k)
        if same_file != k:
            report.matches.append(Match(same_file, k, SAME_FILE))
        elif same_pixels != k:
            report.matches.append(Match(same_pixels, k, SAME_PIXELS))
    different = sorted(first_pixels.values())
    marks = [mark for k in different if (mark := report.inspections[k].fingerprint) is not None]
    for (first, second), correlation in near_pairs(marks).items():
        report.matches.append(Match(different[first], different[second], NEAR, correlation))
    report.matches = [match for match in report.matches if match.first < report.num_own]
    report.matches.sort(key=lambda match: not _across(report, match.first, match.second))
    for match in report.matches:
        one, other = report.inspections[match.first], report.inspections[match.second]
        across, number = _across(report, match.first, match.second), _isic(one)
        certain = match.kind != NEAR or (number != "" and number == _isic(other))
        how = match.kind if match.kind != NEAR else f"nearly the same picture (correlation {match.correlation:.2f})"
        what = "twice in the same split it weighs double"
        if across:
            remedy = "remove one" if certain else "look at both, and remove one"
            what = f"one is in {_where(one)}, the other in {_where(other)}: {remedy}, or results would be flattered"
        report.issues.append(
            Issue(
                ERROR if certain and across else WARNING,
                match.kind,
                f"{other.item.path}: {how} as {one.item.path}; {what}",
                one.item.image_id,
            )
        )


def _across(report: Report, first: int, second: int) -> bool:
    return report.inspections[first].item.split != report.inspections[second].item.split or second >= report.num_own


def _isic(seen: Inspection) -> str:
    """Return the ISIC_NNNNNNN that an image id contains, or an empty text."""
    number = ISIC_ID.search(seen.item.image_id)
    return number[0].upper() if number else ""


def _names(report: Report) -> None:
    """Find ids that occur twice: boxes are found by id, and ISIC's numbers stay the same over its editions."""
    held: dict[str, int] = {}
    matched = {(match.first, match.second) for match in report.matches}
    for k, seen in enumerate(report.inspections):
        number = _isic(seen)
        name = number or seen.item.image_id.lower()
        first = held.setdefault(name, k)
        if first == k or first >= report.num_own or (first, k) in matched:
            continue
        one = report.inspections[first]
        if k >= report.num_own and not number:
            continue  # another set's image of that name need not be the same
        remedy = (
            "the same lesion, so results would be flattered; remove one"
            if number
            else ("rename one, as boxes are found by id")
        )
        report.issues.append(
            Issue(
                ERROR if not number or _across(report, first, k) else WARNING,
                "id",
                f"{seen.item.path}: same {'ISIC number' if number else 'id'} as {one.item.path} (one in {_where(one)}, "
                f"the other in {_where(seen)}): {remedy}",
                one.item.image_id,
            )
        )


def _boxes(report: Report, path: Path) -> None:
    """Check the two-box CSV: every faulty row, and boxes that do not fit the masks."""
    inspections = {seen.item.image_id: seen for seen in report.own if seen.is_read}
    try:
        report.samples, problems = sound_boxes(report.own, path)
    except UserError as error:
        report.issues.append(Issue(ERROR, "boxes", str(error)))
        return
    report.issues += [Issue(ERROR, "boxes", f"{path}: {problem}") for problem in problems]
    boxes = by_image(report.samples)
    if without := len(inspections) - len(boxes):
        report.issues.append(Issue(NOTE, "boxes", f"{path}: {without} of {len(inspections)} images have no row"))
    for image_id, samples in progress(boxes.items(), total=len(boxes), title="comparing boxes and masks"):
        if inspections[image_id].shares:
            _against_masks(report, path, inspections[image_id].item, samples)


def by_image(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Return image_id -> its samples."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.image_id, []).append(sample)
    return found


def sound_boxes(inspections: Sequence[Inspection], path: Path) -> tuple[list[Sample], list[str]]:
    """Return the rows of a two-box CSV that fit the images, and a line of text for each that does not."""
    return scan_boxes(path, {seen.item.image_id: _entry(seen) for seen in inspections if seen.is_read}, root=Path())


def _entry(seen: Inspection) -> dict[str, Any]:
    """Return the image's row of an index, as far as boxes are checked against it."""
    item = seen.item
    lesions = {"lesions": {str(k): "" for k in range(len(item.objects))}} if item.objects else {}
    return {
        "split": {"val": "dev"}.get(item.split, item.split),
        "image_path": item.path.as_posix(),
        "mask_path": "",
        "width": seen.width,
        "height": seen.height,
    } | lesions


def _against_masks(report: Report, path: Path, item: Item, samples: Sequence[Sample]) -> None:
    width, height = samples[0].width, samples[0].height
    try:
        masks = item.lesion_masks(width, height)
    except UserError:
        return  # told already
    whole = np.logical_or.reduce(masks)
    for sample in samples:
        number = whole_number(sample.lesion_id)
        number = len(masks) if number is None else number
        own = whole if len(samples) == 1 else masks[number] if len(masks) > 1 and number < len(masks) else None
        place = f"{path}: lesion {sample.lesion_id!r} of {sample.image_id!r}"
        texts = []
        core = (whole if own is None else own)[box_slices(sample.small_box, (height, width))]
        if core.size and (background := 1 - float(core.mean())) > BACKGROUND:
            texts.append(f"{background:.0%} of the core is not lesion in the mask; it should lie inside the lesion")
        tight = None if own is None else bounding_box(own)
        if own is not None and tight is not None:
            outside = 1 - np.count_nonzero(own[box_slices(sample.big_box, (height, width))]) / np.count_nonzero(own)
            if outside > OUTSIDE:
                texts.append(
                    f"{outside:.0%} of the lesion in the mask lies outside the big box; it should hold the lesion"
                )
            sides = (sample.big_box[2:] - sample.big_box[:2]) / (tight[2:] - tight[:2])
            report.looseness.append(float(sides.mean() - 1))
        report.issues += [Issue(WARNING, "boxes", f"{place}: {text}", sample.image_id) for text in texts]


def summary(report: Report) -> list[str]:
    """Summarise the set in a few lines."""
    read = [seen for seen in report.own if seen.is_read]
    counts = Counter(seen.item.split for seen in report.own)
    splits = ", ".join(f"{name or 'no split'} {counts[name]}" for name in report.splits())
    lines = [f"images    {len(report.own)} ({splits}), {len(read)} of them readable"]
    if read:
        sides = sorted((seen.width * seen.height, seen.width, seen.height) for seen in read)
        lines.append(
            "sizes     "
            + ", ".join(
                f"{name} {sides[k][1]}x{sides[k][2]}"
                for name, k in (("smallest", 0), ("median", len(sides) // 2), ("largest", -1))
            )
            + " px"
        )
    shares = np.array([share for seen in read for share in seen.shares])
    if len(shares):
        masked = [seen for seen in read if seen.shares]
        lines.append(
            f"masks     {len(masked)} images with {len(shares)} masks; a lesion covers {shares.min():.1%} to "
            f"{shares.max():.1%} of the image, median {np.median(shares):.1%}"
        )
        several = sum(seen.pieces > len(seen.shares) for seen in masked)
        lines.append(f"          {sum(seen.cut for seen in masked)} cut by the frame, {several} in several pieces")
    else:
        lines.append("masks     none")
    if report.samples:
        line = f"boxes     {len(report.samples)} lesions of {len({s.image_id for s in report.samples})} images"
        if report.looseness:
            line += (
                f"; big boxes {np.median(report.looseness):.0%} larger than the lesions, median (middle 80 %: "
                f"{np.quantile(report.looseness, 0.1):.0%} to {np.quantile(report.looseness, 0.9):.0%})"
            )
        lines.append(line)
    kinds = Counter(match.kind for match in report.matches)
    pairs = ", ".join(f"{kinds[kind]} {kind}" for kind in (SAME_FILE, SAME_PIXELS, NEAR))
    lines.append(f"pictures  the same picture twice: {pairs}")
    found = ", ".join(f"{report.count(severity)} {severity}s" for severity in SEVERITIES)
    return [*lines, f"found     {found}"]

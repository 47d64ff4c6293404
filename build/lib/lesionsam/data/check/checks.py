"""`lesionsam data check`: what is wrong with a set, or would make a wrong number later, before anything is trained.

Every image and mask is decoded; pictures are compared by bytes, pixels and looks; boxes are held against masks. Errors
are what training would stop at or what would flatter the results; warnings want a look; notes only tell.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lesionsam.boxes.table import scan_boxes
from lesionsam.data.check.duplicates import near_pairs
from lesionsam.data.check.image import Look, inspect
from lesionsam.data.check.items import ERROR, NOTE, ORDER, WARNING, Found, Issue, Item
from lesionsam.data.sources.isic import EDITIONS
from lesionsam.data.sources.parallel import outcomes
from lesionsam.errors import UserError
from lesionsam.types import Sample
from lesionsam.utils.files import whole_number
from lesionsam.utils.progress import progress

ISIC_ID = re.compile(r"ISIC_(\d{7})(?!\d)", re.IGNORECASE)
OUTSIDE, BACKGROUND = 0.02, 0.1  # share of a lesion outside its big box, of a small box on background: worth a look
SAME_FILE, SAME_PIXELS, NEAR = "same file", "same pixels", "near-duplicate"
SEVERITIES = (ERROR, WARNING, NOTE)


@dataclass(frozen=True)
class Match:
    """Two images that are the same picture, positions in `Report.looks`; `kind` says how that was seen."""

    first: int
    second: int
    kind: str
    correlation: float = 1.0


@dataclass
class Report:
    """All that was found.

    Attributes:
        looks: one per image, in order. foreign: from here on they belong to sets only compared with.
        samples: rows of the two-box CSV. looseness: of each lesion with mask and big box, by how much the mean of
            width and height of the box exceeds the lesion's.
    """

    name: str
    looks: list[Look]
    foreign: int
    issues: list[Issue] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    looseness: list[float] = field(default_factory=list)

    @property
    def own(self) -> list[Look]:
        """The images of the set itself."""
        return self.looks[: self.foreign]

    def count(self, severity: str) -> int:
        """Number of issues of a severity."""
        return sum(issue.severity == severity for issue in self.issues)

    def splits(self) -> list[str]:
        """Names of the splits, in the order of training."""
        found = {look.item.split for look in self.own}
        return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def check(found: Found, *, against: Sequence[Found] = (), boxes: Path | None = None, num_threads: int = 4) -> Report:
    """Look at a set.

    Args:
        against: other sets, only compared with: no picture of theirs should be in this one.
        boxes: a two-box CSV; None: the set's own, if it has one. num_threads: that decode.
    """
    items = [*found.items, *(item for other in against for item in other.items)]
    jobs = [partial(inspect, item) for item in items]
    looks = [
        look
        for look in outcomes(jobs, title="looking at images", num_threads=num_threads)
        if not isinstance(look, UserError)
    ]
    report = Report(found.name, looks, len(found.items), list(found.issues))
    for look in report.own:
        report.issues += look.issues
    _compare(report)
    _names(report)
    if (path := boxes or found.boxes) is not None:
        _boxes(report, path)
    report.issues += _about_the_whole(report)
    report.issues.sort(key=lambda issue: SEVERITIES.index(issue.severity))
    return report


def _where(look: Look) -> str:
    return look.item.split or "the set"


def _compare(report: Report) -> None:
    """The same pictures under two names: by bytes, then by pixels, then by what they show.

    Of several equal ones each is told with the first alone, and only that is compared by looks.
    """
    first_file: dict[str, int] = {}
    first_pixels: dict[str, int] = {}
    for k, look in enumerate(report.looks):
        if look.mark is None:
            continue
        same_pixels = first_pixels.setdefault(look.mark.pixels, k)
        same_file = first_file.setdefault(look.sha256, k)
        if same_file != k:
            report.matches.append(Match(same_file, k, SAME_FILE))
        elif same_pixels != k:
            report.matches.append(Match(same_pixels, k, SAME_PIXELS))
    different = sorted(first_pixels.values())
    for pair in near_pairs([mark for k in different if (mark := report.looks[k].mark) is not None]):
        report.matches.append(Match(different[pair.first], different[pair.second], NEAR, pair.correlation))
    report.matches = [match for match in report.matches if match.first < report.foreign]
    report.matches.sort(key=lambda match: not _across(report, match.first, match.second))
    for match in report.matches:
        one, other = report.looks[match.first], report.looks[match.second]
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
    return report.looks[first].item.split != report.looks[second].item.split or second >= report.foreign


def _isic(look: Look) -> str:
    """ISIC_NNNNNNN where the id holds one, else empty."""
    number = ISIC_ID.search(look.item.image_id)
    return number[0].upper() if number else ""


def _names(report: Report) -> None:
    """One id in two places: boxes are found by id, and ISIC's numbers stay the same over its editions."""
    held: dict[str, int] = {}
    matched = {(match.first, match.second) for match in report.matches}
    for k, look in enumerate(report.looks):
        number = _isic(look)
        name = number or look.item.image_id.lower()
        first = held.setdefault(name, k)
        if first == k or first >= report.foreign or (first, k) in matched:
            continue
        one = report.looks[first]
        if k >= report.foreign and not number:
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
                f"{look.item.path}: same {'ISIC number' if number else 'id'} as {one.item.path} (one in {_where(one)}, "
                f"the other in {_where(look)}): {remedy}",
                one.item.image_id,
            )
        )


def _boxes(report: Report, path: Path) -> None:
    """The two-box CSV: every faulty row, and boxes that do not fit the masks."""
    looks = {look.item.image_id: look for look in report.own if look.is_read}
    try:
        report.samples, problems = sound_boxes(report.own, path)
    except UserError as error:
        report.issues.append(Issue(ERROR, "boxes", str(error)))
        return
    report.issues += [Issue(ERROR, "boxes", f"{path}: {problem}") for problem in problems]
    by_image: dict[str, list[Sample]] = {}
    for sample in report.samples:
        by_image.setdefault(sample.image_id, []).append(sample)
    if without := len(looks) - len(by_image):
        report.issues.append(Issue(NOTE, "boxes", f"{path}: {without} of {len(looks)} images have no row"))
    for image_id, samples in progress(by_image.items(), total=len(by_image), title="comparing boxes and masks"):
        if looks[image_id].shares:
            _against_masks(report, path, looks[image_id].item, samples)


def sound_boxes(looks: Sequence[Look], path: Path) -> tuple[list[Sample], list[str]]:
    """Rows of a two-box CSV that fit the images, and a line of text for each that does not."""
    return scan_boxes(path, {look.item.image_id: _entry(look) for look in looks if look.is_read}, root=Path())


def _entry(look: Look) -> dict[str, Any]:
    """The image's row as the index would have it, as far as boxes are checked against it."""
    item = look.item
    lesions = {"lesions": {str(k): "" for k in range(len(item.objects))}} if item.objects else {}
    return {
        "split": {"val": "dev"}.get(item.split, item.split),
        "image_path": item.path.as_posix(),
        "mask_path": "",
        "width": look.width,
        "height": look.height,
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
        core = _cut(whole if own is None else own, sample.small_box)
        if core.size and (background := 1 - float(core.mean())) > BACKGROUND:
            report.issues.append(
                Issue(
                    WARNING,
                    "boxes",
                    f"{place}: {background:.0%} of the small box is not lesion in "
                    "the mask; it should lie inside the lesion",
                    sample.image_id,
                )
            )
        if own is None:
            continue
        total = int(np.count_nonzero(own))
        outside = 1 - np.count_nonzero(_cut(own, sample.big_box)) / max(1, total)
        if outside > OUTSIDE:
            report.issues.append(
                Issue(
                    WARNING,
                    "boxes",
                    f"{place}: {outside:.0%} of the lesion in the mask lies "
                    "outside the big box; it should hold the lesion",
                    sample.image_id,
                )
            )
        rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
        if total:
            sides = np.array([columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]], float)
            report.looseness.append(float(((sample.big_box[2:] - sample.big_box[:2]) / sides).mean() - 1))


def _cut(mask: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The pixels of a mask whose centres lie in a box; a view."""
    x0, y0, x1, y1 = (max(0, int(value)) for value in np.ceil(box - 0.5))
    return mask[y0:y1, x0:x1]


def _about_the_whole(report: Report) -> Iterator[Issue]:
    numbered = sum(bool(_isic(look)) for look in report.own)
    if numbered and report.foreign == len(report.looks):
        yield Issue(
            NOTE,
            "id",
            f"{numbered} images carry ISIC numbers: the editions of 2016, 2017 and 2018 share "
            "images, so compare with another edition you report on (--against FOLDER)",
        )
    for edition in EDITIONS.values():
        for look in report.own:
            if _isic(look) in edition.overlap:
                yield Issue(
                    NOTE,
                    "id",
                    f"{look.item.path}: {_isic(look)} is a training and a test image of ISIC "
                    f"{edition.year}; never train on it and report on that edition",
                    look.item.image_id,
                )
    masked = sum(bool(look.shares) for look in report.own)
    if masked == 0 and not report.samples:
        yield Issue(NOTE, "mask", "no masks and no boxes: training needs one or the other")


def summary(report: Report) -> list[str]:
    """The set in a few lines."""
    read = [look for look in report.own if look.is_read]
    counts = Counter(look.item.split for look in report.own)
    splits = ", ".join(f"{name or 'no split'} {counts[name]}" for name in report.splits())
    lines = [f"images    {len(report.own)} ({splits}), {len(read)} of them readable"]
    if read:
        sides = sorted((look.width * look.height, look.width, look.height) for look in read)
        lines.append(
            "sizes     "
            + ", ".join(
                f"{name} {sides[k][1]}x{sides[k][2]}"
                for name, k in (("smallest", 0), ("median", len(sides) // 2), ("largest", -1))
            )
            + " px"
        )
    shares = np.array([share for look in read for share in look.shares])
    if len(shares):
        masked = [look for look in read if look.shares]
        lines.append(
            f"masks     {len(masked)} images with {len(shares)} masks; a lesion covers {shares.min():.1%} to "
            f"{shares.max():.1%} of the image, median {np.median(shares):.1%}"
        )
        several = sum(look.pieces > len(look.shares) for look in masked)
        lines.append(f"          {sum(look.cut for look in masked)} cut by the frame, {several} in several pieces")
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

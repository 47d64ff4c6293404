"""Write the result of `data check` as one HTML page that opens offline, and `data show`'s contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lesionsam.data.check.checks import NEAR, SEVERITIES, Report, by_image, sound_boxes, summary
from lesionsam.data.check.image import Inspection, inspect
from lesionsam.data.check.items import ImageSet, Item
from lesionsam.data.index import id_hash
from lesionsam.errors import UserError
from lesionsam.overlays import overlay, sheet, write_png
from lesionsam.types import Sample
from lesionsam.utils.files import write_text_atomic
from lesionsam.utils.images import read_image
from lesionsam.utils.pages import jpeg_uri, render
from lesionsam.utils.progress import progress

SIDE, JPEG_QUALITY = 320, 80
MAX_ISSUES, MAX_PAIRS = 500, 24  # on the page


def write_page(report: Report, path: Path, *, num_pictures: int = 60) -> int:
    """Write the page and return its size in bytes.

    Args:
        num_pictures: images shown, those with errors and warnings first, the rest spread over the splits.
    """
    boxes = by_image(report.samples)
    shown = pick(report, num_pictures)
    pictures = [_figure(seen, boxes, report) for seen in progress(shown, total=len(shown), title="drawing pictures")]
    pairs = [
        {
            "title": f"{match.kind}, correlation {match.correlation:.2f}" if match.kind == NEAR else match.kind,
            "pictures": [
                _figure(report.inspections[k], boxes, report, with_issues=False) for k in (match.first, match.second)
            ],
        }
        for match in report.matches[:MAX_PAIRS]
    ]
    text = render(
        "lesionsam.data.check",
        "data_check.html",
        set_name=report.name,
        lines=summary(report),
        counts=[(name, report.count(name)) for name in SEVERITIES],
        issues=report.issues[:MAX_ISSUES],
        more_issues=max(0, len(report.issues) - MAX_ISSUES),
        pairs=pairs,
        more_pairs=max(0, len(report.matches) - MAX_PAIRS),
        pictures=pictures,
        num_images=len(report.own),
        with_boxes=bool(report.samples),
    )
    write_text_atomic(path, text)
    return len(text.encode())


def pick(report: Report, count: int) -> list[Inspection]:
    """Select readable images to show: those with errors, then warnings, then others ordered by hash."""
    severity: dict[str, int] = {}
    for issue in report.issues:
        rank = SEVERITIES.index(issue.severity)
        severity[issue.image_id] = min(rank, severity.get(issue.image_id, rank))
    readable = [seen for seen in report.own if seen.is_read]
    return sorted(
        readable, key=lambda seen: (severity.get(seen.item.image_id, len(SEVERITIES)), id_hash(seen.item.image_id))
    )[:count]


def _figure(
    seen: Inspection, boxes: dict[str, list[Sample]], report: Report, *, with_issues: bool = True
) -> dict[str, Any]:
    item = seen.item
    issues = [issue for issue in report.issues if issue.image_id == item.image_id] if with_issues else []
    facts = [
        f"{seen.width}x{seen.height} px",
        *(f"{share:.1%}" for share in seen.shares[:3]),
        *(["cut by the frame"] if seen.cut else []),
        *([f"{seen.pieces} pieces"] if seen.pieces > max(1, len(seen.shares)) else []),
    ]
    return {
        "uri": jpeg_uri(Image.fromarray(draw(item, boxes.get(item.image_id, []), SIDE)), JPEG_QUALITY),
        "title": item.image_id,
        "split": item.split,
        "facts": " · ".join(facts),
        "issues": issues,
    }


def draw(item: Item, samples: Sequence[Sample], side: int, caption: str | None = None) -> np.ndarray:
    """Draw the valid masks and boxes on an image; (h, w, 3) uint8."""
    image = read_image(item.path)
    height, width = image.shape[:2]
    truth = None
    for number in range(len(item.masks) + len(item.objects)):
        try:
            mask = item.lesion_mask(number, width, height)
        except UserError:
            continue  # told among the issues
        truth = mask if truth is None else truth | mask
    big, small = (np.array([getattr(s, name) for s in samples]).reshape(-1, 4) for name in ("big_box", "small_box"))
    return overlay(image, truth=truth, big=big, small=small, caption=caption, max_side=side)


def write_sheet(
    found: ImageSet, path: Path, *, ids: Sequence[str], boxes: Path | None, count: int, columns: int
) -> int:
    """Write a contact sheet of some images with masks and boxes; return their number.

    Args:
        ids: those wanted, in this order; none: `count` of all, in an order that no name decides.
        boxes: a two-box CSV; None: the set's own, if it has one.
    Raises:
        UserError: an id that is not in the set, or an image that cannot be read.
    """
    known = {item.image_id: item for item in found.items}
    if missing := [name for name in ids if name not in known]:
        raise UserError(f"{found.name}: no image {missing[0]!r} among its {len(known)}")
    chosen = [known[name] for name in ids] or sorted(found.items, key=lambda item: id_hash(item.image_id))[:count]
    inspections = [inspect(item) for item in progress(chosen, total=len(chosen), title="reading images")]
    if unread := [seen for seen in inspections if not seen.is_read]:
        raise UserError(unread[0].issues[0].text)
    table = boxes or found.boxes
    held = by_image(sound_boxes(inspections, table)[0]) if table is not None else {}
    pictures = []
    for seen in progress(inspections, total=len(inspections), title="drawing pictures"):
        facts = [seen.item.split or "no split", f"{seen.width}x{seen.height}", *(f"{s:.1%}" for s in seen.shares[:3])]
        lines = [seen.item.image_id, " · ".join(facts), *(issue.text.partition(": ")[2] for issue in seen.issues[:1])]
        pictures.append(draw(seen.item, held.get(seen.item.image_id, []), SIDE, "\n".join(lines)))
    write_png(path, sheet(pictures, columns, f"{found.name}: {len(pictures)} of {len(known)} images", prediction=False))
    return len(pictures)

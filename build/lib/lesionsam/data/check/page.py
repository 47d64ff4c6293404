"""What `data check` found as one HTML page that opens offline, and `data show`'s sheet of pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from lesionsam.data.check.checks import NEAR, SEVERITIES, Report, sound_boxes, summary
from lesionsam.data.check.image import Look, inspect
from lesionsam.data.check.items import Found, Item
from lesionsam.data.index import id_hash
from lesionsam.errors import UserError
from lesionsam.overlays import overlay, sheet, write_png
from lesionsam.types import Sample
from lesionsam.utils.files import write_text_atomic
from lesionsam.utils.images import read_image
from lesionsam.utils.progress import progress

SIDE, JPEG_QUALITY = 320, 80
MAX_ISSUES, MAX_PAIRS = 500, 24  # on the page
BARS = 20


def write_page(report: Report, path: Path, *, num_pictures: int = 60) -> int:
    """Write the page; its size, bytes.

    Args:
        num_pictures: images shown, those with errors and warnings first, the rest spread over the splits.
    """
    boxes = _boxes_of(report.samples)
    shown = pick(report, num_pictures)
    pictures = [_figure(look, boxes, report) for look in progress(shown, total=len(shown), title="drawing pictures")]
    pairs = [
        {
            "title": f"{match.kind}, correlation {match.correlation:.2f}" if match.kind == NEAR else match.kind,
            "pictures": [
                _figure(report.looks[k], boxes, report, with_issues=False) for k in (match.first, match.second)
            ],
        }
        for match in report.matches[:MAX_PAIRS]
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = (resources.files("lesionsam.data.check.checks") / "templates" / "data_check.html").read_text(
        encoding="utf-8"
    )
    text = environment.from_string(source).render(
        name=report.name,
        lines=summary(report),
        counts=[(name, report.count(name)) for name in SEVERITIES],
        table=_table(report),
        charts=list(_charts(report)),
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


def pick(report: Report, count: int) -> list[Look]:
    """Readable images to show: those with errors, then warnings, then others in an order that no name decides."""
    severity: dict[str, int] = {}
    for issue in report.issues:
        rank = SEVERITIES.index(issue.severity)
        severity[issue.image_id] = min(rank, severity.get(issue.image_id, rank))
    seen = [look for look in report.own if look.is_read]
    return sorted(
        seen, key=lambda look: (severity.get(look.item.image_id, len(SEVERITIES)), id_hash(look.item.image_id))
    )[:count]


def _boxes_of(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.image_id, []).append(sample)
    return found


def _figure(look: Look, boxes: dict[str, list[Sample]], report: Report, *, with_issues: bool = True) -> dict[str, Any]:
    item = look.item
    issues = [issue for issue in report.issues if issue.image_id == item.image_id] if with_issues else []
    facts = [
        f"{look.width}x{look.height} px",
        *(f"{share:.1%}" for share in look.shares[:3]),
        *(["cut by the frame"] if look.cut else []),
        *([f"{look.pieces} pieces"] if look.pieces > max(1, len(look.shares)) else []),
    ]
    return {
        "uri": _uri(draw(item, boxes.get(item.image_id, []), SIDE)),
        "title": item.image_id,
        "split": item.split,
        "facts": " · ".join(facts),
        "issues": issues,
    }


def draw(item: Item, samples: Sequence[Sample], side: int, caption: str | None = None) -> np.ndarray:
    """(h, w, 3) uint8: the image with the masks and boxes that are sound drawn on it."""
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


def _uri(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _table(report: Report) -> list[list[str]]:
    """A row per split: images, with masks, lesions, cut, pieces, sizes."""
    rows = [
        [
            "split",
            "images",
            "readable",
            "with mask",
            "lesions",
            "median share",
            "cut by the frame",
            "in several pieces",
            "median size",
        ]
    ]
    for split in report.splits():
        looks = [look for look in report.own if look.item.split == split]
        read = [look for look in looks if look.is_read]
        shares = [share for look in read for share in look.shares]
        middle = sorted((look.width * look.height, look.width, look.height) for look in read)[len(read) // 2 :][:1]
        rows.append(
            [
                split or "(none)",
                str(len(looks)),
                str(len(read)),
                str(sum(bool(look.shares) for look in read)),
                str(len(shares)),
                f"{np.median(shares):.1%}" if shares else "",
                str(sum(look.cut for look in read)),
                str(sum(look.pieces > max(1, len(look.shares)) for look in read)),
                *(f"{width}x{height}" for _, width, height in middle),
            ]
        )
    return rows


def _charts(report: Report) -> Iterable[dict[str, Any]]:
    """Histograms as bars of heights in percent of the highest."""
    shares = [share for look in report.own for share in look.shares]
    sides = [max(look.width, look.height) for look in report.own if look.is_read]
    for title, values, unit in (
        ("Share of the image that a lesion covers", np.array(shares) * 100, "%"),
        ("Longer side of the images", np.array(sides, float), "px"),
        ("Big box larger than the lesion by", np.array(report.looseness) * 100, "%"),
    ):
        if len(values) > 1 and np.ptp(values) > 0:
            counts, edges = np.histogram(values, BARS)
            yield {
                "title": title,
                "low": f"{edges[0]:.0f} {unit}",
                "high": f"{edges[-1]:.0f} {unit}",
                "bars": [
                    {
                        "height": round(100 * count / counts.max()),
                        "count": int(count),
                        "range": f"{low:.3g} to {high:.3g} {unit}",
                    }
                    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
                ],
            }


def write_sheet(found: Found, path: Path, *, ids: Sequence[str], boxes: Path | None, count: int, columns: int) -> int:
    """Write a contact sheet of some images with masks and boxes; how many are on it.

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
    looks = [inspect(item) for item in progress(chosen, total=len(chosen), title="reading images")]
    if unread := [look for look in looks if not look.is_read]:
        raise UserError(unread[0].issues[0].text)
    table = boxes or found.boxes
    held = _boxes_of(sound_boxes(looks, table)[0]) if table is not None else {}
    pictures = []
    for look in progress(looks, total=len(looks), title="drawing pictures"):
        facts = [look.item.split or "no split", f"{look.width}x{look.height}", *(f"{s:.1%}" for s in look.shares[:3])]
        lines = [look.item.image_id, " · ".join(facts), *(issue.text.partition(": ")[2] for issue in look.issues[:1])]
        pictures.append(draw(look.item, held.get(look.item.image_id, []), SIDE, "\n".join(lines)))
    write_png(path, sheet(pictures, columns, f"{found.name}: {len(pictures)} of {len(known)} images", prediction=False))
    return len(pictures)

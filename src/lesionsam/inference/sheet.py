"""Write the contact sheet of a prediction: pages of all pictures, doubtful ones first, that open without a network.

Rows are streamed twice, so that memory does not grow with their number; pages link to the pictures in `overlays/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from html import escape
from itertools import chain, islice
from pathlib import Path
from urllib.parse import quote

from lesionsam.inference.outputs import COLUMN_GUIDE, TABLE, Row
from lesionsam.utils.files import atomic_write

PAGE_ROWS = 200  # pictures on a page
SHEET = "index.html"
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Predictions</title><style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem; color: #222; background: #fff }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid #ccc; border-radius: 6px; padding: .5rem; overflow-wrap: anywhere }
figure.review { border: 2px solid #b35900 } figure.review p { color: #8a4500 }
img { width: 100%; height: 220px; object-fit: contain; background: #eee } p { margin: .25rem 0 }
th { text-align: left; padding-right: 1rem; vertical-align: top } nav { margin: 1rem 0 }
</style></head><body><h1>Predictions</h1>
"""


def write_sheet(out: Path, rows: Callable[[], Iterable[Row]]) -> None:
    """Write index.html, index-2.html, ... into the folder of a prediction; `rows` is called three times."""
    total = doubtful = 0
    for row in rows():
        total, doubtful = total + 1, doubtful + bool(row["review_reasons"])
    for path in out.glob("index*.html"):
        if path.name == SHEET or path.stem.removeprefix("index-").isdecimal():
            path.unlink()
    if not total:
        return
    num_pages = -(-total // PAGE_ROWS)
    ordered = chain(_with_reasons(rows(), True), _with_reasons(rows(), False))
    for number in range(1, num_pages + 1):
        with atomic_write(out / _page_name(number), "w") as file:
            file.write(HEAD)
            file.write(
                f"<p>{total} masks, {doubtful} of them to review; these come first, with an orange frame. A click "
                f"opens the picture. Not a medical device.</p>\n{_navigation(number, num_pages)}<main>\n"
            )
            for row in islice(ordered, PAGE_ROWS):
                file.write(_figure(out, row))
            file.write(f"</main>\n{_navigation(number, num_pages)}{_guide()}</body></html>\n")


def _with_reasons(rows: Iterable[Row], wanted: bool) -> Iterator[Row]:
    return (row for row in rows if bool(row["review_reasons"]) == wanted)


def _page_name(number: int) -> str:
    return SHEET if number == 1 else f"index-{number}.html"


def _navigation(number: int, num_pages: int) -> str:
    """Return links to the first, previous, next and last page; empty for one page."""
    if num_pages == 1:
        return ""
    targets = {"first": 1, "previous": number - 1, "next": number + 1, "last": num_pages}
    links = [
        f'<a href="{_page_name(target)}">{name}</a>'
        for name, target in targets.items()
        if 1 <= target <= num_pages and target != number
    ]
    return f"<nav>page {number} of {num_pages}: {' '.join(links)}</nav>\n"


def _figure(out: Path, row: Row) -> str:
    """Return a picture with its name, size and reasons; the mask takes the place of a picture that is not there."""
    name = row["image_id"] + (f" / {row['lesion_id']}" if row["lesion_id"] not in ("", "0") else "")
    area = f"{row['area_mm2']} mm<sup>2</sup>" if row["area_mm2"] else f"{row['area']} px"
    picture = ""
    if row["mask"]:
        shown = "overlays/" + row["mask"].removeprefix("masks/")
        source = quote(shown if (out / shown).is_file() else row["mask"])
        picture = f'<a href="{source}"><img loading="lazy" src="{source}" alt="{escape(name)}"></a>'
    score = f", predicted IoU {float(row['predicted_iou']):.2f}" if row["predicted_iou"] else ""
    reasons = f"<p>{escape(row['review_reasons'])}</p>" if row["review_reasons"] else ""
    kind = ' class="review"' if row["review_reasons"] else ""
    return f"<figure{kind}>{picture}<p><b>{escape(name)}</b>: {area}{score}</p>{reasons}</figure>\n"


def _guide() -> str:
    """Return what the columns of the table mean."""
    rows = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>\n" for name, text in COLUMN_GUIDE.items())
    return f"<h2>Columns of {TABLE}</h2>\n<table>\n{rows}</table>\n"

"""Images that an annotator marked as without a lesion or as undecidable, read from the journal beside a boxes table."""

from __future__ import annotations

import json
from pathlib import Path

WITHOUT_BOXES = {"no_lesion": "no lesion", "cannot_tell": "cannot tell"}  # marks of the annotation page, in words


def journal_path(table_path: Path) -> Path:
    """Return the journal beside a table: boxes.csv -> boxes.journal.jsonl."""
    return table_path.with_name(f"{table_path.stem}.journal.jsonl")


def marked_images(table_path: Path) -> dict[str, str]:
    """Return image_id -> mark, of `WITHOUT_BOXES`, for the images that are marked so and have no boxes.

    A line of the journal holds the whole state of an image; its last line counts. Damaged lines, which the annotation
    page reports, are skipped.
    """
    marks: dict[str, str] = {}
    try:
        lines = journal_path(table_path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return marks
    for line in lines:
        try:
            state = json.loads(line)
            image_id, mark = state["image_id"], "" if state.get("lesions") else state.get("mark", "")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        marks.pop(image_id, None)
        if mark in WITHOUT_BOXES:
            marks[image_id] = mark
    return marks

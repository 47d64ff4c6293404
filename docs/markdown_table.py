"""Cells and tables in Markdown."""

from __future__ import annotations

import re


def cell(text: object) -> str:
    """Return a text for a cell of a Markdown table: code spans as they are, other special characters escaped."""
    parts = re.split(r"(`[^`]+`)", " ".join(str(text).split()))
    plain = [part if k % 2 else re.sub(r"([\\*_<\[\]{}$~])", r"\\\1", part) for k, part in enumerate(parts)]
    return "".join(plain).replace("|", r"\|")


def code(text: object) -> str:
    """Return a text as a code span for a cell, nothing for an empty text."""
    return f"`{text}`".replace("|", r"\|") if str(text) else ""


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table of cells that are Markdown already."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

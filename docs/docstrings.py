"""Split the arguments of a docstring that share a line: napoleon reads one argument a line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

SECTION = re.compile(r"(\s*)(Args|Attributes):$")
ENTRY = re.compile(r"(?:(?<=[.;?!)])|^) ?(?=(\*{0,2}\w+(?:, \*{0,2}\w+)*): )")


def names_of(value: object) -> set[str]:
    """Return the names of a function's or a class's arguments and of a class's annotated attributes."""
    names: set[str] = set(getattr(value, "__annotations__", {}))
    with suppress(TypeError, ValueError):  # not callable, or without a signature
        names |= set(inspect.signature(value).parameters)  # pyright: ignore[reportArgumentType]
    return names


def separated(lines: Sequence[str], names: Collection[str]) -> list[str]:
    """Return a docstring's lines with each of these arguments and attributes on a line of its own."""
    shown: list[str] = []
    rest = list(lines)
    while rest:
        line = rest.pop(0)
        shown.append(line)
        if match := SECTION.match(line):
            indent, inside = len(match[1]), []
            while rest and rest[0].strip() and len(rest[0]) - len(rest[0].lstrip()) > indent:
                inside.append(rest.pop(0).strip())
            shown += [f"{' ' * (indent + 4)}{entry}" for entry in _entries(" ".join(inside), names)]
    return shown


def _entries(text: str, names: Collection[str]) -> Iterable[str]:
    """Yield "name: description" for each argument in the text of a section."""
    start = 0
    for match in ENTRY.finditer(text):
        if match.end() and all(name.lstrip("*") in names for name in match[1].split(", ")):
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]

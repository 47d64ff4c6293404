"""JSON and XML from elsewhere: of bounded size and depth, without entities, with one clear line for what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Document types and entities are refused below, size and depth are bounded.
from xml.parsers import expat  # nosec B407

from lesionsam.errors import UserError
from lesionsam.utils.files import decimal_number

MAX_BYTES = 1 << 30  # COCO's own training file has half of that
MAX_DEPTH = 32


def read_bytes(path: Path, expected: str) -> bytes:
    """A file's content.

    Raises:
        UserError: missing, a folder, empty, or above `MAX_BYTES`.
    """
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise UserError(f"{path}: is a folder; expected {expected}")
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size / 1e9:.1f} GB; expected {expected} of at most {MAX_BYTES / 1e9:.1f} GB")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected {expected}") from None
    if not data.strip():
        raise UserError(f"{path}: empty; expected {expected}")
    return data


def read_json(path: Path, expected: str) -> Any:
    """A JSON document; NaN and infinity, which JSON does not know, are refused."""
    data = read_bytes(path, expected)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); expected {expected}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected {expected}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON ({error.msg}); expected {expected}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; expected {expected}") from None


@dataclass
class Element:
    """An XML element: its attributes, its own text, and the elements inside it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> Iterator[Element]:
        """The direct children of a tag."""
        return (child for child in self.children if child.tag == tag)

    def first(self, *path: str) -> Element | None:
        """The first element at a path of tags below this one."""
        found: Element | None = self
        for tag in path:
            found = next(found.all(tag), None) if found is not None else None
        return found


def read_xml(path: Path, expected: str) -> Element:
    """The root of an XML document.

    Raises:
        UserError: not XML, deeper than `MAX_DEPTH`, or with a document type or entities of its own, which are never
            expanded.
    """
    data = read_bytes(path, expected)
    parser = expat.ParserCreate()
    top = Element("", {})
    stack = [top]

    def start(tag: str, attributes: dict[str, str]) -> None:
        if len(stack) > MAX_DEPTH:
            raise UserError(
                f"{path}: line {parser.CurrentLineNumber}: elements nested deeper than {MAX_DEPTH}; expected {expected}"
            )
        element = Element(tag, attributes)
        stack[-1].children.append(element)
        stack.append(element)

    def text(piece: str) -> None:
        stack[-1].text += piece

    def refuse(*_: object) -> None:
        raise UserError(
            f"{path}: line {parser.CurrentLineNumber}: holds a document type or entities (<!DOCTYPE, "
            f"<!ENTITY), which are refused; expected {expected} as its tool exports it"
        )

    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise UserError(
            f"{path}: line {error.lineno}: not XML ({expat.errors.messages[error.code]}); expected {expected}"
        ) from None
    except (LookupError, ValueError) as error:
        raise UserError(f"{path}: {error}; expected {expected} in UTF-8") from None
    return top.children[0]


def number(value: object, place: str) -> float:
    """A finite number out of JSON or of an attribute's text; `place` begins the UserError otherwise."""
    try:
        found = math.nan
        if isinstance(value, str):
            found = decimal_number(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found = float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{place}: expected a finite number, got {str(value)[:40]!r}")
    return found

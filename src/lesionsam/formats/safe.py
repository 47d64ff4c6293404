"""Read untrusted JSON and XML: bounded size, no entities, one clear line for a fault."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

# Document types and entities are refused below, the size is bounded.
from xml.etree.ElementTree import Element, TreeBuilder  # nosec B405
from xml.parsers import expat  # nosec B407

from lesionsam.errors import UserError
from lesionsam.utils.files import decimal_number

MAX_BYTES = 1 << 30  # COCO's own training file has half of that


def read_bytes(path: Path, expected: str) -> bytes:
    """Read a file.

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
    """Read a JSON document; NaN and infinity are refused."""
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


def read_xml(path: Path, expected: str) -> Element:
    """Read an XML document and return its root.

    Raises:
        UserError: not XML, or with a document type or entities of its own, which are never expanded.
    """
    return parse_xml(read_bytes(path, expected), str(path), expected)


def parse_xml(data: bytes, place: str, expected: str) -> Element:
    """Parse an XML document and return its root; `place` begins the UserError otherwise, see `read_xml`."""
    parser, builder = expat.ParserCreate(), TreeBuilder()

    def refuse(*_: object) -> None:
        raise UserError(
            f"{place}: line {parser.CurrentLineNumber}: holds a document type or entities (<!DOCTYPE, "
            f"<!ENTITY), which are refused; expected {expected} as its tool exports it"
        )

    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise UserError(
            f"{place}: line {error.lineno}: not XML ({expat.errors.messages[error.code]}); expected {expected}"
        ) from None
    except (LookupError, ValueError) as error:
        raise UserError(f"{place}: {error}; expected {expected} in UTF-8") from None
    return builder.close()


def number(value: object, place: str) -> float:
    """Return a finite number from JSON or from an attribute's text; `place` begins the UserError otherwise."""
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

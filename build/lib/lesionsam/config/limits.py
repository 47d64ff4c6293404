"""What each key of params.yaml takes, read off the schema: for messages, for search spaces, for comments.

Everything here works on plain nested values, valid or not; which keys there are depends on the variants they choose.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lesionsam.config.schema import Config

KINDS: dict[Any, str] = {int: "integer", float: "number", bool: "boolean", str: "text"}
BOUNDS = {
    annotated_types.Ge: ("ge", "low", False),
    annotated_types.Gt: ("gt", "low", True),
    annotated_types.Le: ("le", "high", False),
    annotated_types.Lt: ("lt", "high", True),
}


@dataclass(frozen=True)
class Limits:
    """What a key takes.

    Attributes:
        key: dotted, as in params.yaml.
        kind: integer | number | boolean | text | choice | list | section.
        low, high: bounds of a number, or of a list's items; None where there is none.
        low_open, high_open: the bound itself is out.
        choices: words that are taken; beside a number where kind is number, as the items where kind is list.
        form: what a text must look like, where that matters.
        description: the comment of the key, with its unit.
    """

    key: str
    kind: str
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    choices: tuple[str, ...] = ()
    form: str = ""
    description: str = ""

    @property
    def expected(self) -> str:
        """In words, for a message: "an integer from 1 to 64"."""
        if self.kind == "choice":
            return self.choices[0] if len(self.choices) == 1 else "one of " + ", ".join(self.choices)
        if self.kind == "list":
            return self.form or "a list of " + (", ".join(self.choices) if self.choices else "numbers" + self._range())
        names = {
            "integer": "an integer",
            "number": "a number",
            "boolean": "true or false",
            "section": "a section of keys",
            "text": self.form or "a text",
        }
        return (", ".join(self.choices) + " or " if self.choices else "") + names[self.kind] + self._range()

    def _range(self) -> str:
        low = None if self.low is None else f"{self.low:.15g}"
        high = None if self.high is None else f"{self.high:.15g}"
        if low and low == high:
            return f" ({low})"
        if low and high and not (self.low_open or self.high_open):
            return f" from {low} to {high}"
        parts = [f"{'above' if self.low_open else 'of at least'} {low}"] if low else []
        parts += [f"{'below' if self.high_open else 'of at most'} {high}"] if high else []
        return " " + " and ".join(parts) if parts else ""


def sections_of(field: FieldInfo) -> tuple[type[BaseModel], ...]:
    """The section classes a field may hold: none for a leaf, several for a section with variants."""
    return tuple(part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel))


def fields_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields of a section by the names that params.yaml uses, in order."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def tag_name(field: FieldInfo) -> str:
    """The key that picks a section's variant, empty where there are no variants."""
    return field.discriminator if isinstance(field.discriminator, str) else ""


def tags_of(section: type[BaseModel], tag: str) -> tuple[str, ...]:
    """The words of key `tag` that pick this variant."""
    return get_args(fields_of(section)[tag].annotation)


def all_tags(field: FieldInfo) -> tuple[str, ...]:
    """The words that pick a variant of a section, over all variants."""
    return tuple(word for section in sections_of(field) for word in tags_of(section, tag_name(field)))


def variant_of(field: FieldInfo, value: object) -> type[BaseModel] | None:
    """The section class that a value of this field is, None for a leaf and where nothing tells."""
    sections, tag = sections_of(field), tag_name(field)
    if not tag:
        return sections[0] if sections else None
    word = value.get(tag) if isinstance(value, Mapping) else None
    return next((section for section in sections if word in tags_of(section, tag)), None)


def walk(values: Mapping[str, Any]) -> Iterator[tuple[str, FieldInfo, Limits]]:
    """Every key, sections included, that a configuration with these variants has, in the schema's order."""

    def section(
        model: type[BaseModel], held: object, prefix: str, tag: str, words: tuple[str, ...]
    ) -> Iterator[tuple[str, FieldInfo, Limits]]:
        for name, field in fields_of(model).items():
            yield prefix + name, field, limits_of(prefix + name, field, words if name == tag else ())
            value = held.get(name) if isinstance(held, Mapping) else None
            if (child := variant_of(field, value)) is not None:
                inner = tag_name(field)
                yield from section(child, value, f"{prefix}{name}.", inner, all_tags(field) if inner else ())

    return section(Config, values, "", "", ())


def limits_of(key: str, field: FieldInfo, choices: tuple[str, ...] = ()) -> Limits:
    """Limits of one field; `choices` replaces its own words, for the key that picks a variant."""
    if sections_of(field):
        return Limits(key, "section", description=field.description or "")
    annotation, constraints, words, kind = field.annotation, list(field.metadata), list(choices), ""
    if get_origin(annotation) is tuple:
        annotation, kind = get_args(annotation)[0], "list"
    for part in _parts(annotation):
        if hasattr(part, "__metadata__"):  # Annotated[float, Field(ge=...)]
            constraints += part.__metadata__
            part = part.__origin__
        if get_origin(part) is Literal:
            words = words or [str(word) for word in get_args(part)]
        else:
            kind = kind or KINDS[part]
    bounds: dict[str, Any] = {}
    flat = [inner for outer in constraints for inner in getattr(outer, "metadata", [outer])]
    for constraint in flat:
        if type(constraint) in BOUNDS:
            attribute, name, is_open = BOUNDS[type(constraint)]
            bounds |= {name: getattr(constraint, attribute), f"{name}_open": is_open}
    filled = any(isinstance(constraint, annotated_types.MinLen) for constraint in flat)
    return Limits(
        key,
        kind or "choice",
        choices=tuple(words),
        description=field.description or "",
        form=field.title or ("a text that is not empty" if filled else ""),
        **bounds,
    )


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type, or the type alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def needed_for(key: str) -> list[dict[str, tuple[str, ...]]]:
    """What a dotted key needs to be read, over all variants: [{key that picks a variant: the words that do}, ...].

    No entry: no variant has such a key. An empty dictionary: always read.
    """

    def below(model: type[BaseModel], names: list[str], prefix: str) -> Iterator[dict[str, tuple[str, ...]]]:
        field = fields_of(model).get(names[0])
        if field is None:
            return
        if len(names) == 1:
            yield {}
            return
        tag = tag_name(field)
        for section in sections_of(field):
            own = {f"{prefix}{names[0]}.{tag}": tags_of(section, tag)} if tag else {}
            yield from (own | more for more in below(section, names[1:], f"{prefix}{names[0]}."))

    return list(below(Config, key.split("."), ""))


def explain_unknown(key: str, values: Mapping[str, Any]) -> str:
    """Why a key is not known under these values, and which one is meant."""
    known = [known for known, _, _ in walk(values)]
    parent, _, leaf = key.rpartition(".")
    held: Any = values
    for name in parent.split(".") if parent else ():
        held = held.get(name) if isinstance(held, Mapping) else None
    holder = next((field for name, field, _ in walk(values) if name == parent), None)
    if holder is not None and tag_name(holder):
        readers = [section for section in sections_of(holder) if leaf in fields_of(section)]
        if readers and isinstance(held, Mapping):
            tag = tag_name(holder)
            words = " or ".join(word for section in readers for word in tags_of(section, tag))
            return f"read only when {parent}.{tag} is {words}, got {held.get(tag)}; remove it"
    siblings = [other for other in known if other.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(leaf, [other.rpartition(".")[2] for other in siblings], n=1, cutoff=0.6)
    if near:  # of several as near, one that is missing is meant
        matcher = difflib.SequenceMatcher(b=key)

        def nearness(other: str) -> tuple[float, bool]:
            matcher.set_seq1(other)
            return matcher.ratio(), isinstance(held, Mapping) and other.rpartition(".")[2] not in held

        near = [max(siblings, key=nearness)]
    near = (
        near
        or [other for other in known if leaf == other.rpartition(".")[2]]
        or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    )
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key; remove it"

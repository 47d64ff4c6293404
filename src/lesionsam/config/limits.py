"""What each key of params.yaml accepts, read from the JSON schema of `Config`, for messages and search spaces.

The functions take plain nested values, valid or not. Which keys exist depends on the variants that the values select.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from lesionsam.config.schema import Config
from lesionsam.config.schema_method import OLD_WEIGHTS

KINDS = {"integer": "integer", "number": "number", "boolean": "boolean", "string": "text"}
Node = Mapping[str, Any]  # of the JSON schema


@dataclass(frozen=True)
class Limits:
    """What a key accepts.

    Attributes:
        key: dotted, as in params.yaml.
        kind: integer | number | boolean | text | choice | list | section.
        low, high: bounds of a number or of a list's items; None where there is none.
        low_open, high_open: whether the bound itself is excluded.
        choices: accepted words; beside numbers where kind is number, as items where kind is list.
        form: expected form of a text, where that matters.
        description: comment of the key, with its unit.
        example: initial value of a key that the default file lacks.
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
    example: Any = None

    @property
    def expected(self) -> str:
        """Return the limits in words, for a message: "an integer from 1 to 64"."""
        words = ", ".join(self.choices)
        if self.kind == "choice":
            return f"one of {words}" if len(self.choices) > 1 else words
        names = {
            "integer": "an integer",
            "number": "a number",
            "boolean": "true or false",
            "section": "a section of keys",
        }
        names |= {"text": self.form or "a text", "list": self.form or f"a list of {words or 'numbers'}"}
        before = f"{words} or " if words and self.kind == "number" else ""
        return before + names[self.kind] + self._range()

    def _range(self) -> str:
        low, high = ("" if bound is None else f"{bound:.15g}" for bound in (self.low, self.high))
        if low and low == high:
            return f" ({low})"
        if low and high and not (self.low_open or self.high_open):
            return f" from {low} to {high}"
        parts = [f"{'above' if self.low_open else 'of at least'} {low}"] if low else []
        parts += [f"{'below' if self.high_open else 'of at most'} {high}"] if high else []
        return " " + " and ".join(parts) if parts else ""


class _InOrder(GenerateJsonSchema):
    """Keep the order of the classes and only those titles that a field sets."""

    def sort(self, value: Any, parent_key: str | None = None) -> Any:
        return value

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def schema() -> Node:
    """Return the JSON schema of params.yaml."""
    return Config.model_json_schema(schema_generator=_InOrder)


def variants(node: Node) -> dict[str, Node]:
    """Return the sections that a key may hold: word -> section, "" -> the one without variants, nothing for a leaf."""
    references = (
        node["discriminator"]["mapping"] if "discriminator" in node else {"": node["$ref"]} if "$ref" in node else {}
    )
    return {word: schema()["$defs"][reference.rpartition("/")[2]] for word, reference in references.items()}


def tag_name(node: Node) -> str:
    """Return the name of the key that selects a section's variant, empty where there are no variants."""
    return node["discriminator"]["propertyName"] if "discriminator" in node else ""


def variant_of(node: Node, value: object) -> Node | None:
    """Return the section that a value of this key is, None for a leaf and for an unknown variant."""
    word = value.get(tag_name(node)) if isinstance(value, Mapping) and tag_name(node) else ""
    return variants(node).get(word) if isinstance(word, str) else None


def walk(values: Mapping[str, Any]) -> Iterator[tuple[str, Limits]]:
    """Yield every dotted key, sections included, of a configuration with these variants, in the schema's order."""

    def section(
        node: Node, held: object, prefix: str, tag: str, words: tuple[str, ...]
    ) -> Iterator[tuple[str, Limits]]:
        for name, child in node["properties"].items():
            key, value = prefix + name, held.get(name) if isinstance(held, Mapping) else None
            yield key, limits_of(key, child, words if name == tag else ())
            if (below := variant_of(child, value)) is not None:
                yield from section(below, value, f"{key}.", tag_name(child), tuple(variants(child)))

    return section(schema(), values, "", "", ())


def limits_of(key: str, node: Node, choices: tuple[str, ...] = ()) -> Limits:
    """Return the limits of one key; `choices` replaces its words, for the key that selects a variant."""
    held = node.get("items", node)
    parts = held.get("anyOf", [held])
    words = choices or tuple(
        word for part in parts for word in part.get("enum", [part.get("const")]) if word is not None
    )
    free = next((part for part in parts if "enum" not in part and "const" not in part), {})
    kind = "list" if "items" in node else "section" if variants(node) else KINDS[free["type"]] if free else "choice"
    return Limits(
        key,
        kind,
        low=free.get("minimum", free.get("exclusiveMinimum")),
        high=free.get("maximum", free.get("exclusiveMaximum")),
        low_open="exclusiveMinimum" in free,
        high_open="exclusiveMaximum" in free,
        choices=words,
        form=node.get("title") or ("a text that is not empty" if free.get("minLength") else ""),
        description=node.get("description", ""),
        example=node.get("examples", [None])[0],
    )


def read_when(key: str, values: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """Return why the selected variants do not read a key that others do: the selecting key and the words it needs.

    None: the key is read, or no variant has it.
    """

    def has(section: Node, names: list[str]) -> bool:
        node = section["properties"].get(names[0])
        return node is not None and (not names[1:] or any(has(each, names[1:]) for each in variants(node).values()))

    section, held, names = schema(), values, key.split(".")
    for depth in range(1, len(names)):
        node = section["properties"].get(names[depth - 1], {})
        held = held.get(names[depth - 1]) if isinstance(held, Mapping) else None
        selected = variant_of(node, held)
        if selected is None:
            return None
        if not has(selected, names[depth:]):
            words = [word for word, each in variants(node).items() if has(each, names[depth:])]
            return (".".join([*names[:depth], tag_name(node)]), words) if words else None
        section = selected
    return None


def value_at(values: Any, key: str) -> Any:
    """Return the nested value of a dotted key, None where there is none."""
    for name in key.split(".") if key else ():
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def explain_unknown(key: str, values: Mapping[str, Any]) -> str:
    """Return why a key is unknown under these values, and which one may be meant."""
    if (needed := read_when(key, values)) is not None:
        return f"read only when {needed[0]} is {' or '.join(needed[1])}, got {value_at(values, needed[0])}; remove it"
    known = [name for name, _ in walk(values)]
    renamed = {f"method.{old}": f"method.weights.{new}" for names in OLD_WEIGHTS.values() for old, new in names.items()}
    if renamed.get(key) in known:
        return f"unknown key; did you mean {renamed[key]}?"
    parent, _, leaf = key.rpartition(".")
    held = value_at(values, parent)

    def likeness(other: str) -> tuple[float, bool]:  # of two that are as near, the missing one is meant
        name = other.rpartition(".")[2]
        return difflib.SequenceMatcher(None, name, leaf).ratio(), not isinstance(held, Mapping) or name not in held

    siblings = sorted((other for other in known if other.rpartition(".")[0] == parent), key=likeness, reverse=True)
    near = (
        [other for other in siblings[:1] if likeness(other)[0] >= 0.6]
        or [other for other in known if leaf == other.rpartition(".")[2]]
        or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    )
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key; remove it"

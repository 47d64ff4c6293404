"""params.yaml as a text: changing values, adding and removing keys, everything else kept as its owner wrote it.

YAML is parsed only for positions; the edits are made in the text itself, so comments, spacing and the spelling of what
does not change stay, and a difference shows the change alone.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node

from lesionsam.config.limits import fields_of, sections_of, tag_name, variant_of
from lesionsam.config.load import default_text, default_values, known_keys, likely_tag, parse_yaml, to_values, yaml_text
from lesionsam.config.schema import Config
from lesionsam.errors import UserError

COMMENT_COLUMN = 31  # from 0, where comments start, in a file that has none yet
Edit = tuple[int, int, str]  # start and end in the text, and what comes there


def to_yaml(config: Config) -> str:
    """The configuration as a params.yaml with its comments."""
    return edit_text(default_text(), to_values(config))


def edit_text(text: str, values: Mapping[str, Any], source: str = "params.yaml") -> str:
    """The text with exactly these values: changed ones replaced, others removed, missing ones added with comments.

    Args:
        text: a parameter file. values: nested plain values, the whole of what the file shall hold.
    Raises:
        UserError: the text is in a form that cannot be edited in place (anchors, merges, two keys on a line).
    """
    text = text if text.endswith("\n") else f"{text}\n"
    present = parse_yaml(text, source)
    root = YAML(typ="safe", pure=True).compose(text)
    columns = Counter(
        len(line) - len(after) - 1
        for line in text.splitlines()
        for before, mark, after in [line.partition("#")]
        if mark and before.strip()
    )
    comments = {key: limits.description for key, limits in known_keys(values).items()}
    writer = _Writer(text, comments, columns.most_common(1)[0][0] if columns else COMMENT_COLUMN)
    edits = list(enumerate(writer.section(root, present, values, "", 0)))
    # From the end of the text backwards; where several start at one place a replaced range goes before insertions.
    for _, (start, end, new) in sorted(edits, key=lambda e: (e[1][0], e[1][1] > e[1][0], e[0]), reverse=True):
        text = text[:start] + new + text[end:]
    try:
        as_asked = parse_yaml(text, source) == values
    except UserError:
        as_asked = False
    if not as_asked:
        raise UserError(
            f"{source}: expected one key per line, without anchors and merges, to change it in place, got "
            "another form; `lesionsam preset demo` into a new file gives one"
        )
    return text


@cache
def default_spelling() -> dict[str, tuple[str, Any]]:
    """Dotted key -> how the default file writes its value ("0.10", "5.0e-4"), and the value."""
    text, found = default_text(), {}

    def section(node: Node, values: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.value:
            held = values[key.value]
            if isinstance(held, Mapping):
                section(value, held, f"{prefix}{key.value}.")
            else:
                found[prefix + key.value] = (text[value.start_mark.index : value.end_mark.index], held)

    section(YAML(typ="safe", pure=True).compose(text), default_values(), "")
    return found


class _Writer:
    """Edits of one text, section by section."""

    def __init__(self, text: str, comments: Mapping[str, str], column: int) -> None:
        self.text, self.comments, self.column = text, comments, column

    def section(
        self, node: Node, present: Mapping[Any, Any], values: Mapping[str, Any], prefix: str, indent: int
    ) -> Iterator[Edit]:
        """Edits that turn the mapping at `node`, now `present`, into `values`; `prefix` is its key and a dot."""
        indent = next((key.start_mark.column for key, _ in node.value), indent)
        places: dict[str, int] = {}
        for (key, value), (raw_name, now) in zip(node.value, present.items(), strict=True):
            name = str(raw_name)
            lines = self._line_start(key.start_mark.index), self._line_end(key, value)
            places[name] = lines[1]
            on_one_line = value.end_mark.index > value.start_mark.index and (
                value.flow_style if isinstance(value, CollectionNode) else True
            )
            if name not in values:
                yield *lines, ""
            elif (
                isinstance(held := values[name], Mapping)
                and held
                and isinstance(value, MappingNode)
                and not value.flow_style
            ):
                yield from self.section(value, now, held, f"{prefix}{name}.", indent + 2)
            elif now != held or isinstance(now, bool) != isinstance(held, bool):
                if on_one_line and not isinstance(held, Mapping):
                    yield self._replaced(value, self._spelled(prefix + name, held))
                else:
                    yield *lines, self._lines(prefix, name, held, indent)
        place = self._line_start(node.start_mark.index)
        for name, held in values.items():
            if name in places:
                place = places[name]
            else:
                apart = not prefix and isinstance(held, Mapping) and self.text.startswith("\n", place)
                yield place, place, "\n" * apart + self._lines(prefix, name, held, indent)

    def _replaced(self, value: Node, new: str) -> Edit:
        """A value on its line; a comment behind it stays in its column, or comes back to the file's."""
        start, end = value.start_mark.index, self._end(value)
        if gap := re.match(r" +(?=#)", self.text[end:]):
            end += len(gap[0])
            column = min(end - self._line_start(end), self.column)
            new = f"{new} ".ljust(column - (start - self._line_start(start)))
        return start, end, f" {new}" if self.text[start - 1] == ":" else new

    def _lines(self, prefix: str, name: str, held: Any, indent: int) -> str:
        """Whole lines for a key, or for a section and all below it, with the schema's comments.

        What stands under a name with dots (a dimension of a search space) goes on the name's line.
        """
        key, is_section = prefix + name, isinstance(held, Mapping) and bool(held) and "." not in name
        line = f"{' ' * indent}{name}:" + ("" if is_section else f" {self._spelled(key, held)}")
        if self.comments.get(key):
            line = f"{line} ".ljust(self.column) + f"# {self.comments[key]}"
        below = held.items() if is_section else ()
        return "".join([f"{line}\n", *(self._lines(f"{key}.", sub, value, indent + 2) for sub, value in below)])

    def _spelled(self, key: str, value: Any) -> str:
        """A value as the default file writes it, where it is the default's."""
        text, default = default_spelling().get(key, ("", None))
        return text if text and default == value and type(default) is type(value) else yaml_text(value)

    def _end(self, node: Node) -> int:
        """Where a value ends; a block's own mark lies behind the comments that follow it."""
        if isinstance(node, CollectionNode) and not node.flow_style and node.value:
            last = node.value[-1]
            return max(self._end(part) for part in last) if isinstance(last, tuple) else self._end(last)
        end = node.end_mark.index
        return end - 1 if end > node.start_mark.index and self.text[end - 1] == "\n" else end

    def _line_start(self, index: int) -> int:
        return self.text.rfind("\n", 0, index) + 1

    def _line_end(self, key: Node, value: Node) -> int:
        """Start of the line after a key's value and comment."""
        empty = value.end_mark.index == value.start_mark.index
        newline = self.text.find("\n", key.end_mark.index if empty else self._end(value))
        return len(self.text) if newline < 0 else newline + 1


def fit(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values made to fit the variants they choose: missing keys at their start value, keys of other variants gone.

    Keys in the schema's order; unknown ones stay at the end, for validation to name.
    """
    return _fit(Config, values, default_values())


def _fit(
    model: type[BaseModel], values: Mapping[str, Any], default: Any, variants: tuple[type[BaseModel], ...] = ()
) -> dict[str, Any]:
    """One section; `variants` are the classes that it might be, this one among them."""
    fitted: dict[str, Any] = {}
    default = default if isinstance(default, Mapping) else {}
    for name, field in fields_of(model).items():
        start = default.get(name, field.examples[0] if field.examples else None)
        held = values.get(name, start)
        if sections_of(field) and isinstance(held, Mapping):
            if tag_name(field) and tag_name(field) not in held:
                held = {tag_name(field): likely_tag(field, held), **held}
            child = variant_of(field, held)
            # Also what the section of this name may hold under another variant of the section above.
            namesakes = [field, *(fields_of(variant)[name] for variant in variants if name in fields_of(variant))]
            readable = {key for one in namesakes for section in sections_of(one) for key in fields_of(section)}
            own = set(fields_of(child)) if child is not None else readable
            held = {key: value for key, value in held.items() if key in own or key not in readable}
            held = _fit(child, held, start, sections_of(field)) if child is not None else held
        fitted[name] = held
    return fitted | {name: value for name, value in values.items() if name not in fitted}


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with those of `overlay` on top."""
    merged = dict(base)
    for name, value in overlay.items():
        held = merged.get(name)
        merged[name] = merge(held, value) if isinstance(value, Mapping) and isinstance(held, Mapping) else value
    return merged


def difference(old: str, new: str, name: str) -> list[str]:
    """Lines of a unified difference, with one line of context."""
    names = f"{name} (now)", f"{name} (new)"
    return list(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, n=1, lineterm=""))

"""Change values of a params.yaml text and keep its comments: a ruamel.yaml round trip."""

from __future__ import annotations

import copy
import difflib
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import CommentMark
from ruamel.yaml.tokens import CommentToken

from lesionsam.config.limits import Node, schema, tag_name, value_at, variant_of, variants
from lesionsam.config.load import default_text, default_values, known_keys, likely_variant, parse_yaml, round_trip_yaml
from lesionsam.errors import UserError

COMMENT_COLUMN = 31  # from 0, of the comments in a file that has none yet
# Blank lines and lines of comments, with the indent of the key that follows.
LOOSE_LINES = re.compile(r"(?:^ *(?:#.*)?\n)+(?=( *)(?![-\s#])\S|\Z)", re.MULTILINE)
MARK = "~"  # begins the keys that stand for loose lines in the tree


def edit_text(text: str, values: Mapping[str, Any], source: str = "params.yaml") -> str:
    """Return the text with exactly these values: changed, removed, and added with the schema's comments.

    Args:
        text: a parameter file. values: nested plain values, everything that the file shall hold.
    Raises:
        UserError: the values cannot be changed one by one, such as those that anchors share.
    """
    parse_yaml(text, source)
    ends = (len(before) for before, mark, _ in (line.partition("#") for line in text.splitlines()) if mark and before)
    column = max(
        Counter(end for end in ends if end > 2).items(), key=lambda item: item[1], default=(COMMENT_COLUMN, 0)
    )[0]
    comments = {key: limits.description for key, limits in known_keys(values).items()}
    new = rewrite(text, lambda tree: _update(tree, values, "", comments, column))
    try:
        is_right = parse_yaml(new, source) == values
    except UserError:
        is_right = False
    if not is_right:
        raise UserError(
            f"{source}: expected plain values, got anchors, merges or another form that cannot be changed in place; "
            "write the values out, or let `lesionsam preset demo` write a new file"
        )
    return new


def rewrite(text: str, change: Callable[[CommentedMap], None]) -> str:
    """Return a valid YAML text after `change` has edited its tree.

    ruamel.yaml holds the lines between two keys behind the first one, and would remove them with it. Keys of their own
    stand for them meanwhile.
    """
    loose: list[str] = []

    def mark(match: re.Match[str]) -> str:
        loose.append(match[0])
        return f"{match[1] or ''}{MARK}{len(loose) - 1}: 0\n"

    yaml, stream = round_trip_yaml(), io.StringIO()
    tree = yaml.load(LOOSE_LINES.sub(mark, text if text.endswith("\n") else f"{text}\n"))
    yaml.map_indent = next((held.lc.col for held in tree.values() if _is_block(held) and held.lc.col), 2)
    change(tree)
    yaml.dump(tree, stream)
    return re.sub(rf"^ *{MARK}(\d+): 0\n", lambda found: loose[int(found[1])], stream.getvalue(), flags=re.MULTILINE)


def _is_block(node: object) -> bool:
    """Return whether a node is a section with a line for each key."""
    return isinstance(node, CommentedMap) and not node.fa.flow_style()


def _update(
    section: CommentedMap, values: Mapping[str, Any], prefix: str, comments: Mapping[str, str], column: int
) -> None:
    """Give a section these values; `prefix` is its key and a dot, `column` that of comments."""
    for name in [name for name in section if name not in values and not str(name).startswith(MARK)]:
        del section[name]
        section.ca.items.pop(name, None)
    place = 0
    for name, value in values.items():
        key, now = f"{prefix}{name}", section.get(name)
        if name in section and isinstance(value, Mapping) and value and isinstance(now, CommentedMap):
            _update(now, value, f"{key}.", comments if _is_block(now) else {}, column)
        elif name not in section:
            section.insert(place, name, _node(key, value, comments, column))
            _comment(section, name, comments.get(key, ""), column)
            if not prefix and _is_block(section[name]):
                section.ca.items.setdefault(name, [None] * 4)[1] = [CommentToken("\n", CommentMark(0))]
        elif now != value or isinstance(now, bool) != isinstance(value, bool):
            section[name] = _node(key, value, comments, column)
            if token := section.ca.items.get(name, [None] * 4)[2]:  # the comment behind the value
                token.start_mark.column = min(token.start_mark.column, column)
        place = list(section).index(name) + 1


def _node(key: str, value: Any, comments: Mapping[str, str], column: int) -> Any:
    """Return a value as a node of the tree, spelt as in the default file where it is the default."""
    if isinstance(value, Mapping):
        section = CommentedMap({name: _node(f"{key}.{name}", held, comments, column) for name, held in value.items()})
        if not value or key not in comments:  # such as a dimension of the search space
            section.fa.set_flow_style()
        for name in value:
            _comment(section, name, comments.get(f"{key}.{name}", ""), column)
        return section
    default = value_at(_default_tree(), key)
    if default == value and all(isinstance(default, kind) == isinstance(value, kind) for kind in (bool, float)):
        return copy.deepcopy(default)
    if isinstance(value, list):
        value = CommentedSeq(value)
        value.fa.set_flow_style()
    return value


def _comment(section: CommentedMap, name: str, text: str, column: int) -> None:
    if text:
        section.ca.items[name] = [None, None, CommentToken(f"# {text}\n", CommentMark(column)), None]


@cache
def _default_tree() -> CommentedMap:
    return round_trip_yaml().load(default_text())


def fit(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that fit the variants they select: missing keys at their initial value, keys of others removed.

    Keys are in the schema's order; unknown ones stay at the end, for validation to name.
    """
    return _fit(schema(), values, default_values(), ())


def _fit(section: Node, values: Mapping[str, Any], default: Any, others: tuple[Node, ...]) -> dict[str, Any]:
    """Fit one section; `others` are the variants that it might be."""
    fitted: dict[str, Any] = {}
    default = default if isinstance(default, Mapping) else {}
    for name, node in section["properties"].items():
        start = default.get(name, node.get("examples", [None])[0])
        held = values.get(name, start)
        if variants(node) and isinstance(held, Mapping):
            if tag_name(node) and tag_name(node) not in held:
                held = {tag_name(node): likely_variant(node, held), **held}
            child = variant_of(node, held)
            # Keys that a section of this name may hold, also under another variant of the section above.
            namesakes = [node, *(other["properties"][name] for other in others if name in other["properties"])]
            sections = tuple(each for one in namesakes for each in variants(one).values())
            readable = {key for each in sections for key in each["properties"]}
            own = readable if child is None else set(child["properties"])
            held = {key: value for key, value in held.items() if key in own or key not in readable}
            held = held if child is None else _fit(child, held, start, tuple(variants(node).values()))
        fitted[name] = held
    return fitted | {name: value for name, value in values.items() if name not in fitted}


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with those of `overlay` on top."""
    merged = dict(base)
    for name, value in overlay.items():
        held = merged.get(name)
        merged[name] = merge(held, value) if isinstance(value, Mapping) and isinstance(held, Mapping) else value
    return merged


def difference(old: str, new: str, name: str) -> list[str]:
    """Return the lines of a unified difference, with one line of context."""
    names = f"{name} (now)", f"{name} (new)"
    return list(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, n=1, lineterm=""))

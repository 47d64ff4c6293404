"""Load params.yaml: read, validate with every issue at once, flatten and hash.

The schema is in `config.schema`, the rules between keys are in `config.rules`.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from lesionsam.config.limits import (
    Limits,
    Node,
    explain_unknown,
    schema,
    tag_name,
    value_at,
    variant_of,
    variants,
    walk,
)
from lesionsam.config.rules import Issue, file_rules, rules
from lesionsam.config.schema import VERSION, Config
from lesionsam.errors import UserError

MAX_VALUES, MAX_DEPTH = 10_000, 16  # of a parameter file; the default has some 200 values on 4 levels
NOT_IN_RESULTS = ("version", "sweep", "foundation", "cluster", "tracking", "runtime")  # sections that no hash covers
CONFLICT = re.compile(r"^(<{7}|\|{7}|={7}|>{7})(?= |$)", re.MULTILINE)
UPGRADE = "`lesionsam params upgrade`"


class ConfigError(UserError):
    """Report everything wrong with a set of parameters, one line each."""

    def __init__(self, issues: Sequence[Issue], source: str = "params.yaml") -> None:
        self.issues, self.source = tuple(issues), source
        self.lines = [" ".join(str(issue).split()) for issue in issues]
        super().__init__(f"{source}: " + "; ".join(self.lines))

    def __str__(self) -> str:
        if len(self.lines) == 1:
            return f"{self.source}: {self.lines[0]}"
        return "\n".join([f"{self.source}: {len(self.lines)} issues", *(f"  {line}" for line in self.lines)])


def known_keys(config: Config | Mapping[str, Any]) -> dict[str, Limits]:
    """Return the limits of every dotted key, sections included, of a configuration with these variants, in order."""
    return dict(walk(to_values(config)))


def describe(key: str, config: Config | Mapping[str, Any]) -> Limits:
    """Return type, bounds and choices of a dotted key under a configuration.

    Raises:
        UserError: this configuration has no such key; names the key that is meant, or the variant that reads it.
    """
    known = known_keys(config)
    if key not in known:
        raise UserError(f"{key}: {explain_unknown(key, to_values(config))}")
    return known[key]


def validate(values: Mapping[Any, Any], source: str = "params.yaml") -> Config:
    """Return the configuration of plain nested values, checked by schema and rules; files are not looked at.

    Raises:
        ConfigError: with every issue, in the schema's order. `source` is named before them.
    """
    probe = _with_text_keys(values)
    version = probe.get("version")
    if type(version) is int and 0 < version < VERSION:
        message = (
            f"expected an integer ({VERSION}), got {version}, an older format; run {UPGRADE}, which keeps comments"
        )
        raise ConfigError([Issue("version", message)], source)
    issues: dict[str, Issue] = {}
    probe = _with_variants(schema(), probe, "", issues)
    config, known = None, dict(walk(probe))
    try:
        config = Config.model_validate(probe)
    except ValidationError as error:
        for detail in error.errors():
            key, kind = _key(detail["loc"], detail["type"] == "extra_forbidden", known), detail["type"]
            if kind == "extra_forbidden":
                issues[key] = Issue(key, explain_unknown(key, probe))
            elif kind == "missing":
                issues[key] = _missing(known[key])
            else:
                items = [part for part in detail["loc"] if isinstance(part, int)]
                issues[key] = _wrong(known[key], detail["input"], f" as item {items[0] + 1}" if items else "")
    sound = {key: value for key, value in _leaves(probe) if not any(f"{key}.".startswith(f"{bad}.") for bad in issues)}
    for issue in rules(sound):
        issues.setdefault(issue.key, issue)
    if issues or config is None:
        places = {name: place for place, name in enumerate(known)}
        parents = {key: [name for name in known if f"{key}.".startswith(f"{name}.")] for key in issues}
        order = {key: max((places[name] for name in above), default=len(known)) for key, above in parents.items()}
        raise ConfigError(sorted(issues.values(), key=lambda issue: order[issue.key]), source)
    return config


def _with_variants(section: Node, values: Mapping[str, Any], prefix: str, issues: dict[str, Issue]) -> dict[str, Any]:
    """Return the values with likely words where none selects a variant, so that the other keys are checked as well."""
    fixed = dict(values)
    for name, node in section["properties"].items():
        held, tag = values.get(name), tag_name(node)
        if not isinstance(held, Mapping):
            continue
        if tag and variant_of(node, held) is None:
            limits = Limits(f"{prefix}{name}.{tag}", "choice", choices=tuple(variants(node)))
            issues[limits.key] = _wrong(limits, held[tag]) if tag in held else _missing(limits)
            held = {**held, tag: likely_variant(node, held)}
        child = variant_of(node, held)
        fixed[name] = _with_variants(child, held, f"{prefix}{name}.", issues) if child is not None else held
    return fixed


def likely_variant(node: Node, value: Mapping[str, Any]) -> str:
    """Return the word of the variant that is nearest to a section: by its word, else by its keys."""
    near = difflib.get_close_matches(str(value.get(tag_name(node), "")), variants(node), n=1)
    unlike = {word: len(set(section["properties"]) ^ set(value)) for word, section in variants(node).items()}
    return near[0] if near else min(unlike, key=unlike.__getitem__)


def _key(loc: Sequence[int | str], is_unknown: bool, known: Mapping[str, Limits]) -> str:
    """Return the dotted key of a pydantic error, whose place also names variants, types and items of a list."""
    key = ""
    for name in loc[:-1] if is_unknown else loc:
        key = longer if (longer := f"{key}.{name}".lstrip(".")) in known else key
    return f"{key}.{loc[-1]}".lstrip(".") if is_unknown else key


def _missing(limits: Limits) -> Issue:
    start = value_at(default_values(), limits.key)
    start = limits.example if start is None else start
    is_section, name = isinstance(start, Mapping), limits.key.rpartition(".")[2]
    line = "it" if start is None or is_section else f"`{name}: {yaml_text(start)}`"
    return Issue(limits.key, f"missing, expected {limits.expected}; add {line}, as {UPGRADE} does")


def _wrong(limits: Limits, value: object, place: str = "") -> Issue:
    words = {"yes": "true", "on": "true", "no": "false", "off": "false"} if limits.kind == "boolean" else {}
    meant = [words.get(value.lower(), "")] if isinstance(value, str) else []
    meant += difflib.get_close_matches(str(value), limits.choices, n=1) if isinstance(value, str) else []
    end = f"; did you mean {''.join(meant)}?" if any(meant) else ""
    return Issue(limits.key, f"expected {limits.expected}, got {shown(value)}{place}{end}")


def shown(value: object) -> str:
    """Return a value in words, with its type where that matters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, Mapping):
        return "a section of keys"
    if isinstance(value, list):
        return f"the list [{', '.join(map(str, value))}]"
    return f"the text '{value}'" if isinstance(value, str) else str(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML mapping as DVC reads it (YAML 1.2: 1e-3 is a number), in plain dicts and lists."""
    return parse_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Return the text of a parameter file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: expected a parameter file, found none; `lesionsam preset demo` writes one") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}: expected a text file in UTF-8, got {error}") from None


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Return the mapping that a YAML text holds; `source` is named in errors. Duplicate keys are refused."""
    if marker := CONFLICT.search(text):
        line = text.count("\n", 0, marker.start()) + 1
        raise UserError(
            f"{source} line {line}: expected YAML, got the marker {marker[0]} of a merge conflict; keep one of the two "
            "versions and remove the markers"
        )
    try:
        values = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or error
        problem = str(problem).splitlines()[0].partition(" with value")[0]
        what = f"{problem}; keep one" if isinstance(error, DuplicateKeyError) else f"expected YAML, got {problem}"
        raise UserError(f"{source}{f' line {mark.line + 1}' if mark else ''}: {what}") from None
    except RecursionError:
        raise UserError(f"{source}: expected sections of keys, got a text nested too deeply") from None
    if not _is_bounded(values):
        raise UserError(
            f"{source}: expected at most {MAX_VALUES} values and {MAX_DEPTH} levels, got more; write out "
            "what its anchors stand for"
        )
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected sections, got {shown(values)}; `lesionsam preset demo` writes them")
    return values


def _is_bounded(values: object) -> bool:
    """Return whether nested values are few and shallow once every alias is written out; one may contain itself."""
    number, left = 0, [(values, 0)]
    while left:
        held, depth = left.pop()
        number += 1
        if number > MAX_VALUES or depth > MAX_DEPTH:
            return False
        below = held.values() if isinstance(held, Mapping) else held if isinstance(held, list) else ()
        left += ((value, depth + 1) for value in below)
    return True


class _Representer(RoundTripRepresenter):
    """Write floats as YAML 1.1 and 1.2 both read them: 1.0e-05, not 1e-05."""

    def represent_float(self, data: float) -> Any:
        text = re.sub(r"^(-?\d+)e", r"\1.0e", repr(data))
        return self.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(float, _Representer.represent_float)


def round_trip_yaml() -> YAML:
    """Return a reader and writer that keeps comments and spelling."""
    yaml = YAML()
    yaml.Representer, yaml.preserve_quotes, yaml.width = _Representer, True, 1_000_000
    return yaml


def yaml_text(value: Any) -> str:
    """Return a scalar or a flat list as params.yaml holds it, on one line."""
    yaml, stream = round_trip_yaml(), io.StringIO()
    yaml.default_flow_style = True
    yaml.dump({"a": value}, stream)
    return stream.getvalue().strip().removeprefix("{a: ").removesuffix("}")


def load_config(path: str | Path = "params.yaml", *, check_files: bool = True) -> Config:
    """Return a parameter file, validated.

    Args:
        path: params.yaml. check_files: also check that the user's own files exist, relative to its folder.
    Raises:
        ConfigError: every issue at once, a line each. UserError: no file, or not YAML.
    """
    path = Path(path)
    config = validate(read_yaml(path), path.name)
    issues = list(file_rules(config, path.resolve().parent)) if check_files else []
    if issues:
        raise ConfigError(issues, path.name)
    return config


def default_values() -> dict[str, Any]:
    """Return the default parameters, nested: those of preset `demo`."""
    return copy.deepcopy(_parsed_defaults())


@cache
def _parsed_defaults() -> dict[str, Any]:
    return parse_yaml(default_text(), "presets/demo.yaml")


def default_text() -> str:
    """Return the default params.yaml, with its comments."""
    return (resources.files("lesionsam.config") / "presets" / "demo.yaml").read_text(encoding="utf-8")


def to_values(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Return nested plain values (dicts, lists, scalars) under the names that params.yaml uses."""
    return config.model_dump(mode="json", by_alias=True) if isinstance(config, Config) else dict(config)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def flatten(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key -> scalar; a list becomes one text, its items separated by ", "."""
    leaves = _leaves(to_values(config))
    return {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in leaves}


def unflatten(flat: Mapping[str, Any], onto: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the nested values of dotted keys, on top of a copy of `onto`."""
    nested: dict[str, Any] = copy.deepcopy(dict(onto or {}))
    for key, value in flat.items():
        *path, leaf = key.split(".")
        held = nested
        for name in path:
            held = held.setdefault(name, {})
        held[leaf] = value
    return nested


def with_values(config: Config, changes: Mapping[str, Any], source: str = "parameters") -> Config:
    """Return the configuration with some dotted keys changed, validated again.

    `with_values(config, {"method.temperature": 0.2})`; `source` is named before any issue.
    """
    for key in changes:
        describe(key, config)
    return validate(unflatten(changes, to_values(config)), source)


def config_digest(config: Config, sections: Sequence[str] | None = None) -> str:
    """Return the SHA-256, 64 hex digits, of the named sections, or of all but `NOT_IN_RESULTS`."""
    values = to_values(config)
    chosen = [name for name in values if name not in NOT_IN_RESULTS] if sections is None else list(sections)
    if wrong := [name for name in chosen if name not in values or name in NOT_IN_RESULTS]:
        raise ValueError(f"expected sections that results depend on, got {', '.join(wrong)}")
    text = json.dumps({name: values[name] for name in chosen}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _with_text_keys(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _with_text_keys(value) if isinstance(value, Mapping) else value for key, value in values.items()}

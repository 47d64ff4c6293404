"""params.yaml -> `Config`: loading, every issue at once, limits of a key, flattening and hashing.

The schema itself is in `lesionsam.schema`, the rules between keys in `lesionsam.config_rules`.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lesionsam.config.limits import (
    Limits,
    all_tags,
    explain_unknown,
    fields_of,
    sections_of,
    tag_name,
    tags_of,
    variant_of,
    walk,
)
from lesionsam.config.rules import Issue, file_rules, rules
from lesionsam.config.schema import Config
from lesionsam.errors import UserError

MAX_VALUES, MAX_DEPTH = 10_000, 16  # of a parameter file; the default has some 200 on 4
HOW_NOT_WHAT = ("version", "sweep", "foundation", "tracking", "runtime")  # sections that no hash holds


class ConfigError(UserError):
    """Everything wrong with a set of parameters, one line each."""

    def __init__(self, issues: Sequence[Issue], source: str = "params.yaml") -> None:
        self.issues, self.source = tuple(issues), source
        self.lines = [" ".join(str(issue).split()) for issue in issues]
        super().__init__(f"{source}: " + "; ".join(self.lines))

    def __str__(self) -> str:
        if len(self.lines) == 1:
            return f"{self.source}: {self.lines[0]}"
        return "\n".join([f"{self.source}: {len(self.lines)} issues", *(f"  {line}" for line in self.lines)])


def known_keys(config: Config | Mapping[str, Any]) -> dict[str, Limits]:
    """Every dotted key, sections included, of a configuration with these variants -> its limits, in order."""
    return {key: limits for key, _, limits in walk(to_values(config))}


def describe(key: str, config: Config | Mapping[str, Any]) -> Limits:
    """Type, bounds and choices of a dotted key under a configuration.

    Raises:
        UserError: this configuration has no such key; says which key is meant, or which variant reads it.
    """
    known = known_keys(config)
    if key not in known:
        raise UserError(f"{key}: {explain_unknown(key, to_values(config))}")
    return known[key]


def validate(values: Mapping[Any, Any], source: str = "params.yaml") -> Config:
    """Plain nested values -> Config, by schema and rules; no file is looked at.

    Raises:
        ConfigError: with every issue, in the schema's order. `source` is named before them.
    """
    probe = _with_text_keys(values)
    issues: dict[str, Issue] = {}
    config = None
    for _ in range(8):  # sections inside sections: each round settles one level of unreadable variants
        try:
            config = Config.model_validate(probe)
            break
        except ValidationError as error:
            repairs: dict[str, str] = {}
            for detail in error.errors():
                path, field, item = _place(detail["loc"], probe)
                issue = _translate(detail, ".".join(path), field, item, probe)
                issues[issue.key] = issue
                if detail["type"] in ("union_tag_invalid", "union_tag_not_found") and field is not None:
                    repairs[issue.key] = likely_tag(field, detail["input"])
            if not repairs:
                break
            probe = unflatten(repairs, probe)  # so that the section's other keys are checked too
    sound = {key: value for key, value in _leaves(probe) if key not in issues and not _below(key, issues)}
    for issue in rules(sound):
        issues.setdefault(issue.key, issue)
    if issues or config is None:
        order = {key: place for place, (key, _, _) in enumerate(walk(probe))}
        raise ConfigError(sorted(issues.values(), key=lambda issue: _rank(issue.key, order)), source)
    return config


def _below(key: str, issues: Mapping[str, Issue]) -> bool:
    return any(key.startswith(f"{bad}.") for bad in issues)


def _rank(key: str, order: Mapping[str, int]) -> float:
    """Place of a key among the issues: its own, or for an unknown key right after its section's."""
    while key and key not in order:
        key = key.rpartition(".")[0]
    return order.get(key, len(order))


def _place(loc: Sequence[int | str], values: Mapping[str, Any]) -> tuple[list[str], FieldInfo | None, int | None]:
    """Path, field (None: unknown) and list item (or None) of a pydantic error; variants' tags in `loc` are dropped."""
    path: list[str] = []
    model, held, field, rest = Config, values, None, list(loc)
    while rest and model is not None:
        path.append(str(rest.pop(0)))
        field = fields_of(model).get(path[-1])
        if field is None:
            return path, None, None
        held = held.get(path[-1]) if isinstance(held, Mapping) else None
        model = variant_of(field, held)
        if tag_name(field) and rest:
            rest.pop(0)
    return path, field, next((part for part in rest if isinstance(part, int)), None)


def _translate(detail: Any, key: str, field: FieldInfo | None, item: int | None, values: Mapping[str, Any]) -> Issue:
    """A pydantic error -> one line about a dotted key: what was expected, what came, what may be meant."""
    kind, value = detail["type"], detail["input"]
    if field is None:
        return Issue(key, explain_unknown(key, values))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = f"{key}.{tag_name(field)}"
        limits = Limits(key, "choice", choices=all_tags(field))
        value = detail["input"].get(tag_name(field))
        kind = "missing" if kind == "union_tag_not_found" else kind
    else:
        limits = next(limits for known, _, limits in walk(values) if known == key)
    if kind == "missing":
        start = start_value(key, values)
        line = f"`{key.rpartition('.')[2]}: {yaml_text(start)}`" if start is not None else "it"
        return Issue(key, f"missing, expected {limits.expected}; add {line}, as `lesionsam params upgrade` does")
    meant = difflib.get_close_matches(str(value), limits.choices, n=1) if isinstance(value, str) else []
    place = "" if item is None else f" as item {item + 1}"
    end = f"; did you mean {meant[0]}?" if meant else ""
    return Issue(key, f"expected {limits.expected}, got {shown(value)}{place}{end}")


def likely_tag(field: FieldInfo, value: Mapping[str, Any]) -> str:
    """The variant that a section without a readable tag was meant to be: by the word, else by its keys."""
    tag = tag_name(field)
    near = difflib.get_close_matches(str(value.get(tag, "")), all_tags(field), n=1)
    nearest = min(sections_of(field), key=lambda section: len(set(fields_of(section)) ^ set(value)))
    return near[0] if near else tags_of(nearest, tag)[0]


def start_value(key: str, values: Mapping[str, Any]) -> Any:
    """What a missing leaf starts with: the default's value, or the schema's example where the default has none."""
    held: Any = default_values()
    for name in key.split("."):
        held = held.get(name) if isinstance(held, Mapping) else None
    field = next((field for known, field, _ in walk(values) if known == key), None)
    if held is None and field is not None and field.examples:
        return field.examples[0]
    return None if isinstance(held, Mapping) else held


def shown(value: object) -> str:
    """A value as a person would name it, with its type where that is the point."""
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
    """A YAML mapping as DVC reads it (YAML 1.2: 1e-3 is a number), plain dicts and lists; duplicate keys refused."""
    return parse_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """A parameter file's text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: expected a parameter file, found none; `lesionsam preset demo` writes one") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}: expected a text file in UTF-8, got {error}") from None


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The same for a text; `source` is named in errors."""
    try:
        values = YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: {str(error.problem).split(' with value')[0]}; keep one") from None
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: expected YAML, got {error.problem or error.context}") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"{source}: expected YAML, got {str(error).splitlines()[0]}") from None
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
    """Whether nested values are few and shallow, also once every alias is written out: some of them hold themselves."""
    number, left = 0, [(values, 0)]
    while left:
        held, depth = left.pop()
        number += 1
        if number > MAX_VALUES or depth > MAX_DEPTH:
            return False
        below = held.values() if isinstance(held, Mapping) else held if isinstance(held, list) else ()
        left += ((value, depth + 1) for value in below)
    return True


def yaml_text(value: Any) -> str:
    """A scalar or a flat list as one would write it in params.yaml, read back the same by YAML 1.1 and 1.2."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {yaml_text(held)}" for name, held in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e") if float(f"{value:e}") == value else repr(value).split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}{'' if '.' in mantissa else '.0'}e{int(exponent)}"
    if isinstance(value, str):
        plain = re.fullmatch(r"(?!(y|n|yes|no|on|off)$)[A-Za-z./_][\w./+:~-]*(?<!:)", value, re.IGNORECASE)
        return value if plain and parse_yaml(f"a: {value}", "")["a"] == value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def load_config(path: str | Path = "params.yaml", *, check_files: bool = True) -> Config:
    """Read and check a parameter file.

    Args:
        path: params.yaml. check_files: also look whether the user's own files are there, relative to its folder.
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
    """The default parameters, nested: those of the preset `demo`."""
    return copy.deepcopy(_parsed_defaults())


@cache
def _parsed_defaults() -> dict[str, Any]:
    return parse_yaml(default_text(), "presets/demo.yaml")


def default_text() -> str:
    """The default params.yaml, with its comments."""
    return (resources.files("lesionsam.config") / "presets" / "demo.yaml").read_text(encoding="utf-8")


def to_values(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain values (dicts, lists, scalars) under the names that params.yaml uses."""
    return config.model_dump(mode="json", by_alias=True) if isinstance(config, Config) else dict(config)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def flatten(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> scalar; a list becomes one text, its items separated by ", "."""
    leaves = _leaves(to_values(config))
    return {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in leaves}


def unflatten(flat: Mapping[str, Any], onto: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Dotted keys -> nested values, on top of a copy of `onto`."""
    nested: dict[str, Any] = copy.deepcopy(dict(onto or {}))
    for key, value in flat.items():
        *path, leaf = key.split(".")
        held = nested
        for name in path:
            held = held.setdefault(name, {})
        held[leaf] = value
    return nested


def with_values(config: Config, changes: Mapping[str, Any], source: str = "parameters") -> Config:
    """The configuration with some dotted keys changed, checked again.

    `with_values(config, {"method.temperature": 0.2})`; `source` is named before any issue.
    """
    for key in changes:
        describe(key, config)
    return validate(unflatten(changes, to_values(config)), source)


def config_digest(config: Config, sections: Sequence[str] | None = None) -> str:
    """SHA-256, 64 hex digits, of what a result depends on: the named sections, or all but `HOW_NOT_WHAT`."""
    values = to_values(config)
    chosen = [name for name in values if name not in HOW_NOT_WHAT] if sections is None else list(sections)
    if wrong := [name for name in chosen if name not in values or name in HOW_NOT_WHAT]:
        raise ValueError(f"expected sections that a result depends on, got {', '.join(wrong)}")
    text = json.dumps({name: values[name] for name in chosen}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _with_text_keys(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _with_text_keys(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def trained_parts(model: Mapping[str, Any]) -> str:
    """What a section `model` (plain values) trains, in words."""
    last = next((value for key, value in model.items() if key.endswith("last_k")), 0)
    where = f"of the last {last} encoder blocks" if last else "of the whole encoder"
    words = {
        "none": [],
        "blocks": [f"the last {last} encoder blocks" if last else "the whole encoder"],
        "adapter": [f"adapters of {model.get('adapter_dim')} units {where}"],
        "lora": [f"low-rank updates (rank {model.get('lora_rank')}) {where}"],
    }[model["encoder"]]
    switches = (("the decoder", "train_decoder"), ("the prompt encoder", "train_prompt_encoder"))
    return ", ".join([*words, *(name for name, key in switches if model[key])])


def summary(config: Config) -> list[str]:
    """The configuration in a few lines, for people."""
    data, boxes, model, method, train = config.data, config.boxes, config.model, config.method, config.train
    size = f", side {model.image_size} px" if model.image_size else ""
    counts = {
        "synthetic": ("num_train", "num_dev", "num_test"),
        "folder": ("dev_fraction", "test_split"),
        "coco": ("annotations", "test_split"),
    }
    named = ", ".join(f"{key} {getattr(data, key)}" for key in counts.get(data.source, ("subset", "dev_fraction")))
    trained = trained_parts(to_values(config)["model"])
    target = f", target {method.target.kind}" if method.name == "contrastive" else ""
    return [
        f"data     {data.source} ({named})",
        f"boxes    {boxes.source}",
        f"model    {model.name} from {model.checkpoint}{size}; trained: {trained}",
        f"method   {method.name}{target}",
        f"train    {train.epochs} epochs, {train.batch_size} x {train.accumulate} images a step, {train.precision}",
        f"digest   {config_digest(config)[:12]}",
    ]

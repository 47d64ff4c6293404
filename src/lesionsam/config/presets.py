"""Named sets of parameters: `demo` is a whole params.yaml, the others hold changes to it or to the present file.

A preset file holds `about` (a line), `base` (default: start from `demo`; current: change your file) or `extends`
(another preset, applied first), and `params`. Sections of the user or the machine stay: inputs, tracking, runtime. An
input that is not read any more returns to the default path, since DVC needs every declared input to exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lesionsam.config.edit import edit_text, fit, merge
from lesionsam.config.limits import value_at
from lesionsam.config.load import Config, default_text, default_values, parse_yaml, read_text, to_values, validate
from lesionsam.errors import UserError

KEPT = ("inputs", "tracking", "runtime")
READ_BY = {"folder": ("data.source", ("folder", "coco")), "boxes": ("boxes.source", ("csv",))}  # key of inputs
DEMO = "demo"
ABOUT_DEMO = "the default: generated images, compact SAM, two boxes; minutes on 2 CPU cores"


def preset_names() -> list[str]:
    """Return the names of all presets, the default first."""
    files = (resources.files("lesionsam.config") / "presets").iterdir()
    names = sorted(Path(file.name).stem for file in files if file.name.endswith(".yaml"))
    return [DEMO, *(name for name in names if name != DEMO)]


def about(name: str) -> str:
    """Return what a preset is, in one line."""
    return ABOUT_DEMO if name == DEMO else str(_read(name)["about"])


def preset_values(name: str, current: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested values of a preset, on top of the default or the current ones, fit to the selected variants.

    Raises:
        UserError: there is no such preset.
    """
    values = _with_preset(name, current)
    inputs = {
        key: path
        for key, path in default_values()["inputs"].items()
        if value_at(values, READ_BY[key][0]) not in READ_BY[key][1]
    }
    return merge(values, {"inputs": inputs})


def _with_preset(name: str, current: Mapping[str, Any]) -> dict[str, Any]:
    if name == DEMO:
        return default_values() | {section: current[section] for section in KEPT if section in current}
    preset = _read(name)
    if "extends" in preset:
        base = _with_preset(preset["extends"], current)
    else:
        base = _with_preset(DEMO, current) if preset["base"] == "default" else dict(current)
    return fit(merge(base, deepcopy(preset["params"])))


def apply_preset(name: str, text: str | None, source: str = "params.yaml") -> tuple[str, Config]:
    """Return a parameter file's text with a preset applied and comments kept, and its configuration.

    Args:
        text: of the present file, None where there is none (the default then takes its place).
    Raises:
        ConfigError: the result is not valid.
    """
    text = default_text() if text is None else text
    values = preset_values(name, parse_yaml(text, source))
    config = validate(values, f"{source} with preset {name}")
    return edit_text(text, to_values(config), source), config


def read_params(path: Path) -> str | None:
    """Return the text of a parameter file, None where there is none."""
    return read_text(path) if path.exists() else None


@cache
def _read(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise UserError(f"preset {name}: expected one of {', '.join(preset_names())}")
    file = resources.files("lesionsam.config") / "presets" / f"{name}.yaml"
    return parse_yaml(file.read_text(encoding="utf-8"), f"presets/{name}.yaml")

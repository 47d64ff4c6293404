"""Named sets of parameters: `demo` is a whole params.yaml, the others say what they change of it or of yours.

A preset file holds `about` (a line), `base` (default: start from `demo`; current: change your file) or `extends`
(another preset, applied first), and `params`. What is yours or the machine's stays: inputs, tracking, runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lesionsam.config.edit import edit_text, fit, merge
from lesionsam.config.load import Config, default_text, default_values, parse_yaml, read_text, to_values, validate
from lesionsam.errors import UserError

KEPT = ("inputs", "tracking", "runtime")
DEMO = "demo"
ABOUT_DEMO = "the default: generated images, compact SAM, two boxes; minutes on 2 CPU cores"


def preset_names() -> list[str]:
    """All presets, the default first."""
    files = (resources.files("lesionsam.config") / "presets").iterdir()
    names = sorted(Path(file.name).stem for file in files if file.name.endswith(".yaml"))
    return [DEMO, *(name for name in names if name != DEMO)]


def about(name: str) -> str:
    """A preset in one line."""
    return ABOUT_DEMO if name == DEMO else str(_read(name)["about"])


def preset_values(name: str, current: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of a preset on top of the default or of the current ones, made to fit the variants it chooses.

    Raises:
        UserError: there is no such preset.
    """
    if name == DEMO:
        return default_values() | {section: current[section] for section in KEPT if section in current}
    preset = _read(name)
    if "extends" in preset:
        base = preset_values(preset["extends"], current)
    else:
        base = preset_values(DEMO, current) if preset["base"] == "default" else dict(current)
    return fit(merge(base, preset["params"]))


def apply_preset(name: str, text: str | None, source: str = "params.yaml") -> tuple[str, Config]:
    """A parameter file's text with a preset applied, its comments kept.

    Args:
        text: of the present file, None where there is none (the default is then the present one).
    Raises:
        ConfigError: what would come out is not valid; says what is wrong.
    """
    text = default_text() if text is None else text
    values = preset_values(name, parse_yaml(text, source))
    config = validate(values, f"{source} with preset {name}")
    return edit_text(text, to_values(config), source), config


def upgrade(text: str, source: str = "params.yaml") -> tuple[str, Config]:
    """A parameter file's text with missing keys added at their start values, and keys its variants do not read gone.

    Raises:
        ConfigError: something else is wrong with it.
    """
    config = validate(fit(parse_yaml(text, source)), source)
    return edit_text(text, to_values(config), source), config


def read_params(path: Path) -> str | None:
    """Text of a parameter file, None where there is none."""
    return read_text(path) if path.exists() else None


def _read(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise UserError(f"preset {name}: expected one of {', '.join(preset_names())}")
    file = resources.files("lesionsam.config") / "presets" / f"{name}.yaml"
    return parse_yaml(file.read_text(encoding="utf-8"), f"presets/{name}.yaml")

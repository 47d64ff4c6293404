"""Upgrade a params.yaml of an older format."""

from __future__ import annotations

from typing import Any

from ruamel.yaml.comments import CommentedMap, CommentedSeq

from lesionsam.config.edit import edit_text, fit, rewrite
from lesionsam.config.load import parse_yaml, to_values, validate
from lesionsam.config.schema import VERSION, Config
from lesionsam.config.schema_method import OLD_WEIGHTS

REMOVED = ("cache_memory_gb", "cache_gpu_gb")  # of runtime: parts of the cache in memory and on the GPU
GONE = {"contrastive": "beta"}  # it scaled a printed number only


def upgrade(text: str, source: str = "params.yaml") -> tuple[str, Config]:
    """Return a parameter file's text in today's format, and its configuration.

    Keys are renamed, missing ones added at their initial values, those that the selected variants do not read removed.

    Raises:
        ConfigError: something else is wrong with it.
    """
    if parse_yaml(text, source).get("version", 1) == 1:
        text = rewrite(text, _to_version_2)
    values = parse_yaml(text, source)
    if isinstance(runtime := values.get("runtime"), dict):
        values["runtime"] = {key: value for key, value in runtime.items() if key not in REMOVED}
    config = validate(fit(values), source)
    return edit_text(text, to_values(config), source), config


def _to_version_2(tree: CommentedMap) -> None:
    """Name the weights of the loss terms, and the prompt `zoom`."""
    tree["version"] = VERSION
    method = tree.get("method")
    if isinstance(method, CommentedMap):
        name = str(method.get("name"))
        names, gone = OLD_WEIGHTS.get(name, {}), GONE.get(name, "")
        weights = CommentedMap()
        place = min((k for k, key in enumerate(method) if key in names), default=0)
        for old in [key for key in method if key in names]:
            weights[names[old]], comment = _pop(method, old)
            if comment:
                weights.ca.items[names[old]] = comment
        if weights:
            method.insert(place, "weights", weights)
        _pop(method, gone)
        space = tree.get("sweep", {}).get("space")
        if isinstance(space, CommentedMap):
            _pop(space, f"method.{gone}")
            for old in [key for key in space if key.removeprefix("method.") in names]:
                place = list(space).index(old)
                value, comment = _pop(space, old)
                space.insert(place, new := f"method.weights.{names[old.removeprefix('method.')]}", value)
                if comment:
                    space.ca.items[new] = comment
    prompts = tree.get("evaluate", {}).get("prompts")
    if isinstance(prompts, CommentedSeq):
        for k, prompt in enumerate(prompts):
            prompts[k] = "zoom" if prompt == "nearer" else prompt


def _pop(section: CommentedMap, key: str) -> tuple[Any, Any]:
    """Take a key out of a section; returns its value and its comment."""
    return section.pop(key, None), section.ca.items.pop(key, None)

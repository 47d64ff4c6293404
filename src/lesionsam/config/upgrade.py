"""Upgrade a params.yaml of an older format."""

from __future__ import annotations

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
    method, space = tree.get("method"), tree.get("sweep", {}).get("space")
    if isinstance(method, CommentedMap):
        method_name, weights = str(method.get("name")), CommentedMap()
        names, gone = OLD_WEIGHTS.get(method_name, {}), GONE.get(method_name, "")
        place = min((k for k, key in enumerate(method) if key in names), default=0)
        for old in [key for key in method if key in names]:
            _move(method, old, weights, names[old], len(weights))
        if weights:
            method.insert(place, "weights", weights)
        method.pop(gone, None)
        if isinstance(space, CommentedMap):
            space.pop(f"method.{gone}", None)
            for place, old in enumerate(list(space)):
                if (name := names.get(old.removeprefix("method."))) is not None:
                    _move(space, old, space, f"method.weights.{name}", place)
    prompts = tree.get("evaluate", {}).get("prompts")
    if isinstance(prompts, CommentedSeq):
        for k, prompt in enumerate(prompts):
            prompts[k] = "zoom" if prompt == "nearer" else prompt


def _move(source: CommentedMap, old: str, target: CommentedMap, new: str, place: int) -> None:
    """Move a key and its comment."""
    comment = source.ca.items.pop(old, None)
    target.insert(place, new, source.pop(old))
    if comment:
        target.ca.items[new] = comment

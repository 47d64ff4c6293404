"""Read, check and edit params.yaml; presets."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.config.load import config_digest, flatten, load_config, validate, with_values
    from lesionsam.config.presets import apply_preset, preset_names
    from lesionsam.config.schema import Config

__all__ = [
    "Config",
    "apply_preset",
    "config_digest",
    "flatten",
    "load_config",
    "preset_names",
    "validate",
    "with_values",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    load="config_digest flatten load_config validate with_values",
    presets="apply_preset preset_names",
    schema="Config",
)

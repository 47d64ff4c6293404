"""The settings of params.yaml for masks without a prompt, as plain arguments."""

from __future__ import annotations

from pathlib import Path

from lesionsam.config.load import Config, load_config
from lesionsam.inference.auto import AUTO_DEFAULTS, AutoMaskOptions
from lesionsam.inference.decode import DecodeOptions
from lesionsam.models.checkpoint import weights_metadata


def auto_options(config: Config) -> AutoMaskOptions:
    """Return the settings of the automatic masks."""
    return AutoMaskOptions(**config.auto.model_dump())


def read_auto_options(params: Path | None) -> AutoMaskOptions:
    """Read the settings of the automatic masks; None: from ./params.yaml, or the defaults if there is no such file."""
    if params is None and not (params := Path("params.yaml")).is_file():
        return AUTO_DEFAULTS
    return auto_options(load_config(params, check_files=False))


def decoding(config: Config, weights: Path) -> DecodeOptions:
    """Return how a weights file is used, by its metadata and the settings of params.yaml."""
    return DecodeOptions.of_metadata(weights_metadata(weights), auto_options(config))

"""The settings of params.yaml for masks without a prompt, as plain arguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lesionsam.config.load import Config, load_config
from lesionsam.inference.auto import AUTO_DEFAULTS, AutoMaskOptions
from lesionsam.inference.lesion import LesionSearch, trained_without_prompt
from lesionsam.models.checkpoint import weights_metadata

if TYPE_CHECKING:  # it needs pandas, and `lesionsam predict` does not
    pass


def auto_options(config: Config) -> AutoMaskOptions:
    """Return the settings of the automatic masks."""
    return AutoMaskOptions(**config.auto.model_dump())


def read_auto_options(params: Path | None) -> AutoMaskOptions:
    """Read the settings of the automatic masks; None: from ./params.yaml, or the defaults if there is no such file."""
    if params is None and not (params := Path("params.yaml")).is_file():
        return AUTO_DEFAULTS
    return auto_options(load_config(params, check_files=False))


def lesion_search(config: Config, weights: Path) -> LesionSearch:
    """Return how a model finds the lesion without a prompt; weights that were trained so decode without one as well."""
    return LesionSearch(trained_without_prompt(weights_metadata(weights)), auto_options(config))

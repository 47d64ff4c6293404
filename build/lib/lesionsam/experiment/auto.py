"""What params.yaml says of masks without a prompt, as plain arguments."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lesionsam.config.load import Config, load_config
from lesionsam.inference.auto import AUTO, AutoOptions
from lesionsam.inference.lesion import find_lesions, way
from lesionsam.models.checkpoint import weights_metadata

if TYPE_CHECKING:  # it needs pandas, and `lesionsam predict` does not
    from lesionsam.evaluation.cases import FindLesions


def auto_options(config: Config) -> AutoOptions:
    """Settings of the automatic masks."""
    return AutoOptions(**config.auto.model_dump())


def read_auto_options(params: Path | None) -> AutoOptions:
    """The same of a parameter file; None: of params.yaml here, or the defaults where there is none."""
    if params is None and not (params := Path("params.yaml")).is_file():
        return AUTO
    return auto_options(load_config(params, check_files=False))


def lesion_finder(config: Config, weights: Path) -> FindLesions:
    """How a model answers the prompt source `none`; its decoder is asked too where it was trained so."""
    return partial(find_lesions, by=way(weights_metadata(weights)), options=auto_options(config))

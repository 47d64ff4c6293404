"""One of several processes that train together: `python -m lesionsam.pipeline.worker`, under torchrun or srun."""

from __future__ import annotations

import sys

from lesionsam.config.load import load_config
from lesionsam.errors import UserError, run_guarded
from lesionsam.experiment.launch import is_launched, write_error
from lesionsam.pipeline.train import train_model


def main() -> None:
    """Train as params.yaml says; a launcher prints the message of the first process that fails."""
    try:
        train_model(load_config())
    except UserError as error:
        if not write_error(error):
            raise
        sys.exit(error.exit_code)
    except KeyboardInterrupt as error:
        if not is_launched():
            raise
        sys.exit(getattr(error, "exit_code", 130))


if __name__ == "__main__":
    run_guarded(main)

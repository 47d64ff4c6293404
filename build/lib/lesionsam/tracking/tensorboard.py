"""TensorBoard as a second sink of a run's values, where `tracking.tensorboard` asks for it. The package is optional."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lesionsam.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Board:
    """Scalars of one run as TensorBoard event files.

    A resumed run repeats the steps after its checkpoint: what was written for those before is dropped.

    Args:
        folder: of this run's event files. `tensorboard --logdir` takes the folder above.
    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise UserError(
                f"tracking.tensorboard: true needs the package tensorboard ({error.name} is not installed); "
                "`pip install tensorboard`, or set it to false"
            ) from None
        self.folder, self._open = folder, SummaryWriter
        self._writer: SummaryWriter | None = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write values of a step."""
        if self._writer is None:
            self._writer = self._open(str(self.folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Write out what is waiting."""
        if self._writer is not None:
            self._writer.close()

"""The command line: `lesionsam ...`."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.cli.app import main

__all__ = ["main"]
__getattr__, __dir__ = lazy_names(__name__, app="main")

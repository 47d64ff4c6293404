"""Weights for other tools; each export is read back and compared."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.export.base import export, open_subject
    from lesionsam.export.formats import FORMATS, open_format

__all__ = ["FORMATS", "export", "open_format", "open_subject"]
__getattr__, __dir__ = lazy_names(__name__, base="export open_subject", formats="FORMATS open_format")

"""The annotation page: two boxes per lesion, drawn in a browser and saved at once."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.annotation.serve import annotate

__all__ = ["annotate"]
__getattr__, __dir__ = lazy_names(__name__, serve="annotate")

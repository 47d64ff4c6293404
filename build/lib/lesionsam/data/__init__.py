"""Index, frames, dataset, loader and cached activations."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.data.dataset import LesionDataset, open_dataset
    from lesionsam.data.index import read_index, write_index
    from lesionsam.data.loader import Loader

__all__ = ["LesionDataset", "Loader", "open_dataset", "read_index", "write_index"]
__getattr__, __dir__ = lazy_names(
    __name__, dataset="LesionDataset open_dataset", index="read_index write_index", loader="Loader"
)

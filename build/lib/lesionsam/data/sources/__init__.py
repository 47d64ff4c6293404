"""Where images come from: ISIC archives, a folder, COCO, generated lesions."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.data.sources.coco import index_coco
    from lesionsam.data.sources.folder import index_folder
    from lesionsam.data.sources.isic import fetch_isic
    from lesionsam.data.sources.synthetic import write_dataset

__all__ = ["fetch_isic", "index_coco", "index_folder", "write_dataset"]
__getattr__, __dir__ = lazy_names(
    __name__, coco="index_coco", folder="index_folder", isic="fetch_isic", synthetic="write_dataset"
)

"""SAM, published and compact: loading, running, and selecting or adding trained parts."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.models.checkpoint import build_sam, load_sam, save_sam
    from lesionsam.models.sam import Sam, decode, encode
    from lesionsam.models.teacher import Teacher
    from lesionsam.models.trainable import select_trainable

__all__ = ["Sam", "Teacher", "build_sam", "decode", "encode", "load_sam", "save_sam", "select_trainable"]
__getattr__, __dir__ = lazy_names(
    __name__,
    checkpoint="build_sam load_sam save_sam",
    sam="Sam decode encode",
    teacher="Teacher",
    trainable="select_trainable",
)

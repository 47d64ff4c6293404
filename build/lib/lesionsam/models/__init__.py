"""SAM: published and compact, its trainable parts, adapters and LoRA."""

from typing import TYPE_CHECKING

from lesionsam.utils.lazy import lazy_names

if TYPE_CHECKING:
    from lesionsam.models.checkpoint import load_sam, save_sam
    from lesionsam.models.sam import Sam, build_sam, decode, encode
    from lesionsam.models.teacher import Teacher
    from lesionsam.models.trainable import select_trainable
    from lesionsam.models.transforms import preprocess

__all__ = ["Sam", "Teacher", "build_sam", "decode", "encode", "load_sam", "preprocess", "save_sam", "select_trainable"]
__getattr__, __dir__ = lazy_names(
    __name__,
    checkpoint="load_sam save_sam",
    sam="Sam build_sam decode encode",
    teacher="Teacher",
    trainable="select_trainable",
    transforms="preprocess",
)

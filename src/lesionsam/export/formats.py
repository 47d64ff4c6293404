"""The export formats by name. Each imports its library when it is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lesionsam.export.base import Format

FORMATS = ("pth", "safetensors", "hf", "onnx", "mlflow")


def open_format(name: str) -> Format:
    """Return one of `FORMATS`, for `export.base.export`.

    Raises:
        ImportError: its library is not installed.
    """
    if name == "mlflow":
        from lesionsam.export.mlflow import FORMAT
    elif name == "onnx":
        from lesionsam.export.onnx import FORMAT
    elif name == "hf":
        from lesionsam.export.huggingface import FORMAT
    else:
        from lesionsam.export.plain import PTH_FORMAT, SAFETENSORS_FORMAT

        return PTH_FORMAT if name == "pth" else SAFETENSORS_FORMAT
    return FORMAT

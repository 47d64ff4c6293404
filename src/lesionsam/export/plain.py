"""Export plain weights for segment_anything: .pth and .safetensors, with a builder for other architectures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from lesionsam.export.base import Format, Subject
from lesionsam.export.compare import Segment, with_predictor
from lesionsam.export.vanilla_sam import registry_name, reload_copied, reload_registry, sam_predictor
from lesionsam.models import standalone
from lesionsam.models.checkpoint import weights_metadata
from lesionsam.models.finetuned import safetensors_bytes
from lesionsam.models.sam1 import WIDTHS

PTH, SAFETENSORS = "sam.pth", "sam.safetensors"


def _write_builder(subject: Subject, folder: Path) -> None:
    (folder / standalone.ARCHITECTURE).write_text(json.dumps(dict(subject.numbers), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(standalone.__file__, folder / "load_sam.py")


def write_pth(subject: Subject, folder: Path) -> None:
    """Write sam.pth: tensors under segment_anything's keys only, so that `weights_only=True` reads it."""
    torch.save(subject.state(), folder / PTH)
    _write_builder(subject, folder)


def write_safetensors(subject: Subject, folder: Path) -> None:
    """Write sam.safetensors: the same tensors, with the metadata that `load_sam` needs and that records the training.

    The training's metadata decide how the model predicts without a prompt.
    """
    notes = weights_metadata(subject.weights) | {
        "name": subject.sam.name,
        "image_size": str(subject.side),
        "format": "pt",
    }
    if subject.sam.name not in WIDTHS.values():
        notes["architecture"] = json.dumps(dict(subject.numbers), sort_keys=True)
    (folder / SAFETENSORS).write_bytes(safetensors_bytes(subject.state(), notes))
    _write_builder(subject, folder)


def reload_pth(subject: Subject, folder: Path) -> Segment:
    """Load with segment_anything's registry if it knows the model, otherwise with the builder in the folder."""
    if (name := registry_name(subject.original)) is not None:
        return with_predictor(sam_predictor(reload_registry(name, folder / PTH)))
    return with_predictor(sam_predictor(reload_copied(folder, PTH)))


def reload_safetensors(subject: Subject, folder: Path) -> Segment:
    """Load with safetensors and the builder in the folder."""
    return with_predictor(sam_predictor(reload_copied(folder, SAFETENSORS)))


PTH_NOTE = f"""
This format cannot record which prompts the weights were trained with, as `{SAFETENSORS}` does: `lesionsam predict
--auto` and `lesionsam annotate` treat it like weights that were not adapted.
"""


def _usage(subject: Subject, weights: str) -> str:
    name = registry_name(subject.original)
    by_registry = (
        f"""segment_anything builds this model by itself:

```python
from segment_anything import SamPredictor, sam_model_registry
predictor = SamPredictor(sam_model_registry["{name}"](checkpoint="{weights}"))
```

or, with the builder in this folder:
"""
        if name is not None and weights == PTH
        else """segment_anything's `sam_model_registry` does not build
this model from this file; the builder in this folder does, out of segment_anything's own modules:
"""
    )
    return f"""{by_registry}
```python
from load_sam import load
from segment_anything import SamPredictor
predictor = SamPredictor(load("{weights}"))
```

then, in both cases:

```python
import numpy as np
from PIL import Image, ImageOps
image = np.asarray(ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB"))  # upright, as boxes are drawn
predictor.set_image(image)  # (H, W, 3) uint8 RGB
masks, predicted_iou, _ = predictor.predict(box=box, multimask_output=False)  # box: x0, y0, x1, y1 in pixels
```
{PTH_NOTE if weights == PTH else ""}"""


PTH_FORMAT = Format(
    "pth", "segment-anything", ("segment-anything",), write_pth, reload_pth, lambda subject: _usage(subject, PTH)
)
SAFETENSORS_FORMAT = Format(
    "safetensors",
    "safetensors + segment-anything",
    ("safetensors", "segment-anything"),
    write_safetensors,
    reload_safetensors,
    lambda subject: _usage(subject, SAFETENSORS),
)

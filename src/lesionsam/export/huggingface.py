"""Export a model as a folder of the Hugging Face Hub with its processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lesionsam.export.base import Format, Subject
from lesionsam.export.compare import Prompt, PromptOutput, Segment
from lesionsam.models.checkpoint import weights_metadata
from lesionsam.models.hub import classes_of, to_transformers
from lesionsam.models.sam2 import quiet
from lesionsam.models.transforms import resize_to_frame
from lesionsam.utils.files import write_json_atomic
from lesionsam.utils.hub import CONFIG, NOTES

STATED = ("format", "architecture", "image_size", "name")  # of the metadata: the folder says it itself


def write(subject: Subject, folder: Path) -> None:
    """Write config.json, model.safetensors and the processor's settings for this input side."""
    model, processor = to_transformers(subject.sam, subject.state())
    with quiet():
        model.save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    notes = {key: value for key, value in weights_metadata(subject.weights).items() if key not in STATED}
    write_json_atomic(folder / CONFIG, config | {NOTES: notes})
    processor.save_pretrained(folder)


def reload(subject: Subject, folder: Path) -> Segment:
    """Load the folder with transformers' `from_pretrained`.

    The logits are compared on pixels that were resized as our frames are (Pillow), so that they say whether the weights
    are right; the masks go the whole way, the processor's own resizing (torchvision) and its post-processing included.
    """
    import transformers

    kinds = [getattr(transformers, name) for name in classes_of(subject.sam)]
    # B615 is about a hub's revisions; this is the folder just written, and nothing else is looked at.
    with quiet():
        model = kinds[0].from_pretrained(folder, local_files_only=True).eval()  # nosec B615
        processor = kinds[1].from_pretrained(folder, local_files_only=True)  # nosec B615

    @torch.inference_mode()
    def ask(image: np.ndarray, prompt: Prompt, scale: np.ndarray, known: list[torch.Tensor]) -> tuple[Any, Any]:
        """Return the outputs and the processor's sizes; `known` caches the image's features for the next prompt."""
        given: dict[str, Any] = {}
        if prompt.box is not None:
            given["input_boxes"] = [[(np.asarray(prompt.box) * np.tile(scale, 2)).tolist()]]
        if prompt.points is not None and prompt.labels is not None:
            given["input_points"] = [[(np.asarray(prompt.points) * scale).tolist()]]
            given["input_labels"] = [[np.asarray(prompt.labels).tolist()]]
        given["return_tensors"] = "pt"
        inputs = processor(images=image, **given)
        sizes = [inputs.pop(name) for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
        for name in ("input_boxes", "input_points"):
            if name in inputs:
                inputs[name] = inputs[name].float()  # the processor makes doubles of points
        pixels = inputs.pop("pixel_values")
        if not known:
            known.append(model.get_image_embeddings(pixels))
        return model(image_embeddings=known[0], **inputs, multimask_output=False), sizes

    def segment(image: np.ndarray, prompts: Sequence[Prompt]) -> list[PromptOutput]:
        image, small = (
            image.copy(),
            resize_to_frame(image, subject.sam.frame).copy(),
        )  # torch warns of what it may not write
        scale = np.array(small.shape[1::-1]) / np.array(image.shape[1::-1])
        outputs, small_features, features = [], [], []
        for prompt in prompts:
            same_pixels, _ = ask(small, prompt, scale, small_features)
            whole_way, sizes = ask(image, prompt, np.ones(2), features)
            mask = processor.image_processor.post_process_masks(whole_way.pred_masks, *sizes)[0]
            outputs.append(
                PromptOutput(
                    same_pixels.pred_masks[0, 0, 0].numpy(), mask[0, 0].numpy(), float(same_pixels.iou_scores[0, 0, 0])
                )
            )
        return outputs

    return segment


def _usage(subject: Subject) -> str:
    model, processor = classes_of(subject.sam)
    sizes = 'inputs["original_sizes"]' + ("" if subject.sam.frame.squash else ', inputs["reshaped_input_sizes"]')
    return f"""```python
from PIL import Image, ImageOps
from transformers import {model}, {processor}

model, processor = {model}.from_pretrained("."), {processor}.from_pretrained(".")  # this folder
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")  # upright, as boxes are drawn
inputs = processor(image, input_boxes=[[[x0, y0, x1, y1]]], return_tensors="pt")  # pixels of the image
inputs["input_boxes"] = inputs["input_boxes"].float()
outputs = model(**inputs, multimask_output=False)
masks = processor.image_processor.post_process_masks(outputs.pred_masks, {sizes})
```

The processor resizes with torchvision, LesionSAM with Pillow: pixels differ by a level here and there.
"""


FORMAT = Format("hf", "transformers", ("transformers", "safetensors"), write, reload, _usage, any_sam=True)

"""Export a model as a folder of the Hugging Face Hub with its processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lesionsam.export.base import Format, Prompt, PromptOutput, Segment, Subject
from lesionsam.models.hub import config_of, renamed_state, without_bars
from lesionsam.models.transforms import resize_to_frame
from lesionsam.types import Frame


def write(subject: Subject, folder: Path) -> None:
    """Write config.json, model.safetensors and the processor's settings for this input side."""
    from transformers import SamImageProcessor, SamModel, SamProcessor

    state = renamed_state(subject.state(), subject.numbers["iou_head_depth"])
    with torch.device("meta"):
        model = SamModel(config_of(subject.numbers))
    model.load_state_dict(state, assign=True)  # strict: no key too many, none too few
    with without_bars():
        model.eval().save_pretrained(folder)
    side, mask_side = subject.side, 4 * subject.side // subject.numbers["patch_size"]
    SamProcessor(
        SamImageProcessor(
            size={"longest_edge": side},
            pad_size={"height": side, "width": side},
            mask_size={"longest_edge": mask_side},
            mask_pad_size={"height": mask_side, "width": mask_side},
        )
    ).save_pretrained(folder)


def reload(subject: Subject, folder: Path) -> Segment:
    """Load the folder with `SamModel.from_pretrained` and `SamProcessor.from_pretrained`.

    The logits are compared on pixels that were resized as segment_anything does (Pillow), so that they say whether the
    weights are right; the masks go the whole way, the processor's own resizing (torchvision) and its post-processing
    included.
    """
    from transformers import SamModel, SamProcessor

    # B615 is about a hub's revisions; this is the folder just written, and nothing else is looked at.
    with without_bars():
        model = SamModel.from_pretrained(folder, local_files_only=True).eval()  # nosec B615
        processor = SamProcessor.from_pretrained(folder, local_files_only=True)  # nosec B615

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
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
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
            resize_to_frame(image, Frame(subject.side)).copy(),
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
    return """```python
from PIL import Image, ImageOps
from transformers import SamModel, SamProcessor

model, processor = SamModel.from_pretrained("."), SamProcessor.from_pretrained(".")  # this folder
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")  # upright, as boxes are drawn
inputs = processor(image, input_boxes=[[[x0, y0, x1, y1]]], return_tensors="pt")  # pixels of the image
inputs["input_boxes"] = inputs["input_boxes"].float()
outputs = model(**inputs, multimask_output=False)
masks = processor.image_processor.post_process_masks(
    outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
```

The processor resizes with torchvision, segment_anything with Pillow: pixels differ by a level here and there.
"""


FORMAT = Format("hf", "transformers SamModel", ("transformers", "safetensors"), write, reload, _usage)

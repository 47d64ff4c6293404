"""SAM as a Hugging Face `SamModel` directory with its processor; the only user of transformers.

The two implementations hold the same weights under other names; the map below is complete, and every key of both sides
is accounted for when it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lesionsam.export.base import Answer, Format, Prompt, Segment, Subject
from lesionsam.models.transforms import resize_longest

# segment_anything's key -> transformers'; the first pattern that fits. Indexes of blocks and heads pass through.
RENAMED = (
    (r"prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
    (r"image_encoder\.blocks\.(\d+)\.norm(\d)", r"vision_encoder.layers.\1.layer_norm\2"),
    (r"image_encoder\.blocks", "vision_encoder.layers"),
    (r"image_encoder\.patch_embed\.proj", "vision_encoder.patch_embed.projection"),
    (r"image_encoder\.neck\.0", "vision_encoder.neck.conv1"),
    (r"image_encoder\.neck\.1", "vision_encoder.neck.layer_norm1"),
    (r"image_encoder\.neck\.2", "vision_encoder.neck.conv2"),
    (r"image_encoder\.neck\.3", "vision_encoder.neck.layer_norm2"),
    (r"image_encoder", "vision_encoder"),
    (r"prompt_encoder\.point_embeddings", "prompt_encoder.point_embed"),
    (r"prompt_encoder\.mask_downscaling\.0", "prompt_encoder.mask_embed.conv1"),
    (r"prompt_encoder\.mask_downscaling\.1", "prompt_encoder.mask_embed.layer_norm1"),
    (r"prompt_encoder\.mask_downscaling\.3", "prompt_encoder.mask_embed.conv2"),
    (r"prompt_encoder\.mask_downscaling\.4", "prompt_encoder.mask_embed.layer_norm2"),
    (r"prompt_encoder\.mask_downscaling\.6", "prompt_encoder.mask_embed.conv3"),
    (r"mask_decoder\.output_upscaling\.0", "mask_decoder.upscale_conv1"),
    (r"mask_decoder\.output_upscaling\.1", "mask_decoder.upscale_layer_norm"),
    (r"mask_decoder\.output_upscaling\.3", "mask_decoder.upscale_conv2"),
    (r"mask_decoder\.transformer\.norm_final_attn", "mask_decoder.transformer.layer_norm_final_attn"),
    (r"mask_decoder\.transformer\.layers\.(\d+)\.norm(\d)", r"mask_decoder.transformer.layers.\1.layer_norm\2"),
)
HEAD = re.compile(r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.(\d+)\.")
HEAD_DEPTH = 3  # of the heads that make a mask's weights, in both implementations
SECOND_NAME = "prompt_encoder.shared_embedding.positional_embedding"  # transformers' second name of one tensor


def renamed_state(state: Mapping[str, torch.Tensor], iou_head_depth: int) -> dict[str, torch.Tensor]:
    """transformers' keys -> the same tensors.

    Args:
        state: segment_anything's keys. iou_head_depth: layers of the head that predicts IoUs.
    """
    out = {}
    for key, value in state.items():
        if match := HEAD.match(key):  # proj_in, layers.0 to layers.(n - 3), proj_out
            depth = iou_head_depth if "iou" in match[1] else HEAD_DEPTH
            index = int(match[2])
            place = "proj_in" if index == 0 else "proj_out" if index == depth - 1 else f"layers.{index - 1}"
            out[f"{match[1]}.{place}.{key[match.end() :]}"] = value
            continue
        pattern, new = next(((old, new) for old, new in RENAMED if re.match(rf"{old}(?=\.|$)", key)), (None, ""))
        out[key if pattern is None else re.sub(rf"^{pattern}", new, key)] = value
    out[SECOND_NAME] = out["shared_image_embedding.positional_embedding"]
    return out


def config_of(numbers: Mapping[str, Any]) -> Any:
    """A SamConfig of these numbers (see `models.plain.numbers_of`)."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

    n = numbers
    vision = SamVisionConfig(
        hidden_size=n["width"],
        output_channels=n["prompt_width"],
        num_hidden_layers=n["depth"],
        num_attention_heads=n["num_heads"],
        image_size=n["image_size"],
        patch_size=n["patch_size"],
        mlp_ratio=n["mlp_dim"] / n["width"],
        mlp_dim=n["mlp_dim"],
        window_size=n["window_size"],
        global_attn_indexes=list(n["global_attn_indexes"]),
        num_pos_feats=n["prompt_width"] // 2,
    )
    prompts = SamPromptEncoderConfig(
        hidden_size=n["prompt_width"],
        image_size=n["image_size"],
        patch_size=n["patch_size"],
        mask_input_channels=n["mask_in_chans"],
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=n["prompt_width"],
        mlp_dim=n["decoder_mlp"],
        num_hidden_layers=n["decoder_depth"],
        num_attention_heads=n["decoder_num_heads"],
        num_multimask_outputs=n["num_multimask_outputs"],
        iou_head_depth=n["iou_head_depth"],
        iou_head_hidden_dim=n["iou_head_hidden_dim"],
        layer_norm_eps=1e-5,
    )  # of segment_anything's decoder; transformers' own default is 1e-6
    return SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' own progress bars, which would break into ours, switched off for a while."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def write(subject: Subject, folder: Path) -> None:
    """config.json, model.safetensors, and the processor's settings for this input side."""
    from transformers import SamImageProcessor, SamModel, SamProcessor

    state = renamed_state(subject.state(), subject.numbers["iou_head_depth"])
    with torch.device("meta"):
        model = SamModel(config_of(subject.numbers))
    model.load_state_dict(state, assign=True)  # strict: no key too many, none too few
    with _without_bars():
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
    """`SamModel.from_pretrained` and `SamProcessor.from_pretrained`.

    The logits are compared on pixels that were resized as segment_anything does (Pillow), so that they say whether the
    weights are right; the masks go the whole way, the processor's own resizing (torchvision) and its post-processing
    included.
    """
    from transformers import SamModel, SamProcessor

    # B615 is about a hub's revisions; this is the folder just written, and nothing else is looked at.
    with _without_bars():
        model = SamModel.from_pretrained(folder, local_files_only=True).eval()  # nosec B615
        processor = SamProcessor.from_pretrained(folder, local_files_only=True)  # nosec B615

    @torch.inference_mode()
    def ask(image: np.ndarray, prompt: Prompt, scale: np.ndarray, known: list[torch.Tensor]) -> tuple[Any, Any]:
        """Outputs, and the sizes that the processor noted; `known` keeps the image's features for the next prompt."""
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

    def segment(image: np.ndarray, prompts: Sequence[Prompt]) -> list[Answer]:
        image, small = image.copy(), resize_longest(image, subject.side).copy()  # torch warns of what it may not write
        scale = np.array(small.shape[1::-1]) / np.array(image.shape[1::-1])
        answers, small_features, features = [], [], []
        for prompt in prompts:
            same_pixels, _ = ask(small, prompt, scale, small_features)
            whole_way, sizes = ask(image, prompt, np.ones(2), features)
            mask = processor.image_processor.post_process_masks(whole_way.pred_masks, *sizes)[0]
            answers.append(
                Answer(
                    same_pixels.pred_masks[0, 0, 0].numpy(), mask[0, 0].numpy(), float(same_pixels.iou_scores[0, 0, 0])
                )
            )
        return answers

    return segment


def _usage(subject: Subject) -> str:
    return """```python
from PIL import Image
from transformers import SamModel, SamProcessor

model, processor = SamModel.from_pretrained("."), SamProcessor.from_pretrained(".")  # this folder
image = Image.open("image.jpg").convert("RGB")
inputs = processor(image, input_boxes=[[[x0, y0, x1, y1]]], return_tensors="pt")  # pixels of the image
inputs["input_boxes"] = inputs["input_boxes"].float()
outputs = model(**inputs, multimask_output=False)
masks = processor.image_processor.post_process_masks(
    outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
```

The processor resizes with torchvision, segment_anything with Pillow: pixels differ by a level here and there.
"""


FORMAT = Format("hf", "transformers SamModel", ("transformers", "safetensors"), write, reload, _usage)

"""Models in the form of the Hugging Face Hub: a folder with config.json, weights and the processor's settings.

SAM 1 in that form (facebook/sam-vit-base, MedSAM, SlimSAM) holds segment_anything's weights under other names: it is
loaded into segment_anything's classes. The map below is complete in both directions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lesionsam.errors import UserError
from lesionsam.models import standalone
from lesionsam.models.sam import Sam
from lesionsam.models.sam2 import FAMILIES, SAM3, Sam2, build_sam2_model, no_random_weights, quiet
from lesionsam.utils.hub import CONFIG, model_type_of, notes_of

# segment_anything's key -> transformers'; the first pattern that fits. Indexes of blocks and heads pass through.
KEY_MAP = (
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
TIED_KEY = "prompt_encoder.shared_embedding.positional_embedding"  # transformers' second name of one tensor


def hub_key(key: str, iou_head_depth: int) -> str:
    """Return transformers' name of a tensor of segment_anything.

    Args:
        iou_head_depth: layers of the head that predicts IoUs.
    """
    if match := HEAD.match(key):  # proj_in, layers.0 to layers.(n - 3), proj_out
        depth = iou_head_depth if "iou" in match[1] else HEAD_DEPTH
        index = int(match[2])
        place = "proj_in" if index == 0 else "proj_out" if index == depth - 1 else f"layers.{index - 1}"
        return f"{match[1]}.{place}.{key[match.end() :]}"
    for pattern, new in KEY_MAP:
        if re.match(rf"{pattern}(?=\.|$)", key):
            return re.sub(rf"^{pattern}", new, key)
    return key


def renamed_state(state: Mapping[str, torch.Tensor], iou_head_depth: int) -> dict[str, torch.Tensor]:
    """Return segment_anything's tensors under transformers' keys."""
    out = {hub_key(key, iou_head_depth): value for key, value in state.items()}
    out[TIED_KEY] = out["shared_image_embedding.positional_embedding"]
    return out


# Section of a SamConfig -> its field -> the number of `standalone.build` that it holds.
FIELDS = {
    "vision_config": {
        "hidden_size": "width",
        "output_channels": "prompt_width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "mlp_dim": "mlp_dim",
        "window_size": "window_size",
        "global_attn_indexes": "global_attn_indexes",
    },
    "prompt_encoder_config": {"mask_input_channels": "mask_in_chans"},
    "mask_decoder_config": {
        "mlp_dim": "decoder_mlp",
        "num_hidden_layers": "decoder_depth",
        "num_attention_heads": "decoder_num_heads",
        "num_multimask_outputs": "num_multimask_outputs",
        "iou_head_depth": "iou_head_depth",
        "iou_head_hidden_dim": "iou_head_hidden_dim",
    },
}


def config_of(numbers: Mapping[str, Any]) -> Any:
    """Return the SamConfig of an architecture (see `standalone.numbers_of`)."""
    from transformers import SamConfig

    n = numbers
    held = {section: {field: n[name] for field, name in fields.items()} for section, fields in FIELDS.items()}
    held["vision_config"] |= {"mlp_ratio": n["mlp_dim"] / n["width"], "num_pos_feats": n["prompt_width"] // 2}
    held["prompt_encoder_config"] |= {
        "hidden_size": n["prompt_width"],
        "image_size": n["image_size"],
        "patch_size": n["patch_size"],
        "image_embedding_size": n["image_size"] // n["patch_size"],
    }
    # The norm's epsilon is that of segment_anything's decoder; transformers' own default is 1e-6.
    held["mask_decoder_config"] |= {"hidden_size": n["prompt_width"], "layer_norm_eps": 1e-5}
    return SamConfig(
        vision_config=held["vision_config"],
        prompt_encoder_config=held["prompt_encoder_config"],
        mask_decoder_config=held["mask_decoder_config"],
    )


def numbers_of_config(config: Any) -> dict[str, Any]:
    """Return the numbers of `standalone.build` of a SamConfig; the inverse of `config_of`."""
    numbers = {
        name: getattr(getattr(config, section), field)
        for section, fields in FIELDS.items()
        for field, name in fields.items()
    }
    numbers["mlp_dim"] = numbers["mlp_dim"] or int(numbers["width"] * config.vision_config.mlp_ratio)
    return numbers | {"global_attn_indexes": list(numbers["global_attn_indexes"])}


def original_state(state: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a SamModel under segment_anything's keys; the inverse of `renamed_state`."""
    with torch.device("meta"):
        own = standalone.build(dict(numbers)).state_dict()
    return {key: state[hub_key(key, numbers["iou_head_depth"])] for key in own}


def classes_of(sam: Sam) -> tuple[str, str]:
    """Return the names of transformers' classes of a model and of its processor."""
    if not isinstance(sam, Sam2):
        return "SamModel", "SamProcessor"
    return sam.family.model, "Sam3TrackerProcessor" if sam.family == SAM3 else "Sam2Processor"


def to_transformers(sam: Sam, state: Mapping[str, torch.Tensor]) -> tuple[Any, Any]:
    """Return a model and its processor of transformers, at the side of this SAM's input.

    Args:
        state: the weights under the keys of the SAM's own library, shaped for that side.
    """
    import transformers

    side, mask_side = sam.side, 4 * sam.grid
    if isinstance(sam, Sam2):
        with no_random_weights():
            model = build_sam2_model(sam.architecture()["transformers"])
        model.load_state_dict(dict(state), assign=True)
        kind = transformers.Sam3ImageProcessor if sam.family == SAM3 else transformers.Sam2ImageProcessor
        images = kind(size={"height": side, "width": side}, mask_size={"height": mask_side, "width": mask_side})
        return model.eval(), getattr(transformers, classes_of(sam)[1])(images, target_size=side)
    numbers = standalone.numbers_of(sam)
    with torch.device("meta"), quiet():
        model = transformers.SamModel(config_of(numbers))
    model.load_state_dict(renamed_state(state, numbers["iou_head_depth"]), assign=True)  # strict
    images = transformers.SamImageProcessor(
        size={"longest_edge": side},
        pad_size={"height": side, "width": side},
        mask_size={"longest_edge": mask_side},
        mask_pad_size={"height": mask_side, "width": mask_side},
    )
    return model.eval(), transformers.SamProcessor(images)


@contextmanager
def readable_as(kind: str, place: str) -> Iterator[None]:
    """Turn what transformers raises for a folder that is no model of this kind into one line about its place."""
    try:
        with quiet():
            yield
    except ModuleNotFoundError:
        raise
    except (
        SafetensorError,
        ImportError,
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{place}: cannot be read as a {kind} ({reason}); fetch it again") from None


def read_hub_folder(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a model in the form of the Hub.

    Returns:
        tensors under the keys of `Sam1` or `Sam2`, float32 on the CPU, and the metadata of `checkpoint.save_sam`, the
        name that of the folder.
    Raises:
        UserError: no SAM, weights that are missing, damaged or of another size.
    """
    import transformers

    model_type = model_type_of(folder)
    if model_type != "sam" and model_type not in FAMILIES:
        raise UserError(
            f"{folder / CONFIG}: holds a model of type {model_type!r}; expected one of sam, {', '.join(FAMILIES)}"
        )
    kind = getattr(transformers, FAMILIES[model_type].model if model_type != "sam" else "SamModel")
    # B615 is about a hub's revisions; this is a folder on this machine, and nothing else is looked at.
    with readable_as(kind.__name__, str(folder)):
        model, found = kind.from_pretrained(  # nosec B615
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{folder}: lacks {len(missing)} weights of a {kind.__name__} ({', '.join(missing[:3])}); fetch it again"
        )
    notes = {"name": folder.name, "format": "pt"} | notes_of(folder)
    if model_type == "sam":
        numbers = numbers_of_config(model.config)
        notes |= {"image_size": str(numbers["image_size"]), "architecture": json.dumps(numbers, sort_keys=True)}
        return original_state(model.state_dict(), numbers), notes
    numbers = {"transformers": model.config.to_diff_dict()}
    side = model.config.prompt_encoder_config.image_size
    notes |= {"image_size": str(side), "architecture": json.dumps(numbers, sort_keys=True)}
    return {key: value.contiguous() for key, value in model.state_dict().items()}, notes

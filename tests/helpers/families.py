"""Tiny random models of transformers, one per family, and how to write them in the form of the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from lesionsam.models.sam2 import Sam2, quiet

SIDE = {"sam2": 64, "edgetam": 64, "sam3": 56}  # of the input, pixels
WIDTH = 32  # of the image embedding
VIDEO_WIDTH, MEMORY_WIDTH = 128, 64  # of video models; transformers fixes the memory's


def _prompts_and_decoder(prefix: str, side: int, patch: int, width: int) -> dict[str, Any]:
    prompts = getattr(transformers, f"{prefix}PromptEncoderConfig")
    decoder = getattr(transformers, f"{prefix}MaskDecoderConfig")
    return {
        "prompt_encoder_config": prompts(hidden_size=width, image_size=side, patch_size=patch),
        "mask_decoder_config": decoder(hidden_size=width, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32),
    }


def _sam2(width: int = WIDTH) -> Any:
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=16,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[4, 2, 2, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=width,
    )
    return transformers.Sam2Model(
        transformers.Sam2Config(vision_config=vision, **_prompts_and_decoder("Sam2", 64, 16, width))
    )


def _edgetam(width: int = WIDTH) -> Any:
    backbone = transformers.TimmWrapperConfig(
        architecture="repvit_m1",
        model_args={
            "in_chans": 3,
            "features_only": True,
            "out_indices": [0, 1, 2, 3],
            "embed_dim": [8, 16, 24, 32],
            "depth": [1, 1, 1, 1],
        },
    )
    vision = transformers.EdgeTamVisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[32, 24, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=width,
    )
    parts = _prompts_and_decoder("EdgeTam", 64, 16, width)
    return transformers.EdgeTamModel(transformers.EdgeTamConfig(vision_config=vision, **parts))


def _sam3(width: int = WIDTH) -> Any:
    backbone = transformers.Sam3ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        window_size=2,
        global_attn_indexes=[1],
        pretrain_image_size=28,
    )
    vision = transformers.Sam3VisionConfig(
        backbone_config=backbone, fpn_hidden_size=width, backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]]
    )
    parts = _prompts_and_decoder("Sam3Tracker", 56, 14, width)
    return transformers.Sam3TrackerModel(transformers.Sam3TrackerConfig(vision_config=vision, **parts))


FAMILIES: dict[str, Callable[..., Any]] = {"sam2": _sam2, "edgetam": _edgetam, "sam3": _sam3}


def tiny_model(family: str, seed: int = 0, width: int = WIDTH) -> Any:
    """A tiny model of transformers whose random weights spread the logits, in eval mode."""
    torch.manual_seed(seed)
    with quiet():
        model = FAMILIES[family](width).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.6 / max(p[0].numel(), 1) ** 0.5))
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(6)  # in clips: the object is in view
    return model


def tiny_family(family: str, seed: int = 0, width: int = WIDTH) -> Sam2:
    """The same behind the interface."""
    return Sam2(tiny_model(family, seed, width), family)


def write_hub_folder(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny model as its maker would upload it: config.json, model.safetensors."""
    with quiet():
        tiny_model(family, seed).save_pretrained(folder)
    return folder


def tiny_video_model(family: str, seed: int = 0) -> Any:
    """A tiny video model with the image part of `tiny_model`, in eval mode."""
    image = tiny_model(family, seed, VIDEO_WIDTH)
    prefix, grid = type(image).__name__.removesuffix("Model"), image.prompt_encoder.image_embedding_size[0]
    parts = image.config.to_dict()
    sizes: dict[str, Any] = {
        "image_size": SIDE[family],
        "memory_attention_hidden_size": VIDEO_WIDTH,
        "memory_attention_rope_feat_sizes": [grid, grid],
        "memory_encoder_hidden_size": VIDEO_WIDTH,
        "memory_encoder_output_channels": MEMORY_WIDTH,
        "mask_downsampler_embed_dim": VIDEO_WIDTH,
        "memory_fuser_embed_dim": VIDEO_WIDTH,
        "memory_fuser_intermediate_dim": 64,
    }
    if family == "edgetam":
        sizes |= {"memory_attention_mlp_hidden_size": 64, "memory_attention_rope_k_sizes": [2, 2]}
        sizes |= {f"perceiver_resampler_{name}": 4 for name in ("num_latents", "num_latents_2d")}
        sizes |= {
            "perceiver_resampler_hidden_size": MEMORY_WIDTH,
            "perceiver_resampler_attention_head_dim": MEMORY_WIDTH,
        }
    else:
        sizes["memory_attention_feed_forward_hidden_size"] = 64
    sections = {name: parts[name] for name in ("vision_config", "prompt_encoder_config", "mask_decoder_config")}
    config = getattr(transformers, f"{prefix}VideoConfig").from_dict(sections | sizes)
    torch.manual_seed(seed)
    with quiet():
        model = getattr(transformers, f"{prefix}VideoModel")(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.6 / max(p[0].numel(), 1) ** 0.5))
    model.load_state_dict(image.state_dict(), strict=False)
    return model

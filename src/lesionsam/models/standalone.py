"""Build segment_anything's own modules from a file of numbers and fill them with plain weights.

This file imports nothing of the project that made the weights: `lesionsam export` puts a copy of it beside them, as
`load_sam.py`. It needs torch and segment_anything, for .safetensors also safetensors:

    from load_sam import load
    from segment_anything import SamPredictor
    predictor = SamPredictor(load("sam.pth"))

The numbers are in `architecture.json` beside the weights, and are the arguments of segment_anything's constructors. Its
own `sam_model_registry` builds the published models (ViT-B, ViT-L, ViT-H with an input of 1024 px) and no other.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

ARCHITECTURE = "architecture.json"
PIXEL_MEAN, PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of RGB in 0..255


def build(numbers: dict) -> Sam:
    """Build a Sam of these numbers (from `numbers_of`) with random weights, in eval mode."""
    n = numbers
    grid = n["image_size"] // n["patch_size"]
    encoder = ImageEncoderViT(
        img_size=n["image_size"],
        patch_size=n["patch_size"],
        embed_dim=n["width"],
        depth=n["depth"],
        num_heads=n["num_heads"],
        mlp_ratio=n["mlp_dim"] / n["width"],
        out_chans=n["prompt_width"],
        qkv_bias=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=n["window_size"],
        global_attn_indexes=tuple(n["global_attn_indexes"]),
    )
    prompt_encoder = PromptEncoder(
        embed_dim=n["prompt_width"],
        image_embedding_size=(grid, grid),
        input_image_size=(n["image_size"], n["image_size"]),
        mask_in_chans=n["mask_in_chans"],
    )
    transformer = TwoWayTransformer(
        depth=n["decoder_depth"],
        embedding_dim=n["prompt_width"],
        mlp_dim=n["decoder_mlp"],
        num_heads=n["decoder_num_heads"],
    )
    decoder = MaskDecoder(
        transformer_dim=n["prompt_width"],
        transformer=transformer,
        num_multimask_outputs=n["num_multimask_outputs"],
        iou_head_depth=n["iou_head_depth"],
        iou_head_hidden_dim=n["iou_head_hidden_dim"],
    )
    return Sam(encoder, prompt_encoder, decoder, pixel_mean=PIXEL_MEAN, pixel_std=PIXEL_STD).eval()


def load(path: str | Path) -> Sam:
    """Load a weights file (.pth or .safetensors) beside its architecture.json as a Sam, on the CPU, in eval mode."""
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    sam = build(json.loads(path.with_name(ARCHITECTURE).read_text(encoding="utf-8")))
    sam.load_state_dict(state)
    return sam


def numbers_of(sam: Sam) -> dict:
    """Return the arguments that `build` needs to make the same architecture."""
    encoder, prompts, decoder = sam.image_encoder, sam.prompt_encoder, sam.mask_decoder
    tokens = encoder.patch_embed.proj.weight.shape  # (width, 3, patch, patch)
    windows = [int(block.window_size) for block in encoder.blocks]
    head = decoder.iou_prediction_head
    return {
        "image_size": int(encoder.img_size),
        "patch_size": tokens[-1],
        "width": tokens[0],
        "depth": len(windows),
        "num_heads": encoder.blocks[0].attn.num_heads,
        "mlp_dim": encoder.blocks[0].mlp.lin1.out_features,
        "window_size": max(windows),
        "global_attn_indexes": [k for k, size in enumerate(windows) if size == 0],
        "prompt_width": decoder.transformer_dim,
        "mask_in_chans": prompts.mask_downscaling[3].out_channels,
        "decoder_depth": decoder.transformer.depth,
        "decoder_num_heads": decoder.transformer.num_heads,
        "decoder_mlp": decoder.transformer.layers[0].mlp.lin1.out_features,
        "num_multimask_outputs": decoder.num_multimask_outputs,
        "iou_head_depth": head.num_layers,
        "iou_head_hidden_dim": head.layers[0].out_features,
    }

"""Tiny random models that find boxes by text, one per family, saved in the form of the Hub with their processors."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from lesionsam.models.sam2 import quiet

WORDS = ("skin", "lesion", "mole", "dark", "spot")
STAGES: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}  # of the backbone; its stub lacks the name
LARGEST_TOKEN = 1029  # Grounding DINO's code names the ids of [CLS], [SEP], "." and "?"


def _bert_tokenizer() -> Any:
    tokens = [f"[unused{k}]" for k in range(LARGEST_TOKEN + 1)]
    for place, token in {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1012: ".",
        1029: "?",
    }.items():
        tokens[place] = token
    for k, word in enumerate(WORDS):
        tokens[200 + k] = word
    return transformers.BertTokenizer(vocab={token: k for k, token in enumerate(tokens)})


def _clip_tokenizer(length: int) -> Any:
    pieces = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]  # the last one has the largest id, by which it is found
    return transformers.CLIPTokenizer(
        vocab={piece: k for k, piece in enumerate(pieces)}, merges=[], model_max_length=length
    )


def _grounding_dino() -> tuple[Any, Any]:
    backbone = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, **STAGES
    )
    text = transformers.BertConfig(
        vocab_size=LARGEST_TOKEN + 1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,  # the heads of one are tied to the other's
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=12,
    )
    images = transformers.GroundingDinoImageProcessor(size={"height": 160, "width": 160})
    model = transformers.GroundingDinoForObjectDetection(config)
    return model, transformers.GroundingDinoProcessor(images, _bert_tokenizer())


def _owlv2() -> tuple[Any, Any]:
    config = transformers.Owlv2Config(
        text_config={
            "vocab_size": 54,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
        },
        projection_dim=32,
    )
    images = transformers.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    return transformers.Owlv2ForObjectDetection(config), transformers.Owlv2Processor(images, _clip_tokenizer(16))


def _sam3() -> tuple[Any, Any]:
    vision = {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "window_size": 2,
            "global_attn_indexes": [1],
            "pretrain_image_size": 28,
        },
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    }
    text = {
        "vocab_size": 54,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "projection_dim": 32,
    }
    part = {"hidden_size": 32, "num_attention_heads": 2}
    layered = part | {"num_layers": 1, "intermediate_size": 32}
    config = transformers.Sam3Config(
        vision_config=vision,
        text_config=text,
        geometry_encoder_config=layered,
        detr_encoder_config=layered,
        detr_decoder_config=layered | {"num_queries": 12},
        mask_decoder_config=part,
    )
    images = transformers.Sam3ImageProcessor(size={"height": 56, "width": 56})
    return transformers.Sam3Model(config), transformers.Sam3Processor(images, _clip_tokenizer(32))


DETECTORS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "grounding-dino": _grounding_dino,
    "owlv2": _owlv2,
    "sam3": _sam3,
}


def write_detector(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny model and its processor as their maker would upload them."""
    torch.manual_seed(seed)
    with quiet():
        model, processor = DETECTORS[family]()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.copy_(torch.randn(p.shape, generator=generator) * (0.8 / max(p[0].numel(), 1) ** 0.5))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder

"""Load an exported ViT-B as micro-sam does (micro_sam/util.py, `_load_checkpoint` and `get_sam_model`)."""

from __future__ import annotations

import pickle  # what micro-sam unpickles with
from pathlib import Path

import torch
from segment_anything import SamPredictor, sam_model_registry

from lesionsam.export.base import open_subject
from lesionsam.export.plain import PTH, write_pth
from lesionsam.models.checkpoint import build_sam, save_sam


def test_micro_sam_loads_the_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sam = build_sam("vit_b")
    save_sam(sam, tmp_path / "tuned.safetensors", name="vit_b")
    write_pth(open_subject(tmp_path / "tuned.safetensors"), tmp_path)
    state = torch.load(tmp_path / PTH, map_location="cpu", pickle_module=pickle, weights_only=False)
    assert "model_state" not in state  # which would be a training of micro-sam's own
    loaded = sam_model_registry["vit_b"]()
    loaded.load_state_dict(state)
    assert SamPredictor(loaded).model.image_encoder.img_size == 1024
    trained = sam.state_dict()
    assert state.keys() == trained.keys()
    assert all(torch.equal(value, trained[key]) for key, value in state.items())

"""Convert SAM to weights for segment_anything's own constructors and predictor."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from segment_anything import SamPredictor, modeling, sam_model_registry

from lesionsam.models import standalone
from lesionsam.models.finetuned import merged_state
from lesionsam.models.sam1 import WIDTHS, Sam1

PUBLISHED_SIDE = 1024


def plain_state(sam: Sam1) -> dict[str, torch.Tensor]:
    """Return segment_anything's keys -> float32 tensors on the CPU, of the shapes that its constructors make.

    A model whose input side was changed keeps the relative positions of its training grid, and SAM's blocks interpolate
    them at run time. Here they are interpolated once, by the same rule (linear), so that they fit a constructor with
    the new side; the model computes the same. Low-rank updates are merged.

    Raises:
        UserError: the model carries adapters, which no plain weights can hold.
    """
    state = {key: value.detach().cpu().float().clone() for key, value in merged_state(sam).items()}
    numbers = standalone.numbers_of(sam)
    length = 2 * (numbers["image_size"] // numbers["patch_size"]) - 1
    for k, block in enumerate(sam.image_encoder.blocks):
        for axis in "hw":
            key = f"image_encoder.blocks.{k}.attn.rel_pos_{axis}"
            if block.window_size == 0 and len(state[key]) != length:
                resized = F.interpolate(state[key].T[None], size=length, mode="linear", align_corners=False)
                state[key] = resized[0].T.contiguous()
    return state


def registry_name(sam: Sam1) -> str | None:
    """Return the name under which `sam_model_registry` builds this architecture; None if it does not."""
    numbers = standalone.numbers_of(sam)
    name = WIDTHS.get(numbers["width"])
    if name is None or numbers["image_size"] != PUBLISHED_SIDE:
        return None
    with torch.device("meta"):
        return name if standalone.numbers_of(sam_model_registry[name]()) == numbers else None


def reload_registry(name: str, path: Path) -> modeling.Sam:
    """Load as segment_anything does: `sam_model_registry[name](checkpoint=path)`."""
    return sam_model_registry[name](checkpoint=str(path)).eval()


def reload_copied(folder: Path, weights: str) -> modeling.Sam:
    """Load with the builder file that lies beside the weights."""
    spec = importlib.util.spec_from_file_location("load_sam", folder / "load_sam.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(folder / "load_sam.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(folder / weights)


def sam_predictor(sam: modeling.Sam) -> SamPredictor:
    """Return segment_anything's predictor."""
    return SamPredictor(sam)

"""Tracking with a memory, beside transformers' own pipeline over a whole clip, on tiny random models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from helpers.families import FAMILIES, VIDEO_WIDTH, tiny_family, tiny_video_model, write_hub_folder
from lesionsam.errors import UserError
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam2 import Sam2, quiet
from lesionsam.models.transforms import model_frames
from lesionsam.video.boxes import with_core
from lesionsam.video.memory import MemoryTracker, has_memory, load_video_model

family = pytest.fixture(params=list(FAMILIES))(lambda request: request.param)
NUM_FRAMES, SHAPE = 9, (48, 80)


def clip() -> list[np.ndarray]:
    """A dark disc that moves over noise."""
    rng, (height, width) = np.random.default_rng(0), SHAPE
    rows, columns = np.mgrid[:height, :width]
    images = []
    for number in range(NUM_FRAMES):
        image = rng.integers(150, 220, (height, width, 3), dtype=np.uint8)
        image[(rows - 24) ** 2 + (columns - 30 - 3 * number) ** 2 < 120] = [90, 60, 50]
        images.append(image)
    return images


BOXES = {
    0: {"a": np.array([18.0, 12, 42, 36])},
    4: {"a": np.array([30.0, 12, 54, 36]), "b": np.array([2.0, 3, 20, 30])},
}


def saved(family: str, folder: Path, seed: int = 0) -> Path:
    with quiet():
        tiny_video_model(family, seed).save_pretrained(folder)
    return folder


def pipeline(sam: Sam2, model: Any) -> dict[tuple[int, str], np.ndarray]:
    """Run transformers' processor and model over the clip: (frame, lesion) -> logits."""
    module = sys.modules[type(model).__module__]
    session_class = getattr(module, type(model).__name__.replace("Model", "InferenceSession"))
    frames, sizes = model_frames(clip(), sam.frame)
    pixels = sam.normalize(frames, sizes)
    session = session_class(pixels, video_height=SHAPE[0], video_width=SHAPE[1], dtype=torch.float32)
    # Only its boxes are used here; they are the same for all three families.
    processor = transformers.Sam2VideoProcessor(
        transformers.Sam2ImageProcessor(), transformers.Sam2VideoVideoProcessor(), target_size=sam.side
    )
    found, names = {}, {1: "a", 2: "b"}
    with torch.inference_mode():
        for number in range(NUM_FRAMES):
            if given := BOXES.get(number):
                ids = [key for key, name in names.items() if name in given]
                boxes = [[given[names[key]].tolist() for key in ids]]
                processor.add_inputs_to_inference_session(session, number, ids, input_boxes=boxes)
            out = model(session, frame_idx=number)
            for key, logits in zip(out.object_ids, out.pred_masks, strict=True):
                found[number, names[key]] = logits[0].float().numpy()
    return found


def logits_of(tracker: MemoryTracker, monkeypatch: pytest.MonkeyPatch, numbers: range) -> dict[tuple[int, str], Any]:
    """Run a tracker; return what it makes its masks of."""
    seen: list[np.ndarray] = []
    from lesionsam.video import memory

    upscale = memory.upscale
    monkeypatch.setattr(memory, "upscale", lambda low, *rest: seen.append(low.numpy()) or upscale(low, *rest))
    found = {}
    for number in numbers:
        boxes = {key: with_core(box) for key, box in BOXES.get(number, {}).items()}
        seen.clear()
        tracked = tracker.step(clip()[number], boxes)
        found |= {(number, key): low for key, low in zip(tracked, seen, strict=True)}
        for key, low in zip(tracked, seen, strict=True):
            assert tracked[key].mask.shape == SHAPE
            assert tracked[key].lost == (not (low > 0).any())
    return found


def test_masks_equal_those_of_transformers_with_boxes_in_two_frames(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(family, tmp_path / "model")
    assert has_memory(folder)
    # Our reader of folders knows SAM 3 as it is published, as a whole; here the folder holds its tracker alone.
    sam = tiny_family("sam3", width=VIDEO_WIDTH) if family == "sam3" else load_sam(None, folder)
    assert isinstance(sam, Sam2)
    theirs = pipeline(sam, tiny_video_model(family))
    ours = logits_of(MemoryTracker(sam, load_video_model(sam, folder)), monkeypatch, range(NUM_FRAMES))
    assert ours.keys() == theirs.keys()
    assert len(ours) == NUM_FRAMES + NUM_FRAMES - 4
    for key, logits in ours.items():
        # Memories are kept in bfloat16: a pixel that differs in its last bit may differ there by 2^-8.
        assert np.allclose(logits, theirs[key], atol=2e-3), key
        assert logits.std() > 0.02, key


def test_adapted_weights_track_with_the_memory_of_the_model_they_came_from(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(family, tmp_path / "model")
    adapted = tiny_family(family, seed=5, width=VIDEO_WIDTH)  # other weights in encoder, prompts and decoder
    model = load_video_model(adapted, folder)
    for key, value in adapted.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    memory = tiny_video_model(family).state_dict()
    assert torch.equal(model.state_dict()["no_object_pointer"], memory["no_object_pointer"])
    plain = logits_of(
        MemoryTracker(tiny_family(family, width=VIDEO_WIDTH), tiny_video_model(family)), monkeypatch, range(3)
    )
    other = logits_of(MemoryTracker(adapted, model), monkeypatch, range(3))
    assert not np.allclose(plain[2, "a"], other[2, "a"], atol=1e-3)


def test_a_state_goes_on_exactly_and_does_not_grow(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sam, model = tiny_family(family, width=VIDEO_WIDTH), tiny_video_model(family)
    whole = logits_of(MemoryTracker(sam, model), monkeypatch, range(NUM_FRAMES))
    first, second = MemoryTracker(sam, model), MemoryTracker(sam, model)
    begun = logits_of(first, monkeypatch, range(6))
    path = tmp_path / "state.pt"
    torch.save(first.state(), path)
    second.restore(torch.load(path, weights_only=True))
    begun |= logits_of(second, monkeypatch, range(6, NUM_FRAMES))
    assert all((begun[key] == whole[key]).all() for key in whole)
    sizes = []
    for number in range(120):
        second.step(clip()[number % NUM_FRAMES], {"a": with_core(BOXES[0]["a"])} if number % 2 else {})
        if number in (59, 119):
            torch.save(second.state(), path)
            sizes.append(path.stat().st_size)
    assert sizes[1] < 1.02 * sizes[0]


def test_a_memory_that_does_not_fit_is_said_in_one_line(tmp_path: Path) -> None:
    image_only = write_hub_folder("sam2", tmp_path / "image")
    assert not has_memory(image_only)
    with pytest.raises(UserError, match="holds no weights of a memory"):
        load_video_model(tiny_family("sam2", width=VIDEO_WIDTH), image_only)
    other = saved("edgetam", tmp_path / "edgetam")
    with pytest.raises(UserError, match="is no Sam2VideoModel that sam2 fits into") as caught:
        load_video_model(tiny_family("sam2", width=VIDEO_WIDTH), other)
    assert "\n" not in str(caught.value)

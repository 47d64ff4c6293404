"""Our Predictor against segment_anything's SamPredictor: same weights, same image, same prompt, same answer."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import nn

from lesionsam.data.sources.synthetic import generate
from lesionsam.inference.image import ImagePredictor
from lesionsam.models.checkpoint import build_sam, load_sam
from lesionsam.models.sam import at_size

SIZES = [(128, 128), (97, 131), (211, 73), (64, 301), (400, 300)]  # (height, width): smaller, odd, narrow, larger
Prompt = dict[str, np.ndarray]
WEIGHTS = Path(__file__).parents[2] / "foundation" / "compact.safetensors"


def randomised(sam: Sam, seed: int = 0) -> Sam:
    """Random values also where segment_anything starts at 0: position embeddings and the biases of norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in sam.named_parameters():
        if "pos" in name or name.endswith("bias"):
            nn.init.trunc_normal_(value, std=0.05, generator=generator)
    return sam


@pytest.fixture(scope="module", params=["random", "foundation", "at 96 px"])
def compact(request: pytest.FixtureRequest) -> Sam:
    if request.param == "foundation":
        if not WEIGHTS.exists():
            pytest.skip("needs foundation/compact.safetensors")
        return load_sam("compact", WEIGHTS)
    torch.manual_seed(0)
    sam = randomised(build_sam("compact"))
    return at_size(sam, 96) if request.param == "at 96 px" else sam


def picture(height: int, width: int) -> np.ndarray:
    """A generated lesion, cut to this size."""
    image, _ = generate(0, 3, 480)
    return np.ascontiguousarray(
        np.resize(image, (max(height, image.shape[0]), *image.shape[1:]))[:height, :width]
        if width <= image.shape[1]
        else np.tile(image, (1, 3, 1))[:height, :width]
    )


def prompts(height: int, width: int, low_side: int) -> dict[str, Prompt]:
    """Prompts in original pixels, floats and whole numbers."""
    rng = np.random.default_rng(height)
    frame = np.array([width, height])
    box = {"box": np.array([0.2 * width, 0.15 * height, 0.8 * width, 0.9 * height])}
    whole = {"box": np.array([1, 2, width - 3, height])}
    point = {"point_coords": (frame / 2)[None], "point_labels": np.array([1])}
    several = {"point_coords": rng.uniform(0, 1, (5, 2)) * frame, "point_labels": np.array([1, 0, 1, 0, 1])}
    mask = {"mask_input": rng.normal(0, 5, (1, low_side, low_side)).astype(np.float32)}
    return {
        "point": point,
        "foreground and background": several,
        "box": box,
        "whole-number box": whole,
        "points and box": several | box,
        "mask": mask,
        "all": several | box | mask,
    }


def differences(sam: Sam, height: int, width: int, kinds: tuple[str, ...] | None = None) -> list[str]:
    """What differs between the two predictors, prompt by prompt; nothing, if all is well."""
    image = picture(height, width)
    assert image.shape == (height, width, 3)
    theirs, ours = SamPredictor(sam), ImagePredictor(sam)
    theirs.set_image(image)
    ours.set_image(image)
    wrong = []
    if not torch.allclose(ours.get_image_embedding(), theirs.get_image_embedding(), atol=1e-5):
        wrong.append("features")
    for kind, prompt in prompts(height, width, 4 * theirs.get_image_embedding().shape[-1]).items():
        if kinds is not None and kind not in kinds:
            continue
        for multimask in (False, True):
            before = deepcopy(prompt)
            expected = theirs.predict(**prompt, multimask_output=multimask, return_logits=True)
            found = ours.predict(**prompt, multimask_output=multimask, return_logits=True)
            for name, mine, yours in zip(("logits", "quality", "low_res"), found, expected, strict=True):
                if mine.shape != yours.shape or mine.dtype != yours.dtype:
                    wrong.append(
                        f"{kind}, {multimask}, {name}: {mine.shape} {mine.dtype}, not {yours.shape} {yours.dtype}"
                    )
                elif not np.allclose(mine, yours, atol=1e-4 if name == "logits" else 5e-5, rtol=1e-5):
                    wrong.append(f"{kind}, {multimask}, {name}: off by {np.abs(mine - yours).max():.2g}")
            if any(not np.array_equal(prompt[key], before[key]) for key in before):
                wrong.append(f"{kind}: the caller's prompt was changed")
    return wrong


def test_masks_are_the_logits_above_zero(compact: Sam) -> None:
    theirs, ours = SamPredictor(compact), ImagePredictor(compact)
    for predictor in (theirs, ours):
        predictor.set_image(picture(97, 131))
    for multimask in (False, True):
        point = {"point_coords": np.array([[60, 50]]), "point_labels": np.array([1]), "multimask_output": multimask}
        masks, quality, low_res = ours.predict(**point)
        expected = theirs.predict(**point)
        logits = theirs.predict(**point, return_logits=True)[0]
        assert masks.dtype == expected[0].dtype == bool
        assert masks.shape == (3 if multimask else 1, 97, 131)
        assert (masks == expected[0])[np.abs(logits) > 1e-4].all()
        np.testing.assert_allclose(quality, expected[1], atol=5e-5)
        np.testing.assert_allclose(low_res, expected[2], atol=5e-5)
    del point["multimask_output"]
    assert len(ours.predict(**point)[0]) == len(theirs.predict(**point)[0]) == 3  # the same default


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_compact_sam_equals_sam_predictor(compact: Sam, size: tuple[int, int]) -> None:
    assert differences(compact, *size) == []


def test_a_difference_would_be_seen(compact: Sam) -> None:
    """The comparison is no tautology: one pixel of shift in the box, or one changed weight, shows."""
    image = picture(97, 131)
    theirs, ours = SamPredictor(compact), ImagePredictor(compact)
    theirs.set_image(image)
    ours.set_image(image)
    box = np.array([20.0, 15, 100, 80])
    expected = theirs.predict(box=box, multimask_output=False, return_logits=True)[0]
    shifted = ours.predict(box=box + 1, multimask_output=False, return_logits=True)[0]
    assert not np.allclose(shifted, expected, atol=1e-4)
    changed = deepcopy(compact)
    with torch.no_grad():
        changed.image_encoder.get_parameter("pos_embed")[0, 0, 0] += 1
    other = ImagePredictor(changed)
    other.set_image(image)
    assert not np.allclose(other.predict(box=box, multimask_output=False, return_logits=True)[0], expected, atol=1e-4)


def test_refining_with_its_own_low_resolution_mask(compact: Sam) -> None:
    """The loop of an annotation tool: a box, then a point and the answer so far."""
    image = picture(211, 173)
    answers = []
    for predictor in (SamPredictor(compact), ImagePredictor(compact)):
        predictor.set_image(image)
        _, _, low_res = predictor.predict(box=np.array([30, 40, 150, 180]), multimask_output=False)
        logits, _, _ = predictor.predict(
            point_coords=np.array([[80.0, 100.0]]),
            point_labels=np.array([0]),
            mask_input=low_res,
            multimask_output=False,
            return_logits=True,
        )
        answers.append(logits)
    np.testing.assert_allclose(answers[1], answers[0], atol=2e-4)


@pytest.fixture(scope="module")
def vit_b() -> Sam:
    with torch.device("meta"):
        sam = build_sam("vit_b")
    sam = sam.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in sam.state_dict().values():  # buffers too: the prompt encoder's frequencies
            value.copy_(torch.randn(value.shape, generator=generator) * (0.02 if value.ndim > 1 else 0.05))
        for name, value in sam.named_parameters():
            if value.ndim == 1 and name.endswith("weight"):
                value.add_(1)  # of norms
        sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(50)
    sam.pixel_mean, sam.pixel_std = (
        torch.tensor(v).view(3, 1, 1) for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    )
    return sam.eval()


def test_vit_b_at_1024_px_equals_sam_predictor(vit_b: Sam) -> None:
    """ViT-B's widths and own size with two of its twelve blocks, for time and memory; all twelve run at 256 px."""
    sam = deepcopy(vit_b)
    del sam.image_encoder.blocks[2:]
    assert sam.image_encoder.img_size == 1024
    assert differences(sam, 211, 301, ("foreground and background", "points and box", "all")) == []


def test_vit_b_at_256_px_equals_sam_predictor(vit_b: Sam) -> None:
    """Position embeddings interpolated, windows that the grid of 16 does not fill, global attention interpolated."""
    assert differences(at_size(deepcopy(vit_b), 256), 190, 133, ("box", "points and box", "mask")) == []

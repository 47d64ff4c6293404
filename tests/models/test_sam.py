"""The SAM wrapper: files it takes and refuses, sizes other than the model's own, gradients, padding, resizing."""

from __future__ import annotations

import argparse
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from lesionsam.errors import UserError
from lesionsam.export.base import export, open_subject
from lesionsam.export.compare import check_pictures
from lesionsam.export.plain import PTH_FORMAT
from lesionsam.models.checkpoint import build_sam, load_sam, read_weights, save_sam
from lesionsam.models.compact import CompactArchitecture
from lesionsam.models.sam import at_size, decode, encode
from lesionsam.models.transforms import model_frames, resize_to_frame, upscale
from lesionsam.types import Frame, Prompts

TINY = CompactArchitecture(image_size=64, patch_size=8, width=32, depth=2, num_heads=2, prompt_width=32, decoder_mlp=64)
SIZES = [(64, 64), (97, 64), (64, 97), (33, 150), (151, 40), (1, 40), (511, 509)]  # (height, width)


def tiny_sam(seed: int = 0) -> Sam:
    torch.manual_seed(seed)
    return build_sam("compact", architecture=TINY)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "sam.safetensors"
    save_sam(tiny_sam(), path, name="compact", metadata={"method": "contrastive"})
    return path


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def same_weights(one: Sam, other: Sam) -> bool:
    mine, yours = one.state_dict(), other.state_dict()
    return list(mine) == list(yours) and all(torch.equal(mine[key], yours[key]) for key in mine)


# ------------------------------------------------------------------------------------------------------------- files


def test_saved_weights_come_back_bit_for_bit_with_what_they_are(saved: Path) -> None:
    for name in ("compact", None):
        sam = load_sam(name, saved)
        assert same_weights(sam, tiny_sam())
        assert not sam.training
        assert all(p.requires_grad and p.device.type == "cpu" for n, p in sam.named_parameters() if "gaussian" not in n)
    with safe_open(saved, "pt") as file:
        notes = file.metadata()
    assert (notes["name"], notes["image_size"], notes["method"]) == ("compact", "64", "contrastive")
    assert json.loads(notes["architecture"]) == TINY.numbers()


def test_a_loaded_model_predicts_what_the_saved_one_did(saved: Path) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = Prompts(boxes=torch.tensor([[3.0, 4, 40, 50], [10, 10, 60, 30]]))
    with torch.no_grad():
        before, after = (decode(sam, encode(sam, images), prompts)[0] for sam in (tiny_sam(), load_sam(None, saved)))
    assert torch.equal(before, after)


def test_loaded_weights_do_not_lie_on_the_file(saved: Path) -> None:
    sam = load_sam(None, saved)
    with saved.open("r+b") as file:
        file.seek(0)
        file.write(b"\0" * saved.stat().st_size)
        os.fsync(file.fileno())
    assert same_weights(sam, tiny_sam())


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_sam(tiny_sam().half(), path, name="compact")
    sam = load_sam("compact", path)
    assert {p.dtype for p in sam.parameters()} == {torch.float32}
    assert same_weights(sam, tiny_sam().half().float())


def test_a_model_saved_at_another_side_comes_back_at_that_side(tmp_path: Path) -> None:
    """The relative positions keep the size they were trained at, the absolute ones have the new one."""
    for side in (96, 32):
        path = tmp_path / f"{side}.safetensors"
        sam = at_size(tiny_sam(), side)
        save_sam(sam, path, name="compact")
        again = load_sam("compact", path)
        assert again.image_encoder.img_size == side
        assert same_weights(again, sam)
        assert load_sam("compact", path, image_size=64).image_encoder.img_size == 64


def test_saving_fails_without_trace(tmp_path: Path) -> None:
    sam = tiny_sam()
    path = tmp_path / "sam.safetensors"
    path.mkdir()
    with pytest.raises(OSError, match=r"sam\.safetensors"):
        save_sam(sam, path, name="compact")
    assert [entry.name for entry in tmp_path.iterdir()] == ["sam.safetensors"]


def refused(path: Path, name: str | None = "compact") -> str:
    with pytest.raises(UserError) as caught:
        load_sam(name, path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "no such weights file" in refused(tmp_path / "none.pth")
    assert "folder" in refused(tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\n <!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"<html><head>", "HTML"),
        (b"", "cannot be read"),
        (b"\0" * 40, ""),
        (b"not weights at all", ""),
    ],
)
def test_what_is_no_file_of_weights(tmp_path: Path, suffix: str, content: bytes, says: str) -> None:
    path = tmp_path / f"sam{suffix}"
    path.write_bytes(content)
    assert says in refused(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated_files(tmp_path: Path, saved: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save(tiny_sam().state_dict(), path)
    else:
        path.write_bytes(saved.read_bytes())
    os.truncate(path, int(path.stat().st_size * share))
    assert "damaged" in refused(path)


def test_safetensors_whose_header_is_as_long_as_an_html_page_starts(tmp_path: Path) -> None:
    """The file begins with its header's length; 15392 reads " <" there, which is no sign of HTML."""
    path = tmp_path / "sam.safetensors"
    save_sam(tiny_sam(), path, name="compact", metadata={"note": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    target = next(n for n in (0x3C20 + 0x10000 * k for k in range(4)) if n > length)
    save_sam(tiny_sam(), path, name="compact", metadata={"note": "x" * (target - length)})
    assert path.read_bytes()[:2] == b" <"
    assert same_weights(load_sam("compact", path), tiny_sam())


class RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["LESIONSAM_TEST_TARGET"],)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "made by the pickle"
    monkeypatch.setenv("LESIONSAM_TEST_TARGET", str(target))
    path = tmp_path / "sam.pth"
    torch.save({"image_encoder.pos_embed": RunsCode()}, path)
    assert "code" in refused(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda state: {f"module.{key}": value for key, value in state.items()}, "removed the prefix 'module.'"),
        (lambda state: {f"sam_model.{key}": value for key, value in state.items()}, "removed the prefix 'sam_model.'"),
        (lambda state: {f"_orig_mod.{key}": value for key, value in state.items()}, "removed '_orig_mod.'"),
        (lambda state: {"model": state, "epoch": 3, "optimizer": {"lr": 1.0}}, "'model', ignored epoch, optimizer"),
        (lambda state: {"state_dict": {f"module.sam.{k}": v for k, v in state.items()}}, "prefix 'module.sam.'"),
    ],
)
def test_wrapped_checkpoints_are_unwrapped_with_a_note(
    wrap: Callable[[dict], dict], note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.device("meta"):
        state = sam_model_registry["vit_b"]().state_dict()
    path = tmp_path / "sam.pth"
    small = {key: torch.zeros(1).expand(value.shape) for key, value in state.items()}  # one stored number per tensor
    torch.save(wrap(small), path)
    read, metadata = read_weights(path)
    assert {key: value.shape for key, value in read.items()} == {key: value.shape for key, value in state.items()}
    assert metadata == {}
    assert note in capsys.readouterr().err


def test_pickled_arguments_are_named(tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    torch.save({"model": tiny_sam().state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(UserError, match=r"holds a Python object \(argparse\.Namespace\) beside the weights"):
        read_weights(path)


def test_an_exported_pth_of_the_compact_sam_needs_its_architecture_beside_it(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(open_subject(saved), [PTH_FORMAT], folder, pictures=check_pictures(None, 1))
    path = folder / "pth" / "sam.pth"
    assert same_weights(load_sam("compact", path), load_sam("compact", saved))
    (path.with_name("architecture.json")).unlink()
    with pytest.raises(UserError, match=r"keep architecture\.json of the export beside it"):
        load_sam(None, path)


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    notes = {f"note{k}": str(k) for k in range(8)}  # 9! orders of the header's entries
    files = [tmp_path / f"{k}.safetensors" for k in range(4)]
    for k, path in enumerate(files):
        save_sam(tiny_sam(), path, name="compact", metadata=dict(sorted(notes.items(), reverse=k % 2 == 1)))
    assert len({path.read_bytes() for path in files}) == 1
    assert read_weights(files[0])[1].items() >= notes.items()


def test_wrong_keys_shapes_values_and_containers(tmp_path: Path) -> None:
    state = tiny_sam().state_dict()
    notes = {"name": "compact", "architecture": json.dumps(vars(TINY))}
    first = "mask_decoder.iou_token.weight"

    def written(name: str, changed: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in changed.items()}, path, metadata or notes)
        return path

    assert same_weights(load_sam("compact", written("good", state)), tiny_sam())
    assert f"missing ({first})" in refused(written("missing", {k: v for k, v in state.items() if k != first}))
    assert "unknown (head.weight)" in refused(written("unknown", {**state, "head.weight": torch.zeros(1)}))
    assert f"another shape ({first})" in refused(written("shape", {**state, first: torch.zeros(2, 32)}))
    assert f"{first} holds values that are not finite" in refused(written("nan", {**state, first: state[first] / 0}))
    assert "holds no SAM" in refused(written("other", {"layer.weight": torch.zeros(3)}))
    assert "architecture" in refused(written("bare", state, {"name": "compact"}))
    assert "architecture" in refused(written("scrambled", state, {"name": "compact", "architecture": "{"}))
    for name, content in {"list": [1], "nested": {"layers": dict(state), "epoch": 3}, "tensor": torch.ones(2)}.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        assert "expected tensors" in refused(path)


@pytest.mark.parametrize(("width", "held"), [(768, "vit_b"), (1024, "vit_l"), (1280, "vit_h")])
def test_weights_of_another_model_are_named_by_their_width(tmp_path: Path, width: int, held: str) -> None:
    path = tmp_path / "sam_of_unknown_origin.pth"
    torch.save(OrderedDict({"image_encoder.pos_embed": torch.zeros(1, 64, 64, width)}), path)
    message = refused(path, "compact")
    assert held in message
    assert "compact" in message
    assert held in refused(path, "vit_b" if held != "vit_b" else "vit_l")


def test_an_adapted_file_of_another_model_is_refused(saved: Path) -> None:
    assert "compact" in refused(saved, "vit_b")


# ------------------------------------------------------------------------------------------------------- model frame


@pytest.mark.parametrize("side", [64, 128, 1024])
@pytest.mark.parametrize("size", SIZES[:-2])
def test_resize_equals_segment_anything(size: tuple[int, int], side: int) -> None:
    image = picture(*size)
    assert np.array_equal(resize_to_frame(image, Frame(side)), ResizeLongestSide(side).apply_image(image))


def test_an_image_of_which_nothing_would_be_left_is_refused() -> None:
    with pytest.raises(UserError, match="2000x3 px"):
        resize_to_frame(picture(3, 2000), Frame(64))


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_equals_segment_anything(size: tuple[int, int]) -> None:
    sam = tiny_sam()
    image = picture(*size)
    frames, sizes = model_frames([image], Frame(64))
    resized = torch.as_tensor(ResizeLongestSide(64).apply_image(image)).permute(2, 0, 1)[None]
    expected = sam.preprocess(resized)
    assert torch.equal(sam.normalize(frames, sizes), expected)
    height, width = sizes[0].tolist()
    assert (height, width) == tuple(resized.shape[-2:])
    padded = sam.normalize(frames, sizes)
    assert not padded[..., height:, :].any()
    assert not padded[..., width:].any()


def test_padding_is_zero_after_normalisation_whatever_the_frame_holds_there() -> None:
    frames = torch.full((2, 3, 64, 64), 200, dtype=torch.uint8)
    out = build_sam("compact").normalize(frames, torch.tensor([[64, 20], [33, 64]]))
    assert not out[0, :, :, 20:].any()
    assert not out[1, :, 33:].any()
    assert (out[0, :, :, :20] != 0).all()
    assert (out[1, :, :33] != 0).all()
    expected = torch.tensor([(200 - 123.675) / 58.395, (200 - 116.28) / 57.12, (200 - 103.53) / 57.375])
    torch.testing.assert_close(out[0, :, 5, 5], expected)


@pytest.mark.parametrize("size", SIZES)
def test_upscaling_equals_segment_anything(size: tuple[int, int]) -> None:
    sam = tiny_sam()
    low_res = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    scaled = ResizeLongestSide.get_preprocess_shape(*size, 64)
    assert torch.equal(upscale(low_res, scaled, size, Frame(64)), sam.postprocess_masks(low_res, scaled, size))
    alone = upscale(low_res[1, 2], scaled, size, Frame(64))
    torch.testing.assert_close(alone, sam.postprocess_masks(low_res, scaled, size)[1, 2], atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------- batches, gradients, other sizes

KINDS = {
    "point": Prompts(torch.tensor([[[30.0, 20.0]], [[8.5, 50.0]], [[60.0, 3.0]]]), torch.ones(3, 1, dtype=torch.int64)),
    "foreground and background": Prompts(
        torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(2)) * 64, torch.tensor([[1, 0, 1, 0]] * 3)
    ),
    "box": Prompts(boxes=torch.tensor([[2.0, 3, 40, 50], [10, 5, 63.5, 30], [0, 0, 64, 64]])),
    "mask": Prompts(masks=torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(3))),
}
KINDS["box and points"] = Prompts(KINDS["point"].points, KINDS["point"].labels, KINDS["box"].boxes)
KINDS["everything"] = Prompts(KINDS["point"].points, KINDS["point"].labels, KINDS["box"].boxes, KINDS["mask"].masks)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_one_by_one(kind: str, multimask: bool) -> None:
    sam, prompts = tiny_sam(), KINDS[kind]
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encode(sam, images)
        masks, quality = decode(sam, features, prompts, multimask)
        assert masks.shape == (3, 3 if multimask else 1, 32, 32)
        assert quality.shape == masks.shape[:2]
        for k in range(3):
            alone = encode(sam, images[k : k + 1])
            torch.testing.assert_close(alone[0], features[k], atol=1e-5, rtol=0)
            mask, iou = decode(sam, alone, prompts[slice(k, k + 1)], multimask)
            torch.testing.assert_close(mask[0], masks[k], atol=1e-5, rtol=0)
            torch.testing.assert_close(iou[0], quality[k], atol=1e-5, rtol=0)
    assert not torch.allclose(masks[0], masks[1], atol=1e-3)  # each image has an answer of its own


@pytest.mark.parametrize("kind", ["foreground and background", "box", "everything"])
def test_gradients_reach_all_three_parts(kind: str) -> None:
    sam = tiny_sam()
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    masks, quality = decode(sam, encode(sam, images), KINDS[kind])
    (masks.square().mean() + quality.square().mean()).backward()
    reached = {name for name, p in sam.named_parameters() if p.grad is not None and bool(p.grad.any())}
    parts = {name.split(".")[0] for name in reached}
    assert parts == {"image_encoder", "prompt_encoder", "mask_decoder"}
    encoder = {name for name, _ in sam.named_parameters() if name.startswith("image_encoder")}
    assert encoder <= reached  # patch and position embeddings and the first block too
    prompt = {
        "box": "point_embeddings.2",
        "everything": "mask_downscaling.0",
        "foreground and background": "point_embeddings.0",
    }[kind]
    assert f"prompt_encoder.{prompt}.weight" in reached


@pytest.mark.parametrize("side", [32, 64, 96, 120])
def test_any_side_that_the_patch_divides_runs(side: int) -> None:
    sam = at_size(tiny_sam(), side)
    grid = side // 8
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    masks, _ = decode(sam, encode(sam, images), Prompts(boxes=torch.tensor([[2.0, 3, side - 4, side - 8]] * 2)))
    assert masks.shape == (2, 1, 4 * grid, 4 * grid)
    assert bool(torch.isfinite(masks).all())
    with_mask, _ = decode(sam, encode(sam, images), Prompts(masks=masks.detach()))
    assert with_mask.shape == masks.shape
    masks.mean().backward()
    assert sam.image_encoder.pos_embed.grad is not None


def test_position_embeddings_keep_their_pattern_at_another_side() -> None:
    """A smooth pattern over the grid is the same pattern on a finer or coarser one; SAM's own size changes nothing."""
    sam = tiny_sam()
    ramp = torch.linspace(-1, 1, 8)
    with torch.no_grad():
        sam.image_encoder.pos_embed[:] = ramp[None, None, :, None] + 2 * ramp[None, :, None, None]
    assert at_size(sam, 0) is sam
    assert at_size(sam, 64).image_encoder.pos_embed.shape == (1, 8, 8, 32)
    for side, grid, tolerance in ((128, 16, 1e-3), (32, 4, 0.06)):  # shrunk to 4 cells, the border reaches the middle
        small = at_size(tiny_sam(), 64)
        small.load_state_dict(sam.state_dict())
        position = at_size(small, side).image_encoder.pos_embed.detach()
        assert position.shape == (1, grid, grid, 32)
        across, down = position[0, grid // 2, :, 0], position[0, :, grid // 2, 0]
        middle = slice(grid // 4, -grid // 4)
        steps, expected = across.diff()[middle], 2 / 7 * 8 / grid
        torch.testing.assert_close(steps, torch.full_like(steps, expected), atol=tolerance * expected, rtol=0)
        torch.testing.assert_close(down.diff()[middle], 2 * steps, atol=2 * tolerance * expected, rtol=0)


@pytest.mark.parametrize("side", [32, 96])
def test_a_prompt_at_the_same_place_means_the_same_at_another_side(side: int) -> None:
    """Coordinates are taken as shares of the new side; segment_anything counts them from pixel centres."""
    box = torch.tensor([[6.0, 9, 40, 52.5]])
    there = (box + 0.5) * side / 64 - 0.5
    encoders = tiny_sam().prompt_encoder, at_size(tiny_sam(), side).prompt_encoder
    sparse, dense = encoders[0](points=None, boxes=box, masks=None)
    other_sparse, other_dense = encoders[1](points=None, boxes=there, masks=None)
    torch.testing.assert_close(other_sparse, sparse, atol=1e-4, rtol=0)
    assert other_dense.shape[-2:] == (side // 8, side // 8)
    assert torch.equal(other_dense[..., 0, 0], dense[..., 0, 0])


@pytest.mark.parametrize("side", [4, 100, -8])
def test_impossible_sides_are_refused(side: int) -> None:
    with pytest.raises(UserError, match=f"multiple of 8 .compact., got {side}"):
        at_size(tiny_sam(), side)


def test_a_frozen_position_embedding_stays_frozen() -> None:
    sam = tiny_sam().requires_grad_(False)
    assert not at_size(sam, 96).image_encoder.pos_embed.requires_grad

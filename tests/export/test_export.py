"""Exports, each loaded back by the library that is meant to read it; and what stands in the way of one."""

from __future__ import annotations

import ast
import json
import re
import runpy
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from segment_anything import sam_model_registry
from typer.testing import CliRunner

from helpers.tiny import ARCHITECTURE, SIDE, tiny_sam
from lesionsam.cli.app import app
from lesionsam.errors import UserError
from lesionsam.export import compare as comparing
from lesionsam.export.base import Format, Subject, export, open_subject
from lesionsam.export.compare import Check, Prompt, Segment
from lesionsam.export.plain import PTH_FORMAT, SAFETENSORS_FORMAT
from lesionsam.export.vanilla_sam import plain_state, registry_name, reload_copied
from lesionsam.inference.image import ImagePredictor
from lesionsam.inference.lesion import trained_without_prompt
from lesionsam.models import standalone
from lesionsam.models.checkpoint import build_sam, load_sam, save_sam, weights_metadata
from lesionsam.models.finetuned import Strategy, attach
from lesionsam.models.sam import Sam, at_size, encode
from lesionsam.models.sam1 import Sam1, build_numbers, build_registered
from lesionsam.prompts import TRAINED_WITH
from lesionsam.utils.locks import folder_lock

# Like ViT-B in all but the numbers: windows that do not fill the grid, and blocks of both kinds.
VIT_LIKE = {
    "image_size": 40,
    "patch_size": 4,
    "width": 48,
    "depth": 3,
    "num_heads": 4,
    "mlp_dim": 192,
    "window_size": 4,
    "global_attn_indexes": [1],
    "prompt_width": 32,
    "mask_in_chans": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 8,
    "decoder_mlp": 64,
    "num_multimask_outputs": 3,
    "iou_head_depth": 3,
    "iou_head_hidden_dim": 24,
}


def vit_like() -> Sam1:
    """Random weights, every one of them away from the zero or one that it starts with."""
    torch.manual_seed(1)
    sam = build_numbers(VIT_LIKE, "like ViT-B")
    with torch.no_grad():
        for value in sam.parameters():
            value.add_(torch.randn(value.shape) * 0.05)
    return sam


def subject_of(sam: Sam1) -> Subject:
    """A model that lies in no file."""
    return Subject(sam, Path("none.pth"), "0" * 64, standalone.numbers_of(sam))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_sam(tiny_sam(sharpness=4), path, name="compact")
    return path


@pytest.fixture(scope="module")
def subject(weights: Path) -> Subject:
    return open_subject(weights)


def pictures(count: int = 2) -> list[Callable[[], np.ndarray]]:
    """Of two aspect ratios, larger and smaller than the model's input."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (70 - 45 * k, 40 + 11 * k, 3), dtype=np.uint8) for k in range(count)]
    return [lambda image=image: image for image in images]


def hidden(folder: Path) -> list[str]:
    """What an export has left beside its results."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def run_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Run the Python of an export's README in its folder, on a picture and a box; what it leaves behind."""
    exif = Image.Exif()
    exif[274] = 6  # stored a quarter turn to the left, as cameras do
    turned = Image.fromarray(pictures(1)[0]()).transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "image.jpg", exif=exif)
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[0]
    (folder / "snippet.py").write_text(code)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return runpy.run_path("snippet.py", {"x0": 5, "y0": 8, "x1": 30, "y1": 60})


def expected_mask(subject: Subject, folder: Path) -> np.ndarray:
    """Ours, of the same picture and box."""
    predictor = ImagePredictor(subject.sam)
    predictor.set_image(np.asarray(ImageOps.exif_transpose(Image.open(folder / "image.jpg")).convert("RGB")))
    return predictor.predict(box=np.array([5, 8, 30, 60]), multimask_output=False)[0][0]


# ------------------------------------------------------------------------------------------------- segment-anything


@pytest.mark.parametrize("form", [PTH_FORMAT, SAFETENSORS_FORMAT], ids=lambda form: form.name)
def test_plain_weights_load_into_segment_anything(subject: Subject, form: Format, tmp_path: Path) -> None:
    (outcome,) = export(subject, [form], tmp_path, pictures=pictures())
    assert outcome.faults == []
    assert outcome.check is not None
    assert (outcome.check.num_images, outcome.check.num_prompts) == (2, 8)
    assert outcome.check.largest_difference < 1e-4 < outcome.check.largest_logit
    assert outcome.check.lowest_iou == 1
    folder = tmp_path / form.name
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "architecture.json",
        "card.json",
        "load_sam.py",
        f"sam.{form.name}",
    ]
    assert outcome.num_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert hidden(tmp_path) == []
    card = json.loads((folder / "card.json").read_text())
    assert card["model"]["weights_sha256"] == subject.sha256
    assert card["check"]["largest_difference"] == outcome.check.largest_difference
    assert set(card["files"]) == {"README.md", "architecture.json", "load_sam.py", f"sam.{form.name}"}
    assert "Not a medical device" in (folder / "README.md").read_text()
    if form is SAFETENSORS_FORMAT:  # this project reads it too
        again = load_sam("compact", folder / "sam.safetensors")
        assert all(torch.equal(again.state_dict()[key], value) for key, value in subject.state().items())


def test_exported_safetensors_are_asked_without_a_prompt_as_the_weights_were(tmp_path: Path) -> None:
    save_sam(tiny_sam(), tmp_path / "best.safetensors", name="compact", metadata={TRAINED_WITH: "box none"})
    (outcome,) = export(
        open_subject(tmp_path / "best.safetensors"), [SAFETENSORS_FORMAT], tmp_path, pictures=pictures(1)
    )
    assert outcome.faults == []
    notes = weights_metadata(tmp_path / "safetensors" / "sam.safetensors")
    assert trained_without_prompt(notes)
    assert trained_without_prompt(weights_metadata(tmp_path / "best.safetensors"))
    assert notes["format"] == "pt"


def test_a_pth_is_tensors_alone(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(subject, [PTH_FORMAT], tmp_path, pictures=pictures(1))
    predictor = run_readme(tmp_path / "pth", monkeypatch)["predictor"]
    predictor.set_image(np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "pth" / "image.jpg"))))
    masks, _, _ = predictor.predict(box=np.array([5, 8, 30, 60]), multimask_output=False)
    assert np.array_equal(masks[0], expected_mask(subject, tmp_path / "pth"))
    state = torch.load(tmp_path / "pth" / "sam.pth", weights_only=True)
    assert set(state) == set(subject.sam.state_dict())
    assert all(torch.equal(state[key], value) for key, value in subject.sam.state_dict().items())


def test_the_shipped_builder_stands_alone(subject: Subject, tmp_path: Path) -> None:
    export(subject, [PTH_FORMAT], tmp_path, pictures=pictures(1))
    tree = ast.parse((tmp_path / "pth" / "load_sam.py").read_text())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    tops = {name.split(".")[0] for name in names}
    assert tops == {"__future__", "json", "functools", "pathlib", "torch", "segment_anything", "safetensors"}


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_published_models_are_known_by_their_numbers(name: str) -> None:
    with torch.device("meta"):
        sam = build_registered(name)
        again = standalone.build(standalone.numbers_of(sam))
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in sam.state_dict().items()
    }
    assert [block.window_size for block in again.image_encoder.blocks] == [
        block.window_size for block in sam.image_encoder.blocks
    ]
    assert registry_name(sam) == name
    with torch.device("meta"):
        assert registry_name(at_size(sam, 512)) is None
    assert registry_name(vit_like()) is None


def test_another_input_side_is_written_out(tmp_path: Path) -> None:
    """Relative positions of the trained grid are interpolated once; the rebuilt model computes the same."""
    for sam in (vit_like(), build_numbers(ARCHITECTURE.numbers())):
        at_size(sam, 64)
        grid = sam.side // 4
        one = subject_of(sam)
        state = one.state()
        lengths = {len(value) for key, value in state.items() if "rel_pos" in key}
        assert 2 * grid - 1 in lengths
        PTH_FORMAT.write(one, tmp_path)
        again = reload_copied(tmp_path, "sam.pth")
        frames = torch.randn(1, 3, sam.side, sam.side)
        with torch.inference_mode():
            assert torch.allclose(again.image_encoder(frames), encode(sam, frames), atol=1e-5)


def test_a_published_model_goes_through_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    sam = vit_like()

    def registry(name: str, path: Path) -> Sam1:
        asked.append((name, path.name))
        sam.load_state_dict(torch.load(path, weights_only=True))
        return sam

    monkeypatch.setattr("lesionsam.export.plain.reload_registry", registry)
    monkeypatch.setattr("lesionsam.export.plain.registry_name", lambda sam: "vit_b")
    one = subject_of(vit_like())
    (outcome,) = export(one, [PTH_FORMAT], tmp_path, pictures=pictures(1))
    assert outcome.faults == []
    assert asked == [("vit_b", "sam.pth")]
    assert 'sam_model_registry["vit_b"](checkpoint="sam.pth")' in (tmp_path / "pth" / "README.md").read_text()


def test_low_rank_updates_are_merged_and_adapters_refused(tmp_path: Path) -> None:
    sam = tiny_sam()
    attach(sam, Strategy("lora", lora_rank=2, lora_alpha=2.0))
    with torch.no_grad():
        for name, value in sam.named_parameters():
            if "lora_B" in name:
                value.normal_()
    state = plain_state(sam)
    assert set(state) == set(tiny_sam().state_dict())
    key = "image_encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(state[key], tiny_sam().state_dict()[key])
    adapted = tiny_sam()
    attach(adapted, Strategy("adapter", adapter_dim=4))
    save_sam(adapted, tmp_path / "adapted.safetensors", name="compact")
    outcomes = export(
        open_subject(tmp_path / "adapted.safetensors"), [PTH_FORMAT], tmp_path / "out", pictures=pictures(1)
    )
    assert "adapters cannot be merged" in outcomes[0].faults[0]
    assert list((tmp_path / "out").iterdir()) == []


# ------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize(
    "make",
    [lambda: tiny_sam(sharpness=4), vit_like, lambda: at_size(vit_like(), 64)],
    ids=["compact", "like ViT-B", "like ViT-B, another side"],
)
def test_hugging_face_gives_the_same_logits(
    make: Callable[[], Sam], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from lesionsam.export.huggingface import FORMAT

    one = subject_of(make())
    # Random weights on noise: the processor's other way of resizing moves pixels over the threshold.
    (outcome,) = export(one, [FORMAT], tmp_path, pictures=same_size(one.side))
    assert outcome.faults == []
    assert outcome.check is not None
    assert outcome.check.largest_difference < 1e-4 * max(1, outcome.check.largest_logit)
    found = run_readme(tmp_path / "hf", monkeypatch)["masks"][0][0, 0].numpy()
    assert found.shape == (70, 40)
    processor = transformers.SamProcessor.from_pretrained(tmp_path / "hf")
    assert processor.image_processor.size["longest_edge"] == one.side
    assert processor.image_processor.pad_size["height"] == one.side
    licence = "apache-2.0" if one.sam.name == "compact" else "other"  # of weights whose origin is not known
    assert (tmp_path / "hf" / "README.md").read_text().startswith(f"---\nlicense: {licence}\n")


def same_size(side: int) -> list[Callable[[], np.ndarray]]:
    """Pictures that no library has to resize."""
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, (height, side, 3), dtype=np.uint8) for height in (side, side - 7)]
    return [lambda image=image: image for image in images]


def test_hugging_face_knows_every_key() -> None:
    pytest.importorskip("transformers")
    from transformers import SamModel

    from lesionsam.models.hub import config_of, renamed_state

    for name in ("vit_b", "vit_h"):
        with torch.device("meta"):
            sam = sam_model_registry[name]()
            model = SamModel(config_of(standalone.numbers_of(sam)))
        wanted = {key: value.shape for key, value in model.state_dict().items()}
        found = renamed_state(sam.state_dict(), 3)
        assert {key: value.shape for key, value in found.items()} == wanted


# ------------------------------------------------------------------------------------------------- onnx


def test_onnx_takes_any_number_of_images_points_and_prompts(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One export: the check on pictures, then what the check does not ask."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from lesionsam.export.onnx import DECODER, ENCODER, FORMAT, INPUTS, OPSET, DecoderGraph, EncoderGraph

    (outcome,) = export(subject, [FORMAT], tmp_path, pictures=pictures())
    assert outcome.faults == []
    assert outcome.check is not None
    assert outcome.check.largest_difference < 1e-4 * max(1, outcome.check.largest_logit)
    assert f"opset {OPSET}" in (tmp_path / "onnx" / "README.md").read_text()
    found = run_readme(tmp_path / "onnx", monkeypatch)["mask"]
    assert np.array_equal(found, expected_mask(subject, tmp_path / "onnx"))
    encoder, decoder = (
        onnxruntime.InferenceSession(str(tmp_path / "onnx" / name), providers=["CPUExecutionProvider"])
        for name in (ENCODER, DECODER)
    )
    generator = torch.Generator().manual_seed(0)
    graph = EncoderGraph(subject.sam)
    for shape in ((1, 3, SIDE, SIDE), (3, 3, SIDE, 9), (2, 3, 20, SIDE)):
        frames = torch.rand(shape, generator=generator) * 255
        with torch.inference_mode():
            expected = graph(frames).numpy()
        np.testing.assert_allclose(encoder.run(None, {"images": frames.numpy()})[0], expected, atol=1e-4)
    grid, graph = SIDE // ARCHITECTURE.patch_size, DecoderGraph(subject.sam)
    for num_images, num_prompts, num_points, num_masks, has_mask in ((1, 1, 1, 1, 0), (1, 4, 7, 1, 1), (3, 3, 2, 3, 1)):
        given = (
            torch.randn(num_images, ARCHITECTURE.prompt_width, grid, grid, generator=generator),
            torch.rand(num_prompts, num_points, 2, generator=generator) * SIDE,
            torch.randint(-1, 4, (num_prompts, num_points), generator=generator).float(),
            torch.randn(num_masks, 1, 4 * grid, 4 * grid, generator=generator),
            torch.tensor([float(has_mask)]),
            torch.tensor([23.0 + num_points, 57]),
        )
        with torch.inference_mode():
            expected = graph(*given)
        found = decoder.run(None, dict(zip(INPUTS, (value.numpy() for value in given), strict=True)))
        assert found[0].shape == (num_prompts, 4, 23 + num_points, 57)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), atol=2e-4)
    # segment_anything's own export declares all six inputs as float32.
    assert {each.name: each.type for each in decoder.get_inputs()} == dict.fromkeys(INPUTS, "tensor(float)")
    for num_images, num_prompts in ((2, 3), (3, 2), (2, 1)):  # neither one image nor one for each prompt
        zeros = (
            np.zeros((num_images, ARCHITECTURE.prompt_width, grid, grid), np.float32),
            np.zeros((num_prompts, 1, 2), np.float32),
            np.ones((num_prompts, 1), np.float32),
            np.zeros((1, 1, 4 * grid, 4 * grid), np.float32),
            np.zeros(1, np.float32),
            np.array([23, 57], np.float32),
        )
        with pytest.raises(Exception, match=r"out of (data )?bounds|[Ii]nvalid ind"):
            decoder.run(None, dict(zip(INPUTS, zeros, strict=True)))


@pytest.mark.parametrize(
    ("box", "points"), [((4, 6, 25, 20), None), (None, [(7, 9)]), ((4, 6, 25, 20), [(7, 9), (20, 3)])]
)
def test_the_decoder_graph_is_segment_anythings_decoder(box: tuple | None, points: list | None) -> None:
    """All four masks of the graph against SamPredictor's, low resolution and original size."""
    from segment_anything import SamPredictor

    from lesionsam.export.onnx import DecoderGraph, EncoderGraph, prompt_points

    sam = vit_like()
    predictor = SamPredictor(sam)
    image = np.random.default_rng(2).integers(0, 256, (57, 40, 3), dtype=np.uint8)
    predictor.set_image(image)
    labels = None if points is None else np.array([1, 0][: len(points)])
    prompt = Prompt(None if box is None else np.array(box), None if points is None else np.array(points), labels)
    small = torch.as_tensor(np.asarray(Image.fromarray(image).resize((28, 40), Image.Resampling.BILINEAR)).copy())
    features = EncoderGraph(sam)(small.permute(2, 0, 1)[None].float())
    assert torch.allclose(features, predictor.get_image_embedding(), atol=1e-4)
    coords, kinds = (torch.as_tensor(value) for value in prompt_points(prompt, (57, 40), 40))
    masks, predicted, low_res = DecoderGraph(sam)(
        features, coords, kinds, torch.zeros(1, 1, 40, 40), torch.zeros(1), torch.tensor([57.0, 40.0])
    )
    for multimask, chosen in ((False, slice(0, 1)), (True, slice(1, None))):
        expected = predictor.predict(
            prompt.points, prompt.labels, prompt.box, multimask_output=multimask, return_logits=True
        )
        for mine, theirs in zip((masks, predicted, low_res), expected, strict=True):
            np.testing.assert_allclose(mine[0, chosen].detach().numpy(), theirs, atol=1e-4)


# ------------------------------------------------------------------------------------------------- what goes wrong


def broken(
    write: Callable[[Subject, Path], None] | None = None, reload: Callable[[Subject, Path], Segment] | None = None
) -> Format:
    """A format named pth with a part exchanged."""
    return replace(PTH_FORMAT, write=write or PTH_FORMAT.write, reload=reload or PTH_FORMAT.reload)


def test_other_weights_fail_and_leave_the_earlier_export(subject: Subject, tmp_path: Path) -> None:
    export(subject, [PTH_FORMAT], tmp_path, pictures=pictures(1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "pth").iterdir()}

    def write_wrong(one: Subject, folder: Path) -> None:
        sam = deepcopy(one.sam)
        with torch.no_grad():
            sam.image_encoder.get_parameter("pos_embed").add_(torch.randn(ARCHITECTURE.width))
        PTH_FORMAT.write(replace(one, sam=sam), folder)

    (outcome,) = export(subject, [broken(write_wrong)], tmp_path, pictures=pictures(1))
    assert outcome.folder is None
    assert "logits differ by" in outcome.faults[0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "pth").iterdir()} == before
    assert hidden(tmp_path) == []


def test_a_killed_export_is_cleared_up_by_the_next(subject: Subject, tmp_path: Path) -> None:
    """kill -9 leaves a hidden folder, or one moved aside; a running export holds its own."""
    for name in (".onnx.building", ".hf.old", ".pth.old", ".mlflow.building", "pth"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with folder_lock(tmp_path / ".mlflow.building", ""):
        export(subject, [SAFETENSORS_FORMAT], tmp_path, pictures=pictures(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.building", "hf", "pth", "safetensors"]
    assert (tmp_path / ".mlflow.building" / "file").read_text() == ".mlflow.building"
    assert (tmp_path / "hf" / "file").read_text() == ".hf.old"
    assert (tmp_path / "pth" / "file").read_text() == "pth"


def test_the_runs_model_card_goes_along_with_its_own_weights_only(subject: Subject, tmp_path: Path) -> None:
    card = tmp_path / "model_card.md"
    for text, expected in ((f"weights {subject.sha256}", True), ("weights of another run", False)):
        card.write_text(text)
        export(subject, [PTH_FORMAT], tmp_path / "out", pictures=pictures(1), model_card=card)
        assert (tmp_path / "out" / "pth" / "MODEL_CARD.md").exists() is expected


def test_an_interrupted_export_never_looks_done(subject: Subject, tmp_path: Path) -> None:
    def stop(one: Subject, folder: Path) -> Segment:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(subject, [broken(reload=stop)], tmp_path, pictures=pictures(1))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_fails_its_format_alone(subject: Subject, tmp_path: Path) -> None:
    def write(one: Subject, folder: Path) -> None:
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    outcomes = export(subject, [broken(write), SAFETENSORS_FORMAT], tmp_path, pictures=pictures(1))
    assert [outcome.folder for outcome in outcomes] == [None, tmp_path / "safetensors"]
    assert outcomes[0].faults[0] in (  # an installed package, the sources on the path
        "onnx is not installed; install lesionsam[export]",
        "needs the package onnx; `make setup` installs it",
    )


def test_a_check_sees_what_differs() -> None:
    low_res, mask = np.array([[3.0, -2.0]], np.float32), np.array([[True, False]])
    ours = comparing.PromptOutput(low_res, mask, 0.9)
    cases: Sequence[tuple[comparing.PromptOutput, str]] = [
        (comparing.PromptOutput(low_res + 0.01, mask, 0.9), "logits differ by 0.01, allowed are 0.003"),
        (comparing.PromptOutput(low_res * np.nan, mask, 0.9), "logits differ by inf"),
        (comparing.PromptOutput(low_res, ~mask, 0.9), "masks agree to an IoU of 0.0000"),
        (comparing.PromptOutput(low_res, mask, 0.8), "predicted IoUs differ by 0.1"),
        (comparing.PromptOutput(low_res, mask, 0.898), "predicted IoUs differ by 0.002, allowed are 0.001"),
        (comparing.PromptOutput(low_res, mask, float("nan")), "predicted IoUs differ by inf"),
    ]
    for theirs, words in cases:
        check = Check()
        check.add(ours, ours)
        assert check.faults == []
        check.add(ours, theirs)
        assert words in check.faults[0]
    with pytest.raises(UserError, match="outputs of shapes"):
        Check().add(ours, comparing.PromptOutput(low_res[:, :1], mask, 0.9))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected --all or --format, one of pth, safetensors, hf, onnx, mlflow"),
        (["--format", "tflite"], "--format: expected one of pth, .*, got 'tflite'"),
        (["--all", "--model", "nowhere.pth"], "nowhere.pth: no such file, folder or run"),
        (["--all", "--model", "models:/lesionsam@champion"], "no such MLflow database"),
        (["--format", "pth", "--model", "text.pth"], "cannot be read as weights"),
        (["--format", "pth", "--model", "weights", "--images", "empty"], "expected a folder with images"),
        (["--format", "pth", "--model", "weights", "--images", "empty", "--num-images", "0"], "--num-images: expected"),
        (["--format", "pth", "--model", "weights", "--images", "broken"], r"broken/a\.png: not an image"),
        (["--format", "pth", "--model", "weights", "--num-images", "0"], "--num-images: expected at least 1, got 0"),
        (["--format", "pth", "--model", "weights", "--out", "text.pth/exports"], "--out text.pth/exports: cannot be"),
    ],
)
def test_a_users_mistake_is_one_line(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    (tmp_path / "weights").symlink_to(weights.parent)
    done = CliRunner().invoke(app, ["export", *arguments])
    assert isinstance(done.exception, UserError)
    with pytest.raises(UserError, match=words):
        raise done.exception
    assert not (tmp_path / "exports").exists()


def test_too_little_disk_is_said_before_anything_is_written(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lesionsam.export.folders.free_disk_bytes", lambda path: 1000)
    with pytest.raises(UserError, match="MB of disk are needed, 0 MB are free"):
        export(subject, [PTH_FORMAT], tmp_path / "out", pictures=pictures(1))
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_checks_on_a_folder_and_says_how_far_off(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(4):
        Image.fromarray(pictures(1)[0]()).save(tmp_path / f"{k}.png")
    arguments = [
        "export",
        "--model",
        str(weights),
        "--out",
        str(tmp_path / "out"),
        "--images",
        str(tmp_path),
        "--num-images",
        "3",
        "--format",
        "safetensors",
        "--format",
        "pth",
        "--format",
        "pth",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    rows = [line.split()[0] for line in done.output.splitlines() if "segment-anything" in line]
    assert rows == ["safetensors", "pth"]
    assert json.loads((tmp_path / "out" / "pth" / "card.json").read_text())["check"]["num_images"] == 3
    monkeypatch.setattr("lesionsam.export.compare.TOLERANCE", -1.0)
    failed = CliRunner().invoke(app, arguments)
    assert failed.exit_code == 1
    assert "error: pth: logits differ by" in failed.output
    assert "FAILED" in failed.output


def test_generated_pictures_stand_in_for_a_folder() -> None:
    found = comparing.check_pictures(None, 2)
    assert len(found) == 2
    assert found[0]().shape[2] == 3


def test_build_and_save_agree_on_the_compact_numbers() -> None:
    numbers = standalone.numbers_of(build_sam("compact", architecture=ARCHITECTURE))
    assert numbers["image_size"] == ARCHITECTURE.image_size
    assert numbers["global_attn_indexes"] == list(range(ARCHITECTURE.depth))
    assert numbers["window_size"] == 0

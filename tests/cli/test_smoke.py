"""The smoke run on the compact model and on ViT-B with random weights: every part runs, and bad files are named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from segment_anything import sam_model_registry

from lesionsam.cli.smoke import identity, smoke
from lesionsam.errors import UserError
from lesionsam.models import published


@pytest.fixture(scope="module")
def random_vit_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the keys and shapes of SAM's ViT-B."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "sam_vit_b.pth"
    torch.save(sam_model_registry["vit_b"]().state_dict(), path)
    return path


def test_vit_b_with_random_weights(random_vit_b: Path) -> None:
    lines: list[str] = []
    figures = smoke("vit_b", random_vit_b, image_size=128, device="cpu", say=lines.append)
    names = [line.split()[0] for line in lines[:-1]]
    assert names == ["machine", "checkpoint", "load", "predict", "evaluate", "train", "memory"]
    assert "not a published" in lines[1]
    assert "90.6 M parameters, input 128 x 128 px" in lines[2]  # SAM's 93.7 M less 4032 positions of 768
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["gradient_norm"] > 0
    assert 0.3 < figures["peak_gb"] < 16  # 375 MB of weights at least
    assert 0 <= figures["box_iou"] <= 1


def test_the_hash_says_whose_weights_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sam_vit_b_01ec64.pth"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, example "abc"
    assert f"SHA-256 {digest}: NOT the published vit_b" in identity("vit_b", path)
    assert "not a published" in identity("vit_l", path)
    monkeypatch.setitem(published.CHECKPOINTS, "vit_h", published.Checkpoint(path.name, 3, digest))
    assert identity("vit_h", path) == f"SHA-256 {digest}: SAM's own vit_h, as published"


def test_published_checkpoints_are_stated_whole() -> None:
    for name, checkpoint in published.CHECKPOINTS.items():
        assert len(bytes.fromhex(checkpoint.sha256)) == 32
        assert published.published_name(checkpoint.sha256) == name
    assert published.published_name("0" * 64) is None


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--checkpoint.*none\.pth: no such file"):
        smoke("vit_b", tmp_path / "none.pth", say=lambda _: None)


def test_weights_of_another_model(random_vit_b: Path) -> None:
    lines: list[str] = []
    with pytest.raises(UserError):
        smoke("vit_l", random_vit_b, image_size=128, device="cpu", say=lines.append)
    assert len(lines) == 2  # machine and checkpoint; nothing after the load


def test_a_gpu_that_is_not_there(random_vit_b: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(UserError, match="no GPU"):
        smoke("vit_b", random_vit_b, device="cuda", say=lambda _: None)

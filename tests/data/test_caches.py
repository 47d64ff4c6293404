"""`lesionsam cache`: what it shows and what it removes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.activations import filled, found, open_store
from helpers.cli import lesionsam
from lesionsam.data.caches import cached, clear, folder_bytes
from lesionsam.data.frames import load_frames
from lesionsam.types import Frame, Sample


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with decoded frames, two spaces of activations, and a decoding that was killed."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save("image.png")
    sample = Sample(
        "image", "0", "train", Path("image.png"), None, 50, 40, np.array([5.0, 5, 40, 35]), np.array([10.0, 10, 30, 30])
    )
    load_frames([sample], Frame(32), Path(".cache/frames"))
    killed = Path(".cache/frames/building-abc")
    killed.mkdir()
    (killed / "images.npy").write_bytes(b"half")
    os.utime(killed / "images.npy", (1000, 1000))
    for part in ("compact: 2 of 4 blocks", "compact: features"):
        filled(Path(".cache/activations"), part=part, side=128, precision="fp32")
    return tmp_path / ".cache"


def test_the_caches_are_shown(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert lesionsam(monkeypatch, "cache") == 0
    lines = capsys.readouterr().out.splitlines()
    for expected in (
        "1 decoded images, 32 px",
        "6 activations of compact: 2 of 4 blocks, 128 px, fp32",
        "6 activations of compact: features, 128 px, fp32",
        "left by a decoding that was killed",
    ):
        assert sum(line.startswith(expected) for line in lines) == 1
    total = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")
    assert sum(item.size for item in cached(cache)) == total
    assert lines[-1] == f"together {total / 1e6:.1f} MB; `lesionsam cache clear` removes them"
    assert len(lines) == 5


def test_the_caches_are_removed_and_made_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    total = folder_bytes(cache)
    assert lesionsam(monkeypatch, "cache", "clear") == 0
    assert capsys.readouterr().out == f"removed {total / 1e6:.1f} MB from .cache\n"
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert lesionsam(monkeypatch, "cache") == 0
    assert capsys.readouterr().out == "nothing is cached in .cache\n"
    assert lesionsam(monkeypatch, "cache", "clear") == 0
    assert found(open_store(Path(".cache/activations"))) == [False] * 6


def test_a_training_that_runs_goes_on_and_a_decoding_is_left_alone(cache: Path) -> None:
    store = open_store(cache / "activations", part="compact: features", side=128, precision="fp32")
    building = cache / "frames" / "building-def"
    building.mkdir()
    (building / "images.npy").write_bytes(b"half")
    assert clear(cache)[1] == [building]
    assert found(store) == [False] * 6
    more = torch.randn(1, 4, 4, 32)
    store.write([b"k" * 16], more)
    into = torch.empty(4, 4, 32)
    assert store.read(b"k" * 16, into)
    assert torch.equal(into, more[0])
    store.close()
    again = open_store(cache / "activations", part="compact: features", side=128, precision="fp32")
    assert found(again) == [False] * 6

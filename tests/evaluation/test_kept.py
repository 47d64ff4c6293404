"""The kept zero-shot evaluation: it comes back as it was, and not where anything that it depends on has changed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.package_copy import package_copy, recoded, reworded
from lesionsam.evaluation.columns import CALIBRATION_COLUMNS, JITTER_COLUMNS, Evaluation
from lesionsam.evaluation.kept import cache_key, open_evaluation, save_evaluation
from lesionsam.types import Sample
from lesionsam.utils import code
from lesionsam.utils.code import PACKAGE, module_files


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"1")
    return tmp_path / "weights"


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    image, mask, box = tmp_path / "image.bmp", tmp_path / "mask.bmp", np.array([1.0, 2.0, 30.0, 40.0])
    image.write_bytes(b"image")
    mask.write_bytes(b"mask")
    return [Sample(f"image{k}", "0", "test", image, mask, 64, 48, box, box) for k in range(2)]


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = pd.DataFrame({"model": ["zero-shot"], "run": ["0"], "image_id": ["NA"], "lesion_id": ["007"], "iou": [0.5]})
    none = Evaluation(rows, pd.DataFrame(columns=list(CALIBRATION_COLUMNS)), pd.DataFrame(columns=list(JITTER_COLUMNS)))
    save_evaluation(tmp_path / "kept", none, {"outline_offset": 0.25})
    found = open_evaluation(tmp_path / "kept")
    assert found is not None
    pd.testing.assert_frame_equal(found[0].rows, rows)
    assert found[1] == {"outline_offset": 0.25}
    assert open_evaluation(tmp_path / "missing") is None


def test_its_key_follows_weights_settings_and_lesions(samples: list[Sample], weights: Path) -> None:
    moved = [replace(samples[0], big_box=samples[0].big_box + 0.5), samples[1]]
    keys = [
        cache_key(samples, [weights], {"seed": 0}),
        cache_key(samples, [weights], {"seed": 1}),
        cache_key(samples[1:], [weights], {"seed": 0}),
        cache_key(moved, [weights], {"seed": 0}),
    ]
    weights.write_bytes(b"2")
    keys.append(cache_key(samples, [weights], {"seed": 0}))
    assert len(set(keys)) == 5


@pytest.mark.parametrize("kind", ["image_path", "mask_path"])
def test_its_key_follows_the_contents_of_files(samples: list[Sample], weights: Path, kind: str) -> None:
    """Not their size and date, which `cp -p` keeps."""
    path: Path = getattr(samples[0], kind)
    first, status, content = cache_key(samples, [weights], {}), path.stat(), path.read_bytes()
    os.utime(path, ns=(1, 1))
    assert cache_key(samples, [weights], {}) == first
    path.write_bytes(content[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cache_key(samples, [weights], {}) != first


@pytest.mark.parametrize(
    "module", ["models.decoder", "models.attention", "models.finetuned", "metrics", "utils.images"]
)
def test_a_change_of_what_measures_renews_it(
    tmp_path: Path, samples: list[Sample], weights: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    first = cache_key(samples, [weights], {})
    monkeypatch.setattr(code, "PACKAGE", package_copy(tmp_path / "copy", {module: recoded}))
    assert cache_key(samples, [weights], {}) != first


def test_words_and_what_does_not_measure_keep_it(
    tmp_path: Path, samples: list[Sample], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache_key(samples, [weights], {})
    changes = dict.fromkeys(module_files(PACKAGE), reworded)
    changes |= dict.fromkeys(("evaluation.tables", "evaluation.pictures", "training.loop", "config.schema"), recoded)
    monkeypatch.setattr(code, "PACKAGE", package_copy(tmp_path / "copy", changes))
    assert cache_key(samples, [weights], {}) == first

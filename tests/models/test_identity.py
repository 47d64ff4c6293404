"""The identity of the encoder's frozen part, where code changes; for weights see `tests/data/test_activations.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.package_copy import package_copy, recoded, reworded
from helpers.tiny import tiny_sam
from lesionsam.models.identity import frozen_identity
from lesionsam.utils import code
from lesionsam.utils.code import PACKAGE, module_files


def test_the_frozen_part_is_another_where_what_encodes_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sam = tiny_sam()
    first = frozen_identity(sam, 1)
    for name in ("models.attention", "models.transforms", "models.prefix"):
        monkeypatch.setattr(code, "PACKAGE", package_copy(tmp_path / name, {name: recoded}))
        assert frozen_identity(sam, 1) != first, name


def test_words_and_other_models_leave_it_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes of activations would be computed again."""
    sam = tiny_sam()
    first = frozen_identity(sam, 1)
    changes = dict.fromkeys(module_files(PACKAGE), reworded)
    changes |= dict.fromkeys(("models.finetuned", "models.published", "models.teacher", "losses"), recoded)
    monkeypatch.setattr(code, "PACKAGE", package_copy(tmp_path / "copy", changes))
    assert frozen_identity(sam, 1) == first

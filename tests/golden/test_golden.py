"""The losses of ten steps are those of the golden file: a refactor moves none of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("golden_make", Path(__file__).with_name("make.py"))
if SPEC is None or SPEC.loader is None:
    raise ImportError("tests/golden/make.py is missing")
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)
RECORD = json.loads(make.GOLDEN.read_text(encoding="utf-8"))


def test_the_file_names_its_command_and_commit() -> None:
    assert RECORD["command"] == make.COMMAND
    assert len(RECORD["commit"]) == 40
    assert RECORD["losses"].keys() == make.CASES.keys()


@pytest.mark.parametrize("case", make.CASES)
def test_losses_are_the_golden_ones(case: str) -> None:
    """Other processors round otherwise, and ten steps amplify it: hence the tolerance."""
    found = make.ten_steps(*make.CASES[case])
    assert len(found) == len(RECORD["losses"][case]) == 10
    for step, (expected, values) in enumerate(zip(RECORD["losses"][case], found, strict=True)):
        assert values == pytest.approx(expected, rel=1e-3, abs=1e-4), f"step {step + 1}"

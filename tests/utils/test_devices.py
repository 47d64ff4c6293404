"""A device that runs a precision slowly is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lesionsam.utils.devices import slow_precision

# Lines of /proc/cpuinfo: an AVX2 machine, one with AVX-512 BF16, a Neoverse V1.
AVX2 = "processor\t: 0\nflags\t\t: fpu sse4_2 fma avx2\n"
AVX512 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\n"


@pytest.mark.parametrize(
    ("text", "precision", "device", "is_slow"),
    [
        (AVX2, "bf16", "cpu", True),
        (AVX2, "fp32", "cpu", False),
        (AVX2, "bf16", "cuda", False),
        (AVX512, "bf16", "cpu", False),
        (ARM, "bf16", "cpu", False),
    ],
)
def test_bf16_is_slow_without_its_instructions(
    text: str, precision: str, device: str, is_slow: bool, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(text, "utf-8")
    note = slow_precision(precision, torch.device(device), tmp_path / "cpuinfo")
    assert bool(note) == is_slow
    assert not is_slow or "several times slower than fp32" in note


def test_no_claim_where_the_instructions_are_unknown(tmp_path: Path) -> None:
    assert not slow_precision("bf16", torch.device("cpu"), tmp_path / "none")

"""SAM's published checkpoints (Kirillov et al. 2023, Apache-2.0): addresses, sizes and hashes."""

from __future__ import annotations

from dataclasses import dataclass

BASE_URL = "https://dl.fbaipublicfiles.com/segment_anything/"


@dataclass(frozen=True)
class Checkpoint:
    """One published file.

    Attributes:
        file: its name below `BASE_URL`. size: bytes. sha256: hex digest.
    """

    file: str
    size: int
    sha256: str


CHECKPOINTS = {
    "vit_b": Checkpoint(
        "sam_vit_b_01ec64.pth", 375_042_383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "vit_l": Checkpoint(
        "sam_vit_l_0b3195.pth", 1_249_524_607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "vit_h": Checkpoint(
        "sam_vit_h_4b8939.pth", 2_564_550_879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
}


def published_name(sha256: str) -> str | None:
    """Return the model whose published checkpoint has this hash; None if there is none."""
    return next((name for name, checkpoint in CHECKPOINTS.items() if checkpoint.sha256 == sha256), None)

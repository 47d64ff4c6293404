"""What a tracker of lesions is: frame in, masks out, and a state that a later process goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lesionsam.video.boxes import LesionBoxes


@dataclass(frozen=True)
class Tracked:
    """A lesion in one frame.

    Attributes:
        mask: (H, W) bool, the frame's own size; empty where it is lost. lost: not found, or too little of it in view.
        score: how well it was followed, at most 1; 1 where its box is given.
    """

    mask: np.ndarray
    lost: bool
    score: float


class Tracker(Protocol):
    """Follows the lesions of one clip, frame by frame in order."""

    def step(self, image: np.ndarray, boxes: Mapping[str, LesionBoxes]) -> dict[str, Tracked]:
        """Return each lesion in the next frame, from its first box on.

        Args:
            image: (H, W, 3) uint8 RGB. boxes: lesion_id -> boxes given in this frame.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return all that the next frames depend on, of tensors, numbers, texts, lists and dicts."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        ...

"""Run a SAM for the page: encode images ahead, decode the mask of two boxes in milliseconds."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import logit

from lesionsam.annotation.catalogue import Entry
from lesionsam.annotation.pictures import Cache, Pictures
from lesionsam.annotation.records import Box
from lesionsam.boxes.geometry import to_model_frame
from lesionsam.errors import UserError
from lesionsam.inference.decode import DecodeOptions
from lesionsam.inference.fusion import fuse
from lesionsam.inference.lesion import find_lesions
from lesionsam.metrics import mean_entropy
from lesionsam.models.checkpoint import load_sam, weights_metadata
from lesionsam.models.sam import decode, encode
from lesionsam.models.transforms import image_part, model_frames
from lesionsam.types import Prompts
from lesionsam.utils.weights import weights_sha256

FEATURE_BYTES = 512 << 20
DETAIL = 2  # the picture that is encoded is decoded at this many times the model's side
MAX_AHEAD = 16  # images waiting to be encoded


@dataclass(frozen=True)
class Features:
    """An encoded image: (1, C, H', W') features, (1, 3, S, S) uint8 model frame, (h, w) of its image part."""

    values: torch.Tensor
    frame: torch.Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class BoxMask:
    """The decoded mask of two boxes.

    Attributes:
        low_res: (t, u) float32 logits, the image part alone, fused with the box prior. alone: the model's own before.
        step: pixels of the image per column and row of both.
        predicted_iou: the model's own. entropy: mean over the big box, nats.
    """

    low_res: np.ndarray
    alone: np.ndarray
    step: tuple[float, float]
    predicted_iou: float
    entropy: float


class Model:
    """A loaded SAM, the cached features of recent images, and a thread that encodes images ahead (`prepare`).

    Args:
        weights: file of any SAM this project reads. threshold: probability above which a pixel is lesion.
    Raises:
        UserError: weights that cannot be used.
    """

    def __init__(
        self, weights: Path, pictures: Pictures, *, threshold: float = 0.5, device: torch.device | str = "cpu"
    ) -> None:
        self.sam = load_sam(None, weights).to(device)
        self.device, self.pictures, self.threshold = torch.device(device), pictures, threshold
        self.name, self.digest = weights.name, weights_sha256(weights)[:12]
        metadata = weights_metadata(weights)
        self._decoding = DecodeOptions.of_metadata(metadata)
        self.frame, self.side = self.sam.frame, self.sam.side
        self.level = float(logit(threshold))
        self._features = Cache(FEATURE_BYTES)
        self._ahead: queue.Queue[Entry] = queue.Queue(MAX_AHEAD)
        self._start, self._has_thread = threading.Lock(), False

    @property
    def label(self) -> str:
        """Return the name of these weights at this threshold, under which proposals are kept."""
        return f"{self.digest}@{self.threshold:g}"

    def prepare(self, entry: Entry) -> None:
        """Queue an image for encoding; dropped where `MAX_AHEAD` images wait."""
        with self._start:
            if not self._has_thread:  # only now: a thread keeps its model for as long as the process lives
                threading.Thread(target=self._work, daemon=True, name="encoding ahead").start()
                self._has_thread = True
        try:
            self._ahead.put_nowait(entry)
        except queue.Full:
            return

    def features_soon(self, entry: Entry, seconds: float) -> Features | None:
        """Return the features of an image if they are ready within `seconds`, else None; encoding goes on."""
        key, deadline = (entry.key, self.pictures.stamp(entry)), time.monotonic() + seconds
        if (found := self._features.peek(key)) is None:
            self.prepare(entry)
            while found is None and time.monotonic() < deadline:
                time.sleep(0.004)
                found = self._features.peek(key)
        return found

    def features(self, entry: Entry) -> Features:
        """Return the features of an image, encoded now if they are not cached; from a reduced copy, for speed."""

        def make() -> tuple[Features, int]:
            found = self.encoded(self.pictures.small(entry, DETAIL * self.side))
            return found, sum(one.numel() * one.element_size() for one in (found.values, found.frame))

        return self._features.get((entry.key, self.pictures.stamp(entry)), make)

    @torch.inference_mode()
    def encoded(self, image: np.ndarray) -> Features:
        """Return the features of an image, (h, w, 3) uint8."""
        frames, sizes = model_frames([image], self.frame)
        values = encode(self.sam, self.sam.normalize(frames.to(self.device), sizes.to(self.device)))
        return Features(values, frames, (int(sizes[0, 0]), int(sizes[0, 1])))

    @torch.inference_mode()
    def answer(
        self,
        features: Features,
        size: tuple[int, int],
        big: Sequence[float],
        small: Sequence[float],
        others: Sequence[Box] = (),
    ) -> BoxMask:
        """Decode the mask of two boxes, as `lesionsam predict --prompt box+core` but without enlarging the big box.

        That would encode the image anew for every box that is drawn.

        Args:
            size: (width, height) of the image. big, small: XYXY, pixels of the image.
            others: big boxes of its other lesions.
        """
        outer, core, rest = (
            to_model_frame(np.array(boxes, float).reshape(-1, 4), *size, self.frame) for boxes in (big, small, others)
        )
        prompts = Prompts(boxes=torch.tensor(outer, dtype=torch.float32)).to(self.device)
        logits, predicted = decode(self.sam, features.values, prompts)
        alone = logits[0, 0].float()
        fused = fuse(alone, features.frame[0], features.size, outer[0], core[0], rest, self._decoding.outline)
        low_res, own = (image_part(one.cpu().numpy(), features.size, self.side) for one in (fused, alone))
        cells = len(alone) / self.side  # columns of the low-resolution mask per pixel of the model frame
        step = size[0] / (features.size[1] * cells), size[1] / (features.size[0] * cells)
        x0, y0, x1, y1 = (int(value / step[k % 2]) for k, value in enumerate(big))
        inner = low_res[y0 : max(y0 + 1, y1 + 1), x0 : max(x0 + 1, x1 + 1)]
        entropy = float(mean_entropy(inner)) if inner.size else 0.0
        return BoxMask(low_res, own, step, float(predicted[0, 0]), entropy)

    def lesion(self, features: Features) -> np.ndarray:
        """Return (t, u) float32 logits of the image part without a prompt, as `lesionsam predict --auto` finds them."""
        (found,) = find_lesions(
            self.sam, features.values, features.frame, [features.size], search=self._decoding.search
        )
        return image_part(found.low_res.float().cpu().numpy(), features.size, self.side)

    def _work(self) -> None:
        while True:
            entry = self._ahead.get()
            try:
                self.features(entry)
            except (UserError, OSError):
                continue  # said when the image itself is opened

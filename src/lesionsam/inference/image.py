"""Encoded images: a batch, a cache of the last few, and one image with SamPredictor's methods."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lesionsam.boxes.geometry import to_model_frame
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.transforms import model_frames, upscale
from lesionsam.types import Frame, Prompts


def check_rgb(image: np.ndarray) -> None:
    """Raise ValueError unless it is (H, W, 3) uint8."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")


@dataclass(frozen=True)
class EncodedImages:
    """B images in the model frame, with their features.

    Attributes:
        frames: (B, 3, S, S) uint8. frame: what they are. input_sizes: B of (h, w), their image parts.
        shapes: B of (H, W), original pixels. features: (B, C, H', W'), or None before `encoded`.
    """

    frames: torch.Tensor
    frame: Frame
    input_sizes: Sequence[tuple[int, int]]
    shapes: Sequence[tuple[int, int]]
    features: torch.Tensor | None = None

    @classmethod
    def of(cls, images: Sequence[np.ndarray], frame: Frame) -> EncodedImages:
        """Bring B (H, W, 3) uint8 RGB images into the model frame; does not encode them."""
        frames, sizes = model_frames(images, frame)
        parts = [(height, width) for height, width in sizes.tolist()]
        return cls(frames, frame, parts, [(image.shape[0], image.shape[1]) for image in images])

    @classmethod
    def cat(cls, parts: Sequence[EncodedImages]) -> EncodedImages:
        """Join several batches that are not encoded yet."""
        sizes = [size for part in parts for size in part.input_sizes]
        return cls(
            torch.cat([part.frames for part in parts]),
            parts[0].frame,
            sizes,
            [shape for part in parts for shape in part.shapes],
        )

    @torch.inference_mode()
    def encoded(self, sam: Sam) -> EncodedImages:
        """Return the same images with their features, on the model's device."""
        device = next(sam.parameters()).device
        frames, sizes = self.frames.to(device), torch.tensor(self.input_sizes, device=device)
        return replace(self, features=encode(sam, sam.normalize(frames, sizes)))

    @property
    def side(self) -> int:
        """Return S, side of the model frame, pixels."""
        return self.frame.side

    @property
    def known_features(self) -> torch.Tensor:
        """Return the features; ValueError if the images are not encoded."""
        if self.features is None:
            raise ValueError("features: the images are not encoded")
        return self.features

    def __getitem__(self, rows: list[int]) -> EncodedImages:
        """Return some of the images; one may be taken several times."""
        sizes, shapes = [self.input_sizes[k] for k in rows], [self.shapes[k] for k in rows]
        return EncodedImages(
            self.frames[rows], self.frame, sizes, shapes, None if self.features is None else self.features[rows]
        )


class FeatureCache:
    """Encoder of single images that keeps the features of the last few, keyed by their pixels in the model frame.

    The weights must not change while it is in use.

    Args:
        sam: moved to the device and set to eval mode. num_cached: images whose features are kept, at least 1.
    """

    def __init__(self, sam: Sam, device: torch.device | str, num_cached: int) -> None:
        if num_cached < 1:
            raise ValueError(f"num_cached: expected at least 1 image, got {num_cached}")
        self.sam, self.device, self.num_cached = sam.to(device).eval(), torch.device(device), num_cached
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def encode(self, image: np.ndarray) -> EncodedImages:
        """Return an image with its features, a batch of one; ValueError unless it is (H, W, 3) uint8 RGB."""
        check_rgb(image)
        images = EncodedImages.of([image], self.sam.frame)
        # All that the encoder sees; hashing the image itself would take longer than resizing it.
        key = hashlib.sha256(images.frames.numpy().tobytes() + str(images.input_sizes).encode()).digest()
        if key not in self._kept:
            self._kept[key] = images.encoded(self.sam).known_features
            while len(self._kept) > self.num_cached:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return replace(images, features=self._kept[key])

    def clear(self) -> None:
        """Drop every image."""
        self._kept.clear()


class ImagePredictor:
    """SAM on one image at a time with any number of prompts, with the methods of segment_anything's SamPredictor.

    Coordinates are pixels of the original image. For one thread at a time: it holds one image.

    Args:
        sam: moved to the device and set to eval mode. num_cached: images whose features are kept.
    """

    def __init__(self, sam: Sam, device: torch.device | str = "cpu", *, num_cached: int = 8) -> None:
        self._cache = FeatureCache(sam, device, num_cached)
        self.sam, self.device = self._cache.sam, self._cache.device
        self.reset_image()

    @property
    def side(self) -> int:
        """Return S, side of the model's input, pixels."""
        return self.sam.side

    def reset_image(self) -> None:
        """Drop the image and all cached features."""
        self._cache.clear()
        self._features: torch.Tensor | None = None
        self.original_size, self.input_size = (0, 0), (0, 0)

    def set_image(self, image: np.ndarray) -> None:
        """Encode an image.

        Args:
            image: (H, W, 3) uint8 RGB, original frame.
        """
        encoded = self._cache.encode(image)
        self._features, self.input_size, self.original_size = (
            encoded.features,
            encoded.input_sizes[0],
            encoded.shapes[0],
        )

    def get_image_embedding(self) -> torch.Tensor:
        """Return the (1, C, H', W') features of the image that is set."""
        if self._features is None:
            raise RuntimeError("no image is set; call set_image first")
        return self._features

    @torch.inference_mode()
    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predict the masks of one prompt; everything given forms one joint prompt.

        Args:
            point_coords: (N, 2) XY. point_labels: (N,), 1 foreground, 0 background. box: (4,) XYXY.
            mask_input: (1, T, T) logits of an earlier call. multimask_output: three candidates instead of one mask.
            return_logits: masks as logits.
        Returns:
            masks (K, H, W) bool (or float32 logits), original frame; iou_predictions (K,) float32; low_res_masks
            (K, T, T) float32 logits, model frame, T = 4 H'.
        """
        features = self.get_image_embedding()
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels: expected both or neither")
        points = labels = boxes = masks = None
        if point_coords is not None and point_labels is not None:
            points, labels = self._framed(point_coords), torch.as_tensor(point_labels, dtype=torch.int64)[None]
            if points.shape[1:] != (labels.shape[1], 2):
                raise ValueError(
                    f"point_coords: expected ({labels.shape[1]}, 2) for as many labels, got {np.shape(point_coords)}"
                )
        if box is not None:
            boxes = self._framed(box)
            if boxes.shape != (1, 4):
                raise ValueError(f"box: expected (4,) XYXY, got {np.shape(box)}")
        if mask_input is not None:
            masks = torch.as_tensor(mask_input, dtype=torch.float32)[None]
        prompts = Prompts(points, labels, boxes, masks).to(self.device)
        low_res, predicted = decode(self.sam, features, prompts, multimask_output)
        low_res = low_res[0].float()
        logits = upscale(low_res, self.input_size, self.original_size, self.sam.frame)
        full = logits if return_logits else logits > self.sam.mask_threshold
        return full.cpu().numpy(), predicted[0].float().cpu().numpy(), low_res.cpu().numpy()

    def _framed(self, coordinates: np.ndarray) -> torch.Tensor:
        """Scale original pixels to the model frame, with a batch axis."""
        height, width = self.original_size
        return torch.as_tensor(
            to_model_frame(np.asarray(coordinates, float), width, height, self.sam.frame), dtype=torch.float32
        )[None]

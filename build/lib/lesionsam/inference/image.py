"""One image at a time, any number of prompts: features kept for images that come back, and SamPredictor's verbs."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import torch

from lesionsam.boxes.geometry import to_model_frame
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.transforms import model_frames, preprocess, upscale
from lesionsam.types import Prompts


def check_rgb(image: np.ndarray) -> None:
    """Raise ValueError unless it is (H, W, 3) uint8."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")


class FeatureCache:
    """Features of the last few images, by what the encoder sees of them: one that comes back costs no encoder pass.

    The weights must not change while it lives.

    Args:
        sam: moved to the device and set to eval mode. num_cached: images whose features are kept, at least 1.
    """

    def __init__(self, sam: Sam, device: torch.device | str, num_cached: int) -> None:
        if num_cached < 1:
            raise ValueError(f"num_cached: expected at least 1 image, got {num_cached}")
        self.sam, self.device, self.num_cached = sam.to(device).eval(), torch.device(device), num_cached
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @torch.inference_mode()
    def features(self, image: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        """(1, C, H', W') features of an image, and (h, w) of its part of the model frame.

        Args:
            image: (H, W, 3) uint8 RGB, original frame.
        """
        check_rgb(image)
        frames, sizes = model_frames([image], int(self.sam.image_encoder.img_size))
        # All that the encoder sees; hashing the image itself would take longer than resizing it.
        key = hashlib.sha256(frames.numpy().tobytes() + sizes.numpy().tobytes()).digest()
        if key not in self._kept:
            self._kept[key] = encode(self.sam, preprocess(frames.to(self.device), sizes.to(self.device)))
            while len(self._kept) > self.num_cached:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key], (int(sizes[0, 0]), int(sizes[0, 1]))

    def clear(self) -> None:
        """Forget every image."""
        self._kept.clear()


class ImagePredictor:
    """SAM on one image at a time with any number of prompts, with the verbs of segment_anything's SamPredictor.

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
        """S, side of the model's input, pixels."""
        return int(self.sam.image_encoder.img_size)

    def reset_image(self) -> None:
        """Forget the image and every kept feature."""
        self._cache.clear()
        self._features: torch.Tensor | None = None
        self.original_size, self.input_size = (0, 0), (0, 0)

    def set_image(self, image: np.ndarray) -> None:
        """Encode an image.

        Args:
            image: (H, W, 3) uint8 RGB, original frame.
        """
        self._features, self.input_size = self._cache.features(image)
        self.original_size = image.shape[0], image.shape[1]

    def get_image_embedding(self) -> torch.Tensor:
        """(1, C, H', W') features of the image that is set."""
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
        """Masks of one prompt: everything given is one joint prompt.

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
        logits = upscale(low_res, self.input_size, self.original_size, self.side)
        full = logits if return_logits else logits > self.sam.mask_threshold
        return full.cpu().numpy(), predicted[0].float().cpu().numpy(), low_res.cpu().numpy()

    def _framed(self, coordinates: np.ndarray) -> torch.Tensor:
        height, width = self.original_size
        return torch.as_tensor(
            to_model_frame(np.asarray(coordinates, float), width, height, self.side), dtype=torch.float32
        )[None]

"""What `mlflow models serve` runs: an image and its prompts in, masks out. MLflow copies this file into the model.

One row is one image. `image` holds the file (PNG, JPEG, ...) in base64; every box of `boxes` (x0, y0, x1, y1 in the
image's pixels) is a prompt of its own and gives one mask. `points` (x, y) with `labels` (1 lesion, 0 not) are one
prompt together, joined to the box where there is one. The answer has, per row, `masks` as PNG in base64 (0 and 255, the
image's size) and `predicted_iou`, one each per prompt.
"""

from __future__ import annotations

import base64
import io
import math
import tempfile
import threading
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

from lesionsam.errors import UserError
from lesionsam.inference.image import ImagePredictor
from lesionsam.models.checkpoint import load_sam
from lesionsam.utils.images import read_image


class PromptedSam(mlflow.pyfunc.PythonModel):
    """SAM behind MLflow's scoring protocol."""

    def load_context(self, context: Any) -> None:
        """Load the weights that lie in the model's folder."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.predictor = ImagePredictor(load_sam(None, Path(context.artifacts["weights"])), device)
        self.alone = threading.Lock()  # the server answers each request in a thread of its own

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """See the module's text.

        Raises:
            MlflowException: of kind INVALID_PARAMETER_VALUE, which the server answers as HTTP 400: what is wrong with
                which row.
        """
        answers = []
        for number, row in enumerate(model_input.to_dict("records")):
            try:
                answers.append(self._answer(row))
            except (UserError, ValueError) as error:
                raise MlflowException.invalid_parameter_value(f"row {number}: {error}") from None
        return pd.DataFrame(answers)

    def _answer(self, row: dict[str, Any]) -> dict[str, list[Any]]:
        image = decode_image(row.get("image"))
        masks, predicted = [], []
        for logits, _, quality in self.answers(image, *prompts_of(row, image.shape[1], image.shape[0])):
            masks.append(encode_mask(logits > 0))
            predicted.append(quality)
        return {"masks": masks, "predicted_iou": predicted}

    def answers(
        self, image: np.ndarray, boxes: list[np.ndarray | None], points: np.ndarray | None, labels: np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Logits (H, W) and (T, T), and predicted IoU of every box (None: of the points alone)."""
        found = []
        with self.alone:  # the predictor holds one image
            self.predictor.set_image(image)
            for box in boxes:
                masks, quality, low_res = self.predictor.predict(
                    points, labels, box, multimask_output=False, return_logits=True
                )
                found.append((masks[0], low_res[0], float(quality[0])))
        return found


def decode_image(text: object) -> np.ndarray:
    """Base64 of an image file -> (H, W, 3) uint8 RGB.

    Raises:
        UserError: no base64, or no readable image.
    """
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except ValueError:  # not the alphabet, or cut short
        data = b""
    if not data:
        raise UserError("image: expected the bytes of an image file as base64, got something else")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        path.write_bytes(data)
        try:
            return read_image(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), "image")) from None


def prompts_of(
    row: dict[str, Any], width: int, height: int
) -> tuple[list[np.ndarray | None], np.ndarray | None, np.ndarray | None]:
    """Boxes, each (4,), or [None] where there is none; points (N, 2) and labels (N,), or None.

    Raises:
        ValueError: nothing to prompt with, or numbers that are no box or point of this image.
    """
    boxes, points, labels = (_array(name, row.get(name)) for name in ("boxes", "points", "labels"))
    if boxes is None and points is None:
        raise ValueError("boxes, points: expected one of them, got neither")
    if labels is not None and points is None:
        raise ValueError("labels: expected points that they belong to, got none")
    if boxes is not None:
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"boxes: expected a list of [x0, y0, x1, y1], got numbers of shape {boxes.shape}")
        frame = np.array([width, height, width, height])
        wrong = ~((boxes[:, :2] < boxes[:, 2:]).all(1) & (boxes >= 0).all(1) & (boxes <= frame).all(1))
        if wrong.any():
            raise ValueError(
                f"boxes: expected 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}, got {boxes[wrong][0].tolist()}"
            )
    if points is not None:
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"points: expected a list of [x, y], got numbers of shape {points.shape}")
        if not ((points >= 0) & (points <= (width, height))).all():
            raise ValueError(f"points: expected places inside the image of {width}x{height} px, got {points.tolist()}")
        labels = np.ones(len(points)) if labels is None else labels
        if labels.shape != (len(points),) or not np.isin(labels, (0, 1)).all():
            raise ValueError(f"labels: expected a 0 or 1 for each of the {len(points)} points, got {labels.tolist()}")
        if boxes is not None and len(boxes) > 1:
            raise ValueError(
                f"points: belong to one box at most, got {len(boxes)} boxes; send them in rows of their own"
            )
    return [None] if boxes is None else list(boxes), points, None if points is None else labels


def _array(name: str, value: Any) -> np.ndarray | None:
    """Nested lists as numbers; what is missing, and pandas' way to say so, as None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # a column that this row has no value for
        return None
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise ValueError(f"{name}: expected lists of numbers, got {str(value)[:60]}")
    try:
        array = np.array([np.asarray(each, float) for each in value], float)
    except TypeError:
        raise ValueError(f"{name}: expected lists of numbers, got {str(value)[:60]}") from None
    return array if array.size else None


def encode_mask(mask: np.ndarray) -> str:
    """(H, W) bool -> PNG of 0 and 255 as base64."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


mlflow.models.set_model(PromptedSam())

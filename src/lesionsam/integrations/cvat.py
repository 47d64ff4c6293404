"""CVAT's auto-annotation functions, for `cvat-cli task auto-annotate --function-module lesionsam.integrations.cvat`.

`create` makes the function from the command line's `-p NAME=TYPE:VALUE`. Needs cvat-sdk, extra `cvat`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import cvat_sdk.auto_annotation as cvataa
import cvat_sdk.models
import numpy as np
import PIL.Image
from cvat_sdk.masks import encode_mask

from lesionsam.boxes.table import BIG, parse_box
from lesionsam.errors import UserError
from lesionsam.formats.geojson import polygons_of
from lesionsam.inference.arguments import Source
from lesionsam.inference.image import ImagePredictor
from lesionsam.inference.inputs import Rows
from lesionsam.inference.jobs import read_lesions
from lesionsam.inference.predictor import Predictor
from lesionsam.models.checkpoint import load_sam
from lesionsam.utils.devices import torch_device
from lesionsam.utils.weights import find_weights

LABEL_ID = 0  # of the function's one label; CVAT matches labels by name
SHAPES = ("mask", "polygon")


class LesionDetection:
    """Find the lesions of an image: without a prompt the one lesion, or a lesion for each box of a CSV.

    Args:
        predictor: with the threshold to cut masks at. label: name of the label in CVAT. shape: of `SHAPES`.
        lesions: image_id -> rows of a CSV of boxes; images without rows get no shape. None: no prompt.
    """

    def __init__(self, predictor: Predictor, label: str, shape: str, lesions: Mapping[str, Rows] | None = None) -> None:
        self.spec = cvataa.DetectionFunctionSpec(labels=[cvataa.label_spec(label, LABEL_ID, type=shape)])
        self.predictor, self.shape, self.lesions = predictor, shape, lesions

    def detect(
        self, context: cvataa.DetectionFunctionContext, image: PIL.Image.Image
    ) -> list[cvat_sdk.models.LabeledShapeRequest]:
        """Return a mask, or a polygon for each of its pieces, for each lesion whose predicted IoU is high enough."""
        pixels = np.asarray(image.convert("RGB"))
        if self.lesions is None:
            found = self.predictor.predict(pixels, auto=True)
        elif boxes := self._boxes(context.frame_name, image.size):
            found = self.predictor.predict(pixels, boxes=np.array(boxes))
        else:
            found = []
        as_polygons = context.conv_mask_to_poly or self.shape == "polygon"
        return [
            shape
            for one in found
            if one.area and (context.conf_threshold is None or one.predicted_iou >= context.conf_threshold)
            for shape in (_polygons(one.mask) if as_polygons else [cvataa.mask(LABEL_ID, encode_mask(one.mask))])
        ]

    def _boxes(self, frame_name: str, size: tuple[int, int]) -> list[np.ndarray]:
        name = PurePosixPath(frame_name)
        lesions = self.lesions or {}
        boxes = []
        for line, row in lesions.get(name.stem) or lesions.get(name.name) or ():
            try:
                boxes.append(parse_box(row, BIG, *size))
            except ValueError as error:
                raise UserError(f"boxes: line {line}, {error}") from None
        return boxes


def _polygons(mask: np.ndarray) -> Iterator[cvat_sdk.models.LabeledShapeRequest]:
    for outer, *_ in polygons_of(mask):  # CVAT's polygons have no holes
        yield cvataa.polygon(LABEL_ID, outer[:-1].ravel().tolist())


class LesionInteraction:
    """Turn the box that a person draws, and points inside and outside the lesion, into a mask."""

    def __init__(self, predictor: ImagePredictor) -> None:
        self.spec = cvataa.InteractionFunctionSpec(min_pos_points=0, min_neg_points=0, min_bounding_boxes=1)
        self.predictor = predictor

    def detect(
        self, context: cvataa.InteractionFunctionContext, pp_image: PIL.Image.Image, prompts: cvataa.InteractionPrompts
    ) -> list[cvataa.InteractionResultShape]:
        """Return the mask of the prompts, none if it is empty; the image's features stay for the next call."""
        self.predictor.set_image(np.asarray(pp_image.convert("RGB")))
        points = [*prompts.pos_points, *prompts.neg_points]
        labels = [1] * len(prompts.pos_points) + [0] * len(prompts.neg_points)
        (mask,), _, _ = self.predictor.predict(
            np.array(points) if points else None,
            np.array(labels) if points else None,
            None if prompts.bounding_box is None else np.ravel(prompts.bounding_box),
            multimask_output=False,
        )
        return [cvataa.InteractionResultShape(type="mask", points=encode_mask(mask))] if mask.any() else []


def create(
    model: str = "models/adapted",
    label: str = "lesion",
    shape: str = "mask",
    boxes: str = "",
    threshold: float = 0.5,
    device: str = "auto",
    interactive: bool = False,
) -> LesionDetection | LesionInteraction:
    """Make the function that CVAT calls.

    Args:
        model: weights file, folder with one, or OWNER/NAME of the Hugging Face Hub.
        label: name of CVAT's label. shape: mask or polygon, as that label's type.
        boxes: CSV of big boxes by frame name; empty: no prompt, one lesion in each image.
        threshold: probability above which a pixel is lesion. device: auto, cpu, cuda or cuda:N.
        interactive: the function of a tool in CVAT's editor, with a box as prompt, instead of one for whole tasks.
    Raises:
        UserError: weights or boxes that cannot be read, an unknown shape.
    """
    if shape not in SHAPES:
        raise UserError(f"shape: expected {' or '.join(SHAPES)}, got {shape!r}")
    if interactive:
        return LesionInteraction(ImagePredictor(load_sam(None, find_weights(Path(model))), torch_device(device)))
    lesions = read_lesions(Source("boxes", Path(boxes))) if boxes else None
    return LesionDetection(Predictor(model, torch_device(device), threshold=threshold), label, shape, lesions)

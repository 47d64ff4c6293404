"""Masks for images, with the same verbs in Python and on the command line: `Predictor`, and `predict_files` that writes
them. One image and many prompts in segment_anything's own words: `inference_image.ImagePredictor`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from lesionsam.boxes.table import BIG, SMALL
from lesionsam.errors import UserError
from lesionsam.inference.auto import AUTO, AutoOptions
from lesionsam.inference.decode import Answer, Prediction, answers, prediction
from lesionsam.inference.image import FeatureCache, check_rgb
from lesionsam.inference.inputs import (
    ONE,
    Lesion,
    Source,
    check_answering,
    check_threshold,
    find_images,
    needs_small,
    plan,
)
from lesionsam.inference.lesion import DECODER, MASKS, find_lesions, from_nearer, masks_of, way
from lesionsam.models.checkpoint import load_sam, weights_metadata
from lesionsam.models.sam import Sam
from lesionsam.models.transforms import model_frames
from lesionsam.utils.images import read_image
from lesionsam.utils.weights import find_weights

SHOWN_IDS = 3
Coordinates = np.ndarray | Sequence[float] | Sequence[Sequence[float]]


class Predictor:
    """Masks for images in memory or on disk, without writing anything.

    `Predictor("models/adapted").predict("photo.jpg", boxes=[80, 60, 300, 280])`

    Features of the last few images are kept, so that asking again about one costs no second encoder pass.

    Args:
        model: a weights file, a folder that holds one (models/adapted, an export), or a SAM; the weights must not
            change while the Predictor lives.
        num_cached: images whose features are kept. threshold: probability above which a pixel is lesion.
        auto: settings of the automatic masks. lesion_by: how the one lesion of an image is found without a prompt, see
            `inference_lesion`; None: as the weights file says, `masks` for a SAM.
    """

    def __init__(
        self,
        model: Sam | str | Path,
        device: torch.device | str = "cpu",
        *,
        num_cached: int = 8,
        threshold: float = 0.5,
        auto: AutoOptions = AUTO,
        lesion_by: str | None = None,
    ) -> None:
        check_threshold(threshold)
        if lesion_by not in (None, DECODER, MASKS):
            raise UserError(f"lesion_by: expected {DECODER}, {MASKS} or None, got {lesion_by!r}")
        trained_for = MASKS
        if isinstance(model, str | Path):
            path = find_weights(Path(model))
            model, trained_for = load_sam(None, path), way(weights_metadata(path))
        self.lesion_by = lesion_by or trained_for
        self.cache = FeatureCache(model, device, num_cached)
        self.sam, self.device, self.threshold, self.auto = self.cache.sam, self.cache.device, threshold, auto

    def predict(
        self,
        images: np.ndarray | str | Path | Sequence[str | Path],
        *,
        boxes: str | Path | Coordinates | None = None,
        cores: Coordinates | None = None,
        points: str | Path | Coordinates | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
        auto: bool = False,
        everything: bool = False,
        prompt: str = "box",
        ensemble: int = 1,
        nearer: bool = False,
    ) -> list[Prediction]:
        """Masks of the lesions asked for.

        Args:
            images: (H, W, 3) uint8 RGB; or files, folders and patterns, as on the command line.
            boxes: CSV of big boxes, or for one image (4,) or (N, 4) XYXY of N lesions, original pixels.
            cores: their small boxes, (4,) or (N, 4), where `prompt` needs them and `boxes` is no CSV.
            points: CSV of points, or for one image (N, 2) XY, one prompt. labels: N of them, 1 lesion (all, where they
                are left out) or 0 not.
            auto: the one lesion of each image, without a prompt. everything: all automatic masks.
            prompt: made from the boxes, of `prompts.KINDS`. ensemble: decodings of each box, all but one jittered.
            nearer: enlarge what lies around each box; prompt `box` alone.
        Returns:
            one Prediction for each lesion, in the order of images and rows.
        Raises:
            UserError: an image that cannot be read, an image without a prompt, a prompt outside its image; cores,
                labels, a threshold, an ensemble or a look from nearer that the kind of prompt has no use for.
            ValueError: arrays of another shape or type.
        """
        as_numbers = any(each is not None and not isinstance(each, str | Path) for each in (boxes, points))
        source = Source.of(
            boxes=Path(boxes) if isinstance(boxes, str | Path) else boxes is not None,
            points=Path(points) if isinstance(points, str | Path) else points is not None,
            auto=auto,
            everything=everything,
            prompt=prompt,
        )
        check_answering(source, threshold=self.threshold, ensemble=ensemble, nearer=nearer)
        for name, given, owner in (("cores", cores, "boxes"), ("labels", labels, "points")):
            if given is not None and (source.kind != owner or source.path is not None):
                raise UserError(f"{name}: go with {owner} that are numbers; got {source.path or source.kind}")
        if needs_small(source.prompt) and as_numbers and cores is None:
            raise UserError(f"prompt {source.prompt}: is made from the small boxes; give them as cores")
        if isinstance(images, np.ndarray):
            check_rgb(images)
            if source.path is not None:
                raise UserError(
                    f"an image in memory has no name to be found by in {source.path}; give {source.kind} as numbers"
                )
            return self._one("image", images, source, _lesions(boxes, cores, points, labels), ensemble, nearer)
        names = [images] if isinstance(images, str | Path) or not isinstance(images, Iterable) else list(images)
        if not all(isinstance(name, str | Path) for name in names):
            raise ValueError(
                "images: expected one (H, W, 3) uint8 array, or files, folders and patterns, got "
                f"{type(images).__name__}"
            )
        paths, problems = find_images(names)
        if as_numbers:
            if len(paths) != 1 or problems:
                raise UserError(
                    problems[0]
                    if problems
                    else f"{source.kind} as numbers are those of one image, got "
                    f"{len(paths)} images; give a CSV, or one image at a time"
                )
            return self._one(
                paths[0].stem,
                read_image(paths[0]),
                source,
                _lesions(boxes, cores, points, labels),
                ensemble,
                nearer,
                str(paths[0]),
            )
        jobs, unmatched, _ = plan(paths, source)
        if problems or unmatched:
            raise UserError((problems + unmatched)[0])
        return [
            found
            for job in jobs
            for found in self._one(
                job.image_id, read_image(job.path), source, job.lesions, ensemble, nearer, str(source.path or job.path)
            )
        ]

    def _one(
        self,
        image_id: str,
        image: np.ndarray,
        source: Source,
        lesions: Sequence[Lesion],
        ensemble: int,
        nearer: bool,
        place: str = "image",
    ) -> list[Prediction]:
        """The masks of one image; `place` is named in errors."""
        if source.kind == "everything":
            return masks_of(self.sam, image, self.auto, image_id, device=self.device)
        side = int(self.sam.image_encoder.img_size)
        shape = image.shape[0], image.shape[1]
        if source.kind == "auto":
            lesions = lesions or [Lesion(ONE, image_id)]
        try:
            asked = [lesion.asked(shape[1], shape[0], source) for lesion in lesions]
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        count, keys = len(asked), [f"{image_id}/{lesion.lesion_id}" for lesion in lesions]
        if nearer:
            frames, sizes = model_frames([image], side)
            input_size = int(sizes[0, 0]), int(sizes[0, 1])
            found = from_nearer(
                self.sam, frames.to(self.device).expand(count, -1, -1, -1), [input_size] * count, [shape] * count, asked
            )
        elif source.kind == "auto":
            features, input_size = self.cache.features(image)
            frames, _ = model_frames([image], side)
            found = [
                Answer(*one)
                for one in find_lesions(self.sam, features, frames, [input_size], by=self.lesion_by, options=self.auto)
            ]
        else:
            features, input_size = self.cache.features(image)
            found = answers(
                self.sam,
                features,
                [shape] * count,
                asked,
                keys,
                prompt=source.prompt,
                num_members=ensemble,
                owners=[0] * count,
            )
        return [
            prediction(
                answer,
                one,
                image_id=image_id,
                lesion_id=lesion.lesion_id,
                shape=shape,
                input_size=input_size,
                side=side,
                threshold=self.threshold,
            )
            for answer, one, lesion in zip(found, asked, lesions, strict=True)
        ]


def _lesions(boxes: object, cores: object, points: object, labels: Sequence[int] | np.ndarray | None) -> list[Lesion]:
    """Prompts given as numbers, as rows of a CSV: the same checks serve both."""
    if boxes is not None:
        big = _table("boxes", boxes, 4)
        small = None if cores is None else _table("cores", cores, 4)
        if small is not None and small.shape != big.shape:
            raise ValueError(f"cores: expected as many as boxes, {len(big)}, got {len(small)}")
        lesions = []
        for k, box in enumerate(big):
            row = {"image_id": "image"} | dict(zip(BIG, map(repr, box.tolist()), strict=True))
            row |= dict(zip(SMALL, map(repr, small[k].tolist()), strict=True)) if small is not None else {}
            lesions.append(Lesion(str(k), str(k), ((0, row),)))
        return lesions
    if points is not None:
        places = _table("points", points, 2)
        known = np.ones(len(places)) if labels is None else np.asarray(labels, float)
        if known.shape != (len(places),) or not len(places):
            raise ValueError(
                f"points and labels: expected at least one point, and a label for each; got {len(places)} "
                f"points and {known.size} labels"
            )
        rows = [
            {"image_id": "image", "x": repr(x), "y": repr(y), "label": f"{label:g}"}
            for (x, y), label in zip(places.tolist(), known.tolist(), strict=True)
        ]
        return [Lesion(ONE, ONE, tuple((0, row) for row in rows))]
    return []


def _table(name: str, values: object, columns: int) -> np.ndarray:
    """(N, columns) float64 of numbers given as that or, for one row, as (columns,)."""
    table = np.asarray(values, float)
    if not table.size:
        return np.zeros((0, columns))
    if table.ndim not in (1, 2) or table.shape[-1] != columns:
        raise ValueError(f"{name}: expected ({columns},) or (N, {columns}) numbers, got {table.shape}")
    return table.reshape(-1, columns)

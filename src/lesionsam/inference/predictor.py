"""Masks for images in memory or on disk: `Predictor`, with the options of `lesionsam predict`.

`inference.files.predict_files` writes masks to a folder. `inference.image.ImagePredictor` has SamPredictor's methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lesionsam.errors import UserError
from lesionsam.inference.arguments import Source, check_options, check_threshold, find_images, needs_small
from lesionsam.inference.auto import AUTO_DEFAULTS, AutoMaskOptions, predict_everything
from lesionsam.inference.decode import SELF_ENCODED, DecodeOptions, decode_lesions
from lesionsam.inference.image import EncodedImages, FeatureCache, check_rgb
from lesionsam.inference.inputs import Lesion
from lesionsam.inference.jobs import ONE, plan
from lesionsam.inference.prediction import LesionPrompt, Prediction, to_prediction, with_others
from lesionsam.models.checkpoint import load_sam, weights_metadata
from lesionsam.models.sam import Sam
from lesionsam.prompts import ZOOM
from lesionsam.utils.images import read_image
from lesionsam.utils.weights import find_weights

SHOWN_IDS = 3
Coordinates = np.ndarray | Sequence[float] | Sequence[Sequence[float]]


class Predictor:
    """Predict masks for images in memory or on disk, without writing files.

    `Predictor("models/adapted").predict("photo.jpg", boxes=[80, 60, 300, 280])`

    Features of the last few images are kept, so that another prompt on one of them costs no encoder pass.

    Args:
        model: a weights file, a folder that holds one (models/adapted, an export), OWNER/NAME of the Hugging Face Hub,
            or a SAM; the weights must not change while the Predictor lives.
        num_cached: images whose features are kept. threshold: probability above which a pixel is lesion.
        auto: settings of the automatic masks.
    """

    def __init__(
        self,
        model: Sam | str | Path,
        device: torch.device | str = "cpu",
        *,
        num_cached: int = 8,
        threshold: float = 0.5,
        auto: AutoMaskOptions = AUTO_DEFAULTS,
    ) -> None:
        check_threshold(threshold)
        metadata = {}
        if isinstance(model, str | Path):
            path = find_weights(Path(model))
            model, metadata = load_sam(None, path), weights_metadata(path)
        self.decoding = DecodeOptions.of_metadata(metadata, auto)
        self.cache = FeatureCache(model, device, num_cached)
        self.sam, self.device, self.threshold = self.cache.sam, self.cache.device, threshold

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
        zoom: bool = False,
    ) -> list[Prediction]:
        """Predict the masks of the lesions that are prompted for.

        Args:
            images: (H, W, 3) uint8 RGB; or files, folders and patterns, as on the command line.
            boxes: CSV of big boxes, or for one image (4,) or (N, 4) XYXY of N lesions, original pixels.
            cores: their small boxes, (4,) or (N, 4), where `prompt` needs them and `boxes` is no CSV.
            points: CSV of points, or for one image (N, 2) XY, one prompt. labels: N of them, 1 lesion (all, where they
                are left out) or 0 not.
            auto: the one lesion of each image, without a prompt. everything: all automatic masks.
            prompt: made from the boxes, of `prompts.KINDS`. ensemble: decodings of each box, all but one jittered.
            zoom: enlarge the surroundings of each box to the model's whole input; prompt `box` only.
        Returns:
            one Prediction for each lesion, in the order of images and rows.
        Raises:
            UserError: an image that cannot be read, an image without a prompt, a prompt outside its image; cores,
                labels, a threshold, an ensemble or a zoom that the kind of prompt does not use.
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
        check_options(source, threshold=self.threshold, ensemble=ensemble, zoom=zoom)
        options = replace(self.decoding, kind=ZOOM if zoom else source.decoded_as, num_members=ensemble)
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
            return self._predict_image("image", images, source, _lesions(boxes, cores, points, labels), options)
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
            return self._predict_image(
                paths[0].stem,
                read_image(paths[0]),
                source,
                _lesions(boxes, cores, points, labels),
                options,
                str(paths[0]),
            )
        jobs, unmatched, _ = plan(paths, source)
        if problems or unmatched:
            raise UserError((problems + unmatched)[0])
        return [
            prediction
            for job in jobs
            for prediction in self._predict_image(
                job.image_id, read_image(job.path), source, job.lesions, options, str(source.path or job.path)
            )
        ]

    def _predict_image(
        self,
        image_id: str,
        image: np.ndarray,
        source: Source,
        lesions: Sequence[Lesion],
        options: DecodeOptions,
        place: str = "image",
    ) -> list[Prediction]:
        """Predict the masks of one image; errors begin with `place`."""
        if source.kind == "everything":
            return list(predict_everything(self.sam, image, self.decoding.search.auto, image_id, device=self.device))
        if source.kind == "auto":
            lesions = lesions or [Lesion(ONE, image_id)]
        try:
            prompts = with_others([lesion.prompt(image.shape[1], image.shape[0], source) for lesion in lesions])
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if options.kind in SELF_ENCODED:
            images = EncodedImages.of([image], self.sam.frame)
        else:
            images = self.cache.encode(image)
        keys = [f"{image_id}/{lesion.lesion_id}" for lesion in lesions]
        decoded = decode_lesions(self.sam, images, prompts, [0] * len(prompts), keys, options)
        return [
            to_prediction(
                one,
                prompt,
                image_id=image_id,
                lesion_id=lesion.lesion_id,
                shape=images.shapes[0],
                input_size=images.input_sizes[0],
                frame=images.frame,
                threshold=self.threshold,
            )
            for one, prompt, lesion in zip(decoded, prompts, lesions, strict=True)
        ]


def _lesions(boxes: object, cores: object, points: object, labels: Sequence[int] | np.ndarray | None) -> list[Lesion]:
    """Return prompts that are given as numbers, each box a lesion, all points one lesion."""
    if boxes is not None:
        big = _table("boxes", boxes, 4)
        small = big if cores is None else _table("cores", cores, 4)
        if small.shape != big.shape:
            raise ValueError(f"cores: expected as many as boxes, {len(big)}, got {len(small)}")
        pairs = [(box, box if cores is None else core) for box, core in zip(big, small, strict=True)]
        return [Lesion(str(k), str(k), given=LesionPrompt(*pair)) for k, pair in enumerate(pairs)]
    if points is not None:
        places = _table("points", points, 2)
        known = np.ones(len(places)) if labels is None else np.asarray(labels, float)
        if known.shape != (len(places),) or not len(places):
            raise ValueError(
                f"points and labels: expected at least one point, and a label for each; got {len(places)} "
                f"points and {known.size} labels"
            )
        return [Lesion(ONE, ONE, given=LesionPrompt(points=places, labels=known))]
    return []


def _table(name: str, values: object, columns: int) -> np.ndarray:
    """Return numbers as (N, columns) float64; one row may be given as (columns,)."""
    table = np.asarray(values, float)
    if not table.size:
        return np.zeros((0, columns))
    if table.ndim not in (1, 2) or table.shape[-1] != columns:
        raise ValueError(f"{name}: expected ({columns},) or (N, {columns}) numbers, got {table.shape}")
    return table.reshape(-1, columns)

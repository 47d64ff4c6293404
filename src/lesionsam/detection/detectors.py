"""Find what a text names, with transformers' SAM 3, Grounding DINO or OWLv2: one interface, their own post-processing.

Several texts are synonyms: all are tried, and of what they find in the same place the most certain is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.ops import nms

from lesionsam.errors import UserError
from lesionsam.models.hub import readable_as
from lesionsam.utils.hub import CONFIG, fetch_model, model_type_of
from lesionsam.utils.weights import weights_sha256

SAME = 0.5  # IoU of two boxes from which they are one lesion
THRESHOLD = 0.2  # score below which nothing is kept, unless another is asked for
MASK_LEVEL = 0.5  # probability above which a pixel is lesion


@dataclass(frozen=True)
class Detection:
    """Something that a text names.

    Attributes:
        box: (4,) float64 XYXY, original pixels, inside the image. score: 0 to 1, of the model's own scale.
        text: the synonym that found it. mask: (H, W) bool where the model gives one, else None.
    """

    box: np.ndarray
    score: float
    text: str
    mask: np.ndarray | None = None


class Detector(ABC):
    """A model that finds what texts name.

    Args:
        model, processor: of transformers; the model is moved to the device. name: shown in messages.
        digest: of the weights, 12 hex digits.
    """

    def __init__(self, model: Any, processor: Any, name: str, digest: str, device: torch.device | str = "cpu") -> None:
        self.model, self.processor, self.device = model.to(device).eval(), processor, torch.device(device)
        self.name, self.digest = name, digest

    @torch.inference_mode()
    def detect(
        self, images: Sequence[np.ndarray], texts: Sequence[str], *, threshold: float = THRESHOLD
    ) -> list[list[Detection]]:
        """Find what any of the texts names, surest first.

        Args:
            images: B of (H, W, 3) uint8 RGB, of any sizes. texts: synonyms.
            threshold: score below which nothing is kept.
        Returns:
            per image, after non-maximum suppression.
        """
        found = self._found(images, texts, threshold)
        return [_distinct(each, (image.shape[1], image.shape[0])) for each, image in zip(found, images, strict=True)]

    @abstractmethod
    def _found(self, images: Sequence[np.ndarray], texts: Sequence[str], threshold: float) -> list[list[Detection]]:
        """Return what is found per image, before suppression."""


class GroundingDino(Detector):
    """Grounding DINO (Liu et al. 2023, arXiv:2303.05499): all texts in one sentence, parted by full stops."""

    def _found(self, images: Sequence[np.ndarray], texts: Sequence[str], threshold: float) -> list[list[Detection]]:
        sentence = " ".join(f"{text.lower().rstrip('.')}." for text in texts)
        inputs = self.processor(images=list(images), text=[sentence] * len(images), return_tensors="pt")
        outputs = self.model(**inputs.to(self.device))
        results = self.processor.post_process_grounded_object_detection(
            outputs, inputs["input_ids"], threshold=threshold, text_threshold=threshold, target_sizes=_sizes(images)
        )
        return [_detections(one, one["text_labels"], texts[0]) for one in results]


class Owlv2(Detector):
    """OWLv2 (Minderer et al. 2023, arXiv:2306.09683): the texts are classes."""

    def _found(self, images: Sequence[np.ndarray], texts: Sequence[str], threshold: float) -> list[list[Detection]]:
        queries = [list(texts)] * len(images)
        inputs = self.processor(images=list(images), text=queries, return_tensors="pt")
        outputs = self.model(**inputs.to(self.device))
        results = self.processor.post_process_grounded_object_detection(
            outputs, threshold=threshold, target_sizes=_sizes(images), text_labels=queries
        )
        return [_detections(one, one["text_labels"], texts[0]) for one in results]


class Sam3Text(Detector):
    """SAM 3 (Carion et al. 2025, arXiv:2511.16719): one text at a time on features computed once; gives masks."""

    def _found(self, images: Sequence[np.ndarray], texts: Sequence[str], threshold: float) -> list[list[Detection]]:
        shown = self.processor(images=list(images), return_tensors="pt").to(self.device)
        features = self.model.get_vision_features(pixel_values=shown["pixel_values"])
        found: list[list[Detection]] = [[] for _ in images]
        for text in texts:
            words = self.processor(text=[text] * len(images), original_sizes=_sizes(images), return_tensors="pt")
            words = words.to(self.device)
            outputs = self.model(
                vision_embeds=features, input_ids=words["input_ids"], attention_mask=words["attention_mask"]
            )
            results = self.processor.post_process_instance_segmentation(
                outputs, threshold=threshold, mask_threshold=MASK_LEVEL, target_sizes=_sizes(images)
            )
            for mine, one in zip(found, results, strict=True):
                mine += _detections(one, [text] * len(one["scores"]), text)
        return found


# model_type of config.json -> classes: ours, transformers' model and processor.
KINDS = {
    "sam3": (Sam3Text, "Sam3Model", "Sam3Processor"),
    "sam3_video": (Sam3Text, "Sam3Model", "Sam3Processor"),
    "grounding-dino": (GroundingDino, "GroundingDinoForObjectDetection", "GroundingDinoProcessor"),
    "owlv2": (Owlv2, "Owlv2ForObjectDetection", "Owlv2Processor"),
}


def open_detector(place: str, device: torch.device | str = "cpu", *, key: str = "--model") -> Detector:
    """Open a detector by its folder or its name on the Hub.

    Args:
        place: folder in the Hub's form, or OWNER/NAME. key: the option that names it, for messages.
    Raises:
        UserError: as `utils.hub.fetch_model`; a model of another kind; weights or tokens that are missing or damaged.
    """
    import transformers

    folder = fetch_model(place, key=key).folder
    kind = model_type_of(folder)
    if kind not in KINDS:
        raise UserError(
            f"{key} {place}: {folder / CONFIG} is of type {kind!r}, which takes no text; expected one of "
            f"{', '.join(KINDS)}, such as IDEA-Research/grounding-dino-tiny"
        )
    own, model_class, processor_class = KINDS[kind]
    with readable_as(model_class, f"{key} {place}"):
        model, found = getattr(transformers, model_class).from_pretrained(  # nosec B615: a folder on this machine
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
        processor = getattr(transformers, processor_class).from_pretrained(  # nosec B615
            folder, local_files_only=True
        )
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{key} {place}: lacks {len(missing)} weights, such as {missing[0]}; fetch it again")
    return own(model, processor, place, weights_sha256(folder)[:12], device)


def split_texts(text: str) -> list[str]:
    """Return the synonyms of "skin lesion, mole": parted by commas.

    Raises:
        UserError: no text.
    """
    if not (texts := [part.strip() for part in text.split(",") if part.strip()]):
        raise UserError(f'--text: expected words such as "skin lesion" or "skin lesion, mole", got {text!r}')
    return texts


def _sizes(images: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    return [(image.shape[0], image.shape[1]) for image in images]


def _detections(result: dict[str, Any], labels: Sequence[str], fallback: str) -> list[Detection]:
    """Return the detections of one image from a post-processed result; Grounding DINO may name no text."""
    if not len(result["scores"]):  # Grounding DINO then gives a text without a box
        return []
    masks = result.get("masks")
    return [
        Detection(
            box.double().cpu().numpy(),
            float(score),
            label or fallback,
            None if masks is None else masks[k].bool().cpu().numpy(),
        )
        for k, (box, score, label) in enumerate(zip(result["boxes"], result["scores"], labels, strict=True))
    ]


def _distinct(found: Sequence[Detection], size: tuple[int, int]) -> list[Detection]:
    """Cut boxes at an image of (width, height), drop those without area, and keep the surest of each place."""
    limits = np.array([*size, *size], float)
    cut = [Detection(np.clip(one.box, 0, limits), one.score, one.text, one.mask) for one in found]
    cut = [one for one in cut if (one.box[2:] - one.box[:2]).min() >= 1]
    if not cut:
        return []
    boxes = torch.tensor(np.stack([one.box for one in cut]))
    kept = nms(boxes, torch.tensor([one.score for one in cut], dtype=boxes.dtype), SAME)
    return [cut[k] for k in kept.tolist()]

"""Track lesions with the memory of SAM 2.1, EdgeTAM or SAM 3, by transformers' own video models.

The image part of the video model (encoder, prompts, decoder) gets the weights of the given SAM, adapted or not; the
memory part comes from a folder in the Hub's form. Outputs that no later frame reads are dropped, so that memory does
not grow with the clip.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lesionsam.errors import UserError
from lesionsam.models.sam2 import Sam2, quiet
from lesionsam.models.transforms import model_frames, upscale
from lesionsam.video.boxes import LesionBoxes
from lesionsam.video.tracker import Tracked

MODELS = {  # transformers' class for images -> for clips
    "Sam2Model": "Sam2VideoModel",
    "EdgeTamModel": "EdgeTamVideoModel",
    "Sam3TrackerModel": "Sam3TrackerVideoModel",
}
MEMORY_PART = "memory_encoder."  # in the names of a memory's weights
BOX_LABELS = (2, 3)  # of a box's two corners, given as points
KEPT_PROMPTED = 16  # frames with given boxes that are remembered: the first and the last of them
Outputs = dict[int, dict[str, Any]]  # frame -> name -> tensor


def has_memory(folder: Path) -> bool:
    """Return whether a folder in the Hub's form holds the weights of a memory."""
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            with safe_open(path, framework="numpy") as file:
                if any(MEMORY_PART in key for key in file.keys()):  # noqa: SIM118
                    return True
        except (SafetensorError, OSError):
            continue
    return False


def load_video_model(sam: Sam2, memory: Path) -> Any:
    """Build the video model of a SAM's family: the memory of a folder in the Hub's form, the rest of the SAM.

    Raises:
        UserError: a folder without a memory, or of another family or size.
    """
    import transformers

    kind = getattr(transformers, MODELS[sam.family.model])
    if not has_memory(memory):
        raise UserError(
            f"--memory {memory}: holds no weights of a memory; name a video model of {sam.name}'s kind, such as "
            "facebook/sam2.1-hiera-tiny"
        )
    try:
        with quiet():
            model, found = kind.from_pretrained(  # nosec B615: a folder on this machine
                memory, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
            own = {key: value for key, value in sam.state_dict().items() if key not in ("pixel_mean", "pixel_std")}
            unknown = model.load_state_dict(own, strict=False).unexpected_keys
    except (SafetensorError, OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"--memory {memory}: is no {kind.__name__} that {sam.name} fits into ({reason})") from None
    if unknown or found["missing_keys"]:
        odd = sorted([*unknown, *found["missing_keys"]])
        raise UserError(
            f"--memory {memory}: is no {kind.__name__} that {sam.name} fits into ({len(odd)} weights differ, such as "
            f"{odd[0]}); name the model that these weights were adapted from"
        )
    if model.image_size != sam.side:
        raise UserError(
            f"--memory {memory}: takes {model.image_size} px, {sam.name} was adapted at {sam.side} px; track with "
            "weights of the model's own size, or leave --memory out"
        )
    return model.eval()


class MemoryTracker:
    """A tracker with a memory; see `tracker.Tracker`.

    Args:
        sam: gives the frame and its normalisation; in eval mode, on the device. model: of `load_video_model`.
    """

    def __init__(self, sam: Sam2, model: Any) -> None:
        self.sam, self.device = sam, sam.no_memory_embedding.device
        self.model = model.to(self.device)
        module = sys.modules[type(model).__module__]
        self._new = getattr(module, type(model).__name__.replace("Model", "InferenceSession"))
        self.session = self._empty()
        self.number = 0  # of the next frame
        self.lesion_ids: list[str] = []  # their places are the session's ids of objects
        self._reach = max(model.config.num_maskmem, model.config.max_object_pointers_in_encoder)

    def _empty(self) -> Any:
        return self._new(inference_device=self.device, inference_state_device=self.device, dtype=torch.float32)

    @torch.inference_mode()
    def step(self, image: np.ndarray, boxes: Mapping[str, LesionBoxes]) -> dict[str, Tracked]:
        """Return each lesion in the next frame; see `Tracker.step`."""
        frames, sizes = model_frames([image], self.sam.frame)
        number, self.number = self.number, self.number + 1
        self._add(number, boxes, (image.shape[0], image.shape[1]))
        if not self.lesion_ids:
            return {}
        pixels = self.sam.normalize(frames.to(self.device), sizes.to(self.device))
        found = self.model(self.session, frame=pixels, frame_idx=number)
        self._forget(number)
        side = (self.sam.side, self.sam.side)
        tracked = {}
        for lesion_id, logits, score in zip(self.lesion_ids, found.pred_masks, found.object_score_logits, strict=True):
            mask = upscale(logits[0], side, (image.shape[0], image.shape[1]), self.sam.frame).cpu().numpy() > 0
            presence = float(torch.sigmoid(score.float()).reshape(-1)[0])
            tracked[lesion_id] = Tracked(mask, not mask.any(), 1.0 if lesion_id in boxes else presence)
        return tracked

    def _add(self, number: int, boxes: Mapping[str, LesionBoxes], shape: tuple[int, int]) -> None:
        """Give the session the boxes of a frame, as the two points that transformers' processor makes of them."""
        scale = np.tile(self.sam.side / np.array(shape[::-1], float), 2)
        self.lesion_ids += [lesion_id for lesion_id in boxes if lesion_id not in self.lesion_ids]
        given = []
        for lesion_id, box in boxes.items():
            points = torch.tensor((box.big * scale).reshape(1, 1, 2, 2), dtype=torch.float32)
            labels = torch.tensor([[BOX_LABELS]], dtype=torch.int32)
            place = self.lesion_ids.index(lesion_id)
            inputs = {"point_coords": points, "point_labels": labels}
            self.session.add_point_inputs(self.session.obj_id_to_idx(place), number, inputs)
            given.append(place)
        self.session.obj_with_new_inputs = given

    def _forget(self, number: int) -> None:
        """Drop what no later frame reads."""
        session, oldest = self.session, number - self._reach
        session.processed_frames = {}
        for place, outputs in session.output_dict_per_obj.items():
            session.frames_tracked_per_obj[place].clear()
            session.point_inputs_per_obj[place].clear()
            prompted, tracked = outputs["cond_frame_outputs"], outputs["non_cond_frame_outputs"]
            for frame in list(prompted)[1 : 1 - KEPT_PROMPTED]:
                del prompted[frame]
            for frame in [frame for frame in tracked if frame < oldest]:
                del tracked[frame]
            for held in (prompted, tracked):
                if number in held:
                    held[number].pop("high_res_masks", None)

    def state(self) -> dict[str, Any]:
        """Return the state; see `Tracker.state`."""
        outputs = {
            place: {name: _copied(held[name]) for name in ("cond_frame_outputs", "non_cond_frame_outputs")}
            for place, held in self.session.output_dict_per_obj.items()
        }
        return {"number": self.number, "lesion_ids": list(self.lesion_ids), "outputs": outputs}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.number, self.lesion_ids = state["number"], list(state["lesion_ids"])
        self.session = self._empty()
        for place in range(len(self.lesion_ids)):
            self.session.obj_id_to_idx(place)
        for place, held in state["outputs"].items():
            self.session.output_dict_per_obj[place] = {
                name: {
                    frame: {key: value.to(self.device) for key, value in values.items()}
                    for frame, values in outputs.items()
                }
                for name, outputs in held.items()
            }


def _copied(outputs: Outputs) -> Outputs:
    """Return outputs on the CPU, each tensor on its own: a view would be saved with all that it looks at."""
    return {
        frame: {key: value.detach().cpu().clone() for key, value in values.items() if isinstance(value, torch.Tensor)}
        for frame, values in outputs.items()
    }

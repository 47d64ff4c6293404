"""Draw the same few development images after every epoch, to show the progress of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lesionsam.data.dataset import LesionDataset
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.overlays import overlay, sheet, write_png
from lesionsam.prompts import seeded_prompts

SHOWN = ("centre", "box")  # one picture per prompt


@torch.no_grad()
def draw_epoch(
    path: Path, sam: Sam, data: LesionDataset, *, count: int, num_points: int, seed: int, epoch: int
) -> None:
    """Draw the predictions of `count` evenly spaced development lesions, prompted with centre point and big box.

    Args:
        path: PNG to write. data: masks, if there are any, are outlined too.
    """
    index = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int))
    device = next(sam.parameters()).device
    batch = data.batch(index).to(device)
    features = encode(sam, sam.normalize(batch.images, batch.sizes))
    pictures = []
    for kind in SHOWN:
        prompts = seeded_prompts(kind, batch.big_boxes, batch.small_boxes, batch.ids, num_points=num_points, seed=seed)
        low_res, _ = decode(sam, features, prompts)
        full = torch.nn.functional.interpolate(
            low_res.float(), (data.side, data.side), mode="bilinear", align_corners=False
        )
        for k, key in enumerate(batch.ids):
            height, width = (int(v) for v in batch.sizes[k])
            truth = None
            if batch.masks is not None and not bool(batch.masks[k, 0, 0].isnan()):
                truth = batch.masks[k, :height, :width].cpu().numpy() > 0.5
            boxes = [values[k].cpu().numpy() for values in (batch.big_boxes, batch.small_boxes)]
            points = None if prompts.points is None else prompts.points[k].cpu().numpy()
            prediction = (full[k, 0, :height, :width] > 0).cpu().numpy()
            image = batch.images[k, :, :height, :width].permute(1, 2, 0).cpu().numpy()
            pictures.append(
                overlay(
                    image,
                    truth=truth,
                    prediction=prediction,
                    big=boxes[0],
                    small=boxes[1],
                    points=points,
                    caption=f"{key} {kind}",
                )
            )
    write_png(path, sheet(pictures, columns=len(index), title=f"Development images after epoch {epoch}", points=True))

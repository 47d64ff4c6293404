"""Time our cached step with SAM 2.1 tiny beside a plain loop on transformers: student, teacher and reference encoded.

    python benchmarks/sam2_step.py --write

Both take the default method's terms with distillation; the last stage, the neck and the decoder train. The plain loop
asks transformers' own `get_image_features` for the three encoders in every step. Losses and gradients are compared
before anything is timed. Random weights: the arithmetic is that of the published ones.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from lesionsam.boxes.outline import Outline
from lesionsam.config.edit import fit, merge
from lesionsam.config.load import default_values, validate
from lesionsam.config.schema_method import ContrastiveMethod
from lesionsam.experiment.build import contrastive_options
from lesionsam.methods.contrastive import Contrastive
from lesionsam.models.prefix import encode_frozen
from lesionsam.models.sam import sam_of
from lesionsam.models.sam2 import Sam2, quiet
from lesionsam.models.trainable import select_trainable, trained_parameters
from lesionsam.training.gradients import Part, add_gradients
from lesionsam.types import Batch, Frame
from lesionsam.utils.devices import torch_device
from record import Limits, interleaved, multiplications, provenance, ratio, record, table
from step import generated_batch

LIMIT = 3.0  # cached beside the plain loop
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
LAST_STAGE, SEED = 2, 0  # blocks of Hiera tiny's last stage


class PlainLoop(Contrastive):
    """Run the same method with three whole encoders of transformers in every step."""

    @staticmethod
    def features(sam: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features of a Sam2 as transformers' Sam2Model.forward computes them."""
        maps = list(sam.vision_encoder(pixels, return_dict=True).fpn_hidden_states)
        maps[0], maps[1] = sam.mask_decoder.conv_s0(maps[0]), sam.mask_decoder.conv_s1(maps[1])
        coarse = maps[2] + sam.no_memory_embedding.view(1, -1, 1, 1)
        return torch.cat([coarse, F.pixel_unshuffle(maps[0], 4), F.pixel_unshuffle(maps[1], 2)], 1)

    def encode(
        self, batch: Batch, *, asks_teacher: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Encode the batch with student, teacher and reference."""
        pixels = self.sam.normalize(batch.images, batch.sizes)
        with torch.no_grad():
            f_r = self.features(self.reference, pixels)
        return self.features(self.sam, pixels), self.encode_teacher(batch), f_r

    @torch.no_grad()
    def encode_teacher(self, batch: Batch) -> torch.Tensor | None:
        """Encode the batch with the teacher."""
        if self.teacher is None:
            return None
        return self.features(sam_of(self.teacher.module), self.sam.normalize(batch.images, batch.sizes))


def build(kind: type[Contrastive], sam: Sam2, last_k: int) -> Contrastive:
    """Build the default method with distillation around a copy of a SAM."""
    values = merge(default_values(), {"method": {"weights": {"distil": 0.1}, "gate": {"entropy_thresh": 0.6931}}})
    method = validate(fit(values)).method
    if not isinstance(method, ContrastiveMethod):
        raise TypeError("the default method is contrastive")
    student = copy.deepcopy(sam)
    select_trainable(student, encoder="blocks", unfreeze_last_k=last_k, train_decoder=True)
    torch.manual_seed(SEED)
    return kind(student, copy.deepcopy(sam).requires_grad_(False), contrastive_options(method, Outline(), 0))


def step(method: Contrastive, batch: Batch) -> dict[str, torch.Tensor]:
    """Take forward and backward pass and the teacher's update; return the terms."""
    for p in trained_parameters(method.model):
        p.grad = None
    scaler = torch.amp.GradScaler(batch.images.device.type, enabled=False)
    found = add_gradients(method, [Part(batch, SEED)], precision="fp32", scaler=scaler)
    method.after_step()
    return dict(found.losses)


def main() -> int:
    """Run the command; return 1 if the limit was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="image side, pixels (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="images of a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table on top of benchmarks/results.md")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    device, limits = torch_device("auto"), Limits()
    torch.manual_seed(SEED)
    with quiet():
        sam = Sam2(transformers.Sam2Model(transformers.Sam2Config()), "sam2.1-tiny").to(device)
    sam.resize_input(a.side)
    batch = generated_batch(Frame(a.side, squash=True), a.batch_size, device)
    ours, plain = build(Contrastive, sam, LAST_STAGE), build(PlainLoop, sam, LAST_STAGE)
    split = ours.frozen_blocks
    prefix, reference = encode_frozen(ours.sam, ours.sam.normalize(batch.images, batch.sizes), split, ours.reference)
    cached = replace(batch, prefix=prefix, reference=reference)
    found = {"ours": step(ours, cached), "plain": step(plain, batch)}
    loss = max(float((found["ours"][k] - v).abs() / v.abs().clamp(min=1e-6)) for k, v in found["plain"].items())
    pairs = list(zip(trained_parameters(ours.model), trained_parameters(plain.model), strict=True))
    gradient = float(
        sum((p.grad - q.grad).square().sum() for p, q in pairs if p.grad is not None and q.grad is not None) ** 0.5
        / sum(q.grad.square().sum() for _, q in pairs if q.grad is not None) ** 0.5
    )
    if loss > LOSS_TOLERANCE or gradient > GRADIENT_TOLERANCE:
        print(f"error: losses differ by {loss:.1e}, gradients by {gradient:.1e}", file=sys.stderr)
        return 2
    runs: dict[str, Callable[[], object]] = {
        "plain": partial(step, plain, batch),
        "shared": partial(step, ours, batch),
        "cached": partial(step, ours, cached),
    }
    work = {name: multiplications(run) for name, run in runs.items()}
    spent = interleaved(runs, a.rounds, device, warm=0)
    row = []
    for name, limit in (("shared", None), ("cached", LIMIT)):
        value = ratio(spent["plain"], spent[name])
        row.append(limits.cell(f"SAM 2.1 tiny, {name}", value[0], limit, spread=value[1:]))
    row.append(" / ".join(f"{work['plain'] / work[name]:.2f}" for name in ("shared", "cached")))
    columns = ["prefix shared", "prefix and reference cached", "by multiplications alone", "losses", "gradients"]
    text = (
        f"Times faster than a plain loop on transformers: median of {a.rounds} rounds (least to greatest). SAM 2.1 "
        f"tiny, {a.side} px, batch {a.batch_size}, fp32, last stage, neck and decoder trained, random weights, "
        f"seed {SEED}; "
        f"{provenance(device)}. " + "Not measured on a GPU." * (device.type == "cpu") + "\n\n"
    )
    text += table(columns, [[*row, f"differ by {loss:.0e}", f"differ by {gradient:.0e}"]])
    print(f"\n{text}\n")
    if a.write:
        record("A step of SAM 2.1 beside a plain loop on transformers", text)
    return limits.exit_code()


if __name__ == "__main__":
    sys.exit(main())

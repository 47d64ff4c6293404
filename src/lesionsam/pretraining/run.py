"""Train a compact SAM from scratch: `lesionsam foundation`, sizes from section `foundation` of params.yaml.

It trains on the generated shapes of `pretraining.shapes`, or on the images and masks of section `data` (a folder, COCO,
any other source), prompted with boxes, points and mask prompts. Each step encodes a batch once and decodes it three
times: a loose box, points alone, and a refinement of a given mask (the box prior or the model's own earlier logits).
The learning rate follows the clock, so that the run fits the given time.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lesionsam.config.load import load_config, with_values
from lesionsam.config.schema import Foundation
from lesionsam.errors import UserError, run_guarded
from lesionsam.losses import hard_iou, soft_mask_loss
from lesionsam.models.checkpoint import save_sam
from lesionsam.models.compact import CompactArchitecture
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.sam1 import build_numbers
from lesionsam.pretraining import shape_prompts
from lesionsam.pretraining.card import PretrainProgress, card_text, current_commit
from lesionsam.pretraining.data import DataPool, open_pool
from lesionsam.pretraining.shape_prompts import Targets, make_targets
from lesionsam.prompts import draw_prompts
from lesionsam.types import Prompts
from lesionsam.utils.files import sha256_file, write_bytes_atomic, write_text_atomic

BATCH_SIZE = 8
POOL_CHUNKS = 84  # chunks of images kept, about 70 objects each; the oldest give way
FIRST_CHUNKS = 14  # generated before the first step
REFRESH_STEPS = 60  # a new chunk of images after this many steps
LEARNING_RATE, FINAL_SHARE, WARMUP_STEPS, WEIGHT_DECAY = 1e-3, 0.01, 200, 0.05
EMA_DECAY = 0.999
IOU_WEIGHT, CANDIDATES_WEIGHT = 0.05, 0.5
MEASURE_SECONDS, SAVE_SECONDS = 240.0, 180.0
HELD_OUT_SEED = 777_000_001
CHUNK_SEED_STRIDE = 1_000_003
MEASURED = ("box", "centre", "ring")
CARDS = {"compact.safetensors": "card.md"}  # the shipped weights' card; any other file's has its name


def pretrain(
    *,
    minutes: float,
    seed: int,
    state_path: Path,
    architecture: CompactArchitecture | None = None,
    sam: Sam | None = None,
    resume: bool = False,
    bfloat16: bool = True,
    images: tuple[DataPool, Targets] | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Sam, PretrainProgress]:
    """Train a small SAM from scratch for `minutes` of running time.

    Args:
        minutes: by the clock, added up over resumed runs; it sets the learning rate's course.
        seed: of weights, shapes, batches and prompts.
        state_path: file of the training state, written every few minutes; `resume` continues from it if it is there.
        architecture: of the compact SAM to build. sam: another model with random weights, trained in its place.
        bfloat16: autocast of encoder and decoder; weights and losses stay float32.
        images: what is trained on instead of generated shapes, and what to measure on; see `data.open_pool`.
        log: takes each progress line.
    Returns:
        the running average of the weights as a Sam in eval mode, and the finished progress.
    """
    if minutes <= 0:
        raise UserError(f"foundation: minutes must be above 0, got {minutes}")
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    architecture = architecture or CompactArchitecture()
    kind = {"architecture": json.dumps(sam.architecture(), sort_keys=True)} if sam else asdict(architecture)
    sam = (sam or build_numbers(architecture.numbers())).train()
    average = copy.deepcopy(sam).requires_grad_(False).eval()
    parameters = [p for p in sam.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    progress = PretrainProgress()
    parts = {"model": sam, "average": average, "optimiser": optimiser, "generator": generator}
    run = {**kind, "seed": seed, "images": "shapes" if images is None else "data"}
    if resume and state_path.is_file():
        progress = _restore(state_path, run, parts)
        log(f"resumed at step {progress.step}, {progress.seconds / 60:.1f} min")
    pool = _Pool(sam, seed, progress.chunks) if images is None else images[0]
    held_out = {"shapes": held_out_shapes(sam)} | ({} if images is None else {"data": images[1]})
    clock, cpu_clock = time.monotonic() - progress.seconds, time.process_time() - progress.cpu_seconds
    measured, saved, mean_loss = progress.seconds, progress.seconds, float("nan")
    while (share := (time.monotonic() - clock) / (60 * minutes)) < 1:
        rate = LEARNING_RATE * min(1.0, (progress.step + 1) / WARMUP_STEPS)
        rate *= FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimiser.param_groups:
            group["lr"] = rate
        batch = pool.draw(BATCH_SIZE, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = step_loss(sam, batch, generator)
        if not torch.isfinite(loss):
            raise UserError(f"foundation: the loss is {loss.item()} at step {progress.step}; take another seed")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        progress.step += 1
        _update_average(average, sam, min(EMA_DECAY, (1 + progress.step) / (10 + progress.step)))
        mean_loss = loss.item() if math.isnan(mean_loss) else 0.99 * mean_loss + 0.01 * loss.item()
        if progress.step % REFRESH_STEPS == 0:
            pool.refresh()
        progress.chunks = pool.chunks
        progress.seconds, progress.cpu_seconds = time.monotonic() - clock, time.process_time() - cpu_clock
        if progress.seconds - measured > MEASURE_SECONDS:
            measured = progress.seconds
            progress.scores = measure(average, held_out)
            log(_line(progress, minutes, mean_loss, rate))
        if progress.seconds - saved > SAVE_SECONDS:
            saved = progress.seconds
            _save_state(state_path, run, parts, progress)
    progress.scores = measure(average, held_out)
    log(_line(progress, minutes, mean_loss, 0.0))
    _save_state(state_path, run, parts, progress)
    return average, progress


def step_loss(sam: Sam, batch: Targets, generator: torch.Generator) -> Tensor:
    """Return the loss of three decodings: 2 BCE + Dice on the low-resolution grid, and the IoU head's squared error."""
    features = encode(sam, sam.normalize(batch.images, batch.sizes))
    targets = F.adaptive_avg_pool2d(batch.masks.float(), batch.priors.shape[-1])
    boxed = shape_prompts.box_prompts(batch, generator)
    pointed = shape_prompts.point_prompts(batch, generator)
    box_loss, box_logits = _prompted_loss(sam, features, boxed, targets)
    point_loss, point_logits = _prompted_loss(sam, features, pointed, targets)
    kind = torch.rand((), generator=generator)
    if kind < 0.65:
        refined = shape_prompts.prior_prompts(batch, generator)
    elif kind < 0.8:
        refined = shape_prompts.correction_prompts(batch, box_logits, boxed.boxes, generator)
    else:
        refined = shape_prompts.correction_prompts(batch, point_logits, None, generator)
    return box_loss + point_loss + _prompted_loss(sam, features, refined, targets)[0]


def _prompted_loss(sam: Sam, features: Tensor, prompts: Prompts, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scalar loss, and the single mask's logits (B, 1, T, T) without gradient.

    A single point without mask is ambiguous: there the best of the three candidates is trained too.
    """
    logits, predicted_iou = sam.decode_groups(features, [(None, prompts)])
    logits, predicted_iou = logits.float(), predicted_iou.float()
    everywhere = torch.ones_like(targets)
    loss = soft_mask_loss(logits[:, 0], targets, everywhere).mean()
    tokens = 1
    if prompts.boxes is None and prompts.masks is None and prompts.points is not None and prompts.points.shape[1] == 1:
        tokens = logits.shape[1]
        losses = torch.stack([soft_mask_loss(logits[:, k], targets, everywhere) for k in range(1, tokens)])
        loss = loss + CANDIDATES_WEIGHT * losses.amin(0).mean()
    true_iou = torch.stack([hard_iou(logits[:, k].detach(), targets, everywhere) for k in range(tokens)], 1)
    loss = loss + IOU_WEIGHT * F.mse_loss(predicted_iou[:, :tokens], true_iou)
    return loss, logits[:, :1].detach()


def held_out_shapes(sam: Sam) -> Targets:
    """Return about 140 objects that no run trains on."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    return make_targets(sam.side, 4 * sam.grid, generator, num_images=96)


@torch.no_grad()
def measure(sam: Sam, held_out: Mapping[str, Targets]) -> dict[str, float]:
    """Return the mean zero-shot IoU in the model's frame, "set/prompt" -> value.

    `prior` is the box prior itself; `box+prior` is the model given it as mask prompt beside the big box.
    """
    scores = {}
    for name, targets in held_out.items():
        generator = torch.Generator().manual_seed(0)
        ious: dict[str, list[Tensor]] = {}
        for part in torch.arange(len(targets)).split(32):
            batch = targets[part]
            features = encode(sam, sam.normalize(batch.images, batch.sizes))
            logits = {"prior": batch.priors[:, None]}
            for kind in MEASURED:
                prompts = draw_prompts(kind, batch.big, batch.small, num_points=10, generator=generator)
                logits[kind] = decode(sam, features, prompts)[0]
            refined = Prompts(boxes=batch.big, masks=batch.priors[:, None])
            logits["box+prior"] = decode(sam, features, refined)[0]
            for kind, low in logits.items():
                full = F.interpolate(low, size=batch.masks.shape[1:], mode="bilinear", align_corners=False)[:, 0]
                ious.setdefault(kind, []).append(hard_iou(full, batch.masks.float(), torch.ones_like(full)))
        scores |= {f"{name}/{kind}": round(torch.cat(values).mean().item(), 4) for kind, values in ious.items()}
    return scores


class _Pool:
    """Keep the newest POOL_CHUNKS chunks of generated targets; chunk k of a run is always the same."""

    def __init__(self, sam: Sam, seed: int, chunks: int) -> None:
        self.side, self.grid, self.seed = sam.side, 4 * sam.grid, seed
        self.chunks = max(chunks - FIRST_CHUNKS, 0)
        self.parts: deque[Targets] = deque(maxlen=POOL_CHUNKS)
        for _ in range(FIRST_CHUNKS):
            self.refresh()

    def refresh(self) -> None:
        """Add a chunk and drop the oldest."""
        generator = torch.Generator().manual_seed(self.seed * CHUNK_SEED_STRIDE + self.chunks)
        self.chunks += 1
        self.parts.append(make_targets(self.side, self.grid, generator))

    def draw(self, num: int, generator: torch.Generator) -> Targets:
        """Draw `num` targets, each from a random chunk, and augment them together."""
        drawn = []
        for index in torch.randint(len(self.parts), (num,), generator=generator).tolist():
            part = self.parts[index]
            drawn.append(part[torch.randint(len(part), (1,), generator=generator)])
        return shape_prompts.augment(Targets.join(drawn), generator)


@torch.no_grad()
def _update_average(average: Sam, sam: Sam, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(sam.parameters()), 1 - decay)


def _line(progress: PretrainProgress, minutes: float, loss: float, rate: float) -> str:
    scores = " ".join(f"{name} {value:.3f}" for name, value in progress.scores.items())
    return (
        f"step {progress.step} {progress.seconds / 60:.1f}/{minutes:.0f} min (cpu {progress.cpu_seconds / 60:.1f}) "
        f"loss {loss:.3f} lr {rate:.1e} {scores}"
    )


def _save_state(path: Path, run: Mapping[str, object], parts: Mapping[str, Any], progress: PretrainProgress) -> None:
    states = {name: part.get_state() if name == "generator" else part.state_dict() for name, part in parts.items()}
    buffer = io.BytesIO()
    torch.save({"run": dict(run), "progress": asdict(progress), **states}, buffer)
    write_bytes_atomic(path, buffer.getvalue())


def _restore(path: Path, run: Mapping[str, object], parts: Mapping[str, Any]) -> PretrainProgress:
    state = torch.load(path, weights_only=True)
    held = {"images": "shapes"} | state.get("run", {})
    if held != dict(run):
        differing = ", ".join(
            f"{key} {held.get(key)}, not {value}" for key, value in run.items() if held.get(key) != value
        )
        raise UserError(f"{path}: belongs to a run with {differing}; --fresh starts anew, --state names another file")
    for name, part in parts.items():
        (part.set_state if name == "generator" else part.load_state_dict)(state[name])
    return PretrainProgress(**state["progress"])


def main(arguments: list[str] | None = None) -> None:
    """Run the command; options that are not given come from section `foundation` of the parameter file."""
    parser = argparse.ArgumentParser(
        prog="lesionsam foundation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="parameter file (params.yaml)")
    for name, known in Foundation.model_fields.items():
        kind = {"minutes": float, "images": str}.get(name, int)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{known.description} (as in --params)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--out", type=Path, default=Path("foundation/compact.safetensors"), help="weights to write")
    parser.add_argument("--state", type=Path, default=Path(".cache/foundation/state.pt"), help="training state")
    parser.add_argument("--fresh", action="store_true", help="start anew even where --state holds an earlier run")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    options = parser.parse_args(arguments)
    given = {
        f"foundation.{name}": value for name in Foundation.model_fields if (value := getattr(options, name)) is not None
    }
    config = with_values(load_config(options.params, check_files=False), given, "lesionsam foundation")
    f = config.foundation
    torch.set_num_threads(options.threads)
    sizes = {name: getattr(f, name) for name in CompactArchitecture.__dataclass_fields__}
    architecture, commit = CompactArchitecture(**sizes), current_commit(Path(__file__).parent)
    images = None
    if f.images == "data":
        images = open_pool(config, architecture.image_size, 4 * architecture.grid, Path())
    sam, progress = pretrain(
        minutes=f.minutes,
        seed=f.seed,
        state_path=options.state,
        architecture=architecture,
        resume=not options.fresh,
        bfloat16=not options.float32,
        images=images,
        log=lambda line: print(line, flush=True),
    )
    num_parameters = sum(p.numel() for p in sam.parameters())
    save_sam(sam.half(), options.out, name="compact")
    words = sys.argv[1:] if arguments is None else arguments
    card = card_text(
        command=" ".join(["lesionsam foundation", *words]),
        commit=commit,
        seed=f.seed,
        machine=f"{os.cpu_count()}-core {platform.machine()} CPU, {options.threads} thread(s)",
        progress=progress,
        sha256=sha256_file(options.out),
        architecture=architecture,
        images=f.images,
        num_parameters=num_parameters,
    )
    write_text_atomic(options.out.with_name(CARDS.get(options.out.name, f"{options.out.stem}.md")), card)
    print(
        f"wrote {options.out} and its card: {num_parameters:,} parameters, {progress.step} steps, "
        f"{progress.seconds / 60:.1f} min"
    )


if __name__ == "__main__":
    run_guarded(main)

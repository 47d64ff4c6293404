"""Pretrain the compact SAM on generated shapes: `python -m lesionsam.foundation`.

It sees shapes of lesionsam.data.shapes only, prompted with boxes, points and mask prompts. Each step encodes a batch
once and decodes it three times: a loose box, points alone, and a refinement of a given mask (the box prior or the
model's own earlier logits). The learning rate follows the clock, so that the run fits the time there is.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import Sam
from torch import Tensor, nn

from lesionsam.box_prior import box_prior
from lesionsam.boxes import simulate_boxes
from lesionsam.data import shape_prompts
from lesionsam.data.shape_prompts import Targets, make_targets
from lesionsam.errors import UserError, run_guarded
from lesionsam.losses import hard_iou, soft_mask_loss
from lesionsam.models.compact import CompactArchitecture, build_compact, decode_candidates
from lesionsam.prompts import draw_prompts
from lesionsam.types import Prompts

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


@dataclass
class Progress:
    """Where a run stands: steps done, seconds on the clock and of the processor, the last measured scores."""

    step: int = 0
    chunks: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)


def pretrain(*, minutes: float, seed: int, state_path: Path, architecture: CompactArchitecture | None = None,
             resume: bool = False, bfloat16: bool = True, probe: Path | None = None,
             log: Callable[[str], None] = print) -> tuple[Sam, Progress]:
    """Train a compact SAM from scratch for `minutes` of running time.

    Args:
        minutes: by the clock, added up over resumed runs; it sets the learning rate's course.
        seed: of weights, shapes, batches and prompts.
        state_path: file of the training state, written every few minutes; `resume` continues from it.
        bfloat16: autocast of encoder and decoder; weights and losses stay float32.
        probe: folder with images/train/*.jpg and masks/train/*.png to measure on; never trained or selected on.
        log: takes each progress line.
    Returns:
        the running average of the weights as a Sam in eval mode, and the finished progress.
    """
    if minutes <= 0:
        raise UserError(f"foundation: minutes must be above 0, got {minutes}")
    architecture = architecture or CompactArchitecture()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sam = build_compact(architecture).train()
    average = copy.deepcopy(sam).requires_grad_(False).eval()
    parameters = [p for p in sam.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    progress = Progress()
    if resume:
        progress = _restore(state_path, architecture, sam, average, optimiser, generator)
        log(f"resumed at step {progress.step}, {progress.seconds / 60:.1f} min")
    pool = _Pool(architecture, seed, progress.chunks)
    held_out = make_targets(architecture.image_size, 4 * architecture.grid, torch.Generator().manual_seed(HELD_OUT_SEED), 96)
    clock, cpu_clock = time.monotonic() - progress.seconds, time.process_time() - progress.cpu_seconds
    measured, saved, mean_loss = progress.seconds, progress.seconds, float("nan")
    while (share := (time.monotonic() - clock) / (60 * minutes)) < 1:
        rate = LEARNING_RATE * min(1.0, (progress.step + 1) / WARMUP_STEPS)
        rate *= FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimiser.param_groups:
            group["lr"] = rate
        batch = shape_prompts.augment(pool.draw(BATCH_SIZE, generator), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = step_loss(sam, batch, generator)
        if not torch.isfinite(loss):
            raise UserError(f"foundation: the loss is {loss.item()} at step {progress.step}; resume with another --seed")
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
            progress.scores = measure(average, held_out, probe)
            log(_line(progress, minutes, mean_loss, rate))
        if progress.seconds - saved > SAVE_SECONDS:
            saved = progress.seconds
            _save_state(state_path, architecture, sam, average, optimiser, generator, progress)
    progress.scores = measure(average, held_out, probe)
    log(_line(progress, minutes, mean_loss, 0.0))
    _save_state(state_path, architecture, sam, average, optimiser, generator, progress)
    return average, progress


def step_loss(sam: Sam, batch: Targets, generator: torch.Generator) -> Tensor:
    """Sum over three decodings of 2 BCE + Dice on the low-resolution grid, and of the IoU head's squared error."""
    features = sam.image_encoder(normalise(sam, batch.images, batch.sizes))
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
    """Scalar loss, and the single mask's logits (B, 1, T, T) without gradient.

    A single point without mask is ambiguous: there the best of the three candidates is trained too.
    """
    logits, predicted_iou = decode_candidates(sam, features, prompts)
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


def normalise(sam: Sam, images: Tensor, sizes: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> float32: SAM's pixel mean and std, then zero outside the (B, 2) height and width."""
    axis = torch.arange(images.shape[-1])
    valid = (axis < sizes[:, :1])[:, :, None] & (axis < sizes[:, 1:])[:, None, :]
    return (images.float() - sam.pixel_mean) / sam.pixel_std * valid[:, None]


@torch.no_grad()
def measure(sam: Sam, held_out: Targets, probe: Path | None) -> dict[str, float]:
    """Mean zero-shot IoU per prompt on held-out shapes (shapes/...) and, where given, on real images (probe/...).

    `prior` is the box prior itself, `box+prior` the model refining it.
    """
    scores = {f"shapes/{kind}": value for kind, value in _score(sam, held_out).items()}
    if probe is not None:
        scores |= {f"probe/{kind}": value for kind, value in _score(sam, _read_probe(probe, sam)).items()}
    return scores


def _score(sam: Sam, targets: Targets) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    side = targets.images.shape[-1]
    ious: dict[str, list[Tensor]] = {}
    for part in torch.arange(len(targets)).split(32):
        batch = targets[part]
        features = sam.image_encoder(normalise(sam, batch.images, batch.sizes))
        prompts = {kind: draw_prompts(kind, batch.big, batch.small, num_points=10, generator=generator) for kind in MEASURED}
        prompts["box+prior"] = Prompts(boxes=batch.big, masks=batch.priors[:, None])
        logits = {kind: decode_candidates(sam, features, prompt)[0][:, :1] for kind, prompt in prompts.items()}
        logits["prior"] = batch.priors[:, None]
        for kind, low in logits.items():
            full = F.interpolate(low, size=(side, side), mode="bilinear", align_corners=False)[:, 0]
            ious.setdefault(kind, []).append(hard_iou(full, batch.masks.float(), torch.ones_like(full)))
    return {kind: round(torch.cat(values).mean().item(), 4) for kind, values in ious.items()}


_probes: dict[Path, Targets] = {}


def _read_probe(folder: Path, sam: Sam, num_images: int = 100) -> Targets:
    """The first images of a folder in the model's frame with simulated boxes 10 to 20 % too large; kept in memory."""
    if folder in _probes:
        return _probes[folder]
    side, rng = sam.image_encoder.img_size, np.random.default_rng(0)
    rows: list[tuple[Tensor, ...]] = []
    for path in sorted((folder / "images" / "train").glob("*.jpg"))[:num_images]:
        image = Image.open(path).convert("RGB")
        mask = Image.open(folder / "masks" / "train" / f"{path.stem}.png").convert("L")
        scale = side / max(image.size)
        width, height = (round(length * scale) for length in image.size)
        pixels = np.zeros((side, side, 3), np.uint8)
        pixels[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        truth = np.zeros((side, side), bool)
        truth[:height, :width] = np.asarray(mask.resize((width, height), Image.Resampling.BILINEAR)) > 127
        boxes = simulate_boxes(truth, rng, margin=(0.1, 0.2), core=(0.45, 0.55), jitter=0.03, min_area=16)
        if boxes is None:
            continue
        padding = np.ones((side, side), bool)
        padding[:height, :width] = False
        prior = torch.from_numpy(box_prior(pixels, boxes[0], boxes[1], padding))[None].float()
        rows.append((torch.from_numpy(pixels).permute(2, 0, 1), torch.tensor([height, width]), torch.from_numpy(truth),
                     torch.from_numpy(boxes[0]).float(), torch.from_numpy(boxes[1]).float(),
                     F.adaptive_avg_pool2d(prior, side // 2)[0]))
    if not rows:
        raise UserError(f"{folder}: expected images/train/*.jpg and masks/train/*.png to measure on, found none")
    _probes[folder] = Targets(*(torch.stack(column) for column in zip(*rows, strict=True)))
    return _probes[folder]


class _Pool:
    """The newest POOL_CHUNKS chunks of generated targets; chunk k of a run is always the same."""

    def __init__(self, architecture: CompactArchitecture, seed: int, chunks: int) -> None:
        self.architecture, self.seed = architecture, seed
        self.chunks = max(chunks - FIRST_CHUNKS, 0)
        self.parts: deque[Targets] = deque(maxlen=POOL_CHUNKS)
        for _ in range(FIRST_CHUNKS):
            self.refresh()

    def refresh(self) -> None:
        """Add a chunk, and let the oldest go."""
        generator = torch.Generator().manual_seed(self.seed * CHUNK_SEED_STRIDE + self.chunks)
        self.chunks += 1
        self.parts.append(make_targets(self.architecture.image_size, 4 * self.architecture.grid, generator))

    def draw(self, num: int, generator: torch.Generator) -> Targets:
        """`num` targets, each from a chunk drawn anew."""
        drawn = []
        for index in torch.randint(len(self.parts), (num,), generator=generator).tolist():
            part = self.parts[index]
            drawn.append(part[torch.randint(len(part), (1,), generator=generator)])
        return Targets.join(drawn)


@torch.no_grad()
def _update_average(average: Sam, sam: Sam, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(sam.parameters()), 1 - decay)


def _line(progress: Progress, minutes: float, loss: float, rate: float) -> str:
    scores = " ".join(f"{name} {value:.3f}" for name, value in progress.scores.items())
    return (f"step {progress.step} {progress.seconds / 60:.1f}/{minutes:.0f} min (cpu {progress.cpu_seconds / 60:.1f}) "
            f"loss {loss:.3f} lr {rate:.1e} {scores}")


def _replace_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _save_state(path: Path, architecture: CompactArchitecture, sam: Sam, average: Sam, optimiser: torch.optim.Optimizer,
                generator: torch.Generator, progress: Progress) -> None:
    buffer = io.BytesIO()
    torch.save({"architecture": asdict(architecture), "model": sam.state_dict(), "average": average.state_dict(),
                "optimiser": optimiser.state_dict(), "generator": generator.get_state(),
                "progress": asdict(progress)}, buffer)
    _replace_file(path, buffer.getvalue())


def _restore(path: Path, architecture: CompactArchitecture, sam: Sam, average: Sam, optimiser: torch.optim.Optimizer,
             generator: torch.Generator) -> Progress:
    if not path.is_file():
        raise UserError(f"{path}: expected the training state of an earlier run, found no file; start without --resume")
    state = torch.load(path, weights_only=True)
    if state["architecture"] != asdict(architecture):
        raise UserError(f"{path}: was made with {state['architecture']}, expected {asdict(architecture)}")
    sam.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    generator.set_state(state["generator"])
    return Progress(**state["progress"])


def save_weights(sam: Sam, path: Path, architecture: CompactArchitecture) -> None:
    """float16 safetensors under segment_anything's own names; the metadata states name and architecture as JSON."""
    state = {name: value.half().contiguous() for name, value in sam.state_dict().items()}
    metadata = {"name": "compact", "architecture": json.dumps(asdict(architecture))}
    _replace_file(path, safetensors.torch.save(state, metadata))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lesionsam.foundation", description=__doc__,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="running time by the clock, resumed runs added up")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("foundation/compact.safetensors"), help="weights to write")
    parser.add_argument("--state", type=Path, default=Path(".cache/foundation/state.pt"), help="training state")
    parser.add_argument("--resume", action="store_true", help="continue from --state")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--snapshot", action="store_true", help="only write the average of --state to --out")
    parser.add_argument("--probe", type=Path, help="folder of real images to measure on; never trained or selected on")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    architecture = CompactArchitecture()
    if options.snapshot:
        sam = build_compact(architecture)
        optimiser = torch.optim.AdamW(sam.parameters())
        progress = _restore(options.state, architecture, copy.deepcopy(sam), sam, optimiser, torch.Generator())
    else:
        sam, progress = pretrain(minutes=options.minutes, seed=options.seed, state_path=options.state,
                                 architecture=architecture, resume=options.resume, bfloat16=not options.float32,
                                 probe=options.probe, log=lambda line: print(line, flush=True))
    save_weights(sam, options.out, architecture)
    print(f"wrote {options.out}: {progress.step} steps, {progress.seconds / 60:.1f} min")


if __name__ == "__main__":
    run_guarded(main)

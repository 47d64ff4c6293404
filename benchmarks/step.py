"""Time our training step against the published one: `make benchmark`, or `python benchmarks/step.py`; minutes on one
core.

Before anything is timed, both steps are run in float32 on the same batch with the same draws: their losses must agree
to 1e-5 and their gradients to 1e-3. The gate is set so that every image is trusted, as the published step's work
depends on that, and the rate is printed. Whole steps: forward, backward, clipping, AdamW, the teacher's average; CPU
time of one thread (CUDA events on a GPU), the steps taking turns. Random weights: time does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import naive_step
from lesionsam.boxes.outline import Outline
from lesionsam.cli.smoke import generated_samples
from lesionsam.config.edit import fit as fit_values
from lesionsam.config.edit import merge
from lesionsam.config.load import default_values, unflatten, validate
from lesionsam.config.presets import preset_values
from lesionsam.config.schema_method import ContrastiveMethod
from lesionsam.data.dataset import open_dataset
from lesionsam.experiment.build import choose_trained, contrastive_options
from lesionsam.losses import info_nce
from lesionsam.methods.contrastive import Contrastive
from lesionsam.models.checkpoint import build_sam
from lesionsam.models.prefix import encode_frozen, num_frozen_blocks
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.sam1 import build_numbers
from lesionsam.models.teacher import Teacher
from lesionsam.models.trainable import select_trainable, trained_parameters
from lesionsam.prompts import draw_prompts
from lesionsam.training.gradients import Part, add_gradients, autocast, total_loss
from lesionsam.types import Batch, Frame
from lesionsam.utils.devices import torch_device
from naive_step import Draws, NaiveStep
from record import Limits, interleaved, multiplications, provenance, ratio, record, table

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
TRUST_EVERYBODY = 0.6931  # nats; the greatest entropy is ln 2
LEARNING_RATE, SEED = 1e-5, 0
# K -> ratio to the published step with the frozen prefix run once, with prefix and pretrained features cached, and
# with both and a teacher that seldom encodes.
LIMITS: dict[tuple[str, str, str], dict[int, tuple[float | None, float | None, float | None]]] = {
    ("field", "fp32", "blocks"): {1: (2.9, 5.8, None), 2: (2.5, 4.6, None), 4: (1.9, 3.0, None), 0: (1.3, 1.6, None)},
    ("field", "bf16", "blocks"): {2: (None, 6.0, None)},
    ("vit_b", "fp32", "blocks"): {2: (3.5, 7.3, None)},
    ("field", "fp32", "lora"): {6: (None, 2.5, 3.0), 0: (1.2, 1.5, None)},
    ("field", "fp32", "adapter"): {6: (None, 2.5, 3.0), 0: (1.2, 1.5, None)},
}
FORMS = ("shared", "cached", "seldom")
TEACHER_SHARE = 0.25  # method.teacher_share of the last form
LAST_K = {"blocks": "model.unfreeze_last_k", "lora": "model.lora_last_k", "adapter": "model.adapter_last_k"}
LATER_K, LATER_LIMIT = 2, 0.6  # a second epoch beside the first; whole epochs are in benchmarks/cache.py
COMPONENT_LIMITS = {"average of the teacher": 10.0, "InfoNCE": 25.0, "ring points": 100.0}


def field_sam(side: int, width: int, depth: int) -> Sam:
    """Build a SAM like SAM's own sizes, with windows of 14 and four global blocks, but of any width and side."""
    numbers = {
        "image_size": side,
        "patch_size": 16,
        "width": width,
        "depth": depth,
        "num_heads": max(1, width // 64),
        "mlp_dim": 4 * width,
        "window_size": 14,
        "global_attn_indexes": [math.ceil(depth / 4 * (k + 1)) - 1 for k in range(4)],
        "prompt_width": 256,
        "mask_in_chans": 16,
        "decoder_depth": 2,
        "decoder_num_heads": 8,
        "decoder_mlp": 2048,
        "num_multimask_outputs": 3,
        "iou_head_depth": 3,
        "iou_head_hidden_dim": 256,
    }
    return build_numbers(numbers, "field")


def random_sam(name: str, side: int, width: int, depth: int) -> Sam:
    """Build `field` or one of SAM's own models with random weights, positions included."""
    torch.manual_seed(SEED)
    sam = field_sam(side, width, depth) if name == "field" else build_sam(name)
    for key, p in sam.encoder.named_parameters():
        if "rel_pos" in key or key == "pos_embed":  # segment_anything starts them at 0, for checkpoints to fill
            nn.init.normal_(p, std=0.05)
    return sam.eval()


def generated_batch(frame: Frame, count: int, device: torch.device) -> Batch:
    """Return generated lesions in the model frame, with masks."""
    with tempfile.TemporaryDirectory() as folder:
        samples = generated_samples(Path(folder) / "images", count, SEED)
        return open_dataset(samples, frame, Path(folder) / "frames", with_masks=True).batch(range(count)).to(device)


class Pair:
    """Both steps with the same weights, on one batch.

    Student, teacher and pretrained model differ a little, as after some training, so that every term has a gradient.

    Args:
        sam: random weights; kept as the pretrained model. last_k: blocks that train, 0 = the whole encoder.
        encoder: what trains in them, see model.encoder.
    """

    def __init__(self, sam: Sam, last_k: int, batch: Batch, precision: str = "fp32", encoder: str = "blocks") -> None:
        self.batch, self.precision, self.device = batch, precision, batch.images.device
        values = preset_values("published", default_values())
        changes = {"model.encoder": encoder, LAST_K[encoder]: last_k, "method.gate.entropy_thresh": TRUST_EVERYBODY}
        config = validate(fit_values(merge(values, unflatten(changes))))
        method = config.method
        if not isinstance(method, ContrastiveMethod):
            raise TypeError("the preset `published` is contrastive")
        spread_masks(sam, batch)
        student, self.pretrained = copy.deepcopy(sam), sam.requires_grad_(False)
        choose_trained(config, student)
        student.prompt_encoder.requires_grad_(False)
        fill_inserted(student)
        teacher = copy.deepcopy(student)
        torch.manual_seed(SEED)
        self.method = Contrastive(student, self.pretrained, contrastive_options(method, Outline(), 0))
        self.method.model.train()
        with torch.no_grad():
            for p in trained_parameters(student):
                p.add_(torch.randn_like(p) * (0.02 * p.std() if p.numel() > 1 else 0))
        self.naive = NaiveStep(
            student,
            teacher,
            self.pretrained,
            self.method.head,
            entropy_thresh=TRUST_EVERYBODY,
            learning_rate=LEARNING_RATE,
        )
        self.naive.student.train()
        self.parameters = trained_parameters(self.method.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        self.draws = self.drawn(step_generator())
        self.cached = self.with_activations()

    def drawn(self, generator: torch.Generator) -> Draws:
        """Draw what `Contrastive.losses` draws, in its order."""
        prompts = draw_prompts(
            "ring", self.batch.big_boxes, self.batch.small_boxes, num_points=naive_step.NUM_POINTS, generator=generator
        )
        cells = self.method.sam.grid
        keys = torch.rand(4, len(self.batch.ids), cells * cells, generator=generator)
        if prompts.points is None:
            raise TypeError("ring prompts are points")
        return Draws(prompts.points, keys.to(self.device))

    @torch.no_grad()
    def with_activations(self) -> Batch:
        """Return the batch with the activations that a cache holds."""
        images, split = self.method.sam.normalize(self.batch.images, self.batch.sizes), self.method.frozen_blocks
        with autocast(self.device, self.precision):
            if split < 0:  # nothing is frozen but the pretrained model
                return replace(
                    self.batch, reference=encode_frozen(self.pretrained, images, num_frozen_blocks(self.pretrained))[0]
                )
            tokens, features = encode_frozen(self.method.sam, images, split, self.pretrained)
        return replace(self.batch, prefix=tokens, reference=features)

    def ours(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Compute the gradients of a step of ours; return its weighted terms and monitors."""
        self.optimizer.zero_grad()
        scaler = torch.amp.GradScaler(enabled=False)
        found = add_gradients(self.method, [Part(batch, SEED)], precision=self.precision, scaler=scaler)
        self.trusted = found.means["trusted"]
        terms = {name: total_loss({name: term}).detach() for name, term in found.terms.items()}
        return terms | {"mask": found.means["mask"], "iou": naive_step.BETA * found.means["iou"]}

    def our_step(self, batch: Batch, teacher_share: float = 1.0) -> None:
        """Take one training step as `training.loop.fit` does."""
        self.method.options = replace(self.method.options, teacher_share=teacher_share)
        self.ours(batch)
        nn.utils.clip_grad_norm_(self.parameters, naive_step.CLIP)
        self.optimizer.step()
        self.method.after_step()

    def naive_backward(self) -> Mapping[str, torch.Tensor]:
        """Compute the gradients of the published step; return its weighted terms."""
        with autocast(self.device, self.precision):
            return {name: term.detach() for name, term in self.naive.backward(self.batch, self.draws).items()}

    def naive_step(self) -> None:
        """Take one published step."""
        self.naive_backward()
        self.naive.update()

    def agreement(self, *batches: Batch) -> Agreement:
        """Return the largest difference of our step from the published one, over forms of the batch."""
        theirs = self.naive_backward()
        wanted = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.naive.trained]
        whole = math.sqrt(sum(float(g.norm()) ** 2 for g in wanted))
        loss = gradient = worst = 0.0
        trusted = 1.0
        for batch in batches:
            ours = self.ours(batch)
            if set(theirs) != set(ours):
                raise ValueError(f"terms: expected {sorted(theirs)}, got {sorted(ours)}")
            loss = max(loss, *(float(abs(ours[name] - v) / v.abs().clamp(min=1)) for name, v in theirs.items()))
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            off = [float((a - b).norm()) for a, b in zip(found, wanted, strict=True)]
            gradient = max(gradient, math.sqrt(sum(d * d for d in off)) / whole)
            worst = max(worst, *(d / max(float(g.norm()), 1e-3 * whole) for d, g in zip(off, wanted, strict=True)))
            trusted = min(trusted, float(self.trusted))
        return Agreement(
            trusted,
            self.naive.trusted / len(self.batch.ids),
            {name: float(value) for name, value in theirs.items()},
            loss,
            gradient,
            worst,
        )


@dataclass(frozen=True)
class Agreement:
    """Difference of our step from the published one.

    Attributes:
        trusted, naive_trusted: share of images. terms: the published step's. loss: greatest difference of a term,
            relative where the term is above 1. gradient: norm of the difference of all gradients by theirs;
            worst: the same of a single parameter, those with next to no gradient against a thousandth of all.
    """

    trusted: float
    naive_trusted: float
    terms: dict[str, float]
    loss: float
    gradient: float
    worst: float

    def check(self) -> None:
        """Raise unless losses and gradients agree, every image is trusted, and every term counts."""
        silent = [name for name, value in self.terms.items() if value == 0]
        if not (
            self.loss <= LOSS_TOLERANCE
            and self.gradient <= GRADIENT_TOLERANCE
            and self.worst <= GRADIENT_TOLERANCE
            and self.trusted == self.naive_trusted == 1
            and not silent
        ):
            raise ValueError(f"the steps differ, so nothing is timed: {self}")


def mixed(asked: Any, unasked: Any) -> Any:
    """Return the mean cost of a step of which a share asks the teacher; numbers, or the rounds' lists of them."""
    if isinstance(asked, list):
        return [mixed(a, b) for a, b in zip(asked, unasked, strict=True)]
    return TEACHER_SHARE * asked + (1 - TEACHER_SHARE) * unasked


def step_generator() -> torch.Generator:
    """Return the generator of a step: the same in every step."""
    return torch.Generator().manual_seed(SEED)


@torch.no_grad()
def fill_inserted(sam: Sam) -> None:
    """Draw the factors of LoRA and the layers of adapters that start at zero, so that all of them have a gradient."""
    generator = torch.Generator().manual_seed(SEED)
    for name, p in sam.named_parameters():
        if "lora_B" in name or ".adapter.up." in name:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02)


@torch.no_grad()
def spread_masks(sam: Sam, batch: Batch) -> None:
    """Scale the random masks' logits to a deviation of 3 and choose their sign.

    The entropy is then below its maximum, and most of each image lies in its mask, so that the contrast has anchors.
    """
    prompts = draw_prompts(
        "ring", batch.big_boxes, batch.small_boxes, num_points=naive_step.NUM_POINTS, generator=step_generator()
    )
    low_res, _ = decode(sam, encode(sam, sam.normalize(batch.images, batch.sizes)), prompts)
    last: Any = sam.mask_decoder.output_hypernetworks_mlps[0].layers[-1]
    factor = 3 / low_res.std() * low_res.mean().sign()
    last.weight.mul_(factor)
    last.bias.mul_(factor)


def components(device: torch.device, sam: Sam, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Measure ratios of published form to ours: K = 2; 4 images; 256 anchors, 1024 negatives; 1024 px."""
    student = copy.deepcopy(sam)
    select_trainable(student, encoder="blocks", unfreeze_last_k=2, train_decoder=False)
    whole, teacher = copy.deepcopy(sam), Teacher(student, naive_step.EMA_DECAY)
    generator = torch.Generator().manual_seed(SEED)
    vectors = [
        nn.functional.normalize(torch.randn(4, n, 64, generator=generator).to(device), dim=-1) for n in (256, 256, 1024)
    ]
    everywhere = tuple(torch.ones(v.shape[:2], dtype=torch.bool, device=device) for v in (vectors[0], vectors[2]))
    big = torch.tensor([[200.0, 180, 830, 790]] * 4, device=device)
    small = torch.tensor([[400.0, 380, 610, 580]] * 4, device=device)

    def batched() -> None:
        anchors = vectors[0].clone().requires_grad_()
        info_nce(
            anchors, vectors[1], vectors[2], everywhere[0], everywhere[1], naive_step.TEMPERATURE
        ).mean().backward()

    def one_by_one(form: Callable[..., torch.Tensor]) -> None:
        anchors = vectors[0].clone().requires_grad_()
        torch.stack([form(*parts) for parts in zip(anchors, *vectors[1:], strict=True)]).mean().backward()

    def by_mask() -> None:
        for b in range(4):
            naive_step.ring_points_from_mask(big[b], small[b], 1024)

    found = {}
    for name, runs in {
        "average of the teacher": (lambda: naive_step.average_each(whole, student), teacher.update),
        "InfoNCE": (partial(one_by_one, naive_step.info_nce_by_anchor), batched),
        "InfoNCE, beside the form of the yardstick": (partial(one_by_one, naive_step.image_info_nce), batched),
        "ring points": (
            by_mask,
            lambda: draw_prompts("ring", big, small, num_points=naive_step.NUM_POINTS, generator=generator),
        ),
    }.items():
        spent = interleaved({"published": runs[0], "ours": runs[1]}, rounds, device, repeats=10)
        found[name] = ratio(spent["published"], spent["ours"])
    return found


def main() -> int:
    """Check, time, print the tables; end with an error where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="field", help="field (of the sizes below) or vit_b (default: %(default)s)")
    parser.add_argument("--side", type=int, default=512, help="of the images, pixels (default: %(default)s)")
    parser.add_argument("--width", type=int, default=192, help="of the encoder (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=12, help="of the encoder (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="images of a step (default: %(default)s)")
    parser.add_argument(
        "--last",
        type=int,
        nargs="+",
        default=[1, 2, 4, 0],
        help="numbers K of trained blocks, 0 = all (default: 1 2 4 0)",
    )
    parser.add_argument("--encoder", default="blocks", choices=list(LAST_K), help="what trains (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="timed (default: %(default)s)")
    parser.add_argument(
        "--warm",
        type=int,
        default=0,
        help="untimed rounds before them, beside the one that counts (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--components", action="store_true", help="the parts too: average, InfoNCE, ring points")
    parser.add_argument("--write", action="store_true", help="put the tables on top of benchmarks/results.md")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    device = torch_device("auto")
    side = a.side if a.model == "field" else 1024
    batch, rows, limits = generated_batch(Frame(side), a.batch_size, device), [], Limits()

    def make() -> Sam:
        return random_sam(a.model, side, a.width, a.blocks).to(device)

    def cell(name: str, value: tuple[float, float, float], limit: float | None) -> str:
        return limits.cell(name, value[0], limit, spread=value[1:])

    for last_k in a.last:
        name = f"K = {last_k or 'all'}"
        pair = Pair(make(), last_k, batch, encoder=a.encoder)
        equal = pair.agreement(batch, pair.cached)
        equal.check()
        print(
            f"{name}: images trusted {equal.trusted:.0%}; terms "
            + ", ".join(f"{k} {v:.4f}" for k, v in equal.terms.items())
            + f"; greatest difference of a loss {equal.loss:.1e}, of all gradients {equal.gradient:.1e}, of a "
            f"parameter's {equal.worst:.1e}",
            file=sys.stderr,
            flush=True,
        )
        runs: dict[str, Callable[[], object]] = {"published": pair.naive_step}
        if a.precision != "fp32":
            half = Pair(make(), last_k, batch, a.precision, a.encoder)
            runs |= {f"published, {a.precision}": half.naive_step}
            pair = half
        runs |= {
            "shared": partial(pair.our_step, batch),
            "cached": partial(pair.our_step, pair.cached),
            "unasked": partial(pair.our_step, pair.cached, teacher_share=0.0),
        }
        work = {form: multiplications(run) for form, run in runs.items()}
        spent = interleaved(runs, a.rounds, device, warm=a.warm)
        for costs in (work, spent):  # a mean step of a teacher that seldom encodes
            costs["seldom"] = mixed(costs["cached"], costs["unasked"])
        asked = a.model != "field" or (side, a.width, a.blocks, a.batch_size) == (512, 192, 12, 2)
        wanted = LIMITS.get((a.model, a.precision, a.encoder), {}).get(last_k) if asked else None
        cells = [
            cell(f"{name}, {form}", ratio(spent["published"], spent[form]), limit)
            for form, limit in zip(FORMS, wanted or (None, None, None), strict=True)
        ]
        if a.precision != "fp32":
            cells += [cell(name, ratio(spent[f"published, {a.precision}"], spent["cached"]), None)]
        later = ratio(spent["cached"], spent["shared"])[0]  # without what filling and reading the cache take
        floors = " / ".join(f"{work['published'] / work[form]:.2f}" for form in FORMS)
        bound = LATER_LIMIT if (last_k, a.encoder) == (LATER_K, "blocks") else None
        rows.append(
            [
                name,
                *cells,
                floors,
                limits.cell(f"{name}, cached / shared", later, bound, most=True),
                f"{equal.trusted:.0%}",
                f"{equal.loss:.0e}",
                f"{equal.gradient:.0e}",
            ]
        )
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
        del pair, runs
    columns = [
        {"blocks": "trained blocks", "lora": "blocks with LoRA", "adapter": "blocks with adapters"}[a.encoder],
        "prefix shared",
        "prefix and reference cached",
        f"cached, teacher in {TEACHER_SHARE:.0%} of the steps",
        *([f"the same against the published step in {a.precision}"] if a.precision != "fp32" else []),
        "by multiplications alone: shared / cached / seldom",
        "time of a step cached / shared",
        "images trusted",
        "losses differ by",
        "gradients differ by",
    ]
    sizes = f"D = {a.width}, {a.blocks} blocks" if a.model == "field" else a.model
    text = (
        f"Times faster than the published step in fp32: median of {a.rounds} rounds (least to greatest). "
        f"{sizes}, {side} px, batch {a.batch_size}, {a.precision}, random weights, seed {SEED}; "
        f"{provenance(device)}. " + "Not measured on a GPU." * (device.type == "cpu") + "\n\n" + table(columns, rows)
    )
    if a.components:
        parts = components(device, make(), 5)
        text += "\n\n" + table(
            ["part", "times faster than the published form"],
            [[name, cell(name, value, COMPONENT_LIMITS.get(name))] for name, value in parts.items()],
        )
    print(f"\n{text}\n")
    if a.write:
        record("The step beside the published one", f"`python benchmarks/step.py {' '.join(sys.argv[1:])}`\n\n{text}")
    return limits.exit_code()


if __name__ == "__main__":
    sys.exit(main())

"""The training loop, the same for every method. It knows no tracker, no sweep and no configuration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from lesionsam.data.augment import Augmentation
from lesionsam.data.dataset import Batches
from lesionsam.errors import Interrupted
from lesionsam.methods.base import Method
from lesionsam.parallel.collectives import barrier, is_main, max_of_ranks
from lesionsam.training.gradients import Part, StepValues, add_gradients, draw_seed, forward_module
from lesionsam.training.liveness import Liveness
from lesionsam.training.oom import split, with_smaller_parts
from lesionsam.training.optimizer import Group, Steps, build_optimizer, clip_gradients, set_learning_rates
from lesionsam.training.progress import Clock, Log, StepLog, progress_line
from lesionsam.training.state import Progress, load_state, save_best, save_state
from lesionsam.types import Batch
from lesionsam.utils.progress import progress

Evaluate = Callable[[int], Mapping[str, float]]

SAVE_SECONDS = 600.0  # between saves inside a long epoch
OBJECTIVE = "objective"


@dataclass(frozen=True)
class Settings:
    """How long and in what steps a run trains.

    Attributes:
        accumulate: batches of one optimiser step. clip: greatest norm of the gradient.
        precision: fp32, bf16 or fp16 autocast; losses are always fp32.
        schedule: step -> factor of every learning rate. weight_decay, betas: of AdamW.
        patience: epochs without a better objective before the run ends; 0 = never.
    """

    epochs: int
    batch_size: int
    accumulate: int
    clip: float
    precision: str
    seed: int
    patience: int
    schedule: Callable[[int], float]
    augmentation: Augmentation
    weight_decay: float
    betas: tuple[float, float]


def fit(
    method: Method,
    data: Batches,
    groups: Sequence[Group],
    settings: Settings,
    *,
    evaluate: Evaluate,
    objective: str = OBJECTIVE,
    log: Log,
    folder: Path,
    say: Callable[[str], None] = print,
    stop_requested: Callable[[], int] = lambda: 0,
) -> Progress:
    """Train a method; resume from the newest state in `folder`.

    Where several processes train together, each calls this with its share of every batch; the first one writes.

    Args:
        groups: every trained parameter, once.
        evaluate: epoch -> scores of the development split.
        objective: the score that selects the best epoch; greater is better.
        log: receives (values, step).
        folder: scratch folder of this run alone; holds the training states and best.pt.
        stop_requested: returns the number of a signal that asks the run to stop, else 0.
    Raises:
        Interrupted: the run was asked to stop and has saved its state.
        UserError: several steps in a row were not finite, or a term that is switched on has no gradient.
    """
    s, device = settings, groups[0].parameters[0].device
    optimizer = build_optimizer(groups, weight_decay=s.weight_decay, betas=s.betas)
    scaler = torch.amp.GradScaler(device.type, enabled=s.precision == "fp16" and device.type == "cuda")
    at = load_state(folder, method, optimizer, scaler) or Progress()
    if at.step:
        say(f"resuming after epoch {at.epoch}, step {at.step}")
    steps, values, clock = Steps(optimizer, scaler, at, say), StepLog(at, log), Clock(at)
    liveness = Liveness(method, [p for g in groups for p in g.parameters], at, say)
    num_batches, found = data.batches_per_epoch(s.batch_size), None
    forward = forward_module(method, s.precision)

    def save(ending: int) -> None:
        if is_main():
            save_state(folder, at, method, optimizer, scaler)
        barrier()
        clock.saved = time.monotonic()
        if ending:
            raise Interrupted(ending)

    while not is_over(at, s):
        method.model.train()
        clock.start()
        for batches in step_batches(data, at, s, device):
            found = forward_backward(method, forward, batches, at, s, num_batches, scaler, liveness, say)
            rates = set_learning_rates(optimizer, s.schedule(at.step))
            scaler.unscale_(optimizer)
            taken = steps.take(clip_gradients(groups, s.clip), found.losses, found.ids)
            if taken is not False:  # True, or a flag on the device
                method.after_step(taken)
            optimizer.zero_grad()
            at.step, at.batch = at.step + 1, at.batch + len(batches)
            values.add(found.losses, found.means, rates)
            liveness.check(found.terms, found.means)
            is_due = time.monotonic() - clock.saved > SAVE_SECONDS and at.batch < num_batches
            ending, is_due = max_of_ranks(stop_requested(), is_due)
            if ending or is_due:
                steps.settle()
                values.flush()
                clock.stop()
                save(ending)
                clock.start()

        steps.settle()
        means = values.end_epoch()
        clock.stop()
        at.epoch, at.batch = at.epoch + 1, 0
        method.model.eval()
        scores = dict(evaluate(at.epoch))
        log(epoch_values(at, means, scores), at.step)
        if is_better(scores[objective], at):
            at.best_score, at.best_epoch = scores[objective], at.epoch
            if is_main():
                save_best(folder, method)
        if found is not None and is_over(at, s):  # a run may end before the last watched step
            liveness.check(found.terms, found.means, over=True)
        save(*max_of_ranks(stop_requested()))
        steps_left = (s.epochs - at.epoch) * -(-num_batches // s.accumulate)
        say(progress_line(at, means, scores, eta=clock.seconds_left(steps_left)))
    return at


def step_batches(data: Batches, at: Progress, s: Settings, device: torch.device) -> Iterator[list[Batch]]:
    """Yield the batches of each step of the present epoch, from where the run stands; show a progress bar."""
    rest = data.epoch(s.batch_size, seed=s.seed, epoch=at.epoch, augmentation=s.augmentation, start=at.batch)
    total = data.batches_per_epoch(s.batch_size) - at.batch
    batches = progress((batch.to(device) for batch in rest), total=total, title=f"epoch {at.epoch + 1}")
    while group := list(islice(batches, s.accumulate)):  # the last group of an epoch may be shorter
        yield group


def forward_backward(
    method: Method,
    forward: nn.Module,
    batches: Sequence[Batch],
    at: Progress,
    s: Settings,
    num_batches: int,
    scaler: torch.amp.GradScaler,
    liveness: Liveness,
    say: Callable[[str], None],
) -> StepValues:
    """Add the gradients of a step's batches, in smaller parts once the memory has run out."""
    first = at.epoch * num_batches + at.batch  # number of the first batch since the beginning of the run

    def compute(num_parts: int) -> StepValues:
        parts = [
            Part(part, draw_seed(s.seed, first + b, k))
            for b, batch in enumerate(batches)
            for k, part in enumerate(split(batch, num_parts))
        ]
        return add_gradients(
            method, parts, forward=forward, precision=s.precision, scaler=scaler, after_forward=liveness.note
        )

    return with_smaller_parts(compute, batches, method, at, say)


def is_over(at: Progress, s: Settings) -> bool:
    """Return whether all epochs are done or the patience is at an end."""
    return at.epoch >= s.epochs or 0 < s.patience <= at.epoch - at.best_epoch


def is_better(score: float, at: Progress) -> bool:
    """Return whether a score is the first or above the best; NaN never is above."""
    return at.best_epoch == 0 or not (score <= at.best_score or math.isnan(score))


def epoch_values(at: Progress, means: Mapping[str, float], scores: Mapping[str, float]) -> dict[str, float]:
    """Return what is logged of an epoch: means over its steps and scores of the development split."""
    trained = {f"train_{name}": value for name, value in means.items() if name != "total"}
    return trained | {f"dev_{name}": value for name, value in scores.items()} | {"epoch": at.epoch}

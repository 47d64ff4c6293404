"""THE loop: one for every method. It knows no tracker, no sweep, no config: it is handed functions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lesionsam.data.augment import Distortion
from lesionsam.data.dataset import Batches
from lesionsam.errors import Interrupted
from lesionsam.methods.base import Method, Term
from lesionsam.training.liveness import LIVENESS_STEPS, check_alive, note_alive
from lesionsam.training.oom import Moment, in_parts, make_smaller
from lesionsam.training.optimizer import Group, Steps, async_flag, nonfinite_terms
from lesionsam.training.progress import Log, flush, progress_line
from lesionsam.training.state import Progress, load_state, save_best, save_state
from lesionsam.types import Batch
from lesionsam.utils.progress import progress

Evaluate = Callable[[int], Mapping[str, float]]

FLUSH_STEPS = 20  # steps whose values wait on the device before they are logged
SAVE_SECONDS = 600.0  # between saves inside a long epoch
OBJECTIVE = "objective"


def step_generator(seed: int, step: int) -> torch.Generator:
    """Source of every draw of one step: a function of (seed, step), so that nothing need be remembered for a resume."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63))


def fit(
    method: Method,
    data: Batches,
    *,
    groups: Sequence[Group],
    epochs: int,
    batch_size: int,
    accumulate: int,
    weight_decay: float,
    betas: tuple[float, float],
    factor: Callable[[int], float],
    clip: float,
    precision: str,
    seed: int,
    augment: bool,
    widen: float,
    distort: Distortion | None,
    patience: int,
    device: torch.device,
    evaluate: Evaluate,
    log: Log,
    folder: Path,
    parts: int = 1,
    say: Callable[[str], None] = print,
    stop_requested: Callable[[], int] = lambda: 0,
) -> Progress:
    """Train a method on a data set; resume where `folder` says a killed run stood.

    Args:
        groups: every trained parameter, once. factor: step -> factor of every group's learning rate.
        betas: of AdamW. augment, widen, distort: see `LesionDataset.epoch`.
        precision: fp32, bf16 or fp16 autocast; losses are fp32 always.
        patience: epochs without a better objective before stopping; 0 = never.
        evaluate: epoch -> scores of the development split, with the key `objective` (greater is better).
        log: receives (values, step); the loop knows nothing of where they go.
        folder: scratch of this run, of this configuration alone; holds the training states and best.pt.
        parts: that a new run makes each batch in, for the memory's sake; more when that turns out too small.
        stop_requested: the number of a signal that asks for it, else 0; asked after each step and each epoch.
    Raises:
        Interrupted: it was asked to end, and has saved its state.
        UserError: loss or gradient is not finite several times, or a term that is switched on has no gradient.
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": list(g.parameters), "lr": g.learning_rate, "base": g.learning_rate}
            | ({"weight_decay": 0.0} if g.apart else {})
            for g in groups
        ],
        weight_decay=weight_decay,
        betas=betas,
        fused=device.type == "cuda",
    )
    scaler = torch.amp.GradScaler(enabled=precision == "fp16" and device.type == "cuda")
    parameters = [p for g in groups for p in g.parameters]
    clipped = [p for g in groups if not g.apart for p in g.parameters]
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in method.model.modules())
    at = load_state(folder, method, optimizer, scaler) or Progress(parts=parts)
    steps = Steps(optimizer, scaler, at, say)
    if at.step:
        say(f"resuming after epoch {at.epoch}, step {at.step}")
    num_batches = data.batches_per_epoch(batch_size)
    waiting: list[tuple[int, dict[str, torch.Tensor]]] = []
    begun, begun_at, saved = time.monotonic(), at.epoch * num_batches + at.batch, time.monotonic()
    terms: Mapping[str, Term] = {}
    ids: list[str] = []  # of the images of a group of batches

    def is_over() -> bool:
        return at.epoch >= epochs or 0 < patience <= at.epoch - at.best_epoch

    while not is_over():
        method.model.train()
        entered = time.monotonic()
        batches = epoch_from(at, data, batch_size=batch_size, seed=seed, augment=augment, widen=widen, distort=distort)
        for batch in progress(batches, total=num_batches - at.batch, title=f"epoch {at.epoch + 1}"):
            number = at.epoch * num_batches + at.batch  # of this batch since the beginning
            generator = step_generator(seed, number)
            if drops:  # torch's dropout reads the global state alone: made a function of (seed, batch), for resumes
                torch.manual_seed(generator.initial_seed())
            if at.batch % accumulate == 0:
                before, ids, is_finite = Moment.of(at, method, len(waiting)), [], True
            group_size = min(accumulate, num_batches - at.batch // accumulate * accumulate)  # the last may be short
            finite: list[Callable[[], bool]] = []
            outcome = in_parts(
                batch.to(device),
                at.parts,
                partial(
                    add_gradients,
                    method,
                    generator=generator,
                    precision=precision,
                    scaler=scaler,
                    group_size=group_size,
                    watched=parameters if at.step in LIVENESS_STEPS else (),
                    alive=at.alive,
                    finite=finite,
                ),
            )
            if isinstance(outcome, str):  # out of memory: once more from the beginning of the group, in smaller parts
                optimizer.zero_grad()
                del waiting[before.num_waiting :]
                before.restore(at, method)
                make_smaller(at, batch, method, outcome, say)
                continue
            terms, values = outcome
            ids += batch.ids
            losses_finite = all(read() for read in finite)  # waits for forward passes alone, see `async_flag`
            steps.settle()
            if not losses_finite:
                is_finite = False
                steps.skip(f"the loss ({nonfinite_terms(terms, values)})", batch.ids, at.step)
            last = at.batch + 1 == num_batches
            if (at.batch + 1) % accumulate == 0 or last:
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * factor(at.step)
                if is_finite:
                    scaler.unscale_(optimizer)
                    if steps.take(nn.utils.clip_grad_norm_(clipped, clip), ids):
                        method.after_step()
                optimizer.zero_grad()
                at.step += 1
                if at.step == LIVENESS_STEPS.stop:
                    check_alive(terms, method, at, say)
            waiting.append((at.step, values))
            if (len(waiting) >= FLUSH_STEPS and (at.batch + 1) % accumulate == 0) or last:
                flush(waiting, at, log, optimizer.param_groups[0]["lr"])
            at.batch += 1
            due = bool(ending := stop_requested()) or (time.monotonic() - saved > SAVE_SECONDS and not last)
            if last or due:
                steps.settle()
            if due and (last or at.batch % accumulate == 0):
                flush(waiting, at, log, optimizer.param_groups[0]["lr"])
                at.seconds, entered = at.seconds + time.monotonic() - entered, time.monotonic()
                save_state(folder, at, method, optimizer, scaler)
                saved = time.monotonic()
                if ending:
                    raise Interrupted(ending)

        at.seconds += time.monotonic() - entered
        means = {name: value / at.sums["batches"] for name, value in at.sums.items() if name != "batches"}
        at.epoch, at.batch, at.sums = at.epoch + 1, 0, {}
        method.model.eval()
        scores = dict(evaluate(at.epoch))
        log(
            {f"train_{name}": value for name, value in means.items()}
            | {f"dev_{n}": v for n, v in scores.items()}
            | {"epoch": at.epoch},
            at.step,
        )
        if at.best_epoch == 0 or not (scores[OBJECTIVE] <= at.best_score or math.isnan(scores[OBJECTIVE])):
            at.best_score, at.best_epoch = scores[OBJECTIVE], at.epoch
            save_best(folder, method)
        if is_over() and at.step < LIVENESS_STEPS.stop:  # a run too short for the check above
            check_alive(terms, method, at, say)
        save_state(folder, at, method, optimizer, scaler)
        saved = time.monotonic()
        if ending := stop_requested():
            raise Interrupted(ending)
        spent = (time.monotonic() - begun) / max(1, at.epoch * num_batches - begun_at)
        say(progress_line(at, means, scores, eta=spent * (epochs - at.epoch) * num_batches))
    return at


# ---- parts of the loop, in the order of their use ----------------------------------------------------------------


def epoch_from(at: Progress, data: Batches, *, batch_size: int, **options: Any) -> Iterator[Batch]:
    """The batches of epoch `at.epoch` from number `at.batch` on, also when that is set back between two of them."""
    while at.batch < data.batches_per_epoch(batch_size):
        for batch in data.epoch(batch_size, epoch=at.epoch, start=at.batch, **options):
            number = at.batch
            yield batch
            if at.batch != number + 1:
                break


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision for the forward pass; losses cast to fp32 themselves."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def add_gradients(
    method: Method,
    part: Batch,
    share: float,
    *,
    generator: torch.Generator,
    precision: str,
    scaler: torch.amp.GradScaler,
    group_size: int,
    watched: Sequence[nn.Parameter],
    alive: list[str],
    finite: list[Callable[[], bool]],
) -> tuple[Mapping[str, Term], dict[str, torch.Tensor]]:
    """Forward and backward of a batch, or of a `share` of one; gradients are those of a mean over the group's batches.

    Args:
        watched, alive: parameters by which terms are found alive, see `note_alive`; none: they are not looked at.
        finite: is given what tells whether the loss is finite; where it is not, the gradients are good for nothing.
    Returns:
        the terms; `loss`, terms and monitors, detached.
    """
    with autocast(part.images.device, precision):
        terms = method.losses(part, generator)
    total = sum_of(terms)
    if watched:
        note_alive(terms, watched, alive)
    finite.append(async_flag(torch.isfinite(total.detach())))  # asked for before the backward pass is queued
    scaler.scale(total * share / group_size).backward()
    values = {name: term.value.detach() for name, term in terms.items()} | method.monitors()
    return terms, {"loss": total.detach(), **values}


def sum_of(terms: Mapping[str, Term]) -> torch.Tensor:
    """L = sum of weight times value; monitors carry no gradient."""
    return torch.stack([term.weight * term.value.float() for term in terms.values()]).sum()

"""Steps: skipped if not finite, and without the host waiting for the device: it reads one flag a step, a step later.

Left out: prompts drawn from masks (`prompts_from_masks`), which read the length of the longest for each kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.methods import DEFAULT, options, supervised
from helpers.tiny import tiny_data, tiny_sam
from helpers.training import Mean, run, weights
from lesionsam.errors import UserError
from lesionsam.methods.base import Method
from lesionsam.methods.contrastive import Contrastive
from lesionsam.models.trainable import select_trainable, trained_parameters
from lesionsam.training.gradients import Part, add_gradients
from lesionsam.training.liveness import LIVENESS_STEPS
from lesionsam.training.optimizer import FP16_HALVINGS, MAX_NONFINITE, Steps, async_flag
from lesionsam.training.progress import FLUSH_STEPS
from lesionsam.training.state import Progress
from lesionsam.types import Batch, to_device

META = torch.device("meta")  # tensors without values: who asks for one gets an error, where a GPU would be waited for


class Waiting(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: values asked for, and copies to the device that block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.counts[name] += 1
        elif name in ("_to_copy", "copy_") and not kwargs.get("non_blocking") and args[0].device.type == "cpu":
            self.counts["blocking copy"] += torch.device(kwargs.get("device") or "cpu").type != "cpu"
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return tiny_data(4).batch(range(4)).to(META)


def contrastive(**changes: Any) -> Contrastive:
    sam, reference = tiny_sam().to(META), tiny_sam().to(META)
    select_trainable(sam, encoder="blocks", unfreeze_last_k=1, train_decoder=True)
    return Contrastive(sam, reference, options(DEFAULT, **changes))


def by_true_masks() -> Method:
    method = supervised()
    method.model.to(META)
    return method


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: contrastive(), id="default"),
        pytest.param(
            lambda: contrastive(contrast=0.5, distil=0.1, missed_core="negative", random_fallback=True), id="terms"
        ),
        pytest.param(by_true_masks, id="supervised"),
    ],
)
def test_a_step_asks_the_device_for_nothing(make: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())  # which `meta` does not know
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    method: Method = make()
    method.model.train()
    optimizer = torch.optim.AdamW(trained_parameters(method.model), lr=1e-3)
    with Waiting() as waiting:
        found = add_gradients(method, [Part(batch, 0)], precision="fp32", scaler=torch.amp.GradScaler(enabled=False))
        norm = torch.nn.utils.clip_grad_norm_(trained_parameters(method.model), 1.0)
        optimizer.step()
        method.after_step(torch.isfinite(norm))
    assert {"loss", *found.terms} == set(found.losses)
    assert waiting.counts["blocking copy"] == 0
    with pytest.raises((NotImplementedError, RuntimeError)):  # so that an `.item()` in the step would have been seen
        bool(torch.isfinite(norm))


def test_blocking_copies_are_counted() -> None:
    with Waiting() as waiting:
        torch.zeros(3).to(META)
        to_device(torch.zeros(3), META)
    assert waiting.counts["blocking copy"] == 1


def test_the_loop_reads_one_flag_a_step_and_one_transfer_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether loss and gradient are finite; after the first steps, in which terms are watched."""
    counts: Counter[str] = Counter()
    seen: list[Counter[str]] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        asked = getattr(torch.Tensor, name)

        def counted(*arguments: Any, name: str = name, asked: Any = asked) -> Any:
            counts[name] += 1
            return asked(*arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)

    class Plain(Mean):
        def losses(self, batch: Any, generator: torch.Generator) -> Any:
            seen.append(counts.copy())
            terms = super().losses(batch, generator)
            counts["item"] -= 1  # its own draw, on the CPU
            return terms

    first, last = LIVENESS_STEPS.stop + 2, LIVENESS_STEPS.stop + 2 + FLUSH_STEPS
    method: Any = Plain()
    run(
        method,
        tiny_data(4),
        tmp_path,
        batch_size=1,
        epochs=1 + last // 4,
        patience=0,
        evaluate=lambda epoch: {"objective": 0.0},
    )
    between = seen[last] - seen[first]
    own = FLUSH_STEPS * len(weights(method))  # AdamW reads its count of steps, which is kept on the CPU
    epochs = last // 4 - first // 4  # each ends with a flush
    assert between == Counter({"__bool__": FLUSH_STEPS, "tolist": epochs, "item": own})


def test_a_flag_is_told_as_it_is() -> None:
    value = torch.tensor([1.0, float("nan")])
    read: Iterator[bool] = (async_flag(torch.isfinite(v))() for v in value)
    assert list(read) == [True, False]


def test_the_flag_of_a_step_is_read_when_the_next_one_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused optimiser, as on a GPU: the device has the next backward pass to work on while the host reads."""
    order: list[str] = []
    plain, step, backward = torch.optim.AdamW, torch.optim.AdamW.step, torch.Tensor.backward

    def asked(flag: torch.Tensor) -> Any:
        order.append("copy")
        return lambda: bool(order.append("read")) or bool(flag)

    monkeypatch.setattr("lesionsam.training.optimizer.async_flag", asked)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *groups, **options: plain(*groups, **options | {"fused": True}))
    monkeypatch.setattr(plain, "step", lambda self: order.append("step") or step(self))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: order.append("backward") or backward(self))
    method: Any = Mean()
    run(method, tiny_data(4), tmp_path, batch_size=2, epochs=1)
    assert order == ["backward", "step", "copy", "backward", "read", "step", "copy", "read"]


def half_precision(lines: list[str]) -> tuple[torch.nn.Parameter, Steps]:
    """A weight and its steps as with fp16 on a GPU: a fused optimiser and a scaled loss."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    return weight, Steps(optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**16), Progress(), lines.append)


def take(steps: Steps, weight: torch.nn.Parameter, value: float) -> Any:
    """One step whose unscaled gradient is `value`."""
    loss = (weight * value).sum()
    steps.scaler.scale(loss).backward()
    steps.scaler.unscale_(steps.optimizer)
    taken = steps.take(weight.grad.norm(), {"loss": loss.detach()}, ["a/0"])  # type: ignore[union-attr]
    steps.optimizer.zero_grad()
    steps.settle()
    return taken


def test_skipped_steps_of_fp16_are_counted_and_reported() -> None:
    lines: list[str] = []
    weight, steps = half_precision(lines)
    assert bool(take(steps, weight, 1.0))
    moved = weight.detach().clone()
    assert not torch.equal(moved, torch.ones(2))
    for skipped in (1, 2):
        assert not bool(take(steps, weight, 1e36))  # times 2^16 that is above the greatest fp32
        assert steps.at.nonfinite == skipped
        assert steps.scaler.get_scale() == 2.0 ** (16 - skipped)
    assert torch.equal(weight, moved)
    assert [line.startswith("warning: the gradient is not finite at step 0; images a/0") for line in lines] == [
        True
    ] * 2
    assert bool(take(steps, weight, 1.0))
    assert steps.at.nonfinite == 0


def test_fp16_may_halve_its_scale_to_one_before_the_run_stops() -> None:
    weight, steps = half_precision([])
    for _ in range(MAX_NONFINITE + FP16_HALVINGS - 1):
        take(steps, weight, float("inf"))
    with pytest.raises(UserError, match="19 times without a step between"):
        take(steps, weight, float("inf"))

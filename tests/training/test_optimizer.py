"""A GPU is not kept waiting by the host: nothing in a step asks for a value, and the loop asks twice a batch:
whether loss and gradient are finite, each when the device has long known it.

Left out: prompts drawn from masks (`prompts_from_masks`), which ask once for each kind how long the longest is.
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
from lesionsam.methods.base import Method
from lesionsam.methods.contrastive import Contrastive
from lesionsam.models.trainable import select_trainable, trained_parameters
from lesionsam.training.liveness import LIVENESS_STEPS
from lesionsam.training.loop import FLUSH_STEPS, add_gradients, step_generator
from lesionsam.training.optimizer import async_flag
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
            lambda: contrastive(alpha=0.5, gamma=0.1, missed_core="negative", random_fallback=True), id="terms"
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
    finite: list[Any] = []
    with Waiting() as waiting:
        terms, values = add_gradients(
            method,
            batch,
            1.0,
            generator=step_generator(0, 0),
            precision="fp32",
            scaler=torch.amp.GradScaler(enabled=False),
            group_size=1,
            watched=(),
            alive=[],
            finite=finite,
        )
        torch.nn.utils.clip_grad_norm_(trained_parameters(method.model), 1.0)
        optimizer.step()
        method.after_step()
    assert set(terms) <= set(values)
    assert len(finite) == 1
    assert waiting.counts["blocking copy"] == 0
    with pytest.raises((NotImplementedError, RuntimeError)):  # so that an `.item()` in the step would have been seen
        finite[0]()


def test_blocking_copies_are_counted() -> None:
    with Waiting() as waiting:
        torch.zeros(3).to(META)
        to_device(torch.zeros(3), META)
    assert waiting.counts["blocking copy"] == 1


def test_the_loop_asks_twice_a_batch_and_once_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the loss is finite, and whether the gradient is; beyond the first steps, in which terms are watched."""
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
    assert between == Counter({"__bool__": 2 * FLUSH_STEPS, "tolist": epochs, "item": own})


def test_a_flag_is_told_as_it_is() -> None:
    value = torch.tensor([1.0, float("nan")])
    read: Iterator[bool] = (async_flag(torch.isfinite(v))() for v in value)
    assert list(read) == [True, False]


def test_the_flag_is_asked_for_before_the_backward_pass_and_read_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a GPU has the backward pass to work on while the host waits for the forward pass."""
    order: list[str] = []
    backward = torch.Tensor.backward

    def asked(flag: torch.Tensor) -> Any:
        order.append("asked")
        return lambda: bool(order.append("read")) or bool(flag)

    monkeypatch.setattr("lesionsam.training.loop.async_flag", asked)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: order.append("backward") or backward(self))
    method: Any = Mean()
    run(method, tiny_data(4), tmp_path, batch_size=2, epochs=1)
    assert order == ["asked", "backward", "read"] * 2


def test_a_gpu_that_is_working_on_the_backward_pass_is_not_asked_for_its_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused optimiser, as GPUs have it, is asked a batch later, when that batch's own loss is known."""
    order: list[str] = []
    plain, step = torch.optim.AdamW, torch.optim.AdamW.step

    def asked(flag: torch.Tensor) -> Any:
        order.append("gradient asked")
        return lambda: bool(order.append("gradient read")) or bool(flag)

    monkeypatch.setattr("lesionsam.training.optimizer.async_flag", asked)
    monkeypatch.setattr(
        "lesionsam.training.loop.async_flag", lambda flag: lambda: bool(order.append("loss read")) or True
    )
    monkeypatch.setattr(torch.optim, "AdamW", lambda *groups, **options: plain(*groups, **options | {"fused": True}))
    monkeypatch.setattr(plain, "step", lambda self: order.append("step") or step(self))
    method: Any = Mean()
    run(method, tiny_data(4), tmp_path, batch_size=2, epochs=1)
    taken = ["step", "gradient asked"]
    assert order == ["loss read", *taken, "loss read", "gradient read", *taken, "gradient read"]

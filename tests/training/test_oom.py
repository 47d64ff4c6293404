"""Memory: what happens when it does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny import tiny_data
from helpers.training import Mean, Stop, contrastive, differing, run, stop_at, weights
from lesionsam.data.dataset import LesionDataset
from lesionsam.errors import UserError
from lesionsam.methods.base import Method
from lesionsam.training.state import load_best, trained_state
from lesionsam.types import Batch


@pytest.fixture(scope="module")
def data() -> LesionDataset:
    return tiny_data(8)


def with_memory_for(method: Any, images: Callable[[int], int], *, in_backward: bool = False) -> Any:
    """A method on a device whose memory holds so many images at call 1, 2, ... of `losses`."""
    losses, calls = method.losses, 0
    method.sizes = []

    def full(gradient: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    def limited(batch: Batch, generator: torch.Generator) -> Any:
        nonlocal calls
        calls += 1
        fits = len(batch.ids) <= images(calls)
        if not fits and not in_backward:
            full(torch.zeros(1))
        found = losses(batch, generator)
        if not fits:  # once part of the gradients has been added already
            parameter = next(p for p in method.model.parameters() if p.requires_grad)
            handle = parameter.register_hook(full)
            method.handles = [*getattr(method, "handles", []), handle]
        else:
            for handle in getattr(method, "handles", []):
                handle.remove()
            method.sizes.append(len(batch.ids))
        return found

    method.losses = limited
    return method


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_out_of_memory_halves_the_batch_and_changes_no_gradient(
    tmp_path: Path, in_backward: bool, accumulate: int
) -> None:
    """The loss is a mean over images: what two halves add up to is what the whole would have been."""
    data, lines = tiny_data(16), []
    plain = Mean()
    run(plain, data, tmp_path / "plain", accumulate=accumulate)
    tight = with_memory_for(Mean(), lambda call: 4 if call < 6 else 2, in_backward=in_backward)
    rows: list[Any] = []
    progress = run(
        tight,
        data,
        tmp_path / "tight",
        accumulate=accumulate,
        say=lines.append,
        log=lambda values, step: rows.append((step, dict(values))),
    )
    for name, value in weights(plain).items():
        assert torch.allclose(weights(tight)[name], value, atol=1e-6), name
    assert progress.parts == 2
    assert [line for line in lines if "memory" in line] == [
        "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); from here on the 4 images of a batch are "
        "computed in 2 parts, as with train.batch_size 2 and train.accumulate 2 times as large"
    ]
    before = 5 - (accumulate == 2)  # whole batches that counted; of the group that was begun none does
    assert tight.sizes[:5] == [4] * 5
    assert tight.sizes[5:] == [2] * 2 * (12 - before)
    steps = [step for step, values in rows if "epoch" not in values]
    assert steps == list(range(1, 12 // accumulate + 1)), "each step is logged once"


def test_what_a_disturbed_group_did_to_the_buffers_is_undone(data: LesionDataset, tmp_path: Path) -> None:
    """Batch norm counts its forward passes: one a batch before, two after, none of those that were given up."""
    method = with_memory_for(contrastive(), lambda call: 4 if call < 3 else 2)
    run(method, data, tmp_path, accumulate=2, epochs=2)  # two batches an epoch: one group; the second epoch's is redone
    counts = [int(b) for name, b in method.model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [2 + 4] * len(counts)
    assert counts


def test_a_run_that_became_smaller_resumes_as_it_was(data: LesionDataset, tmp_path: Path) -> None:
    def method() -> Method:
        return with_memory_for(contrastive(), lambda call: 4 if call < 3 else 2)

    def smaller() -> Method:
        return with_memory_for(contrastive(), lambda call: 2)

    whole = method()
    run(whole, data, tmp_path / "whole")
    with pytest.raises(Stop):
        run(method(), data, tmp_path / "killed", log=stop_at(lambda values, step: values.get("epoch") == 3))
    lines: list[str] = []
    resumed = smaller()
    progress = run(resumed, data, tmp_path / "killed", say=lines.append)
    assert differing(weights(resumed), weights(whole)) == []
    assert progress.parts == 2
    assert not any("memory" in line for line in lines), "it is known from the state that two parts are needed"
    load_best(tmp_path / "whole", whole.model)
    load_best(tmp_path / "killed", resumed.model)
    assert differing(trained_state(resumed.model), trained_state(whole.model)) == []


def test_memory_that_does_not_hold_one_image_is_named(data: LesionDataset, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(UserError, match=r"does not hold a step of 1 image.*lower model.image_size"):
        run(with_memory_for(contrastive(), lambda call: 0), data, tmp_path, say=lines.append)
    assert ["in 2 parts" in lines[0], "in 4 parts" in lines[1]] == [True, True]


def test_a_placebo_keeps_two_images_together(data: LesionDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not hold a step of 2 image"):
        run(with_memory_for(contrastive(placebo="other"), lambda call: 1), data, tmp_path)


def test_rows_of_a_batch() -> None:
    batch = tiny_data(5).batch(range(5))
    some = batch[1:3]
    assert some.ids == ("image1/0", "image2/0")
    assert torch.equal(some.images, batch.images[1:3])
    assert some.prior is not None
    assert some.prior.shape == (2, 32, 32)
    assert some.reference is None

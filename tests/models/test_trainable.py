"""Which parameters train, the split encoder and the averaged teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers.tiny import SIDE, tiny_data, tiny_sam
from lesionsam.errors import UserError
from lesionsam.models.prefix import (
    encode_batch,
    encode_frozen,
    encode_prefix,
    encode_suffix,
    frozen_part,
    num_frozen_blocks,
)
from lesionsam.models.sam import Sam, encode
from lesionsam.models.teacher import Teacher, copy_trained
from lesionsam.models.trainable import select_trainable, trained_parameters

CASES = [("blocks", 0, False), ("blocks", 0, True), ("blocks", 1, False), ("blocks", 2, True), ("none", 0, True)]


def chosen(sam: Sam, encoder: str, last_k: int, decoder: bool) -> Sam:
    select_trainable(sam, encoder=encoder, unfreeze_last_k=last_k, train_decoder=decoder)
    return sam


def expected_to_train(name: str, encoder: str, last_k: int, decoder: bool) -> bool:
    if name.startswith(("mask_decoder.", "prompt_encoder.")):
        return decoder
    if encoder == "none":
        return False
    return last_k == 0 or ".neck." in name or any(f".blocks.{k}." in name for k in range(2 - last_k, 2))


@pytest.mark.parametrize(("encoder", "last_k", "decoder"), CASES)
def test_what_is_frozen_stays_and_what_trains_moves(encoder: str, last_k: int, decoder: bool) -> None:
    sam = chosen(tiny_sam(), encoder, last_k, decoder)
    before = {name: p.detach().clone() for name, p in sam.named_parameters()}
    optimizer = torch.optim.SGD(sam.parameters(), lr=0.1)
    torch.stack([p.sum() for p in sam.parameters()]).sum().backward()
    optimizer.step()
    for name, p in sam.named_parameters():
        wanted = expected_to_train(name, encoder, last_k, decoder)
        assert p.requires_grad is wanted, name
        assert torch.equal(p, before[name]) is not wanted, name
    assert len(trained_parameters(sam)) == sum(expected_to_train(n, encoder, last_k, decoder) for n in before)


def test_more_blocks_than_there_are_and_nothing_to_train_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.unfreeze_last_k: expected 0 to 2.*got 3"):
        chosen(tiny_sam(), "blocks", 3, False)
    with pytest.raises(UserError, match="leaves nothing to train"):
        chosen(tiny_sam(), "none", 0, False)


@pytest.mark.parametrize(("case", "frozen"), list(zip(CASES, [-1, -1, 1, 0, 3], strict=True)))
def test_leading_frozen_blocks_are_counted(case: tuple[str, int, bool], frozen: int) -> None:
    assert num_frozen_blocks(chosen(tiny_sam(), *case)) == frozen


@pytest.mark.parametrize("split", [0, 1, 2, 3])
@torch.no_grad()
def test_prefix_and_suffix_are_the_whole_encoder(split: int) -> None:
    sam, images = tiny_sam(), torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    prefix = encode_prefix(sam, images, split)
    assert prefix.shape == ((2, 32, 8, 8) if split == 3 else (2, 8, 8, 32)), "the neck is the last stage"
    parts = encode_suffix(sam, prefix, split)
    assert torch.equal(parts, encode(sam, images))
    assert not torch.equal(parts, encode_suffix(sam, encode_prefix(sam, images, 0), 1)), "each block counts"


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_frozen_prefix_depends_on_its_image_alone(precision: torch.dtype | None) -> None:
    """To the last bit: whatever else is in the batch, and wherever the image stands in it."""
    sam, reference = tiny_sam(), tiny_sam()
    images = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is not None):
        tokens, features = encode_frozen(sam, images, 1, reference)
        alone = encode_frozen(sam, images[3:4], 1, reference)
        turned = encode_frozen(sam, images.flip(0)[1:4], 1, reference)
        from_images = encode_frozen(reference, images, 3)[0]
        with torch.no_grad():  # as the frozen part is: with gradients the attention may be computed in another way
            exact = encode_prefix(sam, images, 1), encode(reference, images)
    assert features is not None
    for kept, one, three, wanted in zip((tokens, features), alone, turned, exact, strict=True):
        assert one is not None
        assert three is not None
        assert kept.dtype == (precision or torch.float32)
        assert kept.is_contiguous()
        assert not kept.requires_grad
        assert torch.equal(kept[3:4], one)
        assert torch.equal(kept[1:4].flip(0), three)
        assert torch.allclose(kept.float(), wanted.float(), rtol=2**-8 if precision else 1e-5, atol=1e-6)
    assert torch.equal(features, from_images), "the pretrained features do not depend on where the student's split is"


def test_a_suffix_goes_on_in_the_precision_of_its_weights() -> None:
    sam, images = tiny_sam(), torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    tokens = encode_prefix(sam, images, 1).detach()
    assert encode_suffix(sam, tokens.bfloat16(), 1).dtype == torch.float32
    sam.double()
    assert encode_suffix(sam, tokens.double(), 1).dtype == torch.float64


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_encoded_from_what_it_carries(case: tuple[str, int, bool]) -> None:
    sam, batch = chosen(tiny_sam(), *case), tiny_data(3).batch([0, 1, 2], [0, 5, 3])
    split = num_frozen_blocks(sam)
    features = encode_batch(sam, batch)
    assert torch.allclose(features, encode(sam, sam.normalize(batch.images, batch.sizes)), atol=1e-5)
    assert features.requires_grad is (case[0] == "blocks")
    if split >= 0:
        prefix, _ = frozen_part(sam, batch, split)
        black = replace(batch, images=torch.zeros_like(batch.images), prefix=prefix)
        assert torch.equal(encode_batch(sam, black), features), "the pixels are not looked at again"


def test_a_copy_shares_what_is_frozen_and_owns_what_trains() -> None:
    sam = chosen(tiny_sam(), "blocks", 1, False)
    own = dict(copy_trained(sam).named_parameters())
    for name, p in sam.named_parameters():
        assert (own[name].data_ptr() == p.data_ptr()) is not p.requires_grad, name
        assert torch.equal(own[name], p)


class Normed(nn.Module):
    """A trained layer, a frozen one, and buffers that move."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.frozen.requires_grad_(False)


def test_the_teacher_equals_the_closed_form_buffers_too() -> None:
    torch.manual_seed(0)
    student, decay = Normed().double(), 0.9
    teacher = Teacher(student, decay)
    assert not teacher.module.training
    assert not any(p.requires_grad for p in teacher.module.parameters())
    weights, means, variances = (
        [v.detach().clone()]
        for v in (
            student.trained.weight,
            student.norm.get_buffer("running_mean"),
            student.norm.get_buffer("running_var"),
        )
    )
    for step in range(5):
        with torch.no_grad():
            student.trained.weight.add_(torch.randn(3, 3, dtype=torch.float64))
            student.norm(torch.randn(8, 3, dtype=torch.float64) * 3 + step)
        teacher.update()
        for history, value in (
            (weights, student.trained.weight),
            (means, student.norm.get_buffer("running_mean")),
            (variances, student.norm.get_buffer("running_var")),
        ):
            history.append(value.detach().clone())
    theirs = teacher.module
    assert isinstance(theirs, Normed)
    for history, found in (
        (weights, theirs.trained.weight),
        (means, theirs.norm.get_buffer("running_mean")),
        (variances, theirs.norm.get_buffer("running_var")),
    ):
        n = len(history) - 1
        closed = decay**n * history[0]
        for k in range(1, n + 1):
            closed = closed + (1 - decay) * decay ** (n - k) * history[k]
        assert torch.allclose(found, closed, atol=1e-12)
        assert not torch.allclose(found, history[-1], atol=1e-3)
    assert int(theirs.norm.get_buffer("num_batches_tracked")) == 5
    assert theirs.frozen.weight.data_ptr() == student.frozen.weight.data_ptr()


def test_the_teacher_starts_equal_and_the_students_step_does_not_move_it() -> None:
    sam = chosen(tiny_sam(), "blocks", 1, True)
    teacher = Teacher(sam, 0.99)
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    assert all(torch.equal(value, sam.state_dict()[name]) for name, value in before.items())
    with torch.no_grad():
        for p in trained_parameters(sam):
            p.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    teacher.update()
    moved = {name for name, value in teacher.module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, p in sam.named_parameters() if p.requires_grad}


def test_decay_zero_is_the_student_itself() -> None:
    sam = chosen(tiny_sam(), "blocks", 0, False)
    teacher = Teacher(sam, 0.0)
    with torch.no_grad():
        for p in trained_parameters(sam):
            p.mul_(1.5)
    teacher.update()
    assert all(torch.allclose(v, sam.state_dict()[n]) for n, v in teacher.module.state_dict().items())

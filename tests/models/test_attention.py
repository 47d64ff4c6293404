"""Every way of running SAM's transformer blocks against segment_anything's own, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from segment_anything.modeling.image_encoder import Block, get_rel_pos

from helpers.tiny import SIDE, tiny_sam
from lesionsam.models import attention
from lesionsam.models.attention import BACKENDS, choose, positions, run_block
from lesionsam.models.finetuned import Strategy, attach
from lesionsam.models.sam import encode
from lesionsam.models.trainable import select_trainable

# Height and width of the map, side of the windows (0: global), side of the map that the positions were made for.
SHAPES = [(6, 6, 0, 6), (5, 8, 0, 6), (7, 4, 0, 5), (6, 6, 3, 3), (7, 5, 4, 4), (3, 9, 4, 4), (8, 8, 4, 3)]


@pytest.fixture(params=[*BACKENDS, "chosen"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the attention with each backend in turn, and with the one that `choose` returns."""
    if request.param != "chosen":
        monkeypatch.setattr(attention, "choose", lambda *_, **__: request.param)


def block(window: int, trained_for: int) -> Any:
    """A block with random weights, biases and relative positions."""
    torch.manual_seed(0)
    found = Block(16, 2, use_rel_pos=True, window_size=window, input_size=(trained_for, trained_for))
    for p in found.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return found


def tokens(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, height, width, 16, generator=torch.Generator().manual_seed(1))


def outcome(run: Any, x: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """What comes out, and the gradient of a fixed combination of it by the input and every parameter."""
    x = x.clone().requires_grad_()
    out = run(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *parameters])]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_equals_segment_anythings(shape: tuple[int, int, int, int]) -> None:
    """Windows with padding among them: the padding takes part as keys, as there."""
    height, width, window, trained_for = shape
    oracle, x = block(window, trained_for), tokens(height, width)
    parameters = list(oracle.parameters())
    wanted = outcome(oracle, x, parameters)
    assert_same(outcome(lambda t: run_block(oracle, t), x, parameters), wanted)
    with torch.no_grad():
        assert_same([run_block(oracle, x)], wanted[:1])


@pytest.mark.usefixtures("backend")
def test_bfloat16_is_as_near_to_exact_as_segment_anythings() -> None:
    oracle, x = block(4, 4), tokens(7, 5)
    parameters = list(oracle.parameters())

    def halved(run: Any) -> Any:
        def inner(t: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return run(t).float()

        return inner

    exact = outcome(oracle, x, parameters)
    theirs = outcome(halved(oracle), x, parameters)
    ours = outcome(halved(lambda t: run_block(oracle, t)), x, parameters)
    for one, other, wanted in zip(ours, theirs, exact, strict=True):
        assert (one - wanted).norm() <= 1.5 * (other - wanted).norm() + 2e-3 * wanted.norm()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("encoder", ["adapter", "lora"])
def test_what_is_put_into_a_block_takes_part(encoder: str) -> None:
    sam = tiny_sam()
    sam.image_encoder.blocks[1].window_size = 3  # beside the global block one of windows with padding
    attach(sam, Strategy(encoder, adapter_dim=4, lora_rank=2, lora_alpha=4.0))
    select_trainable(sam, encoder=encoder, train_decoder=False)
    with torch.no_grad():
        for p in sam.parameters():
            if p.requires_grad or p.ndim == 1:
                p.normal_(std=0.2)
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    parameters = [p for p in sam.parameters() if p.requires_grad]
    wanted = outcome(sam.image_encoder, images, parameters)
    assert_same(outcome(lambda t: encode(sam, t), images, parameters), wanted, 2e-5)


@pytest.mark.parametrize(("size", "trained_for"), [(4, 4), (6, 4), (3, 5)])
def test_positions_are_those_of_segment_anything(size: int, trained_for: int) -> None:
    table = torch.randn(2 * trained_for - 1, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(positions(table, size).transpose(1, 2), get_rel_pos(size, size, table))


def test_a_choice_is_made_for_every_device_precision_and_purpose() -> None:
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for needs_grad in (False, True):
                for count in (196, 256, 1024, 4096):
                    found = choose(device, dtype, needs_grad=needs_grad, num_tokens=count)
                    assert found in attention.BACKENDS

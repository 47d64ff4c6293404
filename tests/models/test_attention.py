"""Every way of running SAM's transformer blocks against segment_anything's own, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from segment_anything.modeling.image_encoder import Block, get_rel_pos

from helpers.tiny import SIDE, tiny_sam
from lesionsam.models import attention
from lesionsam.models.attention import Execution, choose, positions, run_block, run_blocks, set_execution
from lesionsam.models.finetuned import Strategy, attach
from lesionsam.models.prefix import encode_prefix, encode_suffix
from lesionsam.models.sam import embed, encode
from lesionsam.models.teacher import Teacher
from lesionsam.models.trainable import select_trainable

FAST = [name for name in (*attention.BACKENDS, "auto") if name != "original"]
# Height and width of the map, side of the windows (0: global), side of the map that the positions were made for.
SHAPES = [(6, 6, 0, 6), (5, 8, 0, 6), (7, 4, 0, 5), (6, 6, 3, 3), (7, 5, 4, 4), (3, 9, 4, 4), (8, 8, 4, 3)]


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


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_equals_segment_anythings(shape: tuple[int, int, int, int], backend: str) -> None:
    """Windows with padding among them: the padding takes part as keys, as there."""
    height, width, window, trained_for = shape
    oracle, x = block(window, trained_for), tokens(height, width)
    parameters = list(oracle.parameters())
    wanted = outcome(oracle, x, parameters)
    assert_same(outcome(lambda t: run_block(oracle, t, backend), x, parameters), wanted)
    with torch.no_grad():
        assert_same([run_block(oracle, x, backend)], wanted[:1])


@pytest.mark.parametrize("budget", [1, 100, 500, 10_000])
def test_the_size_of_a_chunk_changes_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, x = block(0, 6), tokens(5, 8)
    wanted = outcome(oracle, x, list(oracle.parameters()))
    monkeypatch.setitem(attention.CHUNK, "cpu", budget)
    pieces = attention.Chunked.pieces(torch.zeros(4, 40, 1))
    assert sum(len(range(*b.indices(4))) * len(range(*s.indices(40))) for b, s in pieces) == 4 * 40
    assert len(pieces) == {1: 160, 100: 80, 500: 16, 10_000: 1}[budget]
    assert_same(outcome(lambda t: run_block(oracle, t, "chunked"), x, list(oracle.parameters())), wanted)


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_is_as_near_to_exact_as_segment_anythings(backend: str) -> None:
    oracle, x = block(4, 4), tokens(7, 5)
    parameters = list(oracle.parameters())

    def halved(run: Any) -> Any:
        def inner(t: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return run(t).float()

        return inner

    exact = outcome(oracle, x, parameters)
    theirs = outcome(halved(oracle), x, parameters)
    ours = outcome(halved(lambda t: run_block(oracle, t, backend)), x, parameters)
    for one, other, wanted in zip(ours, theirs, exact, strict=True):
        assert (one - wanted).norm() <= 1.5 * (other - wanted).norm() + 2e-3 * wanted.norm()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("encoder", ["adapter", "lora"])
def test_what_is_put_into_a_block_takes_part(encoder: str, backend: str) -> None:
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
    set_execution(sam.image_encoder, Execution(backend))
    assert_same(outcome(lambda t: encode(sam, t), images, parameters), wanted, 2e-5)


def test_the_original_backend_is_segment_anythings_encoder_to_the_bit() -> None:
    sam, images = tiny_sam(), torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    set_execution(sam.image_encoder, Execution("original"))
    assert torch.equal(encode(sam, images), sam.image_encoder(images))
    assert torch.equal(encode_suffix(sam, encode_prefix(sam, images, 1), 1), sam.image_encoder(images))


@pytest.mark.parametrize(("size", "trained_for"), [(4, 4), (6, 4), (3, 5)])
def test_positions_are_those_of_segment_anything(size: int, trained_for: int) -> None:
    table = torch.randn(2 * trained_for - 1, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(positions(table, size).transpose(1, 2), get_rel_pos(size, size, table))


def test_state_and_keys_stay_segment_anythings_and_a_copy_runs_alike() -> None:
    sam = tiny_sam()
    keys = list(sam.state_dict())
    set_execution(sam.image_encoder, Execution("chunked", checkpoint=True))
    assert list(sam.state_dict()) == keys
    assert Teacher(sam, 0.9).module.get_submodule("image_encoder").execution == Execution("chunked", checkpoint=True)


@pytest.mark.parametrize("backend", ["original", "auto"])
def test_blocks_run_again_in_the_backward_pass_give_the_same_gradients_to_the_bit(backend: str) -> None:
    sam, x = tiny_sam(), torch.randn(2, 8, 8, 32, generator=torch.Generator().manual_seed(0))
    found, encoder = [], sam.image_encoder
    for again in (False, True):
        set_execution(encoder, Execution(backend, checkpoint=again))
        calls = []
        hook = encoder.blocks[0].norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(outcome(lambda t: run_blocks(encoder, t, 0), x, list(encoder.blocks.parameters())))
        hook.remove()
        assert len(calls) == (2 if again else 1)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_compiled_blocks_give_what_plain_ones_give() -> None:
    """Traced and differentiated by torch.compile, without its code generator, which would take half a minute."""
    sam, images = tiny_sam(), torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    encoder = sam.image_encoder
    x = embed(sam, images).detach()
    wanted = outcome(lambda t: run_blocks(encoder, t, 0), x, list(encoder.blocks.parameters()))
    set_execution(encoder, Execution(compiler="aot_eager"))
    assert_same(outcome(lambda t: run_blocks(encoder, t, 0), x, list(encoder.blocks.parameters())), wanted)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of original, sdpa, plain, chunked, folded or auto, got 'flash'"):
        run_block(block(0, 6), tokens(6, 6), "flash")


def test_a_choice_is_made_for_every_device_precision_and_purpose() -> None:
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for needs_grad in (False, True):
                for count in (196, 256, 1024, 4096):
                    found = choose(device, dtype, needs_grad=needs_grad, num_tokens=count)
                    assert found in attention.BACKENDS

"""Time every attention backend: `python benchmarks/attention.py`; minutes on one core.

Milliseconds of `relative_attention`, forward alone and forward with backward, for windows of 14 x 14 and whole maps, in
float32 and bfloat16; the fastest is set off, and what `choose` takes is starred. Before a size is timed, every backend
must agree with segment_anything's own attention. CPU time of one thread, or CUDA events; the backends take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos

from lesionsam.models.attention import BACKENDS, choose, positions, relative_attention
from lesionsam.utils.devices import torch_device
from record import Limits, interleaved, provenance, record, table

DEPTH = 64  # channels of a head, as in every size of SAM
SLACK = 1.15  # a choice within this of the fastest is as good as it: rounds differ by as much
# Side of the square of tokens, how many of them at once (windows x images x heads).
SIZES = [(14, 27), (16, 6), (32, 6), (64, 2)]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def original(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], side: int
) -> torch.Tensor:
    """Apply segment_anything's Attention.forward between its projections, (B, N, hd) -> (B, N, hd)."""
    logits = (q * DEPTH**-0.5) @ k.transpose(-2, -1)
    logits = add_decomposed_rel_pos(logits, q, *tables, (side, side), (side, side))
    return logits.softmax(dim=-1) @ v


def ways(
    side: int, count: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Callable[[], torch.Tensor]], list[torch.Tensor]]:
    """Return a call per backend, and the tensors that need gradients."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(count, side * side, DEPTH, generator=draw).to(device, dtype).requires_grad_() for _ in range(3)
    )
    tables = tuple(
        (0.1 * torch.randn(2 * side - 1, DEPTH, generator=draw)).to(device, dtype).requires_grad_() for _ in range(2)
    )
    found: dict[str, Callable[[], torch.Tensor]] = {
        "original": partial(original, q, k, v, (tables[0], tables[1]), side)
    }
    for name in BACKENDS:
        found[name] = lambda name=name: relative_attention(
            q[None], k[None], v[None], positions(tables[0], side), positions(tables[1], side), DEPTH**-0.5, name
        )[0]
    return found, [q, k, v, *tables]


def both_ways(run: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output, and the gradients of its sum of squares."""
    out = run()
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


def forward(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the output alone."""
    with torch.no_grad():
        return run()


def check(
    side: int, dtype: torch.dtype, found: dict[str, Callable[[], torch.Tensor]], inputs: list[torch.Tensor]
) -> None:
    """Raise where a backend's output or gradients are not those of segment_anything's form."""
    wanted = both_ways(found["original"], inputs)
    for name, run in found.items():
        for one, other in zip(both_ways(run, inputs), wanted, strict=True):
            off = float((one.float() - other.float()).norm() / other.float().norm())
            if off > TOLERANCE[dtype]:
                raise ValueError(f"{name}, {side} x {side} tokens, {dtype}: off by {off:.1e}; nothing is timed")


def main() -> int:
    """Check, time, print the table; end with an error where another backend than the chosen one is clearly faster."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="timed after one that is not (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table on top of benchmarks/results.md")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    device, rows, limits = torch_device("auto"), [], Limits()
    for dtype in (torch.float32, torch.bfloat16):
        for side, count in SIZES:
            found, inputs = ways(side, count, dtype, device)
            check(side, dtype, found, inputs)
            for purpose in ("forward", "forward and backward"):
                runs = {
                    name: partial(forward, run) if purpose == "forward" else partial(both_ways, run, inputs)
                    for name, run in found.items()
                }
                spent = {
                    name: 1000 * statistics.median(times) for name, times in interleaved(runs, a.rounds, device).items()
                }
                chosen = choose(device.type, dtype, needs_grad=purpose != "forward", num_tokens=side * side)
                fastest = min(spent, key=lambda name: spent[name])
                what = f"{side} x {side} x {count}, {str(dtype).removeprefix('torch.')}, {purpose}"
                if spent[chosen] > SLACK * spent[fastest]:
                    share = spent[fastest] / spent[chosen]
                    limits.missed.append(f"{what}: {chosen} is chosen, {fastest} takes {share:.2f} of its time")
                rows.append(
                    [
                        what,
                        *(
                            f"{'**' * (name == fastest)}{value:.1f}{'**' * (name == fastest)}{' *' * (name == chosen)}"
                            for name, value in spent.items()
                        ),
                    ]
                )
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    text = (
        f"Milliseconds, median of {a.rounds} rounds; bold: the fastest; *: what `choose` takes. {DEPTH} channels a "
        f"head; {provenance(device)}. "
        + "Not measured on a GPU." * (device.type == "cpu")
        + "\n\n"
        + table(["tokens x heads", "original", *BACKENDS], rows)
    )
    print(f"\n{text}\n")
    if a.write:
        record("Attention by backend", f"`python benchmarks/attention.py`\n\n{text}")
    return limits.exit_code()


if __name__ == "__main__":
    sys.exit(main())

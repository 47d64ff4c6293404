"""SAM's transformer blocks, run in several exact ways over segment_anything's own, unmodified weights.

The attention has decomposed relative positions (MViTv2, arXiv:2112.01526; Kirillov et al. 2023, arXiv:2304.02643): for
query i in row y, column x and key j in row y', column x'

    logit(i, j) = scale q_i . k_j + q_i . R_h[y - y'] + q_i . R_w[x - x']

Backends, all exact up to rounding:

- `original`: segment_anything's own modules, which write out the logits of all pairs several times over; the oracle.
- `sdpa`: torch's fused attention, the two position terms added up to a bias of all pairs.
- the position terms as further channels, [scale q, q R_h, q R_w] . [k, 1_y', 1_x'] with one-hot rows and columns:
  - `plain`: product, softmax, product; the logits of all pairs are written once.
  - `chunked`: the same for a few queries at a time, in forward and backward; memory linear in the number of tokens.
  - `folded`: torch's fused attention without a bias, which GPUs have the best kernels for (FlashAttention,
    arXiv:2205.14135); nothing of all pairs is written.

In windows only real tokens are projected. segment_anything pads the map with zeros, and these take part as keys; what
a zero projects to is the same everywhere, so it is computed once and put where the padding is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

BACKENDS = ("original", "sdpa", "plain", "chunked", "folded")
CHUNK = {"cpu": 2**18, "cuda": 2**27}  # logits held at a time by `chunked`: what fits a core's cache, half a gigabyte


@dataclass(frozen=True)
class Execution:
    """How an encoder's blocks are run; never what comes out beyond rounding.

    Attributes:
        attention: one of `BACKENDS`, or `auto`: as `choose` has it.
        checkpoint: blocks that train keep their input alone and are run again in the backward pass.
        compiler: backend of torch.compile for the blocks; empty = none.
    """

    attention: str = "auto"
    checkpoint: bool = False
    compiler: str = ""


def set_execution(encoder: nn.Module, execution: Execution) -> None:
    """Say how an image encoder is run from now on; copies of the encoder keep it."""
    object.__setattr__(encoder, "execution", execution)


def run_blocks(encoder: nn.Module, tokens: torch.Tensor, start: int, stop: int | None = None) -> torch.Tensor:
    """(B, H, W, D) tokens through blocks `start` to `stop` (exclusive; None = all) of SAM's image encoder."""
    execution: Execution = getattr(encoder, "execution", Execution())
    for block in encoder.get_submodule("blocks")[start:stop]:  # pyright: ignore[reportIndexIssue]
        run = _compiled(execution.compiler) if execution.compiler else run_block
        if execution.checkpoint and torch.is_grad_enabled():
            tokens = checkpoint(run, block, tokens, execution.attention, use_reentrant=False)  # pyright: ignore
        else:
            tokens = run(block, tokens, execution.attention)
    return tokens


@functools.cache
def _compiled(compiler: str) -> Any:
    return torch.compile(run_block, backend=compiler)


def run_block(block: Any, tokens: torch.Tensor, backend: str) -> torch.Tensor:
    """(B, H, W, D) -> (B, H, W, D): one block of SAM's encoder, as Block.forward."""
    if backend == "original":
        return block(tokens)
    tokens = tokens + attend(block.attn, block.norm1(tokens), block.window_size, backend)
    return tokens + block.mlp(block.norm2(tokens))


def attend(attention: Any, tokens: torch.Tensor, window: int, backend: str) -> torch.Tensor:
    """SAM's attention with what stands around it in its block: window partition, padding, adapter.

    Args:
        attention: segment_anything's Attention, whatever its qkv and proj have been wrapped in.
        tokens: (B, H, W, D), normalised. window: side of the windows in tokens; 0 = global attention.
        backend: one of `BACKENDS` but `original`, or `auto`.
    Returns:
        (B, H, W, D).
    """
    batch, height, width, channels = tokens.shape
    heads = attention.num_heads
    qkv = attention.qkv(tokens)  # (B, H, W, 3 D)
    rows, columns = (window or height), (window or width)
    down, across = -(-height // rows), -(-width // columns)  # windows
    padded = (batch, down * rows, across * columns, 3 * channels)
    if padded[1:3] != (height, width):
        of_zeros = attention.qkv(tokens.new_zeros(1, 1, 1, channels)).expand(padded)
        inside = F.pad(
            tokens.new_ones((1, height, width, 1), dtype=torch.bool),
            (0, 0, 0, padded[2] - width, 0, padded[1] - height),
        )
        qkv = torch.where(inside, F.pad(qkv, (0, 0, 0, padded[2] - width, 0, padded[1] - height)), of_zeros)
    parts = qkv.view(batch, down, rows, across, columns, 3, heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = parts.reshape(3, batch * down * across, heads, rows * columns, -1).unbind(0)  # (B', heads, N, hd)
    out = relative_attention(
        q, k, v, positions(attention.rel_pos_h, rows), positions(attention.rel_pos_w, columns), attention.scale, backend
    )
    out = out.view(batch, down, across, heads, rows, columns, -1).permute(0, 1, 4, 2, 5, 3, 6)
    out = attention.proj(out.reshape(batch, padded[1], padded[2], channels)[:, :height, :width])
    adapter = getattr(attention, "adapter", None)  # a forward hook of the module, which is not called here
    return out if adapter is None else adapter(out)


def positions(table: torch.Tensor, size: int) -> torch.Tensor:
    """Relative positions of one axis: R with R[y, :, y'] = table[y - y' + size - 1].

    Args:
        table: (L, hd); interpolated linearly to 2 size - 1 rows where it has another number, as SAM's get_rel_pos does.
    Returns:
        (size, hd, size), a view of the table or of its interpolation.
    """
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.t()[None], size=2 * size - 1, mode="linear")[0].t()
    return table.flip(0).unfold(0, size, 1).flip(0)


def relative_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r_h: torch.Tensor, r_w: torch.Tensor, scale: float, backend: str
) -> torch.Tensor:
    """softmax(scale q k^T + q R_h + q R_w) v.

    Args:
        q, k, v: (B, heads, N, hd), N = H W tokens row by row. r_h: (H, hd, H), r_w: (W, hd, W), see `positions`.
        backend: one of `BACKENDS` but `original`, or `auto`.
    Returns:
        (B, heads, N, hd) in v's dtype.
    """
    batch, heads, count, depth = q.shape
    height, width = len(r_h), len(r_w)
    if backend == "auto":
        needs_grad = torch.is_grad_enabled() and q.requires_grad
        backend = choose(q.device.type, q.dtype, needs_grad=needs_grad, num_tokens=count)
    grid = q.reshape(batch * heads, height, width, depth)
    by_row = grid.transpose(0, 1).reshape(height, -1, depth) @ r_h.to(q.dtype)  # (H, B' W, H)
    by_column = grid.permute(2, 0, 1, 3).reshape(width, -1, depth) @ r_w.to(q.dtype)  # (W, B' H, W)
    by_row = by_row.view(height, -1, width, height).transpose(0, 1).reshape(batch, heads, count, height)
    by_column = by_column.view(width, -1, height, width).permute(1, 2, 0, 3).reshape(batch, heads, count, width)
    if backend == "sdpa":
        bias = (by_row[..., :, None] + by_column[..., None, :]).view(batch, heads, count, count)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    wide_q, places = torch.cat([q * scale, by_row, by_column], -1), one_hot_places(height, width, k)
    if backend == "plain":
        with torch.autocast(q.device.type, enabled=False):  # which would have the softmax of all pairs in float32
            return (wide_q @ widened(k, places).transpose(2, 3)).softmax(-1) @ v
    if backend == "folded":
        return folded(wide_q, k, v, places)
    if backend == "chunked":
        return Chunked.apply(*(t.flatten(0, 1) for t in (wide_q, k, v)), places).view(v.shape)  # pyright: ignore
    raise ValueError(f"attention: expected one of {', '.join(BACKENDS)} or auto, got {backend!r}")


def choose(device: str, dtype: torch.dtype, *, needs_grad: bool, num_tokens: int) -> str:
    """The backend that `auto` stands for; measured on the CPU by `benchmarks/attention.py`, not on a GPU.

    Args:
        device: `cpu` or `cuda`. dtype: of q. needs_grad: whether a backward pass follows. num_tokens: N of a window
            or of the whole map.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device == "cuda":
        return "folded" if half else "sdpa"
    few, many = num_tokens < 1024, num_tokens > 2048
    if half:
        return "plain" if few or (needs_grad and not many) else "folded"
    if not needs_grad:
        return "sdpa"
    return "plain" if few else "folded" if many else "chunked"


def one_hot_places(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """(H W, H + W): ones in each token's row and, after H channels, in its column; dtype and device of `like`."""
    number = torch.arange(height * width, device=like.device)[:, None]
    rows, columns = (torch.arange(size, device=like.device) for size in (height, width))
    return torch.cat([number // width == rows, number % width == columns], 1).to(like.dtype)


def widened(k: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(..., N, hd) keys and (N, H + W) -> (..., N, hd + H + W)."""
    return torch.cat([k, places.expand(*k.shape[:-2], -1, -1)], -1)


def folded(wide_q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Torch's fused attention on widened q and k, without a bias; v is filled up with zeros to the same width.

    Args:
        wide_q: (B, heads, N, hd + H + W), scaled q and the position terms. k, v: (B, heads, N, hd).
        places: (N, H + W), see `one_hot_places`.
    """
    fill = -wide_q.shape[-1] % 8  # kernels want multiples of 8
    wide_k = widened(k, places)
    wide_v = F.pad(v, (0, places.shape[-1] + fill))
    out = F.scaled_dot_product_attention(F.pad(wide_q, (0, fill)), F.pad(wide_k, (0, fill)), wide_v, scale=1.0)
    return out[..., : v.shape[-1]]


class Chunked(torch.autograd.Function):
    """The attention for some heads and queries at a time: keeps its inputs, its output and one number per query.

    Forward and backward as in FlashAttention (arXiv:2205.14135, algorithms 1 and 4), in pieces that torch multiplies.
    """

    @staticmethod
    def pieces(wide_q: torch.Tensor) -> list[tuple[slice, slice]]:
        """Heads and queries of each piece."""
        budget, (batch, count, _) = CHUNK["cuda" if wide_q.is_cuda else "cpu"], wide_q.shape
        rows = max(1, min(count, budget // count))
        group = max(1, budget // (rows * count))
        starts = ((b, s) for b in range(0, batch, group) for s in range(0, count, rows))
        return [(slice(b, b + group), slice(s, s + rows)) for b, s in starts]

    @staticmethod
    def forward(ctx: Any, wide_q, k, v, places):
        """wide_q (B', N, hd + H + W), k, v (B', N, hd), places (N, H + W) -> (B', N, hd); sums in float32 or better."""
        exact = torch.promote_types(v.dtype, torch.float32)
        out, total = torch.empty_like(v), v.new_empty(v.shape[:2], dtype=exact)
        for b, s in Chunked.pieces(wide_q):
            weights = (wide_q[b, s] @ widened(k[b], places).transpose(1, 2)).to(exact)
            greatest = weights.amax(-1, keepdim=True)
            weights.sub_(greatest).exp_()
            summed = weights.sum(-1, keepdim=True)
            out[b, s] = (weights.to(v.dtype) @ v[b]).to(exact).div_(summed)
            total[b, s] = summed.log_().add_(greatest)[..., 0]
        ctx.save_for_backward(wide_q, k, v, places, out, total)
        return out

    @staticmethod
    def backward(ctx: Any, grad):
        """Gradients of wide_q, k and v."""
        wide_q, k, v, places, out, total = ctx.saved_tensors
        exact = total.dtype
        d_q, d_k, d_v = torch.empty_like(wide_q), torch.zeros_like(k), torch.zeros_like(v)
        along = (grad.to(exact) * out.to(exact)).sum(-1, keepdim=True)  # D of the paper, (B', N, 1)
        for b, s in Chunked.pieces(wide_q):
            wide_k = widened(k[b], places)
            weights = (wide_q[b, s] @ wide_k.transpose(1, 2)).to(exact).sub_(total[b, s, None]).exp_()
            d_v[b] += weights.to(v.dtype).transpose(1, 2) @ grad[b, s]
            d_logits = (grad[b, s] @ v[b].transpose(1, 2)).to(exact).sub_(along[b, s]).mul_(weights).to(k.dtype)
            d_q[b, s] = d_logits @ wide_k
            d_k[b] += d_logits.transpose(1, 2) @ wide_q[b, s, : k.shape[-1]]
        return d_q, d_k, d_v, None

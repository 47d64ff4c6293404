"""Run SAM's transformer blocks over segment_anything's own, unmodified weights.

The attention has decomposed relative positions (MViTv2, arXiv:2112.01526; Kirillov et al. 2023, arXiv:2304.02643): for
query i in row y, column x and key j in row y', column x'

    logit(i, j) = scale q_i . k_j + q_i . R_h[y - y'] + q_i . R_w[x - x']

Backends, all exact up to rounding; `choose` takes the one for the device, the precision and the size:

- `sdpa`: torch's fused attention, the two position terms added up to a bias of all pairs.
- the position terms as further channels, [scale q, q R_h, q R_w] . [k, 1_y', 1_x'] with one-hot rows and columns:
  - `plain`: product, softmax, product; the logits of all pairs are materialised once.
  - `folded`: torch's fused attention without a bias, for which GPUs have the best kernels (FlashAttention,
    arXiv:2205.14135); nothing of all pairs is materialised.

In windows only real tokens are projected. segment_anything pads the map with zeros, and these take part as keys; the
projection of a zero is the same everywhere, so it is computed once and placed on the padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

BACKENDS = ("sdpa", "plain", "folded")


def run_blocks(encoder: nn.Module, tokens: torch.Tensor, start: int, stop: int | None = None) -> torch.Tensor:
    """Run (B, H, W, D) tokens through blocks `start` to `stop` (exclusive; None = all) of SAM's image encoder."""
    for block in encoder.get_submodule("blocks")[start:stop]:  # pyright: ignore[reportIndexIssue]
        tokens = run_block(block, tokens)
    return tokens


def run_block(block: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Run one block of SAM's encoder as Block.forward, (B, H, W, D) -> (B, H, W, D)."""
    tokens = tokens + attend(block.attn, block.norm1(tokens), block.window_size)
    return tokens + block.mlp(block.norm2(tokens))


def attend(attention: Any, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """Apply SAM's attention with window partition, padding and adapter.

    Args:
        attention: segment_anything's Attention; qkv and proj may be wrapped.
        tokens: (B, H, W, D), normalised. window: side of the windows in tokens; 0 = global attention.
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
    r_h, r_w = positions(attention.rel_pos_h, rows), positions(attention.rel_pos_w, columns)
    needs_grad = torch.is_grad_enabled() and q.requires_grad
    backend = choose(q.device.type, q.dtype, needs_grad=needs_grad, num_tokens=q.shape[2])
    out = relative_attention(q, k, v, r_h, r_w, attention.scale, backend)
    out = out.view(batch, down, across, heads, rows, columns, -1).permute(0, 1, 4, 2, 5, 3, 6)
    out = attention.proj(out.reshape(batch, padded[1], padded[2], channels)[:, :height, :width])
    adapter = getattr(attention, "adapter", None)  # a forward hook of the module, which is not called here
    return out if adapter is None else adapter(out)


def positions(table: torch.Tensor, size: int) -> torch.Tensor:
    """Return the relative positions of one axis: R with R[y, :, y'] = table[y - y' + size - 1].

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
    """Return softmax(scale q k^T + q R_h + q R_w) v.

    Args:
        q, k, v: (B, heads, N, hd), N = H W tokens row by row. r_h: (H, hd, H), r_w: (W, hd, W), see `positions`.
        backend: one of `BACKENDS`.
    Returns:
        (B, heads, N, hd) in v's dtype.
    """
    batch, heads, count, depth = q.shape
    height, width = len(r_h), len(r_w)
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
    return folded(wide_q, k, v, places)


def choose(device: str, dtype: torch.dtype, *, needs_grad: bool, num_tokens: int) -> str:
    """Return the backend to use; measured on the CPU by `benchmarks/attention.py`, not on a GPU.

    Args:
        device: `cpu` or `cuda`. dtype: of q. needs_grad: whether a backward pass follows. num_tokens: N of a window
            or of the whole map.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device == "cuda":
        return "folded" if half else "sdpa"
    few = num_tokens < 1024
    if half:
        return "plain" if few or (needs_grad and num_tokens <= 2048) else "folded"
    if not needs_grad:
        return "sdpa"
    return "plain" if few else "folded"


def one_hot_places(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Return (H W, H + W): ones in each token's row and, after H channels, its column; dtype and device of `like`."""
    number = torch.arange(height * width, device=like.device)[:, None]
    rows, columns = (torch.arange(size, device=like.device) for size in (height, width))
    return torch.cat([number // width == rows, number % width == columns], 1).to(like.dtype)


def widened(k: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Append the one-hot places to the keys, (..., N, hd) and (N, H + W) -> (..., N, hd + H + W)."""
    return torch.cat([k, places.expand(*k.shape[:-2], -1, -1)], -1)


def folded(wide_q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Apply torch's fused attention to widened q and k, without a bias; v is padded with zeros to the same width.

    Args:
        wide_q: (B, heads, N, hd + H + W), scaled q and the position terms. k, v: (B, heads, N, hd).
        places: (N, H + W), see `one_hot_places`.
    """
    fill = -wide_q.shape[-1] % 8  # kernels want multiples of 8
    wide_k = widened(k, places)
    wide_v = F.pad(v, (0, places.shape[-1] + fill))
    out = F.scaled_dot_product_attention(F.pad(wide_q, (0, fill)), F.pad(wide_k, (0, fill)), wide_v, scale=1.0)
    return out[..., : v.shape[-1]]

"""Pixel projection head of the contrastive method, and a measure of its collapse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lesionsam.parallel.collectives import BatchNorm

PROJECTED_CHANNELS = 64
NUM_GROUPS = 8
COLLAPSED_COSINE = 0.99  # mean cosine above which every pixel practically points the same way


class ProjectionHead(nn.Module):
    """Conv1x1 C-C, norm, GELU, Conv1x1 C-64, then unit length per pixel.

    Args:
        channels: C, the encoder's output width.
        norm: `batch` (published; its statistics couple the images of a batch) or `group`.
    """

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 1)
        self.norm = BatchNorm(channels) if norm == "batch" else nn.GroupNorm(NUM_GROUPS, channels)
        self.embed = nn.Conv2d(channels, PROJECTED_CHANNELS, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project features, (B, C, H', W') -> (B, 64, H', W'), unit length along the channels."""
        return F.normalize(self.embed(F.gelu(self.norm(self.project(features)))).float(), dim=1)


def spread(embeddings: torch.Tensor) -> dict[str, float]:
    """Return how far a head's embeddings are from collapse.

    Args:
        embeddings: (B, 64, H', W') unit vectors.
    Returns:
        channel_std: mean over channels of the standard deviation over pixels (1 / 8 for uniform directions, 0 for a
        collapsed head). mean_cosine: mean cosine between two random pixels (0 uniform, 1 collapsed).
    """
    flat = embeddings.detach().float().permute(0, 2, 3, 1).reshape(-1, embeddings.shape[1])
    return {"channel_std": flat.std(0).mean().item(), "mean_cosine": flat.mean(0).square().sum().item()}

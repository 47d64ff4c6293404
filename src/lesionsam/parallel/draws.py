"""Random numbers of a step that do not depend on how its batch is split over processes.

Every process draws the numbers of the whole batch, from generators in the same state, and keeps those of its own
images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SharedDraws:
    """Draws of a process that holds some rows of a batch.

    Attributes:
        generator: on the CPU, in the same state in every process.
        rows: (B,) int64, positions of this process's rows in the whole batch. total: its number of rows.
    """

    generator: torch.Generator
    rows: torch.Tensor
    total: int


Draws = torch.Generator | SharedDraws


def generator_of(draws: Draws) -> torch.Generator:
    """Return the generator, for numbers that belong to no row."""
    return draws.generator if isinstance(draws, SharedDraws) else draws


def rand(draws: Draws, count: int, *shape: int) -> torch.Tensor:
    """Draw uniform numbers in [0, 1) for each of this process's `count` rows, (count, *shape) float32 on the CPU."""
    if isinstance(draws, SharedDraws):
        return torch.rand(draws.total, *shape, generator=draws.generator)[draws.rows]
    return torch.rand(count, *shape, generator=draws)


def whole_batch(draws: Draws, count: int) -> int:
    """Return the number of rows of the whole batch, of which this process holds `count`."""
    return draws.total if isinstance(draws, SharedDraws) else count


def own_part(group: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, Draws]:
    """Return this process's part of a group of rows, and the draws of the group.

    Args:
        group: (G,) int64 rows of the whole batch; a row may occur several times.
    Returns:
        Rows (g,) int64 of this process's own batch; draws whose rows are these g of G.
    """
    if not isinstance(draws, SharedDraws):
        return group, draws
    own = torch.full((draws.total,), -1)
    own[draws.rows] = torch.arange(len(draws.rows))
    mine = torch.nonzero(own[group] >= 0)[:, 0]
    return own[group[mine]], SharedDraws(draws.generator, mine, len(group))

"""A store of activations, filled and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lesionsam.data.activation_store import Budget, Store

GB = 1e9


SHAPE = (4, 4, 32)


def open_store(root: Path, *, limit: float = GB, lines: list[str] | None = None, **space: Any) -> Store:
    say = (lambda line: None) if lines is None else lines.append
    return Store(root, {"part": "a part", **space}, Budget(root, int(limit), say))


def values(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def keys(count: int, first: int = 0) -> list[bytes]:
    return [bytes([k]) * 16 for k in range(first, first + count)]


def filled(root: Path, count: int = 6, **space: Any) -> Path:
    """A store with some entries, closed; its folder."""
    store = open_store(root, **space)
    store.write(keys(count), values(count))
    store.close()
    return store.folder


def found(store: Store, count: int = 6) -> list[bool]:
    """Which of the entries are there; those must be right."""
    wanted, there = values(count), []
    for k, key in enumerate(keys(count)):
        into = torch.full(SHAPE, -1.0)
        there.append(store.read(key, into))
        assert not there[-1] or torch.equal(into, wanted[k])
    return there

"""Prepare batches for a step: collate them ahead in threads, move them to the device, add cached activations.

Threads, not processes: collating is copying, which runs beside the step, and what comes out is a function of (seed,
epoch) alone, however many there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import TypeVar

import torch

from lesionsam.data.activations import Activations, Fetched, image_key
from lesionsam.data.augment import NO_AUGMENTATION, Augmentation
from lesionsam.data.dataset import LesionDataset, Part, expanded
from lesionsam.types import Batch

Item = TypeVar("Item")
AHEAD = 2  # batches that each thread may be ahead


class Loader:
    """A data set's batches on a device.

    Args:
        data: the samples. device: where batches go. num_workers: threads that collate; 0 collates in between steps.
        cache: completes batches with activations; None leaves that to the method.
        rank, num_ranks: number of this process among those that share every training batch.
    """

    def __init__(
        self,
        data: LesionDataset,
        *,
        device: torch.device,
        num_workers: int = 0,
        cache: Activations | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.data, self.device, self.num_workers, self.cache = data, device, num_workers, cache
        self.rank, self.num_ranks = rank, num_ranks
        self._keys: dict[tuple[int, int], bytes] = {}  # of a sample in one of its variants

    def __len__(self) -> int:
        return len(self.data)

    def batches_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches that cover the set once."""
        return self.data.batches_per_epoch(batch_size)

    def epoch(
        self, batch_size: int, *, seed: int, epoch: int, augmentation: Augmentation = NO_AUGMENTATION, start: int = 0
    ) -> Iterator[Batch]:
        """Yield the batches of `LesionDataset.epoch`; of each, the rows of this process."""
        parts = self.data.plan(batch_size, seed=seed, epoch=epoch, augmentation=augmentation, start=start)
        return self._load([self._share(part) for part in parts])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches of all samples in order, once, without augmentation; the processes take turns."""
        return self._load(self.data.plan_in_order(batch_size)[self.rank :: self.num_ranks])

    def _share(self, part: Part) -> Part:
        count = len(part.index) // self.num_ranks
        own = slice(self.rank * count, (self.rank + 1) * count)
        return part._replace(index=part.index[own], variants=None if part.variants is None else part.variants[own])

    def _load(self, parts: Sequence[Part]) -> Iterator[Batch]:
        for found in ahead(self._prepare, parts, self.num_workers):
            batch = expanded(found.batch.to(self.device))
            yield self.cache.complete(found, batch) if self.cache is not None and found.rows else batch

    def _prepare(self, part: Part) -> Fetched:
        batch = self.data.packed(*part)
        keys = self._keys_of(batch) if self.cache is not None else None
        if self.device.type == "cuda":
            batch = pinned(batch)
        return self.cache.fetch(batch, keys) if self.cache is not None and keys is not None else Fetched(batch, [], {})

    def _keys_of(self, batch: Batch) -> list[bytes] | None:
        if batch.orientations is None:  # drawn anew each time: never seen again
            return None
        keys = []
        for row, shown in enumerate(zip(batch.index.tolist(), batch.orientations.tolist(), strict=True)):
            if shown not in self._keys:
                self._keys[shown] = image_key(batch.images[row], batch.sizes[row])
            keys.append(self._keys[shown])
        return keys


def ahead(make: Callable[[Part], Item], parts: Sequence[Part], num_workers: int) -> Iterator[Item]:
    """Yield `map(make, parts)` with threads that work ahead; order and results do not depend on their number."""
    if not num_workers:
        yield from map(make, parts)
        return
    pool, running = ThreadPoolExecutor(num_workers, "loader"), deque[Future[Item]]()
    todo = iter(parts)
    try:
        for part in todo:
            running.append(pool.submit(make, part))
            if len(running) > AHEAD * num_workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:  # an error, or nobody wants the rest
        pool.shutdown(wait=True, cancel_futures=True)


def pinned(batch: Batch) -> Batch:
    """Copy a batch to page-locked memory, from which copies to a GPU run asynchronously."""
    held = {
        f.name: value.pin_memory() for f in fields(batch) if isinstance(value := getattr(batch, f.name), torch.Tensor)
    }
    return replace(batch, **held)

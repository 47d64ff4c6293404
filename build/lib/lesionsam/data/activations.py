"""What frozen network parts make of images, kept for epochs and runs to come: on the device, in memory and on disk.

An image's frozen activations never change, so they are made once and looked up from then on. Every orientation of an
image is an image of its own, as the activations of a mirrored image are not the mirrored activations. What is looked up
is, to the last bit, what would have been computed: values are made image by image (`models.trainable.encode_frozen`).
This module knows no model: it is handed a function that computes what is missing.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from lesionsam.data.activation_store import Store
from lesionsam.types import Batch, to_device

NAMES = ("prefix", "reference")  # fields of a batch that are kept
WAITING_BYTES = 1 << 30  # of new entries on their way to the disk; beyond that a slow disk leaves some out

# Oriented and preprocessed-to-be images in, what was asked for of NAMES out: (batch, names) -> name -> (B, ...).
Compute = Callable[[Batch, Sequence[str]], dict[str, torch.Tensor]]


def image_key(image: torch.Tensor, size: torch.Tensor) -> bytes:
    """16 bytes that stand for a padded image and its image part, which is all that the network sees.

    By their values: so an image is one entry in every data set, each orientation another, and whatever changes in
    decoding or resizing leaves the old entries unused.

    Args:
        image: (3, S, S) uint8. size: (2,) int64.
    """
    digest = hashlib.sha256(image.permute(1, 2, 0).contiguous().numpy().data)
    digest.update(size.numpy().tobytes())
    return digest.digest()[:16]


class Room:
    """Entries kept in one kind of memory: those that came first, as in passes over a set the last would push out all.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._held: dict[tuple[str, bytes], torch.Tensor] = {}

    def get(self, name: str, key: bytes) -> torch.Tensor | None:
        """An entry, if it is held."""
        return self._held.get((name, key))

    def has_room(self, name: str, key: bytes, size: int) -> bool:
        """Whether an entry of so many bytes is worth a copy."""
        return size <= self._left and (name, key) not in self._held

    def put(self, name: str, key: bytes, value: torch.Tensor) -> None:
        """Keep an entry, which the caller has copied."""
        self._held[name, key] = value
        self._left -= value.nbytes


@dataclass
class Rows:
    """What was found for one name and batch before it reached the device.

    Attributes:
        host: (B, ...) on the CPU, pinned where the device is a GPU; rows without `found` hold nothing. None: none does.
        found: (B,) bool. near: row -> entry that is on the device already.
    """

    host: torch.Tensor | None
    found: np.ndarray
    near: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class Fetched:
    """A batch with what was found for it."""

    batch: Batch
    keys: list[bytes]
    rows: dict[str, Rows]


class Activations:
    """The cache of one run: a store per name, and memory above it.

    Args:
        stores: name of `NAMES` -> its store.
        compute: makes what is missing; called in the caller's thread of `complete`.
        memory: bytes of the CPU's memory for entries. near: bytes of the device's, unused where that is the CPU.
    """

    def __init__(
        self, stores: dict[str, Store], compute: Compute, *, device: torch.device, memory: int = 0, near: int = 0
    ) -> None:
        self.stores, self.compute, self.device = stores, compute, device
        self.pin = device.type == "cuda"
        self.memory, self.near = Room(memory), Room(near if self.pin else 0)
        self.looked_up = self.hits = 0
        self._waiting: queue.SimpleQueue[tuple[str, list[bytes], torch.Tensor, torch.cuda.Event | None] | None]
        self._waiting, self._waiting_bytes, self._writer = queue.SimpleQueue(), 0, None
        self._writer_lock = threading.Lock()

    # ---- before the batch reaches the device -------------------------------------------------------------------------

    def fetch(self, batch: Batch, keys: list[bytes]) -> Fetched:
        """Look a batch up; safe to call from several threads.

        Args:
            batch: on the CPU. keys: of its images, see `image_key`.
        """
        return Fetched(batch, keys, {name: self._find(name, keys) for name in self.stores})

    def _find(self, name: str, keys: Sequence[bytes]) -> Rows:
        store, rows = self.stores[name], Rows(None, np.zeros(len(keys), bool))
        rows.near = {k: entry for k, key in enumerate(keys) if (entry := self.near.get(name, key)) is not None}
        if len(rows.near) < len(keys):
            store.refresh()
        if store.shape is None or store.dtype is None:
            return rows
        for k, key in enumerate(keys):
            if k in rows.near:
                continue
            if rows.host is None:
                rows.host = self._buffer((len(keys), *store.shape), store.dtype)
            kept = self.memory.get(name, key)
            if kept is not None:
                rows.host[k].copy_(kept)
            rows.found[k] = kept is not None or store.read(key, rows.host[k])
            if kept is None and rows.found[k] and self.memory.has_room(name, key, store.entry_bytes):
                self.memory.put(name, key, self._buffer(store.shape, store.dtype).copy_(rows.host[k]))
        return rows

    def _buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode(False):  # what is kept outlives an evaluation
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.pin)

    # ---- on the device -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def complete(self, fetched: Fetched, batch: Batch) -> Batch:
        """The batch with what was found and, computed now and kept, what was not.

        Args:
            batch: that of `fetched`, on the device.
        """
        lacking: dict[tuple[str, ...], list[int]] = {}  # names -> rows that lack just these, made in one pass
        for k in range(len(fetched.keys)):
            names = tuple(name for name, rows in fetched.rows.items() if not rows.found[k] and k not in rows.near)
            lacking.setdefault(names, []).append(k)
            self.looked_up += len(fetched.rows)
            self.hits += len(fetched.rows) - len(names)
        computed: dict[str, dict[int, torch.Tensor]] = {name: {} for name in fetched.rows}
        for names, rows in lacking.items():
            if names:
                part = batch if len(rows) == len(fetched.keys) else rows_of(batch, rows)
                for name, values in self.compute(part, names).items():
                    computed[name] |= dict(zip(rows, values, strict=True))
                    self._keep(name, [fetched.keys[k] for k in rows], values)
        made = {name: self._gather(name, fetched, computed[name]) for name in fetched.rows}
        return replace(batch, **made)

    def _gather(self, name: str, fetched: Fetched, computed: dict[int, torch.Tensor]) -> torch.Tensor:
        rows = fetched.rows[name]
        if rows.host is not None and rows.found.all():
            values = rows.host.to(self.device, non_blocking=True)
        else:
            at = (
                {
                    k: rows.host[k].to(self.device, non_blocking=True)
                    for k in np.flatnonzero(rows.found)
                    if rows.host is not None
                }
                | rows.near
                | computed
            )
            values = torch.stack([at[k] for k in range(len(fetched.keys))])
        for k, key in enumerate(fetched.keys):
            if k not in rows.near and self.near.has_room(name, key, values[k].nbytes):
                with torch.inference_mode(False):
                    self.near.put(name, key, torch.empty_like(values[k], device=self.device).copy_(values[k]))
        return values

    # ---- on to the disk ----------------------------------------------------------------------------------------------

    def _keep(self, name: str, keys: list[bytes], values: torch.Tensor) -> None:
        """Hand new entries to the writer; it runs beside the training and drops what the disk is too slow for."""
        if not self.stores[name].writable or self._waiting_bytes + values.nbytes > WAITING_BYTES:
            return
        host, event = values, None
        if self.pin:
            host = self._buffer(values.shape, values.dtype).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        with self._writer_lock:
            self._waiting_bytes += values.nbytes
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, daemon=True)
                self._writer.start()
        self._waiting.put((name, keys, host, event))

    def _write(self) -> None:
        while (task := self._waiting.get()) is not None:
            name, keys, values, event = task
            if event is not None:
                event.synchronize()
            self.stores[name].write(keys, values)
            with self._writer_lock:
                self._waiting_bytes -= values.nbytes

    def flush(self) -> None:
        """Wait until everything handed over so far is on disk."""
        if self._writer is not None:
            self._waiting.put(None)
            self._writer.join()
            self._writer = None

    def close(self) -> None:
        """Finish writing and let go of the files."""
        self.flush()
        for store in self.stores.values():
            store.close()

    def summary(self) -> str:
        """What the cache was good for, in a line."""
        share = self.hits / self.looked_up if self.looked_up else math.nan
        return f"activation cache: {share:.0%} of {self.looked_up} activations were there"


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """Pixels and sizes of some rows of a batch: what activations are computed from."""
    at = to_device(torch.tensor(rows), batch.images.device)
    return Batch(
        ids=tuple(batch.ids[k] for k in rows),
        index=batch.index[at],
        images=batch.images[at],
        sizes=batch.sizes[at],
        big_boxes=batch.big_boxes[at],
        small_boxes=batch.small_boxes[at],
        valid=batch.valid[at],
    )

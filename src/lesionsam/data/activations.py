"""Cache the outputs of frozen network parts on disk, for later epochs and runs.

An image's frozen activations never change: they are computed once and read from then on. Every orientation of an image
is an image of its own, as the activations of a mirrored image are not the mirrored activations. A cached value equals
the computed one to the last bit, as values are computed image by image (`models.prefix.encode_frozen`). A function that
computes what is missing is passed in, so this module depends on no model.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lesionsam.data.activation_store import Store
from lesionsam.types import Batch, to_device

NAMES = ("prefix", "reference")  # fields of a batch that are kept
WAITING_BYTES = 1 << 30  # of new entries on their way to the disk; beyond that a slow disk leaves some out

# Compute the fields `names` of NAMES for a batch of oriented images: (batch, names) -> name -> (B, ...).
Compute = Callable[[Batch, Sequence[str]], dict[str, torch.Tensor]]


def image_key(image: torch.Tensor, size: torch.Tensor) -> bytes:
    """Return the 16-byte key of a padded image and the size of its image part, all that the network reads.

    The key hashes the pixels: an image has the same key in every data set, and changed decoding gives another key.

    Args:
        image: (3, S, S) uint8. size: (2,) int64.
    """
    digest = hashlib.sha256(image.permute(1, 2, 0).contiguous().numpy().data)
    digest.update(size.numpy().tobytes())
    return digest.digest()[:16]


@dataclass
class Rows:
    """Cached rows of one field for a batch, on the CPU.

    Attributes:
        host: (B, ...), pinned where the device is a GPU; rows without `found` are undefined. None: no row was found.
        found: (B,) bool.
    """

    host: torch.Tensor | None
    found: np.ndarray


@dataclass
class Fetched:
    """A batch with the rows that the cache holds for it."""

    batch: Batch
    keys: list[bytes]
    rows: dict[str, Rows]


class Activations:
    """The cache of one run: one store per field.

    Args:
        stores: name of `NAMES` -> its store.
        compute: computes what is missing; called in the caller's thread of `complete`.
    """

    def __init__(self, stores: dict[str, Store], compute: Compute, *, device: torch.device) -> None:
        self.stores, self.compute, self.device = stores, compute, device
        self.pin = device.type == "cuda"
        self.looked_up = self.hits = 0
        self._waiting: queue.SimpleQueue[tuple[str, list[bytes], torch.Tensor, torch.cuda.Event | None] | None]
        self._waiting, self._waiting_bytes, self._writer = queue.SimpleQueue(), 0, None
        self._writer_lock = threading.Lock()

    # ---- before the batch reaches the device -------------------------------------------------------------------------

    def fetch(self, batch: Batch, keys: list[bytes]) -> Fetched:
        """Read the cached rows of a batch; safe to call from several threads.

        Args:
            batch: on the CPU. keys: of its images, see `image_key`.
        """
        return Fetched(batch, keys, {name: self._find(name, keys) for name in self.stores})

    def _find(self, name: str, keys: Sequence[bytes]) -> Rows:
        store, found = self.stores[name], np.zeros(len(keys), bool)
        store.refresh()
        if store.shape is None or store.dtype is None:
            return Rows(None, found)
        host = self._buffer((len(keys), *store.shape), store.dtype)
        for k, key in enumerate(keys):
            found[k] = store.read(key, host[k])
        return Rows(host, found)

    def _buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode(False):  # an inference tensor could not be used in a later training step
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.pin)

    # ---- on the device -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def complete(self, fetched: Fetched, batch: Batch) -> Batch:
        """Return the batch with its cached rows; missing ones are computed and written to the cache.

        Args:
            batch: that of `fetched`, on the device.
        """
        lacking: dict[tuple[str, ...], list[int]] = {}  # names -> rows that lack exactly these, computed in one pass
        for k in range(len(fetched.keys)):
            names = tuple(name for name, rows in fetched.rows.items() if not rows.found[k])
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
            return rows.host.to(self.device, non_blocking=True)
        found = {} if rows.host is None else {k: rows.host[k] for k in np.flatnonzero(rows.found)}
        at = {k: row.to(self.device, non_blocking=True) for k, row in found.items()} | computed
        return torch.stack([at[k] for k in range(len(fetched.keys))])

    # ---- on to the disk ----------------------------------------------------------------------------------------------

    def _keep(self, name: str, keys: list[bytes], values: torch.Tensor) -> None:
        """Queue new entries for the writer thread; those that the disk is too slow for are dropped."""
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
        """Wait until all queued entries are on disk."""
        if self._writer is not None:
            self._waiting.put(None)
            self._writer.join()
            self._writer = None

    def close(self) -> None:
        """Finish writing and close the files."""
        self.flush()
        for store in self.stores.values():
            store.close()

    def summary(self) -> str:
        """Return the hit rate as a line of text."""
        share = self.hits / self.looked_up if self.looked_up else math.nan
        return f"activation cache: {share:.0%} of {self.looked_up} activations were there"


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return the rows of a batch that activations are computed from: pixels and sizes."""
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

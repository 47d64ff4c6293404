"""Random numbers that depend on a key alone: whatever else is drawn, in whatever order."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_rng(key: str) -> np.random.Generator:
    """Return a generator seeded with the SHA-256 of `key`, such as "seed|purpose|image_id/lesion_id"."""
    return np.random.default_rng(np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint64))

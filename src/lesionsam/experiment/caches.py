"""Open a run's caches of the activations of frozen encoder parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lesionsam.config.load import Config
from lesionsam.data.activation_store import Budget, Store
from lesionsam.data.activations import Activations, Compute
from lesionsam.methods.base import Method
from lesionsam.models.identity import arithmetic, frozen_identity
from lesionsam.models.prefix import encode_frozen, num_frozen_blocks
from lesionsam.models.sam import Sam
from lesionsam.training.gradients import autocast
from lesionsam.types import Batch

GB = 1_000_000_000


@dataclass(frozen=True)
class Caches:
    """Caches of the training images, in all orientations, and of the development images."""

    train: Activations | None = None
    dev: Activations | None = None


@contextmanager
def open_caches(
    config: Config, root: Path | None, sam: Sam, method: Method, device: torch.device, say: Callable[[str], None]
) -> Iterator[Caches]:
    """Open the caches of a run; none if no part of the encoder is frozen or none is wanted.

    Args:
        root: folder of all caches; None = no cache. sam: the student, its trained parameters selected.
        say: receives a line on what is cached, one if the disk fails, and one on the hits.
    """
    runtime, split = config.runtime, num_frozen_blocks(sam)
    reference = method.reference
    if root is None or runtime.cache_gb == 0 or (split < 1 and reference is None):
        yield Caches()
        return
    budget = Budget(root, int(runtime.cache_gb * GB), say)
    identities: dict[int, str] = {}

    def store(model: Sam, num_blocks: int, precision: str) -> Store:
        if num_blocks not in identities:
            identities[num_blocks] = frozen_identity(model, num_blocks)
        num_all = len(model.blocks)
        part = f"{config.model.name}: " + ("features" if num_blocks > num_all else f"{num_blocks} of {num_all} blocks")
        space = {
            "part": part,
            "side": model.side,
            "precision": precision,
            "identity": identities[num_blocks],
            "arithmetic": arithmetic(device),
        }
        return Store(root, space, budget)

    stores, dev = {}, None
    if split >= 1:
        stores["prefix"] = store(sam, split, config.train.precision)
        dev = Activations({"prefix": store(sam, split, "fp32")}, computing(sam, None, device, "fp32"), device=device)
    if reference is not None:
        stores["reference"] = store(reference, num_frozen_blocks(reference), config.train.precision)
    train = Activations(stores, computing(sam, reference, device, config.train.precision), device=device)
    say("activation cache: " + "; ".join(f"{s.space['part']}, {len(s)} held" for s in stores.values()) + f"; in {root}")
    try:
        yield Caches(train, dev)
    finally:
        for cache in (train, dev):
            if cache is not None:
                cache.close()
    if train.looked_up:
        say(train.summary())


def computing(sam: Sam, reference: Sam | None, device: torch.device, precision: str) -> Compute:
    """Return the function that computes missing activations exactly as the method would."""

    def compute(batch: Batch, names: Sequence[str]) -> dict[str, torch.Tensor]:
        with autocast(device, precision):
            images = sam.normalize(batch.images, batch.sizes)
            if "prefix" not in names and reference is not None:
                return {"reference": encode_frozen(reference, images, num_frozen_blocks(reference))[0]}
            wanted = reference if "reference" in names else None
            tokens, features = encode_frozen(sam, images, num_frozen_blocks(sam), wanted)
            return {"prefix": tokens} | ({"reference": features} if features is not None else {})

    return compute

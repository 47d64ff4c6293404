"""Measure what cached activations and the loader save: `python benchmarks/cache.py`; minutes on one core, no data
needed.

Prints a Markdown table of ratios, each beside the limit it is held to, and ends with an error where one is missed.
Random weights: time does not depend on what the weights are. CPU time of one thread, or the time of day on a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lesionsam.cli.smoke import generated_samples
from lesionsam.config.edit import fit as fit_values
from lesionsam.config.load import Config, default_values, unflatten, validate
from lesionsam.data.augment import Augmentation
from lesionsam.data.dataset import LesionDataset, open_dataset
from lesionsam.data.loader import Loader
from lesionsam.experiment.build import build_method, prepare_sam
from lesionsam.experiment.caches import open_caches
from lesionsam.methods.base import Method
from lesionsam.models.checkpoint import build_sam, save_sam
from lesionsam.models.compact import CompactArchitecture
from lesionsam.training import liveness
from lesionsam.training.loop import Settings, fit
from lesionsam.training.optimizer import parameter_groups
from lesionsam.utils.devices import torch_device
from record import Limits, multiplications, now, provenance, record, table

DECODER = {"method__name": "supervised", "model__encoder": "none"}
EPOCH_LIMIT, OUTSIDE_LIMIT, DECODER_LIMIT = 0.6, 0.10, 8.0


class Bench:
    """A model with random weights, generated images, and trainings of it that are timed.

    Args:
        name: of the model, as in model.name. architecture: of the compact one. count, batch_size: images of the
            training set and of a step.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        architecture: CompactArchitecture | None,
        count: int,
        batch_size: int,
        precision: str,
        device: torch.device,
    ) -> None:
        self.folder, self.batch_size, self.device, self.runs = folder, batch_size, device, 0
        self.name, self.weights, self.precision = name, folder / "weights.safetensors", precision
        torch.manual_seed(0)
        sam = build_sam(name, architecture=architecture)
        save_sam(sam, self.weights, name=name)
        samples = generated_samples(folder / "images", count, 0)
        self.data: LesionDataset = open_dataset(samples, sam.frame, folder / "frames", with_masks=True)

    def config(self, **changes: Any) -> Config:
        """Return the default parameters with these dotted keys (written with __) changed."""
        values = {
            "train.precision": self.precision,
            "train.batch_size": self.batch_size,
            "model.name": self.name,
            "model.checkpoint": str(self.weights),
        }
        return validate(
            fit_values(unflatten(values | {k.replace("__", "."): v for k, v in changes.items()}, default_values()))
        )

    def train(
        self, config: Config, cache: Path | None, *, epochs: int, augment: bool, num_workers: int = 0
    ) -> tuple[list[float], float, float]:
        """Train as the train stage does, without evaluation.

        Returns:
            seconds of each epoch; share of a step that is spent outside the method's forward and backward pass; share
            of activations that were cached.
        """
        self.runs += 1
        sam = prepare_sam(config, self.weights, self.device)
        method, _ = build_method(config, sam, self.weights, self.data, self.device)
        clock = Clock(self.device)
        ends: list[float] = []
        with clock.watching(method), open_caches(config, cache, sam, method, self.device, lambda line: None) as caches:
            loader = Loader(self.data, device=self.device, num_workers=num_workers, cache=caches.train)

            def evaluate(epoch: int) -> dict[str, float]:
                ends.append(clock.now())
                clock.epoch_ends()
                return {"objective": 0.0}

            begun = clock.now()
            fit(
                method,
                loader,
                parameter_groups(method.model, {"all": ("", 1e-5)}),
                Settings(
                    epochs=epochs,
                    batch_size=self.batch_size,
                    accumulate=1,
                    clip=1.0,
                    precision=self.precision,
                    seed=0,
                    patience=0,
                    schedule=lambda step: 1.0,
                    augmentation=Augmentation(flips=augment),
                    weight_decay=0.0,
                    betas=(0.9, 0.999),
                ),
                evaluate=evaluate,
                log=lambda values, step: None,
                folder=self.folder / f"run{self.runs}",
                say=lambda line: None,
            )
            share = caches.train.hits / max(1, caches.train.looked_up) if caches.train is not None else 0.0
        seconds = [end - start for start, end in zip([begun, *ends[:-1]], ends, strict=True)]
        return seconds, clock.outside(), share


class Clock:
    """How much of a step's time a method takes; in seconds of `record.now`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps, self.inside, self.whole = device, 0, 0.0, 0.0
        self._begun = self._spent = 0.0

    def now(self) -> float:
        """Return the time in seconds."""
        return now(self.device)

    @contextmanager
    def watching(self, method: Method) -> Iterator[None]:
        """Time `losses` and every backward pass while the block runs.

        The loop does not watch the terms meanwhile: the further gradients of its first steps, which a run makes once,
        would count as the first epoch's.
        """
        losses, backward, watched = method.losses, torch.Tensor.backward, liveness.LIVENESS_STEPS

        def timed(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            begun = self.now()
            try:
                return function(*arguments, **options)
            finally:
                self._spent += self.now() - begun

        def timed_losses(*arguments: Any) -> Any:
            self.steps += 1
            if self._begun and self.steps > 2:  # the first one warms up
                self.whole, self.inside = self.whole + self.now() - self._begun, self.inside + self._spent
            self._begun, self._spent = self.now(), 0.0
            return timed(losses, *arguments)

        liveness.LIVENESS_STEPS = range(0)
        method.losses = timed_losses  # type: ignore[method-assign]
        torch.Tensor.backward = lambda *a, **o: timed(backward, *a, **o)  # type: ignore[method-assign]
        try:
            yield
        finally:
            liveness.LIVENESS_STEPS = watched
            torch.Tensor.backward = backward  # type: ignore[method-assign]

    def epoch_ends(self) -> None:
        """End an epoch: the time until the next step belongs to no step."""
        self._begun = 0.0

    def outside(self) -> float:
        """Return the share of the steps, from one forward pass to the next of the same epoch, spent outside of them."""
        return 1 - self.inside / self.whole if self.whole else 0.0


def loader_speed(bench: Bench, num_workers: int, cache: Path | None, config: Config, epochs: int = 3) -> float:
    """Return the images per second of wall-clock time that the loader makes for a step that takes no time."""
    sam = prepare_sam(config, bench.weights, bench.device)
    method, _ = build_method(config, sam, bench.weights, bench.data, bench.device)
    with open_caches(config, cache, sam, method, bench.device, lambda line: None) as caches:
        loader = Loader(bench.data, device=bench.device, num_workers=num_workers, cache=caches.train)
        for _ in loader.epoch(bench.batch_size, seed=0, epoch=0):
            pass
        begun = time.perf_counter()
        for epoch in range(epochs):
            for _ in loader.epoch(bench.batch_size, seed=0, epoch=epoch):
                pass
    return epochs * len(bench.data) / (time.perf_counter() - begun)


def main() -> int:
    """Measure, print the table, say which limits are missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--side", type=int, default=512, help="image side, pixels (default: %(default)s)")
    parser.add_argument("--width", type=int, default=192, help="of the encoder (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=12, help="of the encoder (default: %(default)s)")
    parser.add_argument("--count", type=int, default=16, help="training images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="images of a step (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table on top of benchmarks/results.md")
    a = parser.parse_args()
    device = torch_device("auto")
    torch.set_num_threads(a.threads)
    architecture = CompactArchitecture(
        image_size=a.side,
        patch_size=16,
        width=a.width,
        depth=a.blocks,
        num_heads=a.width // 64,
        prompt_width=256,
        decoder_mlp=2048,
    )
    rows: list[tuple[str, str]] = []
    limits = Limits()

    def row(what: str, value: float, limit: float | None = None, *, most: bool = True, form: str = ".2f") -> None:
        rows.append((what, limits.cell(what, value, limit, most=most, form=form)))
        print(": ".join(rows[-1]), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), "compact", architecture, a.count, a.batch_size, a.precision, device)
        for last_k, gamma in ((2, 0.0), (2, 0.1), (1, 0.1)):
            config = bench.config(model__unfreeze_last_k=last_k, method__weights__distil=gamma)
            what = f"K = {last_k}" + (", distillation" if gamma else "")
            cache = Path(name) / f"cache{last_k}{gamma}"
            plain, _, _ = bench.train(config, None, epochs=2, augment=False)
            cached, _, _ = bench.train(config, cache, epochs=2, augment=False)
            warm, outside, share = bench.train(config, cache, epochs=2, augment=False)
            least = multiplications(partial(bench.train, config, cache, epochs=1, augment=False)) / multiplications(
                partial(bench.train, config, None, epochs=1, augment=False)
            )
            limit = EPOCH_LIMIT if last_k == 2 and least < EPOCH_LIMIT else None
            row(f"{what}: second epoch / first", cached[1] / cached[0], limit)
            row(f"{what}: second epoch / second epoch without a cache", cached[1] / plain[1], limit)
            above = f", so that {EPOCH_LIMIT} cannot be had" if last_k == 2 and limit is None else ""
            row(f"{what}: the same by multiplications alone{above}", least, form=".3f")
            row(f"{what}: a trial on a warm cache / without a cache", sum(warm) / sum(plain))
            row(f"{what}: outside forward and backward, warm cache", outside, OUTSIDE_LIMIT, form=".3f")
            if share < 1:
                limits.missed.append(f"{what}: {share:.0%} of a warm cache found")
            if (last_k, gamma) == (2, 0.0):
                row(f"{what}: first epoch, cache being filled / without a cache", cached[0] / plain[0])
                turned, _, found = bench.train(config, Path(name) / "turned", epochs=2, augment=True)
                row(f"{what}, flips and turns: second epoch / first", turned[1] / turned[0])
                row(f"{what}, flips and turns: share found in two epochs", found)
        rate = partial(loader_speed, bench, config=bench.config(model__unfreeze_last_k=2))
        needed = a.count / warm[1]
        row("loader without cache, images/s", rate(0, None), form=".0f")
        row("loader with warm cache, images/s", rate(0, Path(name) / "cache20.0"), form=".0f")
        row("loader with warm cache, 1 thread ahead, images/s", rate(1, Path(name) / "cache20.0"), form=".0f")
        row("step on a warm cache needs, images/s", needed, form=".2f")
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), "vit_b", None, 2, 1, a.precision, device)
        decoder = bench.config(**DECODER)
        bench.train(decoder, Path(name) / "cache", epochs=1, augment=False)
        loop, _, _ = bench.train(decoder, None, epochs=1, augment=False)
        cached, _, _ = bench.train(decoder, Path(name) / "cache", epochs=1, augment=False)
        row(
            "ViT-B at 1024 px, decoder only: encoder in the loop / cached",
            loop[0] / cached[0],
            DECODER_LIMIT,
            most=False,
            form=".1f",
        )
    text = (
        f"D = {a.width}, {a.blocks} blocks, {a.side} px, batch {a.batch_size}, {a.count} images, {a.precision}, "
        f"random weights, seed 0; {provenance(device)}. "
        + "Not measured on a GPU." * (device.type == "cpu")
        + "\n\n"
        + table(["measured", "figure"], rows)
    )
    print(f"\n{text}\n")
    if a.write:
        record("Cached activations and the loader", f"`python benchmarks/cache.py {' '.join(sys.argv[1:])}`\n\n{text}")
    return limits.exit_code()


if __name__ == "__main__":
    sys.exit(main())

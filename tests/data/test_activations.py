"""Cached activations: equal results with and without them, and every way in which the files can go wrong."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.activations import GB, SHAPE, filled, found, keys, open_store, values
from helpers.methods import DEFAULT, SUPERVISED, options
from helpers.tiny import tiny_data, tiny_sam
from helpers.training import CPU, Stop, differing, run, stop_at, weights
from lesionsam.config.load import default_values, unflatten, validate
from lesionsam.data import activation_store
from lesionsam.data.activation_store import SPACE, SUFFIX, TOTAL, Budget, Store, checksum, space_folders
from lesionsam.data.activations import Activations, image_key
from lesionsam.data.augment import Augmentation
from lesionsam.data.dataset import LesionDataset
from lesionsam.data.loader import Loader
from lesionsam.evaluation.selection import quick_evaluate
from lesionsam.experiment.caches import computing, open_caches
from lesionsam.methods.base import Method
from lesionsam.methods.contrastive import Contrastive
from lesionsam.methods.supervised import Supervised
from lesionsam.models.identity import frozen_identity
from lesionsam.models.prefix import num_frozen_blocks
from lesionsam.models.sam import Sam
from lesionsam.models.trainable import select_trainable
from lesionsam.types import Batch

FLIPS = Augmentation(flips=True)
SIZE = 4 * 4 * 32 * 4 + TOTAL.size  # bytes of an entry of `helpers.activations`


def config(**changes: Any) -> Any:
    """The default parameters with some dotted keys (written with __) changed."""
    values = {key.replace("__", "."): value for key, value in changes.items()}
    return validate(unflatten(values, default_values()))


def contrastive(last_k: int = 1, gamma: float = 0.1) -> Contrastive:
    sam, reference = tiny_sam(sharpness=20), tiny_sam(sharpness=20).requires_grad_(False)
    select_trainable(sam, encoder="blocks", unfreeze_last_k=last_k, train_decoder=True)
    torch.manual_seed(0)
    settings = options(
        DEFAULT,
        entropy_thresh=0.6931,
        contrast=0.5,
        distil=gamma,
        target="fused",
        teacher_weight=0.3,
        head_norm="batch",
    )
    return Contrastive(sam, reference if gamma else None, settings)


def decoder_only() -> Method:
    sam = tiny_sam(sharpness=20)
    select_trainable(sam, encoder="none", unfreeze_last_k=0, train_decoder=True)
    return Supervised(sam, SUPERVISED)


def sam_of(method: Method) -> Sam:
    sam = getattr(method, "sam", None)
    assert isinstance(sam, Sam)
    return sam


class Trained:
    """One training through the cache: its weights, its figures and the cache's lines."""

    def __init__(
        self,
        method: Method,
        data: LesionDataset,
        folder: Path,
        root: Path | None,
        *,
        workers: int = 0,
        settings: Any = None,
        **changes: Any,
    ) -> None:
        self.lines: list[str] = []
        self.rows: list[Any] = []
        settings = settings or config(train__precision=changes.get("precision", "fp32"))
        with open_caches(settings, root, sam_of(method), method, CPU, self.lines.append) as self.caches:
            train = Loader(data, device=CPU, num_workers=workers, cache=self.caches.train)
            dev = Loader(data, device=CPU, num_workers=workers, cache=self.caches.dev)

            def evaluate(epoch: int) -> dict[str, float]:
                scores = quick_evaluate(
                    sam_of(method), dev, prompts=["ring", "centre", "box"], seed=0, batch_size=3, device=CPU
                )
                return scores

            log = changes.pop("log", lambda values, step: self.rows.append((step, dict(values))))
            run(method, train, folder, evaluate=evaluate, log=log, **changes)  # type: ignore[arg-type]
        self.weights = weights(method)

    @property
    def share(self) -> float:
        assert self.caches.train is not None
        return self.caches.train.hits / self.caches.train.looked_up


@pytest.fixture(scope="module")
def data() -> LesionDataset:
    return tiny_data(8)


# ---- equal results ---------------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[], Method]] = {
    "last block, reference": contrastive,
    "last block": lambda: contrastive(gamma=0.0),
    "whole encoder, reference": lambda: contrastive(last_k=0),
    "decoder": decoder_only,
}


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp32") for name in METHODS), ("last block, reference", "bf16")]
)
def test_a_run_is_the_same_with_and_without_the_cache(
    data: LesionDataset, tmp_path: Path, name: str, precision: str
) -> None:
    """To the last bit, in every epoch's figures too: no cache, one being filled, and a full one with threads."""
    plain = Trained(METHODS[name](), data, tmp_path / "plain", None, precision=precision)
    filling = Trained(METHODS[name](), data, tmp_path / "filling", tmp_path / "cache", precision=precision)
    warm = Trained(METHODS[name](), data, tmp_path / "warm", tmp_path / "cache", precision=precision, workers=2)
    assert 0 < filling.share < 1
    assert warm.share == 1
    for other in (filling, warm):
        assert differing(other.weights, plain.weights) == []
        assert other.rows == plain.rows


def test_threads_alone_change_nothing(data: LesionDataset, tmp_path: Path) -> None:
    plain = Trained(contrastive(), data, tmp_path / "plain", None)
    threaded = Trained(contrastive(), data, tmp_path / "threads", None, workers=2)
    assert differing(threaded.weights, plain.weights) == []
    assert threaded.rows == plain.rows


def test_a_killed_run_resumes_on_what_it_had_filled(data: LesionDataset, tmp_path: Path) -> None:
    plain = Trained(contrastive(), data, tmp_path / "plain", None)
    with pytest.raises(Stop):
        Trained(
            contrastive(),
            data,
            tmp_path / "killed",
            tmp_path / "cache",
            log=stop_at(lambda values, step: values.get("epoch") == 2),
        )
    resumed = Trained(contrastive(), data, tmp_path / "killed", tmp_path / "cache")
    assert differing(resumed.weights, plain.weights) == []
    assert resumed.rows == plain.rows[-len(resumed.rows) :]
    assert resumed.share > 0.5, "the epoch that is done again finds all it made before"


def test_every_orientation_is_an_entry_of_its_own(data: LesionDataset, tmp_path: Path) -> None:
    trained = Trained(contrastive(gamma=0.0), data, tmp_path / "run", tmp_path / "cache")
    store = Store(tmp_path / "cache", trained.caches.train.stores["prefix"].space, Budget(tmp_path, 0, print))  # type: ignore[union-attr]
    batches = [batch for epoch in range(3) for batch in data.epoch(4, seed=0, epoch=epoch, augmentation=FLIPS)]
    shown = {key for batch in [*batches, *data.batches(8)] for key in keys_of(batch)}
    assert set(store.folder.glob(f"*{SUFFIX}")) == {store.path(key) for key in shown}, (
        "those of training, and as they are for the evaluation, which shares the space"
    )
    assert len(shown) > 2 * 8
    store.close()


def test_trials_share_what_has_the_same_boundary_and_every_trial_the_reference(
    data: LesionDataset, tmp_path: Path
) -> None:
    sweep = [
        Trained(contrastive(last_k=k, gamma=g), data, tmp_path / f"{n}", tmp_path / "cache", epochs=1)
        for n, (k, g) in enumerate([(1, 0.1), (1, 0.3), (0, 0.1), (1, 0.0), (2, 0.1)])
    ]
    assert [trial.share for trial in sweep] == [0, 1, 1, 1, 1]
    assert len(space_folders(tmp_path / "cache")) == 2, "one block, and features; K = all and K = 2 have no prefix"


def test_an_image_in_another_set_is_the_same_image(data: LesionDataset, tmp_path: Path) -> None:
    Trained(contrastive(), data, tmp_path / "all", tmp_path / "cache", epochs=1, augmentation=Augmentation())
    part = LesionDataset(
        data.samples[3:7],
        replace(
            data.frames,
            **{
                name: getattr(data.frames, name)[3:7]
                for name in ("images", "priors", "masks", "sizes", "big_boxes", "small_boxes", "others")
            },
        ),
        with_masks=True,
    )
    assert (
        Trained(contrastive(), part, tmp_path / "part", tmp_path / "cache", epochs=1, augmentation=Augmentation()).share
        == 1
    )


def test_where_nothing_is_frozen_nothing_is_kept(data: LesionDataset, tmp_path: Path) -> None:
    trained = Trained(contrastive(last_k=0, gamma=0.0), data, tmp_path / "run", tmp_path / "cache", epochs=1)
    off = Trained(
        contrastive(), data, tmp_path / "off", tmp_path / "cache", epochs=1, settings=config(runtime__cache_gb=0.0)
    )
    assert (trained.caches.train, off.caches.train) == (None, None)
    assert not (tmp_path / "cache").exists()


# ---- what entries depend on ------------------------------------------------------------------------------------------


def test_identity_follows_weights_structure_and_boundary() -> None:
    sam = tiny_sam()
    before = frozen_identity(sam, 1)
    assert frozen_identity(tiny_sam(), 1) == before
    assert frozen_identity(sam, 2) != before
    with torch.no_grad():
        sam.image_encoder.blocks[1].mlp.lin1.weight[0, 0] += 1e-3
        sam.mask_decoder.iou_token.weight.add_(1)
    assert frozen_identity(sam, 1) == before, "what lies behind the boundary is not in it"
    assert frozen_identity(sam, 2) != frozen_identity(tiny_sam(), 2)
    sam.image_encoder.blocks[0].attn.num_heads = 4
    assert frozen_identity(sam, 1) != before
    turned = tiny_sam()
    with torch.no_grad():
        turned.image_encoder.get_parameter("pos_embed")[0, 0, 0, 0] += 1e-3
    assert frozen_identity(turned, 1) != before


def test_a_changed_checkpoint_finds_nothing_of_the_old_one(data: LesionDataset, tmp_path: Path) -> None:
    def with_other_weights() -> Contrastive:
        method = contrastive()
        for sam in (method.sam, method.reference):
            assert sam is not None
            with torch.no_grad():
                sam.image_encoder.blocks[0].mlp.lin1.weight.mul_(1.5)
        return method

    Trained(contrastive(), data, tmp_path / "old", tmp_path / "cache", epochs=1)
    changed = Trained(with_other_weights(), data, tmp_path / "new", tmp_path / "cache", epochs=1)
    plain = Trained(with_other_weights(), data, tmp_path / "plain", None, epochs=1)
    assert changed.share == 0
    assert differing(changed.weights, plain.weights) == []


def keys_of(batch: Batch) -> list[bytes]:
    return [image_key(image, size) for image, size in zip(batch.images, batch.sizes, strict=True)]


def test_an_image_is_known_by_its_pixels_and_its_part() -> None:
    one, other = tiny_data(3).batch([1, 1], [0, 8]), tiny_data(3).batch([1, 2])
    assert keys_of(one)[0] == keys_of(other)[0]
    turned = {key for k in range(2) for key in keys_of(tiny_data(3).batch([k] * 16, range(16)))}
    assert len(turned) == 32, "every orientation, as it is and widened"
    before = keys_of(one)[0]
    one.images[0, 0, 3, 3] ^= 1
    assert keys_of(one)[0] != before
    one.images[0, 0, 3, 3] ^= 1
    one.sizes[0, 0] -= 1
    assert keys_of(one)[0] != before


# ---- files that went wrong -------------------------------------------------------------------------------------------


def test_what_is_written_is_read_by_another_process_and_while_it_is_written(tmp_path: Path) -> None:
    writer = open_store(tmp_path)
    reader = open_store(tmp_path)
    assert found(reader) == [False] * 6
    writer.write(keys(4), values(6)[:4])
    reader.refresh()
    assert found(reader) == [True] * 4 + [False] * 2
    assert (reader.shape, reader.dtype, len(reader)) == (SHAPE, torch.float32, 4)
    reader.write(keys(6), values(6))  # four of them are there
    writer.refresh()
    assert found(writer) == [True] * 6
    assert {path.stat().st_size for path in writer.folder.glob(f"*{SUFFIX}")} == {writer.entry_bytes} == {SIZE}


def test_half_precision_and_other_types_come_back_as_they_were(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        store, wanted = open_store(tmp_path, dtype=str(dtype)), values(2).to(dtype)
        store.write(keys(2), wanted)
        again, into = open_store(tmp_path, dtype=str(dtype)), torch.empty(SHAPE, dtype=dtype)
        assert again.dtype == dtype
        assert again.read(keys(2)[1], into)
        assert torch.equal(into, wanted[1])


@pytest.mark.parametrize("place", [0, 1000, SIZE - TOTAL.size - 1, SIZE - 1])
def test_a_flipped_bit_is_a_miss_and_is_built_anew(tmp_path: Path, place: int) -> None:
    filled(tmp_path)
    lines: list[str] = []
    store = open_store(tmp_path, lines=lines)
    path = store.path(keys(6)[2])
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    assert found(store) == [True, True, False, True, True, True]
    assert len(lines) == 1
    assert "is damaged; what is bad in it is computed again" in lines[0]
    store.write(keys(6), values(6))
    assert found(store) == [True] * 6
    store.close()
    assert found(open_store(tmp_path)) == [True] * 6, "and stays so"


@pytest.mark.parametrize("left", [0, 1, 2048, SIZE - 1])
def test_a_file_cut_short_costs_its_entry_alone(tmp_path: Path, left: int) -> None:
    filled(tmp_path)
    store = open_store(tmp_path)
    os.truncate(store.path(keys(6)[3]), left)
    assert found(store) == [True] * 3 + [False] + [True] * 2
    store.write(keys(6), values(6))
    assert found(store) == [True] * 6
    store.close()
    assert found(open_store(tmp_path)) == [True] * 6


@pytest.mark.parametrize("note", ["", "{", "[]", '{"space": {}}', '{"space": {"part": "another"}}'])
def test_a_description_that_does_not_fit_starts_the_space_anew(tmp_path: Path, note: str) -> None:
    folder = filled(tmp_path)
    (folder / SPACE).write_text(note)
    store = open_store(tmp_path)
    assert found(store) == [False] * 6
    store.write(keys(6), values(6))
    assert found(store) == [True] * 6


def test_a_run_on_a_damaged_cache_is_the_same_run(data: LesionDataset, tmp_path: Path) -> None:
    plain = Trained(contrastive(), data, tmp_path / "plain", None)
    Trained(contrastive(), data, tmp_path / "filling", tmp_path / "cache")
    rng = np.random.default_rng(0)
    for folder in space_folders(tmp_path / "cache"):
        for path in sorted(folder.glob(f"*{SUFFIX}"))[::2]:
            content = np.frombuffer(path.read_bytes(), np.uint8).copy()
            content[rng.integers(0, len(content))] ^= 0x40
            path.write_bytes(content[: len(content) - rng.integers(0, 2)].tobytes())
    damaged = Trained(contrastive(), data, tmp_path / "damaged", tmp_path / "cache")
    assert 0 < damaged.share < 1
    assert any("is damaged" in line for line in damaged.lines)
    assert differing(damaged.weights, plain.weights) == []
    assert Trained(contrastive(), data, tmp_path / "after", tmp_path / "cache").share == 1, "and it is whole again"


def test_checksum_sees_words_pages_and_cuts() -> None:
    data = np.random.default_rng(0).integers(0, 256, 3 * 4096 + 100, dtype=np.uint8)
    before = checksum(data)
    for place in (0, 4095, 4096, 3 * 4096 + 50, len(data) - 1):
        changed = data.copy()
        changed[place] ^= 1
        assert checksum(changed) != before
    swapped = np.concatenate([data[4096:8192], data[:4096], data[8192:]])
    blank = data.copy()
    blank[4096:8192] = 0
    assert before not in (checksum(swapped), checksum(blank), checksum(data[:-1]), checksum(data[:4096]))


WRITER = """
import sys, torch
from lesionsam.data.activation_store import Budget, Store
from pathlib import Path
root, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = Store(root, {"part": "a part"}, Budget(root, 10**9, print))
print("open", flush=True)
for k in range(first, first + count):
    store.write([bytes([k % 256, k // 256]) + bytes(14)], torch.full((1, 64, 1024), float(k)))
"""


def writer(root: Path, first: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(first), str(count)], text=True, stdout=subprocess.PIPE
    )


def test_writers_that_are_killed_or_write_at_once_leave_only_whole_entries(tmp_path: Path) -> None:
    processes = [writer(tmp_path, 0, 3000), writer(tmp_path, 1500, 1500)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    time.sleep(0.3)
    for process in processes:
        process.kill()
        process.communicate()
    store, into = open_store(tmp_path), torch.empty(64, 1024)
    there = len(store)
    assert there > 10
    for path in store.folder.glob(f"*{SUFFIX}"):
        key = bytes.fromhex(path.stem)
        assert store.read(key, into)
        assert bool((into == key[0] + 256 * key[1]).all())
    store.write([b"x" * 16], torch.zeros(1, 64, 1024))
    assert len(store) == there + 1
    assert store.read(b"x" * 16, into)


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_the_space_unused_longest_goes_first_and_one_in_use_never(tmp_path: Path) -> None:
    old, older = filled(tmp_path, part="old"), filled(tmp_path, part="older")
    os.utime(old, (2000, 2000))
    os.utime(older, (1000, 1000))
    lines: list[str] = []
    used = open_store(tmp_path, part="used")
    used.write(keys(6), values(6))
    os.utime(used.folder, (1, 1))
    room = activation_store.stored_bytes(old) * 3 + 10
    store = open_store(tmp_path, limit=room, lines=lines, part="new")
    store.write(keys(6), values(6))
    assert found(store) == [True] * 6
    assert (older.exists(), old.exists(), used.folder.exists()) == (False, True, True)
    store.write(keys(12), values(12))
    assert not old.exists()
    store.write(keys(40), values(40))
    assert used.folder.exists(), "in use"
    total = sum(activation_store.stored_bytes(folder) for folder in space_folders(tmp_path))
    assert room - 2 * SIZE < total <= room + 300, "space.json"
    assert lines == [
        f"activation cache: {tmp_path} holds as much as it may, 0.0 GB (runtime.cache_gb); what is not in "
        "it is computed in every epoch"
    ]
    used.close()
    store.write(keys(40), values(40))
    assert not used.folder.exists()


def test_a_cache_too_small_for_a_run_serves_what_fits(data: LesionDataset, tmp_path: Path) -> None:
    plain = Trained(contrastive(), data, tmp_path / "plain", None)
    small = config(runtime__cache_gb=60_000 / GB)
    runs = [Trained(contrastive(), data, tmp_path / f"{k}", tmp_path / "cache", settings=small) for k in range(2)]
    assert 0 < runs[1].share < 0.9
    assert all(differing(r.weights, plain.weights) == [] for r in runs)
    assert all(any("holds as much as it may" in line for line in r.lines) for r in runs)


@pytest.fixture
def files_of_at_most() -> Iterator[Callable[[int], None]]:
    """Set the largest file that this process may write; the kernel then refuses as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_cache_with_a_line_and_not_the_training(
    data: LesionDataset, tmp_path: Path, files_of_at_most: Callable[[int], None]
) -> None:
    lines: list[str] = []
    store = open_store(tmp_path / "store", lines=lines)
    store.write(keys(1), values(6)[:1])
    files_of_at_most(SIZE // 2)  # in the middle of the second entry
    store.write(keys(6), values(6))
    files_of_at_most(resource.RLIM_INFINITY if resource.getrlimit(resource.RLIMIT_FSIZE)[1] < 0 else 1 << 40)
    assert not store.writable
    assert lines == [
        f"activation cache: {store.folder} cannot be written (the disk is full); training goes on without "
        "it, or free some space"
    ]
    assert found(store) == [True, False, False, False, False, False], "what is there is still used"
    store.write(keys(6), values(6))
    assert len(store) == 1, "and nothing more is tried"
    assert not [*store.folder.glob("*.tmp")]
    store.close()
    again = open_store(tmp_path / "store")
    again.write(keys(6), values(6))
    assert found(again) == [True] * 6


def test_a_disk_without_room_to_spare_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(activation_store, "RESERVE", shutil.disk_usage(tmp_path).free + 10**9)
    store = open_store(tmp_path, lines=lines)
    store.write(keys(6), values(6))
    assert found(store) == [False] * 6
    assert lines == [
        f"activation cache: the disk of {tmp_path} is nearly full; what is not in it is computed in every epoch"
    ]


def test_a_folder_that_cannot_be_made_is_no_obstacle(data: LesionDataset, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    plain = Trained(contrastive(), data, tmp_path / "plain", None, epochs=1)
    trained = Trained(contrastive(), data, tmp_path / "run", tmp_path / "cache", epochs=1)
    assert any("training goes on without it" in line for line in trained.lines)
    assert differing(trained.weights, plain.weights) == []


# ---- what is computed ------------------------------------------------------------------------------------------------


def activations(method: Contrastive, root: Path) -> Activations:
    stores = {name: open_store(root, part=name) for name in ("prefix", "reference")}
    return Activations(stores, computing(method.sam, method.reference, CPU, "fp32"), device=CPU)


def test_only_what_is_missing_is_computed_and_prefix_and_reference_share_a_pass(
    data: LesionDataset, tmp_path: Path
) -> None:
    method, asked = contrastive(), []
    cache = activations(method, tmp_path)
    compute = cache.compute

    def spy(batch: Any, names: Any) -> Any:
        asked.append((batch.ids, sorted(names)))
        return compute(batch, names)

    cache.compute = spy

    def look(rows: list[int], names: tuple[str, ...]) -> Any:
        batch = data.batch(rows)
        found = cache.fetch(batch, keys_of(batch))
        return cache.complete(replace(found, rows={name: found.rows[name] for name in names}), batch)

    look([0, 1], ("prefix",))
    cache.flush()
    mixed = look([2, 1, 0], ("prefix", "reference"))
    cache.flush()
    look([2, 1, 0], ("prefix", "reference"))
    assert asked == [
        (("image0/0", "image1/0"), ["prefix"]),
        (("image2/0",), ["prefix", "reference"]),
        (("image1/0", "image0/0"), ["reference"]),
    ]
    whole = compute(data.batch([2, 1, 0]), ("prefix", "reference"))
    assert torch.equal(mixed.prefix, whole["prefix"])
    assert torch.equal(mixed.reference, whole["reference"])
    cache.close()


def test_a_batch_of_unknown_orientation_is_left_to_the_method(data: LesionDataset, tmp_path: Path) -> None:
    method = contrastive()
    cache = activations(method, tmp_path)
    loader = Loader(data, device=CPU, cache=cache)
    plain = data.packed
    data_batch = lambda *part: replace(plain(*part), orientations=None)  # noqa: E731
    loader.data = type("Data", (), {"packed": staticmethod(data_batch), "plan_in_order": data.plan_in_order})()  # type: ignore[assignment]
    assert all(batch.prefix is None for batch in loader.batches(4))


# ---- the loader ------------------------------------------------------------------------------------------------------


def test_threads_work_ahead_in_order_and_end_with_the_consumer(data: LesionDataset) -> None:
    from lesionsam.data.loader import ahead

    made: list[int] = []

    def make(k: Any) -> int:
        time.sleep(0.002 * (7 - k % 7))
        made.append(k)
        if k == 30:
            raise OSError("no more")
        return k

    parts: Any = range(40)
    taken: list[int] = []
    with pytest.raises(OSError, match="no more"):
        taken.extend(ahead(make, parts, 3))
    assert taken == list(range(30)), "in order up to the error"
    made.clear()
    source = ahead(make, parts, 3)
    next(source)
    source.close()  # type: ignore[attr-defined]
    assert len(made) < 20, "nobody works on for nobody"
    assert multiprocessing.active_children() == []


def test_orientations_and_padding_come_with_every_batch(data: LesionDataset) -> None:
    part = data.plan(4, seed=0, epoch=1, augmentation=FLIPS)[0]
    batch = next(iter(Loader(data, device=CPU, num_workers=1).epoch(4, seed=0, epoch=1, augmentation=FLIPS)))
    assert batch.orientations is not None
    assert batch.orientations.tolist() == part.variants.tolist()  # type: ignore[union-attr]
    assert num_frozen_blocks(contrastive().sam) == 1

"""Step download: parameters -> images and masks of the chosen source, and data/raw/index.csv."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lesionsam.config.load import Config
from lesionsam.config.schema import CocoData, FolderData, SyntheticData
from lesionsam.data.index import Row, check_rows, summary, write_index
from lesionsam.data.sources.coco import index_coco
from lesionsam.data.sources.folder import index_folder
from lesionsam.data.sources.isic import fetch_isic
from lesionsam.data.sources.synthetic import write_dataset
from lesionsam.pipeline.paths import INDEX, LOCK, RAW, archives_folder
from lesionsam.utils.processes import stage_lock
from lesionsam.utils.progress import say


def prepare_data(config: Config) -> None:
    """Write data/raw and its index; a failure leaves the data of before."""
    with stage_lock("download"), replacing(RAW):
        rows = _fetch(config)
        check_rows(rows, f"data.source {config.data.source}")
        write_index(INDEX, rows)
    say(f"{config.data.source}: {summary(rows)}")


def _fetch(config: Config) -> list[Row]:
    data, folder = config.data, Path(config.inputs.folder)
    if isinstance(data, SyntheticData):
        counts = {"train": data.num_train, "dev": data.num_dev, "test": data.num_test}
        return write_dataset(RAW, seed=data.seed, counts=counts, max_side=data.max_side)
    if isinstance(data, FolderData):
        return index_folder(
            folder,
            dev_fraction=data.dev_fraction,
            test_split=data.test_split,
            threshold_masks=data.threshold_masks,
            masks_out=RAW / "masks",
        )
    if isinstance(data, CocoData):
        return index_coco(
            folder,
            annotations=data.annotations,
            images=data.images,
            categories=data.categories,
            dev_fraction=data.dev_fraction,
            test_split=data.test_split,
            raw=RAW,
        )
    return fetch_isic(
        data.source,
        subset=data.subset,
        dev_fraction=data.dev_fraction,
        base_url=data.base_url,
        raw=RAW,
        archives=archives_folder(),
        lock_path=LOCK,
    )


@contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Make a folder anew while the block runs; the one of before goes once the new one is whole.

    It waits beside, under another name, as the index names files by the folder's own. A failure puts it back; after a
    kill, the next call does so where it fails too.
    """
    before = folder.with_name(f".{folder.name}.before")
    if (folder / INDEX.name).exists():  # whole: else a kill left a part, and what was whole still waits
        shutil.rmtree(before, ignore_errors=True)
        os.replace(folder, before)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if before.exists():
            os.replace(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)

"""Stage download: parameters -> images and masks of the chosen source, and data/raw/index.csv."""

from __future__ import annotations

import shutil
from pathlib import Path

from lesionsam.config.load import load_config
from lesionsam.config.schema import CocoData, FolderData, SyntheticData
from lesionsam.data.index import check_rows, summary, write_index
from lesionsam.data.sources.coco import index_coco
from lesionsam.data.sources.folder import index_folder
from lesionsam.data.sources.isic import fetch_isic
from lesionsam.data.sources.synthetic import write_dataset
from lesionsam.errors import run_guarded
from lesionsam.models.published import check_image_size
from lesionsam.utils.processes import stage_lock
from lesionsam.utils.progress import say

RAW, ARCHIVES, LOCK = Path("data/raw"), Path(".archives"), Path("archives.lock.json")


def main() -> None:
    """Write the index last: while it is missing, the stage has not ended."""
    config = load_config()
    data = config.data
    check_image_size(config.model.name, config.model.image_size)  # before anything is downloaded
    if RAW.exists():
        shutil.rmtree(RAW)
    RAW.mkdir(parents=True)
    if isinstance(data, SyntheticData):
        counts = {"train": data.num_train, "dev": data.num_dev, "test": data.num_test}
        rows = write_dataset(RAW, seed=data.seed, counts=counts, max_side=data.max_side)
    elif isinstance(data, FolderData):
        rows = index_folder(
            Path(config.inputs.folder),
            dev_fraction=data.dev_fraction,
            test_split=data.test_split,
            threshold_masks=data.threshold_masks,
            masks_out=RAW / "masks",
        )
    elif isinstance(data, CocoData):
        rows = index_coco(
            Path(config.inputs.folder),
            annotations=data.annotations,
            images=data.images,
            categories=data.categories,
            dev_fraction=data.dev_fraction,
            test_split=data.test_split,
            raw=RAW,
        )
    else:
        rows = fetch_isic(
            data.source,
            subset=data.subset,
            dev_fraction=data.dev_fraction,
            base_url=data.base_url,
            raw=RAW,
            archives=ARCHIVES,
            lock_path=LOCK,
        )
    check_rows(rows, f"data.source {data.source}")
    write_index(RAW / "index.csv", rows)
    say(f"{data.source}: {summary(rows)}")


if __name__ == "__main__":
    run_guarded(stage_lock("download")(main))

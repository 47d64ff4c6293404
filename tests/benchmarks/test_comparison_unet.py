"""The comparison's units whole, on a few generated pairs: the U-Net from scratch beside a SAM row."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from comparison.unet import Segmenter, build_unet, evaluate_unet, logits_of
from comparison.units import PROMPTS, UNET, Row, check_pairs, is_finished, run_unit, unit_path
from helpers.pairs import BASE, write_pairs
from helpers.tiny import SIDE, tiny_data
from lesionsam.config.load import with_values
from lesionsam.data.index import read_index
from lesionsam.data.sources.folder import index_folder
from lesionsam.errors import UserError
from lesionsam.evaluation.columns import ROW_COLUMNS
from lesionsam.types import Frame, Sample
from lesionsam.utils.files import sha256_file


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 3 test pairs of generated images, and their index."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, train=12, test=3, dev_fraction=0.25)
    return folder


@pytest.mark.parametrize(
    "row",
    [
        Row("U-Net", {"train.epochs": 2, "train.lr_decoder": 1e-3}, preset="supervised", network=UNET),
        Row("supervised", preset="supervised"),
    ],
)
def test_a_unit_trains_selects_and_reads_the_test_split(row: Row, pairs: Path, root: Path, tmp_path: Path) -> None:
    def figures(out: Path) -> pd.DataFrame:
        run_unit(BASE, row, 1, read_index(pairs / "index.csv"), root / BASE.model.checkpoint, out)
        return pd.read_csv(unit_path(out, row, 1))

    found = figures(tmp_path)
    assert set(found["prompt"]) == ({"none", "box", "box+core"} if row.network == UNET else set(PROMPTS))
    assert set(found["image_id"]) == {"lesion12", "lesion13", "lesion14"}
    assert set(found.columns) <= set(ROW_COLUMNS)
    assert found["iou"].between(0, 1).all()
    notes = json.loads(unit_path(tmp_path, row, 1).with_suffix(".json").read_text())
    assert 0 < notes["dev_objective"] <= 1
    assert 1 <= notes["best_epoch"] <= (2 if row.network == UNET else 1)
    assert notes["trained_parameters"] > 1e6 if row.network == UNET else notes["trained_parameters"] < 1.2e6
    assert not (tmp_path / "mlflow.db").exists()
    if row.network == UNET:
        pd.testing.assert_frame_equal(figures(tmp_path / "again"), found)


def test_it_learns_what_it_is_shown_and_padding_teaches_nothing() -> None:
    method = Segmenter(build_unet(0))
    optimizer = torch.optim.AdamW(method.model.parameters(), lr=1e-3)
    batch = next(iter(tiny_data(6).batches(6)))
    values = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = method.losses(batch, torch.Generator())[0]["mask"].value
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.4 * values[0]
    method.model.eval()
    assert batch.masks is not None
    torn = replace(batch, masks=torch.where(batch.valid, batch.masks, 1 - batch.masks))
    expected, got = (method.losses(one, torch.Generator())[0]["mask"].value.item() for one in (batch, torn))
    assert got == pytest.approx(expected, rel=1e-6)
    unknown = replace(batch, masks=torch.full_like(batch.masks, torch.nan))
    assert method.losses(unknown, torch.Generator())[0]["mask"].value.item() == 0


def test_the_start_is_the_seed_s() -> None:
    first, same, other = (torch.cat([p.flatten() for p in build_unet(seed).parameters()]) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_under_a_box_its_mask_is_cut_to_the_box() -> None:
    network = torch.nn.Conv2d(3, 1, 1)  # a lesion wherever an image is
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.ones_(network.bias.data)
    data = tiny_data(3)
    images = {s.image_id: data.frames.images[k, : s.height, : s.width] for k, s in enumerate(data.samples)}
    truths = {s.image_id: data.frames.masks[k, : s.height, : s.width] > 0 for k, s in enumerate(data.samples)}

    def image(sample: Sample) -> np.ndarray:
        return images[sample.image_id]

    found = evaluate_unet(
        network, data.samples, image, lambda s: truths[s.image_id], frame=Frame(SIDE), batch_size=2, model="m", run="0"
    ).set_index(["image_id", "prompt"])
    for sample in data.samples:
        x0, y0, x1, y1 = sample.big_box
        whole, cut = (found.loc[(sample.image_id, prompt)] for prompt in ("none", "box"))
        assert whole["predicted_share"] == 1
        assert cut["leakage"] == 0
        area = (np.ceil(x1 - 0.5) - np.ceil(x0 - 0.5)) * (np.ceil(y1 - 0.5) - np.ceil(y0 - 0.5))
        assert cut["predicted_share"] == pytest.approx(area / (sample.width * sample.height))
        assert cut["iou"] == pytest.approx(truths[sample.image_id].sum() / area)
        assert found.loc[(sample.image_id, "box+core"), "iou"] == cut["iou"]


def test_images_of_a_batch_are_answered_as_one_by_one() -> None:
    network = build_unet(0).eval()
    batch = next(iter(tiny_data(3).batches(3)))
    answer = partial(logits_of, network)
    with torch.inference_mode():
        together = answer(batch.images, batch.sizes)
        single = torch.cat([answer(batch.images[k : k + 1], batch.sizes[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)


def test_figures_of_other_settings_weights_or_pairs_are_refused(pairs: Path, root: Path, tmp_path: Path) -> None:
    """A folder of results holds one comparison; what is finished there counts for no other."""
    row, weights = Row("zero-shot", trains=False), root / BASE.model.checkpoint
    digest = sha256_file(weights)
    assert not is_finished(tmp_path, BASE, row, 0, digest)
    run_unit(BASE, row, 0, read_index(pairs / "index.csv"), weights, tmp_path)
    assert is_finished(tmp_path, BASE, row, 0, digest)
    longer = with_values(BASE, {"train.epochs": BASE.train.epochs + 1})
    for base, other in ((longer, digest), (BASE, digest[::-1])):
        with pytest.raises(UserError, match=r"zero-shot\.seed0\.csv: figures of other settings or weights"):
            is_finished(tmp_path, base, row, 0, other)
    rows = index_folder(pairs, dev_fraction=0.25, test_split="val")
    for _ in range(2):
        check_pairs(tmp_path / "index.csv", rows)
    assert read_index(tmp_path / "index.csv") == read_index(pairs / "index.csv")
    with pytest.raises(UserError, match="lists other pairs than the folder holds, the first is 'lesion0'"):
        check_pairs(tmp_path / "index.csv", [each for each in rows if each["image_id"] != "lesion0"])

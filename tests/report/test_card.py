"""The model card of a run: made from real result tables, and refused where the run has none."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

from helpers.tiny import tiny_sam
from lesionsam.config.load import default_text
from lesionsam.errors import UserError
from lesionsam.evaluation.columns import Evaluation
from lesionsam.evaluation.statistics import METRICS
from lesionsam.evaluation.tables import write_results
from lesionsam.models.checkpoint import save_sam
from lesionsam.report.card import build_card, describe_prompts
from lesionsam.utils.files import sha256_file


def evaluation(*, masks: bool) -> Evaluation:
    """Twelve lesions of three sizes, two models, two prompts; small ones score worse."""
    rng, rows = np.random.default_rng(0), []
    for model, level in (("zero-shot", 0.6), ("adapted", 0.7)):
        for prompt in ("centre", "box"):
            for k in range(12):
                share = (0.02, 0.1, 0.4)[k % 3]
                score = level + 0.15 * (share > 0.05) + rng.uniform(0, 0.05)
                rows.append(
                    {
                        "model": model,
                        "run": "0",
                        "prompt": prompt,
                        "image_id": f"i{k}",
                        "lesion_id": "0",
                        "lesion_share": share if masks else np.nan,
                        **dict.fromkeys(METRICS, score if masks else np.nan),
                        "consistency": 0.8,
                        "core_coverage": 0.9,
                        "leakage": 0.1,
                        "entropy": 0.2,
                        "predicted_iou": 0.7,
                    }
                )
    columns = ["model", "prompt", "region", "bin", "count", "probability_sum", "truth_sum", "squared_error"]
    jitter = pd.DataFrame(columns=["model", "run", "prompt", "share", "image_id", "lesion_id", "iou"])
    return Evaluation(pd.DataFrame(rows), pd.DataFrame(columns=columns), jitter)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folders: results with masks, a training with weights and parameters."""
    training = tmp_path / "training"
    save_sam(tiny_sam(), training / "best.safetensors", name="compact")
    (training / "params.yaml").write_text(default_text())
    write_results(tmp_path / "results", evaluation(masks=True), num_bootstrap=50, confidence=0.95, settings={})
    return tmp_path


def card(run: Path, **changes: dict) -> str:
    """The card's text, some sections of params.yaml changed."""
    yaml = YAML()
    params = yaml.load(default_text())
    for section, values in changes.items():
        params[section].update(values)
    with (run / "training" / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    build_card(run / "results", run / "training", run / "card.md", commit="abc123")
    return (run / "card.md").read_text()


def test_the_card_says_what_the_run_was(run: Path) -> None:
    text = card(run)
    for words in (
        "Not a medical device",
        sha256_file(run / "training" / "best.safetensors"),
        "commit abc123",
        "two boxes per lesion, **simulated** from the masks (10% to 20% too large)",
        "the whole encoder, the decoder, the prompt encoder",
        "no photograph, no patient",
        "12 images, 12 lesions",
        "They are no evidence about lesions",
        "run | not tracked",
    ):
        assert words in text, words
    assert "It is weakest on small lesions" in text
    assert "not drawn by the model itself |" in text
    table = (run / "results" / "table.md").read_text().strip()
    assert table in text, "the very figures of results/table.md"
    assert card(run) == text, "the same run gives the same card"


def test_an_answer_without_a_prompt_is_not_called_a_prompt() -> None:
    given = "box, ring, as measured below; these are not drawn by the model itself"
    assert describe_prompts(["box", "ring"]) == given
    assert (
        describe_prompts(["none", "box", "ring"])
        == f"{given}. Column `none`: no prompt, it looks for the lesion by itself"
    )


def test_every_kind_of_data_has_its_licence_and_its_people(run: Path) -> None:
    assert "CC-0" in card(run, data={"source": "isic2018"})
    text = card(run, data={"source": "isic2018"})
    assert "Skin tone: not known" in text
    assert "mostly fair skin" in text
    own = card(run, data={"source": "folder"}, boxes={"source": "csv"})
    assert "state them when you pass this model on" in own
    assert "two boxes per lesion, drawn by annotators; no mask" in own
    assert "true masks" in card(run, method={"name": "supervised"})
    assert "the last 2 encoder blocks" in card(run, model={"unfreeze_last_k": 2})
    assert "low-rank updates" in card(run, model={"encoder": "lora", "train_decoder": False})


def test_without_masks_nothing_is_claimed_about_size(run: Path) -> None:
    shutil.rmtree(run / "results")
    write_results(run / "results", evaluation(masks=False), num_bootstrap=50, confidence=0.95, settings={})
    text = card(run)
    assert "By lesion size: not known" in text
    assert "agreement between prompts" in text
    assert "by a score that needs no mask" in text


@pytest.mark.parametrize(
    ("missing", "stage"),
    [("results/summary.json", "evaluate"), ("training/best.safetensors", "train"), ("training/params.yaml", "train")],
)
def test_a_run_without_its_parts_is_one_line(run: Path, missing: str, stage: str) -> None:
    (run / missing).unlink()
    with pytest.raises(UserError, match=f"a model card needs it: run `dvc repro {stage}`"):
        build_card(run / "results", run / "training", run / "card.md")
    assert not (run / "card.md").exists()

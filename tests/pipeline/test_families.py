"""The whole chain with a tiny SAM 2 and a tiny SAM 3, from a folder of the Hub to the report; killed and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.families import write_hub_folder
from helpers.pipeline import kill_in_training, lesionsam, repository_copy, run, same_weights, set_parameter

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize("family", ["sam2", "sam3"])
def test_the_chain_runs_and_a_killed_training_resumes_bit_for_bit(family: str, tmp_path: Path) -> None:
    project = repository_copy(tmp_path / "project")
    write_hub_folder(family, project / "own" / "tiny")
    for key, value in {
        "model.name": "own/tiny",
        "model.checkpoint": "published",
        "model.unfreeze_last_k": 1,
        "train.epochs": 6,
    }.items():
        set_parameter(project, key, value)
    run(project, "dvc", "repro", "weights", "boxes")
    killed = Path(shutil.copytree(project, tmp_path / "killed", symlinks=True))
    run(project, "dvc", "repro")
    stated = json.loads((project / "models" / "pretrained" / "weights.json").read_text(encoding="utf-8"))
    assert (stated["name"], stated["source"]) == ("own/tiny", "own/tiny")
    scores = json.loads((project / "results" / "metrics.json").read_text(encoding="utf-8"))
    assert scores
    assert (project / "report" / "index.html").stat().st_size > 10_000
    assert "own/tiny" in (project / "report" / "model_card.md").read_text(encoding="utf-8")
    kill_in_training(killed, whole_group=True)
    run(killed, "dvc", "repro", "train")
    same_weights(project, killed)
    done = lesionsam(project, "export", "--format", "hf", "--num-images", "2")
    assert "exports/hf" in done.stdout

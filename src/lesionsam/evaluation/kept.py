"""The evaluation of the pretrained model, kept for the next call that would measure the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lesionsam.data.contents import samples_digest
from lesionsam.evaluation.columns import Evaluation
from lesionsam.evaluation.tables import read_csv
from lesionsam.types import Sample
from lesionsam.utils.code import MODEL_LIBRARIES, NO_RESULT, code_digest, library_versions
from lesionsam.utils.files import sha256_file

# What measures; whatever these import counts too.
MEASURES = ("evaluation.evaluate", "evaluation.baselines", "inference.lesion", "models.checkpoint", "data.contents")


def cache_key(samples: Sequence[Sample], weights: Sequence[Path], settings: Mapping[str, object]) -> str:
    """Return a digest of all that an evaluation depends on: lesions, contents of files, settings and code."""
    parts = (
        json.dumps(dict(settings), sort_keys=True, default=str),
        code_digest(*MEASURES, without=NO_RESULT),
        library_versions(*MODEL_LIBRARIES),
        *map(sha256_file, weights),
        samples_digest(samples),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def save_evaluation(folder: Path, evaluation: Evaluation, extra: Mapping[str, float]) -> None:
    """Keep an evaluation in a cache folder; complete or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for name in ("rows", "calibration", "jitter"):
        getattr(evaluation, name).to_csv(building / f"{name}.csv", index=False)
    (building / "extra.json").write_text(json.dumps(dict(extra)), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    building.replace(folder)


def open_evaluation(folder: Path) -> tuple[Evaluation, dict[str, float]] | None:
    """Return what `save_evaluation` kept, or None where there is nothing."""
    if not (folder / "extra.json").exists():
        return None
    frames = [read_csv(folder / f"{name}.csv") for name in ("rows", "calibration", "jitter")]
    return Evaluation(*frames), json.loads((folder / "extra.json").read_text(encoding="utf-8"))

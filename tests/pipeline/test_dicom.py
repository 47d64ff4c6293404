"""A training on one's own DICOM images, with MLflow: nothing that it writes holds patient data."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.dicom_files import secrets, write_dicom
from helpers.pipeline import lesionsam, repository_copy, run
from helpers.tiny import draw_lesion

pytestmark = pytest.mark.pipeline
NUM_IMAGES = {"train": 6, "val": 2, "test": 2}


def test_a_training_on_dicom_images_writes_no_patient_data(tmp_path: Path) -> None:
    project = repository_copy(tmp_path / "project")
    copied = set(project.rglob("*"))  # among them the file that invents the patient
    rng = np.random.default_rng(0)
    rows = ["image_id,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1"]
    for split, number in NUM_IMAGES.items():
        folder = project / "own" / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(number):
            lesion = draw_lesion(rng, 96, 128)
            write_dicom(folder / f"{split}{k}.dcm", lesion.image)
            rows.append(",".join([f"{split}{k}", *map(str, [*lesion.big.tolist(), *lesion.small.tolist()])]))
    (project / "own" / "boxes.csv").write_text("\n".join(rows) + "\n")
    lesionsam(project, "preset", "folder-csv")
    printed = ""
    for step in ("prepare", "train", "evaluate", "report"):
        done = lesionsam(project, step)
        printed += done.stdout + done.stderr
    program = (
        "import sys; sys.path.insert(0, 'src'); from pathlib import Path; from lesionsam.tracking.tracker import sync; "
        "sys.exit(sync(Path.cwd()))"
    )
    run(project, sys.executable, "-c", program)
    written = [path for path in set(project.rglob("*")) - copied if path.is_file() and path.suffix != ".dcm"]
    assert (project / "mlflow.db") in written
    assert (project / "report" / "index.html") in written
    for secret in secrets():
        assert secret.decode() not in printed
        assert not [str(path) for path in written if secret in path.read_bytes()]

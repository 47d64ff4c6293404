"""The whole chain under DVC, in a copy of the repository, on the tiny preset: every command as a user types it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from helpers.pipeline import WEIGHTS, kill_in_training, lesionsam, repository_copy, run, same_weights, set_parameter
from lesionsam.config.edit import edit_text
from lesionsam.config.load import parse_yaml, unflatten

pytestmark = pytest.mark.pipeline


def output_hashes(folder: Path) -> dict[str, str]:
    """Output path -> hash, as dvc.lock holds it."""
    lock = YAML(typ="safe").load((folder / "dvc.lock").read_text(encoding="utf-8"))
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}


def runs_of(folder: Path) -> list[dict[str, str]]:
    """Parameters and status of every MLflow run in the copy's store, once what a slow machine left waiting is sent."""
    program = (
        "import json, sys; sys.path.insert(0, 'src'); from pathlib import Path; "
        "from lesionsam.tracking.tracker import sync; "
        "from mlflow import MlflowClient; assert sync(Path.cwd()) == 0; c = MlflowClient(sys.argv[1]); "
        "ids = [e.experiment_id for e in c.search_experiments()]; "
        "print(json.dumps([{**r.data.params, 'status': r.info.status} for r in c.search_runs(ids)]))"
    )
    done = run(folder, sys.executable, "-W", "ignore", "-c", program, f"sqlite:///{folder / 'mlflow.db'}")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which `dvc repro` has run once; tests read it or copy it, never change it."""
    folder = repository_copy(tmp_path_factory.mktemp("finished"))
    run(folder, "dvc", "repro")
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A finished copy to change."""
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


def test_repro_makes_everything(finished: Path) -> None:
    outputs = [
        "data/raw/index.csv",
        "data/boxes.csv",
        "models/pretrained/weights.json",
        "models/adapted/run.json",
        "models/adapted/history.csv",
        "models/adapted/cost.json",
        "models/adapted/params.yaml",
        "results/per_image.csv",
        "results/table.csv",
        "results/table.md",
        "results/summary.json",
        "results/metrics.json",
        "report/index.html",
        "report/model_card.md",
        *(f"models/adapted/{name}" for name in WEIGHTS),
    ]
    missing = [name for name in outputs if not (finished / name).is_file() or not (finished / name).stat().st_size]
    assert not missing
    assert list((finished / "models" / "adapted" / "overlays").glob("*.png"))
    assert json.loads((finished / "results" / "metrics.json").read_text(encoding="utf-8"))
    dirty = run(finished, "git", "status", "--porcelain").stdout.split()
    assert dirty == ["??", "dvc.lock"], "outputs are ignored by git, and nothing else is touched"
    assert not list(finished.glob(".scratch/**/state-*.pt")), "the training states of a finished training are removed"


def test_one_finished_run_in_mlflow(finished: Path) -> None:
    runs = runs_of(finished)
    assert [one["status"] for one in runs] == ["FINISHED"]
    params = YAML(typ="safe").load((finished / "params.yaml").read_text(encoding="utf-8"))
    assert float(runs[0]["method.temperature"]) == params["method"]["temperature"]


def test_the_run_is_promoted_exported_and_in_good_health(finished: Path, tmp_path: Path) -> None:
    """What comes after `dvc repro`, by its defaults: a name in the registry, weights to give away, a clean bill."""
    runs_of(finished)  # sends what a slow machine left waiting, to the store that is then copied
    project = Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))
    assert "models:/lesionsam@champion is version 1" in lesionsam(project, "promote").stdout
    done = lesionsam(project, "export", "--format", "safetensors", "--model", "models:/lesionsam@champion")
    assert "FAILED" not in done.stdout
    card = (project / "exports" / "safetensors" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card == (project / "report" / "model_card.md").read_text(encoding="utf-8"), "the champion is this run"
    health = lesionsam(project, "doctor").stdout
    assert "every stage is up to date" in health
    assert "models:/lesionsam@champion is version 1" in health


def test_second_repro_does_nothing(finished: Path) -> None:
    before = (finished / "dvc.lock").read_bytes()
    done = run(finished, "dvc", "repro")
    assert "Running stage" not in done.stdout
    assert "up to date" in done.stdout
    assert (finished / "dvc.lock").read_bytes() == before


def test_evaluation_parameter_does_not_retrain(project: Path) -> None:
    before = output_hashes(project)
    set_parameter(project, "evaluate.confidence", 0.9)
    done = run(project, "dvc", "repro", "evaluate")
    ran = [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]
    assert ran == ["evaluate"]
    after = output_hashes(project)
    assert after["models/adapted"] == before["models/adapted"]
    assert after["results"] != before["results"]
    assert {one["status"] for one in runs_of(project)} == {"FINISHED"}


def test_the_steps_are_commands_without_dvc(finished: Path, tmp_path: Path) -> None:
    project = repository_copy(tmp_path / "project")
    set_parameter(project, "tracking.enabled", False)
    shutil.rmtree(project / ".dvc")
    for step in ("prepare", "train", "evaluate", "report"):
        lesionsam(project, step)
    same_weights(finished, project)
    for name in ("data/boxes.csv", "results/table.csv", "results/per_image.csv"):
        assert (project / name).read_bytes() == (finished / name).read_bytes(), name
    assert (project / "report" / "index.html").is_file()


def test_hardware_and_logging_do_not_retrain(project: Path) -> None:
    set_parameter(project, "runtime.num_threads", 2)
    set_parameter(project, "tracking.enabled", False)
    assert "Running stage" not in run(project, "dvc", "repro").stdout


def test_experiment_with_another_temperature(project: Path) -> None:
    """`dvc exp run -S` gives an experiment in DVC and a second run in MLflow, side by side with the first."""
    run(project, "dvc", "exp", "run", "--name", "warmer", "-S", "method.temperature=0.2", "train")
    assert "warmer" in run(project, "dvc", "exp", "list", "--all-commits").stdout
    assert sorted(float(one["method.temperature"]) for one in runs_of(project)) == [0.1, 0.2]
    changed = json.loads(run(project, "dvc", "params", "diff", "--json").stdout)["params.yaml"]
    assert list(changed) == ["method.temperature"]
    assert (changed["method.temperature"]["old"], changed["method.temperature"]["new"]) == (0.1, 0.2)


def test_repro_trains_the_winner_of_a_sweep(project: Path) -> None:
    """`tune.py --apply` changes a value and nothing else, which `dvc repro` sees; a rate of 0.3 loses to 4e-4."""
    path = project / "params.yaml"
    before = path.read_text(encoding="utf-8")
    bad = {"train.lr_decoder": 0.3, "sweep.confirm_seeds": 0, "tracking.enabled": False}
    values = unflatten(bad, parse_yaml(before, "params.yaml"))
    values["sweep"]["space"] = {"train.lr_decoder": [0.3, 0.0004]}
    path.write_text(edit_text(before, values), encoding="utf-8")
    run(project, "git", "commit", "--quiet", "--all", "--message", "a bad rate")
    done = run(project, sys.executable, "src/tune.py", "--trials", "2", "--apply", "--anyway")
    assert "`dvc repro` trains with these values" in done.stdout
    changed = run(project, "git", "diff", "--unified=0", "params.yaml").stdout.splitlines()[-2:]
    expected = [["-", "lr_decoder:", "0.3"], ["+", "lr_decoder:", "0.0004"]]
    assert [line.split("#")[0].split() for line in changed] == expected
    assert run(project, "git", "diff", "--numstat").stdout.split() == ["1", "1", "params.yaml"]
    ran = run(project, "dvc", "repro", "--dry", "train").stdout
    assert [line.split("'")[1] for line in ran.splitlines() if line.startswith("Running stage")] == ["train"]


@pytest.fixture(scope="module")
def undisturbed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy trained for six epochs without a break."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("undisturbed") / "project", symlinks=True))
    set_parameter(folder, "train.epochs", 6)
    run(folder, "dvc", "repro", "train")
    return folder


@pytest.mark.parametrize("whole_group", [True, False], ids=["all killed", "only dvc killed"])
def test_killed_training_resumes_bit_for_bit(
    finished: Path, undisturbed: Path, tmp_path: Path, whole_group: bool
) -> None:
    killed = Path(shutil.copytree(finished, tmp_path / "killed", symlinks=True))
    set_parameter(killed, "train.epochs", 6)
    kill_in_training(killed, whole_group=whole_group)
    done = run(killed, "dvc", "repro", "train")
    assert "resum" in (done.stdout + done.stderr).lower()
    same_weights(undisturbed, killed)

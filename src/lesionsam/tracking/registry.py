"""Resolve a model name (file, folder, run or registry version) to local weights, and promote runs to registry versions.

`lesionsam promote` registers the logged model of a training run: one weights file, with updates merged. The
version carries its origin (tags) and its test table (description); an alias such as `champion` points to one version.
See docs/decisions/0024-exports-that-prove-themselves.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lesionsam.config.load import read_yaml
from lesionsam.errors import UserError
from lesionsam.tracking.lineage import repository_root
from lesionsam.tracking.mlflow_upload import ENVIRONMENT, LOCAL_ID_TAG, reason
from lesionsam.tracking.spool import Spool, read_record, spool_root
from lesionsam.tracking.store import settle_artifacts, store_problem
from lesionsam.tracking.tracker import sync
from lesionsam.utils.files import sha256_file
from lesionsam.utils.hub import is_hub_name
from lesionsam.utils.weights import NAMES, SUFFIXES, find_weights

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

NAME = "lesionsam"  # of the registered model, and of the logged model that a training leaves
ALIAS = "champion"
TRAINED = Path("models/adapted")
TABLE, SUMMARY = "evaluation/table.md", "evaluation/summary.json"
MAX_DESCRIPTION = 5000  # characters, by MLflow's sqlite store
EXPECTED = (
    f"expected a weights file, a folder with one, an MLflow run id, or models:/{NAME}@{ALIAS} "
    f"(models:/{NAME}/1 for a version)"
)


@dataclass(frozen=True)
class Promotion:
    """Result of `promote`.

    Attributes:
        version: of the registered model. previous: version that had the alias before, None where there was none.
        is_new: the version was created now; otherwise only the alias moved. run_id: MLflow's.
        objective: mean IoU over ring, centre and box on the test images; None without masks.
        previous_objective: of the previous version; None if unknown.
    """

    alias: str
    version: str
    previous: str | None
    is_new: bool
    run_id: str
    objective: float | None
    previous_objective: float | None


def resolve_model(text: str | Path, *, root: Path | None = None) -> Path:
    """Return the local weights file that a model name refers to.

    Args:
        text: a weights file; a folder that holds one (models/adapted, models/pretrained, an export); an MLflow run id,
            with or without `runs:/`; `models:/NAME@ALIAS` or `models:/NAME/VERSION`; OWNER/NAME of the Hugging Face
            Hub.
        root: repository root, see `lineage.repository_root`; None = that of the current folder. Its params.yaml names
            the MLflow server; without one, its mlflow.db is used.
    Returns:
        an existing .pth or .safetensors file, or a folder in the Hub's form; `models.checkpoint.load_sam` checks it.
    Raises:
        UserError: nothing of that name, or no answer from the server.
    """
    text = str(text)
    path = Path(text)
    if path.exists() or (is_hub_name(text) and path != TRAINED):
        return find_weights(path)
    if match := re.fullmatch(r"models:/([^/@]+)(?:@([^/]+)|/(\d+))", text):
        with _mlflow_client(root) as client:
            return _download(client, _model_of_version(client, _version(client, *match.groups()), text), text)
    if text.startswith("models:"):
        raise UserError(f"{text}: {EXPECTED}")
    if match := re.fullmatch(r"(?:runs:/)?([0-9a-f]{32})", text):
        with _mlflow_client(root) as client:
            return _download(client, _model_of_run(client, _find_run(client, match[1])), text)
    remedy = "; `dvc repro` trains one" if path == TRAINED or TRAINED in path.parents else ""
    raise UserError(f"{text}: no such file, folder or run; {EXPECTED}{remedy}")


def promote(run: str | Path = TRAINED, *, alias: str = ALIAS) -> Promotion:
    """Register a run's model under `NAME`, with its test table, and point an alias at it.

    A model that is registered already keeps its version; then only the alias moves.

    Args:
        run: folder of the train stage (its run.json names the run), or an MLflow run id. alias: letters, digits,
            - and _.
    Raises:
        UserError: no such run, a run without evaluation or without weights, a folder whose weights are not those that
            the run logged, an alias that MLflow does not take.
    """
    if not re.fullmatch(r"(?!v\d+$)(?!latest$)[A-Za-z][\w-]*", alias, flags=re.ASCII):
        raise UserError(
            f"--alias: expected letters, digits, - and _, beginning with a letter, and neither `latest` nor"
            f" a version such as v1; got {alias!r}"
        )
    root, folder = repository_root(Path.cwd()), Path(run)
    if folder.is_dir():
        name = _recorded_run(folder, root)
    elif match := re.fullmatch(r"(?:runs:/)?([0-9a-f]{32})", str(run)):
        name = match[1]
    else:
        raise UserError(f"--run {run}: expected a folder with a run.json, such as {TRAINED}, or an MLflow run id")
    with _mlflow_client(root) as client:
        found = _find_run(client, name)
        scores = {
            key.removeprefix("test/"): value for key, value in found.data.metrics.items() if key.startswith("test/")
        }
        there = {item.path for item in client.list_artifacts(found.info.run_id, "evaluation")}
        if not {TABLE, SUMMARY} <= there:
            raise UserError(
                f"run {name}: has no evaluation, so there is no table to promote it by; run `dvc repro "
                "evaluate` (with tracking.enabled) first"
            )
        model = _model_of_run(client, found)
        weights = _download(client, model, name)
        digest = sha256_file(weights)
        if folder.is_dir() and (local := folder / NAMES[0]).is_file() and sha256_file(local) != digest:
            raise UserError(
                f"{local}: not the weights that run {found.info.run_id} logged; run `dvc repro train`, or "
                "name the run by its id"
            )
        tags = _tags(found, scores, digest)
        return _register(client, model, found, _description(found), tags, alias)


def fetch_evaluation(name: str, folder: Path, *, root: Path | None = None) -> None:
    """Copy a run's evaluation and its params.yaml to folder/evaluation and folder/config.

    Args:
        name: MLflow run id, or the run's local id. folder: made where it is missing. root: as in `resolve_model`.
    Raises:
        UserError: no such run, or it was never evaluated.
    """
    with _mlflow_client(root) as client:
        found = _find_run(client, name)
        there = {item.path for item in client.list_artifacts(found.info.run_id)}
        if "evaluation" not in there:  # it may be waiting to be sent
            sync(repository_root(Path.cwd()) if root is None else root)
            there = {item.path for item in client.list_artifacts(found.info.run_id)}
        if "evaluation" not in there:
            raise UserError(f"run {name}: has no evaluation; run `dvc repro evaluate` (with tracking.enabled) first")
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("evaluation", "config"):
            if part in there:
                client.download_artifacts(found.info.run_id, part, str(folder))


def tracking_uri(root: Path) -> str:
    """Return the tracking URI of a repository: `tracking.uri` of its params.yaml, or the SQLite database beside it."""
    return str(_tracking(root).get("uri") or f"sqlite:///{root / 'mlflow.db'}")


def experiment_name(root: Path) -> str:
    """Return `tracking.experiment` of a repository's params.yaml, or its default."""
    return str(_tracking(root).get("experiment") or NAME)


def _tracking(root: Path) -> Mapping[str, object]:
    params = root / "params.yaml"
    section = read_yaml(params).get("tracking") if params.is_file() else None
    return section if isinstance(section, Mapping) else {}


def _recorded_run(folder: Path, root: Path) -> str:
    """Return the id of the run in a training folder's run.json, after sending its waiting entries."""
    record = read_record(folder)
    if not record:
        raise UserError(
            f"{folder}: no run.json, so its training was not tracked; set tracking.enabled to true and train again"
        )
    spool = Spool(spool_root(root) / record["local_id"])
    if spool.pending()[0]:
        sync(root)
    if num_waiting := spool.pending()[0]:
        problem = spool.read_json("state.json").get("problem") or "no answer in time"
        raise UserError(
            f"{folder}: {num_waiting} of its run's entries are not on the MLflow server yet ({problem}); "
            "start the server and try again"
        )
    return str(spool.read_json("state.json").get("run_id") or record.get("run_id") or record["local_id"])


@contextmanager
def _mlflow_client(root: Path | None) -> Iterator[MlflowClient]:
    """Yield a client of the repository's MLflow, which is the process's own meanwhile; one line for MLflow's errors."""
    root = repository_root(Path.cwd()) if root is None else root
    uri = tracking_uri(root)
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        if not path.is_file():
            raise UserError(f"{uri}: no such MLflow database, so no run or model is known here; `dvc repro` makes it")
        if problem := store_problem(path):
            raise UserError(problem)
        if path == root / "mlflow.db":
            settle_artifacts(root)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)  # some calls look there, whatever URI a client was made with
    try:
        yield mlflow.MlflowClient()
    except (MlflowException, RequestException) as error:
        raise UserError(f"MLflow at {uri}: {reason(error)}; look at tracking.uri in params.yaml") from None
    finally:
        mlflow.set_tracking_uri(before)


def _version(client: MlflowClient, name: str, alias: str | None, number: str | None) -> ModelVersion:
    """Return a version of a registered model, by an alias or by its number."""
    versions = {str(version.version): version for version in client.search_model_versions(f"name = '{name}'")}
    if not versions:
        raise UserError(
            f"models:/{name}: no such registered model at {client.tracking_uri}; `lesionsam promote` registers one"
        )
    aliases = client.get_registered_model(name).aliases
    found = versions.get(str(number if alias is None else aliases.get(alias)))
    if found is None:
        what = f"/{number}: no such version; aliases" if alias is None else f"@{alias}: no such alias; there are"
        remedy = "" if alias is None else f"; `lesionsam promote --alias {alias}` sets it"
        raise UserError(f"models:/{name}{what}: {', '.join(sorted(aliases)) or 'none'}{remedy}")
    return found


def _model_of_version(client: MlflowClient, version: ModelVersion, text: str) -> LoggedModel:
    """Return the logged model behind a registry version."""
    match = re.fullmatch(r"models:/(m-\w+)", version.source or "")
    if match is None:
        raise UserError(
            f"{text}: version {version.version} was not registered by `lesionsam promote`: its source is "
            f"{version.source}; expected a logged model"
        )
    return client.get_logged_model(match[1])


def _find_run(client: MlflowClient, name: str) -> Run:
    """Return a run by MLflow's id or by its local id (tag `lesionsam.local_id`)."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`{LOCAL_ID_TAG}` = '{name}'")
    if not found:
        raise UserError(f"run {name}: not known at {client.tracking_uri}; `mlflow ui` shows those that are")
    return found[0]


def _model_of_run(client: MlflowClient, run: Run) -> LoggedModel:
    """Return the logged model of a training run; the last one if there are several."""
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    models = [model for model in models if model.name == NAME]
    if not models:
        raise UserError(
            f"run {run.info.run_id}: holds no weights; expected a logged model {NAME!r}, as a finished "
            "training leaves one"
        )
    return max(models, key=lambda model: (int(model.params.get("step", 0)), model.creation_timestamp))


def _download(client: MlflowClient, model: LoggedModel, text: str) -> Path:
    """Return the weights file of a logged model: the stored file itself if it is local, otherwise a cached copy."""
    from mlflow.artifacts import download_artifacts

    files = [item.path for item in client.list_logged_model_artifacts(model.model_id)]
    weights = [path for path in files if path.endswith(SUFFIXES)]
    if len(weights) != 1:
        raise UserError(
            f"{text}: expected one weights file in its logged model, found {', '.join(files) or 'none'}; "
            "was its run deleted from the artifact store?"
        )
    location = f"{model.artifact_location}/{weights[0]}"
    if location.startswith("file:"):
        return Path(download_artifacts(location))
    target = Path(".cache/registry") / model.model_id  # a logged model never changes, so a cached copy stays valid
    if not (target / weights[0]).is_file():
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as building:
            os.replace(download_artifacts(location, dst_path=building), target / weights[0])
    return target / weights[0]


def _description(run: Run) -> str:
    """Return the run's test table, cut at a paragraph to MLflow's limit."""
    from mlflow.artifacts import load_text

    text = load_text(f"runs:/{run.info.run_id}/{TABLE}").strip()
    return text if len(text) <= MAX_DESCRIPTION else text[: MAX_DESCRIPTION + 2].rpartition("\n\n")[0]


def _tags(run: Run, scores: Mapping[str, float], digest: str) -> dict[str, str]:
    """Return the version's tags: origin and test scores as text."""
    kept = ("method", "model", "data", "data.digest", "mlflow.source.git.commit", "git.dirty")
    tags = {key.removeprefix("mlflow.source."): run.data.tags[key] for key in kept if key in run.data.tags}
    params = json.dumps(dict(sorted(run.data.params.items())))
    tags |= {"weights.sha256": digest, "params.digest": hashlib.sha256(params.encode()).hexdigest()[:16]}
    return tags | {f"test.{name}": f"{value:.6g}" for name, value in sorted(scores.items())}


def _register(
    client: MlflowClient, model: LoggedModel, run: Run, description: str, tags: Mapping[str, str], alias: str
) -> Promotion:
    """Create or update the version of a logged model and set the alias."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(NAME, description="SAM adapted to skin lesions; not a medical device.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model.model_id}"
    versions = {str(version.version): version for version in client.search_model_versions(f"name = '{NAME}'")}
    known = next((version for version in versions.values() if version.source == source), None)
    is_new = known is None
    if known is None:
        known = client.create_model_version(
            NAME, source, run.info.run_id, tags=dict(tags), model_id=model.model_id, description=description
        )
    else:  # the run may have been evaluated again since it was registered
        for key, value in tags.items():
            client.set_model_version_tag(NAME, str(known.version), key, value)
        client.update_model_version(NAME, str(known.version), description=description)
    before = versions.get(str(client.get_registered_model(NAME).aliases.get(alias)))
    client.set_registered_model_alias(NAME, alias, str(known.version))
    return Promotion(
        alias,
        str(known.version),
        None if before is None else str(before.version),
        is_new,
        run.info.run_id,
        _objective(tags),
        None if before is None else _objective(before.tags),
    )


def _objective(tags: Mapping[str, str]) -> float | None:
    value = tags.get("test.adapted.objective")
    return None if value is None else float(value)

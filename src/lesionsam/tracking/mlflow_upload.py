"""Send a spool's journal to MLflow, each point exactly once.

An operation counts as sent once the server has answered; only then does `state.json` move past it. After a failure, and
at every start, it is unknown whether the next operation arrived (the server may have died between storing and
answering). The server is then queried first: metric points are compared with the history by (name, step, time), runs
and models are found by a tag. Everything else can be repeated safely.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lesionsam.tracking.spool import JOURNALS, Spool, read_lines, spool_root
from lesionsam.tracking.store import (
    OUTDATED,
    artifact_folder,
    make_store,
    schema_problem,
    settle_artifacts,
    store_problem,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

MAX_POINTS = 1000  # of a batch, by MLflow's API
MAX_PARAMS = 100
PARENT_SECONDS = 90.0  # to wait for a parent run that another machine creates
LOCAL_ID_TAG = "lesionsam.local_id"
# Defaults; the caller's own values win. One try with a short timeout, since this module repeats by itself.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# Errors that repeating cannot fix. All others (no connection, 5xx, a locked database, a refused login) may pass.
PERMANENT = ("INVALID_PARAMETER_VALUE", "MALFORMED_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
# MLflow's BAD_REQUEST covers all other database errors, such as a damaged file or too many connections, which may
# pass. These, named as SQLAlchemy writes them, are about the values.
REFUSED_VALUES = re.compile(r"\((?:\w+\.)+\w*(?:IntegrityError|DataError|Violation|OutOfRange|Truncation)\)")


class Unreachable(Exception):
    """The server did not give a usable answer; try again later."""


class Rejected(Exception):
    """This entry can never be sent."""


class RunGone(Exception):
    """The run no longer exists on the server."""


class Uploader:
    """Send one spool. `upload` does one unit of work: a batch of points, or one other operation.

    Args:
        spool: of the run. replace_gone: give a run deleted on the server a successor; otherwise drop its waiting
            entries.
    """

    def __init__(self, spool: Spool, *, replace_gone: bool) -> None:
        """Connect to the run's MLflow server."""
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self.spool = spool
        self.meta = spool.read_json("meta.json")
        self.state: dict[str, Any] = {"run_id": None, "sent": {}, "models": {}, "rejected": 0}
        self.state |= spool.read_json("state.json")
        root = spool.root
        if not self.meta["uri"]:
            with contextlib.suppress(MlflowException, SQLAlchemyError, OSError):  # the first operation reports it
                make_store(root / "mlflow.db", spool_root(root))
        uri = self.meta["uri"] or f"sqlite:///{root / 'mlflow.db'}"
        if uri.startswith("sqlite:///") and (problem := store_problem(Path(uri.removeprefix("sqlite:///")))):
            self.note(problem)  # for the owner's message
            raise Unreachable(problem)
        try:
            self.client: MlflowClient = MlflowClient(uri)
        except (MlflowException, SQLAlchemyError) as error:
            self.note(reason(error))
            raise Unreachable(reason(error)) from error
        self._artifacts = None if self.meta["uri"] else artifact_folder(root).as_uri()
        if not self.meta["uri"]:
            settle_artifacts(root)
        self._replace_gone = replace_gone
        self._uncertain = True
        self._patience = time.monotonic() + PARENT_SECONDS

    def upload(self) -> bool:
        """Send the next unit and return whether there was one. Raise `Unreachable` if it has to be repeated."""
        for journal in JOURNALS:
            lines = read_lines(self.spool.path(journal), self.state["sent"].get(journal, 0))
            if (first := next(lines, None)) is not None:
                try:
                    self._ship(journal, itertools.chain([first], lines))
                except RunGone:
                    self._start_over()
                return True
        if not self.state["run_id"]:  # a run shows from its first moment, not from its first point
            self._attempt(self._find_run, needed=True)
        return False

    def _ship(self, journal: str, lines: itertools.chain[tuple[dict[str, Any] | None, int]]) -> None:
        run_id = self._attempt(self._find_run, needed=True)
        entry, offset = next(lines)
        if entry is not None and entry["kind"] == "metrics":
            entries = [entry]
            num_points = len(entry["values"])
            for other, end in lines:
                if other is None or other["kind"] != "metrics" or num_points + len(other["values"]) > MAX_POINTS:
                    break
                entries.append(other)
                num_points += len(other["values"])
                offset = end
            self._attempt(lambda: self._send_points(run_id, entries))
        elif entry is not None:
            send: Callable[[str, dict[str, Any]], None] = getattr(self, f"_send_{entry['kind']}")
            self._attempt(lambda: send(run_id, entry))
        self._uncertain = False
        self.state["sent"][journal] = offset
        self.state["problem"] = None
        self._save()
        if entry is not None and "file" in entry:
            self.spool.drop(entry["file"])

    def _attempt(self, call: Callable[[], Any], *, needed: bool = False) -> Any:
        """Make a call. Count and skip what the server rejects unless `needed`; raise `Unreachable` for all other
        errors.
        """
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        try:
            return call()
        except (MlflowException, RequestException, OSError, Rejected) as error:
            code = getattr(error, "error_code", "")
            rejected = isinstance(error, Rejected) or code in PERMANENT
            rejected = rejected or (code == "BAD_REQUEST" and REFUSED_VALUES.search(str(error)) is not None)
            if rejected and self.state["run_id"] and self._run_is_gone():
                raise RunGone from error
            if rejected and not needed:
                self.state |= {"rejected": self.state["rejected"] + 1, "refusal": reason(error)}
                print(f"rejected: {error}", file=sys.stderr, flush=True)
                return None
            self._uncertain = True
            raise Unreachable(reason(error)) from error

    def _run_is_gone(self) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(self.state["run_id"]).info.lifecycle_stage == "deleted"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise Unreachable(reason(error)) from error
            return True

    def _start_over(self) -> None:
        """Handle a run that was deleted on the server: send everything again to a successor, or drop what waits."""
        if self._replace_gone:
            self.state |= {"replaces": self.state["run_id"], "run_id": None, "sent": {}, "models": {}}
        else:
            self.state["sent"] = {
                journal: path.stat().st_size for journal in JOURNALS if (path := self.spool.path(journal)).exists()
            }
        self._save()

    def _save(self) -> None:
        self.spool.write_json("state.json", self.state)

    def note(self, problem: str) -> None:
        """Store why nothing could be sent; the owner prints it."""
        self.state["problem"] = problem
        self._save()

    # The run

    def _find_run(self) -> str:
        """Return MLflow's id of the run: known, found by its tag after an unanswered creation, or created now."""
        if self.state["run_id"]:
            if self._uncertain and self._run_is_gone():
                raise RunGone
            return self.state["run_id"]
        experiment_id = self._find_experiment().experiment_id
        found = self.client.search_runs([experiment_id], f"tags.`{LOCAL_ID_TAG}` = '{self.spool.local_id}'")
        if found:
            run_id = found[0].info.run_id
        else:
            tags = {LOCAL_ID_TAG: self.spool.local_id, "mlflow.source.name": "lesionsam", "mlflow.source.type": "LOCAL"}
            if (parent_id := self._find_parent(experiment_id)) is not None:
                tags["mlflow.parentRunId"] = parent_id
            if self.state.get("replaces"):
                tags["lesionsam.replaces"] = self.state["replaces"]
            run = self.client.create_run(experiment_id, self.meta["start_time"], tags, self.meta["run_name"])
            run_id = run.info.run_id
        self.state["run_id"] = run_id
        self._save()
        return run_id

    def _find_parent(self, experiment_id: str) -> str | None:
        """Return MLflow's id of the parent run, given by its local id in meta.json.

        If the parent's spool is on this machine, its owner creates the run, or this process if the owner has ended.
        Otherwise the server is polled for `PARENT_SECONDS`; after that the run is sent without a parent.
        """
        if not (local_id := self.meta.get("parent")):
            return None
        parent = Spool(self.spool.folder.parent / local_id)
        if known := parent.read_json("state.json").get("run_id"):
            return known
        if (parent.folder / "meta.json").exists():
            if (lock := parent.lock("sender")) is None:
                raise Unreachable("the run that it belongs to is not there yet")
            with lock:
                return Uploader(parent, replace_gone=False)._find_run()
        found = self.client.search_runs([experiment_id], f"tags.`{LOCAL_ID_TAG}` = '{local_id}'")
        if not found and self.meta["uri"] and time.monotonic() < self._patience:
            raise Unreachable("the run that it belongs to is not there yet")
        return found[0].info.run_id if found else None

    def _find_experiment(self) -> Experiment:
        from mlflow.exceptions import MlflowException

        name = self.meta["experiment"]
        if (experiment := self.client.get_experiment_by_name(name)) is None:
            try:
                self.client.create_experiment(name, self._artifacts)
            except MlflowException as error:  # another process was faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = self.client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage == "deleted":
            raise Unreachable(f"the MLflow experiment '{name}' is deleted: restore it, or set tracking.experiment")
        return experiment

    # One method per kind of entry

    def _send_points(self, run_id: str, entries: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        points = {
            (name, entry["step"], entry["time"]): float(value)
            for entry in entries
            for name, value in entry["values"].items()
        }
        if self._uncertain:
            for name in {name for name, _, _ in points}:
                for known in self.client.get_metric_history(run_id, name):
                    points.pop((name, known.step, known.timestamp), None)
        if points:
            metrics = [Metric(name, value, time_ms, step) for (name, step, time_ms), value in points.items()]
            self.client.log_batch(run_id, metrics=metrics)

    def _send_params(self, run_id: str, entry: dict[str, Any]) -> None:
        """Send parameters that the run lacks; a changed one becomes a tag: MLflow's are immutable."""
        from mlflow.entities import Param

        known = self.client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in entry["values"].items() if key not in known]
        for start in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(run_id, params=new[start : start + MAX_PARAMS])
        changed = {f"changed.{key}": value for key, value in entry["values"].items() if known.get(key, value) != value}
        self._send_tags(run_id, {"values": changed})

    def _send_tags(self, run_id: str, entry: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in entry["values"].items()]
        for start in range(0, len(tags), MAX_PARAMS):
            self.client.log_batch(run_id, tags=tags[start : start + MAX_PARAMS])

    def _send_dataset(self, run_id: str, entry: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            entry["name"],
            entry["digest"][:36],
            "local",
            json.dumps({"uri": entry["source"]}),
            profile=json.dumps({"digest": entry["digest"]}),
        )
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", entry["context"])])])

    def _send_artifact(self, run_id: str, entry: dict[str, Any]) -> None:
        if file := self._waiting_file(entry):
            self.client.log_artifact(run_id, str(file), entry["folder"] or None)

    def _send_picture(self, run_id: str, entry: dict[str, Any]) -> None:
        """Upload a picture as `MlflowClient.log_image` does, but under a name that a second upload replaces."""
        if (file := self._waiting_file(entry)) is None:
            return
        name = f"{entry['name'].replace('/', '~')}+step+{entry['step']}+timestamp+{entry['time']}"
        stem = f"{name}+{uuid.uuid5(uuid.NAMESPACE_OID, f'{self.spool.local_id} {name}')}"
        try:
            with Image.open(file) as held:
                picture = held.convert("RGB")
        except (OSError, ValueError) as error:
            raise Rejected(f"{file.name}: {error}") from error
        with tempfile.TemporaryDirectory() as folder:
            picture.save(Path(folder) / f"{stem}.png")
            picture.thumbnail((256, 256))
            picture.save(Path(folder) / f"{stem}+compressed.webp")
            self.client.log_artifacts(run_id, folder, "images")
        self.client.set_tag(run_id, "mlflow.loggedImages", "true")

    def _send_checkpoint(self, run_id: str, entry: dict[str, Any]) -> None:
        """Send a checkpoint as a logged model with its file and metrics.

        The plain file is uploaded: a model serialised by mlflow.pytorch would not load back into SAM.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

        file = self._waiting_file(entry)
        if file is None:
            return
        key = str(entry["seq"])
        run = self.client.get_run(run_id)
        if key not in self.state["models"]:
            found = self.client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
            model = next((model for model in found if model.tags.get("lesionsam.seq") == key), None)
            if model is None:
                model = self.client.create_logged_model(
                    run.info.experiment_id, entry["name"], run_id, {"lesionsam.seq": key}, {"step": str(entry["step"])}
                )
            self.state["models"][key] = model.model_id
            self._save()
        model_id = self.state["models"][key]
        outputs = run.outputs.model_outputs if run.outputs else []
        if all(output.model_id != model_id for output in outputs):
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, entry["step"])])
        self.client.log_model_artifact(model_id, str(file))
        metrics = [
            Metric(name, float(value), time_ms, entry["step"], model_id=model_id)
            for name, (value, time_ms) in entry["values"].items()
        ]
        if metrics:
            self.client.log_batch(run_id, metrics=metrics)
        self.client.finalize_logged_model(model_id, LoggedModelStatus.READY)

    def _send_status(self, run_id: str, entry: dict[str, Any]) -> None:
        if entry.get("only_new") and not self.state.get("replaces"):
            return
        if entry["status"] == "RUNNING":
            self.state["killed"] = False
            self.client.update_run(run_id, status="RUNNING")
        elif not entry.get("only_new") or self.client.get_run(run_id).info.status == "RUNNING":
            self.client.set_terminated(run_id, entry["status"], entry["time"])

    def _waiting_file(self, entry: dict[str, Any]) -> Path | None:
        """Return the waiting file; None if it was already sent to a run that has been deleted since."""
        file = self.spool.folder / entry["file"]
        return file if file.exists() else None

    def mark_killed(self) -> None:
        """Set the status KILLED for a run whose owner died without closing it."""
        if self.spool.status() == "RUNNING" and self.state["run_id"] and not self.state.get("killed"):
            with contextlib.suppress(RunGone):
                self._attempt(lambda: self.client.set_terminated(self.state["run_id"], "KILLED"))
            self.state["killed"] = True
            self._save()


def reason(error: Exception) -> str:
    """Return an error as one short line; of a chain of connection errors the innermost."""
    text = " ".join(str(error).split())
    if (outdated := OUTDATED.search(text)) and (problem := schema_problem(outdated[1])):
        return problem
    _, chained, cause = text.rpartition("(Caused by ")
    return (cause.rstrip(")") + ")" if chained else text)[:300]


def system_monitors() -> list[Any]:
    """Return MLflow's collectors: processor and memory, disk, network, and the GPU if there is one."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError):
        print("no GPU metrics", file=sys.stderr)
    return monitors

"""`python -m lesionsam.tracking.ui`: send what waits, start MLflow's page, and open it on the training runs.

MLflow's own start page is its GenAI overview.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
import webbrowser
from pathlib import Path

from lesionsam.errors import UserError, run_guarded
from lesionsam.tracking.lineage import repository_root
from lesionsam.tracking.mlflow_upload import ENVIRONMENT
from lesionsam.tracking.registry import experiment_name, tracking_uri
from lesionsam.tracking.spool import spool_root
from lesionsam.tracking.store import make_store, settle_artifacts, store_problem
from lesionsam.tracking.tracker import sync

START_SECONDS = 120.0  # for MLflow to answer


def runs_page(address: str, uri: str, experiment: str) -> str:
    """Return the address of an experiment's training runs; of the start page where the experiment is not known yet."""
    from mlflow import MlflowClient

    found = MlflowClient(uri).get_experiment_by_name(experiment)
    return address if found is None else f"{address}/#/experiments/{found.experiment_id}/runs"


def show(port: int) -> None:
    """Serve MLflow's page until it is stopped, or name that of the server that `tracking.uri` names.

    Raises:
        UserError: the database cannot be used, or MLflow does not start.
    """
    for key, value in {**ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}.items():
        os.environ.setdefault(key, value)
    root = repository_root(Path.cwd())
    uri, experiment = tracking_uri(root), experiment_name(root)
    sync(root)
    if uri.startswith(("http://", "https://")):
        print(runs_page(uri.rstrip("/"), uri, experiment))
        return
    if uri == f"sqlite:///{root / 'mlflow.db'}":
        if problem := store_problem(root / "mlflow.db"):
            raise UserError(problem)
        make_store(root / "mlflow.db", spool_root(root))
        for place in settle_artifacts(root):
            print(f"note: this project was copied or moved; its runs no longer use {place}", file=sys.stderr)
    address = f"http://127.0.0.1:{port}"
    command = ["mlflow", "ui", "--workers", "1", "--port", str(port), "--backend-store-uri", uri]
    process = subprocess.Popen([sys.executable, "-m", *command])
    try:
        _wait(address, process, port)
        page = runs_page(address, uri, experiment)
        print(f"\nruns: {page}\n", flush=True)
        if sys.stdout.isatty():
            webbrowser.open(page)
        process.wait()
    except KeyboardInterrupt:
        pass
    finally:
        process.terminate()
        process.wait()


def _wait(address: str, process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):  # noqa: S310  # nosec B310
                return
        except OSError:
            time.sleep(0.3)
    raise UserError(f"MLflow did not start on port {port}, see above; make ui PORT=5001 takes another port")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lesionsam.tracking.ui", description=show.__doc__)
    parser.add_argument("--port", type=int, default=5000)
    show(parser.parse_args().port)


if __name__ == "__main__":
    run_guarded(main)

"""MLflow's own database file, made whole or not at all.

MLflow makes its tables in some fifty steps, which take seconds. A process that is killed among them leaves a file that
MLflow can neither use nor finish ("table already exists"), and nothing would ever be sent to it. So the file is made
beside its place and linked there when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
from pathlib import Path

from lesionsam.errors import UserError
from lesionsam.utils.processes import is_left_by

_MAKING = threading.Lock()  # what bears this process's number is left over where nothing is being made


def make_store(path: Path, beside: Path) -> None:
    """Make the database, unless there is a file.

    Args:
        path: of the database. beside: folder on the same file system for the unfinished one; what killed processes
            left there is removed.
    """
    if path.exists():
        return
    from mlflow import MlflowClient

    beside.mkdir(parents=True, exist_ok=True)
    with _MAKING:
        if path.exists():
            return
        for left in beside.glob("store-*"):
            if (match := re.match(r"store-(\d+)-", left.name)) and is_left_by(int(match[1])):
                left.unlink(missing_ok=True)
        unfinished = beside / f"store-{os.getpid()}-{secrets.token_hex(4)}.db"
        whole = unfinished.with_suffix(".whole")
        try:
            MlflowClient(f"sqlite:///{unfinished}").search_experiments(max_results=1)
            # A copy: this process keeps the other open, and SQLite's locks do not bear one file under two names.
            shutil.copyfile(unfinished, whole)
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(whole, path)
        finally:
            unfinished.unlink(missing_ok=True)
            whole.unlink(missing_ok=True)


def refuse_optuna_database(uri: str) -> None:
    """Refuse a tracking database with Optuna's tables: both programs keep their version in a table `alembic_version`.

    Args:
        uri: of the tracking store. One that is no database, not there or does not answer passes.

    Raises:
        UserError: MLflow would end Optuna's studies.
    """
    if not uri.startswith(("sqlite:", "postgresql", "mysql")):
        return
    from sqlalchemy import create_engine, inspect, make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        url = make_url(uri)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            return
        engine = create_engine(url)
        try:
            tables = set(inspect(engine).get_table_names())
        finally:
            engine.dispose()
    except (SQLAlchemyError, ImportError):
        return
    if {"studies", "trials"} <= tables and "experiments" not in tables:
        raise UserError(
            f"tracking.uri: expected a database of MLflow's own, got one with Optuna's tables "
            f"({url.render_as_string(hide_password=True)}); name another database"
        )

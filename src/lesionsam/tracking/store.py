"""Create MLflow's SQLite database atomically, check that one can be used, and keep its artifacts in its own project.

MLflow creates its tables in some fifty steps, which take seconds. A process that is killed in between leaves a file
that MLflow can neither use nor finish ("table already exists"). So the database is built under another name and linked
to its place when it is complete.

MLflow keeps the place of artifacts as an absolute path, also in a copied or moved project, whose runs would go on
writing into the original's folder. `settle_artifacts` points such a database to the folder beside it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import secrets
import shutil
import sqlite3
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock

from lesionsam.errors import UserError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

PLACES = (  # columns with places of artifacts
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
OUTDATED = re.compile(r"out-of-date database schema \(found version (\w+)")  # as MLflow words it


def make_store(path: Path, beside: Path) -> None:
    """Create the database if there is no file.

    Args:
        path: of the database. beside: folder on the same file system for the unfinished one; leftovers of killed
            processes there are removed.
    """
    if path.exists():
        return
    from mlflow import MlflowClient

    beside.mkdir(parents=True, exist_ok=True)
    with FileLock(beside / "store.lock"):
        if path.exists():
            return
        for left in beside.glob("store-*"):  # of a process that was killed
            left.unlink(missing_ok=True)
        unfinished = beside / f"store-{secrets.token_hex(4)}.db"
        whole = unfinished.with_suffix(".whole")
        try:
            MlflowClient(f"sqlite:///{unfinished}").search_experiments(max_results=1)
            # A copy: this process keeps the other open, and SQLite's locks do not bear one file under two names.
            shutil.copyfile(unfinished, whole)
            with contextlib.suppress(FileExistsError):  # another program was first
                os.link(whole, path)
        finally:
            unfinished.unlink(missing_ok=True)
            whole.unlink(missing_ok=True)


def store_problem(path: Path) -> str:
    """Return why MLflow cannot use an SQLite file; empty if it can, or if there is no file.

    MLflow itself would add its tables to another program's database, and for the database of a newer release it
    recommends `mlflow db upgrade`, which fails.
    """
    if not path.is_file() or not path.stat().st_size:
        return ""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                return ""
            if not {"alembic_version", "experiments", "runs"} <= tables:
                shown = ", ".join(sorted(tables)[:3])
                return (
                    f"{path} is another program's database (tables {shown}, ...); set tracking.uri to a file of its own"
                )
            revisions = [revision for (revision,) in database.execute("SELECT version_num FROM alembic_version")]
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # locked, for instance: MLflow tries again
            return ""
        return f"{path} is not an SQLite database ({error}); move it away, or set tracking.uri to another file"
    return next((problem for revision in revisions if (problem := schema_problem(revision))), "")


@functools.cache
def schema_problem(revision: str) -> str:
    """Return what to do if the installed MLflow does not know a database's schema revision; empty if it does."""
    found = importlib.util.find_spec("mlflow")
    if found is None or found.origin is None:
        return ""
    versions = Path(found.origin).parent / "store" / "db_migrations" / "versions"
    if not versions.is_dir() or any(versions.glob(f"{revision}_*.py")):
        return ""
    return (
        f"the MLflow database was made by a newer MLflow (schema revision {revision} is unknown to the installed "
        f"{version('mlflow')}); install that MLflow, or set tracking.uri to another database"
    )


def artifact_folder(root: Path) -> Path:
    """Return the folder of artifacts of a project without an MLflow server."""
    return root.resolve() / "mlartifacts"


def foreign_artifacts(root: Path) -> list[str]:
    """Return the places of artifacts in a project's database that belong to another project, as the database has them.

    Those are folders `mlartifacts` that are gone (the project was moved) or that lie beside another database (it was
    copied). Any other place was chosen on purpose.
    """
    path, own = root / "mlflow.db", artifact_folder(root)
    if not path.is_file() or store_problem(path):
        return []
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        try:
            places = [place for (place,) in database.execute("SELECT DISTINCT artifact_location FROM experiments")]
        except sqlite3.DatabaseError:  # locked, or without tables yet
            return []
    foreign = []
    for place in filter(None, places):
        folder = Path(url2pathname(urlsplit(place).path))
        is_other = urlsplit(place).scheme in ("", "file") and folder.name == own.name and folder.resolve() != own
        if is_other and (not folder.exists() or folder.with_name("mlflow.db").exists()):
            foreign.append(place)
    return foreign


def settle_artifacts(root: Path) -> list[str]:
    """Point a copied or moved project's database to the artifacts beside it; return the places that it pointed to.

    Experiments, runs, logged models and registered versions follow, so that the copy reads and writes its own files.
    """
    places = foreign_artifacts(root)
    if places:
        with contextlib.closing(sqlite3.connect(root / "mlflow.db", timeout=30)) as database, database:
            for table, column in PLACES:
                for place in places:
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608  # nosec B608
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (artifact_folder(root).as_uri(), len(place) + 1, place, len(place) + 1, f"{place}/"),
                    )
    return places


def refuse_optuna_database(uri: str) -> None:
    """Refuse a tracking database with Optuna's tables: both programs keep their version in a table `alembic_version`.

    Args:
        uri: of the tracking store. One that is no database, not there or does not answer passes.

    Raises:
        UserError: MLflow would end Optuna's studies.
    """
    if not uri.startswith(("sqlite:", "postgresql", "mysql")):
        return
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        url = make_url(uri)
        tables = table_names(url)
    except (SQLAlchemyError, ImportError):
        return
    if {"studies", "trials"} <= tables and "experiments" not in tables:
        raise UserError(
            f"tracking.uri: expected a database of MLflow's own, got one with Optuna's tables "
            f"({url.render_as_string(hide_password=True)}); name another database"
        )


def table_names(url: URL, **arguments: Any) -> set[str]:
    """Return the names of a database's tables; none where an SQLite file is not there.

    Args:
        arguments: of SQLAlchemy's `create_engine`.
    """
    from sqlalchemy import create_engine, inspect

    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        return set()
    engine = create_engine(url, **arguments)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()

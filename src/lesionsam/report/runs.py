"""Find finished runs by name for a comparison: a folder, a commit or experiment of DVC, or an MLflow run."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lesionsam.errors import UserError
from lesionsam.tracking.registry import fetch_evaluation

RESULTS, PARAMS = Path("results"), Path("models/adapted/params.yaml")
NEEDED = ("summary.json", "per_image.csv")
GET_SECONDS = 600.0
EXPECTED = (
    "expected a folder with results/, a commit, branch or experiment (`dvc exp show` lists them), or an MLflow run id"
)


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished run on this machine.

    Attributes:
        name: as shown, unique among the compared runs. results: folder with `NEEDED`.
        params: file of its parameters, or None. found: description of where it was found.
    """

    name: str
    results: Path
    params: Path | None
    found: str


@contextmanager
def open_runs(texts: Sequence[str], root: Path) -> Iterator[list[EvaluatedRun]]:
    """Find the runs; fetch into a temporary folder what is not in the working folder.

    Args:
        texts: as a user names them, two or more. root: of the repository whose commits and experiments are meant.
    Raises:
        UserError: fewer than two, one twice, one that is not known or has no evaluation.
    """
    if len(texts) < 2:
        raise UserError(f"compare: expected two runs or more, got {len(texts)}; {EXPECTED}")
    names = [short(text) for text in texts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"compare: {twice!r} names two of them; a run stands once, and folders have different last names"
        )
    with tempfile.TemporaryDirectory() as scratch:
        runs = [
            open_run(text, name, root, Path(scratch) / str(k))
            for k, (text, name) in enumerate(zip(texts, names, strict=True))
        ]
        places = [run.results.resolve() for run in runs]
        for k, place in enumerate(places):
            if place in places[:k]:
                raise UserError(
                    f"compare: {texts[places.index(place)]} and {texts[k]} are one evaluation, that in "
                    f"{runs[k].results}; a run stands once"
                )
        yield runs


def short(text: str) -> str:
    """Return a run's name on the page: a folder's last part, the first digits of an id, or the text as given."""
    if Path(text).is_dir():
        return Path(text).resolve().name
    text = text.removeprefix("runs:/")
    return text[:8] if re.fullmatch(r"[0-9a-f]{32,40}", text) else text


def open_run(text: str, name: str, root: Path, scratch: Path) -> EvaluatedRun:
    """Find one run, see `open_runs`. Fetched files go into `scratch`, which need not exist."""
    path = Path(text)
    if path.is_dir():
        run = in_folder(path, name)
    elif match := re.fullmatch(r"(?:runs:/)?([0-9a-f]{32})", text):
        fetch_evaluation(match[1], scratch, root=root)
        run = EvaluatedRun(
            name, scratch / "evaluation", _file(scratch / "config" / PARAMS.name), f"MLflow run {match[1]}"
        )
    elif commit := commit_of(text, root):
        run = fetch_commit(text, commit, name, root, scratch)
    else:
        raise UserError(f"{text}: no such folder, commit or experiment; {EXPECTED}")
    if missing := [file for file in NEEDED if not (run.results / file).is_file()]:
        raise UserError(
            f"{text}: its evaluation is not whole, without {', '.join(missing)}; run `dvc repro evaluate` for it again"
        )
    return run


def in_folder(path: Path, name: str) -> EvaluatedRun:
    """Return the run of a folder: the root of a project, or its results alone."""
    for results, params in ((path / RESULTS, path / PARAMS), (path, path.resolve().parent / PARAMS)):
        if (results / NEEDED[0]).is_file():
            return EvaluatedRun(name, results, _file(params), f"folder {path}")
    raise UserError(
        f"{path}: no evaluation in it, neither {RESULTS / NEEDED[0]} nor {NEEDED[0]}; run `dvc repro evaluate` there"
    )


def commit_of(text: str, root: Path) -> str | None:
    """Return the commit of a revision or experiment name in a repository, or None."""
    if text.startswith("-") or not re.fullmatch(r"[\w./@^~{}-]+", text):
        return None
    git = ["git", "-C", str(root)]
    done = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", f"{text}^{{commit}}"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return done.stdout.strip()
    refs = subprocess.run(
        [*git, "for-each-ref", "--sort=-creatordate", "--format=%(objectname) %(refname)", "refs/exps"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    known = (line.split(" ", 1) for line in refs.splitlines())
    return next((commit for commit, ref in known if ref.rsplit("/", 1)[-1] == text), None)


def fetch_commit(text: str, commit: str, name: str, root: Path, scratch: Path) -> EvaluatedRun:
    """Fetch a run's results for a commit from DVC."""
    scratch.mkdir(parents=True)
    if problem := dvc_get(root, RESULTS.as_posix(), commit, scratch / RESULTS):
        raise UserError(
            f"{text}: DVC does not give its results ({problem}); `dvc pull` fetches them from a remote, "
            "`dvc repro` in that commit makes them"
        )
    (scratch / PARAMS).parent.mkdir(parents=True)
    dvc_get(root, PARAMS.as_posix(), commit, scratch / PARAMS)
    return EvaluatedRun(name, scratch / RESULTS, _file(scratch / PARAMS), f"commit {commit[:10]}")


def _file(path: Path) -> Path | None:
    return path if path.is_file() else None


def dvc_get(root: Path, path: str, commit: str, target: Path) -> str:
    """Run `dvc get`. Return the error in one line, empty on success."""
    program = [sys.executable, "-P", "-m", "dvc"]  # -P: modules of the current folder do not stand in for others
    command = [*program, "get", str(root), path, "--rev", commit, "--out", str(target), "--force"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=GET_SECONDS)
    except subprocess.TimeoutExpired:
        return f"`dvc get` took more than {GET_SECONDS:.0f} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1][:200]  # where it is stuck, DVC ends with an offer of help

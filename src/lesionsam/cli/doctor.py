"""`lesionsam doctor`: report the state of the installation and the working folder, and the next step.

It must work where nothing else does: every check imports what it needs itself, and an error becomes a line of output.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lesionsam.errors import UserError, listed

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
# Without these nothing trains or predicts; the rest is for one command each.
CORE = (
    *("torch", "torchvision", "segment-anything", "numpy", "scipy", "scikit-image", "pillow", "safetensors"),
    *("pydantic", "ruamel-yaml", "jinja2", "filelock", "rich", "typer"),
)
LITTLE_MEMORY, LITTLE_DISK = 4e9, 2e9  # bytes; below them a line becomes a note
# Bytes of the archives; they are unpacked, and DVC keeps a copy: three times that.
ARCHIVES = {"isic2016": 0.84e9, "isic2017": 12.1e9, "isic2018": 13.6e9}
SERVER_SECONDS, DVC_SECONDS = 3.0, 120.0
# Errors that a check may meet on a machine that is not set up; other errors are raised.
HINDRANCES = (OSError, ImportError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, sqlite3.Error)
Found = Iterator[tuple[str, str] | tuple[str, str, str]]  # state, text and perhaps a remedy


@dataclass(frozen=True)
class Finding:
    """One line: the subject, its state, a text, and a remedy if there is something to do."""

    what: str
    state: str
    text: str
    remedy: str = ""


def examine(root: Path) -> list[Finding]:
    """Run every check on an installation and a working folder; raise nothing, change nothing."""
    findings: list[Finding] = []
    for what, look in LOOKS.items():
        try:
            for each in look(root):
                findings.append(Finding(what, *each))
        except HINDRANCES as error:
            findings.append(Finding(what, NOTE, f"cannot be looked at: {_line(error)}"))
        except UserError as error:
            findings.append(Finding(what, PROBLEM, str(error)))
    return findings


def next_step(root: Path, findings: list[Finding]) -> str:
    """Return the next step: the first problem's remedy, then the missing stages, then what to do with the result."""
    for finding in findings:
        if finding.state == PROBLEM and finding.remedy:
            return finding.remedy
    if not (root / "params.yaml").is_file():
        return "lesionsam preset demo, in a folder of the repository"
    if not (root / "models" / "adapted" / "best.safetensors").is_file() or not (root / "report").is_dir():
        return "make demo, or dvc repro"
    return next(
        (finding.remedy for finding in findings if finding.what == "dvc" and finding.remedy),
        "open report/index.html; lesionsam export --all gives the model away, lesionsam promote names it",
    )


def print_findings(findings: list[Finding], step: str) -> int:
    """Print the findings and return the exit status: 1 if there is a problem."""
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        remedy = f"; {finding.remedy}" if finding.remedy and finding.state != OK else ""
        print(f"{finding.state:<7}  {finding.what:<{width}}  {finding.text}{remedy}")
    print(f"\nnext: {step}")
    return int(any(finding.state == PROBLEM for finding in findings))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _python(root: Path) -> Found:
    yield OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def pinned(text: str) -> dict[str, str]:
    """Return name -> version of a lock file's lines that apply to this Python and system."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    found = {}
    for line in text.splitlines():
        with suppress(InvalidRequirement):  # a hash or a comment
            requirement = Requirement(line.rstrip("\\ "))
            exact = [each.version for each in requirement.specifier if each.operator == "=="]
            if exact and (requirement.marker is None or requirement.marker.evaluate()):
                found[str(canonicalize_name(requirement.name))] = exact[0]
    return found


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages(root: Path) -> Found:
    missing_core = [name for name in CORE if _installed(name) is None]
    if missing_core:
        yield PROBLEM, f"missing: {listed(missing_core)}", "make setup"
    lock = root / "requirements.lock"
    if not lock.is_file():
        yield NOTE, f"no {lock.name} here to compare with; torch {_installed('torch')}"
        return
    wanted = pinned(lock.read_text(encoding="utf-8"))
    here = {name: _installed(name) for name in wanted}
    missing = [name for name in wanted if here[name] is None and name not in missing_core]
    # A build's own label, as in 2.15.0+cpu, is no other version.
    other = [
        f"{name} {here[name]} (not {number})"
        for name, number in wanted.items()
        if (here[name] or number).split("+")[0] != number
    ]
    if missing or other:
        parts = [f"not installed: {listed(missing)}"] * bool(missing) + [listed(other)] * bool(other)
        yield NOTE, f"not those of {lock.name}: {'; '.join(parts)}", "make setup"
    elif not missing_core:
        yield OK, f"{len(wanted)} as in {lock.name}; torch {here.get('torch')}"


def _gpu(root: Path) -> Found:
    import torch

    cuda = f"CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = map(_gigabytes, torch.cuda.mem_get_info(index))
            yield OK, f"cuda:{index} {torch.cuda.get_device_name(index)}, {free} of {total} free, {cuda}"
    elif shutil.which("nvidia-smi"):
        text = f"nvidia-smi is here, but torch {torch.__version__} ({cuda}) finds no GPU"
        yield NOTE, text, "look at the driver's version"
    else:
        yield NOTE, "none; the compact SAM trains in minutes without, ViT-B does not"


def _memory(root: Path) -> Found:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{_gigabytes(memory.available)} of {_gigabytes(memory.total)} free"
    if memory.available < LITTLE_MEMORY:
        yield NOTE, text, "lower train.batch_size if it does not suffice"
    else:
        yield OK, text


def _disk(root: Path) -> Found:
    from lesionsam.utils.files import free_disk_bytes

    free = free_disk_bytes(root)
    data, text = _raw_params(root).get("data", {}), f"{_gigabytes(free)} free"
    is_there = (root / "data" / "raw" / "index.csv").is_file()
    needed = 0.0 if is_there or data.get("subset") else 3 * ARCHIVES.get(data.get("source"), 0.0)
    if free < needed:
        text += f"; all of {data['source']} may take {_gigabytes(needed)}"
        yield NOTE, text, "free some space, or set data.subset"
    else:
        yield NOTE if free < LITTLE_DISK else OK, text
    if not os.access(root, os.W_OK):
        yield PROBLEM, f"{root}: no permission to write", "work in a folder of your own"


def _raw_params(root: Path) -> dict[str, Any]:
    """Read params.yaml unchecked; empty if there is none."""
    from lesionsam.config.load import read_yaml

    path = root / "params.yaml"
    return read_yaml(path) if path.is_file() else {}


def _params(root: Path) -> Found:
    from lesionsam.config.load import load_config

    path = root / "params.yaml"
    if not path.is_file():
        yield NOTE, "no params.yaml here: not a working folder", "lesionsam preset demo writes one"
        return
    config = load_config(path)
    yield OK, f"{config.data.source} data, {config.model.name}, method {config.method.name}"
    if config.runtime.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            text = f"runtime.device is {config.runtime.device}, and there is no GPU"
            yield PROBLEM, text, "set runtime.device to auto"


def without_password(uri: str) -> str:
    """Return a URI without user name and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _tracking(root: Path) -> Found:
    from lesionsam.tracking.registry import tracking_uri
    from lesionsam.tracking.spool import Spool
    from lesionsam.tracking.store import artifact_folder, foreign_artifacts

    if _raw_params(root).get("tracking", {}).get("enabled") is False:
        yield NOTE, "switched off (tracking.enabled)"
    uri = tracking_uri(root)
    shown = without_password(uri)
    if uri.startswith("sqlite:///"):
        yield from _database(Path(uri.removeprefix("sqlite:///")), shown)
    elif uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_SECONDS) as answer:  # noqa: S310  # nosec B310
                yield OK, f"{shown} answers ({answer.status})"
        except OSError as error:
            text = f"{shown} does not answer ({_line(error)}); training goes on all the same and sends later"
            yield PROBLEM, text, "start the server, or empty tracking.uri"
    else:
        yield NOTE, f"{shown}: not looked at"
    for place in foreign_artifacts(root):
        text = f"artifacts go to {place}: this project was copied or moved"
        yield NOTE, text, f"make ui, or the next training, takes {artifact_folder(root)} instead"
    waiting = [spool.pending()[0] for spool in Spool.all(root)]
    if num_waiting := sum(waiting):
        text = f"{num_waiting} entries of {sum(map(bool, waiting))} runs are not sent yet"
        yield NOTE, text, "make ui sends them, and so does the next training"


def _database(path: Path, shown: str) -> Found:
    from lesionsam.tracking.store import store_problem

    if not path.is_file():
        yield NOTE, f"{shown}: not there yet; the first training makes it"
    elif problem := store_problem(path):
        text, _, remedy = problem.rpartition("; ")
        yield PROBLEM, text, remedy
    else:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            ((num_runs,),) = database.execute("SELECT COUNT(*) FROM runs").fetchall()
            aliases = database.execute("SELECT name, alias, version FROM registered_model_aliases").fetchall()
        named = ", ".join(f"models:/{name}@{alias} is version {number}" for name, alias, number in aliases)
        yield OK, f"{shown}: {num_runs} runs{'; ' if named else ''}{named}"


def _data(root: Path) -> Found:
    index, boxes = root / "data" / "raw" / "index.csv", root / "data" / "boxes.csv"
    if not index.is_file():
        yield NOTE, "none yet", "dvc repro boxes"
        return
    rows = _rows(index)
    splits = Counter(row["split"] for row in rows)
    masked = sum(bool(row["mask_path"]) for row in rows)
    text = f"{', '.join(f'{count} {name}' for name, count in splits.items())} images, {masked} with masks"
    if boxes.is_file():
        yield OK, f"{text}; boxes of {len(_rows(boxes))} lesions"
    else:
        yield NOTE, f"{text}; no boxes yet", "dvc repro boxes"


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _weights(root: Path) -> Found:
    stated = root / "models" / "pretrained" / "weights.json"
    checkpoint = str(_raw_params(root).get("model", {}).get("checkpoint", ""))
    if stated.is_file():
        weights = json.loads(stated.read_text(encoding="utf-8"))
        yield OK, f"pretrained: {weights['name']} from {weights['source']}"
    elif checkpoint and checkpoint != "published" and not (root / checkpoint).exists():
        yield PROBLEM, f"model.checkpoint: {checkpoint} is not there", "name a file that is, or `published`"
    else:
        yield NOTE, "pretrained: none yet", "dvc repro weights"
    adapted = root / "models" / "adapted"
    if (adapted / "best.safetensors").is_file():
        run = adapted / "run.json"
        tracked = f"run {json.loads(run.read_text(encoding='utf-8'))['run_id']}" if run.is_file() else "not tracked"
        tested = "evaluated" if (root / "results" / "summary.json").is_file() else "not evaluated"
        yield OK, f"adapted: models/adapted/best.safetensors, {tracked}, {tested}"
    else:
        yield NOTE, "adapted: none yet", "dvc repro"


def _dvc(root: Path) -> Found:
    from lesionsam.config.load import read_yaml

    program = shutil.which("dvc", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        yield NOTE, "not installed; the stages also run one by one: python stages/download.py, ..."
        return
    if not (root / "dvc.yaml").is_file() or not (root / ".dvc").is_dir():
        yield NOTE, "no dvc.yaml here: not a working folder"
        return
    try:
        if (root / "dvc.lock").is_file():
            read_yaml(root / "dvc.lock")
    except UserError as error:  # as after a merge; DVC's own words say no more than that it is invalid
        yield PROBLEM, str(error), "git checkout --ours dvc.lock, then dvc repro"
        return
    environment = {**os.environ, "DVC_NO_ANALYTICS": "true"}
    how: dict[str, Any] = {"cwd": root, "env": environment, "capture_output": True, "text": True, "check": False}
    try:
        done = subprocess.run([program, "status", "--json"], timeout=DVC_SECONDS, **how)
    except subprocess.TimeoutExpired:
        yield NOTE, f"`dvc status` took more than {DVC_SECONDS:.0f} s; is another dvc running?"
        return
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        remedy = "run it, and see what it says"
        if "RWLock-file" in done.stderr:  # which DVC writes in place
            remedy = "a dvc was killed as it wrote that file: rm .dvc/tmp/rwlock, while no other dvc runs here"
        yield PROBLEM, f"`dvc status` failed: {words[:200]}", remedy
    elif stages := list(json.loads(done.stdout or "{}")):
        yield NOTE, f"changed since they ran, or never run: {listed(stages)}", "dvc repro"
    else:
        yield OK, "every stage is up to date"


LOOKS: dict[str, Callable[[Path], Found]] = {
    "python": _python,
    "packages": _packages,
    "gpu": _gpu,
    "memory": _memory,
    "disk": _disk,
    "params": _params,
    "data": _data,
    "weights": _weights,
    "dvc": _dvc,
    "tracking": _tracking,
}

"""`lesionsam doctor`: report the state of the installation and the working folder, and the next step.

It must work where nothing else does: every check imports what it needs itself, and an error becomes a line of output.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lesionsam.errors import UserError, listed

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
# Without these nothing trains or predicts; the rest is for one command each.
CORE = (
    "torch",
    "torchvision",
    "segment-anything",
    "numpy",
    "scipy",
    "scikit-image",
    "pillow",
    "safetensors",
    "pydantic",
    "ruamel-yaml",
    "jinja2",
    "filelock",
    "rich",
    "typer",
)
LITTLE_MEMORY, LITTLE_DISK = 4e9, 2e9  # bytes; below them a line becomes a note
# Bytes of the archives; they are unpacked, and DVC keeps a copy: three times that.
ARCHIVES = {"isic2016": 0.84e9, "isic2017": 12.1e9, "isic2018": 13.6e9}
SERVER_SECONDS, DVC_SECONDS = 3.0, 120.0
# Errors that a check may meet on a machine that is not set up; other errors are raised.
HINDRANCES = (
    OSError,
    ImportError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    subprocess.SubprocessError,
    sqlite3.Error,
)


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
            findings.extend(look(root))
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


def _python(root: Path) -> Iterator[Finding]:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    yield Finding("python", OK, text)


def pinned(text: str) -> dict[str, str]:
    """Return name -> version of a lock file's lines that apply to this Python and system."""
    from packaging.requirements import InvalidRequirement, Requirement

    found = {}
    for line in text.splitlines():
        if not re.match(r"[A-Za-z0-9]", line):
            continue
        try:
            requirement = Requirement(line.rstrip("\\ "))
        except InvalidRequirement:
            continue
        exact = [each.version for each in requirement.specifier if each.operator == "=="]
        if exact and (requirement.marker is None or requirement.marker.evaluate()):
            found[re.sub(r"[-_.]+", "-", requirement.name).lower()] = exact[0]
    return found


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _packages(root: Path) -> Iterator[Finding]:
    missing_core = [name for name in CORE if _installed(name) is None]
    if missing_core:
        yield Finding("packages", PROBLEM, f"missing: {listed(missing_core)}", "make setup")
    lock = root / "requirements.lock"
    if not lock.is_file():
        if not missing_core:
            yield Finding("packages", NOTE, f"no {lock.name} here to compare with; torch {_installed('torch')}")
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
        text = "; ".join(
            ([f"not installed: {listed(missing)}"] if missing else []) + ([listed(other)] if other else [])
        )
        yield Finding("packages", NOTE, f"not those of {lock.name}: {text}", "make setup")
    elif not missing_core:
        yield Finding("packages", OK, f"{len(wanted)} as in {lock.name}; torch {here.get('torch')}")


def _gpu(root: Path) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            yield Finding(
                "gpu",
                OK,
                f"cuda:{index} {torch.cuda.get_device_name(index)}, {_gigabytes(free)} of "
                f"{_gigabytes(total)} free, CUDA {torch.version.cuda}",
            )
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "gpu",
            NOTE,
            f"nvidia-smi is here, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU",
            "look at the driver's version",
        )
    else:
        yield Finding("gpu", NOTE, "none; the compact SAM trains in minutes without, ViT-B does not")


def _memory(root: Path) -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{_gigabytes(memory.available)} of {_gigabytes(memory.total)} free"
    little = memory.available < LITTLE_MEMORY
    yield Finding(
        "memory", NOTE if little else OK, text, "lower train.batch_size if it does not suffice" if little else ""
    )


def _disk(root: Path) -> Iterator[Finding]:
    from lesionsam.utils.files import free_disk_bytes

    free = free_disk_bytes(root)
    data, text = _raw_params(root).get("data", {}), f"{_gigabytes(free)} free"
    is_there = (root / "data" / "raw" / "index.csv").is_file()
    needed = 0.0 if is_there or data.get("subset") else 3 * ARCHIVES.get(data.get("source"), 0.0)
    if free < needed:
        yield Finding(
            "disk",
            NOTE,
            f"{text}; all of {data['source']} may take {_gigabytes(needed)}",
            "free some space, or set data.subset",
        )
    else:
        yield Finding("disk", NOTE if free < LITTLE_DISK else OK, text)
    if not os.access(root, os.W_OK):
        yield Finding("disk", PROBLEM, f"{root}: no permission to write", "work in a folder of your own")


def _raw_params(root: Path) -> dict[str, Any]:
    """Read params.yaml unchecked; empty if there is none."""
    from lesionsam.config.load import read_yaml

    path = root / "params.yaml"
    return read_yaml(path) if path.is_file() else {}


def _params(root: Path) -> Iterator[Finding]:
    from lesionsam.config.load import load_config

    path = root / "params.yaml"
    if not path.is_file():
        yield Finding("params", NOTE, "no params.yaml here: not a working folder", "lesionsam preset demo writes one")
        return
    config = load_config(path)
    yield Finding("params", OK, f"{config.data.source} data, {config.model.name}, method {config.method.name}")
    if config.runtime.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            yield Finding(
                "params",
                PROBLEM,
                f"runtime.device is {config.runtime.device}, and there is no GPU",
                "set runtime.device to auto",
            )


def without_password(uri: str) -> str:
    """Return a URI without user name and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _tracking(root: Path) -> Iterator[Finding]:
    from lesionsam.tracking.registry import tracking_uri
    from lesionsam.tracking.spool import Spool
    from lesionsam.tracking.store import store_problem

    if _raw_params(root).get("tracking", {}).get("enabled") is False:
        yield Finding("tracking", NOTE, "switched off (tracking.enabled)")
    uri = tracking_uri(root)
    shown = without_password(uri)
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        if not path.is_file():
            yield Finding("tracking", NOTE, f"{shown}: not there yet; the first training makes it")
        elif problem := store_problem(path):
            text, _, remedy = problem.rpartition("; ")
            yield Finding("tracking", PROBLEM, text, remedy)
        else:
            database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
            try:
                ((num_runs,),) = database.execute("SELECT COUNT(*) FROM runs").fetchall()
                aliases = database.execute("SELECT name, alias, version FROM registered_model_aliases").fetchall()
            finally:
                database.close()
            named = ", ".join(f"models:/{name}@{alias} is version {number}" for name, alias, number in aliases)
            yield Finding("tracking", OK, f"{shown}: {num_runs} runs{'; ' if named else ''}{named}")
    elif uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_SECONDS) as answer:  # noqa: S310  # nosec B310
                yield Finding("tracking", OK, f"{shown} answers ({answer.status})")
        except (urllib.error.URLError, TimeoutError, OSError) as error:
            yield Finding(
                "tracking",
                PROBLEM,
                f"{shown} does not answer ({_line(error)}); training goes on all the same and sends later",
                "start the server, or empty tracking.uri",
            )
    else:
        yield Finding("tracking", NOTE, f"{shown}: not looked at")
    waiting = [spool.pending()[0] for spool in Spool.all(root)]
    if num_waiting := sum(waiting):
        yield Finding(
            "tracking",
            NOTE,
            f"{num_waiting} entries of {sum(map(bool, waiting))} runs are not sent yet",
            "make ui sends them, and so does the next training",
        )


def _data(root: Path) -> Iterator[Finding]:
    index, boxes = root / "data" / "raw" / "index.csv", root / "data" / "boxes.csv"
    if not index.is_file():
        yield Finding("data", NOTE, "none yet", "dvc repro boxes")
        return
    with index.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    splits = Counter(row["split"] for row in rows)
    masked = sum(bool(row["mask_path"]) for row in rows)
    text = f"{', '.join(f'{count} {name}' for name, count in splits.items())} images, {masked} with masks"
    if not boxes.is_file():
        yield Finding("data", NOTE, f"{text}; no boxes yet", "dvc repro boxes")
        return
    with boxes.open(newline="", encoding="utf-8") as file:
        yield Finding("data", OK, f"{text}; boxes of {sum(1 for _ in csv.DictReader(file))} lesions")


def _weights(root: Path) -> Iterator[Finding]:
    stated = root / "models" / "pretrained" / "weights.json"
    if stated.is_file():
        weights = json.loads(stated.read_text(encoding="utf-8"))
        yield Finding("weights", OK, f"pretrained: {weights['name']} from {weights['source']}")
    else:
        checkpoint = str(_raw_params(root).get("model", {}).get("checkpoint", ""))
        if checkpoint and checkpoint != "published" and not (root / checkpoint).is_file():
            yield Finding(
                "weights",
                PROBLEM,
                f"model.checkpoint: {checkpoint} is not there",
                "name a file that is, or `published`",
            )
        else:
            yield Finding("weights", NOTE, "pretrained: none yet", "dvc repro weights")
    adapted = root / "models" / "adapted"
    if (adapted / "best.safetensors").is_file():
        run = adapted / "run.json"
        tracked = f"run {json.loads(run.read_text(encoding='utf-8'))['run_id']}" if run.is_file() else "not tracked"
        tested = "evaluated" if (root / "results" / "summary.json").is_file() else "not evaluated"
        yield Finding("weights", OK, f"adapted: models/adapted/best.safetensors, {tracked}, {tested}")
    else:
        yield Finding("weights", NOTE, "adapted: none yet", "dvc repro")


def _dvc(root: Path) -> Iterator[Finding]:
    program = shutil.which("dvc", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        yield Finding("dvc", NOTE, "not installed; the stages also run one by one: python stages/download.py, ...")
        return
    if not (root / "dvc.yaml").is_file() or not (root / ".dvc").is_dir():
        yield Finding("dvc", NOTE, "no dvc.yaml here: not a working folder")
        return
    environment = {**os.environ, "DVC_NO_ANALYTICS": "true"}
    try:
        done = subprocess.run(
            [program, "status", "--json"],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DVC_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Finding("dvc", NOTE, f"`dvc status` took more than {DVC_SECONDS:.0f} s; is another dvc running?")
        return
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        remedy = "run it, and see what it says"
        if "RWLock-file" in done.stderr:  # which DVC writes in place
            remedy = "a dvc was killed as it wrote that file: rm .dvc/tmp/rwlock, while no other dvc runs here"
        yield Finding("dvc", PROBLEM, f"`dvc status` failed: {words[:200]}", remedy)
        return
    stages = list(json.loads(done.stdout or "{}"))
    if stages:
        yield Finding("dvc", NOTE, f"changed since they ran, or never run: {listed(stages)}", "dvc repro")
    else:
        yield Finding("dvc", OK, "every stage is up to date")


LOOKS: dict[str, Callable[[Path], Iterator[Finding]]] = {
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

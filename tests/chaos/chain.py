"""`dvc repro` of the whole chain on the tiny preset, struck again and again, and what it leaves in the end."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

from ruamel.yaml import YAML
from safetensors.torch import load_file

from chaos.run import LIMIT_S, Run
from helpers.pipeline import WEIGHTS, environment, repository_copy, run, set_parameter
from lesionsam.tracking.spool import read_lines
from lesionsam.tracking.tracker import sync
from pipeline import test_pipeline

DVC, GROUP, STAGE, TERM, INT, SECOND = (
    "kill -9 of dvc",
    "kill -9 of all",
    "kill -9 of the stage",
    "SIGTERM to dvc",
    "Ctrl-C",
    "a second dvc repro",
)
FAULTS = {DVC: 4, GROUP: 3, STAGE: 3, TERM: 2, INT: 2, SECOND: 1}
STRIKES = 6  # of a chain, before it is left alone
FROM_TRAINING = 0.6  # share of the chains whose data and weights are there already
PROCESSOR_SECONDS = 1.0, 4.5  # of a `dvc repro` and its stages before it is struck
END_S = 60.0  # for what is left of a killed one to end; it takes half a second on a free core
OUTPUTS = ("data/boxes.csv", "data/raw/index.csv", "results/per_image.csv", "results/table.csv", "results/table.md")
TICKS = os.sysconf("SC_CLK_TCK")


def processes(folder: Path) -> dict[int, str]:
    """The living processes that work in a folder: number -> command line; those that send to MLflow left out."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if command and "lesionsam.tracking.sender" not in command:
                    found[int(entry.name)] = command
        except OSError:  # ended meanwhile
            continue
    return found


def processor_seconds(pids: list[int]) -> float:
    """Processor time that these processes have taken."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(int(fields[k]) for k in (11, 12, 13, 14))  # its own and its ended children's
    return ticks / TICKS


def tracebacks(log: Path) -> list[str]:
    """The last line of each traceback that goes through this project's files; DVC's own are not ours."""
    found = re.findall(r"^Traceback \(most recent call last\):\n((?:[ ].*\n)+)(\S.*)$", log.read_text(), re.M)
    return [ending for frames, ending in found if re.search(r'File ".*(/lesionsam/|stages/)', frames)]


def mend_rwlock(folder: Path) -> bool:
    """Remove the file in which DVC notes who reads and writes what, where a kill tore it; DVC writes it in place."""
    path = folder / ".dvc" / "tmp" / "rwlock"
    try:
        json.loads(path.read_bytes())
    except FileNotFoundError:
        return False
    except ValueError:
        path.unlink()
        return True
    return False


class Campaign:
    """Copies of the repository, one a run, each struck `STRIKES` times and then left to finish.

    Args:
        without: `lock` takes out the lock and the end with the parent.
    """

    def __init__(self, folder: Path, *, without: str = "") -> None:
        test_pipeline.LIMIT_S = int(LIMIT_S)
        self.template, self.undisturbed = folder / "template", folder / "undisturbed"
        if not self.undisturbed.exists():  # else kept of an earlier campaign
            self.template.mkdir()
            repository_copy(self.template)
            set_parameter(self.template, "tracking.system_metrics", False)
            set_parameter(self.template, "runtime.num_workers", 1)
            shutil.copytree(self.template, self.undisturbed, symlinks=True)
        mend_rwlock(self.undisturbed)
        run(self.undisturbed, "dvc", "repro")
        self.prepared = folder / "prepared"
        shutil.rmtree(self.prepared, ignore_errors=True)
        shutil.copytree(self.undisturbed, self.prepared, symlinks=True)
        for name in ("models/adapted", "results", "report", ".scratch", "mlartifacts", ".dvc/cache/runs"):
            shutil.rmtree(self.prepared / name, ignore_errors=True)
        (self.prepared / "mlflow.db").unlink(missing_ok=True)
        lock = YAML(typ="safe").load((self.prepared / "dvc.lock").read_text(encoding="utf-8"))
        for stage in ("train", "evaluate", "report"):
            del lock["stages"][stage]
        with (self.prepared / "dvc.lock").open("w", encoding="utf-8") as file:
            YAML(typ="safe").dump(lock, file)
        if without:
            self.prepared = self.template  # its code has changed: nothing is prepared
            for module, protection, nothing in (
                ("locks", "def file_lock(", "@contextmanager\ndef file_lock(path, what):\n    yield\n"),
                ("processes", "def exit_with_parent(", "def exit_with_parent():\n    pass\n"),
            ):
                path = self.template / "src" / "lesionsam" / "utils" / f"{module}.py"
                text = path.read_text(encoding="utf-8")
                assert protection in text, path
                text = text.replace(protection, protection.replace("def ", "def _unused_"), 1)
                path.write_text(f"{text}\n\n{nothing}", encoding="utf-8")

    def run(self, rng: random.Random, folder: Path) -> Run:
        """One chain: strikes, then the same command to its end."""
        shutil.copytree(self.prepared if rng.random() < FROM_TRAINING else self.template, folder, symlinks=True)
        faults = rng.choices(list(FAULTS), list(FAULTS.values()), k=STRIKES)
        done = Run(f"{STRIKES} strikes")
        log = folder.with_suffix(".log")
        for fault in faults:
            self.strike(rng, fault, folder, log, done)
            if mend_rwlock(folder):
                done.numbers["DVC's own .dvc/tmp/rwlock torn, removed by hand"] = 1
        last = subprocess.run(
            ["dvc", "repro"],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        with log.open("a") as file:
            file.write(last.stdout + last.stderr)
        if last.returncode:
            done.broken.append(f"cannot go on: {(last.stdout + last.stderr).splitlines()[-1]}")
        else:
            done.broken += self.differences(folder)
        endings = tracebacks(log)
        if early := endings.count("KeyboardInterrupt"):  # before the stage's own first line, while libraries load
            done.numbers["Python's own words on a Ctrl-C"] = early
        done.broken += [f"traceback: {ending}" for ending in endings if ending != "KeyboardInterrupt"]
        if not done.broken:
            shutil.rmtree(folder)
        return done

    def strike(self, rng: random.Random, fault: str, folder: Path, log: Path, done: Run) -> None:
        """A `dvc repro` that something happens to after some processor time, if it has not ended before."""
        limit, at_once = rng.uniform(*PROCESSOR_SECONDS), rng.random() < 0.5
        with log.open("ab") as file:
            dvc = subprocess.Popen(
                ["dvc", "repro"], cwd=folder, env=environment(), stdout=file, stderr=file, start_new_session=True
            )
        while dvc.poll() is None and processor_seconds(list(processes(folder))) < limit:
            time.sleep(0.02)
        if dvc.poll() is not None:
            done.numbers["over before the strike"] = done.numbers.get("over before the strike", 0) + 1
            return
        done.numbers[fault] = done.numbers.get(fault, 0) + 1
        stages = [pid for pid, command in processes(folder).items() if "stages/" in command]
        if fault == SECOND:
            second = run(folder, "dvc", "repro", check=False)
            if dvc.poll() is None and not second.returncode:
                done.broken.append("a second dvc repro ran beside the first")
            dvc.kill()
        elif fault == STAGE:
            for pid in stages:
                os.kill(pid, signal.SIGKILL)
            if not stages:
                dvc.kill()
        elif fault in (GROUP, INT):
            os.killpg(dvc.pid, signal.SIGKILL if fault == GROUP else signal.SIGINT)
        else:
            dvc.send_signal(signal.SIGKILL if fault == DVC else signal.SIGTERM)
        done.kills += 1
        dvc.wait(LIMIT_S)
        if at_once:  # the next one starts while the stage of this one may still live
            return
        deadline = time.monotonic() + END_S
        while (left := processes(folder)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            done.broken.append(f"orphans after {fault}: {', '.join(left.values())}")
            for pid in left:
                os.kill(pid, signal.SIGKILL)

    def differences(self, folder: Path) -> list[str]:
        """What differs from the undisturbed chain, and what MLflow lacks or has twice."""
        found = [
            f"{name} differs"
            for name in OUTPUTS
            if (folder / name).read_bytes() != (self.undisturbed / name).read_bytes()
        ]
        for name in WEIGHTS:
            ours, theirs = (load_file(each / "models" / "adapted" / name) for each in (folder, self.undisturbed))
            if ours.keys() != theirs.keys() or not all(ours[key].equal(theirs[key]) for key in ours):
                found.append(f"{name} differs")
        found += [
            f"left over: {path.name}"
            for path in folder.rglob(".*.tmp")
            if ".scratch" not in path.parts and ".dvc" not in path.parts
        ]
        if processes(folder):
            found.append("a process is left")
        if waiting := sync(folder, LIMIT_S):
            found.append(f"{waiting} points not sent")
        else:
            found += lost_points(folder)
        return found


def lost_points(folder: Path) -> list[str]:
    """Points of metrics.jsonl that the run's MLflow database lacks, or has more than once."""
    logged = {
        (name, entry["step"])
        for entry, _ in read_lines(folder / "models" / "adapted" / "metrics.jsonl")
        if entry
        for name in entry["values"]
    }
    database = sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True)
    try:
        rows = database.execute(
            "select key, step, count(*) from metrics where key not like 'test/%' group by key, step, run_uuid"
        ).fetchall()
        runs = database.execute("select count(*) from runs").fetchone()[0]
    finally:
        database.close()
    stored = {(name, step) for name, step, _ in rows}
    found = [f"{len(logged - stored)} points lost"] if logged - stored else []
    found += [f"{runs} runs in MLflow, expected 1"] if runs != 1 else []
    doubled = sum(count > 1 for _, _, count in rows)
    return found + ([f"{doubled} points twice"] if doubled else [])

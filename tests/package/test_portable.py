"""Predicting, annotating and exporting need no module that only POSIX systems have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.imports import reached
from package.fresh import prepare
from repo.import_graph import ROOT, imported_names, module_files

POSIX_ONLY = ("fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios", "tty")
GUARDED = {"lesionsam.utils.locks"}  # imports fcntl in a `try`
ENTRIES = (
    "annotation.serve",
    "cli.app",
    "experiment.auto",
    "export.base",
    "export.formats",
    "export.plain",
    "inference.files",
    "inference.predictor",
    "tracking.registry",
    "utils.devices",
)
# `annotate` is asked for its page, as it serves until it is ended.
BLOCKED = f"""
import sys
for name in {POSIX_ONLY[:1] + POSIX_ONLY[3:]!r}:
    sys.modules[name] = None
sys.argv[0] = "lesionsam"
from lesionsam.cli.app import main
if sys.argv[1] == "annotate":
    import threading, urllib.request, uvicorn
    serve = uvicorn.Server.run
    def ask(self, sockets=None):
        host, port = sockets[0].getsockname()
        def fetch():
            print(urllib.request.urlopen(f"http://{{host}}:{{port}}/", timeout=60).status, "answered")
            self.should_exit = True
        threading.Timer(1, fetch).start()
        serve(self, sockets)
    uvicorn.Server.run = ask
main()
"""


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_module_of_theirs_imports_a_posix_only_one(entry: str) -> None:
    found = {
        f"{module}: {name}"
        for module in reached(f"lesionsam.{entry}") - GUARDED
        for name in imported_names(module_files()[module], top_level_only=True) & {*POSIX_ONLY}
    }
    assert not found


@pytest.mark.package
@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        ("predict photo --boxes boxes.csv --model model --device cpu", "predictions/masks/a.png"),
        ("export --format safetensors --model model --num-images 1 --images photo", "exports/safetensors"),
        ("annotate photo --model model --no-browser --device cpu", "answered"),
    ],
)
def test_the_commands_work_without_them(arguments: str, made: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / made).exists() or made in done.stdout

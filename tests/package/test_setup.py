"""`make setup` without uv in the index, and without what the lock pins."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from repo.import_graph import ROOT

pytestmark = pytest.mark.package


def test_pip_installs_the_lock_where_the_index_lacks_uv(tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "pinned-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("pinned.py", "")
        file.writestr("pinned-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: pinned\nVersion: 1.0\n")
        file.writestr("pinned-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("pinned-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock = tmp_path / "requirements.lock"
    shutil.copy(ROOT / "Makefile", tmp_path)
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "UV_OFFLINE": "1"}

    def set_up(pinned: str) -> int:
        lock.write_text(f"pinned==1.0 \\\n    --hash=sha256:{pinned}\nuv==1.0 \\\n    --hash=sha256:{digest}\n")
        command = ["make", f"PYTHON={sys.executable}", ".venv/.locked"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode

    assert set_up(pinned="0" * 64) != 0, "another file under the pinned name"
    assert not (tmp_path / ".venv" / ".locked").exists()
    assert set_up(pinned=digest) == 0
    assert list((tmp_path / ".venv").glob("lib/python*/site-packages/pinned.py"))

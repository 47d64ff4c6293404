"""What must hold for the files as such: sizes, no traces of one machine, pinned packages, no leftovers."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGE_ALLOWED = ("foundation/",)  # the compact model's weights
MAX_BYTES = 3_000_000
BINARY = {".png", ".jpg", ".jpeg", ".gif", ".safetensors", ".npz", ".npy", ".pdf", ".ico"}


def repository_files() -> list[Path]:
    """Files git tracks or would take; without git, everything outside the ignored folders is unknown, so skip."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def text_files() -> list[Path]:
    """The same, without pictures and weights."""
    return [path for path in repository_files() if path.suffix not in BINARY]


def offenders(pattern: str, *, but: tuple[str, ...] = ()) -> list[str]:
    """`file:line` of every line of a text file that the pattern matches, this file apart."""
    found = []
    for path in text_files():
        name = path.relative_to(ROOT).as_posix()
        if path == Path(__file__).resolve() or name in but:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    return found


def test_no_large_files() -> None:
    large = [path.relative_to(ROOT).as_posix() for path in repository_files() if path.stat().st_size > MAX_BYTES]
    assert [name for name in large if not name.startswith(LARGE_ALLOWED)] == []


def test_no_machine_paths() -> None:
    """Nobody else has this machine's folders. /home/lesionsam is the Docker image's own."""
    assert offenders(r"(?<![\w.])/(work|root|Users|home(?!/lesionsam)|mnt|opt/(?!venv))/") == []


def test_no_registry_hosts() -> None:
    """Where packages come from is the user's setting."""
    hosts = r"(?i)pypi\.org|pythonhosted\.org|--(extra-)?index-url|--find-links|registry\.npmjs"
    assert offenders(hosts, but=("Makefile",)) == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"--\S*index\S*", makefile)) <= {"--no-emit-index-url", "--no-index"}


def test_nothing_unfinished() -> None:
    assert offenders(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError") == []
    assert offenders(r"^(<{7}|={7}$|>{7})") == []


def test_no_commented_out_code() -> None:
    statements = [
        r"import \w+$",
        r"from \w[\w.]* import",
        r"def \w+\(",
        r"return \w+\(",
        r"(if|for) .*:$",
        r"\w+ = \w+\(.*\)$",
    ]
    pattern = rf"^\s*#\s*({'|'.join(statements)})"
    assert [hit for hit in offenders(pattern) if ".py:" in hit] == []


def test_text_files_are_tidy() -> None:
    """UTF-8, Unix line ends, a newline at the end, no tabs outside the Makefile."""
    for path in text_files():
        data = path.read_bytes()
        if not data or path.name == "LICENSE":
            continue
        assert b"\r" not in data, path
        assert data.endswith(b"\n"), path
        assert path.name == "Makefile" or path.suffix == ".csv" or b"\t" not in data, path


def test_lock_pins_every_package_with_hashes() -> None:
    blocks = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text(encoding="utf-8").strip())
    assert len(blocks) > 100
    for block in blocks:
        first = block.splitlines()[0]
        assert re.match(r"[a-z0-9-]+==[\w.+]+( ; .+)? \\$", first), first
        assert "--hash=sha256:" in block, first


def test_lock_holds_what_requirements_ask_for() -> None:
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.M))
    for line in (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines():
        name, _, version = line.split("#")[0].strip().partition("==")
        if not name:
            continue
        key = name.split("[")[0].replace(".", "-").replace("_", "-").lower()
        assert key in locked, line
        assert version in ("", locked[key]), line


def test_data_files_and_licence_are_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    package = ROOT / "src" / "lesionsam"
    patterns = project["tool"]["setuptools"]["package-data"]["lesionsam"]
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    shipped = {path for path in repository_files() if path.is_relative_to(package) and path.suffix != ".py"}
    assert packaged == shipped
    assert "Apache License" in (ROOT / project["project"]["license-files"][0]).read_text(encoding="utf-8")


def test_ignored_folders_are_anchored(tmp_path: Path) -> None:
    """`data/` without its slash in .gitignore would hide src/lesionsam/data."""
    for name in ("src/lesionsam/data/sources/isic.py", "src/lesionsam/models/sam.py", "tests/data/golden.json"):
        done = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", name], cwd=ROOT, check=False)
        assert done.returncode == 1, name
    for name in ("data/raw/index.csv", "models/adapted/best.safetensors", "own/images/train/a.jpg", ".venv/bin/python"):
        done = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", name], cwd=ROOT, check=False)
        assert done.returncode == 0, name

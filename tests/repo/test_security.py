"""What the sources may not hold: pickles, unchecked archives, shells, plain http; and one function that opens images.

bandit sees some of it and not `extractall`; here nothing is excused by a comment.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "stages").glob("*.py")])
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"extractall", "unpack_archive", "mktemp", "os.system", "os.popen", "eval", "exec"}
LOCAL = ("http://127.0.0.1", "http://localhost", "http://{")  # the page that this machine serves to itself
DESCRIBED = "https:// or http://"  # a tracking server's address that a user gives, in a message
OWN_PNGS = {"page.py", "comparison.py", "mlflow_upload.py", "mlflow.py"}  # open what this project drew


def faults(source: str) -> Iterator[str]:
    """What a module does that none may; "line: what"."""
    nodes, documented = list(ast.walk(ast.parse(source))), set()
    for node in nodes:
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            documented.add(id(body[0].value))  # a docstring, as far as it is a text
    for node in nodes:
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            yield from (f"{line}: import {a.name}" for a in node.names if a.name.partition(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            names = {alias.name for alias in node.names} - {"UnpicklingError"}
            yield from (f"{line}: from {node.module} import {name}" for name in names)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            values = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name == "torch.load" and values.get("weights_only") != "True":
                yield f"{line}: torch.load without weights_only=True"
            if values.get("shell", "False") != "False":
                yield f"{line}: {name} with a shell"
            if values.get("allow_pickle", "False") != "False":
                yield f"{line}: {name} with allow_pickle"
            if values.get("verify", "") == "False":
                yield f"{line}: {name} without a check of certificates"
            called = name.rpartition(".")[2]
            if name in FORBIDDEN_CALLS or (called in FORBIDDEN_CALLS and called not in ("eval", "exec")):  # sam.eval()
                yield f"{line}: {name}()"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            text = node.value.replace(DESCRIBED, "")
            for allowed in LOCAL:
                text = text.replace(allowed, "")
            if "http://" in text and text.strip() != "http://":  # the bare prefix: compared with, or completed
                yield f"{line}: {text[text.index('http://') :][:40]}"


@pytest.mark.parametrize("path", SOURCES, ids=[path.relative_to(ROOT).as_posix() for path in SOURCES])
def test_nothing_dangerous(path: Path) -> None:
    assert list(faults(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "archive.extractall(folder)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "fetch('http://example.org/a.zip')",
        "requests.get(url, verify=False)",
        "shutil.unpack_archive(path)",
    ],
)
def test_the_check_sees(line: str) -> None:
    assert len(list(faults(line))) == 1


def test_one_module_opens_images() -> None:
    """Training, evaluation, prediction and the page take the same pictures and refuse the same ones."""
    found = {
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func)
        in ("Image.open", "PIL.Image.open", "cv2.imread", "imageio.imread", "tifffile.imread", "plt.imread")
    }
    assert found == {"images.py"} | OWN_PNGS

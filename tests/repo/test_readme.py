"""The commands, parameters, files and links of the documents exist, and `make` lists its targets."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
CHINESE = "README.zh-CN.md"
HOWTO = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "howto").glob("*.md"))
HOWTO.remove("docs/howto/index.md")  # of the site; docs/README.md is the repository's
DOCUMENTS = [
    "README.md",
    CHINESE,
    "CONTRIBUTING.md",
    "own/README.md",
    "docs/README.md",
    "docs/results.md",
    "docs/code.md",
    "docs/method.md",
    "docs/architecture.md",
    "docs/glossary.md",
    *HOWTO,
]
PROGRAMS = r"(make|lesionsam|dvc|mlflow|python|docker|source|git|pip|pre-commit)\b(?![.-])"
MAX_README_LINES, MAX_README_WIDTH = 150, 160


def text_of(document: str) -> str:
    """Return the text of a document."""
    return (ROOT / document).read_text(encoding="utf-8")


def commands_of(document: str) -> list[str]:
    """Return the command lines of a document, in order: lines of shell blocks, and inline code that names a program."""
    code = re.findall(r"^```([^\n]*)\n(.*?)^```|(?<!`)`([^`\n]+)`(?!`)", text_of(document), re.S | re.M)
    lines = [
        line.split("#")[0].strip()
        for language, fenced, inline in code
        if not language
        for line in (fenced or inline).splitlines()
    ]
    return [line for line in lines if re.match(PROGRAMS, line)]


def programs_of(document: str, program: str) -> list[list[str]]:
    """Return the arguments of every command line of a document that runs a program."""
    words = [shlex.split(line) for line in commands_of(document)]
    return [rest for name, *rest in words if name == program]


def options_of(arguments: list[str]) -> set[str]:
    """Return the long options among arguments, without their values."""
    return {word.split("=")[0] for word in arguments if word.startswith("--")} - {"--help"}


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def targets() -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([a-z][a-z0-9-]*):", makefile(), re.M))


@functools.cache
def options_of_script(script: str) -> set[str]:
    """Return the long options that a script's own help lists."""
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT / "src")}
    inherited = os.environ.get("PYTHONPATH")
    if inherited:
        environment["PYTHONPATH"] += os.pathsep + inherited
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout))


@functools.cache
def parameters() -> set[str]:
    """Return the dotted keys of params.yaml and of every preset, with those of the sections above them."""
    found: set[str] = set()

    def add(values: object, prefix: str) -> None:
        if isinstance(values, dict):
            for key, value in values.items():
                found.add(f"{prefix}{key}")
                add(value, f"{prefix}{key}.")

    yaml = YAML(typ="safe")
    add(yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8")), "")
    for path in preset_files():
        add(yaml.load(path.read_text(encoding="utf-8")).get("params", {}), "")
    return found


def preset_files() -> list[Path]:
    return sorted((ROOT / "src" / "lesionsam").rglob("presets/*.yaml"))


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_readme_is_short() -> None:
    """At most 150 lines, none so wide that it hides a second one."""
    lines = text_of("README.md").splitlines()
    assert len(lines) <= MAX_README_LINES
    assert [line for line in lines if len(line) > MAX_README_WIDTH] == []


def test_the_chinese_readme_has_the_english_one_s_commands() -> None:
    """The same ones, in the same order; a change of one README names what the other lacks."""
    english, chinese = commands_of("README.md"), commands_of(CHINESE)
    assert len(english) > 10
    missing, too_many = [c for c in english if c not in chinese], [c for c in chinese if c not in english]
    assert (missing, too_many) == ([], [])
    assert list(dict.fromkeys(chinese)) == list(dict.fromkeys(english))


def test_the_chinese_readme_has_the_english_one_s_figures() -> None:
    """Every row of the results table, digit for digit."""
    rows = [re.findall(r"\.\d{3}", line) for line in text_of("README.md").splitlines() if line.startswith("|")]
    chinese = [re.findall(r"\.\d{3}", line) for line in text_of(CHINESE).splitlines() if line.startswith("|")]
    assert sum(map(bool, rows)) == 6
    assert [row for row in rows if row] == [row for row in chinese if row]


def test_every_how_to_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\((howto/[\w-]+\.md)\)", text_of("docs/README.md")))
    assert {f"docs/{name}" for name in linked} == set(HOWTO)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    for arguments in programs_of(document, "make"):
        variables = {word.split("=")[0] for word in arguments if "=" in word}
        named = {word for word in arguments if "=" not in word}
        assert named <= targets(), f"{document}: make has no {named - targets()}"
        unread = {name for name in variables if f"$({name})" not in makefile()}
        assert not unread, f"{document}: the Makefile does not read {unread}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document: str) -> None:
    import typer.main

    from lesionsam.cli.app import app

    group = typer.main.get_command(app)
    for name, *rest in filter(None, programs_of(document, "lesionsam")):
        if name.startswith("-") or name == "...":
            continue
        assert name in group.commands, f"{document}: lesionsam {name}"  # pyright: ignore[reportAttributeAccessIssue]
        command = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):  # `lesionsam data convert`
            assert rest[0] in command.commands, f"{document}: lesionsam {name} {rest[0]}"
            command, rest = command.commands[rest[0]], rest[1:]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert options_of(rest) <= options, f"{document}: lesionsam {name} has no {options_of(rest) - options}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_presets_exist(document: str) -> None:
    presets = {path.stem for path in preset_files()}
    named = {rest[1] for rest in programs_of(document, "lesionsam") if rest[:1] == ["preset"] and len(rest) > 1}
    assert named - {"NAME"} <= presets, f"{document}: no preset {named - presets}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_scripts_have_the_options_named(document: str) -> None:
    for script, *rest in filter(None, programs_of(document, "python")):
        if script.startswith("-"):
            continue
        assert (ROOT / script).is_file(), f"{document}: {script}"
        unknown = options_of(rest) and options_of(rest) - options_of_script(script)
        assert not unknown, f"{document}: {script} has no {unknown}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_parameters_exist(document: str) -> None:
    """Keys given to `dvc exp run -S`, and dotted keys in inline code that begin with a section of params.yaml."""
    sections = {key for key in parameters() if "." not in key}
    named = set(re.findall(r"-S '?([\w.+]+)=", text_of(document)))
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text_of(document)):
        match = re.fullmatch(r"(\w+(?:\.[\w+]+)+)(?:\.\*|: [\w.]+)?", code)
        is_file = match and match[1].endswith((".csv", ".jsonl"))
        if match and not is_file and match[1].split(".")[0] in sections and not is_symbol(match[1]):
            named.add(match[1])
    assert named <= parameters(), f"{document}: no parameter {named - parameters()}"


def is_symbol(name: str) -> bool:
    """Return whether a dotted name begins with a module of the package, such as data.frames, or names a file."""
    package = ROOT / "src" / "lesionsam"
    parts = name.split(".")
    heads = (package.joinpath(*parts[:end]) for end in range(1, len(parts)))
    return (ROOT / name).is_file() or any(head.with_suffix(".py").is_file() for head in heads)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_exist(document: str) -> None:
    """Paths in inline code below a folder of the sources, and modules of the package in docs/code.md."""
    named = re.findall(r"(?<!`)`((?:src|stages|benchmarks|tests|docs|foundation)/[\w./-]*)`(?!`)", text_of(document))
    missing = [name for name in named if not (ROOT / name).exists()]
    if document == "docs/code.md":
        modules = re.findall(r"(?<!`)`([\w/]+(?:\.py|/))`(?!`)", text_of(document))
        folders = (ROOT, ROOT / "src" / "lesionsam", ROOT / "src" / "lesionsam" / "methods")
        missing += [name for name in modules if not any((folder / name).exists() for folder in folders)]
    assert not missing, f"{document}: {missing}"


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/log.md", "SECURITY.md"])
def test_links_lead_somewhere(document: str) -> None:
    """Relative links, and the headings that they name."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), f"{document}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), f"{document}: {link}"


@pytest.mark.parametrize("document", ["README.md", CHINESE, "docs/howto/predict.md"])
def test_python_examples_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block runs as it stands, on a picture and with weights where the page says they are."""
    from PIL import Image

    weights = tmp_path / "models" / "adapted" / "best.safetensors"
    weights.parent.mkdir(parents=True)
    shutil.copy(ROOT / "foundation" / "compact.safetensors", weights)
    Image.new("RGB", (400, 300), (180, 140, 120)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", text_of(document), re.S | re.M)
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(block, names)  # noqa: S102 (our own document)
        found = names.get("lesion") or names["prediction"]
        assert found.mask.shape == (300, 400)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_every_target() -> None:
    """One line of help per target, without setting anything up."""
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = dict(re.findall(r"^  make ([\w-]+)\s+(.+)$", done.stdout, re.M))
    assert set(listed) == targets()
    assert len(done.stdout.splitlines()) == len(listed)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", sorted(targets()))
def test_targets_can_be_planned(target: str) -> None:
    """`make -n` finds every prerequisite."""
    subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)

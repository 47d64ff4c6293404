"""The commands and links of the documents exist, and `make` lists its targets."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
CHINESE = "README.zh-CN.md"
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "own/README.md", CHINESE]


def code_of(document: str) -> str:
    """Fenced blocks and inline code of a Markdown file."""
    text = (ROOT / document).read_text(encoding="utf-8")
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.S | re.M)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))])


def targets() -> set[str]:
    """Targets of the Makefile."""
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def commands_of(document: str) -> list[str]:
    """What a document tells to run, in its order: lines of blocks, and inline code that begins with a program."""
    text = (ROOT / document).read_text(encoding="utf-8")
    code = re.findall(r"^```[^\n]*\n(.*?)^```|(?<!`)`([^`\n]+)`(?!`)", text, re.S | re.M)
    lines = [line.split("#")[0].strip() for fenced, inline in code for line in (fenced or inline).splitlines()]
    return [line for line in lines if re.match(r"(make|lesionsam|dvc|mlflow|python|docker|source)\b(?!\.)", line)]


def test_the_chinese_readme_has_the_english_one_s_commands() -> None:
    """The same ones, in the same order; a change of one README names what the other lacks."""
    english, chinese = commands_of("README.md"), commands_of(CHINESE)
    assert len(english) > 25
    missing, too_many = [c for c in english if c not in chinese], [c for c in chinese if c not in english]
    assert (missing, too_many) == ([], [])
    assert list(dict.fromkeys(chinese)) == list(dict.fromkeys(english))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    named = {word for line in re.findall(r"^\s*make((?: [a-z]+)+)", code_of(document), re.M) for word in line.split()}
    assert named <= targets(), named - targets()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document: str) -> None:
    import typer.main

    from lesionsam.cli.app import app

    group = typer.main.get_command(app)
    for line in re.findall(r"^\s*(?:\$ )?lesionsam ([^\n|]+)", code_of(document), re.M):
        name, *rest = line.split("#")[0].split()
        if name.startswith("-"):
            continue
        assert name in group.commands, f"{document}: lesionsam {name}"  # pyright: ignore[reportAttributeAccessIssue]
        command = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):  # `lesionsam data convert`
            assert rest[0] in command.commands, f"{document}: lesionsam {name} {rest[0]}"
            command, rest = command.commands[rest[0]], rest[1:]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        named = {word.split("=")[0] for word in rest if word.startswith("--")} - {"--help"}
        assert named <= options, f"{document}: lesionsam {name} has no {named - options}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_scripts_exist(document: str) -> None:
    for script in re.findall(r"\b(?:python|bash) ((?!-)[\w./]+)", code_of(document)):
        assert (ROOT / script).is_file(), f"{document}: {script}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_parameters_of_experiments_exist(document: str) -> None:
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for key in re.findall(r"(?:-S|--set-param) '?([\w.+]+)=", code_of(document)):
        value = params
        for step in key.split("."):
            assert step in value, f"{document}: {key}"
            value = value[step]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:|#", link):
            continue
        assert ((ROOT / document).parent / link.split("#")[0]).exists(), f"{document}: {link}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_every_target() -> None:
    """One line of help per target, without setting anything up."""
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = dict(re.findall(r"^  make (\w+)\s+(.+)$", done.stdout, re.M))
    assert set(listed) == targets()
    assert len(done.stdout.splitlines()) == len(listed)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", sorted(targets()))
def test_targets_can_be_planned(target: str) -> None:
    """`make -n` finds every prerequisite."""
    subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)

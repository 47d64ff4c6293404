"""Generated pages: every command, option, parameter, public name and column is there, with the values of the code."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from lesionsam.boxes import table
from lesionsam.cli.examples import EXAMPLES
from lesionsam.config.load import default_values, known_keys
from lesionsam.config.presets import preset_names, preset_values
from lesionsam.data import index
from lesionsam.inference import jobs, outputs
from repo.import_graph import ROOT

DOCS = ROOT / "docs"
sys.path[:0] = [str(DOCS)] if str(DOCS) not in sys.path else []
pages = importlib.import_module("reference_pages")
layers = importlib.import_module("layers")


@pytest.fixture(scope="module")
def commands() -> dict[str, str]:
    """Return the pages of the commands."""
    return pages.command_pages()


@pytest.fixture(scope="module")
def rows() -> dict[str, str]:
    """Return key -> its rows on the page of params.yaml, joined."""
    found: dict[str, str] = {}
    for line in pages.params_page().splitlines():
        if match := re.match(r"\| `([\w.+]+)` \|", line):
            found[match[1]] = found.get(match[1], "") + line
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_command_has_a_page_with_its_example(name: str, commands: dict[str, str]) -> None:
    page = commands[f"reference/cli/{name.replace(' ', '-')}.md"]
    assert page.startswith(f"# lesionsam {name}\n")
    assert f"## Example\n\n```\n{EXAMPLES[name]}\n```" in page


def test_every_option_is_on_its_page(commands: dict[str, str]) -> None:
    number = 0
    for name, command, _ in pages.commands():
        for parameter in command.params if name != "lesionsam" else ():
            page = commands[f"reference/cli/{pages.slug(name)}.md"]
            if parameter.param_type_name == "option":
                assert all(option in page for option in parameter.opts), (name, parameter.opts)
                number += 1
    assert number > 100


def test_defaults_and_limits_of_options(commands: dict[str, str]) -> None:
    predict, train = commands["reference/cli/predict.md"], commands["reference/cli/submit-train.md"]
    meaning = "Probability above which a pixel is lesion; not with --everything."
    assert f"| `--threshold <float>` | {meaning} | `0.5` |" in predict
    assert re.search(r"\| `--minutes <int range>` \| .*\(x>=1\) \|", train)
    assert "[default" not in predict + train


def test_every_command_is_in_a_table_of_contents(commands: dict[str, str]) -> None:
    blocks = re.findall(r"\{toctree\}\n:hidden:\n\n(.*?)```", "\n".join(commands.values()), re.S)
    listed = {line for block in blocks for line in block.split()}
    assert listed == {Path(name).stem for name in commands} - {"index"}


def test_every_parameter_of_every_preset_is_listed(rows: dict[str, str]) -> None:
    keys = set(known_keys(default_values()))
    for name in preset_names():
        keys |= set(known_keys(preset_values(name, default_values())))
    keys = {key for key in keys if "." in key}
    assert len(keys) > 150
    assert keys <= set(rows)


def test_rows_hold_default_limits_unit_and_condition(rows: dict[str, str]) -> None:
    assert "| `15` | an integer from 1 to 100000 |" in rows["train.epochs"]
    assert "a number above 0 and of at most 1" in rows["train.lr_encoder"]
    assert "[nats, at most 0.693]" in rows["method.gate.entropy_thresh"].replace("\\", "")
    assert "Only if `data.source` is folder or coco." in rows["data.test_split"]
    assert "Only if" not in rows["train.epochs"]


def test_stages_are_those_of_dvc_yaml() -> None:
    assert pages.stages_reading("train") == ["`train`"]
    assert pages.stages_reading("inputs") == ["`download` (`inputs.folder`)", "`boxes` (`inputs.boxes`)"]
    assert pages.stages_reading("runtime") == []


def test_columns_are_those_of_the_code() -> None:
    page = pages.files_page()
    for columns in (table.COLUMNS, jobs.POINT_COLUMNS, outputs.COLUMNS, index.COLUMNS):
        assert "".join(f"`{name}`" for name in columns) in "".join(re.findall(r"^\| (`\w+`) \|", page, re.M))


def test_every_public_name_has_one_directive() -> None:
    api = pages.api_pages()
    text = "".join(api.values())
    homes = {}
    for package, names in pages.faces().items():
        for name in names:
            value = getattr(importlib.import_module(package), name)
            homes.setdefault(id(value), f"{package}.{name}")
    directives = re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.M)
    assert sorted(directives) == sorted(homes.values())
    assert "lesionsam.Predictor" in directives


def test_pages_that_are_gone_are_removed_and_others_keep_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "all_pages", lambda repository: {"reference/a.md": "a", "reference/b/c.md": "c"})
    pages.write(tmp_path)
    before = (tmp_path / "reference" / "a.md").stat().st_mtime_ns
    monkeypatch.setattr(pages, "all_pages", lambda repository: {"reference/a.md": "a"})
    pages.write(tmp_path)
    assert not (tmp_path / "reference" / "b" / "c.md").exists()
    assert (tmp_path / "reference" / "a.md").stat().st_mtime_ns == before


def test_special_characters_of_a_cell_are_escaped() -> None:
    assert pages.cell("a | b *c* <d> `e_f|g` [px]") == r"a \| b \*c\* \<d> `e_f\|g` \[px\]"


def test_the_picture_of_the_layers_is_that_of_the_imports() -> None:
    assert layers.TARGET.read_text(encoding="utf-8") == layers.picture(), "python docs/layers.py"


def test_needed_edges_leave_out_what_others_imply() -> None:
    imports = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert layers.needed_edges(imports) == [("a", "b"), ("b", "c")]


def test_how_to_pages_are_in_the_site_s_contents() -> None:
    listed = (DOCS / "howto" / "index.md").read_text(encoding="utf-8").split(":hidden:")[1].split("```")[0].split()
    assert sorted(listed) == sorted(path.stem for path in (DOCS / "howto").glob("*.md") if path.stem != "index")

"""Write the generated pages of the site: commands, params.yaml, Python API, file formats, and pages from outside docs/.

Everything comes from the code: the commands from typer, params.yaml from its schema, the API from docstrings.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main
from links import OUTSIDE, ROOT, rewrite_links
from ruamel.yaml import YAML

import lesionsam
from lesionsam.boxes import table as boxes_table
from lesionsam.cli.app import PANELS, app
from lesionsam.config.limits import Limits, limits_of, schema, tag_name, value_at, variants
from lesionsam.config.load import default_values
from lesionsam.data import index
from lesionsam.inference import jobs, outputs

FOLDERS = ("reference/", "project/")  # of the generated pages, ignored by git


def write(docs: Path, repository: str = "") -> None:
    """Write every generated page below a docs folder; pages that did not change keep their time, others are removed."""
    pages = all_pages(repository)
    for folder in FOLDERS:
        for path in (docs / folder).rglob("*"):
            if path.is_file() and path.relative_to(docs).as_posix() not in pages:
                path.unlink()
    for name, text in pages.items():
        path = docs / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def all_pages(repository: str = "") -> dict[str, str]:
    """Return path below docs/ -> text of every generated page."""
    pages = {
        "reference/index.md": REFERENCE,
        **command_pages(),
        "reference/params.md": params_page(),
        **api_pages(),
        "reference/files.md": files_page(),
    }
    for name, page in OUTSIDE.items():
        if page.startswith("project/"):
            text = (ROOT / name).read_text(encoding="utf-8")
            pages[page] = rewrite_links(text, ROOT / name, ROOT / "docs" / page, repository)
    return pages


REFERENCE = """# Reference

These pages are generated from the code of this version.

- [Commands](cli/index.md): every command with its options and an example
- [params.yaml](params.md): every parameter with limits, default and unit
- [Python API](api/index.md): the public names of the packages
- [Files](files.md): the columns of the tables that the commands read and write

```{toctree}
:hidden:

cli/index
params
api/index
files
```
"""


def cell(text: object) -> str:
    """Return a text for a cell of a Markdown table: code spans as they are, other special characters escaped."""
    parts = re.split(r"(`[^`]+`)", " ".join(str(text).split()))
    plain = [part if k % 2 else re.sub(r"([\\*_<\[\]{}$~])", r"\\\1", part) for k, part in enumerate(parts)]
    return "".join(plain).replace("|", r"\|")


def code(text: object) -> str:
    """Return a text as a code span for a cell, nothing for an empty text."""
    return f"`{text}`".replace("|", r"\|") if str(text) else ""


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]], kind: str = "") -> str:
    """Return a Markdown table of cells that are Markdown already; `kind` is its CSS class."""
    lines = [columns, ("---",) * len(columns), *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f":::{{container}} {kind}\n{text}:::\n" if kind else text


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(group: Any = None, above: Any = None, name: str = "lesionsam") -> Iterator[tuple[str, Any, Any]]:
    """Yield (full name, command, context) of every command of `lesionsam`, groups before their members."""
    command = typer.main.get_command(app) if group is None else group
    context = command.context_class(command, info_name=name.rpartition(" ")[2], parent=above)
    yield name, command, context
    for word, member in getattr(command, "commands", {}).items():
        yield from commands(member, context, f"{name} {word}")


def command_pages() -> dict[str, str]:
    """Return the page of each command, and the list of them."""
    found = {name: (command, context) for name, command, context in commands()}
    pages = {f"reference/cli/{slug(name)}.md": command_page(name, *held) for name, held in found.items()}
    summaries = {name: first_sentence(command.help) for name, (command, _) in found.items()}
    text = "# Commands\n\n" + found["lesionsam"][0].help + "\n\n`lesionsam COMMAND --help` shows the same in a terminal.\n"
    for words, panel in PANELS.items():
        rows = []
        for name in found:
            if name.split()[1:2] and name.split()[1] in words.split():
                rows.append((f"[`{name}`]({slug(name)}.md)", cell(summaries[name])))
        text += f"\n## {panel}\n\n{table(('command', 'does'), rows)}"
    members = [slug(name) for name in found if name != "lesionsam" and len(name.split()) == 2]
    del pages["reference/cli/lesionsam.md"]
    pages["reference/cli/index.md"] = text + toctree(members)
    return pages


def slug(name: str) -> str:
    """Return the file name of a command's page: `lesionsam data check` is data-check."""
    return "-".join(name.split()[1:]) or name


def first_sentence(text: str | None) -> str:
    """Return the first paragraph of a help text."""
    return " ".join((text or "").split("\n\n")[0].split())


def toctree(pages: list[str]) -> str:
    """Return a hidden table of contents."""
    return "\n```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"


def command_page(name: str, command: Any, context: Any) -> str:
    """Return the page of a command: usage, help, arguments, options, example."""
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    text = f"# {name}\n\n```\n{usage}\n```\n\n{inspect.cleandoc(command.help or '')}\n"
    example = (command.epilog or "").removeprefix("Example: ")
    if example:
        text += f"\n## Example\n\n```\n{example}\n```\n"
    for kind, title in (("argument", "Arguments"), ("option", "Options")):
        rows = [option_row(each, context) for each in command.params if each.param_type_name == kind]
        if rows:
            text += f"\n## {title}\n\n{table((kind, 'meaning', 'default'), rows, 'options')}"
    if context.ignore_unknown_options and context.allow_extra_args:
        text += "\nFurther arguments are passed on"
        text += "; `lesionsam foundation --help` lists its options.\n" if name.endswith("foundation") else ".\n"
    members = getattr(command, "commands", {})
    if members and name != "lesionsam":
        rows = [(f"[`{name} {word}`]({slug(f'{name} {word}')}.md)", cell(first_sentence(m.help))) for word, m in members.items()]
        text += f"\n## Commands\n\n{table(('command', 'does'), rows)}" + toctree([slug(f"{name} {word}") for word in members])
    return text


def option_row(parameter: Any, context: Any) -> tuple[str, str, str]:
    """Return name with type, meaning and default of an argument or option, as typer's help shows them."""
    name, meaning = parameter.get_help_record(context) or (parameter.name, parameter.help or "")
    text, _, notes = meaning.partition("  [")
    parts = notes.removesuffix("]").split("; ") if notes else []
    default = "".join(part.removeprefix("default: ") for part in parts if part.startswith("default: "))
    others = "".join(f" ({part})" for part in parts if not part.startswith("default: "))
    return code(name), cell(text + others), code(default)


# ---- params.yaml -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A key of params.yaml: what it accepts, and the variants that read it ("data.source is folder or coco")."""

    limits: Limits
    when: tuple[str, ...]
    default: str


def keys_below(node: Mapping[str, Any], key: str, when: tuple[str, ...] = ()) -> Iterator[Key]:
    """Yield the keys of a section, in the schema's order, over all of its variants."""
    sections = variants(node)
    found: dict[tuple[str, str], tuple[Mapping[str, Any], list[str]]] = {}
    tag = tag_name(node)
    for word, held in sections.items():
        for name, child in held["properties"].items():
            identity = "" if name == tag else json.dumps(child, sort_keys=True)
            found.setdefault((name, identity), (child, []))[1].append(word)
    for (name, _), (child, words) in found.items():
        full = f"{key}.{name}"
        condition = () if len(words) == len(sections) else (f"`{key}.{tag}` is {' or '.join(words)}",)
        limits = limits_of(full, child, tuple(sections) if name == tag else ())
        yield Key(limits, (*when, *condition), shown_default(full, limits))
        yield from keys_below(child, full, (*when, *condition))


def shown_default(key: str, limits: Limits) -> str:
    """Return the value in the default params.yaml, else the one that a new variant starts with, as YAML."""
    value = value_at(default_values(), key)
    value = limits.example if value is None else value
    if value is None or isinstance(value, Mapping):
        return ""
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) or not value else value


def stages_reading(section: str) -> list[str]:
    """Return the stages of dvc.yaml that run anew when a key of a section changes, and the keys where not all do."""
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    found = []
    for stage, content in stages.items():
        read = [str(key) for key in content.get("params", []) if str(key).split(".")[0] == section]
        found += [f"`{stage}`" + ("" if key == section else f" (`{key}`)") for key in read]
    return found


def params_page() -> str:
    """Return the page of params.yaml: a table of keys for each section."""
    text = (
        "# params.yaml\n\nEvery parameter. Units are in brackets. `lesionsam params show KEY` shows the same for your file, "
        "`lesionsam check` checks it, `lesionsam preset NAME` writes a set of values. The default is that of the demo. "
        "A stage of `dvc.yaml` runs anew when a parameter changes that it watches.\n"
    )
    for name, node in schema()["properties"].items():
        if not variants(node):
            continue
        about = node.get("description", "")
        text += f"\n## {name}\n\n" + (f"{cell(about[0].upper() + about[1:])}.\n\n" if about else "")
        stages = stages_reading(name)
        text += f"Watched by the stages {', '.join(stages)}.\n\n" if stages else "Watched by no stage: a change runs nothing anew.\n\n"
        rows = []
        for each in keys_below(node, name):
            limits = each.limits
            when = f" Only if {' and '.join(each.when)}." if each.when else ""
            accepts = "" if limits.kind == "section" else cell(limits.expected)
            meaning = cell(limits.description)
            meaning += "." if meaning and when and meaning[-1] not in ".)]" else ""
            rows.append((code(each.limits.key), code(each.default), accepts, meaning + when))
        text += table(("key", "default", "accepts", "meaning"), rows, "params")
    return text


# ---- Python API ------------------------------------------------------------------------------------------------------


def faces() -> dict[str, list[str]]:
    """Return package -> its public names, for every package that has some; `lesionsam` itself first."""
    names = ["lesionsam", *(f"lesionsam.{each.name}" for each in pkgutil.iter_modules(lesionsam.__path__) if each.ispkg)]
    found = {name: list(getattr(importlib.import_module(name), "__all__", ())) for name in names}
    return {name: [each for each in public if not each.startswith("__")] for name, public in found.items() if public}


def api_pages() -> dict[str, str]:
    """Return a page of autodoc directives for each package with public names, and the list of them."""
    held, pages, rows = faces(), {}, []
    homes: dict[int, str] = {}
    for package, names in held.items():
        module = importlib.import_module(package)
        text = f"# {package}\n\n{inspect.cleandoc(module.__doc__ or '')}\n"
        for name in names:
            value = getattr(module, name)
            home = homes.setdefault(id(value), package)
            if home == package:
                text += f"\n## {name}\n\n```{{eval-rst}}\n{directive(package, name, value)}```\n"
            else:
                text += f"\n## {name}\n\nSee [{home}.{name}]({home}.md#{name.lower()}).\n"
        pages[f"reference/api/{package}.md"] = text
        rows.append((f"[`{package}`]({package}.md)", cell(first_sentence(module.__doc__)), ", ".join(map(code, names))))
    intro = (
        "# Python API\n\nImport a name from its package: `from lesionsam import Predictor`. Importing a package is quick; what a "
        "name needs, such as torch, is loaded when the name is first used. Names that are not listed here may change.\n\n"
    )
    index_page = intro + table(("package", "content", "names"), rows) + toctree(list(held))
    return pages | {"reference/api/index.md": index_page}


def directive(package: str, name: str, value: Any) -> str:
    """Return the autodoc directive of a public name."""
    if inspect.isclass(value):
        return f".. autoclass:: {package}.{name}\n   :members:\n"
    return f".. {'autofunction' if callable(value) else 'autodata'}:: {package}.{name}\n"


# ---- files -----------------------------------------------------------------------------------------------------------

BOX_MEANING = {
    "image_id": "file name of the image without its ending",
    "lesion_id": "any name, different for the lesions of one image; may be left out where every image has one lesion",
    "split": "train, dev or test; must agree with the folders",
    "width": "of the image [px]; checked where it is given",
    "height": "of the image [px]; checked where it is given",
    **{name: f"{'left upper' if name[-2:] in ('x0', 'y0') else 'right lower'} corner of the big box, {name[-2]} [px]" for name in boxes_table.BIG},
    **{name: f"{'left upper' if name[-2:] in ('x0', 'y0') else 'right lower'} corner of the small box, {name[-2]} [px]" for name in boxes_table.SMALL},
}
POINT_MEANING = {
    "image_id": "file name of the image without its ending",
    "x": "to the right [px]",
    "y": "downwards [px]",
    "lesion_id": "points of one lesion share it; without it all points of an image are one prompt",
    "label": "1 lesion (also where it is empty), 0 not",
    "width": "of the image [px]; checked where it is given",
    "height": "of the image [px]; checked where it is given",
}
INDEX_MEANING = {
    "image_id": "file name of the image without its ending",
    "split": "train, dev (to select on) or test (to report on)",
    "image_path": "image file, from the root of the repository",
    "mask_path": "mask file; empty without one",
    "width": "after EXIF transpose [px]",
    "height": "after EXIF transpose [px]",
    "sha256": "of the image's contents",
    "mask_sha256": "of the mask's contents; empty without one",
}


def columns_table(columns: tuple[str, ...], meaning: Mapping[str, str], needed: tuple[str, ...] | None = None) -> str:
    """Return the table of a file's columns; `needed` are those that it must have, None where it has all."""
    if needed is None:
        return table(("column", "content"), [(code(name), cell(meaning[name])) for name in columns])
    rows = [(code(name), "yes" if name in needed else "", cell(meaning[name])) for name in columns]
    return table(("column", "required", "content"), rows)


def files_page() -> str:
    """Return the page of the tables' columns."""
    return "\n".join(
        [
            "# Files",
            "",
            "All tables are CSV in UTF-8, separated by commas, with a header. Coordinates are pixels of the upright image (after EXIF "
            "transpose): x to the right, y downwards, (0, 0) the upper left corner of the first pixel. Boxes are half-open.",
            "",
            "## Two boxes per lesion",
            "",
            "`boxes.csv`: read by `lesionsam predict --boxes`, `inputs.boxes` and the annotation page. [Your own images](../project/own.md) "
            "has the rules.",
            "",
            columns_table(boxes_table.COLUMNS, BOX_MEANING, boxes_table.REQUIRED),
            "## Points",
            "",
            "Read by `lesionsam predict --points`.",
            "",
            columns_table(tuple(jobs.POINT_COLUMNS), POINT_MEANING, ("image_id", "x", "y")),
            "## Predictions",
            "",
            "`predictions.csv`: written by `lesionsam predict`, one row per mask.",
            "",
            columns_table(outputs.COLUMNS, outputs.COLUMN_GUIDE),
            "Beside it: "
            + ", ".join(f"`{folder}/*{ending}`" for folder, ending in outputs.ENDINGS.items())
            + f", and `{outputs.COCO}` with all masks as COCO instances. [Predict](../howto/predict.md) has the options.",
            "",
            "## Index of a data set",
            "",
            "`data/raw/index.csv`: written by the stage `download`, one row per image.",
            "",
            columns_table(index.COLUMNS, INDEX_MEANING),
        ]
    )

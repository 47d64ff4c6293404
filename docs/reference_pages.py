"""Write the generated pages of the site: commands, params.yaml, Python API, file formats, and pages from outside docs/.

Everything comes from the code: the commands from typer, params.yaml from its schema, the API from docstrings.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main
from file_tables import files_page
from links import OUTSIDE, ROOT, rewrite_links
from markdown_table import cell, code, table
from ruamel.yaml import YAML

import lesionsam
from lesionsam.cli.app import PANELS, app
from lesionsam.cli.examples import EXAMPLES
from lesionsam.config.limits import Limits, limits_of, schema, tag_name, value_at, variants
from lesionsam.config.load import default_values

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
    about = found["lesionsam"][0].help
    text = f"# Commands\n\n{about}\n\n`lesionsam COMMAND --help` shows the same in a terminal.\n"
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
    if example := EXAMPLES.get(name.removeprefix("lesionsam ")):
        note = (command.epilog or "").removeprefix(f"Example: {example}").removeprefix(". ")
        text += f"\n## Example\n\n```\n{example}\n```\n" + (f"\n{note}\n" if note else "")
    for kind, title in (("argument", "Arguments"), ("option", "Options")):
        rows = [option_row(each, context) for each in command.params if each.param_type_name == kind]
        if rows:
            text += f"\n## {title}\n\n{table((kind, 'meaning', 'default'), rows)}"
    if context.ignore_unknown_options and context.allow_extra_args:
        text += "\nFurther arguments are passed on"
        text += "; `lesionsam foundation --help` lists its options.\n" if name.endswith("foundation") else ".\n"
    members = {f"{name} {word}": member for word, member in getattr(command, "commands", {}).items()}
    if members and name != "lesionsam":
        rows = [(f"[`{full}`]({slug(full)}.md)", cell(first_sentence(each.help))) for full, each in members.items()]
        text += f"\n## Commands\n\n{table(('command', 'does'), rows)}" + toctree([slug(full) for full in members])
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


PARAMS = """# params.yaml

Every parameter. Units are in brackets. `lesionsam params show KEY` shows the same for your file, `lesionsam check`
checks it, `lesionsam preset NAME` writes a set of values. The default is that of the demo. A stage of `dvc.yaml`
runs anew when a parameter changes that it watches.
"""


def params_page() -> str:
    """Return the page of params.yaml: a table of keys for each section."""
    text = PARAMS
    for name, node in schema()["properties"].items():
        if not variants(node):
            continue
        about = node.get("description", "")
        text += f"\n## {name}\n\n" + (f"{cell(about[0].upper() + about[1:])}.\n\n" if about else "")
        stages = stages_reading(name)
        watched = f"Watched by: {', '.join(stages)}." if stages else "Watched by no stage: a change runs nothing anew."
        text += f"{watched}\n\n"
        rows = []
        for each in keys_below(node, name):
            limits = each.limits
            when = f" Only if {' and '.join(each.when)}." if each.when else ""
            accepts = "" if limits.kind == "section" else cell(limits.expected)
            meaning = cell(limits.description)
            meaning += "." if meaning and when and meaning[-1] not in ".)]" else ""
            rows.append((code(each.limits.key), code(each.default), accepts, meaning + when))
        text += table(("key", "default", "accepts", "meaning"), rows)
    return text


# ---- Python API ------------------------------------------------------------------------------------------------------


def faces() -> dict[str, list[str]]:
    """Return package -> its public names, for every package that has some; `lesionsam` itself first."""
    packages = [each.name for each in pkgutil.iter_modules(lesionsam.__path__) if each.ispkg]
    names = ["lesionsam", *(f"lesionsam.{name}" for name in packages)]
    found = {name: list(getattr(importlib.import_module(name), "__all__", ())) for name in names}
    return {name: [each for each in public if not each.startswith("__")] for name, public in found.items() if public}


API = """# Python API

Import a name from its package: `from lesionsam import Predictor`. Importing a package is quick; what a name needs,
such as torch, is loaded when the name is first used. Names that are not listed here may change.

"""


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
    index_page = API + table(("package", "content", "names"), rows) + toctree(list(held))
    return pages | {"reference/api/index.md": index_page}


def directive(package: str, name: str, value: Any) -> str:
    """Return the autodoc directive of a public name."""
    if inspect.isclass(value):
        return f".. autoclass:: {package}.{name}\n   :members:\n"
    return f".. {'autofunction' if callable(value) else 'autodata'}:: {package}.{name}\n"

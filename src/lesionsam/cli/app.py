"""The command line: `lesionsam COMMAND --help`. What a command needs is imported inside it, so that help is instant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import CommandInfo, TyperInfo

from lesionsam import __version__
from lesionsam.cli import annotation as cli_annotation
from lesionsam.cli import predict as cli_predict
from lesionsam.cli import propose as cli_propose
from lesionsam.cli import results as cli_results
from lesionsam.cli import steps as cli_steps
from lesionsam.cli import video as cli_video
from lesionsam.cli.data import data_app
from lesionsam.cli.examples import EXAMPLES
from lesionsam.cli.submit import submit_app
from lesionsam.errors import UserError, run_guarded

if TYPE_CHECKING:
    from lesionsam.config.load import Config

app = typer.Typer(
    name="lesionsam",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt Segment Anything to lesions from two boxes per lesion, without masks. The whole chain: `dvc repro`, or "
    "prepare, train, evaluate, report.",
)
params_app = typer.Typer(no_args_is_help=True, help="Show, check and upgrade params.yaml.")
app.add_typer(params_app, name="params")
app.add_typer(data_app, name="data")
app.add_typer(submit_app, name="submit")
cache_app = typer.Typer(invoke_without_command=True, help="Show what is cached: decoded images, frozen activations.")
app.add_typer(cache_app, name="cache")

CACHE = Path(".cache")
Params = Annotated[Path, typer.Option("--params", help="Parameter file.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the difference, write nothing.")]


def _print_version(wanted: bool) -> None:
    """Print the version and exit, for `--version`."""
    if wanted:
        print(f"lesionsam {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hold the options of `lesionsam` itself."""


@app.command()
def preset(
    name: Annotated[str | None, typer.Argument(help="Name of the preset; none: list all.", show_default=False)] = None,
    params: Params = Path("params.yaml"),
    dry_run: DryRun = False,
) -> None:
    """Write a preset into params.yaml, comments kept, and show the difference; without a name, list the presets."""
    from lesionsam.config.presets import about, apply_preset, preset_names, read_params

    if name is None:
        width = max(map(len, preset_names()))
        for each in preset_names():
            print(f"{each:<{width}}  {about(each)}")
        return
    text = read_params(params)
    new, config = apply_preset(name, text, params.name)
    _write(params, text, new, dry_run)
    _warn_of_files(config, params)


@params_app.command()
def upgrade(
    file: Annotated[Path, typer.Argument(help="Parameter file.")] = Path("params.yaml"), dry_run: DryRun = False
) -> None:
    """Bring an older params.yaml to today's format, comments kept, and show the difference.

    Renames keys, adds missing ones with their comments, removes those that its variants do not read.
    """
    from lesionsam.config.load import read_text
    from lesionsam.config.upgrade import upgrade as upgraded

    text = read_text(file)
    new, config = upgraded(text, file.name)
    _write(file, text, new, dry_run)
    _warn_of_files(config, file)


@params_app.command()
def show(
    key: Annotated[str, typer.Argument(help="Dotted key or section; none: all.")] = "",
    params: Params = Path("params.yaml"),
) -> None:
    """Show each value, what the key accepts and its comment."""
    from lesionsam.config.load import describe, flatten, load_config

    config = load_config(params, check_files=False)
    if key:
        describe(key, config)
    for name, value in flatten(config).items():
        if f"{name}.".startswith(f"{key}." if key else "") and not name.startswith("sweep.space."):
            limits = describe(name, config)
            print(f"{name}: {value}  ({limits.expected})" + (f"  # {limits.description}" if limits.description else ""))


@app.command()
@params_app.command("check")
def check(params: Params = Path("params.yaml")) -> None:
    """Validate params.yaml and summarise it.

    For parameters. `lesionsam data check` is for data, `doctor` for the installation, `smoke` for weights.
    """
    from lesionsam.config.load import load_config
    from lesionsam.config.summary import summary

    config = load_config(params)
    for line in summary(config):
        print(line)
    if config.train.precision == "bf16":
        from lesionsam.utils.devices import slow_precision, torch_device

        if note := slow_precision("bf16", torch_device(config.runtime.device)):
            print(f"note: {note}", file=sys.stderr)


@cache_app.callback()
def cache(context: typer.Context) -> None:
    """Show what is cached: decoded images, activations of the frozen encoder; what it takes and when it was used."""
    from lesionsam.data.caches import report

    if context.invoked_subcommand is None:
        for line in report(CACHE):
            print(line)


@cache_app.command("clear")
def clear_cache() -> None:
    """Remove all of it; what is needed is made again. A training that runs goes on with what it has open."""
    from lesionsam.data.caches import clear, format_bytes

    removed, left = clear(CACHE)
    print(f"removed {format_bytes(removed)} from {CACHE}" + "".join(f"; left {folder}, in use" for folder in left))


@app.command()
def smoke(
    model: Annotated[str, typer.Option(help="model.name of params.yaml: compact, vit_b, sam2.1-tiny, ...")],
    checkpoint: Annotated[Path, typer.Option(help="Its weights.")],
    image_size: Annotated[
        int | None,
        typer.Option(help="Side of the model's input [px]; 0 = the model's own; unset: smaller where there is no GPU."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Try weights in a minute: load, check, one prediction, one training step, one evaluation; memory and speed.

    For weights. `lesionsam check` is for params.yaml, `data check` for data, `doctor` for the installation.
    """
    from lesionsam.cli.smoke import smoke as run

    run(model, checkpoint, image_size=image_size, device=device)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def foundation(context: typer.Context) -> None:
    """Train a compact SAM from scratch, of the sizes and on the images of section `foundation`; resumes."""
    from lesionsam.pretraining.run import main as run

    run(context.args)


def _write(path: Path, old: str | None, new: str, dry_run: bool) -> None:
    """Show the difference of a parameter file, and write the file as a whole or not at all."""
    from lesionsam.config.edit import difference
    from lesionsam.utils.files import write_text_atomic

    if old == new:
        print(f"{path}: nothing to change")
        return
    _print_difference(difference(old or "", new, path.name) if old is not None else [f"+++ {path.name} (new)"])
    if not dry_run:
        write_text_atomic(path, new)
    print(f"{path}: {'not written (--dry-run)' if dry_run else 'written'}")


def _print_difference(lines: Sequence[str]) -> None:
    """Print a unified difference, coloured on a terminal that supports it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    styles = {"+++": "bold", "---": "bold", "@": "cyan", "+": "green", "-": "red"}
    for line in lines:
        style = next((style for start, style in styles.items() if line.startswith(start)), "")
        console.print(Text(line, style=style))


def _warn_of_files(config: Config, params: Path) -> None:
    """Print which of the user's own files a valid parameter file still needs."""
    from lesionsam.config.rules import file_rules

    for issue in file_rules(config, params.resolve().parent):
        print(f"note: {issue}", file=sys.stderr)


cli_steps.add_commands(app)
cli_annotation.add_commands(app)
cli_predict.add_commands(app)
cli_propose.add_commands(app)
cli_results.add_commands(app)
cli_video.add_commands(app)

PANELS = {  # of the command list, in this order
    "prepare train evaluate report submit": "The chain",
    "data propose annotate label-studio engine": "Data and boxes",
    "predict track series export promote register compare": "Use a model",
    "preset check params": "Parameters",
    "doctor smoke cache foundation": "Look after it",
}
ORDER = " ".join(PANELS).split()


def _name(command: CommandInfo | TyperInfo) -> str:
    """Return a command's name."""
    return str(command.name or getattr(command.callback, "__name__", ""))


for _commands in (app.registered_commands, app.registered_groups):
    _commands.sort(key=lambda command: ORDER.index(_name(command)))
    for _command in _commands:
        _command.rich_help_panel = next(panel for names, panel in PANELS.items() if _name(_command) in names.split())


for _group, _members in (("", app), ("params ", params_app), ("data ", data_app), ("submit ", submit_app)):
    for _command in _members.registered_commands:
        _command.epilog = _command.epilog or f"Example: {EXAMPLES.get(_group + _name(_command), '')}"


def main() -> None:
    """Entry point of `lesionsam` and `python -m lesionsam`."""
    run_guarded(_run)


def _run() -> None:
    """Run the command; a missing optional library becomes one line."""
    from lesionsam.utils.extras import missing_library

    try:
        app()
    except ModuleNotFoundError as error:
        if (line := missing_library(error)) is None:
            raise
        raise UserError(line) from None

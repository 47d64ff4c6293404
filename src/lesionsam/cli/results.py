"""Commands for the results of a training: export, promote, compare; and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lesionsam.errors import UserError
from lesionsam.export.formats import FORMATS, open_format


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `lesionsam`."""
    for command in (export, promote, compare, doctor):
        app.command()(command)
    app.command("register", hidden=True)(promote)


def export(
    formats: Annotated[
        list[str] | None, typer.Option("--format", help=f"{', '.join(FORMATS)}; may be repeated.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every format.")] = False,
    model: Annotated[
        str,
        typer.Option(
            help="Weights file, folder with one, MLflow run id, models:/lesionsam@champion, OWNER/NAME of the Hub."
        ),
    ] = "models/adapted",
    out: Annotated[Path, typer.Option(help="Folder; each format gets one of its name in it.")] = Path("exports"),
    images: Annotated[
        Path | None, typer.Option(help="Folder of images to compare on; unset: generated ones.", show_default=False)
    ] = None,
    num_images: Annotated[int, typer.Option(help="Of them, at most, evenly picked.")] = 50,
    push: Annotated[
        str, typer.Option(help="OWNER/NAME on the Hugging Face Hub to upload the format hf to.", show_default=False)
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="With --push: a private model.")] = False,
) -> None:
    """Export a model: write each format, reload it in the library that reads it, compare and print the differences."""
    chosen = list(FORMATS) if everything else list(dict.fromkeys(formats or ()))
    if push and "hf" not in chosen:
        chosen.append("hf")
    if not chosen:
        raise UserError(f"export: expected --all or --format, one of {', '.join(FORMATS)}, got neither")
    if unknown := [name for name in chosen if name not in FORMATS]:
        raise UserError(f"--format: expected one of {', '.join(FORMATS)}, got {unknown[0]!r}")

    from lesionsam.export import base as exporting
    from lesionsam.export.compare import check_pictures
    from lesionsam.models.sam1 import Sam1
    from lesionsam.tracking.registry import resolve_model

    pictures = check_pictures(images, num_images)
    subject = exporting.open_subject(resolve_model(model))
    formats_chosen = [open_format(name) for name in chosen]
    if everything and not isinstance(subject.sam, Sam1):
        formats_chosen = [form for form in formats_chosen if form.any_sam]
        typer.echo(f"{subject.sam.name}: hf and mlflow; the other formats hold models of segment_anything alone")
    results = exporting.export(subject, formats_chosen, out, pictures=pictures, model_card=Path("report/model_card.md"))
    exporting.print_table(results)
    failed = [(result.format.name, fault) for result in results for fault in result.faults]
    for name, fault in failed:
        typer.echo(f"error: {name}: {fault}", err=True)
    if push and (folder := next(result.folder for result in results if result.format.name == "hf")) is not None:
        from lesionsam.utils.hub import push_folder

        typer.echo(f"pushed to {push_folder(folder, push, private=private)}")
    if failed:
        raise typer.Exit(1)


def promote(
    run: Annotated[str, typer.Option(help="Folder of the train stage, or an MLflow run id.")] = "models/adapted",
    alias: Annotated[str, typer.Option(help="Which name to give this version.")] = "champion",
) -> None:
    """Register a run's model in MLflow with its test table; `--model models:/lesionsam@champion` then refers to it.

    `lesionsam register` is the same command.
    """
    from lesionsam.tracking.registry import NAME
    from lesionsam.tracking.registry import promote as run_promote

    done = run_promote(run, alias=alias)
    score = "" if done.objective is None else f", mean IoU of ring, centre and box {done.objective:.3f}"
    known = "" if done.is_new else ", registered before,"
    print(f"models:/{NAME}@{alias} is version {done.version}{known} of run {done.run_id}{score}")
    if done.previous not in (None, done.version):
        score = "" if done.previous_objective is None else f", {done.previous_objective:.3f}"
        print(f"it was version {done.previous}{score}; models:/{NAME}/{done.previous} still means that one")


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Folders with results/, commits, DVC experiments, or MLflow run ids: two at least; the first is "
            "what the others are tested against.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("comparison.html"),
) -> None:
    """Compare finished runs: paired tests on the lesions they share, differing settings, one page."""
    from lesionsam.report.comparison import compare as run_compare
    from lesionsam.tracking.lineage import repository_root

    size = run_compare(runs, out, repository_root(Path.cwd()))
    print(f"{out} ({size / 1e6:.1f} MB)")


def doctor() -> None:
    """Check packages, GPU, memory, disk, tracking, data, weights and DVC's state, and print the next step.

    For the installation and the folder. `lesionsam check` is for params.yaml, `data check` for data, `smoke` for
    weights.
    """
    from lesionsam.cli.doctor import examine, next_step, print_findings
    from lesionsam.tracking.lineage import repository_root

    root = repository_root(Path.cwd())
    findings = examine(root)
    if code := print_findings(findings, next_step(root, findings)):
        raise typer.Exit(code)

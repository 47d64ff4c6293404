"""`lesionsam submit`: trainings, sweeps, predictions and the comparison as jobs of Slurm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lesionsam.errors import UserError

if TYPE_CHECKING:
    from lesionsam.config.schema import Cluster

submit_app = typer.Typer(no_args_is_help=True, help="Submit jobs to Slurm; resources: section cluster of params.yaml.")
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

Partition = Annotated[str | None, typer.Option(help="cluster.partition.", show_default=False)]
Minutes = Annotated[int | None, typer.Option(min=1, help="cluster.minutes: time limit of a job.", show_default=False)]
Gpus = Annotated[int | None, typer.Option(min=0, help="cluster.gpus: per node.", show_default=False)]
Cpus = Annotated[int | None, typer.Option(min=1, help="cluster.cpus: per node.", show_default=False)]
Memory = Annotated[float | None, typer.Option(min=0.001, help="cluster.memory_gb: per node.", show_default=False)]
Tasks = Annotated[int | None, typer.Option(min=1, help="cluster.tasks: array size.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the script, submit nothing.")]
PARAMS = Path("params.yaml")


def _cluster(**given: object) -> Cluster:
    """Return section cluster of params.yaml, with the options that are given."""
    from lesionsam.config.load import load_config, to_values, validate

    config = load_config(PARAMS, check_files=False)
    values = to_values(config)
    values["cluster"] |= {name: value for name, value in given.items() if value is not None}
    return validate(values, PARAMS.name).cluster


def _say(number: str, what: str) -> None:
    """Print the number of a job that was submitted."""
    if number:
        print(f"job {number}: {what}; `lesionsam submit status` shows how it does")


@submit_app.command(context_settings=PASSED_ON)
def train(
    context: typer.Context,
    partition: Partition = None,
    minutes: Minutes = None,
    gpus: Gpus = None,
    cpus: Cpus = None,
    memory_gb: Memory = None,
    dry_run: DryRun = False,
) -> None:
    """Run `dvc repro` in a job of `runtime.nodes` nodes; other arguments go to it, such as names of stages."""
    from lesionsam.cluster.slurm import submit
    from lesionsam.config.load import load_config

    cluster = _cluster(partition=partition, minutes=minutes, gpus=gpus, cpus=cpus, memory_gb=memory_gb)
    nodes = load_config(PARAMS, check_files=False).runtime.nodes
    command = [sys.executable, "-m", "dvc", "repro", *context.args]
    _say(submit([command], name="train", cluster=cluster, root=Path.cwd(), nodes=nodes, dry_run=dry_run), "dvc repro")


@submit_app.command(context_settings=PASSED_ON)
def tune(
    context: typer.Context,
    storage: Annotated[
        str, typer.Option(help="Database URL or journal file of the study, reached from all nodes; see src/tune.py.")
    ] = "",
    trials: Annotated[int, typer.Option(min=1, help="Finished trials the study shall have in all.")] = 20,
    partition: Partition = None,
    minutes: Minutes = None,
    gpus: Gpus = None,
    cpus: Cpus = None,
    memory_gb: Memory = None,
    tasks: Tasks = None,
    dry_run: DryRun = False,
) -> None:
    """Run a worker of `src/tune.py` in each task of an array; other arguments go to it."""
    from lesionsam.cluster.slurm import submit

    cluster = _cluster(partition=partition, minutes=minutes, gpus=gpus, cpus=cpus, memory_gb=memory_gb, tasks=tasks)
    if not storage and cluster.tasks > 1:
        raise UserError(
            f"--storage: {cluster.tasks} workers share one study; expected postgresql://USER@HOST/NAME, or a journal "
            "FILE.log in a shared folder"
        )
    if not Path("src/tune.py").is_file():
        raise UserError("src/tune.py: no such file; submit from the root of the repository")
    command = [sys.executable, "src/tune.py", "--trials", str(trials), *context.args]
    command += ["--storage", storage] if storage else []
    number = submit([command] * cluster.tasks, name="tune", cluster=cluster, root=Path.cwd(), dry_run=dry_run)
    _say(number, f"{cluster.tasks} workers of one study of {trials} trials")


@submit_app.command(context_settings=PASSED_ON)
def predict(
    context: typer.Context,
    partition: Partition = None,
    minutes: Minutes = None,
    gpus: Gpus = None,
    cpus: Cpus = None,
    memory_gb: Memory = None,
    tasks: Tasks = None,
    dry_run: DryRun = False,
) -> None:
    """Run `lesionsam predict` in shards, an array task each, then merge them; other arguments go to it."""
    from lesionsam.cli.predict import predict as predict_command
    from lesionsam.cluster.slurm import submit

    app = typer.Typer()
    app.command()(predict_command)
    parsed = typer.main.get_command(app).make_context("predict", list(context.args)).params  # bad options end it here
    if taken := [name for name in ("shard", "merge") if parsed[name]] + ["devices"] * (parsed["devices"] != "1"):
        raise UserError(f"--{taken[0]}: the tasks of the array are the shards; leave it out")
    cluster = _cluster(partition=partition, minutes=minutes, gpus=gpus, cpus=cpus, memory_gb=memory_gb, tasks=tasks)
    call = [sys.executable, "-m", "lesionsam", "predict"]
    shards = [[*call, *context.args, "--shard", f"{k}/{cluster.tasks}"] for k in range(1, cluster.tasks + 1)]
    root = Path.cwd()
    number = submit(shards, name="predict", cluster=cluster, root=root, dry_run=dry_run)
    _say(number, f"{cluster.tasks} shards")
    merge = [*call, "--merge", str(parsed["out"])]
    small = cluster.model_copy(update={"gpus": 0, "cpus": 1})
    _say(
        submit([merge], name="merge", cluster=small, root=root, after=number or "ARRAY", dry_run=dry_run), "their merge"
    )


@submit_app.command(context_settings=PASSED_ON)
def evidence(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Real pairs: images/{train,val} and masks/{train,val}.")],
    partition: Partition = None,
    minutes: Minutes = None,
    gpus: Gpus = None,
    cpus: Cpus = None,
    memory_gb: Memory = None,
    dry_run: DryRun = False,
) -> None:
    """Run the comparison on real pairs, benchmarks/comparison/run.py, in a job; other arguments go to it."""
    from lesionsam.cluster.slurm import submit

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected images/{{train,val}} and masks/{{train,val}} in it")
    script = Path("benchmarks/comparison/run.py")
    if not script.is_file():
        raise UserError(f"{script}: no such file; submit from the root of the repository")
    cluster = _cluster(partition=partition, minutes=minutes, gpus=gpus, cpus=cpus, memory_gb=memory_gb)
    command = [sys.executable, str(script), str(folder.resolve()), *context.args]
    _say(submit([command], name="evidence", cluster=cluster, root=Path.cwd(), dry_run=dry_run), "the comparison")


@submit_app.command()
def status() -> None:
    """List the jobs that were submitted from this folder: number, name, state and log."""
    from lesionsam.cluster.slurm import job_states

    for row in job_states(Path.cwd()):
        print(f"{row['job']:<12} {row['name']:<9} {row['submitted']}  {row['state']:<22} {row['log']}")

"""A sweep from beginning to end: space, study, workers, comparison of winner and start, the winner in params.yaml.

Its parts: `sweep_space` (what is searched), `sweep_data` (what trials share), `sweep_storage` (where the study lives),
`sweep_crew` and `sweep_worker` (who takes trials), `sweep_trial` (one training), `sweep_report` (what is left behind).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from json import dumps
from pathlib import Path

import optuna

from lesionsam.config import Config, flatten, load_config, read_text, to_values
from lesionsam.config_file import difference, edit_text
from lesionsam.errors import UserError
from lesionsam.files import write_text_atomic
from lesionsam.presets import apply_preset
from lesionsam.sweep_crew import crew, is_late
from lesionsam.sweep_data import Bench, fixed_values, idle_gate, num_blocks, open_bench
from lesionsam.sweep_report import (
    Verdict,
    as_text,
    by_label_free,
    comparisons,
    draw_pictures,
    judge,
    listed,
    rank_correlation,
    summary,
    table,
    winner,
    write,
)
from lesionsam.sweep_space import Dimension, combinations, configured, dead_keys, read_space, to_json
from lesionsam.sweep_storage import HOST, clear_errors, shown_url, storage_url
from lesionsam.sweep_study import make_ready, open_study
from lesionsam.sweep_trial import BEST_NAME, Place, budget, open_tracker
from lesionsam.sweep_worker import Plan, interrupt, is_finished
from lesionsam.tracking import NullTracker
from lesionsam.training import OBJECTIVE


@dataclass(frozen=True)
class Request:
    """What the command line asks for; see `src/tune.py`."""

    trials: int = 20
    timeout_minutes: float = 0.0
    workers: int = 1
    study: str = ""
    storage: str = ""
    apply: bool = False
    dry_run: bool = False
    preset: str = ""
    params: Path = Path("params.yaml")


def sweep(request: Request) -> None:
    """Search, compare, and write the winner where that is asked for.

    Raises:
        UserError: see the modules; also after Ctrl-C (exit 130) and where trials are missing in the end.
    """
    config = load_config(request.params)
    text = read_text(request.params)
    if request.preset:
        text, config = apply_preset(request.preset, text, request.params.name)
    url, space = storage_url(request.storage), read_space(config)
    bench = open_bench(config)
    space = live_space(config, bench, space)
    fixed = fixed_values(config, space, bench)
    name = request.study or f"sweep-{sha256(dumps([to_json(space), fixed], sort_keys=True).encode()).hexdigest()[:8]}"
    for line in announce(config, bench, space, name, url, request):
        print(line, flush=True)
    if request.dry_run:
        return
    previous = (
        signal.signal(signal.SIGTERM, interrupt) if threading.current_thread() is threading.main_thread() else None
    )
    optuna.logging.set_verbosity(optuna.logging.ERROR + 10)
    try:
        with clear_errors(url):
            _search(request, config, bench, space, fixed, name, url, text)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def live_space(config: Config, bench: Bench, space: Sequence[Dimension]) -> list[Dimension]:
    """The space without the keys that change nothing, each of which is named.

    Raises:
        UserError: no key is left, or one asks for more encoder blocks than there are.
    """
    last = next((d for d in space if d.key == "model.unfreeze_last_k"), None)
    if last is not None:
        blocks, most = num_blocks(config, bench), max((int(v) for v in last.choices), default=int(last.high))
        if most > blocks:
            raise UserError(f"sweep.space: {last.key}: expected at most {blocks}, the encoder's blocks, got {most}")
    dead = dead_keys(config, space)
    if (idle := idle_gate(config, bench, [d for d in space if d.key not in dead])) is not None:
        dead["method.gate.entropy_thresh"] = idle
    for key, why in dead.items():
        print(f"{key} changes nothing now and is left out: {why}", flush=True)
    live = [d for d in space if d.key not in dead]
    if not live:
        raise UserError(
            f"sweep.space: every key changes nothing under this configuration ({', '.join(dead)}); "
            "search others, or switch on what reads them"
        )
    return live


def announce(
    config: Config, bench: Bench, space: Sequence[Dimension], name: str, url: str, request: Request
) -> list[str]:
    """What is going to happen, in lines."""
    s, scored = config.sweep, sum(one.split == "dev" for one in bench.seen)
    by = "label-free score" if by_label_free(config, bench) else "mean IoU of ring, centre, box"
    if s.objective == OBJECTIVE and not bench.has_masks:
        by += " (no masks: label-free, whatever sweep.objective says)"
    lines = [
        f"study {name} in {shown_url(url)}: up to {request.trials} trials, {s.sampler} sampler, {s.pruner} pruner",
        *(f"  {dimension}" for dimension in space),
        f"  scored by {by} on {scored} development images; {len(bench.held)} more stay unseen for the comparison",
        f"  {budget(config)} of {config.train.epochs} epochs a trial; trial 0 is "
        f"{f'preset {request.preset}' if request.preset else request.params.name} as it stands",
    ]
    points = combinations(space)
    if points is not None and len(points) < request.trials:
        lines.append(f"  the space has only {len(points)} points: {len(points)} trials")
    return lines


def _search(
    request: Request,
    config: Config,
    bench: Bench,
    space: list[Dimension],
    fixed: dict[str, object],
    name: str,
    url: str,
    text: str,
) -> None:
    place = Place.of(name)
    holder = place.lock("parent.lock")
    ours = holder.acquire(wait=False)  # who holds it keeps the parent run and closes the sweep on this machine
    tracker, status = NullTracker(None), "FAILED"
    points = combinations(space)
    plan = Plan(
        values=to_values(config),
        space=to_json(space),
        study=name,
        url=url,
        trials=min(request.trials, len(points) if points is not None else request.trials),
        deadline=time.time() + 60 * request.timeout_minutes if request.timeout_minutes else 0.0,
        parent_run_id=None,
    )
    study = None
    try:
        study, created = open_study(config, bench, space, fixed, name, url, place)
        known = (place.scratch / "parent" / "run.json").exists() and study.user_attrs.get("parent_host") == HOST
        if ours and (created or known):
            tracker = open_tracker(
                config,
                place.scratch / "parent",
                name=name,
                parent_run_id=None,
                params=flatten(config),
                tags={"sweep.study": name, "sweep.role": "parent"},
                system_metrics=config.tracking.system_metrics,
            )
        if created:
            make_ready(study, config, bench, space, tracker)
        plan = replace(plan, parent_run_id=study.user_attrs["parent_run"] or None)
        crew(plan, request.workers)
        verdict = close_up(config, bench, space, place, study, plan, request.workers) if ours else None
        finish(study, config, bench, space, place, tracker, verdict)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        done = 0 if study is None else num_finished(study)
        raise UserError(
            f"interrupted with {done} of {plan.trials} trials finished; the same command goes on from here",
            exit_code=130,
        ) from None
    finally:
        tracker.close(status)
        holder.release()
    if (best := winner(study)) is None:
        reasons = [t.user_attrs["error"] for t in listed(study) if "error" in t.user_attrs]
        raise UserError(
            f"no trial came to its end{f'; the first failed with: {reasons[0]}' if reasons else ''}", exit_code=1
        )
    if request.apply:
        apply_best(request, config, best, verdict, text)
    if num_finished(study) < plan.trials and not is_late(plan):
        raise UserError(
            f"{num_finished(study)} of {plan.trials} trials finished; the same command goes on", exit_code=1
        )


def num_finished(study: optuna.Study) -> int:
    """Trials that count."""
    return sum(map(is_finished, study.get_trials(deepcopy=False)))


def close_up(
    config: Config,
    bench: Bench,
    space: Sequence[Dimension],
    place: Place,
    study: optuna.Study,
    plan: Plan,
    workers: int,
) -> Verdict | None:
    """Winner and start again with new seeds, judged on images that no trial saw; None with nothing to compare."""
    best = winner(study)
    if best is None or "start" in best.user_attrs or not bench.held:
        return None
    jobs = comparisons(config, best.user_attrs["values"], study.user_attrs["start"])
    todo = [job for job in jobs if not job.path(place).exists()]
    if todo and not is_late(plan):
        print(
            f"comparing trial {best.number} with the start: {len(todo)} trainings of {config.train.epochs} epochs",
            flush=True,
        )
        crew(replace(plan, jobs=tuple(asdict(job) for job in todo)), min(workers, len(todo)))
    return judge(config, place, jobs)


def finish(
    study: optuna.Study,
    config: Config,
    bench: Bench,
    space: Sequence[Dimension],
    place: Place,
    tracker: NullTracker,
    verdict: Verdict | None,
) -> None:
    """Table, summary and pictures: printed, kept in the sweep's folder, and on the parent run."""
    rows, lines = table(study, space), summary(study, config, bench, space, verdict)
    print(f"\n{as_text(rows)}\n")
    for line in lines:
        print(line)
    print(f"kept in {place.out}/", flush=True)
    step = num_finished(study)
    for path in write(place, rows, lines):
        tracker.log_artifact(path)
    for name, path in draw_pictures(study, place, space).items():
        tracker.log_artifact(path, "pictures")
        tracker.log_picture(path, f"sweep_{name}", step)
    best = winner(study)
    if best is None or best.value is None:
        return
    points = {"sweep/best": best.value, "sweep/zero_shot": study.user_attrs["zero_shot"], "sweep/trials": step}
    if (ranked := rank_correlation(study)) is not None:
        points["sweep/label_free_rank_correlation"] = ranked[0]
    if verdict is not None:
        points |= {
            "sweep/difference": verdict.difference,
            "sweep/difference_low": verdict.low,
            "sweep/difference_high": verdict.high,
        }
    tracker.log(points, step)
    tracker.set_tags(
        {"sweep.best_trial": best.number, **{f"sweep.best.{k}": v for k, v in best.user_attrs["values"].items()}}
    )
    if (place.out / BEST_NAME).exists():
        tracker.log_checkpoint(place.out / BEST_NAME, "sweep-best", {OBJECTIVE: best.value}, step)


def apply_best(
    request: Request, config: Config, best: optuna.trial.FrozenTrial, verdict: Verdict | None, text: str
) -> None:
    """Write the winner's values into params.yaml, comments kept, and print the difference."""
    if verdict is not None and verdict.high < 0:
        print(f"{request.params} stays as it is: on unseen images the winner is worse than the start")
        return
    before = read_text(request.params)
    new = edit_text(text, to_values(configured(config, best.user_attrs["values"])), request.params.name)
    lines = difference(before, new, request.params.name)
    if not lines:
        print(f"{request.params} holds the best values already")
        return
    if verdict is not None and verdict.low <= 0:
        print("note: the lead of these values over the start is not sure, see the interval above")
    write_text_atomic(request.params, new)
    print("\n".join(lines))
    print("`dvc repro` trains with these values")

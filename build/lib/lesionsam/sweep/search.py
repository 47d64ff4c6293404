"""A sweep from beginning to end: space, study, workers, comparison of winner and start, the winner in params.yaml.

Its parts: `sweep_space` (what is searched), `sweep_data` (what trials share), `sweep_storage` (where the study lives),
`sweep_crew` and `sweep_worker` (who takes trials), `sweep_trial` (one training), `sweep_report` (what is left behind).
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from json import dumps
from pathlib import Path

import optuna

from lesionsam.config.edit import difference, edit_text
from lesionsam.config.load import Config, flatten, load_config, parse_yaml, read_text, to_values, validate
from lesionsam.config.presets import apply_preset
from lesionsam.errors import UserError
from lesionsam.sweep.bench import Bench, fixed_values, idle_gate, num_blocks, open_bench
from lesionsam.sweep.charts import draw_pictures
from lesionsam.sweep.crew import crew, is_late
from lesionsam.sweep.report import (
    Verdict,
    as_text,
    budget_correlation,
    comparisons,
    judge,
    listed,
    rank_correlation,
    scored_by,
    spread,
    summary,
    table,
    winner,
    write,
)
from lesionsam.sweep.space import Dimension, combinations, configured, dead_keys, foreign_keys, read_space, to_json
from lesionsam.sweep.storage import clear_errors, opened, repair, shown_url, storage_url
from lesionsam.sweep.study import made_here, make_ready, open_study
from lesionsam.sweep.trial import BEST_NAME, Job, Place, best_note, budget, open_tracker
from lesionsam.sweep.worker import Plan, interrupt, is_finished
from lesionsam.tracking.lineage import repository_root
from lesionsam.tracking.tracker import NullTracker, sync
from lesionsam.training.loop import OBJECTIVE
from lesionsam.utils.files import write_text_atomic

ENDS = (signal.SIGTERM, signal.SIGHUP)
SYNC_SECONDS = 60.0  # patience with MLflow after the last trial


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
    rank_check: int = 0
    preset: str = ""
    params: Path = Path("params.yaml")


def sweep(request: Request) -> None:
    """Search, compare, and write the winner where that is asked for.

    Raises:
        UserError: see the modules; also after Ctrl-C (exit 130) and where trials are missing in the end.
    """
    config = load_config(request.params)
    if request.preset:
        config = on_preset(request.preset, read_text(request.params), request.params.name)[1]
    url, space = storage_url(request.storage), read_space(config)
    bench = open_bench(config)
    space = live_space(config, bench, space)
    fixed = fixed_values(config, space, bench)
    name = request.study or f"sweep-{sha256(dumps([to_json(space), fixed], sort_keys=True).encode()).hexdigest()[:8]}"
    for line in announce(config, bench, space, name, url, request):
        print(line, flush=True)
    if request.dry_run:
        return
    before = {one: signal.getsignal(one) for one in ENDS} if is_main_thread() else {}
    for one, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup: the terminal may go
            signal.signal(one, interrupt)
    optuna.logging.set_verbosity(optuna.logging.ERROR + 10)
    try:
        with clear_errors(url), ExitStack() as stack:
            _search(request, config, bench, space, fixed, name, url, stack)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def is_main_thread() -> bool:
    """Whether signals may be handled here."""
    return threading.current_thread() is threading.main_thread()


def on_preset(preset: str, text: str, source: str) -> tuple[str, Config]:
    """A parameter file's text, and its configuration, with a preset applied; what to sweep stays as the file says."""
    wanted, found = parse_yaml(text, source).get("sweep"), to_values(apply_preset(preset, text, source)[1])
    config = validate({**found, "sweep": wanted or found["sweep"]}, f"{source} with preset {preset}")
    return edit_text(text, to_values(config), source), config


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
    dead = foreign_keys(config) | dead_keys(config, space)
    if (idle := idle_gate(config, bench, [d for d in space if d.key not in dead])) is not None:
        dead["method.gate.entropy_thresh"] = idle
    for key, why in dead.items():
        print(f"{key} changes nothing now and is left out: {why}", flush=True)
    live = [d for d in space if d.key not in dead]
    if not live:
        raise UserError(
            f"sweep.space: every key changes nothing under this configuration ({', '.join(dead)}); search others, or "
            "switch on what reads them"
        )
    return live


def announce(
    config: Config, bench: Bench, space: Sequence[Dimension], name: str, url: str, request: Request
) -> list[str]:
    """What is going to happen, in lines."""
    s, scored = config.sweep, sum(one.split == "dev" for one in bench.seen)
    points = combinations(space)
    trials = min(request.trials, request.trials if points is None else len(points))
    by = scored_by(config, bench)
    if s.objective == OBJECTIVE and not bench.has_masks:
        by += " (there are no masks, whatever sweep.objective says)"
    lines = [
        f"study {name} in {shown_url(url)}: up to {request.trials} trials, {s.sampler} sampler, {s.pruner} pruner",
        *(f"  {dimension}" for dimension in space),
        f"  scored by {by} on {scored} development images; {len(bench.held)} more stay unseen for the comparison",
        f"  {budget(config)} of {config.train.epochs} epochs a trial; trial 0 is "
        f"{f'preset {request.preset}' if request.preset else request.params.name} as it stands",
    ]
    if bench.held and s.confirm_seeds:
        lines.append(
            f"  then winner and start anew, {s.confirm_seeds} seeds each: {2 * s.confirm_seeds} trainings of "
            f"{config.train.epochs} epochs (together {2 * s.confirm_seeds * config.train.epochs}, the trials at most "
            f"{trials * budget(config)})"
        )
    if trials < request.trials:
        lines.append(f"  the space has only {trials} points: {trials} trials")
    if any(d.key == "method.num_points" for d in space):
        lines.append("  note: method.num_points is also the number of ring points that trials are scored with")
    return lines


def _search(
    request: Request,
    config: Config,
    bench: Bench,
    space: list[Dimension],
    fixed: dict[str, object],
    name: str,
    url: str,
    stack: ExitStack,
) -> None:
    place = Place.of(name)
    holder = place.lock("parent.lock")
    tracker, status = NullTracker(None), "FAILED"
    points = combinations(space)
    plan = Plan(
        values=to_values(config),
        space=to_json(space),
        study=name,
        url=url,
        trials=min(request.trials, len(points) if points is not None else request.trials),
        deadline=time.time() + 60 * request.timeout_minutes if request.timeout_minutes else 0.0,
        parent=None,
        workers=request.workers,
    )
    study, verdict, is_closing = None, None, False
    try:
        with place.lock("ready.lock", "waiting for the process that prepares this study"):
            bench.data(config)  # decoded once, by whoever comes first
            study, created = open_study(config, space, fixed, name, stack.enter_context(opened(url)))
            ours = holder.acquire(wait=False)  # who holds it has the parent run and closes the sweep on this machine
            place.adopt(study.user_attrs["uid"], alone=ours)
            is_closing = ours and (made_here(study) or num_finished(study) >= plan.trials)
            if is_closing:
                tracker = open_tracker(
                    config,
                    place.scratch / "parent",
                    name=name,
                    params=flatten(config),
                    tags={"sweep.study": name, "sweep.role": "parent"},
                    local_id=study.user_attrs.get("parent"),
                    system_metrics=config.tracking.system_metrics,
                )
            if created:
                make_ready(study, config, bench, space, tracker)
        plan = replace(plan, parent=study.user_attrs.get("parent"))
        crew(plan, request.workers)
        if is_closing:
            verdict = close_up(config, bench, place, study, plan)
            ranked = check_budget(config, place, study, plan, request.rank_check)
            finish(study, config, bench, space, place, tracker, verdict, ranked)
            if not study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
                shutil.rmtree(place.scratch / "trials", ignore_errors=True)  # of attempts that nobody took up again
        else:
            print(f"\n{as_text(table(study, config, space))}\n", flush=True)
            print("winner and start are compared by the command that made this study", flush=True)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        if study is not None:
            with place.lock():  # of workers that were interrupted where they could not close their trial themselves
                repair(study, {})
        done = 0 if study is None else num_finished(study)
        raise UserError(
            f"interrupted with {done} of {plan.trials} trials finished; the same command goes on from here",
            exit_code=130,
        ) from None
    finally:
        tracker.close(status)
        holder.release()
    if config.tracking.enabled:
        sync(repository_root(Path.cwd()), timeout=SYNC_SECONDS)  # closes the runs of workers that were killed
    if (best := winner(study)) is None:
        reasons = [t.user_attrs["error"] for t in listed(study) if "error" in t.user_attrs]
        raise UserError(
            f"no trial came to its end{f'; the first failed with: {reasons[0]}' if reasons else ''}", exit_code=1
        )
    if request.apply:
        apply_best(request, best, verdict)
    if num_finished(study) < plan.trials and not is_late(plan):
        raise UserError(
            f"{num_finished(study)} of {plan.trials} trials finished; the same command goes on", exit_code=1
        )


def num_finished(study: optuna.Study) -> int:
    """Trials that count."""
    return sum(map(is_finished, study.get_trials(deepcopy=False)))


def close_up(config: Config, bench: Bench, place: Place, study: optuna.Study, plan: Plan) -> Verdict | None:
    """Winner and start again with new seeds, judged on images that no trial saw; None with nothing to compare."""
    best = winner(study)
    if best is None or "start" in best.user_attrs or not bench.held:
        return None
    jobs = comparisons(config, best.user_attrs["values"], study.user_attrs["start"])
    after_trials(jobs, f"comparing trial {best.number} with the start", config, place, plan)
    return judge(config, place, jobs)


def check_budget(config: Config, place: Place, study: optuna.Study, plan: Plan, count: int) -> tuple[float, int] | None:
    """Rank correlation of the trials' values with those of whole runs, over trials trained again at full length.

    Args:
        count: of trials to train again, spread over the ranking; 0 = none beyond those that were.
    Returns:
        Spearman's coefficient and the number of trials behind it; None where there are too few.
    """
    if budget(config) >= config.train.epochs:
        if count:
            print("a trial's budget is the whole run (sweep.epochs): nothing to check", flush=True)
        return None
    after_trials(spread(study, config, count), "checking how well a trial's budget ranks", config, place, plan)
    return budget_correlation(study, config, place)


def after_trials(jobs: Sequence[Job], title: str, config: Config, place: Place, plan: Plan) -> None:
    """Do the trainings among the jobs that have no figures yet, unless the time is over."""
    todo = [job for job in jobs if not job.path(place).exists()]
    if not todo or is_late(plan):
        return
    print(f"{title}: {len(todo)} trainings of {config.train.epochs} epochs", flush=True)
    workers = min(plan.workers, len(todo))
    crew(replace(plan, jobs=tuple(asdict(job) for job in todo), workers=workers), workers)


def finish(
    study: optuna.Study,
    config: Config,
    bench: Bench,
    space: Sequence[Dimension],
    place: Place,
    tracker: NullTracker,
    verdict: Verdict | None,
    ranked: tuple[float, int] | None,
) -> None:
    """Table, summary and pictures: printed, kept in the sweep's folder, and on the parent run."""
    rows, lines = table(study, config, space), summary(study, config, bench, verdict, ranked)
    print(f"\n{as_text(rows)}\n")
    for line in lines:
        print(line)
    print(f"kept in {place.out}/", flush=True)
    step = num_finished(study)
    for path in write(place, rows, lines):
        tracker.log_artifact(path)
    for name, path in draw_pictures(study, place, space, scored_by(config, bench)).items():
        tracker.log_artifact(path, "pictures")
        tracker.log_picture(path, f"sweep_{name}", step)
    best = winner(study)
    if best is None or best.value is None:
        return
    points = {"sweep/best": best.value, "sweep/zero_shot": study.user_attrs["zero_shot"], "sweep/trials": step}
    if (label_free := rank_correlation(study)) is not None:
        points["sweep/label_free_rank_correlation"] = label_free[0]
    if ranked is not None:
        points["sweep/budget_rank_correlation"] = ranked[0]
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
    if best_note(place).get("values") == best.user_attrs["values"]:  # it may lie on another machine
        tracker.log_checkpoint(place.out / BEST_NAME, "sweep-best", {OBJECTIVE: best.value}, step)


def apply_best(request: Request, best: optuna.trial.FrozenTrial, verdict: Verdict | None) -> None:
    """Write the winner's values into params.yaml as it is now, comments kept, and print the difference."""
    name = request.params.name
    if verdict is not None and verdict.high < 0:
        print(f"{name} stays as it is: on unseen images the winner is worse than the start")
        return
    before = read_text(request.params)  # a sweep is long: what its owner changed meanwhile stays
    if request.preset:
        text, config = on_preset(request.preset, before, name)
    else:
        text, config = before, validate(parse_yaml(before, name), name)
    new = edit_text(text, to_values(configured(config, best.user_attrs["values"])), name)
    lines = difference(before, new, name)
    if not lines:
        print(f"{name} holds the best values already")
        return
    if verdict is not None and verdict.low <= 0:
        print("note: the lead of these values over the start is not sure, see the interval above")
    write_text_atomic(request.params, new)
    print("\n".join(lines))
    print("`dvc repro` trains with these values")

"""The loop: schedule, resume, states on disk, errors that stop."""

from __future__ import annotations

import math
import re
import resource
import signal
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.methods import DEFAULT, options, supervised
from helpers.tiny import tiny_data
from helpers.training import Mean, Stop, contrastive, differing, run, stop_at, weights
from lesionsam.data.augment import NO_AUGMENTATION
from lesionsam.data.dataset import LesionDataset
from lesionsam.errors import Interrupted, UserError
from lesionsam.methods.base import Term
from lesionsam.methods.contrastive import Contrastive
from lesionsam.training.gradients import step_generator
from lesionsam.training.liveness import LIVENESS_STEPS
from lesionsam.training.optimizer import Schedule, parameter_groups
from lesionsam.training.state import DAMAGE, check_disk, load_best, read_tensors, trained_state, write_tensors


@pytest.fixture(scope="module")
def data() -> LesionDataset:
    return tiny_data(10)


@pytest.fixture(scope="module")
def undisturbed(
    data: LesionDataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    method, rows = contrastive(), []
    run(
        method, data, tmp_path_factory.mktemp("undisturbed"), log=lambda values, step: rows.append((step, dict(values)))
    )
    return weights(method), rows


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_killed_after_an_epoch_resumes_bit_for_bit(
    data: LesionDataset, undisturbed: tuple[dict[str, torch.Tensor], list[Any]], tmp_path: Path, epoch: int
) -> None:
    with pytest.raises(Stop):  # before the state of this epoch is written: the worst moment
        run(contrastive(), data, tmp_path, log=stop_at(lambda values, step: values.get("epoch") == epoch))
    again, lines, rows = contrastive(), [], []
    progress = run(again, data, tmp_path, say=lines.append, log=lambda values, step: rows.append((step, dict(values))))
    assert differing(weights(again), undisturbed[0]) == []
    assert any(line.startswith(f"resuming after epoch {epoch - 1}") for line in lines) is (epoch > 1)
    assert (progress.epoch, progress.best_epoch, progress.best_score) == (3, 2, 0.3)
    assert rows == undisturbed[1][-len(rows) :], "what is logged after the resume is what was logged without it"
    assert rows[0][0] == (epoch - 1) * 3 + 1


def test_a_run_killed_within_an_epoch_resumes_from_its_last_save_bit_for_bit(
    data: LesionDataset,
    undisturbed: tuple[dict[str, torch.Tensor], list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lesionsam.training.loop.SAVE_SECONDS", 0.0)
    with pytest.raises(Stop):
        run(contrastive(), data, tmp_path, log=stop_at(lambda values, step: step == 5))
    assert (tmp_path / "state-000000004-000001.pt").exists()
    again, rows = contrastive(), []
    run(again, data, tmp_path, log=lambda values, step: rows.append((step, dict(values))))
    assert differing(weights(again), undisturbed[0]) == []
    assert rows[0][0] == 5
    assert rows[-1] == undisturbed[1][-1], "the epoch's means hold its beginning too"


def counted() -> Any:
    """The small method, which counts its steps."""
    method, after_step = contrastive(), Contrastive.after_step
    method.steps = 0  # type: ignore[attr-defined]

    def after(taken: bool | torch.Tensor = True) -> None:
        method.steps += 1  # type: ignore[attr-defined]
        after_step(method, taken)

    method.after_step = after  # type: ignore[method-assign]
    return method


@pytest.mark.parametrize(("accumulate", "steps"), [(1, (2, 3, 9)), (2, (1, 2))])
def test_a_run_that_is_asked_to_end_saves_its_step_and_goes_on_from_there(
    data: LesionDataset, tmp_path: Path, accumulate: int, steps: Sequence[int]
) -> None:
    whole = contrastive()
    run(whole, data, tmp_path / "whole", accumulate=accumulate)
    for number in steps:  # asked after that step, in the middle of an epoch or at its end
        folder, taken = tmp_path / str(number), counted()
        with pytest.raises(Interrupted) as ended:
            run(
                taken,
                data,
                folder,
                accumulate=accumulate,
                stop_requested=lambda number=number, taken=taken: signal.SIGTERM if taken.steps >= number else 0,
            )
        assert (ended.value.exit_code, taken.steps) == (143, number)
        newest = sorted(folder.glob("state-*.pt"))[-1]
        assert read_tensors(newest)["progress"]["seconds"] > 0, "its time counts, in the middle of an epoch too"
        again, rows = contrastive(), []
        run(again, data, folder, accumulate=accumulate, log=lambda values, step, rows=rows: rows.append(step))
        assert differing(weights(again), weights(whole)) == []
        assert min(rows) >= number, "no step is taken twice"


def test_a_finished_run_is_not_trained_again(data: LesionDataset, tmp_path: Path) -> None:
    run(contrastive(), data, tmp_path, epochs=1)
    method, rows = contrastive(), []
    progress = run(method, data, tmp_path, epochs=1, log=lambda values, step: rows.append(step))
    assert rows == []
    assert progress.epoch == 1


def test_a_damaged_newest_state_falls_back_to_the_one_before(
    data: LesionDataset,
    undisturbed: tuple[dict[str, torch.Tensor], list[Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(contrastive(), data, tmp_path)
    states = sorted(tmp_path.glob("state-*.pt"))
    assert len(states) == 2, "the newest and the one to fall back to"
    whole = states[-1].read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # of a tensor: torch.load would take it
    for damage in (whole[:1000], b"", b"\x80\x02no weights at all", bytes(flipped)):
        states[-1].write_bytes(damage)
        again, lines = contrastive(), []
        run(again, data, tmp_path, say=lines.append)
        assert "cannot be read" in capsys.readouterr().out
        assert "resuming after epoch 2, step 6" in lines
        assert differing(weights(again), undisturbed[0]) == []


def test_states_that_are_all_damaged_are_an_error_and_not_a_silent_new_start(
    data: LesionDataset, tmp_path: Path
) -> None:
    run(contrastive(), data, tmp_path, epochs=2)
    for state in tmp_path.glob("state-*.pt"):
        state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(UserError, match="none of the 2 training states can be read; delete the folder"):
        run(contrastive(), data, tmp_path)


def test_a_damaged_best_epoch_is_named(data: LesionDataset, tmp_path: Path) -> None:
    method = contrastive()
    run(method, data, tmp_path, epochs=1)
    whole = (tmp_path / "best.pt").read_bytes()
    for damage in (whole[: len(whole) // 2], whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :], None):
        (tmp_path / "best.pt").unlink() if damage is None else (tmp_path / "best.pt").write_bytes(damage)
        with pytest.raises(UserError, match=r"best\.pt: the best epoch's weights cannot be read \("):
            load_best(tmp_path, method.model)


def test_what_the_disk_refuses_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files; torch hides the system's error behind one of its own."""
    state = {"a": torch.zeros(100_000), "b": torch.zeros(3)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_tensors(tmp_path / "state.pt", state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "state.pt")
    assert list(tmp_path.iterdir()) == []
    write_tensors(tmp_path / "state.pt", state)
    assert read_tensors(tmp_path / "state.pt")["a"].equal(state["a"])


def test_no_flipped_bit_of_a_states_directory_goes_unseen(tmp_path: Path) -> None:
    """A record's directory entry is no part of its checksum."""
    path, state = tmp_path / "state.pt", {"a": torch.arange(8), "b": [1, 2.0, "x"]}
    write_tensors(path, state)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        begin = archive.start_dir
    for place in range(begin, len(whole)):
        for flipped in (8, 16):  # a method of compression; a folder
            content = bytearray(whole)
            content[place] ^= flipped
            path.write_bytes(content)
            with suppress(*DAMAGE):
                read = read_tensors(path)
                assert read["a"].equal(state["a"]), (place - begin, flipped)
                assert read["b"] == state["b"], (place - begin, flipped)


def test_too_little_disk_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = contrastive()
    check_disk(tmp_path, method)
    assert list(tmp_path.iterdir()) == []
    run(method, tiny_data(8), tmp_path, epochs=3)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    monkeypatch.setattr("lesionsam.training.state.free_disk_bytes", lambda folder: written)
    check_disk(tmp_path, method)  # what a resumed run has written is room that it need not find again
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    with pytest.raises(UserError, match=r"needed for training states and weights, \d+ MB free; free space"):
        check_disk(tmp_path, method)


def test_the_best_epoch_is_kept_and_put_back(data: LesionDataset, tmp_path: Path) -> None:
    method, seen = contrastive(), {}

    def evaluate(epoch: int) -> dict[str, float]:
        assert not method.model.training
        seen[epoch] = trained_state(method.model)
        return {"objective": [0.1, 0.3, 0.2][epoch - 1]}

    run(method, data, tmp_path, evaluate=evaluate)
    assert differing(trained_state(method.model), seen[2]) != []
    load_best(tmp_path, method.model)
    assert differing(trained_state(method.model), seen[2]) == []


def test_patience_ends_the_run(data: LesionDataset, tmp_path: Path) -> None:
    progress = run(contrastive(), data, tmp_path, epochs=5, patience=2)
    assert (progress.epoch, progress.best_epoch) == (4, 2)
    assert run(contrastive(), data, tmp_path, epochs=5, patience=2).epoch == 4, "and stays ended"


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [16, 20], ids=["whole groups", "a last group cut short"])
def test_two_batches_of_four_accumulated_equal_one_of_eight(tmp_path: Path, count: int) -> None:
    data = tiny_data(count)
    results = []
    for name, batch_size, accumulate in (("eight", 8, 1), ("four", 4, 2)):
        method = Mean()
        if count == 20:  # 3 batches of 8 (the last filled up from the start) against 5 of 4: the first two steps
            progress = run(
                method,
                data,
                tmp_path / name,
                batch_size=batch_size,
                accumulate=accumulate,
                augmentation=NO_AUGMENTATION,
                epochs=1,
                schedule=lambda step: 1.0 if step < 2 else 0.0,
            )
            assert progress.step == 3
        else:
            run(
                method,
                data,
                tmp_path / name,
                batch_size=batch_size,
                accumulate=accumulate,
                augmentation=NO_AUGMENTATION,
            )
        results.append(weights(method))
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=1e-6), name
        assert not torch.allclose(value, Mean().model.state_dict()[name], atol=1e-4), "and something was learnt"


def test_a_last_group_cut_short_is_averaged_over_what_it_holds(tmp_path: Path) -> None:
    # One batch, accumulate 4: the step must be that of accumulate 1. Plain gradient descent would show a quarter; so
    # does the clip at a norm that only the undivided gradient reaches.
    gradients = []
    for accumulate in (1, 4):
        method = Mean()
        seen: list[float] = []

        def clip(parameters: Any, limit: float, seen: list[float] = seen) -> torch.Tensor:
            norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
            seen.append(float(norm))
            return norm

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
            run(method, tiny_data(4), tmp_path / str(accumulate), epochs=1, accumulate=accumulate)
        gradients.append(seen)
    assert gradients[0] == pytest.approx(gradients[1])


def test_clip_bounds_the_step_and_the_average_follows_each_step(tmp_path: Path) -> None:
    method = Mean()
    before = weights(method)
    run(method, tiny_data(8), tmp_path, clip=1e-12, weight_decay=0.0, epochs=1)
    for name, value in weights(method).items():  # AdamW divides by the gradient plus 1e-8: a clipped one moves nothing
        assert torch.allclose(value, before[name], atol=1e-5)
    assert method.after == 2


def test_no_two_batches_of_a_run_get_the_same_draws(tmp_path: Path) -> None:
    method = Mean()
    run(method, tiny_data(8), tmp_path, epochs=3, accumulate=2)
    assert len(method.numbers) == len(set(method.numbers)) == 6


def test_every_draw_is_a_function_of_seed_and_step() -> None:
    def first(seed: int, step: int) -> float:
        return torch.rand(1, generator=step_generator(seed, step)).item()

    assert first(0, 5) == first(0, 5)
    assert len({first(seed, step) for seed in range(3) for step in range(50)}) == 150


def test_schedule_by_hand() -> None:
    def factors(**settings: Any) -> list[float]:
        return [Schedule(10, **settings)(k) for k in range(10)]

    assert factors(shape="constant", warmup=0.0, final=0.1) == pytest.approx([1.0] * 10)
    linear = factors(shape="linear", warmup=0.2, final=0.1)
    assert linear[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert linear[6] == pytest.approx(0.1 + 0.9 * 0.5)
    assert linear[9] == pytest.approx(0.1 + 0.9 / 8)
    cosine = factors(shape="cosine", warmup=0.2, final=0.0)
    assert cosine[4] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert cosine[6] == pytest.approx(0.5)
    assert Schedule(10, "cosine", warmup=0.2, final=0.02)(10) == pytest.approx(0.02)


RATES = {"head": ("head.", 3e-3), "encoder": ("image_encoder", 1e-3), "decoder": ("", 2e-3)}


@pytest.mark.parametrize("stopped", [False, True], ids=["whole", "resumed"])
def test_each_step_logs_its_own_learning_rates(data: LesionDataset, tmp_path: Path, stopped: bool) -> None:
    """Three steps an epoch; warm-up over the first two of six, then linear: 1/2, 1, 1, 3/4, 1/2, 1/4."""
    found: dict[int, dict[str, float]] = {}

    def log(values: Mapping[str, float], step: int) -> None:
        if "epoch" not in values:
            assert step not in found
            found[step] = {name: value for name, value in values.items() if name.startswith("lr")}

    def train(**changes: Any) -> None:
        method = contrastive()
        groups = parameter_groups(method.model, RATES)
        schedule = Schedule(6, "linear", warmup=1 / 3, final=0.0)
        run(method, data, tmp_path, groups=groups, epochs=2, schedule=schedule, log=log, **changes)

    if stopped:
        with pytest.raises(Interrupted):
            train(stop_requested=lambda: signal.SIGTERM)
    train()
    factors = [0.5, 1, 1, 0.75, 0.5, 0.25]
    expected = {"lr/head": 3e-3, "lr/encoder": 1e-3, "lr/decoder": 2e-3}
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    for step, factor in enumerate(factors, 1):
        assert found[step] == pytest.approx({name: rate * factor for name, rate in expected.items()})


def test_the_logged_loss_is_the_sum_of_the_weighted_terms(data: LesionDataset, tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    run(contrastive(), data, tmp_path, epochs=1, log=lambda values, step: rows.append(dict(values)))
    *steps, epoch = rows
    weights_of = {"contrast": 0.5, "distil": 0.1, "pseudo": 1.0}
    for row in steps:
        assert row["loss"] == pytest.approx(sum(weight * row[name] for name, weight in weights_of.items()), rel=1e-5)
        assert row["mask"] > 0.1, "the monitor counts in no loss"
    assert epoch["train_loss"] == pytest.approx(sum(row["loss"] for row in steps) / 3)
    assert "train_total" not in epoch


def test_a_monitor_that_is_not_finite_skips_no_step(tmp_path: Path) -> None:
    class Watched(Mean):
        def losses(self, batch: Any, generator: torch.Generator) -> Any:
            terms, _ = super().losses(batch, generator)
            return terms, {"iou": torch.tensor(math.nan)}

    lines: list[str] = []
    method = Watched()
    run(method, tiny_data(8), tmp_path, epochs=2, say=lines.append)
    assert method.after == 4
    assert not any("not finite" in line for line in lines)


# ---- errors that stop ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_named_and_stops_the_run_after_three(tmp_path: Path) -> None:
    lines: list[str] = []
    method = Mean(poison=lambda call: math.nan if call > 2 else 0.0)
    with pytest.raises(UserError, match=r"loss \(mask=nan\) is not finite at step \d+; images image.*; 3 times"):
        run(method, tiny_data(8), tmp_path, batch_size=2, say=lines.append)
    assert sum("this step is not taken" in line for line in lines) == 2
    assert method.calls == 5
    assert method.after == 2, "nothing followed a step that was not taken"
    assert all(bool(torch.isfinite(v).all()) for v in weights(method).values())


def test_one_loss_that_is_not_finite_is_passed_over(tmp_path: Path) -> None:
    lines: list[str] = []
    method = Mean(poison=lambda call: math.inf if call in (2, 3, 5) else 0.0)
    run(method, tiny_data(8), tmp_path, batch_size=2, say=lines.append, epochs=2)
    assert sum("this step is not taken" in line for line in lines) == 3
    assert method.after == 8 - 3
    assert all(bool(torch.isfinite(v).all()) for v in weights(method).values())


def test_a_group_of_batches_with_a_loss_that_is_not_finite_is_not_stepped(tmp_path: Path) -> None:
    method = Mean(poison=lambda call: math.nan if call == 1 else 0.0)
    run(method, tiny_data(8), tmp_path / "first of two", batch_size=2, accumulate=2, epochs=2)
    assert method.after == 4 - 1, "the good half of the group would have been a step of half the length"
    method = Mean(poison=lambda call: math.nan if call % 2 else 0.0)
    with pytest.raises(UserError, match="3 times without a step between"):
        run(method, tiny_data(8), tmp_path / "every second", batch_size=2, accumulate=2, epochs=3)
    assert method.after == 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_that_is_not_finite_is_not_stepped_and_stops_the_run_after_three(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The derivative of a root at 0 is infinite while the loss is finite.

    A fused optimiser, as on a GPU, skips the step by itself; the host reads the flag a step later.
    """
    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *groups, **options: plain(*groups, **options | {"fused": fused}))

    class Rooted(Mean):
        bad: Callable[[int], bool]

        def losses(self, batch: Any, generator: torch.Generator) -> Any:
            value = super().losses(batch, generator)[0]["mask"].value
            value = value + torch.sqrt(value - value.detach()) if self.bad(self.calls) else value
            return {"mask": Term(value, 1.0)}, {}

    lines: list[str] = []
    method = Rooted()
    method.bad = lambda call: call in (3, 4)
    run(method, tiny_data(8), tmp_path / "two", say=lines.append)
    said = [line for line in lines if "the gradient is not finite at step" in line and "image" in line]
    assert (len(said), method.after) == (2, 6 - 2)
    good = Rooted()
    good.bad = lambda call: False
    run(good, tiny_data(8), tmp_path / "good", say=lambda line: None)
    states = [read_tensors(max((tmp_path / name).glob("state-*.pt"))) for name in ("two", "good")]
    taken = [float(state["optimizer"]["state"][0]["step"]) for state in states]
    assert taken == [6 - 2, 6], "AdamW counts the steps that it takes"
    assert all(bool(torch.isfinite(v).all()) for v in weights(method).values())
    method = Rooted()
    method.bad = lambda call: call > 2
    with pytest.raises(UserError, match=r"the gradient is not finite at step 4; images image.* 3 times without"):
        run(method, tiny_data(8), tmp_path / "all")
    for state in (tmp_path / "all").glob("*.pt"):
        model = read_tensors(state).get("model") or read_tensors(state)
        assert all(bool(torch.isfinite(v).all()) for v in model.values()), state


def test_a_score_that_is_no_number_is_no_best_one(tmp_path: Path) -> None:
    for scores, best in (([math.nan, 0.2, 0.1], (0.2, 2)), ([0.2, math.nan, 0.1], (0.2, 1))):
        progress = run(
            Mean(),
            tiny_data(4),
            tmp_path / str(best[1]),
            evaluate=lambda epoch, scores=scores: {"objective": scores[epoch - 1]},
        )
        assert (progress.best_score, progress.best_epoch) == best


def test_the_score_that_selects_goes_by_its_name(tmp_path: Path) -> None:
    lines: list[str] = []
    scores = [{"ring": 0.3, "label_free": 0.1}, {"ring": 0.2, "label_free": 0.3}, {"ring": 0.1, "label_free": 0.2}]
    evaluate = lambda epoch: scores[epoch - 1]  # noqa: E731
    progress = run(Mean(), tiny_data(4), tmp_path, say=lines.append, evaluate=evaluate, objective="label_free")
    assert (progress.best_score, progress.best_epoch) == (0.3, 2)
    assert "ring=0.1000 label_free=0.2000 | best=0.3000 (E2)" in lines[-1]


def test_a_term_without_a_gradient_is_named(tmp_path: Path) -> None:
    method = Mean(dead=True)
    with pytest.raises(UserError, match=r"the term `pseudo` is switched on \(weight 0\.5\) but its gradient was zero"):
        run(method, tiny_data(8), tmp_path, epochs=10)
    assert method.calls == LIVENESS_STEPS.stop


def test_a_term_without_a_gradient_is_named_at_every_start_of_a_short_run(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=r"gradient was zero in each of the first 4 steps"):
            run(Mean(dead=True), tiny_data(8), tmp_path, epochs=2)


def test_lesions_too_small_for_the_contrastive_term_are_named_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cell of the feature grid lies in a core and is lesion, as where lesions are smaller than a cell."""
    method = contrastive()
    monkeypatch.setattr(method, "anchors", lambda batch, m, cells: torch.zeros(len(m), cells, cells, dtype=torch.bool))
    with pytest.raises(UserError, match=r"the term `contrast` .*; lesions smaller than a cell .* model\.image_size"):
        run(method, tiny_data(8), tmp_path, epochs=10)


def test_a_gate_that_trusts_nobody_is_named_as_the_reason(tmp_path: Path) -> None:
    lines: list[str] = []
    method = contrastive()
    method.options = options(DEFAULT, contrast=0.5, distil=0.0, target="fused", teacher_weight=0.3, entropy_thresh=0.0)
    run(method, tiny_data(8), tmp_path, say=lines.append, epochs=5)
    assert any("`pseudo` has had no gradient so far: the gate trusted no image" in line for line in lines)


def test_a_living_run_is_not_complained_about(data: LesionDataset, tmp_path: Path) -> None:
    lines: list[str] = []
    run(contrastive(), data, tmp_path, say=lines.append, epochs=4)
    assert not any("warning" in line for line in lines)


def test_every_term_of_the_default_lives_and_a_supervised_run_needs_no_teacher(tmp_path: Path) -> None:
    method = supervised()
    run(method, tiny_data(8), tmp_path, epochs=5)
    assert method.teacher is None


def test_the_progress_line_is_as_published(data: LesionDataset, tmp_path: Path) -> None:
    lines: list[str] = []
    rows: list[Any] = []
    run(contrastive(), data, tmp_path, say=lines.append, epochs=1, log=lambda values, step: rows.append(values))
    number = r"-?\d+\.\d{4}"
    assert any(
        re.match(
            rf"E1 L={number} mask={number} cont={number} distil={number} pseudo={number} iou={number} "
            rf"trusted={number} \| objective=0\.1000 \| best=0\.1000 \(E1\) "
            r"ETA \d+:\d\d$",
            line,
        )
        for line in lines
    ), lines
    total = float(lines[-1].split()[1].removeprefix("L="))
    means = rows[-1]  # the published total adds the monitors to the loss: mask and 0.5 iou
    assert total == pytest.approx(means["train_loss"] + means["train_mask"] + 0.5 * means["train_iou"], abs=1e-4)


# ---- skipped steps and the average -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_moves_neither_the_teacher_nor_its_ramp(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *groups, **options: plain(*groups, **options | {"fused": fused}))
    monkeypatch.setattr("lesionsam.training.liveness.LIVENESS_STEPS", range(0))  # it would call the hook below
    start = contrastive(head_norm="group").model.state_dict()
    for num_good in (0, 1):  # of two steps
        method, calls = contrastive(head_norm="group"), []

        def poison(gradient: torch.Tensor, calls: list[int] = calls, num_good: int = num_good) -> torch.Tensor:
            calls.append(0)
            return gradient * (math.inf if len(calls) > num_good else 1)

        next(p for p in method.model.parameters() if p.requires_grad).register_hook(poison)
        run(method, tiny_data(8), tmp_path / str(num_good), epochs=1)
        assert len(calls) == 2
        assert method.student.num_steps == num_good
        assert method.teacher is not None
        decay = method.teacher.decay
        for name, p in method.model.named_parameters():
            average = method.teacher.module.get_parameter(name)
            if num_good == 0:
                assert torch.equal(average, start[name]), name
            else:  # one average of the start and of the weights after the step that was taken
                assert torch.allclose(average, decay * start[name] + (1 - decay) * p, atol=1e-7), name
        moved = [name for name, p in method.model.named_parameters() if not torch.equal(p, start[name])]
        assert bool(moved) is (num_good > 0)

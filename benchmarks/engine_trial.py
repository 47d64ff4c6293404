"""Try the data engine with a simulated annotator on real pairs: `python benchmarks/engine_trial.py FOLDER`; resumable.

The annotator draws as `boxes.annotator.simulate_boxes`, and takes a proposal as it is where the whole lesion lies in
the big box, that is not far too large, and the core lies on the lesion; corrects it where most of it is right; else
rejects it and draws. What each costs is stated in seconds: two boxes at the 7 s that people were measured to take for a
box by four clicks (Papadopoulos et al. 2017, arXiv:1708.02750), five times less than the older way, so drawing is not
made dear; a look, and one box more, for a correction. The seconds of a look are an assumption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lesionsam.annotation.catalogue import Catalogue, Entry
from lesionsam.annotation.pictures import Pictures
from lesionsam.annotation.proposals import doubt
from lesionsam.annotation.records import ACCEPTED, AUTOMATIC, CORRECTED, DRAWN, OPEN, Box, Lesion, rounded
from lesionsam.annotation.review import Proposals, confirmed_log_areas, proposals_path, with_spot_checks
from lesionsam.annotation.store import Change, Store
from lesionsam.boxes.annotator import SIMULATED, annotator_rng, simulate_boxes
from lesionsam.config.load import Config, load_config, with_values
from lesionsam.data.index import id_hash
from lesionsam.engine.command import start_weights
from lesionsam.engine.history import Round, count_sources, read_rounds
from lesionsam.engine.report import CURVE, curve, write_report
from lesionsam.engine.round import SEED, EngineFolders, mask_paths, pairs_of, quality_on, run_round, set_threads
from lesionsam.errors import run_guarded
from lesionsam.metrics import bounding_box
from lesionsam.utils.files import write_bytes_atomic, write_json_atomic
from lesionsam.utils.images import read_mask

BUDGETS = (0.5, 1.0)  # of the engine's seconds at which drawing alone is measured, and all images after them
ROOT = Path(__file__).resolve().parents[1]
WHO = "simulated"
BOX_SECONDS, LOOK_SECONDS = 7.0, 2.0
DRAW, LOOK, CORRECT = 2 * BOX_SECONDS, LOOK_SECONDS, LOOK_SECONDS + BOX_SECONDS
INSIDE, ON_LESION = 0.99, 0.98  # shares of lesion in the big box and of core on the lesion that are taken
TOO_LARGE = 1.5  # side of a big box over the lesion's that is no longer taken
OF_PEOPLE = (DRAWN, CORRECTED, ACCEPTED)
NEAR = 0.5  # IoU of big boxes from which on a proposal is corrected rather than drawn anew


@dataclass(frozen=True)
class Annotator:
    """Simulated annotator with the true masks: draws boxes and reviews proposals.

    Attributes:
        masks: image id -> mask file.
    """

    masks: dict[str, Path]

    def boxes(self, image_id: str, size: tuple[int, int]) -> tuple[Box, Box] | None:
        """Return the boxes that the annotator draws; None if there is nothing to draw."""
        found = simulate_boxes(read_mask(self.masks[image_id], size), annotator_rng(SEED, image_id), **SIMULATED)
        return None if found is None else (rounded(found[0].tolist()), rounded(found[1].tolist()))

    def takes(self, image_id: str, size: tuple[int, int], big: Box, small: Box) -> bool:
        """Return whether the annotator accepts a proposal unchanged."""
        mask = read_mask(self.masks[image_id], size)
        lesion = bounding_box(mask)
        if lesion is None:
            return False
        within = _cut(mask, big).sum() / mask.sum()
        core = _cut(mask, small)
        sides = (np.array(big[2:]) - big[:2]) / (lesion[2:] - lesion[:2])
        return bool(within >= INSIDE and max(sides) <= TOO_LARGE and core.size and core.mean() >= ON_LESION)


def _cut(mask: np.ndarray, box: Box) -> np.ndarray:
    x0, y0, x1, y1 = (round(value) for value in box)
    return mask[y0:y1, x0:x1]


def overlap(first: Box, second: Box) -> float:
    """Return the IoU of two boxes."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    common = float(np.prod(np.maximum(high - low, 0)))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return common / (sum(areas) - common)


def draw_some(place: EngineFolders, annotator: Annotator, count: int) -> None:
    """Draw the first images by hash, without any proposal."""
    store, pictures = Store(place.table_path, place.catalogue), Pictures()
    entries = sorted(place.catalogue.by_id.values(), key=lambda entry: id_hash(entry.image_id))
    for entry in [entry for entry in entries if store.state(entry.image_id).status == OPEN][: max(0, count)]:
        _draw(store, annotator, entry, pictures.size(entry))


def review_some(place: EngineFolders, annotator: Annotator, last: Round, count: int) -> None:
    """Decide on the first images of the review queue."""
    store, pictures = Store(place.table_path, place.catalogue), Pictures()
    proposals = Proposals(proposals_path(place.table_path), last.model)
    usual = confirmed_log_areas(store, proposals)
    doubts = [
        (image_id, doubt(found.lesion, usual)[0])
        for image_id, found in proposals.found.items()
        if found.lesion is not None and store.state(image_id).status == OPEN
    ]
    for image_id, _ in with_spot_checks(doubts)[: max(0, count)]:
        entry, lesion = place.catalogue.by_id[image_id], proposals.found[image_id].lesion
        size = pictures.size(entry)
        wanted = annotator.boxes(image_id, size)
        if lesion is None or wanted is None:
            continue
        proposed = Lesion(
            "0", lesion.big, lesion.small, proposed=(lesion.big, lesion.small), model=last.model.partition("@")[0]
        )
        if annotator.takes(image_id, size, lesion.big, lesion.small):
            _save(store, entry, size, proposed, LOOK, last.model)
        elif overlap(lesion.big, wanted[0]) >= NEAR:
            _save(store, entry, size, proposed, LOOK, last.model)
            _save(store, entry, size, replace(proposed, big=wanted[0], small=wanted[1]), CORRECT - LOOK, last.model)
        else:
            _draw(store, annotator, entry, size, LOOK, last.model)


def _draw(
    store: Store, annotator: Annotator, entry: Entry, size: tuple[int, int], before: float = 0.0, shown: str = ""
) -> None:
    boxes = annotator.boxes(entry.image_id, size)
    if boxes is None:
        base = store.state(entry.image_id).revision
        store.save(
            entry.image_id,
            Change(base, WHO, f"{WHO}-{entry.key}-{base}", mark="no_lesion", seconds={"": before + LOOK}, shown=shown),
            size,
        )
        return
    _save(store, entry, size, Lesion("0", *boxes), before + DRAW, shown)


def _save(store: Store, entry: Entry, size: tuple[int, int], lesion: Lesion, seconds: float, shown: str) -> None:
    base = store.state(entry.image_id).revision
    store.save(
        entry.image_id,
        Change(base, WHO, f"{WHO}-{entry.key}-{base}", lesions=(lesion,), seconds={"0": seconds}, shown=shown),
        size,
    )


def trial(
    place: EngineFolders,
    annotator: Annotator,
    config: Config,
    *,
    first: int,
    each: int,
    rounds: int,
    auto_from: int,
    share: float,
    steps: int,
    say: Callable[[str], None] = print,
) -> list[Round]:
    """Draw `first` images, then alternate rounds and reviews of `each` images; resumes where it broke off.

    Args:
        auto_from: number of the first round that accepts automatically. steps: of every training, about, so that rounds
            differ in what they see and not in how long.
    """
    done = read_rounds(place.out)
    for number in range(len(done) + 1, rounds + 1):
        if number == 1:
            draw_some(place, annotator, first - sum(_num_labelled(place).values()))
        else:
            before, now = done[-1].sources, _num_labelled(place)
            review_some(place, annotator, done[-1], each - sum(now[name] - before[name] for name in OF_PEOPLE))
        done = [
            *done,
            run_round(
                place, config, auto=number >= auto_from, share=share, steps=steps, proposing=number < rounds, say=say
            ),
        ]
        say(f"round {number}: {done[-1]}")
    return done


def drawn_only(
    place: EngineFolders,
    annotator: Annotator,
    config: Config,
    budgets: Sequence[float],
    *,
    steps: int,
    say: Callable[[str], None] = print,
) -> list[Round]:
    """Run rounds without proposals, one per time budget, and return the seconds spent on drawing."""
    done = read_rounds(place.out)
    for seconds in list(budgets)[len(done) :]:
        draw_some(place, annotator, round(seconds / DRAW) - sum(_num_labelled(place).values()))
        done = [*done, run_round(place, config, steps=steps, proposing=False, say=say)]
        say(f"drawn for {seconds:.0f} s: {done[-1]}")
    return done


def audit(place: EngineFolders, annotator: Annotator) -> tuple[int, int]:
    """Return how many automatically accepted lesions the annotator would accept, and how many there are."""
    store, pictures = Store(place.table_path, place.catalogue), Pictures()
    taken = [
        annotator.takes(state.image_id, pictures.size(place.catalogue.by_id[state.image_id]), *lesion.boxes)
        for state in store.all_states()
        for lesion in state.lesions
        if lesion.source == AUTOMATIC
    ]
    return sum(taken), len(taken)


def _num_labelled(place: EngineFolders) -> dict[str, int]:
    """Count images with boxes by source."""
    return count_sources(Store(place.table_path, place.catalogue).all_states())


def run_trial(
    folder: Path,
    *,
    out: Path,
    params: Path,
    first: int,
    each: int,
    rounds: int,
    auto_from: int,
    share: float,
    steps: int,
    precision: str,
) -> None:
    """Run the engine with a simulated annotator on folder/images/train and its masks, measured on folder/images/val;
    and drawing alone, for the same seconds and for all images.
    """
    config = with_values(
        load_config(params, check_files=False), {"train.precision": precision, "runtime.num_threads": 1}
    )
    set_threads(config)
    catalogue = Catalogue([folder / "images" / "train"])
    masks = mask_paths(folder / "masks" / "train")
    annotator = Annotator(
        {image_id: masks[image_id.lower()] for image_id in catalogue.by_id if image_id.lower() in masks}
    )
    start, test = start_weights(config, None), (folder / "images" / "val", folder / "masks" / "val")
    if not (out / "start.json").exists():
        write_json_atomic(out / "start.json", quality_on(pairs_of(*test), start, config))
    places = {
        name: EngineFolders(catalogue, out / name / "boxes.csv", out / name, start, test)
        for name in ("engine", "drawn")
    }
    reviewed = trial(
        places["engine"],
        annotator,
        config,
        first=first,
        each=each,
        rounds=rounds,
        auto_from=auto_from,
        share=share,
        steps=steps,
    )
    write_report(out / "engine", reviewed)
    budgets = [*(reviewed[-1].seconds * part for part in BUDGETS), DRAW * len(catalogue)]
    drawn = drawn_only(places["drawn"], annotator, config, budgets, steps=steps)
    write_report(out / "drawn", drawn)
    before = (0.0, json.loads((out / "start.json").read_text(encoding="utf-8"))["objective"])
    lines = {
        name: [before, *((one.seconds, one.quality["objective"]) for one in ones)]
        for name, ones in {"reviewing proposals": reviewed, "drawing alone": drawn}.items()
    }
    write_bytes_atomic(out / CURVE, curve(lines, "mean IoU on the test pairs (ring, centre, box)"))
    taken, count = audit(places["engine"], annotator)
    print(f"accepted automatically: {count}, of which the annotator would take {taken}")
    for name, points in lines.items():
        print(f"{name}: " + ", ".join(f"{seconds / 60:.0f} min {value:.3f}" for seconds, value in points))


def main(
    folder: Annotated[Path, typer.Argument(help="holds images/{train,val} and masks/{train,val}")],
    out: Annotated[Path, typer.Option(help="folder of the results; what is finished there is not run again")] = Path(
        "engine-trial"
    ),
    params: Annotated[Path, typer.Option(help="parameter file of the training")] = ROOT / "params.yaml",
    first: Annotated[int, typer.Option(help="images drawn before the first round")] = 60,
    each: Annotated[int, typer.Option(help="images reviewed between two rounds")] = 100,
    rounds: Annotated[int, typer.Option(help="how many")] = 5,
    auto_from: Annotated[int, typer.Option(help="first round that may accept automatically")] = 4,
    share: Annotated[float, typer.Option(help="of automatic ones that people would accept unchanged, at least")] = 0.8,
    steps: Annotated[int, typer.Option(help="of every training, about: few labelled images get more epochs")] = 100,
    precision: Annotated[str, typer.Option(help="fp32 | bf16")] = "bf16",
) -> None:
    """Run rounds with a simulated annotator, and drawing alone for the same seconds; mIoU on the val pairs."""
    run_trial(
        folder,
        out=out,
        params=params,
        first=first,
        each=each,
        rounds=rounds,
        auto_from=auto_from,
        share=share,
        steps=steps,
        precision=precision,
    )


if __name__ == "__main__":
    run_guarded(lambda: typer.run(main))

"""The data engine: rounds, calibration, stages, what is refused, and the trial with a simulated annotator."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from scipy import stats

from engine_trial import DRAW, LOOK, Annotator, draw_some, overlap, review_some, run_trial
from helpers.annotating import draw_images
from lesionsam.annotation.catalogue import Catalogue
from lesionsam.annotation.proposals import Proposed
from lesionsam.annotation.records import Lesion
from lesionsam.annotation.review import ImageProposal, Proposals, proposals_path
from lesionsam.annotation.serve import default_table
from lesionsam.annotation.store import Change, Store
from lesionsam.config.load import Config, load_config, with_values
from lesionsam.engine import round as engine
from lesionsam.engine.command import run
from lesionsam.engine.history import (
    ReviewedProposal,
    Round,
    calibrate_threshold,
    lower_bound,
    reached_stage,
    read_rounds,
    reviewed_since,
)
from lesionsam.engine.report import summary_sentences
from lesionsam.engine.round import EngineFolders, epochs_of, pairs_of, run_round
from lesionsam.errors import UserError
from lesionsam.experiment.build import trained_prompts
from lesionsam.models.checkpoint import build_sam, read_weights, save_sam
from lesionsam.models.compact import CompactArchitecture
from lesionsam.prompts import TRAINED_WITH
from lesionsam.types import Sample

SIDE = 32
NAMES = [f"im{k:02d}" for k in range(46)]
SMALL = CompactArchitecture(
    image_size=SIDE, patch_size=8, width=16, depth=1, num_heads=2, prompt_width=16, decoder_mlp=16
)
BIG, CORE = (80.0, 60.0, 240.0, 180.0), (130.0, 100.0, 190.0, 140.0)


# ------------------------------------------------------------------------------------------------------ calibration


def reviews(*outcomes: bool) -> list[ReviewedProposal]:
    return [
        ReviewedProposal(f"{k:03d}", k / 100, "accepted" if each else "corrected") for k, each in enumerate(outcomes)
    ]


def test_the_bound_is_clopper_and_pearsons() -> None:
    """All of n: alpha^(1/n); else the share at which so many or more successes have the probability alpha."""
    assert lower_bound(30, 30) == pytest.approx(0.05 ** (1 / 30))
    assert stats.binom.sf(26, 30, lower_bound(27, 30)) == pytest.approx(0.05)
    assert lower_bound(0, 30) == 0


def test_the_threshold_stops_at_the_first_group_that_fails() -> None:
    good = reviews(*[True] * 50)
    assert calibrate_threshold(good, 0.9) == 0.49
    assert calibrate_threshold(good[:29], 0.9) is None  # too few to say anything
    assert calibrate_threshold(reviews(*[True] * 40, *[False] * 10, *[True] * 100), 0.9) == 0.39
    assert calibrate_threshold(reviews(*[False] * 10, *[True] * 400), 0.9) is None
    assert calibrate_threshold(list(reversed(good)), 0.9) == 0.49  # by doubt, in whatever order they come


def test_what_is_accepted_unseen_is_as_good_as_asked_for() -> None:
    """Proposals whose chance falls from 1 to .6 with doubt: of 200 draws, those that end below .85 are at most 5 %,
    three standard deviations of chance allowed."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        doubts = rng.uniform(0, 1, 150)
        kept = [
            ReviewedProposal("", float(x), "accepted" if rng.random() < 1 - 0.4 * x else "rejected") for x in doubts
        ]
        limit = calibrate_threshold(kept, 0.85)
        wrong += limit is not None and 1 - 0.2 * limit < 0.85  # mean chance below the limit
    assert wrong <= 200 * 0.05 + 3 * np.sqrt(200 * 0.05 * 0.95)


@pytest.mark.parametrize(
    ("share", "calm", "left", "expected"),
    [
        (None, 0, 100, "drawing"),
        (0.2, 0, 100, "assisted"),
        (0.5, 49, 100, "semi-automatic"),
        (0.9, 50, 100, "automatic"),
        (0.9, 0, 0, "semi-automatic"),
    ],
)
def test_stages(share: float | None, calm: int, left: int, expected: str) -> None:
    assert reached_stage(share, calm, left) == expected


# ------------------------------------------------------------------------------------------------------ rounds


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_sam(build_sam("compact", architecture=SMALL), path, name="compact")
    return path


@pytest.fixture
def config(root: Path, weights: Path) -> Config:
    return with_values(
        load_config(root / "params.yaml", check_files=False),
        {
            "model.checkpoint": str(weights),
            "train.epochs": 1,
            "train.batch_size": 8,
            "method.pos_samples": 8,
            "method.neg_samples": 8,
        },
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "images"
    draw_images(folder, NAMES)
    return folder


@pytest.fixture
def place(images: Path, tmp_path: Path, weights: Path) -> EngineFolders:
    return EngineFolders(Catalogue([images]), tmp_path / "boxes.csv", tmp_path / "engine", weights)


def draw(place: EngineFolders, names: list[str]) -> None:
    store = Store(place.table_path, place.catalogue)
    for name in names:
        store.save(
            name, Change(0, "ann", f"draw-{name}", lesions=(Lesion("0", BIG, CORE),), seconds={"0": 12.0}), (320, 240)
        )


def accept(place: EngineFolders, name: str, label: str, narrower: float = 0.0) -> None:
    """As the page does with one key; a big box made narrower by so many pixels is a correction."""
    store, proposals = Store(place.table_path, place.catalogue), Proposals(proposals_path(place.table_path), label)
    lesion = proposals.found[name].lesion
    assert lesion is not None
    big = lesion.big[0] + narrower, *lesion.big[1:]
    new = Lesion("0", big, lesion.small, proposed=(lesion.big, lesion.small), model=label.partition("@")[0])
    store.save(name, Change(0, "ann", f"accept-{name}", lesions=(new,), seconds={"0": 2.0}, shown=label), (320, 240))


def test_two_rounds_on_files(place: EngineFolders, config: Config) -> None:
    """Train, propose, review, accept automatically below the calibrated doubt; killed in between, it goes on."""
    draw(place, NAMES[:8])
    said: list[str] = []
    first = run_round(place, config, say=said.append)
    assert (first.number, first.stage, first.seconds, first.num_left) == (1, "drawing", 8 * 12.0, 38)
    assert (first.accepted_share, first.threshold, first.num_automatic) == (None, None, 0)
    assert first.sources == {"drawn": 8, "corrected": 0, "accepted": 0, "automatic": 0}
    assert "on 6 lesions" in said[0]  # two of the eight select the epoch
    proposals = Proposals(proposals_path(place.table_path), first.model)
    assert set(proposals.found) == set(NAMES[8:])
    assert {path.name for path in (place.out / "round-01").iterdir()} == {"model.safetensors", "model.key"}
    assert read_weights(place.out / "round-01" / "model.safetensors")[1][TRAINED_WITH] == trained_prompts(config)

    by_doubt = sorted(
        NAMES[8:], key=lambda name: engine.doubt(lesion, [])[0] if (lesion := proposals.found[name].lesion) else 9
    )
    calm, rest = by_doubt[:4], by_doubt[4:]
    accept(place, rest[0], first.model, narrower=1.0)
    for name in rest[1:]:
        accept(place, name, first.model)
    store = Store(place.table_path, place.catalogue)
    assert engine.summarise_reviews(place, store, first, 0.9).calm.keys() <= set(calm)
    said.clear()
    # 42 images have boxes, 36 of them train: one batch, two epochs for two steps. What is accepted makes two batches.
    config = with_values(config, {"train.batch_size": 36})
    second = run_round(place, config, auto=True, share=0.8, steps=2, say=said.append)
    assert sum(line.startswith("E") for line in said) == 1
    assert second.outcomes == {"accepted": 33, "corrected": 1, "rejected": 0}
    assert second.accepted_share == pytest.approx(33 / 34)
    assert second.threshold is not None
    assert second.num_automatic == 4 - second.num_left > 0
    assert second.stage == "automatic"
    assert second.seconds == 8 * 12 + 34 * 2  # the engine's own acceptance costs nobody anything
    with place.table_path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 46 - second.num_left
    automatic = [
        state
        for state in Store(place.table_path, place.catalogue).all_states()
        if state.lesions and state.lesions[0].source == "automatic"
    ]
    assert {state.image_id for state in automatic} <= set(calm)
    assert all(
        (each.lesions[0].model, each.changed_by) == (first.model.partition("@")[0], "engine") for each in automatic
    )
    assert summary_sentences(read_rounds(place.out))[0] == "Stage reached: automatic."

    trained = (place.out / "round-02" / "model.safetensors").stat().st_mtime_ns
    lines = (place.out / "rounds.jsonl").read_text().splitlines()
    (place.out / "rounds.jsonl").write_text(lines[0] + "\n")  # as if killed before the round was written
    said.clear()
    again = run_round(place, config, auto=True, share=0.8, steps=2, say=said.append)
    assert (place.out / "round-02" / "model.safetensors").stat().st_mtime_ns == trained
    assert (again.num_automatic, again.stage, again.threshold) == (second.num_automatic, second.stage, second.threshold)
    assert again.model == second.model


def test_what_became_of_a_proposal(place: EngineFolders) -> None:
    """Accepted, with one more lesion, corrected, drawn anew, no lesion; not what is unclear, open, older or was drawn
    without a proposal in sight."""
    lesion = Proposed(BIG, CORE, 0.9, 0.1, 0.9, 0.1, 0.5)
    proposals = Proposals(proposals_path(place.table_path), "m@0.5")
    for name in NAMES[:8]:
        proposals.add(ImageProposal(name, (0, 0), (320, 240), lesion))
    proposals.add(ImageProposal(NAMES[8], (0, 0), (320, 240), None))
    proposals.add(ImageProposal(NAMES[9], (0, 0), (320, 240), lesion))
    moved = (81.0, *BIG[1:])
    kept = Lesion("0", BIG, CORE, proposed=(BIG, CORE))
    made = {
        NAMES[0]: (kept,),
        NAMES[1]: (kept, Lesion("1", BIG, CORE)),
        NAMES[2]: (Lesion("0", moved, CORE, proposed=(BIG, CORE)),),
        NAMES[3]: (Lesion("0", moved, CORE),),
    }
    old = Store(place.table_path, place.catalogue, now=lambda: "2026-01-01T00:00:00.000Z")
    old.save(NAMES[4], Change(0, "ann", "old", lesions=(kept,), shown="m@0.5"), (320, 240))
    store = Store(place.table_path, place.catalogue, now=lambda: "2026-01-03T00:00:00.000Z")
    for name, lesions in made.items():
        store.save(name, Change(0, "ann", name, lesions=lesions, shown="m@0.5"), (320, 240))
    for name, mark in ((NAMES[5], "no_lesion"), (NAMES[6], "cannot_tell")):
        store.save(name, Change(0, "ann", name, mark=mark, shown="m@0.5"), (320, 240))
    store.save(NAMES[7], Change(0, "engine", NAMES[7], lesions=(kept,), automatic=True), (320, 240))
    store.save(NAMES[8], Change(0, "ann", NAMES[8], lesions=(Lesion("0", BIG, CORE),)), (320, 240))
    store.save(NAMES[9], Change(0, "ann", NAMES[9], lesions=(Lesion("0", moved, CORE),)), (320, 240))  # no model there
    store.save(NAMES[0], Change(1, "ann", "looked", lesions=made[NAMES[0]]), (320, 240))  # nor later; it was before
    found = reviewed_since(store.all_states(), proposals, [], "2026-01-02T00:00:00.000Z")
    assert {each.image_id: each.outcome for each in found} == {
        NAMES[0]: "accepted",
        NAMES[1]: "corrected",
        NAMES[2]: "corrected",
        NAMES[3]: "rejected",
        NAMES[5]: "rejected",
    }


def test_only_what_was_seen_is_an_answer(place: EngineFolders) -> None:
    """Accepted from another model's proposal, or edited in the table: neither says anything of these proposals."""
    lesion = Proposed((80.004, 60, 240, 180), CORE, 0.9, 0.1, 0.9, 0.1, 0.5)
    proposals = Proposals(proposals_path(place.table_path), "m@0.5")
    for name in NAMES[:3]:
        proposals.add(ImageProposal(name, (0, 0), (320, 240), lesion))
    store = Store(place.table_path, place.catalogue)
    other = (70.0, 50.0, 250.0, 190.0)
    for name, big in ((NAMES[0], BIG), (NAMES[1], other)):
        store.save(
            name,
            Change(0, "ann", name, lesions=(Lesion("0", big, CORE, proposed=(big, CORE)),), shown="m@0.5"),
            (320, 240),
        )
    with place.table_path.open("a") as file:
        file.write(f"{NAMES[2]},0,320,240,50,50,200,180,90,90,150,140\n")
    store.refresh()
    found = reviewed_since(store.all_states(), proposals, [], "2026-01-01T00:00:00.000Z")
    assert {each.image_id: each.outcome for each in found} == {NAMES[0]: "accepted"}  # rounded as the table holds it


def test_steps_make_epochs() -> None:
    """20 steps with batches of 8: 8 samples are one batch, 9 and 16 are two, 400 are more than there are steps."""
    sample = Sample("a", "0", "train", Path(), None, 1, 1, np.zeros(4), np.zeros(4))
    dev = replace(sample, split="dev")
    assert [epochs_of([sample] * count + [dev] * 5, 20, 8) for count in (8, 9, 16, 400)] == [20, 10, 10, 1]


def test_what_a_round_refuses(place: EngineFolders, images: Path, config: Config, tmp_path: Path) -> None:
    draw(place, NAMES[:7])
    with pytest.raises(UserError, match="7 images with boxes; a round needs at least 8"):
        run_round(place, config)
    with pytest.raises(UserError, match=r"--share: expected a share of at least 0\.5"):
        run_round(place, config, share=1.0)
    with place.table_path.open("a") as file:
        file.write(f"{NAMES[7]},0,1320,1240,550,50,1200,180,590,90,1150,140\n")
    with pytest.raises(UserError, match=rf"'{NAMES[7]}', lesion 0: lies outside the image of 320x240 px"):
        run_round(place, config)
    (tmp_path / "masks").mkdir()
    with pytest.raises(UserError, match=r"im00\.png: no mask of its name"):
        pairs_of(images, tmp_path / "masks")
    for name in NAMES:
        Image.new("L", (320, 240)).save(tmp_path / "masks" / f"{name}.png")
    with pytest.raises(UserError, match=r"im00\.png: no lesion of at least 16 pixels"):
        pairs_of(images, tmp_path / "masks")
    place.out.mkdir()
    (place.out / "rounds.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(UserError, match=r"rounds\.jsonl: not a list of rounds"):
        run_round(place, config)
    assert not list(place.out.glob("round-*"))


def test_an_image_that_cannot_be_read_is_said_and_left(
    images: Path, weights: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for name in NAMES[:2]:
        shutil.copy(images / f"{name}.png", tmp_path / "images")
    (tmp_path / "images" / "bad.png").write_bytes(b"<html>")
    place = EngineFolders(Catalogue([tmp_path / "images"]), tmp_path / "boxes.csv", tmp_path / "engine", weights)
    said: list[str] = []
    found = run_round(place, config, training=False, say=said.append)
    assert said == ["1 images could not be read; each is named above"]
    assert "bad.png" in capsys.readouterr().err
    assert found.num_left == 3
    assert set(Proposals(proposals_path(place.table_path), found.model).found) == set(NAMES[:2])


def test_the_command_says_what_comes_next(
    place: EngineFolders, images: Path, weights: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(place, NAMES[:8])
    some = [str(images / f"{name}.png") for name in NAMES[:10]]
    run(
        some,
        boxes=place.table_path,
        out=tmp_path / "out",
        params=root / "params.yaml",
        start=str(weights),
        training=False,
        auto=False,
        share=0.9,
        test=None,
    )
    said = capsys.readouterr().out
    assert "2 images are left to do." in said
    assert f"--boxes {place.table_path} --model {weights}" in said
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| 1 | drawing | 8 | 0 | 0 | 0 | 2 | 1.6 |" in report
    with Image.open(tmp_path / "out" / "curve.png") as picture:
        assert picture.size == (960, 600)


def test_what_a_round_means_in_sentences() -> None:
    first = Round(1, "", "m@0.5", 50, {}, 60.0, {}, None, None, 0, 40, "drawing")
    judged = replace(first, number=2, accepted_share=0.75, outcomes={"accepted": 30, "corrected": 10, "rejected": 0})
    assert summary_sentences([]) == []
    assert summary_sentences([first]) == ["40 images are left to do."]
    assert summary_sentences([first, replace(first, number=2)])[0].startswith(
        "No proposal of the round before has been reviewed"
    )
    calm = replace(judged, threshold=0.3, stage="semi-automatic")
    assert summary_sentences([first, calm])[:2] == [
        "Stage reached: semi-automatic.",
        "75 % of 40 reviewed proposals were accepted unchanged.",
    ]
    assert "could have been accepted unseen; a round with --auto" in summary_sentences([first, calm])[2]
    assert summary_sentences([first, replace(calm, auto=True)])[2] == (
        "None of the others had a doubt up to 0.30, so none was accepted unseen."
    )
    assert summary_sentences([first, calm, replace(calm, number=3, num_automatic=7)])[1] == (
        "7 more of a doubt up to 0.30 were accepted unseen."
    )  # no stage is new
    assert summary_sentences([first, judged])[1].startswith("Too few calm ones were reviewed")


def test_the_table_of_the_page_is_what_dvc_watches(root: Path, tmp_path: Path) -> None:
    """`lesionsam annotate own/images` writes the file whose change makes `dvc repro` train again."""
    (tmp_path / "own" / "images").mkdir(parents=True)
    table = default_table(tmp_path / "own" / "images").relative_to(tmp_path.resolve())
    preset = YAML(typ="safe").load((root / "src/lesionsam/config/presets/folder-csv.yaml").read_text(encoding="utf-8"))
    assert preset["params"]["inputs"]["boxes"] == "own/boxes.csv" == table.as_posix()
    stages = YAML(typ="safe").load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert "${inputs.boxes}" in stages["boxes"]["deps"]
    assert set(stages["boxes"]["outs"]) <= set(stages["train"]["deps"])


# ------------------------------------------------------------------------------------------------------ the trial


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """32 and 4 drawn pairs."""
    for split, names in (("train", NAMES[:32]), ("val", ["v0", "v1", "v2", "v3"])):
        draw_images(tmp_path / "pairs" / "images" / split, names)
        (tmp_path / "pairs" / "masks" / split).mkdir(parents=True)
        for k, name in enumerate(names):
            x, y = np.meshgrid(np.arange(320), np.arange(240))
            inside = ((x / 320 - 0.5 - 0.02 * (k % 5)) / 0.2) ** 2 + ((y / 240 - 0.5) / 0.22) ** 2 < 1
            Image.fromarray(inside.astype(np.uint8) * 255).save(
                tmp_path / "pairs" / "masks" / split / f"{name}_segmentation.png"
            )
    return tmp_path / "pairs"


def test_boxes_are_simulated_as_in_the_chain(root: Path) -> None:
    """Figures of the engine can be laid beside those of the evidence: the same boxes on the same images."""
    boxes = YAML(typ="safe").load((root / "params.yaml").read_text(encoding="utf-8"))["boxes"]
    assert boxes["seed"] == engine.SEED
    chain = {
        "margin": (boxes["margin_low"], boxes["margin_high"]),
        "core": (boxes["core_low"], boxes["core_high"]),
        "jitter": boxes["jitter"],
        "min_area": boxes["min_area"],
    }
    assert chain == engine.SIMULATED


def test_what_the_simulated_annotator_takes(pairs: Path) -> None:
    """The ellipse of im00 spans 96..224 by 67..173 pixels."""
    annotator = Annotator(engine.mask_paths(pairs / "masks" / "train"))
    size, core = (320, 240), (140.0, 100.0, 180.0, 140.0)
    assert annotator.takes("im00", size, (90, 60, 230, 180), core)
    assert not annotator.takes("im00", size, (110, 60, 230, 180), core)  # cuts the lesion
    assert not annotator.takes("im00", size, (10, 60, 230, 180), core)  # far too large
    assert not annotator.takes("im00", size, (90, 60, 230, 180), (90, 100, 180, 140))  # core beside the lesion
    drawn = annotator.boxes("im00", size)
    assert drawn is not None
    assert annotator.takes("im00", size, *drawn)
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0


def test_seconds_are_those_stated(pairs: Path, weights: Path, config: Config, tmp_path: Path) -> None:
    annotator = Annotator(engine.mask_paths(pairs / "masks" / "train"))
    place = EngineFolders(
        Catalogue([pairs / "images" / "train"]), tmp_path / "t" / "boxes.csv", tmp_path / "t", weights
    )
    draw_some(place, annotator, 3)
    last = run_round(place, config, training=False)
    assert last.seconds == 3 * DRAW
    review_some(place, annotator, last, 6)
    states = [state for state in Store(place.table_path, place.catalogue).all_states() if state.lesions]
    assert len(states) == 9
    cost = {"drawn": (DRAW, LOOK + DRAW), "accepted": (LOOK,), "corrected": (LOOK + DRAW / 2,)}
    assert all(state.all_seconds in cost[state.lesions[0].source] for state in states)


def test_the_trial_resumes_and_shows_both_ways(
    pairs: Path, root: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = tmp_path / "params.yaml"
    params.write_text((root / "params.yaml").read_text().replace("foundation/compact.safetensors", str(weights)))
    out = tmp_path / "out"

    def go() -> dict[str, list[dict]]:
        run_trial(
            pairs, out=out, params=params, first=16, each=6, rounds=2, auto_from=2, share=0.8, steps=1, precision="fp32"
        )
        return {name: [vars(each) | {"at": ""} for each in read_rounds(out / name)] for name in ("engine", "drawn")}

    found = go()
    engine_rounds, drawn_rounds = found["engine"], found["drawn"]
    assert [each["num_left"] for each in engine_rounds] == [16, 10 - engine_rounds[1]["num_automatic"]]
    assert sum(engine_rounds[1]["outcomes"].values()) == 6
    assert set(engine_rounds[1]["quality"]) == {"ring", "centre", "box", "objective"}
    seconds = engine_rounds[-1]["seconds"]
    assert [each["seconds"] for each in drawn_rounds] == [
        round(seconds / 2 / DRAW) * DRAW,
        round(seconds / DRAW) * DRAW,
        32 * DRAW,
    ]
    assert "drawing alone: 0 min" in capsys.readouterr().out
    assert (out / "curve.png").stat().st_size > 1000
    for name in found:
        path = out / name / "rounds.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert go() == found  # as if killed before the last rounds were written

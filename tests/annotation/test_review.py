"""Proposals, their order of doubt, and decisions on them."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.annotating import SIZE, Served, draw_images, sent, serving
from lesionsam.annotation.catalogue import Catalogue
from lesionsam.annotation.model import DETAIL, Model
from lesionsam.annotation.pictures import Cache, Pictures
from lesionsam.annotation.proposals import Proposed, boxes_of_mask, doubt, found_lesion, oddness, propose
from lesionsam.annotation.records import Lesion
from lesionsam.annotation.review import ImageProposal, Review, confirmed_log_areas, with_spot_checks
from lesionsam.annotation.store import Change, Store
from lesionsam.data.frames import PRIOR_SIDE
from lesionsam.inference.predictor import Predictor
from lesionsam.models.checkpoint import build_sam, save_sam
from lesionsam.models.compact import CompactArchitecture
from lesionsam.models.transforms import upscale

NAMES = ("one", "two", "three", "a b/'".replace("/", "∕"))
TINY = CompactArchitecture(image_size=64, patch_size=8, width=32, depth=2, num_heads=2, prompt_width=32, decoder_mlp=64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_sam(build_sam("compact", architecture=TINY), path, name="compact")
    return path


@pytest.fixture
def served(tmp_path: Path, weights: Path) -> Iterator[Served]:
    draw_images(tmp_path / "images", NAMES)
    with serving(tmp_path, weights=weights) as found:
        yield found


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never true"
        time.sleep(0.02)


def drawn_lesion(size: tuple[int, int] = (128, 96)) -> tuple[np.ndarray, np.ndarray]:
    """A dark ellipse on skin, (h, w, 3) uint8, and its mask."""
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    mask = ((x - 70) / 24) ** 2 + ((y - 44) / 17) ** 2 < 1
    noise = np.random.default_rng(0).normal(0, 4, (*mask.shape, 1))
    return np.clip(np.where(mask[..., None], (115, 70, 60), (205, 165, 145)) + noise, 0, 255).astype(np.uint8), mask


def test_a_proposal_lies_on_the_lesion(tmp_path: Path, root: Path) -> None:
    picture, mask = drawn_lesion((640, 480))
    (tmp_path / "images").mkdir()
    x, y = np.meshgrid(np.arange(640) + 0.5, np.arange(480) + 0.5)
    mask = ((x - 350) / 120) ** 2 + ((y - 220) / 85) ** 2 < 1
    Image.fromarray(np.where(mask[..., None], (115, 70, 60), (205, 165, 145)).astype(np.uint8)).save(
        tmp_path / "images" / "a.png"
    )
    pictures = Pictures()
    model = Model(root / "foundation" / "compact.safetensors", pictures)
    (entry,) = Catalogue([tmp_path / "images"]).entries
    found = propose(model, model.features(entry), pictures.small(entry, PRIOR_SIDE), (640, 480))
    assert found is not None
    (x0, y0, x1, y1), (u0, v0, u1, v1) = found.big, found.small
    assert mask[round(v0) : round(v1), round(u0) : round(u1)].mean() > 0.9
    assert mask[round(y0) : round(y1), round(x0) : round(x1)].sum() > 0.8 * mask.sum()
    assert picture.shape == (480, 640, 3)


def test_a_model_proposes_what_it_finds_without_a_prompt(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    Image.fromarray(pixels).resize((480, 480)).save(tmp_path / "images" / "a.png")
    (entry,) = Catalogue([tmp_path / "images"]).entries
    pictures = Pictures()
    model = Model(weights, pictures)
    features, small = model.features(entry), pictures.small(entry, DETAIL * model.side)
    found = found_lesion(model, features, pictures.small(entry, PRIOR_SIDE))
    assert found is not None
    assert (found[0] == (model.lesion(features) > 0)).all()
    (one,) = Predictor(weights).predict(small, auto=True)
    auto = upscale(torch.from_numpy(model.lesion(features)), features.size, one.mask.shape, model.frame).numpy() > 0
    assert np.count_nonzero(auto != one.mask) <= 4


def test_boxes_of_a_mask_are_an_annotators() -> None:
    _, mask = drawn_lesion()
    found = boxes_of_mask(mask, (256, 192))  # the mask on half of the image's grid
    assert found is not None
    (x0, y0, x1, y1), (u0, v0, u1, v1) = (np.array(box) / 2 for box in found)
    assert (x1 - x0, y1 - y0) == pytest.approx((48 * 1.25, 34 * 1.25), abs=1)  # 25 % too large
    assert mask[round(v0) : round(v1), round(u0) : round(u1)].all()
    assert boxes_of_mask(np.zeros((9, 9), bool), (9, 9)) is None


def proposed(**changes: float) -> Proposed:
    values: dict = {
        "big": (0, 0, 4, 4),
        "small": (1, 1, 2, 2),
        "predicted_iou": 0.95,
        "entropy": 0.02,
        "agreement": 0.95,
        "area": 0.1,
        "score": 0.8,
    }
    return Proposed(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"entropy": 0.35}, "the mask is uncertain"),
        ({"agreement": 0.3}, "model and colours disagree"),
        ({"predicted_iou": 0.2}, "the model expects a poor mask"),
        ({"area": 0.9}, "an unusual size"),
        ({"score": 0.1}, "little stands out from the skin"),
    ],
)
def test_every_sign_of_doubt_counts_and_is_said(changes: dict[str, float], why: str) -> None:
    usual = [np.log(0.1) + 0.01 * k for k in range(-10, 10)]
    calm, reasons = doubt(proposed(), usual)
    assert (calm < 0.12, reasons) == (True, [])
    more, reasons = doubt(proposed(**changes), usual)
    assert more > calm + 0.04
    assert reasons == [why]
    assert 0 <= more <= 1


def test_the_queue_falls_in_doubt_with_spot_checks_from_everywhere() -> None:
    doubts = [(f"{k:04d}", k / 400) for k in range(400)]
    order = with_spot_checks(doubts)
    assert sorted(order) == doubts
    checks, rest = order[3:200:4], [pair for k, pair in enumerate(order[:200]) if k % 4 != 3]
    assert [value for _, value in rest] == sorted((value for _, value in rest), reverse=True)
    assert min(rest)[1] > 0.55  # the first 200 by doubt alone would say nothing of the calm ones
    assert np.mean([value < 0.5 for _, value in checks]) > 0.4
    assert with_spot_checks([]) == []
    for done in range(7):  # whoever takes the first each time gets the same order, spot checks and all
        assert with_spot_checks(order[done:], done) == order[done:]


def test_a_size_is_odd_only_once_sizes_are_known() -> None:
    assert oddness(0.9, [np.log(0.1)] * 9) == 0
    assert oddness(0.9, [np.log(0.1)] * 10) == 1
    assert oddness(0.1, [np.log(0.1)] * 10) == 0


def test_sizes_that_nobody_saw_are_not_the_usual_ones(tmp_path: Path, weights: Path) -> None:
    """Automatic lesions do not count; and what is usual is read once as long as nothing changes."""
    draw_images(tmp_path / "images", NAMES[:2])
    catalogue, pictures = Catalogue([tmp_path / "images"]), Pictures()
    store = Store(tmp_path / "boxes.csv", catalogue)
    big, small = (80.0, 60.0, 240.0, 180.0), (130.0, 100.0, 190.0, 140.0)
    lesion = Lesion("0", big, small, proposed=(big, small))
    review = Review(catalogue, store, pictures, Model(weights, pictures))
    for name in NAMES[:2]:
        review.proposals.add(ImageProposal(name, (0, 0), SIZE, proposed()))
    store.save("one", Change(0, "engine", "a", lesions=(lesion,), automatic=True), SIZE)
    assert confirmed_log_areas(store, review.proposals) == []
    store.save("two", Change(0, "ann", "b", lesions=(lesion,)), SIZE)
    usual = review.usual()
    assert usual == pytest.approx([np.log(np.pi / 4 / 1.25**2 * 160 * 120 / (SIZE[0] * SIZE[1]))])
    assert review.usual() is usual
    store.save("two", Change(1, "ann", "c", mark="no_lesion"), SIZE)
    assert review.usual() == []


def test_a_model_that_nobody_looks_through_is_let_go(tmp_path: Path, weights: Path) -> None:
    """A round's model must not stay for the next ones: only what encodes ahead keeps it."""
    draw_images(tmp_path / "images", NAMES[:1])
    model = Model(weights, Pictures())
    (entry,) = Catalogue([tmp_path / "images"]).entries
    model.features(entry)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_queue_and_what_is_said_of_it(served: Served, tmp_path: Path) -> None:
    """Accepted, corrected, rejected, unclear: each leaves the queue with its own provenance."""
    client = served.client
    until(lambda: client.get("/api/queue").json()["left"] == 0)
    images = client.get("/api/queue").json()["images"]
    assert sorted(key for key, _ in images) == sorted(served.key(name) for name in NAMES)
    assert [value for _, value in images][:3] == sorted((value for _, value in images[:3]), reverse=True)
    assert client.get("/api/changes?clock=0").json()["proposed"] == 4

    proposals = {name: client.get(f"/api/images/{served.key(name)}").json()["proposal"] for name in NAMES}
    (lesion,) = proposals["one"]["lesions"]
    boxes = [lesion["big"], lesion["small"]]
    moved = [lesion["big"][0] + 2, *lesion["big"][1:]]
    accepted = served.save("one", 0, "a", [sent("0", *boxes, proposed=boxes)], shown=True).json()["state"]["lesions"][0]
    (lesion,) = proposals["two"]["lesions"]
    moved = [max(0, lesion["big"][0] - 2), *lesion["big"][1:]]
    corrected = served.save(
        "two", 0, "b", [sent("0", moved, lesion["small"], proposed=[lesion["big"], lesion["small"]])], shown=True
    ).json()["state"]["lesions"][0]
    assert (accepted["source"], corrected["source"]) == ("accepted", "corrected")
    made_up = served.save("three", 0, "c", [sent(proposed=[sent()["big"], sent()["small"]])])
    assert made_up.json()["state"]["lesions"][0]["source"] == "drawn"  # nobody proposed that
    assert served.save(NAMES[3], 0, "d", mark="rejected").json()["state"]["status"] == "rejected"
    assert client.get("/api/queue").json() == {"images": [], "left": 0}
    lines = [json.loads(line) for line in (tmp_path / "boxes.journal.jsonl").read_text().splitlines()]
    assert served.desk.model is not None
    assert [line["shown"] for line in lines] == [served.desk.model.label] * 2 + [""] * 2  # as the page said of each
    first = next(line for line in lines if line["image_id"] == "one")["lesions"][0]
    assert (first["model"], first["threshold"]) == (served.desk.model.digest if served.desk.model else "", 0.5)


def test_what_nobody_has_seen_is_shown_as_that(served: Served) -> None:
    """An automatic lesion is no finished one until somebody agrees or corrects it."""
    lesion = Lesion("0", (80, 60, 240, 180), (130, 100, 190, 140), proposed=((80, 60, 240, 180), (130, 100, 190, 140)))
    served.desk.store.save("one", Change(0, "engine", "a", lesions=(lesion,), automatic=True), SIZE)

    def status() -> str:
        images = served.client.get("/api/session").json()["images"]
        (shown,) = {each[2] for each in images if each[0] == served.key("one")}
        return shown

    assert status() == "unseen"
    state = served.save("one", 1, "b", [sent(agreed=True)]).json()["state"]
    assert (state["status"], state["lesions"][0]["source"], status()) == ("done", "accepted", "done")


def test_proposals_are_kept_and_a_changed_image_gets_a_new_one(tmp_path: Path, weights: Path) -> None:
    draw_images(tmp_path / "images", NAMES[:2])

    def settled(served: Served) -> dict[str, Any]:
        until(lambda: served.client.get("/api/queue").json()["left"] == 0)
        return {name: served.client.get(f"/api/images/{served.key(name)}").json()["proposal"] for name in NAMES[:2]}

    with serving(tmp_path, weights=weights) as served:
        first = settled(served)
    kept = (tmp_path / "boxes.proposals.jsonl").read_text()
    with (tmp_path / "boxes.proposals.jsonl").open("a") as file:
        file.write('{"image_id": "two", "model": "cut sho')
    draw_images(tmp_path / "images", ["two"], (200, 150))
    with serving(tmp_path, weights=weights) as served:
        until(lambda: settled(served)["two"] not in (first["two"], None))
        again = settled(served)
    assert again["one"] == first["one"]
    assert max(again["two"]["lesions"][0]["big"]) <= 200
    lines = (tmp_path / "boxes.proposals.jsonl").read_text().splitlines()
    assert "\n".join(lines[:2]) + "\n" == kept
    assert [json.loads(line)["image_id"] for line in lines[3:]] == ["two"]


def test_a_value_is_made_once_however_many_ask() -> None:
    cache, made = Cache(1000), []

    def make() -> tuple[int, int]:
        made.append(1)
        time.sleep(0.05)
        return len(made), 600

    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(cache.get("a", make))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, len(made)) == ([1] * 5, 1)
    cache.get("b", make)
    assert cache.peek("a") is None  # thrown out above the limit
    with pytest.raises(ZeroDivisionError):
        cache.get("c", lambda: (1 // 0, 1))
    assert cache.get("c", lambda: (7, 1)) == 7  # a failure is not kept


def test_a_model_is_asked_only_by_those_who_have_one(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", NAMES[:1])
    with serving(tmp_path) as served:
        assert served.client.get("/api/queue").json() == {"images": [], "left": 0}
        assert isinstance(served.client, httpx.Client)
        assert served.client.get(f"/api/images/{served.key('one')}").json()["proposal"] is None

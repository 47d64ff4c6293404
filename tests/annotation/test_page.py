"""The annotation page in a real Chromium: drawn by mouse, keys and fingers, the table holds what was drawn."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.annotating import Served, command, draw_images, serving
from helpers.browser import Browser, Page, find_chromium, open_browser
from helpers.tiny import ARCHITECTURE
from lesionsam.annotation.bundle import BUNDLE, WEB, banner, compile_page, sources_digest
from lesionsam.annotation.records import Lesion
from lesionsam.annotation.serve import add_model
from lesionsam.annotation.store import Change, journal_path
from lesionsam.models.checkpoint import build_sam, save_sam

ROOT = Path(__file__).resolve().parents[2]
NASTY = '<img src=x onerror="document.title=String(1)">'
NUM_REAL = 20


def test_the_shipped_page_is_made_from_its_sources() -> None:
    first, _, rest = (WEB / BUNDLE).read_text(encoding="utf-8").partition("\n")
    assert first == banner(sources_digest()), "the TypeScript has changed: run `make web` and commit the bundle"
    assert "fetch(" in rest
    assert "eval(" not in rest


def test_the_bundle_is_what_the_compiler_makes() -> None:
    tools = Path(os.environ.get("LESIONSAM_WEB_TOOLS", ROOT / ".cache" / "web"))
    if not (tools / "node_modules").is_dir() or shutil.which("node") is None:
        pytest.skip("needs typescript and esbuild, which `make web` fetches into .cache/web")
    assert compile_page(tools) == (WEB / BUNDLE).read_bytes()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    with open_browser(binary, tmp_path_factory.mktemp("chromium")) as found:
        yield found


class Hand:
    """Somebody at the page: image coordinates in, mouse and keys out."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def open(self, url: str, image_id: str = "") -> Hand:
        self.page.goto(url)
        self.at(image_id)
        return self

    def at(self, image_id: str) -> None:
        """Wait until an image is open and drawn."""
        self.page.wait(
            "document.getElementById('canvas').dataset.view"
            + (f" && document.getElementById('canvas').dataset.image === {json.dumps(image_id)}" if image_id else "")
        )
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def places(self, *points: Sequence[float]) -> list[tuple[float, float]]:
        """Points of the image as points of the window."""
        canvas = "document.getElementById('canvas')"
        scale, x, y = map(float, self.page.evaluate(f"{canvas}.dataset.view").split(","))
        left, top = json.loads(
            self.page.evaluate(f"(r => JSON.stringify([r.left, r.top]))({canvas}.getBoundingClientRect())")
        )
        return [(left + x + u * scale, top + y + v * scale) for u, v in points]

    def drag(self, box: Sequence[float], modifiers: int = 0) -> None:
        start, end = self.places(box[:2], box[2:])
        self.page.drag(start, end, modifiers=modifiers)

    def saved(self) -> None:
        """Wait until the page says that everything is saved."""
        self.page.wait("document.getElementById('saved').dataset.kind === 'saved'")

    def two_drags(self, big: Sequence[float], small: Sequence[float]) -> None:
        self.drag(big)
        self.page.wait("document.getElementById('hint').dataset.step === '2'")
        self.drag(small)
        self.page.wait("document.getElementById('hint').dataset.step === '0'")

    def text(self, name: str) -> str:
        return self.page.evaluate(f"document.getElementById({name!r}).textContent")


def rows(folder: Path) -> dict[tuple[str, str], list[float]]:
    """(image_id, lesion_id) -> the eight numbers."""
    if not (folder / "boxes.csv").exists():
        return {}
    with (folder / "boxes.csv").open(newline="") as file:
        return {
            (row["image_id"], row["lesion_id"]): [float(row[name]) for name in list(row)[-8:]]
            for row in csv.DictReader(file)
        }


def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never true"
        time.sleep(0.02)


def suggestion(served: Served, image_id: str, big: Sequence[float]) -> list[float]:
    """The core that the server suggests for a big box."""
    return served.client.post(f"/api/images/{served.key(image_id)}/preview", json={"big": list(big)}).json()["small"]


def test_twenty_images_by_mouse_and_by_keys(browser: Browser, tmp_path: Path, root: Path) -> None:
    """Ten by two drags each, ten by keys alone; expectations are computed from the gestures, not read from the page."""
    real = root.parent / "shared" / "data" / "isic" / "images" / "val"
    (tmp_path / "images").mkdir()
    if real.is_dir():
        for path in sorted(real.iterdir())[:NUM_REAL]:
            shutil.copy(path, tmp_path / "images")
    else:
        draw_images(tmp_path / "images", [f"im{k:02d}" for k in range(NUM_REAL)])
    rng = np.random.default_rng(0)
    expected: dict[tuple[str, str], list[float]] = {}
    with serving(tmp_path) as served:
        entries = served.desk.catalogue.entries
        hand = Hand(browser.new_page()).open(served.url, entries[0].image_id)
        for k, entry in enumerate(entries):
            hand.at(entry.image_id)
            width, height = served.desk.pictures.size(entry)
            if k % 2 == 0:
                low = rng.uniform(0.1, 0.3, 2) * (width, height)
                high = rng.uniform(0.7, 0.9, 2) * (width, height)
                core = [
                    *(low + (high - low) * rng.uniform(0.2, 0.4, 2)),
                    *(low + (high - low) * rng.uniform(0.6, 0.8, 2)),
                ]
                hand.two_drags([*low, *high], core)
                expected[entry.image_id, "0"] = [*low, *high, *core]
            else:
                hand.page.key("b")
                big = [width / 4, height / 4, width * 3 / 4, height * 3 / 4]
                small = suggestion(served, entry.image_id, big)
                until(lambda key=(entry.image_id, "0"), values=(*big, *small): rows(tmp_path).get(key) == list(values))
                hand.page.key("Tab")  # from the big box to the core
                hand.page.key("Shift+ArrowLeft")
                hand.page.key("ArrowDown", repeat=3)
                hand.page.key("Shift+Tab")
                hand.page.key("Ctrl+ArrowRight", repeat=2)
                hand.page.key("ArrowUp")
                dx = max(-10, big[0] - small[0])
                dy = min(3, big[3] - small[3])
                moved = [small[0] + dx, small[1] + dy, small[2] + dx, small[3] + dy]
                expected[entry.image_id, "0"] = [
                    big[0],
                    big[1] - 1,
                    big[2] + 2,
                    big[3] - 1,
                    moved[0],
                    moved[1] - 1,
                    moved[2],
                    moved[3] - 1,
                ]
            hand.page.key("Enter")
        hand.saved()
        found = rows(tmp_path)
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            assert found[key] == pytest.approx(values, abs=0.021), key
        assert hand.text("progress") == f"{NUM_REAL} of {NUM_REAL} done"
        journal = [json.loads(line) for line in journal_path(tmp_path / "boxes.csv").read_text().splitlines()]
        last = {entry["image_id"]: entry for entry in journal}
        assert all(entry["lesions"][0]["seconds"] > 0 and entry["changed_by"] == "ann" for entry in last.values())
        assert hand.page.errors == []


def test_changing_what_was_drawn(browser: Browser, tmp_path: Path) -> None:
    """Edges, corners, moving, nudging, undo and redo, a second lesion, deleting, escape, zoom and pan."""
    draw_images(tmp_path / "images", ["one"])

    def held(lesion: str = "0") -> list[float]:
        hand.saved()
        return rows(tmp_path).get(("one", lesion), [])

    with serving(tmp_path) as served:
        hand = Hand(browser.new_page()).open(served.url, "one")
        page = hand.page
        hand.two_drags([80, 60, 240, 180], [120, 90, 200, 150])
        assert held() == pytest.approx([80, 60, 240, 180, 120, 90, 200, 150], abs=0.02)
        hand.drag([240, 120, 260, 125])  # the right edge of the big box
        assert held() == pytest.approx([80, 60, 260, 180, 120, 90, 200, 150], abs=0.02)
        hand.drag([260, 180, 180, 140])  # its corner, so far that the core must give way
        assert held() == pytest.approx([80, 60, 180, 140, 100, 80, 180, 140], abs=0.02)
        page.key("Ctrl+z")
        page.key("Ctrl+z")
        assert held() == pytest.approx([80, 60, 240, 180, 120, 90, 200, 150], abs=0.02)
        page.key("Ctrl+Shift+z")
        assert held()[2] == pytest.approx(260, abs=0.02)
        hand.drag([160, 120, 400, 120])  # the core, which stops at the big box's edge
        assert held()[4:] == pytest.approx([180, 90, 260, 150], abs=0.02)
        hand.drag([100, 70, 90, 50])  # the whole lesion, by the big box's inside
        assert held() == pytest.approx([70, 40, 250, 160, 170, 70, 250, 130], abs=0.02)
        start, end = hand.places([160, 100], [200, 140])
        page.mouse("mousePressed", *start)
        page.mouse("mouseMoved", *end)
        page.key("Escape")  # the drag never happened
        page.mouse("mouseReleased", *end)
        assert held() == pytest.approx([70, 40, 250, 160, 170, 70, 250, 130], abs=0.02)

        hand.drag([270, 190, 315, 235])  # another lesion, its core suggested
        assert held("1")[:4] == pytest.approx([270, 190, 315, 235], abs=0.02)
        u0, v0, u1, v1 = held("1")[4:]
        assert 270 <= u0 < u1 <= 315
        assert 190 <= v0 < v1 <= 235
        hand.drag([100, 60, 140, 90], modifiers=8)  # Shift: over the first one
        assert held("2")[:4] == pytest.approx([100, 60, 140, 90], abs=0.02)
        page.key("Delete")
        assert held("2") == []
        assert len(rows(tmp_path)) == 2

        page.key("+", repeat=2)
        start, end = hand.places([160, 120], [140, 110])
        page.drag(start, end, button="right")  # pans: the picture moves, no box does
        before = rows(tmp_path)
        hand.drag([110, 165, 180, 188])  # drawn on the zoomed picture, at the same pixels of the image
        assert held("2")[:4] == pytest.approx([110, 165, 180, 188], abs=0.02)
        assert {key: values for key, values in rows(tmp_path).items() if key[1] != "2"} == before
        page.key("x")  # no lesion: all of them go, and come back
        hand.saved()
        until(lambda: not rows(tmp_path))
        page.key("Ctrl+z")
        hand.saved()
        until(lambda: len(rows(tmp_path)) == 3)
        page.key("?")
        assert page.evaluate("document.getElementById('help').open")
        assert page.errors == []


def test_fingers_and_a_pen(browser: Browser, tmp_path: Path) -> None:
    """One finger draws, two zoom; a pen draws, whatever the hand that holds it touches; at a tablet's width."""
    draw_images(tmp_path / "images", ["one"])
    with serving(tmp_path) as served:
        page = browser.new_page()
        page.size(820, 1180, touch=True)
        hand = Hand(page).open(served.url, "one")

        def swipe(box: Sequence[float]) -> None:
            start, end = hand.places(box[:2], box[2:])
            page.touch("touchStart", start)
            for share in (0.3, 0.7, 1):
                page.touch("touchMove", [s + (e - s) * share for s, e in zip(start, end, strict=True)])
            page.touch("touchEnd")

        swipe([80, 60, 240, 180])
        page.wait("document.getElementById('hint').dataset.step === '2'")
        swipe([130, 100, 190, 140])
        hand.saved()
        assert rows(tmp_path)["one", "0"] == pytest.approx([80, 60, 240, 180, 130, 100, 190, 140], abs=0.02)
        scale = float(page.evaluate("document.getElementById('canvas').dataset.view").split(",")[0])
        ((x, y),) = hand.places([160, 120])
        page.touch("touchStart", (x - 30, y))
        page.touch("touchStart", (x - 30, y), (x + 30, y))
        page.touch("touchMove", (x - 60, y), (x + 60, y))
        page.touch("touchEnd")
        page.wait(f"Number(document.getElementById('canvas').dataset.view.split(',')[0]) > {scale * 1.5}")
        assert len(rows(tmp_path)) == 1

        grey = (
            "(c => [...c.getContext('2d').getImageData(c.width / 2 | 0, c.height / 2 | 0, 9, 9).data]"
            ".reduce((sum, value) => sum + value))(document.getElementById('canvas'))"
        )
        before, table = page.evaluate(grey), (tmp_path / "boxes.csv").read_bytes()
        assert page.evaluate("document.getElementById('gamma').offsetParent === null")
        page.evaluate("document.getElementById('look-button').click()")
        assert page.evaluate("document.getElementById('gamma').offsetParent !== null")
        page.evaluate(
            "(e => { e.value = 2.5; e.dispatchEvent(new Event('input')); })(document.getElementById('gamma'))"
        )
        page.wait(f"{grey} > {before * 1.2}")  # the dark is lifted, on the screen alone
        assert (tmp_path / "boxes.csv").read_bytes() == table
        page.key("v")
        page.evaluate("document.getElementById('look-button').click()")

        page.key("0")
        page.key("x")
        until(lambda: not rows(tmp_path))
        hand.at("one")
        start, middle, end = hand.places([60, 50], [100, 90], [220, 170])
        (palm,) = hand.places([280, 220])
        page.touch("touchStart", palm)  # the hand comes down first, and moves a little as the pen draws
        page.touch("touchMove", (palm[0] - 20, palm[1] - 15))
        page.mouse("mousePressed", *start, pointer="pen")
        page.mouse("mouseMoved", *middle, pointer="pen")
        page.touch("touchMove", (palm[0] - 40, palm[1] - 30))
        page.touch("touchEnd")
        page.touch("touchStart", palm)
        page.touch("touchMove", (palm[0] - 60, palm[1]))
        page.mouse("mouseMoved", *end, pointer="pen")
        page.mouse("mouseReleased", *end, pointer="pen")
        page.touch("touchEnd")
        page.wait("document.getElementById('hint').dataset.step === '2'")
        hand.saved()
        until(lambda: bool(rows(tmp_path)))
        assert rows(tmp_path)["one", "0"][:4] == pytest.approx([60, 50, 220, 170], abs=0.02)
        assert len(rows(tmp_path)) == 1
        assert page.errors == []


def test_what_nobody_has_seen_asks_for_a_look(browser: Browser, tmp_path: Path) -> None:
    """In Review, also without a model; one key agrees."""
    draw_images(tmp_path / "images", ["one", "two"])
    boxes = (80.0, 60.0, 240.0, 180.0), (130.0, 100.0, 190.0, 140.0)
    with serving(tmp_path) as served:
        served.desk.store.save(
            "two", Change(0, "engine", "a", lesions=(Lesion("0", *boxes, proposed=boxes),), automatic=True), (320, 240)
        )
        hand = Hand(browser.new_page()).open(f"{served.url}/#{served.key('two')}", "two")
        hand.page.key("f", repeat=2)
        assert hand.page.evaluate("[...document.querySelectorAll('.row .note')].map(e => e.textContent)") == [
            "accepted unseen"
        ]
        assert hand.text("hint").startswith("Accepted unseen")
        assert hand.page.evaluate("document.querySelector('[data-run=accept]').offsetParent !== null")
        hand.page.key("a")
        hand.saved()
        until(lambda: served.desk.store.state("two").lesions[0].source == "accepted")
        hand.page.wait("document.querySelectorAll('.row[data-status=unseen]').length === 0")
        assert hand.page.errors == []


def test_a_proposal_counts_as_seen_only_where_it_was(browser: Browser, tmp_path: Path) -> None:
    """One that comes while the image is open and drawn on was in nobody's sight."""
    draw_images(tmp_path / "images", ["one", "two"])
    with serving(tmp_path) as served:
        hand = Hand(browser.new_page()).open(f"{served.url}/#{served.key('one')}", "one")
        torch.manual_seed(0)
        save_sam(build_sam("compact", architecture=ARCHITECTURE), tmp_path / "tiny.safetensors", name="compact")
        add_model(served.desk, tmp_path / "tiny.safetensors", 0.5)
        desk, review = served.desk, served.desk.review
        assert review is not None
        assert desk.model is not None
        until(lambda: all(review.boxes(entry) for entry in desk.catalogue.entries))
        hand.two_drags((60, 50, 220, 170), (100, 80, 160, 120))
        hand.saved()
        until(lambda: desk.store.state("one").revision > 0)
        assert desk.store.state("one").shown == ""
        hand.page.key("f", repeat=2)
        hand.page.wait("[...document.querySelectorAll('.row .note')].some(e => e.textContent.startsWith('doubt'))")
        hand.page.key("n")
        hand.at("two")
        hand.page.key("a")
        hand.saved()
        until(lambda: desk.store.state("two").revision > 0)
        assert desk.store.state("two").shown == desk.model.label
        assert hand.page.errors == []


def test_an_image_that_breaks_while_it_is_open(browser: Browser, tmp_path: Path) -> None:
    """What happens to the others is still told."""
    draw_images(tmp_path / "images", ["one", "two", "three"])
    with serving(tmp_path) as served:
        hand = Hand(browser.new_page()).open(f"{served.url}/#{served.key('one')}", "one")
        held = served.desk.store
        boxes = (80.0, 60.0, 240.0, 180.0), (130.0, 100.0, 190.0, 140.0)
        (tmp_path / "images" / "one.png").write_bytes(b"<html>")
        with held._lock:  # both in one answer
            for name in ("one", "two"):
                held.save(name, Change(0, "bob", name, lesions=(Lesion("0", *boxes),)), (320, 240))
        hand.page.wait(
            "[...document.querySelectorAll('.row')].some(row => row.title === 'two' && row.dataset.status === 'done')"
        )
        assert hand.page.errors == []


def test_boxes_outside_the_image_stay_said(browser: Browser, tmp_path: Path) -> None:
    """Until they are drawn anew; the sentence does not go away with the next thing one does."""
    draw_images(tmp_path / "images", ["one"])
    (tmp_path / "boxes.csv").write_text(
        "image_id,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1\none,10,10,900,200,20,20,300,100\n"
    )
    with serving(tmp_path) as served:
        hand = Hand(browser.new_page()).open(served.url, "one")
        hand.page.key("Tab")
        hand.page.key("Escape")
        assert "lies outside this image of 320x240 px" in hand.text("banner")
        assert not hand.page.evaluate("document.getElementById('banner').hidden")
        hand.page.key("x")
        hand.saved()
        hand.page.wait("document.getElementById('banner').hidden")
        assert hand.page.errors == []


def test_two_tabs_and_an_edit_by_hand(browser: Browser, tmp_path: Path) -> None:
    """The second tab learns what the first saved; a real conflict is said, and either side can be kept."""
    draw_images(tmp_path / "images", ["one", "two", NASTY])
    with serving(tmp_path) as served:
        first, second = (Hand(browser.new_page()).open(f"{served.url}/#{served.key('one')}") for _ in range(2))
        for hand, name in ((first, "ann"), (second, "bob")):
            hand.at("one")
            hand.page.evaluate(
                f"(e => {{ e.value = {name!r}; e.dispatchEvent(new Event('change')); }})"
                "(document.getElementById('who'))"
            )
        first.two_drags([80, 60, 240, 180], [120, 90, 200, 150])
        first.saved()
        second.page.wait("document.querySelectorAll('#lesions .lesion').length === 1")  # shown there too
        assert "ann changed this image" in second.text("toast")

        state = served.desk.store.state("one")
        answer = served.save(
            "one",
            state.revision,
            "elsewhere",
            [{"id": "0", "big": [10, 10, 300, 200], "small": [100, 90, 150, 140]}],
            who="cleo",
        )
        assert answer.status_code == 200
        second.drag([240, 120, 260, 125])  # drawn before the second tab could know
        second.page.wait("!document.getElementById('banner').hidden")
        said = second.text("banner")
        assert "cleo changed this image" in said
        assert "Your boxes are still here" in said
        assert rows(tmp_path)["one", "0"][:4] == [10, 10, 300, 200]
        second.page.evaluate("document.querySelector('#banner .choice').click()")  # keep mine
        second.saved()
        until(lambda: rows(tmp_path)["one", "0"][2] != 300)
        assert rows(tmp_path)["one", "0"][:4] == pytest.approx([80, 60, 260, 180], abs=0.02)

        text = (tmp_path / "boxes.csv").read_text()
        (tmp_path / "boxes.csv").write_text(text.replace("one,0,", "one;0,"))
        first.page.wait("document.getElementById('banner').textContent.includes('Nothing is written until')")
        (tmp_path / "boxes.csv").write_text(text.replace("80.00", "70.00"))
        first.page.wait("document.getElementById('banner').hidden")
        until(lambda: served.desk.store.state("one").lesions[0].big[0] == 70)

        row = f"[...document.querySelectorAll('.row')].find(row => row.title === {json.dumps(NASTY)})"
        first.page.evaluate(f"{row}.click()")
        first.at(NASTY)
        assert first.text("name") == NASTY
        assert first.page.evaluate("document.title") != "1"
        assert first.page.evaluate("document.querySelectorAll('#name img').length") == 0
        assert first.page.errors == second.page.errors == []


def test_a_server_that_goes_and_comes_back(browser: Browser, tmp_path: Path) -> None:
    """Drawn while the server is dead: said, kept, saved when it is back; opens where one stopped."""
    draw_images(tmp_path / "images", ["one", "two", "three"])
    port = "0"
    hand = Hand(browser.new_page())
    with command(tmp_path / "images", "--port", port) as (_, url):
        port = url.rsplit(":", 1)[1]
        hand.open(url, "one")
        hand.page.key("n")
        hand.at("three")
        hand.two_drags([80, 60, 240, 180], [120, 90, 200, 150])
        hand.saved()
    hand.drag([240, 120, 260, 125])
    hand.page.wait("document.getElementById('banner').textContent.includes('No connection')")
    assert "kept in this browser" in hand.text("banner")
    assert hand.text("saved") == "1 not saved"
    assert rows(tmp_path)["three", "0"][2] == pytest.approx(240, abs=0.02)
    with command(tmp_path / "images", "--port", port) as (_, url):
        hand.saved()
        until(lambda: rows(tmp_path)["three", "0"][2] > 250)
        again = Hand(browser.new_page()).open(url, "two")  # the next one to do after the last that was open
        assert again.text("progress") == "1 of 3 done"
        bad = tmp_path / "images" / "two.png"
        bad.write_bytes(b"<html>")
        again.page.goto(f"{url}/?x#{again.page.evaluate('location.hash').lstrip('#')}")
        again.page.wait("document.getElementById('banner').textContent.includes('an HTML or XML page')")
        assert hand.page.errors == again.page.errors == []

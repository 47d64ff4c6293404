"""What a text names goes into the review queue of the page, and into the table only where that is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from lesionsam.annotation import text
from lesionsam.annotation.catalogue import Catalogue
from lesionsam.annotation.pictures import Pictures
from lesionsam.annotation.records import UNSEEN
from lesionsam.annotation.serve import add_text_proposals, has_text_proposals
from lesionsam.annotation.server import Desk, create_app
from lesionsam.annotation.store import Store
from lesionsam.annotation.text import propose_by_text
from lesionsam.detection.detectors import Detection
from lesionsam.errors import UserError
from lesionsam.formats.rle import decode


class Known:
    """A detector that finds one lesion with a mask and one without in images whose first pixel is bright."""

    digest = "0123456789ab"

    def detect(self, images: Sequence[np.ndarray], texts: Sequence[str], *, threshold: float) -> list[list[Detection]]:
        found: list[list[Detection]] = []
        for image in images:
            mask = np.zeros(image.shape[:2], bool)
            mask[20:40, 30:60] = True
            both = [
                Detection(np.array([30.0, 20, 60, 40]), 0.8, texts[0], mask),
                Detection(np.array([70.0, 50, 90, 60]), 0.3, texts[-1]),
            ]
            found.append([one for one in both if one.score >= threshold] if image[0, 0, 0] > 128 else [])
        return found


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(text, "open_detector", lambda *_: Known())
    folder = tmp_path / "images"
    folder.mkdir()
    for name, level in (("bright", 200), ("dark", 60)):
        Image.fromarray(np.full((70, 100, 3), level, np.uint8)).save(folder / f"{name}.png")
    return folder


def test_proposals_are_queued_on_the_page_and_accepted_there(images: Path, tmp_path: Path) -> None:
    assert propose_by_text([images], text="skin lesion, mole", model="x/y") == 0
    table = tmp_path / "boxes.csv"
    assert not table.exists(), "nothing enters unseen"
    lines = [json.loads(line) for line in (tmp_path / "boxes.proposals.jsonl").read_text().splitlines()]
    assert {line["image_id"]: line["lesion"] is not None for line in lines} == {"bright": True, "dark": False}
    first = next(line for line in lines if line["lesion"])
    assert decode(first["lesion"]["mask"], 70, 100).sum() == 20 * 30
    assert first["lesion"]["provenance"] == "found by text: skin lesion"
    assert first["more"][0]["provenance"] == "found by text: mole"
    assert has_text_proposals(table)
    catalogue = Catalogue([images])
    desk = Desk(catalogue, Store(table, catalogue), Pictures(), None, "me", "images")
    add_text_proposals(desk)
    client = TestClient(create_app(desk))
    key = catalogue.by_id["bright"].key
    assert client.get("/api/queue").json() == {"images": [[key, 0.2]], "left": 0}
    proposal = client.get(f"/api/images/{key}").json()["proposal"]
    assert proposal["why"] == ["found by text: skin lesion"]
    big, small = (np.array(proposal["lesions"][0][name]) for name in ("big", "small"))
    assert (big[:2] < [30, 20]).all()
    assert (big[2:] > [60, 40]).all()
    assert (small[:2] >= [30, 20]).all()
    assert (small[2:] <= [60, 40]).all()
    lesions = [
        {"id": str(k), **one, "proposed": [one["big"], one["small"]], "agreed": True}
        for k, one in enumerate(proposal["lesions"])
    ]
    assert len(lesions) == 2
    sent = {"base": 0, "change": "one", "lesions": lesions, "shown": True}
    assert client.put(f"/api/images/{key}", json=sent).status_code == 200
    kept = desk.store.state("bright")
    assert [lesion.source for lesion in kept.lesions] == ["accepted", "accepted"]
    assert all(lesion.model == "text" for lesion in kept.lesions)
    assert client.get("/api/queue").json()["images"] == []
    assert len(table.read_text().splitlines()) == 3


def test_sure_lesions_enter_the_table_where_that_is_asked_for_and_are_marked(images: Path, tmp_path: Path) -> None:
    assert propose_by_text([images], text="mole", model="x/y", accept=0.5) == 0
    table = tmp_path / "boxes.csv"
    assert len(table.read_text().splitlines()) == 2
    state = Store(table, Catalogue([images])).state("bright")
    assert state.status == UNSEEN
    assert [lesion.source for lesion in state.lesions] == ["automatic"]
    before = table.read_bytes()
    with pytest.raises(UserError, match="found nothing in 1 images"):
        propose_by_text([images], text="mole", model="x/y", accept=0.5)  # the dark one is all that is left
    assert table.read_bytes() == before


def test_a_text_that_finds_nothing_and_damaged_images_are_said(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r'--text "mole": found nothing in 2 images at a score of 0\.9 or more'):
        propose_by_text([images], text="mole", model="x/y", threshold=0.9)
    with pytest.raises(UserError, match="--accept: expected a score between 0 and 1, got 2"):
        propose_by_text([images], text="mole", model="x/y", accept=2.0)
    (images / "cut.png").write_bytes((images / "bright.png").read_bytes()[:60])
    assert propose_by_text([images], text="mole", model="x/y") == 1
    assert "cut.png" in capsys.readouterr().err

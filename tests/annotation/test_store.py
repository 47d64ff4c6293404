"""What the annotation page keeps: the table, the journal, revisions, edits by hand, crashes between two files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lesionsam.annotation import store as store_module
from lesionsam.annotation.catalogue import Catalogue
from lesionsam.annotation.records import ACCEPTED, AUTOMATIC, CORRECTED, DRAWN, ImageState, Lesion, checked_boxes
from lesionsam.annotation.store import OUTSIDE, Change, Conflict, Store, journal_path
from lesionsam.boxes.table import read_boxes
from lesionsam.errors import UserError

SIZE = (100, 80)
BIG, SMALL = (10.0, 10.0, 60.0, 50.0), (20.0, 20.0, 30.25, 30.5)
OTHER = (5.0, 5.0, 70.5, 60.0)
NAMES = ("a", "b c", "Läsion 病变 'x'", '<script>alert(1)</script>"', "d,e;f")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in NAMES:
        Image.new("RGB", SIZE, (200, 160, 140)).save(tmp_path / "images" / f"{name.replace('/', '∕')}.png")
    return tmp_path


@pytest.fixture
def clock() -> Iterator[int]:
    return iter(range(10**6))


def open_store(folder: Path) -> Store:
    return Store(folder / "boxes.csv", Catalogue([folder / "images"]), now=lambda: "2030-01-02T03:04:05.000Z")


def change(base: int, *lesions: Lesion, who: str = "ann", name: str = "", **rest: object) -> Change:
    return Change(base, who, name or f"c{base}-{who}-{len(lesions)}", lesions=lesions, **rest)  # type: ignore[arg-type]


def lesion(lesion_id: str = "0", big: tuple = BIG, small: tuple = SMALL, **rest: object) -> Lesion:
    return Lesion(lesion_id, big, small, **rest)  # type: ignore[arg-type]


def samples(folder: Path) -> dict[tuple[str, str], tuple]:
    """The table as the training chain reads it."""
    index = {
        entry.image_id: {"image_path": entry.path, "split": "train", "width": SIZE[0], "height": SIZE[1]}
        for entry in Catalogue([folder / "images"]).entries
    }
    found = read_boxes(folder / "boxes.csv", index, root=folder)
    return {(s.image_id, s.lesion_id): (tuple(s.big_box), tuple(s.small_box)) for s in found}


def test_the_chain_reads_what_is_saved(folder: Path) -> None:
    store = open_store(folder)
    names = [entry.image_id for entry in store.catalogue.entries]
    assert sorted(names) == sorted(name.replace("/", "∕") for name in NAMES)
    for name in names:
        store.save(name, change(0, lesion("0"), lesion("two", OTHER)), SIZE)
    assert samples(folder) == {(name, key): (big, SMALL) for name in names for key, big in (("0", BIG), ("two", OTHER))}


def test_reopened_store_knows_everything(folder: Path) -> None:
    store = open_store(folder)
    first = store.save("a", change(0, lesion(), seconds={"0": 4.5, "": 1.0}), SIZE)
    second = store.save("a", change(1, lesion(big=OTHER), who="bob", seconds={"0": 2.0}), SIZE)
    store.save("b c", Change(0, "bob", "x", mark="no_lesion", seconds={"": 3.0}), SIZE)
    again = open_store(folder)
    assert again.state("a") == second == store.state("a")
    assert (first.revision, second.revision) == (1, 2)
    kept = second.lesions[0]
    assert (kept.seconds, kept.made_by, kept.changed_by, kept.source) == (6.5, "ann", "bob", DRAWN)
    assert second.all_seconds == 7.5
    assert again.state("b c").status == "no_lesion"
    assert again.state("b c").all_seconds == 3.0


def test_a_stale_revision_is_refused_and_changes_nothing(folder: Path) -> None:
    store = open_store(folder)
    store.save("a", change(0, lesion()), SIZE)
    before = (folder / "boxes.csv").read_bytes(), journal_path(folder / "boxes.csv").read_bytes()
    with pytest.raises(Conflict, match="ann changed this image at 03:04:05 UTC") as conflict:
        store.save("a", change(0, lesion(big=OTHER), who="bob"), SIZE)
    assert conflict.value.state.lesions[0].big == BIG
    assert before == ((folder / "boxes.csv").read_bytes(), journal_path(folder / "boxes.csv").read_bytes())


def test_the_same_change_sent_twice_counts_once(folder: Path) -> None:
    store = open_store(folder)
    sent = change(0, lesion(), name="once", seconds={"0": 5.0})
    assert store.save("a", sent, SIZE) == store.save("a", sent, SIZE)
    assert open_store(folder).save("a", sent, SIZE).lesions[0].seconds == 5.0


def test_where_a_lesion_comes_from(folder: Path) -> None:
    """drawn; accepted while the boxes are the proposed ones; corrected when not; automatic until a person agrees."""
    store = open_store(folder)
    proposal = lesion(proposed=(BIG, SMALL), model="abc", threshold=0.5)
    state = store.save("a", change(0, proposal, lesion("1", OTHER)), SIZE)
    assert [each.source for each in state.lesions] == [ACCEPTED, DRAWN]
    state = store.save("a", change(1, lesion(big=OTHER), lesion("1", OTHER)), SIZE)
    assert [each.source for each in state.lesions] == [CORRECTED, DRAWN]
    assert (state.lesions[0].model, state.lesions[0].threshold) == ("abc", 0.5)
    state = store.save("a", change(2, lesion(), lesion("1", OTHER)), SIZE)
    assert state.lesions[0].source == ACCEPTED
    automatic = store.save("b c", change(0, proposal, automatic=True), SIZE)
    assert automatic.lesions[0].source == AUTOMATIC
    kept = store.save("b c", change(1, proposal, lesion("1", OTHER)), SIZE)
    assert kept.lesions[0].source == AUTOMATIC
    agreed = store.save("b c", change(2, lesion(source=ACCEPTED), lesion("1", OTHER)), SIZE)
    assert agreed.lesions[0].source == ACCEPTED


def test_a_deleted_lesion_comes_back_as_it_was(folder: Path) -> None:
    store = open_store(folder)
    store.save("a", change(0, lesion(proposed=(BIG, SMALL)), seconds={"0": 5.0}), SIZE)
    assert store.save("a", change(1), SIZE).status == "open"
    with pytest.raises(UserError, match="no rows"):
        samples(folder)
    back = store.save("a", change(2, lesion(), name="undone"), SIZE).lesions[0]
    assert (back.source, back.seconds) == (ACCEPTED, 5.0)


# ------------------------------------------------------------------------------------------------------ edits by hand

TABLE = (
    "image_id,split,lesion_id,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1\n"
    "a,train,0,10,10,60,50,20,20,30.25,30.5\nelsewhere,dev,left,1,2,9.125,10,3,4,5,6\n"
)


def test_rows_that_nobody_touched_keep_their_text(folder: Path) -> None:
    (folder / "boxes.csv").write_text(TABLE)
    store = open_store(folder)
    assert store.state("a").revision == 0
    assert store.state("a").lesions[0].boxes == (BIG, SMALL)
    assert not journal_path(folder / "boxes.csv").exists()
    store.save("b c", change(0, lesion()), SIZE)
    lines = (folder / "boxes.csv").read_text().splitlines()
    assert lines[1:] == [
        "a,0,train,,,10,10,60,50,20,20,30.25,30.5",
        "elsewhere,left,dev,,,1,2,9.125,10,3,4,5,6",
        "b c,0,,100,80,10.00,10.00,60.00,50.00,20.00,20.00,30.25,30.50",
    ]
    store.save("a", change(0, lesion(), lesion("1", OTHER)), SIZE)
    lines = (folder / "boxes.csv").read_text().splitlines()
    assert lines[1:3] == [
        "a,0,train,,,10,10,60,50,20,20,30.25,30.5",
        "a,1,train,100,80,5.00,5.00,70.50,60.00,20.00,20.00,30.25,30.50",
    ]


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "boxes.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_an_edit_by_hand_is_a_change_of_its_own(folder: Path) -> None:
    store = open_store(folder)
    store.save("a", change(0, lesion(), seconds={"0": 4.0}), SIZE)
    store.save("b c", change(0, lesion()), SIZE)
    edit(folder, "a,0,100,80,10.00", "a,0,100,80,12.50")
    store.refresh()
    state = store.state("a")
    assert (state.revision, state.changed_by) == (2, OUTSIDE)
    assert (state.lesions[0].big[0], state.lesions[0].seconds) == (12.5, 4)
    with pytest.raises(Conflict, match=OUTSIDE):
        store.save("a", change(1, lesion(), who="bob"), SIZE)
    assert store.save("b c", change(1, lesion(big=OTHER)), SIZE).revision == 2
    assert samples(folder)["a", "0"][0][0] == 12.5
    assert open_store(folder).state("a") == state


def test_an_edit_while_the_page_was_closed(folder: Path) -> None:
    open_store(folder).save("a", change(0, lesion()), SIZE)
    edit(folder, "a,0,", "a,left,")
    state = open_store(folder).state("a")
    assert (state.revision, [each.lesion_id for each in state.lesions]) == (2, ["left"])
    assert open_store(folder).state("a").revision == 2  # journalled, not found anew each time


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("10.00", "ten", r"line 2, big_x0: expected a number of pixels, got 'ten'"),
        ("60.00", "6.00", r"line 2, big_x0, big_x1: expected big_x0 < big_x1"),
        ("20.00", "2.00", r"line 2, small_x0..small_y1: small box"),
        ("a,0,", "a,0,7,", r"line 2 has 13 fields; expected 12"),
        (",", ";", r"separated by ';'"),
        ("big_x0", "x", r"column big_x0 is missing"),
    ],
)
def test_a_broken_edit_stops_saving_until_it_is_right(folder: Path, old: str, new: str, said: str) -> None:
    store = open_store(folder)
    store.save("a", change(0, lesion()), SIZE)
    good = (folder / "boxes.csv").read_text()
    edit(folder, old, new)
    broken = (folder / "boxes.csv").read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match=said):
            store.save("b c", change(0, lesion()), SIZE)
    assert (folder / "boxes.csv").read_bytes() == broken
    (folder / "boxes.csv").write_text(good)
    assert store.save("b c", change(0, lesion()), SIZE).revision == 1
    assert set(samples(folder)) == {("a", "0"), ("b c", "0")}


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_text("")])
def test_a_table_that_vanished_is_not_taken_for_a_deletion(folder: Path, spoil) -> None:
    store = open_store(folder)
    for name in ("a", "b c"):
        store.save(name, change(0, lesion()), SIZE)
    spoil(folder / "boxes.csv")
    with pytest.raises(UserError, match="knows of 2 images with boxes; put the table back"):
        store.save("d,e;f", change(0, lesion()), SIZE)
    with pytest.raises(UserError, match="put the table back"):
        open_store(folder)


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_an_empty_table_is_filled(folder: Path, text: str) -> None:
    (folder / "boxes.csv").write_text(text, encoding="utf-8")
    open_store(folder).save("a", change(0, lesion()), SIZE)
    assert samples(folder) == {("a", "0"): (BIG, SMALL)}


def test_an_edit_between_reading_and_replacing_is_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody saves the table in an editor at the very moment of a change: both are there afterwards."""
    store = open_store(folder)
    store.save("a", change(0, lesion()), SIZE)
    append = store.journal.append

    def edited_meanwhile(*arguments):
        monkeypatch.setattr(store.journal, "append", append)
        edit(folder, "a,0,100,80,10.00", "a,0,100,80,11.00")
        return append(*arguments)

    monkeypatch.setattr(store.journal, "append", edited_meanwhile)
    store.save("b c", change(0, lesion()), SIZE)
    assert samples(folder)["a", "0"][0][0] == 11.0
    assert ("b c", "0") in samples(folder)
    assert open_store(folder).all_states() == store.all_states()


# ------------------------------------------------------------------------------------------------------ crashes


def test_a_change_that_reached_the_journal_alone_is_finished(folder: Path) -> None:
    store = open_store(folder)
    store.save("a", change(0, lesion()), SIZE)
    table = (folder / "boxes.csv").read_bytes()
    store.save("a", change(1, lesion(big=OTHER)), SIZE)
    after = (folder / "boxes.csv").read_bytes()
    (folder / "boxes.csv").write_bytes(table)  # as a crash between the two files leaves it
    again = open_store(folder)
    assert (folder / "boxes.csv").read_bytes() == after
    assert again.state("a").lesions[0].big == OTHER
    assert again.state("a").revision == 2


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_line_of_the_journal_was_never_acknowledged(folder: Path, cut: int) -> None:
    store = open_store(folder)
    store.save("a", change(0, lesion()), SIZE)
    table = (folder / "boxes.csv").read_bytes()
    store.save("b c", change(0, lesion()), SIZE)
    path = journal_path(folder / "boxes.csv")
    path.write_bytes(path.read_bytes()[:-cut])
    (folder / "boxes.csv").write_bytes(table)
    again = open_store(folder)
    assert again.state("b c").revision == 0
    again.save("b c", change(0, lesion(big=OTHER)), SIZE)
    assert [json.loads(line)["revision"] for line in path.read_text().splitlines()] == [1, 1]
    assert open_store(folder).state("b c").lesions[0].big == OTHER


def test_a_full_disk_leaves_everything_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(folder)
    state = store.save("a", change(0, lesion()), SIZE)
    files = (folder / "boxes.csv").read_bytes(), journal_path(folder / "boxes.csv").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device", str(folder / "boxes.csv"))

    for place in ("atomic_write",):
        with monkeypatch.context() as patched:
            patched.setattr(store_module, place, full)
            with pytest.raises(OSError, match="No space left"):
                store.save("a", change(1, lesion(big=OTHER)), SIZE)
    assert (store.state("a"), files) == (
        state,
        ((folder / "boxes.csv").read_bytes(), journal_path(folder / "boxes.csv").read_bytes()),
    )
    assert store.save("a", change(1, lesion(big=OTHER)), SIZE).revision == 2


FULL = """
import resource, sys
from pathlib import Path
sys.path[:0] = [{source!r}, {tests!r}]
from annotation.test_store import SIZE, change, lesion, open_store
store = open_store(Path({folder!r}))
size = (Path({folder!r}) / "boxes.journal.jsonl").stat().st_size
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
try:
    store.save("b c", change(0, lesion()), SIZE)
except OSError as error:
    print("refused", error.errno, store.state("b c").revision)
"""


def test_a_disk_that_fills_in_the_middle_of_a_line(folder: Path, root: Path) -> None:
    """A real limit on the file's size: the line is cut back, and the journal goes on from there."""
    open_store(folder).save("a", change(0, lesion()), SIZE)
    program = FULL.format(source=str(root / "src"), tests=str(root / "tests"), folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
    )
    assert done.stdout.startswith("refused 27 0"), done
    text = journal_path(folder / "boxes.csv").read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["image_id"] for line in text.splitlines()] == ["a"]
    assert open_store(folder).save("b c", change(0, lesion()), SIZE).revision == 1


def test_a_damaged_journal_is_named(folder: Path) -> None:
    open_store(folder).save("a", change(0, lesion()), SIZE)
    path = journal_path(folder / "boxes.csv")
    path.write_text('{"image_id": "a", "revision": oops}\n')
    with pytest.raises(UserError, match=r"boxes.journal.jsonl: a line is damaged .* remove that line"):
        open_store(folder)


# ------------------------------------------------------------------------------------------------------ boxes and names


@given(st.lists(st.floats(-50, 150), min_size=8, max_size=8))
def test_boxes_that_are_taken_are_right(values: list[float]) -> None:
    """Whatever a page sends: taken boxes lie in the image, in order, the core in the big box, a hundredth apart."""
    try:
        big, small = checked_boxes(values[:4], values[4:], *SIZE)
    except UserError:
        return
    (x0, y0, x1, y1), (u0, v0, u1, v1) = big, small
    assert 0 <= x0 <= u0 < u1 <= x1 <= SIZE[0]
    assert 0 <= y0 <= v0 < v1 <= y1 <= SIZE[1]
    assert all(abs(value * 100 - round(value * 100)) < 1e-6 for value in (*big, *small))
    assert np.abs(np.array(big) - np.clip(values[:4], 0, [*SIZE, *SIZE])).max() <= 0.0051


@pytest.mark.parametrize(
    "boxes",
    [
        ((10, 10, 10, 50), SMALL),
        ((60, 10, 10, 50), SMALL),
        ((float("nan"), 10, 60, 50), SMALL),
        (BIG, (5, 20, 30, 30)),
        (BIG, (20, 20, 61, 30)),
        (BIG, (70, 20, 80, 30)),
        ((200, 10, 260, 50), SMALL),
        (BIG, (20, 20, 20.1, 30)),
    ],
)
def test_wrong_boxes_are_refused(folder: Path, boxes: tuple) -> None:
    store = open_store(folder)
    with pytest.raises(UserError, match=r"box|core"):
        store.save("a", change(0, lesion("0", *boxes)), SIZE)
    assert not (folder / "boxes.csv").exists()


def test_names_that_cannot_stand_in_a_table(tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    Image.new("RGB", SIZE).save(picture)
    (tmp_path / "sub").mkdir()
    for name in ("two\nlines.png", " space.png", "x.jpg", b"\xff\xfe.png", "half\u2028line.png"):
        os.link(picture, os.path.join(os.fsencode(tmp_path / "sub"), os.fsencode(name)))
    catalogue = Catalogue([tmp_path])
    assert [entry.image_id for entry in catalogue.by_id.values()] == ["x"]
    faults = [entry.fault for entry in catalogue.entries if entry.fault]
    assert len(faults) == 5
    assert sum("line break" in fault for fault in faults) == 2
    for part in ("begins or ends with a space", "not UTF-8", "has the same name apart from folder or ending"):
        assert sum(part in fault for fault in faults) == 1
    assert len({entry.key for entry in catalogue.entries}) == 6


def test_folders_of_masks_hold_no_images_to_annotate(folder: Path) -> None:
    for name in ("masks", "boxes.masks", ".cache"):
        (folder / "images" / name).mkdir()
        Image.new("L", SIZE).save(folder / "images" / name / "m.png")
    assert len(Catalogue([folder / "images"])) == len(NAMES)


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["*.nothing"]])
def test_no_images_is_one_line(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no images"):
        Catalogue(arguments)


def test_ten_thousand_images_open_at_once(tmp_path: Path) -> None:
    """Names alone are read: no image is opened, whatever is in it."""
    (tmp_path / "images").mkdir()
    for k in range(10_000):
        (tmp_path / "images" / f"{k:05d}.jpg").touch()
    program = (
        "import resource, sys; from lesionsam.annotation.catalogue import Catalogue\n"
        "begun = resource.getrusage(resource.RUSAGE_SELF).ru_utime\n"
        f"catalogue = Catalogue([{str(tmp_path / 'images')!r}])\n"
        "print(len(catalogue), resource.getrusage(resource.RUSAGE_SELF).ru_utime - begun)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    count, seconds = done.stdout.split()
    assert int(count) == 10_000
    assert float(seconds) < 0.5  # of the processor; the page's promise is a second by the clock


def test_states_read_back_as_written() -> None:
    from lesionsam.annotation.records import state_from_dict

    state = ImageState("a", 3, "", (lesion(proposed=(BIG, OTHER), model="m", threshold=0.4),), 2.5, "w", "t", "c")
    assert state_from_dict(json.loads(json.dumps({**asdict(state), "later": "unknown"}))) == state

"""`lesionsam data split`: grouped, seeded, links or copies."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lesionsam.cli.app import app
from lesionsam.data.split import assign, split_folder
from lesionsam.errors import UserError

HOW = {"by": None, "column": "", "val": 0.2, "test": 0.2, "seed": 0, "copy": False}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """30 images of 10 patients, three each, in two folders."""
    lines = ["image_id,patient"]
    for k in range(30):
        path = tmp_path / "photos" / ("a" if k % 2 else "b") / f"image{k:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([k]))
        lines.append(f"image{k:02d}{'.jpg' if k % 3 else ''},P{k // 3}")
    (tmp_path / "patient.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "photos"


def patients(paths: list[Path]) -> set[int]:
    return {int(path.stem.removeprefix("image")) // 3 for path in paths}


def test_images_of_a_patient_stay_together(photos: Path, tmp_path: Path) -> None:
    chosen = split_folder(photos, tmp_path / "out", **HOW | {"by": tmp_path / "patient.csv"})  # pyright: ignore
    assert {name: len(paths) for name, paths in chosen.items()} == {"train": 18, "val": 6, "test": 6}
    of = {name: patients(paths) for name, paths in chosen.items()}
    assert not of["train"] & of["val"] | of["train"] & of["test"] | of["val"] & of["test"]
    for name, paths in chosen.items():
        assert {path.name for path in (tmp_path / "out" / name).iterdir()} == {path.name for path in paths}
    again = split_folder(photos, tmp_path / "again", **HOW | {"by": tmp_path / "patient.csv"})  # pyright: ignore
    assert again == chosen
    other = split_folder(photos, tmp_path / "other", **HOW | {"by": tmp_path / "patient.csv", "seed": 1})  # pyright: ignore
    assert other != chosen


def test_links_share_the_disk_and_copies_do_not(photos: Path, tmp_path: Path) -> None:
    for copy, count in ((False, 2), (True, 1)):
        out = tmp_path / f"out{copy}"
        split_folder(photos, out, **HOW | {"copy": copy})  # pyright: ignore
        for path in out.rglob("*.jpg"):
            assert path.stat().st_nlink == count
            assert path.read_bytes() == next(photos.rglob(path.name)).read_bytes()
        for path in out.rglob("*.jpg"):
            path.unlink()
    assert len(list(photos.rglob("*.jpg"))) == 30, "the originals stay"


def test_no_split_is_empty_and_large_groups_stay_whole() -> None:
    def group(name: str, size: int) -> tuple[str, list[Path]]:
        return name, [Path(f"{name}{k}") for k in range(size)]

    chosen = assign(dict([group("a", 50), group("b", 1), group("c", 1)]), val=0.1, test=0.1, seed=3)
    assert sorted(map(len, chosen.values())) == [1, 1, 50]
    with pytest.raises(UserError, match="2 groups: expected at least 3"):
        assign(dict([group("a", 5), group("b", 5)]), val=0.1, test=0.1, seed=0)


def test_faults_are_one_line_each(photos: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "patient.csv", tmp_path / "out"

    def refused(words: str, **changes: object) -> None:
        with pytest.raises(UserError, match=words):
            split_folder(photos, out, **HOW | changes)  # pyright: ignore
        assert not out.exists()

    refused("shares above 0", val=0.6, test=0.4)
    text = table.read_text(encoding="utf-8")
    table.write_text("\n".join(text.splitlines()[:-2]) + "\n", encoding="utf-8")
    refused("got none for image29.jpg, image28.jpg", by=table)
    table.write_text(text + "image00,P9\n", encoding="utf-8")
    refused("'image00' is of 'P0' and of 'P9'", by=table)
    refused("expected the columns image_id and doctor", by=table, column="doctor")
    table.write_text("image_id,patient,site\nimage00,P0,arm\n", encoding="utf-8")
    refused("image_id and one other, or its name in --column", by=table)
    refused("none.csv: cannot be read", by=tmp_path / "none.csv")
    (photos / "image00.png").touch()
    refused("has the name of", by=None)


def test_a_second_split_into_the_same_folder_is_refused(photos: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["data", "split", str(photos), "--out", str(photos / "images")])
    assert done.exit_code == 0
    assert "train 20, val 5, test 5 images" in done.output
    assert "images of one patient may be in two splits" in done.output
    with pytest.raises(UserError, match="holds files already"):
        split_folder(photos, photos / "images", **HOW)  # pyright: ignore

"""The ISIC sources against a server with small archives that have the real names, folders and extras."""

import hashlib
import io
import json
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.isic import FIRST, archive, challenge, picture
from helpers.web_server import Site, serve
from lesionsam.data.index import Row, check_rows, dev_ids
from lesionsam.data.sources import isic
from lesionsam.data.sources.archives import LocalArchive, RemoteArchive, find_members
from lesionsam.data.sources.isic import EDITIONS, IMAGE, MASK, fetch_isic
from lesionsam.errors import UserError
from lesionsam.utils.images import read_image, read_mask


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(Site()) as running:
        yield running


Fetch = Callable[..., list[Row]]


@pytest.fixture
def get(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    monkeypatch.chdir(tmp_path)

    def run(source: str, subset: int = 0, dev_fraction: float = 0.0, base_url: str = site.url) -> list[Row]:
        return fetch_isic(
            source,
            subset=subset,
            dev_fraction=dev_fraction,
            base_url=base_url,
            raw=Path("data/raw"),
            archives=Path(".archives"),
            lock_path=Path("archives.lock.json"),
            backoff=0.01,
        )

    return run


def by_split(rows: list[Row]) -> dict[str, set[str]]:
    return {split: {row["image_id"] for row in rows if row["split"] == split} for split in ("train", "dev", "test")}


@pytest.mark.parametrize("source", list(EDITIONS))
def test_whole_edition(site: Site, get: Fetch, source: str) -> None:
    counts = {"train": 12, "dev": 3, "test": 4}
    site.files = challenge(source, counts)
    fraction = 0.25 if source == "isic2016" else 0.0
    rows = get(source, dev_fraction=fraction)
    check_rows(rows, source)
    splits = by_split(rows)
    expected = {"train": 9, "dev": 3, "test": 4} if fraction else counts
    assert {name: len(ids) for name, ids in splits.items()} == expected
    for row in rows:
        image = read_image(row["image_path"])
        mask = read_mask(row["mask_path"], (row["width"], row["height"]))
        assert (image.shape[1], image.shape[0]) == (row["width"], row["height"])
        assert mask.sum() == 12 * 15  # the square, not the superpixels
        assert row["sha256"] == hashlib.sha256(Path(row["image_path"]).read_bytes()).hexdigest()
        assert Path(row["image_path"]).read_bytes() == picture(int(row["image_id"][5:]), "image")
        assert row["image_path"] == f"data/raw/images/{row['split']}/{row['image_id']}.jpg"
    written = {path for path in Path("data/raw").rglob("*") if path.is_file()}
    assert written == {Path(row[key]) for row in rows for key in ("image_path", "mask_path")}
    recorded = json.loads(Path("archives.lock.json").read_text())
    assert {url.removeprefix(site.url) for url in recorded} == {path for path in site.files}  # noqa: C416


def test_second_run_fetches_nothing(site: Site, get: Fetch) -> None:
    site.files = challenge("isic2018", {"train": 4, "dev": 2, "test": 2})
    rows = get("isic2018")
    site.asked.clear()
    assert get("isic2018") == rows
    assert {method for method, *_ in site.asked} <= {"HEAD"}


def test_dev_from_training_leaves_the_validation_archives_alone(site: Site, get: Fetch) -> None:
    site.files = challenge("isic2018", {"train": 12, "dev": 2, "test": 2})
    splits = by_split(get("isic2018", dev_fraction=0.25))
    everything = [f"ISIC_{n:07d}" for n in range(12)]
    assert splits["dev"] == dev_ids(everything, 0.25)
    assert splits["train"] == set(everything) - splits["dev"]
    assert not any("Validation" in path for _, path, _ in site.asked)


def test_2016_has_no_validation_set(get: Fetch) -> None:
    with pytest.raises(UserError, match=r"data\.dev_fraction: expected a number above 0"):
        get("isic2016")


@pytest.mark.parametrize("source", list(EDITIONS))
def test_subset_fetches_only_its_members(site: Site, get: Fetch, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lesionsam.data.sources.archives.TAIL_BYTES", 12_000
    )  # so that the directory alone is not everything
    site.files = challenge(source, {"train": 60, "dev": 40, "test": 40})
    rows = get(source, subset=4, dev_fraction=0.25 if source == "isic2016" else 0.0)
    splits = by_split(rows)
    wanted = dev_ids([f"ISIC_{n:07d}" for n in range(60)], 4 / 60)
    assert splits["train"] | (splits["dev"] if source == "isic2016" else set()) == wanted
    assert len(splits["test"]) == 4
    for row in rows:
        assert Path(row["image_path"]).read_bytes() == picture(int(row["image_id"][5:]), "image")
        assert Path(row["mask_path"]).read_bytes() == picture(int(row["image_id"][5:]), "mask")
    assert site.sent < 0.6 * sum(map(len, site.files.values()))
    assert all(asked[2] for asked in site.asked)  # nothing was asked for as a whole
    assert not list(Path(".archives").rglob("*.zip"))
    site.sent = 0
    assert get(source, subset=4, dev_fraction=0.25 if source == "isic2016" else 0.0) == rows
    directories = len(site.files) * 12_001
    assert site.sent <= directories  # members are kept from the first run


def test_whole_archive_that_is_here_serves_a_subset(site: Site, get: Fetch) -> None:
    site.files = challenge("isic2018", {"train": 6, "dev": 2, "test": 2})
    get("isic2018")
    site.asked.clear()
    assert len(get("isic2018", subset=2)) == 6
    assert site.asked == []


def test_subset_of_a_server_without_range(site: Site, get: Fetch) -> None:
    site.files, site.ranges = challenge("isic2018", {"train": 6, "dev": 2, "test": 2}), False
    with pytest.raises(UserError, match=r"does not answer Range requests.*data\.subset to 0"):
        get("isic2018", subset=2)


def test_subset_over_a_line_that_breaks(site: Site, get: Fetch) -> None:
    site.files = challenge("isic2018", {"train": 6, "dev": 2, "test": 2})
    site.drop_after, site.drops = 500, 3
    assert len(get("isic2018", subset=2)) == 6


def test_archive_that_changes_while_members_are_fetched(site: Site) -> None:
    name = "x.zip"
    site.files[f"/{name}"] = archive("x", {"ISIC_0000001.jpg": picture(1, "image")})
    remote = RemoteArchive(name, (f"{site.url}/{name}",), backoff=0.01)
    info = find_members(remote, IMAGE)["ISIC_0000001"]
    site.etag = '"v2"'
    with pytest.raises(UserError, match=r"member x/ISIC_0000001\.jpg cannot be fetched: .* changed while it was read"):
        remote.read(info)


def test_zip64_directory_is_read_by_range(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lesionsam.data.sources.archives.TAIL_BYTES", 64)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # zip64 records as in an archive of 11 GB
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    pictures = {f"ISIC_{n:07d}.jpg": picture(n, "image") for n in range(8)}
    data = archive("x", pictures)
    assert b"PK\x06\x06" in data  # the zip64 end of central directory record
    site.files["/x.zip"] = data
    remote = RemoteArchive("x.zip", (f"{site.url}/missing.zip", f"{site.url}/x.zip"), backoff=0.01)
    assert {f"{key}.jpg": remote.read(info) for key, info in find_members(remote, IMAGE).items()} == pictures


def test_overlaps_are_left_out_of_training(site: Site, get: Fetch, capsys: pytest.CaptureFixture[str]) -> None:
    site.files = challenge("isic2016", {"train": 8, "test": 4})
    edition = EDITIONS["isic2016"]
    train, test = edition.splits["train"], edition.splits["test"]
    again = {
        **{f"ISIC_{n:07d}": n for n in range(8)},
        "ISIC_0001184": 100,
        "ISIC_9000001": 9_000_001,
        "ISIC_7777777": 9_000_002,
    }  # known; the same id as in test; the same bytes under another id
    for part, kind, ending in ((train.images, "image", ".jpg"), (train.masks, "mask", "_Segmentation.png")):
        members = {f"{name}{ending}": picture(number, kind) for name, number in again.items()}
        site.files[f"/2016/{part.name}"] = archive(part.name.removesuffix(".zip"), members)
    splits = by_split(get("isic2016", dev_fraction=0.25))
    assert splits["train"] | splits["dev"] == {f"ISIC_{n:07d}" for n in range(8)}
    assert len(splits["test"]) == 4
    assert not list(Path("data/raw").rglob("*7777777*"))
    told = capsys.readouterr().err
    assert "left out of training, as they are in another split too: ISIC_0001184, ISIC_9000001" in told
    assert "ISIC_7777777 (same as ISIC_9000002)" in told
    assert test.count == 379


def test_members_that_belong_to_nothing(site: Site, get: Fetch, capsys: pytest.CaptureFixture[str]) -> None:
    site.files = challenge("isic2018", {"train": 4, "dev": 2, "test": 2})
    masks = EDITIONS["isic2018"].splits["train"].masks.name
    members = {f"ISIC_{n:07d}_segmentation.png": picture(n, "mask") for n in range(1, 4)}
    site.files[f"/2018/{masks}"] = archive("m", members)
    assert by_split(get("isic2018"))["train"] == {f"ISIC_{n:07d}" for n in range(1, 4)}
    told = capsys.readouterr().err
    assert "1 images without mask or masks without image are left out, the first is ISIC_0000000" in told
    site.files[f"/2018/{masks}"] = archive("m", {"readme.txt": b""})
    for path in Path(".archives/isic2018").glob(f"{masks}*"):
        path.unlink()
    Path("archives.lock.json").unlink()
    with pytest.raises(UserError, match="are they the right archives"):
        get("isic2018")


def test_mask_of_another_size(site: Site, get: Fetch) -> None:
    site.files = challenge("isic2018", {"train": 4, "dev": 2, "test": 2})
    masks = EDITIONS["isic2018"].splits["dev"].masks.name
    site.files[f"/2018/{masks}"] = archive(
        "m", {f"ISIC_{FIRST['dev'] + n:07d}_segmentation.png": picture(n + 1, "mask") for n in range(2)}
    )
    with pytest.raises(UserError, match=r"masks/dev/ISIC_5000000\.png: mask is 41x31 px; expected 40x32"):
        get("isic2018")


def test_missing_archive_names_address_and_place(site: Site, get: Fetch) -> None:
    site.files = challenge("isic2018", {"train": 4, "dev": 2, "test": 2})
    del site.files["/2018/ISIC2018_Task1_Test_GroundTruth.zip"]
    with pytest.raises(UserError, match=r"/2018/ISIC2018_Task1_Test_GroundTruth\.zip answers 404.*put the file at"):
        get("isic2018")


def test_plan_is_told_and_refused_without_room(
    get: Fetch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(isic, "free_disk_bytes", lambda _: 70_000_000)
    monkeypatch.setattr(isic, "SPARE_BYTES", 80_000_000)
    with pytest.raises(UserError, match=r"isic2018 needs .* of disk, only 70 MB free") as caught:
        get("isic2018", base_url="")
    assert "data.subset" in str(caught.value)
    assert "isic2018: 13.6 GB to download (0 B of it already here); 40.9 GB of disk" in capsys.readouterr().err


def test_official_addresses_sizes_and_hashes() -> None:
    remote = isic._remote(EDITIONS["isic2018"].splits["train"].images, 2018, "")
    assert remote.urls == tuple(
        f"https://{host}/2018/ISIC2018_Task1-2_Training_Input.zip"
        for host in ("isic-archive.s3.amazonaws.com/challenges", "isic-challenge-data.s3.amazonaws.com")
    )
    assert (remote.size, remote.sha256 and remote.sha256[:8]) == (11_165_358_566, "80f98572")
    counts = {source: [split.count for split in edition.splits.values()] for source, edition in EDITIONS.items()}
    assert counts == {"isic2016": [900, 379], "isic2017": [2000, 150, 600], "isic2018": [2594, 100, 1000]}


# ------------------------------------------------------------------------------------------------- hostile archives


def packed(members: list[tuple[zipfile.ZipInfo | str, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in members:
            opened.writestr(name, data)
    return file.getvalue()


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x/ISIC_0000001.jpg")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


def declared(data: bytes, size: int) -> bytes:
    """The archive with another unpacked size in its directory (offset 24 of the entry, APPNOTE 4.3.12)."""
    at = data.index(b"PK\x01\x02") + 24
    return data[:at] + struct.pack("<I", size) + data[at + 4 :]


GOOD = ("x/ISIC_0000001.jpg", picture(1, "image"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (packed([GOOD, ("../ISIC_0000002.jpg", b"x")]), r"'\.\./ISIC_0000002\.jpg' points outside"),
        (packed([GOOD, ("x/../../evil.txt", b"x")]), "points outside"),
        (packed([GOOD, ("/etc/ISIC_0000002.jpg", b"x")]), "points outside"),
        (packed([GOOD, ("C:/ISIC_0000002.jpg", b"x")]), "points outside"),
        (packed([GOOD, ("x\\..\\..\\evil.jpg", b"x")]), "points outside"),
        (packed([(link(), b"/etc/passwd")]), "is a symbolic link"),
        (packed([GOOD, ("y/isic_0000001.JPG", b"x"), ("z/ISIC_0000001.jpg", b"x")]), "have the same id"),
        (declared(packed([GOOD]), 120_000_000), "makes 120 MB of an archive of 0 MB; refused as a zip bomb"),
        (declared(packed([GOOD]), 4_000_000_000), "refused as a zip bomb"),
    ],
)
def test_hostile_archives_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "evil.zip"
    path.write_bytes(data)
    with LocalArchive(path) as opened, pytest.raises(UserError, match=message):
        find_members(opened, IMAGE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["evil.zip"]


@pytest.mark.parametrize("remote", [False, True])
def test_damaged_members(site: Site, tmp_path: Path, remote: bool) -> None:
    whole = packed([GOOD])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x40
    for data in (bytes(flipped), declared(whole, len(GOOD[1]) - 1), declared(whole, len(GOOD[1]) + 1)):
        path = tmp_path / "damaged.zip"
        path.write_bytes(data)
        site.files["/damaged.zip"] = data
        opened = RemoteArchive("damaged.zip", (f"{site.url}/damaged.zip",)) if remote else LocalArchive(path)
        info = find_members(opened, IMAGE)["ISIC_0000001"]
        with pytest.raises(UserError, match=r"ISIC_0000001\.jpg is damaged"):
            opened.read(info)
        if isinstance(opened, LocalArchive):
            opened.__exit__()


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", packed([GOOD])[:-30], packed([GOOD])[:100]],
    ids=["empty", "html", "without its end", "cut short"],  # an archive holds the time: no name for two processes
)
def test_what_is_no_archive(tmp_path: Path, site: Site, data: bytes) -> None:
    (tmp_path / "cut.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"cut\.zip: not a readable zip archive"):
        LocalArchive(tmp_path / "cut.zip")
    site.files["/cut.zip"] = data
    with pytest.raises(UserError, match=r"cut\.zip"):
        RemoteArchive("cut.zip", (f"{site.url}/cut.zip",), backoff=0.01)


def test_mask_pattern_ignores_case_and_superpixels() -> None:
    names = [
        "ISIC_0000001_Segmentation.png",
        "ISIC_0000001_segmentation.PNG",
        "ISIC_0000001_superpixels.png",
        "ISIC_0000001.png",
        "._ISIC_0000001_segmentation.png",
        "ISIC_0000001_segmentation.png.txt",
    ]
    assert [bool(MASK.fullmatch(name)) for name in names] == [True, True, False, False, False, False]

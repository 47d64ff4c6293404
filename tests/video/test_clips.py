"""Clips are read upright, with their own times, and what cannot be read is said in one line."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from helpers.clips import set_display_matrix, write_boxes, write_clip, write_sound
from lesionsam.errors import UserError
from lesionsam.video.boxes import read_prompts
from lesionsam.video.clips import DamagedClip, open_clip


def pictures(count: int = 5, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Noise, a frame apart by its first pixel."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (height, width, 3), dtype=np.uint8) for _ in range(count)]
    for number, image in enumerate(images):
        image[0, 0] = number
    return images


def test_frames_of_a_video_are_those_that_were_written_at_their_own_times(tmp_path: Path) -> None:
    images, times = pictures(), [0, 40, 200, 230, 700]  # a variable frame rate, milliseconds
    clip = open_clip(write_clip(tmp_path / "clip.mkv", images, times))
    assert (clip.size, clip.num_frames) == ((48, 32), 5)
    frames = list(clip.frames())
    assert [frame.number for frame in frames] == list(range(5))
    assert [round(1000 * frame.time) for frame in frames] == times
    assert all((frame.image == image).all() for frame, image in zip(frames, images, strict=True))
    late = list(clip.frames(3))
    assert [frame.number for frame in late] == [3, 4]
    assert (late[0].image == images[3]).all()
    assert late[0].time == frames[3].time


# Display matrices of a quarter turn clockwise, a half, a quarter anticlockwise, and a mirror image.
@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, 1), lambda image: image),
    ],
)
def test_a_turned_video_is_shown_upright(tmp_path: Path, matrix: tuple[int, int, int, int], shown) -> None:
    images = pictures(2)
    path = write_clip(tmp_path / "clip.mp4", images)
    set_display_matrix(path, *matrix)
    clip = open_clip(path)
    wanted = shown(images[1])
    assert clip.size == (wanted.shape[1], wanted.shape[0])
    assert (list(clip.frames())[1].image == wanted).all()


def test_the_turn_agrees_with_the_angle_that_the_decoder_states(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", pictures(1))
    set_display_matrix(path, 0, 1, -1, 0)
    with av.open(str(path)) as container:
        angle = next(container.decode(video=0)).rotation  # anticlockwise
    first = next(open_clip(path).frames()).image
    assert (first == np.rot90(pictures(1)[0], angle // 90)).all()


def test_gifs_and_folders_of_images_are_clips(tmp_path: Path) -> None:
    images = pictures(3)
    gif = open_clip(write_clip(tmp_path / "clip.gif", images, codec="gif"))
    assert [frame.image.shape for frame in gif.frames()] == [(32, 48, 3)] * 3
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    clip = open_clip(folder)
    assert [round(25 * frame.time) for frame in clip.frames(1)] == [1, 2]
    assert (next(clip.frames(2)).image == images[2]).all()
    Image.fromarray(images[0][:20]).save(folder / "009.png")
    with pytest.raises(DamagedClip, match="frame 3 is 48x20 px, the first 48x32 px"):
        list(open_clip(folder).frames())


def test_what_is_no_clip_is_said_in_one_line(tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            open_clip(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none.mp4", "no such file or folder")
    refused(write_sound(tmp_path / "sound.m4a"), r"holds no video \(audio only\)")
    (tmp_path / "text.mp4").write_text("not a clip\n" * 100)
    refused(tmp_path / "text.mp4", "cannot be decoded")
    whole = write_clip(tmp_path / "whole.mp4", pictures()).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # an mp4's index is at its end
    refused(tmp_path / "cut.mp4", "cannot be decoded")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "folder without images")


def test_boxes_are_of_frames_that_exist_and_inside_them(tmp_path: Path) -> None:
    box = np.array([4.0, 5, 30, 25])
    path = write_boxes(tmp_path / "first.csv", [(0, "a", box), (2, "b", box), (2, "a", box)])
    found = read_prompts(path, "clip.mp4", (48, 32), 5)
    assert {frame: sorted(lesions) for frame, lesions in found.items()} == {0: ["a"], 2: ["a", "b"]}
    assert found[0]["a"].big.tolist() == box.tolist()
    path.write_text("image_id,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1\nx,4,5,30,25,9,9,20,20\n")
    first = read_prompts(path, "clip.mp4", (48, 32), 5)[0]["0"]  # a table of the annotation page: of the first frame
    assert first.small.tolist() == [9, 9, 20, 20]

    def refused(rows: list[tuple[int, str, np.ndarray]], match: str) -> None:
        with pytest.raises(UserError, match=match):
            read_prompts(write_boxes(path, rows), "clip.mp4", (48, 32), 5)

    refused([(5, "a", box)], r"line 2, frame: 5 does not exist; clip\.mp4 has 5 frames, 0 to 4")
    refused([(0, "a", box), (0, "a", box)], "line 3, lesion_id: 'a' stands twice in frame 0")
    refused([(0, "a", box + 20)], "line 2, big_y1: 45 lies outside the image")
    refused([], "a row for each lesion")

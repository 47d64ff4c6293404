"""Check the arguments of a prediction, and list its images, without torch, so that a fault shows at once."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lesionsam.boxes.marks import marked_images
from lesionsam.errors import UserError
from lesionsam.types import KINDS, NONE, POINTS
from lesionsam.utils.images import IMAGE_SUFFIXES

MAX_MM_PER_PIXEL = 10.0  # a larger one is a unit mistaken for another
CLIP_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".gif")  # in any case
HALF = 0.5  # probability at which SAM's masks are cut


def needs_small(prompt: str) -> bool:
    """Return whether a prompt of this kind reads the small box."""
    return prompt != "box"


@dataclass(frozen=True)
class Source:
    """Name the source of the prompts.

    Attributes:
        kind: boxes | points (both of a CSV) | auto (none: the one lesion of an image) | everything (none: all masks).
        path: of the CSV, or None. prompt: made from the boxes, of `types.KINDS`.
        marked: image_id -> mark, of images that the annotator of the boxes marked as without a lesion or undecidable.
    """

    kind: str
    path: Path | None = None
    prompt: str = "box"
    marked: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def decoded_as(self) -> str:
        """Return the kind of `DecodeOptions`: of the prompt for boxes, `points`, or `none`."""
        return {"boxes": self.prompt, "points": POINTS}.get(self.kind, NONE)

    @classmethod
    def of(
        cls, *, boxes: Path | bool | None, points: Path | bool | None, auto: bool, everything: bool, prompt: str
    ) -> Source:
        """Return the one source that is given; boxes and points that are True are numbers, not a CSV.

        Raises:
            UserError: none, or more than one; an unknown kind of prompt.
        """
        given = {"boxes": boxes, "points": points, "auto": auto, "everything": everything}
        chosen = [name for name, value in given.items() if value]
        if len(chosen) != 1:
            raise UserError(
                f"expected one of {', '.join(f'--{name}' for name in given)}, got "
                f"{' and '.join(f'--{name}' for name in chosen) or 'none of them'}"
            )
        if prompt not in KINDS:
            raise UserError(f"--prompt: expected one of {', '.join(KINDS)}, got {prompt!r}")
        if prompt != "box" and not boxes:
            raise UserError(
                f"--prompt {prompt}: is made from boxes, and there are none with --{chosen[0]}; leave one "
                "of the two out"
            )
        value = given[chosen[0]]
        path = value if isinstance(value, Path) else None
        return cls(chosen[0], path, prompt, marked_images(path) if boxes and path else {})


def check_threshold(threshold: float) -> None:
    """Raise UserError unless the threshold is a probability strictly between 0 and 1."""
    if not 0 < threshold < 1:
        raise UserError(f"--threshold: expected a probability between 0 and 1, got {threshold:g}")


def check_options(
    source: Source,
    *,
    threshold: float,
    ensemble: int,
    zoom: bool,
    batch_size: int = 1,
    mm_per_pixel: float | None = None,
) -> None:
    """Check that these options go with prompts of this source, for `Predictor` and `predict_files` alike.

    Args:
        threshold: probability above which a pixel is lesion. ensemble: decodings of each box. zoom: whether the
            surroundings of each box are enlarged. mm_per_pixel: of all images; None: unknown.
    Raises:
        UserError: a value out of range, or one that this source does not use.
    """
    check_threshold(threshold)
    if source.kind == "everything" and threshold != HALF:
        raise UserError(
            f"--threshold {threshold:g}: automatic masks are cut at {HALF:g}, where their stability is "
            "measured; leave it out, or ask with --boxes, --points or --auto"
        )
    if ensemble < 1 or (ensemble > 1 and source.kind != "boxes"):
        raise UserError(
            f"--ensemble: expected 1 (none) or more, with --boxes only, got {ensemble} with --{source.kind}"
        )
    if zoom and (source.kind != "boxes" or source.prompt != "box"):
        raise UserError(
            "--zoom: enlarges the surroundings of a big box, so it goes with --boxes and --prompt box; --prompt "
            "box+core and --auto zoom by themselves"
        )
    if batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1 image, got {batch_size}")
    if mm_per_pixel is not None and not 0 < mm_per_pixel < MAX_MM_PER_PIXEL:
        raise UserError(
            f"--mm-per-pixel: expected a number above 0 and below {MAX_MM_PER_PIXEL:g}, got {mm_per_pixel:g}"
        )


def read_list(path: Path) -> list[str]:
    """Read the images of a list file: a file, folder or pattern per line, from the current folder; blank lines skipped.

    Raises:
        UserError: no such file, not UTF-8, or no line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--list {path}: no such file; expected one with an image per line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--list {path}: not UTF-8 text (byte {error.start}); expected an image per line") from None
    if not (names := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"--list {path}: empty; expected an image per line")
    return names


def find_images(arguments: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """List the image files named by files, folders (their own images, sorted, without subfolders) and patterns.

    Returns:
        the files, each once, in order; one line for each argument that matches none.
    """
    found: dict[Path, None] = {}
    problems = []
    for argument in map(str, arguments):
        path = Path(argument)
        if path.is_file():
            matches = [path]
            if path.suffix.lower() in CLIP_SUFFIXES:
                problems.append(f"{path}: is a clip; use `lesionsam track {path.name} --boxes BOXES.csv`")
                matches = []
        elif path.is_dir():
            matches = [each for each in sorted(path.iterdir()) if _is_image(each)]
            if not matches:
                problems.append(f"{path}: folder without images; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
        else:
            matches = [
                each
                for each in map(Path, sorted(glob.glob(argument, recursive=True)))
                if each != path and _is_image(each)
            ]
            if not matches:
                problems.append(f"{argument}: no such image file or folder, and a pattern that matches none")
        found |= dict.fromkeys(matches)
    return list(found), problems


def _is_image(path: Path) -> bool:
    """Return whether a folder's entry is an image; a broken link is one, and is named when it cannot be read."""
    return (
        path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and (path.is_file() or not path.exists())
    )

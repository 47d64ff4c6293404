"""Export weights: write them in a foreign library's format, reload them with that library, compare, and only then keep.

Every format is written into a folder beside its place, reloaded from there by the library that reads it, and compared
on some images under several prompts. Only a folder that gives the same logits and masks is moved to its place, with a
card of the comparison: a partial or wrong export never looks complete. See
docs/decisions/0024-exports-that-prove-themselves.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lesionsam
from lesionsam.errors import UserError
from lesionsam.export.compare import LOWEST_IOU, TOLERANCE, Check, Picture, Segment, compare, with_predictor
from lesionsam.export.folders import building, prepare, replace, tidy
from lesionsam.export.vanilla_sam import plain_state
from lesionsam.inference.image import ImagePredictor
from lesionsam.models import standalone
from lesionsam.models.checkpoint import load_sam, weights_metadata
from lesionsam.models.finetuned import merged_state
from lesionsam.models.sam import Sam
from lesionsam.models.sam1 import WIDTHS, Sam1
from lesionsam.utils.extras import missing_library
from lesionsam.utils.files import sha256_file, write_json_atomic, write_text_atomic
from lesionsam.utils.weights import weights_sha256

CARD, README, MODEL_CARD = "card.json", "README.md", "MODEL_CARD.md"
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Subject:
    """The model to export.

    Attributes:
        sam: on the CPU, in eval mode. weights: its file. sha256: of that file. numbers: see `Sam.architecture`.
    """

    sam: Sam
    weights: Path
    sha256: str
    numbers: Mapping[str, Any]

    @property
    def original(self) -> Sam1:
        """Return the model, which must be one of segment_anything's; UserError otherwise."""
        if not isinstance(self.sam, Sam1):
            raise UserError(f"{self.sam.name} is no model of segment_anything; export it as hf or mlflow")
        return self.sam

    @property
    def side(self) -> int:
        """Return S, the side of the model's input in pixels."""
        return self.sam.side

    def state(self) -> dict[str, torch.Tensor]:
        """Return the weights under the keys of the model's own library."""
        return plain_state(self.sam) if isinstance(self.sam, Sam1) else merged_state(self.sam)

    def num_bytes(self) -> int:
        """Return the size of the weights in float32."""
        return 4 * sum(value.numel() for value in self.sam.state_dict().values())


@dataclass(frozen=True)
class Format:
    """A format that a foreign library reads.

    Attributes:
        name: of `--format` and folder. reader: name of the library that loads it. packages: whose versions matter.
        any_sam: whether it holds every model, not segment_anything's alone.
        write: puts the model's files into an empty folder. reload: loads them from there by the foreign library.
        usage: Markdown on how to load the model and predict.
    """

    name: str
    reader: str
    packages: tuple[str, ...]
    write: Callable[[Subject, Path], None]
    reload: Callable[[Subject, Path], Segment]
    usage: Callable[[Subject], str]
    any_sam: bool = False

    def check(self, subject: Subject) -> None:
        """Raise UserError if this format cannot hold the model."""
        if not self.any_sam and not isinstance(subject.sam, Sam1):
            raise UserError(f"{subject.sam.name} is no model of segment_anything; export it as hf or mlflow")


@dataclass(frozen=True)
class ExportResult:
    """Result of one format's export.

    Attributes:
        folder: None if it failed. num_bytes: of all its files. check: None if it was not reached.
        faults: why it failed, one line each.
    """

    format: Format
    folder: Path | None
    num_bytes: int = 0
    check: Check | None = None
    faults: list[str] = field(default_factory=list)


def open_subject(weights: Path) -> Subject:
    """Load a weights file for export.

    Raises:
        UserError: see `models.checkpoint.load_sam`.
    """
    sam = load_sam(None, weights).requires_grad_(False)
    numbers = standalone.numbers_of(sam) if isinstance(sam, Sam1) else sam.architecture()
    return Subject(sam, weights, weights_sha256(weights), numbers)


def export(
    subject: Subject,
    formats: Sequence[Format],
    out: Path,
    *,
    pictures: Sequence[Picture],
    model_card: Path | None = None,
) -> list[ExportResult]:
    """Write the model in several formats below `out`, each verified and in a folder of its name.

    An earlier export of the same format is replaced only by one that passed its check.

    Args:
        model_card: a run's card; copied if it names these weights by their SHA-256.
    Returns:
        one result per format, in order; those with faults leave no folder.
    Raises:
        UserError: `out` cannot be written.
    """
    # An earlier export of a format goes only when the new one is done.
    prepare(out, (len(formats) + 1) * subject.num_bytes() + SPARE_BYTES)
    card_text = model_card.read_text(encoding="utf-8") if model_card is not None and model_card.is_file() else ""
    ours = with_predictor(ImagePredictor(subject.sam, num_cached=1))
    results = []
    for form in formats:
        with building(out, form.name) as folder:
            try:
                form.check(subject)
                form.write(subject, folder)
                check = compare(ours, form.reload(subject, folder), pictures, f"checking {form.name}")
            except UserError as error:
                results.append(ExportResult(form, None, faults=[str(error)]))
                continue
            except ModuleNotFoundError as error:
                fault = missing_library(error) or f"needs the package {error.name}; `make setup` installs it"
                results.append(ExportResult(form, None, faults=[fault]))
                continue
            if check.faults:
                results.append(ExportResult(form, None, check=check, faults=check.faults))
                continue
            tidy(folder)
            if subject.sha256 in card_text:
                write_text_atomic(folder / MODEL_CARD, card_text)
            write_text_atomic(folder / README, readme(subject, form, check))
            write_json_atomic(folder / CARD, card(subject, form, check, folder))
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            replace(folder, out / form.name)
            results.append(ExportResult(form, out / form.name, num_bytes, check))
    return results


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed versions of packages; missing ones are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def card(subject: Subject, form: Format, check: Check, folder: Path) -> dict[str, Any]:
    """Return the content of card.json: the model, its files and the comparison."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD)
    return {
        "format": form.name,
        "model": {
            "name": subject.sam.name,
            "weights": subject.weights.as_posix(),
            "weights_sha256": subject.sha256,
            "architecture": dict(subject.numbers),
        },
        "made_with": {"lesionsam": lesionsam.__version__, **versions(("torch", *form.packages))},
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in files
        },
        "check": {
            "reloaded_in": form.reader,
            **asdict(check),
            "allowed_of_largest_logit": TOLERANCE,
            "expected_iou": LOWEST_IOU,
        },
        "not_a_medical_device": True,
    }


def readme(subject: Subject, form: Format, check: Check) -> str:
    """Return README.md of a format's folder: how to load it, what it is, how it was checked. Hugging Face reads its
    header.
    """
    own = isinstance(subject.sam, Sam1) and subject.sam.name in (*WIDTHS.values(), "compact")
    stated = weights_metadata(subject.weights).get("licence") or ("apache-2.0" if own else "other")
    head = f"---\nlicense: {stated}\nlibrary_name: transformers\npipeline_tag: mask-generation\n---\n\n"
    kinds = {known: f"SAM {known} (Kirillov et al. 2023)" for known in WIDTHS.values()}
    kind = (kinds | {"compact": "the compact SAM of LesionSAM"}).get(subject.sam.name, subject.sam.name)
    used = ", ".join(f"{name} {number}" for name, number in versions(("torch", *form.packages)).items())
    return f"""{head if form.name == "hf" else ""}# {form.reader}: {kind}

Input of {subject.side} px. **Not a medical device**: nothing here has been validated for diagnosis or treatment.

{form.usage(subject).strip()}

Made with LesionSAM {lesionsam.__version__}, {used}, from weights of SHA-256 {subject.sha256}.

Loaded back and compared on {check.num_images} images with {check.num_prompts} prompts: logits differ by at most
{check.largest_difference:.2g} (the largest is {check.largest_logit:.3g}), masks at original
size agree to an IoU of at least {check.lowest_iou:.5f}.
`card.json` has the figures and the hash of every file.
"""


def print_table(results: Sequence[ExportResult]) -> None:
    """Print format, folder, size, reader and differences of each export."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 150)
    table = Table(
        "format",
        "folder",
        "MB",
        "reloaded in",
        "largest |difference| of logits",
        "lowest IoU of masks",
        box=box.SIMPLE_HEAD,
    )
    for one in results:
        figures = (
            ("", "") if one.check is None else (f"{one.check.largest_difference:.2g}", f"{one.check.lowest_iou:.5f}")
        )
        table.add_row(
            one.format.name,
            "FAILED" if one.folder is None else one.folder.as_posix(),
            f"{one.num_bytes / 1e6:.1f}" if one.folder else "",
            one.format.reader,
            *figures,
        )
    console.print(table)

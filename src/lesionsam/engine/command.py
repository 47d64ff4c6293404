"""Run one round of the data engine for `lesionsam engine`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lesionsam.annotation.catalogue import Catalogue
from lesionsam.annotation.serve import default_table
from lesionsam.config.load import Config, load_config
from lesionsam.engine.history import read_rounds
from lesionsam.engine.report import CURVE, REPORT, summary_sentences, write_report
from lesionsam.engine.round import EngineFolders, run_round, set_threads
from lesionsam.tracking.registry import resolve_model
from lesionsam.utils.locks import file_lock

PRETRAINED = Path("models/pretrained")  # where the weights stage leaves the model


def start_weights(config: Config, start: str | None) -> Path:
    """Return the weights that every round starts from.

    Raises:
        UserError: they are not there.
    """
    checkpoint = config.model.checkpoint
    return resolve_model(start or (checkpoint if Path(checkpoint).is_file() else PRETRAINED))


def run(
    images: Sequence[str],
    *,
    boxes: Path | None,
    out: Path,
    params: Path,
    start: str | None,
    training: bool,
    auto: bool,
    share: float,
    test: Path | None,
) -> None:
    """Run one round, write its report and print the next step."""
    config = load_config(params, check_files=False)
    set_threads(config)
    table = boxes or default_table(Path(images[0]))
    place = EngineFolders(
        Catalogue(images), table, out, start_weights(config, start), (test / "images", test / "masks") if test else None
    )
    with file_lock(table.parent / f".{table.name}.lock", f"annotation of {table}"):
        run_round(place, config, training=training, auto=auto, share=share)
    rounds = read_rounds(out)
    write_report(out, rounds)
    for sentence in summary_sentences(rounds):
        print(sentence)
    weights = out / f"round-{len(rounds):02d}" / "model.safetensors" if training else place.start
    review = ["lesionsam", "annotate", *images, "--boxes", str(table), "--model", str(weights)]
    print(f"report: {out / REPORT}, {out / CURVE}\nreview: {shlex.join(review)}")

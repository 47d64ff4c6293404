"""Write the data engine's report after a round: a Markdown page and the curve of quality against people's time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from lesionsam.engine.history import STAGES, Round
from lesionsam.evaluation.statistics import OBJECTIVE_PROMPTS
from lesionsam.report.charts import STYLE
from lesionsam.utils.files import write_bytes_atomic, write_text_atomic

REPORT, CURVE = "report.md", "curve.png"
COLOURS = ("#0b62a3", "#d1702a", "#2c7a3f", "#7a4fa3")
SHOWN = "objective"  # mean of ring, centre and box prompts


def write_report(folder: Path, rounds: Sequence[Round]) -> None:
    """Write report.md and curve.png of the rounds."""
    write_text_atomic(folder / REPORT, "\n".join([*_lines(rounds), ""]))
    points = {"rounds": [(each.seconds, height) for each in rounds if (height := _height(each)) is not None]}
    name = "mean IoU on the test pairs" if any(each.quality for each in rounds) else "proposals accepted unchanged"
    write_bytes_atomic(folder / CURVE, curve(points, name))


def _height(one: Round) -> float | None:
    return one.quality.get(SHOWN) if one.quality else one.accepted_share


def curve(lines: Mapping[str, Sequence[tuple[float, float]]], name: str) -> bytes:
    """Return a PNG of quality against people's hours.

    Args:
        lines: legend -> (seconds, value) in order. name: of the value.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
        axes = figure.subplots()
        for (label, points), colour in zip(lines.items(), COLOURS, strict=False):
            axes.plot(
                [seconds / 3600 for seconds, _ in points],
                [value for _, value in points],
                "o-",
                label=label,
                color=colour,
            )
        axes.set_xlabel("time of people [h]")
        axes.set_ylabel(name)
        if len(lines) > 1:
            axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _lines(rounds: Sequence[Round]) -> list[str]:
    rows = [_cells(each) for each in rounds]
    table = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)] if rows else []
    return [
        *("# The data engine", "", f"![Quality against people's time]({CURVE})", ""),
        *("| " + " | ".join(map(str, cells)) + " |" for cells in table),
        "",
        *(f"- {sentence}" for sentence in summary_sentences(rounds)),
    ]


def _cells(one: Round) -> dict[str, object]:
    """Return the row of a round: column -> content."""
    quality, share, reviewed = one.quality, one.accepted_share, sum(one.outcomes.values())
    return {
        "round": one.number,
        "stage": one.stage,
        **{name: one.sources[name] for name in ("drawn", "corrected", "accepted", "automatic")},
        "left": one.num_left,
        "people's minutes": f"{one.seconds / 60:.1f}",
        "accepted unchanged": "" if share is None else f"{100 * share:.0f} % of {reviewed}",
        "doubt that may stand": "" if one.threshold is None else f"{one.threshold:.2f}",
        "mIoU ring / centre / box": " / ".join(f"{quality[name]:.3f}" for name in OBJECTIVE_PROMPTS if quality),
    }


def summary_sentences(rounds: Sequence[Round]) -> list[str]:
    """Return sentences about the last round."""
    if not rounds:
        return []
    last = rounds[-1]
    earlier = [STAGES.index(each.stage) for each in rounds[:-1]]
    said = []
    if STAGES.index(last.stage) > max(earlier, default=0):
        said.append(f"Stage reached: {last.stage}.")
    if last.accepted_share is not None:
        said.append(
            f"{100 * last.accepted_share:.0f} % of {sum(last.outcomes.values())} reviewed proposals were "
            "accepted unchanged."
        )
    elif len(rounds) > 1:
        said.append("No proposal of the round before has been reviewed; the page's list Review has them in order.")
    if last.num_automatic and last.threshold is not None:
        said.append(f"{last.num_automatic} more of a doubt up to {last.threshold:.2f} were accepted unseen.")
    elif last.threshold is not None:
        said.append(
            f"None of the others had a doubt up to {last.threshold:.2f}, so none was accepted unseen."
            if last.auto
            else f"The others of a doubt up to {last.threshold:.2f} could have been accepted "
            "unseen; a round with --auto does that."
        )
    elif last.accepted_share is not None:
        said.append("Too few calm ones were reviewed, or too many of them changed, to accept any unseen.")
    said.append(f"{last.num_left} images are left to do.")
    return said

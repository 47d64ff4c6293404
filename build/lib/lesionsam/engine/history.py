"""What the rounds of the data engine leave: counts, outcomes, thresholds, seconds; and how far a proposal is trusted.

The threshold of automatic acceptance is calibrated on proposals that people have reviewed, and holds for the others of
the same model. It rises from the calm end in groups of a fixed size, as long as the exact binomial bound of the share
accepted unchanged stays above what is asked for; the first group that fails ends it (fixed-sequence testing, as in
Angelopoulos et al. 2021, arXiv:2110.01052). The bound takes those reviewed below a doubt for a random draw of all below
it, which the spot checks of the review queue are; what the queue's order adds leans to the doubtful side.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scipy import stats

from lesionsam.annotation.proposals import doubt
from lesionsam.annotation.records import ACCEPTED, AUTOMATIC, CANNOT_TELL, CORRECTED, OPEN, SOURCES, ImageState, rounded
from lesionsam.annotation.review import Proposals
from lesionsam.annotation.store import OUTSIDE
from lesionsam.errors import UserError
from lesionsam.utils.files import write_text_atomic

ROUNDS = "rounds.jsonl"
CONFIDENCE = 0.95  # of the bound, one-sided
FIRST, STEP = 30, 10  # reviewed proposals of the first group, and by how many each next one is larger
REJECTED = "rejected"
OUTCOMES = (ACCEPTED, CORRECTED, REJECTED)
STAGES = ("drawing", "assisted", "semi-automatic", "automatic")
HALF = 0.5  # share accepted unchanged from which on reviewing replaces drawing


@dataclass(frozen=True)
class Round:
    """One round, written when it is complete.

    Attributes:
        number: from 1. at: when it ended, ISO 8601. model: digest and threshold of the proposals' name.
        num_images: at hand. sources: how the lesions came about, image by image. seconds: of people, so far.
        outcomes: of the last round's proposals: accepted, corrected, rejected. accepted_share: unchanged, of those
        reviewed since; None before any were. threshold: of doubt, up to which the last round's proposals may stand
        unseen; None: none. num_automatic: accepted so in this round. num_left: images to do. stage: of `STAGES`; that
        of the round before where nothing was reviewed since. quality: prompt -> mean IoU on the test pairs; empty where
        there are none. auto: whether calm proposals were to be accepted.
    """

    number: int
    at: str
    model: str
    num_images: int
    sources: Mapping[str, int]
    seconds: float
    outcomes: Mapping[str, int]
    accepted_share: float | None
    threshold: float | None
    num_automatic: int
    num_left: int
    stage: str
    quality: Mapping[str, float] = field(default_factory=dict)
    auto: bool = False


def read_rounds(folder: Path) -> list[Round]:
    """The complete rounds of a folder, in order.

    Raises:
        UserError: a file that is damaged.
    """
    path = folder / ROUNDS
    if not path.exists():
        return []
    try:
        return [Round(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a list of rounds ({error}); restore it, or choose another --out") from None


def write_rounds(folder: Path, rounds: Sequence[Round]) -> None:
    """All of them, whole or not at all."""
    lines = [json.dumps(asdict(each), ensure_ascii=False, allow_nan=False) for each in rounds]
    write_text_atomic(folder / ROUNDS, "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Reviewed:
    """A proposal that somebody has decided on: its doubt, and what became of it."""

    image_id: str
    doubt: float
    outcome: str


def reviewed_since(
    states: Sequence[ImageState], proposals: Proposals, usual: Sequence[float], since: str
) -> list[Reviewed]:
    """What became of the proposals of one model; images that were drawn without one in sight or with another's, and
    those whose rows were edited outside the page, say nothing of them.

    Args:
        states: of all images. usual: see `proposals.doubt`. since: when the proposals were there, ISO 8601: what people
            did before is no answer to them.
    """
    found = []
    for state in states:
        held = proposals.found.get(state.image_id)
        if held is None or held.lesion is None or state.changed_at <= since or state.status in (OPEN, CANNOT_TELL):
            continue
        if state.changed_by == OUTSIDE or state.shown != proposals.name:
            continue  # whoever decided saw no such proposal
        sources = {lesion.source for lesion in state.lesions}
        if AUTOMATIC in sources:
            continue  # nobody looked
        ours = rounded(held.lesion.big), rounded(held.lesion.small)
        if any(lesion.proposed not in (None, ours) for lesion in state.lesions):
            continue  # another proposal was looked at
        outcome = ACCEPTED if sources == {ACCEPTED} else CORRECTED if sources & {ACCEPTED, CORRECTED} else REJECTED
        found.append(Reviewed(state.image_id, doubt(held.lesion, usual)[0], outcome))
    return found


def lower_bound(successes: int, trials: int) -> float:
    """Exact one-sided lower bound of a share (Clopper and Pearson 1934)."""
    return float(stats.beta.ppf(1 - CONFIDENCE, successes, trials - successes + 1)) if successes else 0.0


def calibrated(reviewed: Sequence[Reviewed], share: float) -> float | None:
    """The largest doubt up to which proposals may be accepted unseen; None where none may.

    Args:
        share: of them that people would accept unchanged, at least, with `CONFIDENCE`.
    """
    ordered = sorted(reviewed, key=lambda each: each.doubt)
    threshold = None
    for count in range(FIRST, len(ordered) + 1, STEP):
        accepted = sum(each.outcome == ACCEPTED for each in ordered[:count])
        if lower_bound(accepted, count) < share:
            break
        threshold = ordered[count - 1].doubt
    return threshold


def stage_of(accepted_share: float | None, num_calm: int, num_open: int) -> str:
    """drawing: no proposals judged yet; assisted: they are, most are changed; semi-automatic: at least half stand as
    they are; automatic: the calibrated threshold takes at least half of what was to do.

    Args:
        num_calm: images of those to do that the threshold takes. num_open: images to do, before it took any.
    """
    if accepted_share is None:
        return STAGES[0]
    if num_calm and num_calm >= HALF * num_open:
        return STAGES[3]
    return STAGES[2] if accepted_share >= HALF else STAGES[1]


def count_sources(states: Sequence[ImageState]) -> dict[str, int]:
    """Images with lesions by how the first of them came about."""
    counts = Counter(state.lesions[0].source for state in states if state.lesions)
    return {source: counts[source] for source in SOURCES}

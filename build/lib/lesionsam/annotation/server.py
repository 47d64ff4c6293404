"""The page's server: addresses, what they take, what they answer. Images go by keys; no address holds a path."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from lesionsam.annotation.assist import PRIOR_SIDE, agreement, prior_logits, rings, suggest_core
from lesionsam.annotation.catalogue import Catalogue, Entry, key_of
from lesionsam.annotation.pictures import LEVELS, Pictures
from lesionsam.annotation.records import MARKS, MAX_LESIONS, MAX_NAME, MAX_SECONDS, ImageState, Lesion
from lesionsam.annotation.store import Change, Conflict, Store
from lesionsam.annotation.table import outside
from lesionsam.errors import UserError

if TYPE_CHECKING:  # a page without a model need not wait for torch
    from lesionsam.annotation.model import Model
    from lesionsam.annotation.products import Products
    from lesionsam.annotation.review import Review

WEB = FilePath(__file__).parent / "web"
FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "annotate.js": ("annotate.js", "text/javascript; charset=utf-8"),
    "annotate.css": ("annotate.css", "text/css; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
JPEG = "image/jpeg"
WAIT_SECONDS = 0.08  # how long a preview waits for the model's features before it goes without

Number = Annotated[float, Field(ge=-1e7, le=1e7, allow_inf_nan=False)]
Four = Annotated[list[Number], Field(min_length=4, max_length=4)]
Key = Annotated[str, Path(pattern="^[0-9a-f]{16}$")]
Name = Annotated[str, Field(max_length=MAX_NAME)]


class Strict(BaseModel):
    """What a page sends: nothing unknown."""

    model_config = ConfigDict(extra="forbid")


class SentLesion(Strict):
    """A lesion as the page has it; `proposed` where it began as a proposal of the model."""

    id: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    big: Four
    small: Four
    core: Annotated[str, Field(pattern="^(drawn|suggested)$")] = "drawn"
    proposed: Annotated[list[Four], Field(min_length=2, max_length=2)] | None = None
    agreed: bool = False
    seconds: Annotated[float, Field(ge=0, le=MAX_SECONDS)] = 0.0


class SentChange(Strict):
    """A change of one image."""

    base: Annotated[int, Field(ge=0)]
    change: Annotated[str, Field(pattern="^[0-9A-Za-z-]{1,64}$")]
    who: Name = ""
    mark: Annotated[str, Field(pattern=f"^({'|'.join(MARKS)})$")] = ""
    lesions: Annotated[list[SentLesion], Field(max_length=MAX_LESIONS)] = []
    seconds: Annotated[float, Field(ge=0, le=MAX_SECONDS)] = 0.0
    shown: bool = False  # whether what is proposed was in sight


class SentBoxes(Strict):
    """Boxes whose masks are wanted; without a small box, a core is wanted."""

    id: Name = "0"
    big: Four
    small: Four | None = None
    others: Annotated[list[Four], Field(max_length=MAX_LESIONS)] = []


class SentKeys(Strict):
    """Images that will be looked at next."""

    keys: Annotated[list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]], Field(max_length=8)]


@dataclass
class Desk:
    """Everything that the addresses speak of.

    Attributes:
        who: name of the annotator until the page says another. title: of the page.
        review, products: with a model, what it proposes and the masks it writes.
    """

    catalogue: Catalogue
    store: Store
    pictures: Pictures
    model: Model | None
    who: str
    title: str
    review: Review | None = None
    products: Products | None = None

    def busy(self) -> None:
        """Somebody is drawing: what can wait waits."""
        for part in (self.review, self.products):
            if part is not None:
                part.busy()

    def entry(self, key: str) -> Entry:
        """The image of a key.

        Raises:
            HTTPException: there is none, or one that cannot be annotated.
        """
        entry = self.catalogue.by_key.get(key)
        if entry is None:
            raise HTTPException(404, "no such image; was the page opened on another folder? Load it again")
        if entry.fault:
            raise UserError(entry.fault)
        return entry

    def summary(self, image_id: str) -> list[Any]:
        """What the list shows of an image: status, number of lesions, revision."""
        state = self.store.state(image_id)
        return [state.status, len(state.lesions), state.revision]


def shown(error: UserError | OSError, path: FilePath | None = None) -> str:
    """An error as a sentence without the folders of this machine in it.

    Args:
        path: of the file that it may name.
    """
    if isinstance(error, OSError):
        where = FilePath(str(error.filename)).name if error.filename else "the table of boxes"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{where} cannot be written: the disk is full; free some space"
        return f"{where} cannot be read or written: {error.strerror or error}"
    return str(error) if path is None else str(error).replace(str(path), path.name)


def create_app(desk: Desk) -> FastAPI:
    """The application; who may speak to it is `gate.Gate`'s business."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(UserError)
    def _refused(request: Request, error: UserError) -> Response:
        entry = desk.catalogue.by_key.get(str(request.path_params.get("key")))
        return JSONResponse({"problem": shown(error, entry.path if entry else None)}, 422)

    @app.exception_handler(RequestValidationError)
    def _malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"problem": f"{place}: {first['msg']}; load the page again"}, 422)

    @app.exception_handler(HTTPException)
    def _other(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"problem": error.detail}, error.status_code)

    @app.exception_handler(OSError)
    def _disk(_: Request, error: OSError) -> Response:
        return JSONResponse({"problem": shown(error)}, 503)

    for address in FILES:
        app.get(f"/{address}")(_file_answer(address))
    _add_images(app, desk)
    _add_help(app, desk)
    return app


@cache
def _file(name: str) -> bytes:
    return (WEB / name).read_bytes()


def _file_answer(address: str) -> Callable[[], Response]:
    def answer() -> Response:
        name, kind = FILES[address]
        return Response(_file(name), media_type=kind)

    return answer


def _add_images(app: FastAPI, desk: Desk) -> None:
    """Listing, looking, saving."""

    @app.get("/api/session")
    def session() -> Response:
        problem = _table_problem(desk.store)
        images = [
            [entry.key, entry.image_id, *(desk.summary(entry.image_id) if not entry.fault else ("faulty", 0, 0))]
            for entry in desk.catalogue.entries
        ]
        return JSONResponse(
            {
                "who": desk.who,
                "title": desk.title,
                "table": desk.store.path.name,
                "clock": desk.store.clock,
                "store": key_of(str(desk.store.path.resolve())),
                "model": desk.model and {"name": desk.model.name, "threshold": desk.model.threshold},
                "images": images,
                "problem": problem,
            }
        )

    @app.get("/api/changes")
    def changes(clock: Annotated[int, Query(ge=0)]) -> Response:
        problem = _table_problem(desk.store)
        now, ids = desk.store.changes_since(clock)
        entries = (desk.catalogue.by_id.get(image_id) for image_id in ids)
        changed = [[entry.key, *desk.summary(entry.image_id)] for entry in entries if entry is not None]
        return JSONResponse(
            {
                "clock": now,
                "changed": changed,
                "problem": problem or (desk.products.problem if desk.products else ""),
                "proposed": desk.review.count if desk.review else 0,
            }
        )

    @app.get("/api/images/{key}")
    def image(key: Key) -> Response:
        entry = desk.entry(key)
        width, height = desk.pictures.size(entry)
        state = desk.store.state(entry.image_id)
        wrong = [lesion.lesion_id for lesion in state.lesions if outside(lesion.boxes, width, height)]
        problem = (
            f"lesion {wrong[0]} of {desk.store.path.name} lies outside this image of {width}x{height} px; "
            "boxes are pixels of the upright image"
            if wrong
            else ""
        )
        return JSONResponse(
            {
                "width": width,
                "height": height,
                "state": _as_sent(state),
                "problem": problem,
                "proposal": desk.review.proposal(entry) if desk.review else None,
            }
        )

    @app.get("/api/images/{key}/picture")
    def picture(key: Key, level: Annotated[str, Query(pattern=f"^({'|'.join(LEVELS)})$")] = "view") -> Response:
        return Response(desk.pictures.jpeg(desk.entry(key), level), media_type=JPEG)

    @app.put("/api/images/{key}")
    def save(key: Key, sent: SentChange) -> Response:
        entry = desk.entry(key)
        desk.busy()
        size = desk.pictures.size(entry)
        if problem := _table_problem(desk.store):
            return JSONResponse({"problem": problem}, 503)
        try:
            state = desk.store.save(entry.image_id, _change(desk, entry, sent), size)
        except Conflict as conflict:
            return JSONResponse({"problem": str(conflict), "state": _as_sent(conflict.state)}, 409)
        if desk.products is not None:
            desk.products.note(entry.image_id)
        return JSONResponse({"state": _as_sent(state), "clock": desk.store.clock})

    @app.get("/api/queue")
    def queue() -> Response:
        review = desk.review
        return JSONResponse({"images": review.queue() if review else [], "left": review.left() if review else 0})


def _table_problem(store: Store) -> str:
    """What is wrong with the table as it was edited by hand, or nothing."""
    try:
        store.refresh()
    except (UserError, OSError) as error:
        return f"{shown(error, store.path)}. Nothing is written until that is right; what you draw is kept here."
    return ""


def _as_sent(state: ImageState) -> dict[str, Any]:
    """A state as the page gets it."""
    return {
        "revision": state.revision,
        "mark": state.mark,
        "status": state.status,
        "by": state.changed_by,
        "at": state.changed_at,
        "change": state.change,
        "seconds": state.all_seconds,
        "lesions": [
            {
                "id": each.lesion_id,
                "big": each.big,
                "small": each.small,
                "core": each.core,
                "source": each.source,
                "seconds": each.seconds,
                "by": each.changed_by,
                "proposed": each.proposed,
            }
            for each in state.lesions
        ],
    }


def _change(desk: Desk, entry: Entry, sent: SentChange) -> Change:
    """What a page sent, as the store takes it; a lesion is a proposal's only where that was really proposed."""
    known = desk.review.boxes(entry) if desk.review else None
    lesions = []
    for each in sent.lesions:
        check_text(each.id, "lesion id")
        is_proposed = (
            known is not None
            and each.proposed is not None
            and (_box(each.proposed[0]), _box(each.proposed[1])) == known
        )
        lesion = Lesion(
            each.id, _box(each.big), _box(each.small), core=each.core, source="accepted" if each.agreed else "drawn"
        )
        if is_proposed and desk.model is not None:
            lesion = replace(lesion, proposed=known, model=desk.model.digest, threshold=desk.model.threshold)
        lesions.append(lesion)
    if len({each.id for each in sent.lesions}) != len(sent.lesions):
        raise UserError("two lesions of one image have the same id; load the page again")
    check_text(sent.who, "name")
    seconds = {each.id: each.seconds for each in sent.lesions if each.seconds} | ({"": sent.seconds})
    return Change(
        sent.base,
        sent.who.strip() or desk.who,
        sent.change,
        sent.mark,
        tuple(lesions),
        seconds,
        shown=desk.model.label if sent.shown and known and desk.model else "",
    )


def check_text(text: str, what: str) -> None:
    """Refuse what cannot stand in one field of a table.

    Raises:
        UserError: line breaks, control characters, spaces at an end, half characters.
    """
    if not text.isprintable() or text != text.strip() or any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        raise UserError(f"{what}: expected plain text without line breaks, got {text!a}")


def _box(values: list[float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = values
    return x0, y0, x1, y1


def _add_help(app: FastAPI, desk: Desk) -> None:
    """Masks that follow the boxes, cores to begin with, images made ready ahead."""

    @app.post("/api/images/{key}/preview")
    def preview(key: Key, sent: SentBoxes) -> Response:
        entry = desk.entry(key)
        desk.busy()
        size = desk.pictures.size(entry)
        small_picture = desk.pictures.small(entry, PRIOR_SIDE)
        big, others = _box(sent.big), [_box(box) for box in sent.others]
        _check_order(big)
        small = _box(sent.small) if sent.small else suggest_core(small_picture, size, big, others)
        _check_order(small)
        return JSONResponse({"small": small, **preview_of(desk, entry, sent.id, big, small, others)})

    @app.post("/api/prepare")
    def prepare(sent: SentKeys) -> Response:
        found = [entry for key in sent.keys if (entry := desk.catalogue.by_key.get(key)) and not entry.fault]
        if desk.model is not None:
            for entry in found:
                desk.model.prepare(entry)
        if desk.review is not None:
            desk.review.soon(found)
        return JSONResponse({})


def _check_order(box: tuple[float, float, float, float]) -> None:
    if box[2] - box[0] <= 0 or box[3] - box[1] <= 0:
        raise UserError(f"box: expected XYXY with x0 < x1 and y0 < y1, got {list(box)}")


def preview_of(desk: Desk, entry: Entry, lesion_id: str, big: tuple, small: tuple, others: list) -> dict[str, Any]:
    """Outlines of the box prior and of the model for two boxes, and how far they agree."""
    size = desk.pictures.size(entry)
    picture = desk.pictures.small(entry, PRIOR_SIDE)
    prior = prior_logits(picture, size, big, small, others)
    step = size[0] / prior.shape[1], size[1] / prior.shape[0]
    found: dict[str, Any] = {"prior": {"rings": rings(prior, step, size)}, "model": None, "pending": False}
    if desk.model is None:
        return found
    features = desk.model.features_soon(entry, WAIT_SECONDS)
    if features is None:
        return found | {"pending": True}
    answer = desk.model.answer(features, size, f"{entry.image_id}/{lesion_id}", big, small)
    found["model"] = {
        "rings": rings(answer.low_res, answer.step, size, desk.model.level),
        "iou": round(answer.predicted_iou, 3),
        "entropy": round(answer.entropy, 3),
    }
    found["agreement"] = round(agreement(answer.low_res, desk.model.level, prior), 3)
    return found

"""Serve the page's HTTP API. Addresses name images by key and hold no path."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from lesionsam.annotation.assist import agreement, prior_logits, rings, suggest_core
from lesionsam.annotation.catalogue import Catalogue, Entry, key_of
from lesionsam.annotation.pictures import LEVELS, Pictures
from lesionsam.annotation.records import MARKS, MAX_LESIONS, MAX_NAME, MAX_SECONDS, Box, ImageState, Lesion
from lesionsam.annotation.store import Change, Conflict, Store
from lesionsam.annotation.table import outside
from lesionsam.data.frames import PRIOR_SIDE
from lesionsam.errors import UserError

if TYPE_CHECKING:  # a page without a model need not wait for torch
    from lesionsam.annotation.model import Model
    from lesionsam.annotation.review import Review

WEB = FilePath(__file__).parent / "web"
JPEG = "image/jpeg"
WAIT_SECONDS = 0.08  # how long a preview waits for the model's features before it goes without


def check_order(box: Box) -> Box:
    """Return a box; ValueError unless it has an area."""
    if box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(f"expected XYXY with x0 < x1 and y0 < y1, got {list(box)}")
    return box


Number = Annotated[float, Field(ge=-1e7, le=1e7, allow_inf_nan=False)]
Four = tuple[Number, Number, Number, Number]
Ordered = Annotated[Four, AfterValidator(check_order)]
Key = Annotated[str, Path(pattern="^[0-9a-f]{16}$")]
Name = Annotated[str, Field(max_length=MAX_NAME)]


class Strict(BaseModel):
    """A request body; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class SentLesion(Strict):
    """A lesion of the page; `proposed` where it began as a proposal of the model."""

    id: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    big: Four
    small: Four
    core: Annotated[str, Field(pattern="^(drawn|suggested)$")] = "drawn"
    proposed: tuple[Four, Four] | None = None
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
    """Boxes to preview; without a core, one is suggested."""

    id: Name = "0"
    big: Ordered
    small: Ordered | None = None
    others: Annotated[list[Four], Field(max_length=MAX_LESIONS)] = []


class SentKeys(Strict):
    """Images to prepare, as they will be opened next."""

    keys: Annotated[list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]], Field(max_length=8)]


@dataclass
class Desk:
    """The state that the handlers share.

    Attributes:
        who: name of the annotator until the page says another. title: of the page.
        review: with a model, what it proposes.
    """

    catalogue: Catalogue
    store: Store
    pictures: Pictures
    model: Model | None
    who: str
    title: str
    review: Review | None = None

    def busy(self) -> None:
        """Pause background work, as an annotator is drawing."""
        if self.review is not None:
            self.review.busy()

    def entry(self, key: str) -> Entry:
        """Return the image of a key.

        Raises:
            HTTPException: there is none, or one that cannot be annotated.
        """
        entry = self.catalogue.by_key.get(key)
        if entry is None:
            raise HTTPException(404, "no such image; was the page opened on another folder? Load it again")
        if entry.fault:
            raise UserError(entry.fault)
        return entry

    def summary(self, entry: Entry) -> list[Any]:
        """Return what the list shows of an image: status, number of lesions, revision."""
        state = self.store.state(entry.image_id)
        return ["faulty", 0, 0] if entry.fault else [state.status, len(state.lesions), state.revision]


def shown(error: UserError | OSError, path: FilePath | None = None) -> str:
    """Return an error's message without the server's folders; `path` is of the file that it may name."""
    if isinstance(error, OSError):
        where = FilePath(str(error.filename)).name if error.filename else "the table of boxes"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{where} cannot be written: the disk is full; free some space"
        return f"{where} cannot be read or written: {error.strerror or error}"
    return str(error) if path is None else str(error).replace(str(path), path.name)


def create_app(desk: Desk) -> FastAPI:
    """Build the application; `gate.Gate` guards access to it."""
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

    _add_images(app, desk)
    _add_help(app, desk)
    app.mount("/", StaticFiles(directory=WEB, html=True))
    return app


def _add_images(app: FastAPI, desk: Desk) -> None:
    """Add the routes that list, show and save images."""

    @app.get("/api/session")
    def session() -> Response:
        problem, store = _table_problem(desk.store), desk.store
        return JSONResponse(
            {
                "who": desk.who,
                "title": desk.title,
                "table": store.path.name,
                "clock": store.clock,
                "store": key_of(str(store.path.resolve())),
                "model": desk.model and {"name": desk.model.name, "threshold": desk.model.threshold},
                "images": [[each.key, each.image_id, *desk.summary(each)] for each in desk.catalogue.entries],
                "problem": problem,
            }
        )

    @app.get("/api/changes")
    def changes(clock: Annotated[int, Query(ge=0)]) -> Response:
        problem = _table_problem(desk.store)
        now, ids = desk.store.changes_since(clock)
        entries = (desk.catalogue.by_id.get(image_id) for image_id in ids)
        changed = [[entry.key, *desk.summary(entry)] for entry in entries if entry is not None]
        proposed = desk.review.count if desk.review else 0
        return JSONResponse({"clock": now, "changed": changed, "problem": problem, "proposed": proposed})

    @app.get("/api/images/{key}")
    def image(key: Key) -> Response:
        entry = desk.entry(key)
        width, height = desk.pictures.size(entry)
        state = desk.store.state(entry.image_id)
        problem = ""
        if wrong := [lesion.lesion_id for lesion in state.lesions if outside(lesion.boxes, width, height)]:
            problem = (
                f"lesion {wrong[0]} of {desk.store.path.name} lies outside this image of {width}x{height} px; "
                "boxes are pixels of the upright image"
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
        return JSONResponse({"state": _as_sent(state), "clock": desk.store.clock})

    @app.get("/api/queue")
    def queue() -> Response:
        review = desk.review
        return JSONResponse({"images": review.queue() if review else [], "left": review.left() if review else 0})


def _table_problem(store: Store) -> str:
    """Return what is wrong with the table after an edit by hand, or an empty text."""
    try:
        store.refresh()
    except (UserError, OSError) as error:
        return f"{shown(error, store.path)}. Nothing is written until that is right; what you draw is kept here."
    return ""


def _as_sent(state: ImageState) -> dict[str, Any]:
    """Return a state as the page receives it."""
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
    """Convert a request to a change of the store; `proposed` is kept only where it equals the model's proposal."""
    known = desk.review.boxes(entry) if desk.review else None
    lesions = []
    for each in sent.lesions:
        check_text(each.id, "lesion id")
        lesion = Lesion(each.id, each.big, each.small, core=each.core, source="accepted" if each.agreed else "drawn")
        if known is not None and each.proposed == known and desk.model is not None:
            lesion = replace(lesion, proposed=known, model=desk.model.digest, threshold=desk.model.threshold)
        lesions.append(lesion)
    if len({each.id for each in sent.lesions}) != len(sent.lesions):
        raise UserError("two lesions of one image have the same id; load the page again")
    check_text(sent.who, "name")
    seconds = {each.id: each.seconds for each in sent.lesions if each.seconds} | ({"": sent.seconds})
    label = desk.model.label if sent.shown and known and desk.model else ""
    return Change(sent.base, sent.who or desk.who, sent.change, sent.mark, tuple(lesions), seconds, shown=label)


def check_text(text: str, what: str) -> None:
    """Refuse what cannot stand in one field of a table.

    Raises:
        UserError: line breaks, control characters, spaces at an end, half characters.
    """
    if not text.isprintable() or text != text.strip():
        raise UserError(f"{what}: expected plain text without line breaks, got {text!a}")


def _add_help(app: FastAPI, desk: Desk) -> None:
    """Add the routes that preview masks, suggest cores and prepare images."""

    @app.post("/api/images/{key}/preview")
    def preview(key: Key, sent: SentBoxes) -> Response:
        entry = desk.entry(key)
        desk.busy()
        size = desk.pictures.size(entry)
        small_picture = desk.pictures.small(entry, PRIOR_SIDE)
        small = sent.small or suggest_core(small_picture, size, sent.big, sent.others)
        return JSONResponse({"small": small, **preview_of(desk, entry, sent.big, small, sent.others)})

    @app.post("/api/prepare")
    def prepare(sent: SentKeys) -> Response:
        found = [entry for key in sent.keys if (entry := desk.catalogue.by_key.get(key)) and not entry.fault]
        if desk.model is not None:
            for entry in found:
                desk.model.prepare(entry)
        if desk.review is not None:
            desk.review.soon(found)
        return JSONResponse({})


def preview_of(desk: Desk, entry: Entry, big: tuple, small: tuple, others: list) -> dict[str, Any]:
    """Return outlines of the box prior's and the model's mask for two boxes, and their IoU."""
    size = desk.pictures.size(entry)
    picture = desk.pictures.small(entry, PRIOR_SIDE)
    prior = prior_logits(picture, size, big, small, others)
    step = size[0] / prior.shape[1], size[1] / prior.shape[0]
    found: dict[str, Any] = {"prior": {"rings": rings(prior, step, size)}, "model": None, "pending": False}
    if desk.model is None:
        return found
    if (features := desk.model.features_soon(entry, WAIT_SECONDS)) is None:
        return found | {"pending": True}
    answer = desk.model.answer(features, size, big, small, others)
    found["model"] = {
        "rings": rings(answer.low_res, answer.step, size, desk.model.level),
        "iou": round(answer.predicted_iou, 3),
        "entropy": round(answer.entropy, 3),
    }
    found["agreement"] = round(agreement(answer.alone, desk.model.level, prior), 3)
    return found

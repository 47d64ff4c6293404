"""Answer the HTTP calls that Label Studio makes to an ML backend: health, setup, predict, webhook.

A rectangle or key points of the smart tools are prompts; without any, the one lesion of the image is predicted. The
answer is a brush region, or a polygon for each piece, by what the project's labelling interface offers.
"""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from lesionsam.errors import UserError
from lesionsam.formats.brush import encode_brush
from lesionsam.formats.geojson import polygons_of
from lesionsam.formats.safe import number, parse_xml
from lesionsam.inference.prediction import Prediction
from lesionsam.inference.predictor import Predictor
from lesionsam.integrations.addresses import ImageSources

CONTROLS = {"BrushLabels": "brushlabels", "PolygonLabels": "polygonlabels"}  # tag -> type of its regions
EXPECTED = "Label Studio's labelling interface"
MAX_TASKS = 10_000


@dataclass(frozen=True)
class Control:
    """Name the places of masks in a project's labelling interface.

    Attributes:
        kind: of `CONTROLS`' values. name, image: of the control's tag and of its image's. key: of the image's address
            in a task's data. labels: that the control offers.
    """

    kind: str
    name: str
    image: str
    key: str
    labels: tuple[str, ...]

    @classmethod
    def of(cls, interface: str) -> Control:
        """Return the first control for masks of images.

        Raises:
            UserError: not XML, or no such control.
        """
        root = parse_xml(interface.encode(), "label_config", EXPECTED)
        images = {tag.get("name", ""): tag.get("value", "") for tag in root.iter("Image")}
        for tag in root.iter():
            if tag.tag in CONTROLS and (image := tag.get("toName", "")) in images:
                labels = tuple(label.get("value", "") for label in tag.iter("Label"))
                return cls(CONTROLS[tag.tag], tag.get("name", ""), image, images[image].lstrip("$"), labels)
        raise UserError(f"label_config: expected {' or '.join(CONTROLS)} for an Image, found neither")


class SetUp(BaseModel):
    """Hold what Label Studio sends when a project is connected; its host name and token are not used."""

    interface: Annotated[str, Field(alias="schema", max_length=1 << 20)]


class Region(BaseModel):
    """A region that a person drew with a smart tool; places are percent of the image's sides."""

    type: str = ""
    value: dict[str, Any] = {}
    is_positive: bool = True

    @property
    def labels(self) -> list[str]:
        """Return the labels that the person chose."""
        found = self.value.get(self.type)
        return [str(label) for label in found] if isinstance(found, list) else []


class Context(BaseModel):
    """Hold what a person drew with smart tools."""

    result: list[Region] = []


class Params(BaseModel):
    """Parameters of a prediction."""

    context: Context | None = None


class Task(BaseModel):
    """An image to predict."""

    id: int | str = ""
    data: dict[str, Any]


class SentTasks(BaseModel):
    """Hold what Label Studio sends to predict."""

    tasks: Annotated[list[Task], Field(max_length=MAX_TASKS)]
    label_config: Annotated[str, Field(max_length=1 << 20)]
    params: Params | None = None


class Backend:
    """A model, and the images that it may read.

    Args:
        version: of the model, shown in Label Studio. label: given to masks where the person chose none that the control
            offers, if it is one of its labels; else the control's first label.
    """

    def __init__(self, predictor: Predictor, images: ImageSources, version: str, label: str = "lesion") -> None:
        self.predictor, self.images, self.version, self.label = predictor, images, version, label
        self._turn = threading.Lock()  # the predictor serves one call at a time

    def predict(self, task: Task, control: Control, drawn: Sequence[Region]) -> dict[str, Any]:
        """Return the prediction of a task.

        Args:
            drawn: regions of smart tools.
        Raises:
            UserError: an image that cannot be read, or a prompt that does not fit it.
        """
        address = task.data.get(control.key)
        if not isinstance(address, str) or not address:
            raise UserError(f"task {task.id}: data.{control.key}: expected the image's address")
        image = self.images.read(address, task.id)
        prompt, label = prompt_of(drawn, image.shape[1], image.shape[0]), self._label(drawn, control)
        with self._turn:
            found = self.predictor.predict(image, **prompt)
        regions = [region for one in found for region in _regions(one, control, label)]
        score = float(np.clip(np.mean([one.predicted_iou for one in found]), 0, 1))
        return {"result": regions, "score": score, "model_version": self.version}

    def _label(self, drawn: Sequence[Region], control: Control) -> str:
        wanted = [*(label for region in drawn for label in region.labels), self.label]
        return next((label for label in wanted if label in control.labels), (*control.labels, self.label)[0])


def prompt_of(drawn: Sequence[Region], width: int, height: int) -> dict[str, Any]:
    """Return regions of smart tools as arguments of `Predictor.predict`: boxes, else points, else auto.

    Raises:
        UserError: a turned rectangle, or no number where one is expected.
    """
    boxes, points, labels = [], [], []
    for region in drawn:
        value = region.value
        if region.type not in ("rectanglelabels", "rectangle", "keypointlabels", "keypoint"):
            continue
        x, y = (number(value.get(name), f"context: {name}") for name in "xy")
        if region.type.startswith("keypoint"):
            points.append((x * width / 100, y * height / 100))
            labels.append(int(region.is_positive))
            continue
        w, h = (number(value.get(name), f"context: {name}") for name in ("width", "height"))
        if number(value.get("rotation", 0), "context: rotation"):
            raise UserError("context: the rectangle is turned; draw it upright")
        boxes.append((x * width / 100, y * height / 100, (x + w) * width / 100, (y + h) * height / 100))
    if boxes:
        return {"boxes": np.clip(boxes, 0, [width, height, width, height])}
    return {"points": np.array(points), "labels": labels} if points else {"auto": True}


def _regions(prediction: Prediction, control: Control, label: str) -> list[dict[str, Any]]:
    """Return a mask as a brush region, or as a polygon for each piece; nothing for an empty mask."""
    height, width = prediction.mask.shape
    if not prediction.area:
        return []
    if control.kind == "brushlabels":
        values: list[dict[str, Any]] = [{"format": "rle", "rle": encode_brush(prediction.mask)}]
    else:  # Label Studio's polygons have no holes
        percent = 100 / np.array([width, height])
        rings = [outer for outer, *_ in polygons_of(prediction.mask)]
        values = [{"points": (ring[:-1] * percent).tolist(), "closed": True} for ring in rings]
    return [
        {
            "id": secrets.token_hex(5),
            "type": control.kind,
            "from_name": control.name,
            "to_name": control.image,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": float(np.clip(prediction.predicted_iou, 0, 1)),
            "value": value | {control.kind: [label]},
        }
        for value in values
    ]


def create_app(backend: Backend) -> FastAPI:
    """Build the application; `integrations.serve.Guard` guards access to it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(UserError)
    def _refused(_: object, error: UserError) -> Response:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    def _malformed(_: object, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)

    @app.get("/")
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "UP", "model_class": "LesionSAM", "model_version": backend.version}

    @app.get("/versions")
    def versions() -> dict[str, list[str]]:
        return {"versions": [backend.version]}

    @app.post("/setup")
    def setup(sent: SetUp) -> dict[str, str]:
        Control.of(sent.interface)  # a project without a place for masks is refused now, not at its first image
        return {"model_version": backend.version}

    @app.post("/predict")
    def predict(sent: SentTasks) -> dict[str, list[dict[str, Any]]]:
        control = Control.of(sent.label_config)
        drawn = sent.params.context.result if sent.params and sent.params.context else []
        results, faults = [], []
        for task in sent.tasks:
            try:
                results.append(backend.predict(task, control, drawn))
            except UserError as error:  # the other tasks still get theirs
                faults.append(error)
                print(f"error: task {task.id}: {error}", file=sys.stderr, flush=True)
                results.append({"result": [], "score": 0.0, "model_version": backend.version})
        if faults and len(faults) == len(sent.tasks):
            raise faults[0]
        return {"results": results}

    @app.post("/webhook")
    def webhook() -> dict[str, str]:
        return {"status": "ignored: this backend does not train"}

    return app

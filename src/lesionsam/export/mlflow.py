"""Export the model as an MLflow pyfunc with its code, signature, example and loosely pinned packages."""

from __future__ import annotations

import base64
import io
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import lesionsam
from lesionsam.export.base import Format, Subject
from lesionsam.export.compare import Prompt, PromptOutput, Segment
from lesionsam.models.sam2 import Sam2
from lesionsam.tracking.mlflow_upload import ENVIRONMENT
from lesionsam.utils.files import write_text_atomic

SCRIPT = Path("export/mlflow_served.py")
# What the code in the model imports; the lock file has the exact versions that were tested.
REQUIREMENTS = (
    "mlflow>=3.5,<4",
    "torch>=2.11",
    "torchvision",
    "segment-anything==1.0",
    "safetensors>=0.5",
    "filelock>=3.30",
    "numpy>=2",
    "pandas>=2.2",
    "pillow>=11",
    "scipy",
    "matplotlib",
    "scikit-image",
    "rich",
)


OF_TRANSFORMERS = ("transformers>=5,<6", "timm>=1.0.20")  # for SAM 2.1, EdgeTAM and SAM 3


def png_base64(image: np.ndarray) -> str:
    """Encode an image, (H, W, 3) uint8, as a PNG in base64, the served model's input."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write(subject: Subject, folder: Path) -> None:
    """Write MLmodel, the weights file as it is, the package's code and an example request."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Schema

    # MLflow rejects whole numbers for doubles inside lists, and JSON has one kind of number: the model checks itself.
    signature = ModelSignature(
        Schema(
            [
                ColSpec(DataType.string, "image"),
                *(ColSpec(AnyType(), name, required=False) for name in ("boxes", "points", "labels")),
            ]
        ),
        Schema([ColSpec(Array(DataType.string), "masks"), ColSpec(Array(DataType.double), "predicted_iou")]),
    )
    shades = np.linspace(40, 200, 48, dtype=np.uint8)
    shown = np.repeat(np.minimum.outer(shades, shades[:40])[..., None], 3, axis=2)  # (48, 40, 3)
    example = pd.DataFrame({"image": [png_base64(shown)], "boxes": [[[4.0, 4.0, 36.0, 44.0]]]})
    package = Path(lesionsam.__file__).parent
    chatter = logging.getLogger("mlflow")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of MLflow about type hints and its own insides
            mlflow.pyfunc.save_model(
                str(folder),
                python_model=str(package / SCRIPT),
                code_paths=[str(package)],
                artifacts={"weights": str(subject.weights.resolve())},
                signature=signature,
                input_example=example,
                pip_requirements=[*REQUIREMENTS, *(OF_TRANSFORMERS if isinstance(subject.sam, Sam2) else ())],
            )
    finally:
        chatter.setLevel(level)
    # MLflow records the source paths; only the copies are loaded, and the paths mean nothing elsewhere.
    text = (folder / "MLmodel").read_text(encoding="utf-8")
    for path in (package / SCRIPT, subject.weights.resolve()):
        text = text.replace(str(path), path.name)
    write_text_atomic(folder / "MLmodel", text)


def reload(subject: Subject, folder: Path) -> Segment:
    """Load with `mlflow.pyfunc.load_model`; masks come through the signature and PNGs, logits from the inner model."""
    import mlflow
    import pandas as pd
    from PIL import Image

    model = mlflow.pyfunc.load_model(str(folder))
    inner = model.unwrap_python_model()

    def segment(image: np.ndarray, prompts: Sequence[Prompt]) -> list[PromptOutput]:
        picture = png_base64(image)
        rows = [
            {"image": picture}
            | ({} if prompt.box is None else {"boxes": [np.asarray(prompt.box, float).tolist()]})
            | ({} if prompt.points is None else {"points": np.asarray(prompt.points, float).tolist()})
            | ({} if prompt.labels is None else {"labels": np.asarray(prompt.labels, float).tolist()})
            for prompt in prompts
        ]
        outputs = []
        for prompt, row in zip(prompts, rows, strict=True):
            found = model.predict(pd.DataFrame([row])).to_dict("records")[0]
            with Image.open(io.BytesIO(base64.b64decode(found["masks"][0]))) as png:
                mask = np.asarray(png) > 0
            ((_, low_res, _),) = inner.predict_prompts(image, [prompt.box], prompt.points, prompt.labels)
            outputs.append(PromptOutput(low_res, mask, float(found["predicted_iou"][0])))
        return outputs

    return segment


def _usage(subject: Subject) -> str:
    return """```
mlflow models serve -m . --env-manager local --host 127.0.0.1 --port 5001      # in this folder

python - <<'EOF' | curl -s http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' -d @-
import base64, json
image = base64.b64encode(open("image.jpg", "rb").read()).decode()
print(json.dumps({"dataframe_records": [{"image": image, "boxes": [[40, 30, 200, 180]]}]}))
EOF
```

One row is one image; every box (x0, y0, x1, y1, pixels) gives one mask. `points` ([x, y]) with `labels` (1 lesion, 0
not) may take its place, or be joined to one box. The answer holds, per row, `masks` (PNG in base64, 0 and 255) and
`predicted_iou`. `serving_input_example.json` is a whole request. Without `--env-manager local` MLflow makes an
environment from `requirements.txt`.

**Only serve a model that you trust**: the folder holds code, and serving runs it.
"""


FORMAT = Format("mlflow", "mlflow.pyfunc", ("mlflow", "segment-anything"), write, reload, _usage, any_sam=True)

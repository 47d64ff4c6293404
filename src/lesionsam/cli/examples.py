"""One example of each command, shown at the end of its help."""

from __future__ import annotations

EXAMPLES = {
    "prepare": "lesionsam prepare",
    "train": "lesionsam train --seeds 3",
    "evaluate": "lesionsam evaluate",
    "report": "lesionsam report",
    "annotate": "lesionsam annotate own/images --boxes own/boxes.csv",
    "engine": "lesionsam engine own/images --boxes own/boxes.csv --out engine",
    "predict": "lesionsam predict photos --boxes boxes.csv --out predictions",
    "export": "lesionsam export --format safetensors --out exports",
    "promote": "lesionsam promote --run models/adapted --alias champion",
    "register": "lesionsam register --run models/adapted --alias champion",
    "compare": "lesionsam compare main my-experiment --out comparison.html",
    "preset": "lesionsam preset folder-csv --dry-run",
    "check": "lesionsam check",
    "doctor": "lesionsam doctor",
    "smoke": "lesionsam smoke --model compact --checkpoint foundation/compact.safetensors",
    "foundation": "lesionsam foundation",
    "params upgrade": "lesionsam params upgrade params.yaml --dry-run",
    "params show": "lesionsam params show method.target",
    "params check": "lesionsam params check",
    "data convert": "lesionsam data convert annotations.xml own/boxes.csv --images own/images",
    "data check": "lesionsam data check own --boxes own/boxes.csv",
    "data split": "lesionsam data split photos --by patient.csv --out own/images",
    "data show": "lesionsam data show --from own --boxes own/boxes.csv --count 12",
    "submit train": "lesionsam submit train --partition gpu --minutes 240",
    "submit tune": "lesionsam submit tune --storage postgresql://me@host/optuna --trials 40 --tasks 4",
    "submit predict": "lesionsam submit predict photos --auto --tasks 8 --out predictions",
    "submit evidence": "lesionsam submit evidence pairs --gpus 1",
    "submit status": "lesionsam submit status",
}

"""The shape of the house, read from the source: layers, who may import which library, and dvc.yaml's deps."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from repo import import_graph
from repo.import_graph import PACKAGE, imported_names, module_files, project_imports

ROOT = import_graph.ROOT

# From the ground up. A module imports from lower rows only, or from its own package.
LAYERS = [
    ["types", "errors", "losses", "metrics"],
    ["config", "utils", "parallel"],
    ["boxes", "prompts", "tracking", "overlays"],
    ["models", "formats"],
    ["methods", "data", "inference"],
    ["detection"],
    ["training", "evaluation", "pretraining", "export", "annotation", "video"],
    ["experiment", "report", "integrations"],
    ["pipeline"],
    ["sweep", "engine", "cluster"],
    ["cli"],
    ["__main__"],
]
# Foreign library -> the only packages, or single modules, that may import it.
ONLY_IN = {
    "segment_anything": ("models", "inference.auto", "inference.lesion", "export.vanilla_sam"),
    "peft": ("models",),
    "segmentation_models_pytorch": (),
    "transformers": ("models.sam2", "models.hub", "export.huggingface", "detection.detectors", "video.memory"),
    "av": ("video",),
    "onnx": ("export.onnx",),
    "onnxscript": ("export.onnx",),
    "onnxruntime": ("export.onnx",),
    "mlflow": ("tracking", "export.mlflow", "export.mlflow_served"),
    "torch.utils.tensorboard": ("tracking",),
    "optuna": ("sweep",),
    "submitit": ("cluster",),
    "dvc": (),
    "pydantic": ("config", "annotation", "integrations"),
    "fastapi": ("annotation", "integrations"),
    "starlette": ("annotation", "integrations"),
    "uvicorn": ("annotation", "integrations"),
    "pydicom": ("utils.dicom", "formats.dicom_seg"),
    "highdicom": ("formats.dicom_seg",),
    "cvat_sdk": ("integrations.cvat",),
}
# Configuration stops at the assembly: everything else takes plain arguments.
TAKE_CONFIG = (
    "config",
    "experiment",
    "pipeline",
    "sweep",
    "engine",
    "cluster",
    "pretraining",
    "report",
    "cli",
    "tracking.registry",
    "data.check.items",
)

MODULES = sorted(name for name, path in module_files().items() if path.name != "__init__.py")
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix() for path in [*(ROOT / "stages").glob("*.py"), ROOT / "src" / "tune.py"]
)


def part(module: str) -> str:
    """Return the first name below the package: `lesionsam.data.index` is in `data`."""
    return module.split(".")[1]


def is_in(module: str, places: tuple[str, ...]) -> bool:
    """Return whether a module is one of the places (`export.onnx`) or lies in one of them (`models`)."""
    name = module.removeprefix(f"{PACKAGE}.")
    return any(name == place or name.startswith(f"{place}.") for place in places)


def layer(module: str) -> int:
    """Return the index of the module's row in LAYERS."""
    for index, row in enumerate(LAYERS):
        if part(module) in row:
            return index
    pytest.fail(f"{module}: in no layer; add it to LAYERS of tests/repo/test_architecture.py")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    wrong = [
        other
        for other in project_imports(module_files()[module])
        if not (layer(other) < layer(module) or part(other) == part(module))
    ]
    assert not wrong, f"{module} (layer {layer(module) + 1}) imports sideways or upwards: {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("module", MODULES)
def test_configuration_stops_at_the_assembly(module: str) -> None:
    taken = {other for other in project_imports(module_files()[module]) if part(other) == "config"}
    assert not taken or is_in(module, TAKE_CONFIG), f"{module} imports {', '.join(sorted(taken))}"


def test_no_import_cycles() -> None:
    """Following the imports that run when a module is loaded never leads back to it."""
    edges = {name: project_imports(path, top_level_only=True) for name, path in module_files().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("library", ONLY_IN)
def test_foreign_libraries_have_one_place(library: str) -> None:
    importers = {
        name
        for name, path in module_files().items()
        if any(imported == library or imported.startswith(f"{library}.") for imported in imported_names(path))
    }
    strangers = {name for name in importers if not is_in(name, ONLY_IN[library])}
    assert not strangers, f"{library} is imported in {sorted(strangers)}; allowed only in {ONLY_IN[library]}"
    for script in SCRIPTS:
        tops = {name.split(".")[0] for name in imported_names(ROOT / script)}
        assert library not in tops, f"{script} imports {library}"


def test_lower_floors_work_without_mlflow_dvc_optuna() -> None:
    """A GPU host without those three can import, and so train and evaluate, everything below tracking and sweep."""
    modules = [
        name for name in MODULES if not is_in(name, ("tracking", "sweep", "cli", "__main__", "export.mlflow_served"))
    ]
    program = "\n".join(
        [
            "import importlib, sys",
            "for name in ('mlflow', 'dvc', 'optuna'): sys.modules[name] = None",
            f"for name in {modules!r}: importlib.import_module(name)",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_cli_help_is_quick_to_load() -> None:
    """The command line's own module pulls in neither torch nor mlflow, pandas or matplotlib."""
    program = (
        "import sys; sys.path.insert(0, 'src'); import lesionsam.cli.app; "
        "print(*sorted({'torch', 'mlflow', 'pandas', 'matplotlib', 'optuna'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("module", [*MODULES, *SCRIPTS])
def test_no_assert_in_source(module: str) -> None:
    """`python -O` drops asserts, so none may guard anything; and no handler swallows every error."""
    path = module_files().get(module, ROOT / module)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        line = getattr(node, "lineno", 0)
        assert not isinstance(node, ast.Assert), f"{path.name}:{line}: assert"
        if isinstance(node, ast.ExceptHandler):
            caught = "everything" if node.type is None else ast.unparse(node.type)
            reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            broad = caught in ("everything", "Exception", "BaseException")
            assert reraises or not broad, f"{path.name}:{line}: except {caught}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_readable(module: str) -> None:
    path = module_files()[module]
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 450, f"{path.name} has {lines} lines, at most 450"
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.name} has no docstring"


@pytest.mark.parametrize("stage", ["train", "report"])
def test_how_predictions_are_made_is_nothing_that_a_training_or_a_report_depends_on(stage: str) -> None:
    """Else a change of the choice among candidates would train anew, and a training that was cut short would stop."""
    assert not [name for name in import_graph.stage_modules(stage) if is_in(name, ("inference",))]
    assert [name for name in import_graph.stage_modules("evaluate") if is_in(name, ("inference",))]


def test_packages_hold_no_code() -> None:
    """`__init__` files hold a docstring, a version and lazy names, nothing a stage could depend on."""
    imports = ("from typing import TYPE_CHECKING", f"from {PACKAGE}.utils.lazy import lazy_names")

    def holds_names(node: ast.stmt) -> bool:
        if isinstance(node, ast.If):  # imports for the type checker
            is_typing = ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse
            return is_typing and all(isinstance(inner, ast.ImportFrom) for inner in node.body)
        if isinstance(node, ast.Assign):
            targets = [ast.unparse(target) for target in node.targets]
            return targets in (["__all__"], ["__version__"], ["(__getattr__, __dir__)"])
        return isinstance(node, ast.Expr) or ast.unparse(node) in imports

    for path in (ROOT / "src" / PACKAGE).rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        code = [node for node in body if not holds_names(node)]
        assert not code, f"{path.relative_to(ROOT)}:{code[0].lineno}: move it into a module"


def dvc_stages() -> dict[str, dict]:
    """The stages of dvc.yaml as written, before DVC fills in the parameters."""
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


@pytest.mark.parametrize("stage", dvc_stages())
def test_stage_deps_cover_the_modules_that_run(stage: str) -> None:
    named = sorted(dep for dep in dvc_stages()[stage]["deps"] if import_graph.is_code(dep))
    needed = import_graph.stage_deps(stage)
    missing, too_many = sorted(set(needed) - set(named)), sorted(set(named) - set(needed))
    assert named == needed, (
        f"{stage}: missing {missing}, not run {too_many}; `python tests/repo/import_graph.py --write`"
    )
    for module in import_graph.stage_modules(stage):
        path = module_files()[f"{PACKAGE}.{module}"].relative_to(ROOT)
        assert any(path.is_relative_to(dep) for dep in named), f"{stage}: {path} is in no dep"


def test_configuration_sweeps_and_pages_are_no_deps_of_a_training() -> None:
    """A new key, preset, plot or page must not train again, nor fetch the data again."""
    apart = (
        "config",
        "report",
        "sweep",
        "annotation",
        "engine",
        "export",
        "cli",
        "tracking",
        "pretraining",
        "data.check",
    )
    for stage in ("download", "boxes", "weights", "train"):
        for dep in dvc_stages()[stage]["deps"]:
            under = ROOT / dep
            inside = [name for name, path in module_files().items() if path.is_relative_to(under)]
            assert not [name for name in inside if is_in(name, apart)], f"{stage}: {dep}"


def test_dvc_yaml_stays_short() -> None:
    assert len((ROOT / "dvc.yaml").read_text(encoding="utf-8").splitlines()) <= 120
    for script in (ROOT / "stages").glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 60, script.name


@pytest.mark.parametrize("module", [*MODULES, *SCRIPTS])
def test_modules_are_imported_from_where_they_are(module: str) -> None:
    """A name taken from a package's `__init__` would hide the module behind it from deps and digests."""
    files = module_files()
    packages = {name for name, path in files.items() if path.name == "__init__.py"}
    names = imported_names(files.get(module, ROOT / module)) - files.keys() - {f"{PACKAGE}.__version__"}
    assert not [name for name in names if name.rpartition(".")[0] in packages]


def test_every_stage_file_is_a_stage() -> None:
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} == set(dvc_stages())


def test_hardware_is_in_no_stage() -> None:
    """Device, workers and the tracking server say how and where, never what: they must not trigger training."""
    for name, stage in dvc_stages().items():
        sections = {str(key).split(".")[0] for key in stage.get("params", [])}
        assert not sections & {"runtime", "tracking"}, name


def test_stage_params_exist() -> None:
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for name, stage in dvc_stages().items():
        for key in stage.get("params", []):
            value = params
            for step in key.split("."):
                assert step in value, f"dvc.yaml, stage {name}: no parameter {key} in params.yaml"
                value = value[step]


# The sections a stage's code reads must be the sections that DVC watches for it, or a change of one would go unnoticed.
SECTION_NAMES = ("inputs", "data", "boxes", "model", "method", "train", "evaluate", "auto")


@pytest.mark.parametrize("stage", dvc_stages())
def test_stage_reads_only_watched_sections(stage: str) -> None:
    """`config.<section>` in the step's own module needs that section in its params."""
    tree = ast.parse(module_files()[f"{PACKAGE}.pipeline.{stage}"].read_text(encoding="utf-8"))
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    } & set(SECTION_NAMES)
    watched = {str(key).split(".")[0] for key in dvc_stages()[stage].get("params", [])}
    assert read <= watched, f"pipeline/{stage}.py reads {sorted(read - watched)}; list it in the stage's params"


def test_import_graph_finds_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader behind these tests: relative, nested and type-checker-only imports, on a file made for it."""
    monkeypatch.setattr(import_graph, "SOURCE", tmp_path)
    source = tmp_path / PACKAGE / "data" / "made_up.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "from __future__ import annotations\nfrom ..types import Sample\nfrom . import shapes\nimport numpy as np\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mlflow\n"
        "def late():\n    from lesionsam.models import sam\n",
        encoding="utf-8",
    )
    names = imported_names(source)
    assert {"lesionsam.types", "lesionsam.data.shapes", "numpy", "lesionsam.models.sam"} <= names
    assert "mlflow" not in names
    assert "lesionsam.models.sam" not in imported_names(source, top_level_only=True)

"""pyproject.toml's ranges, the lock and the imports say the same."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from helpers.imports import libraries
from repo.import_graph import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = {
    name: [Requirement(text) for text in texts] for name, texts in PROJECT["project"]["optional-dependencies"].items()
}
BASE = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
LOCKED = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.M))
# Import name -> distribution, where they differ. The second comes with the first one's distribution.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "annotated_types": "pydantic",
    "requests": "mlflow",
    "ruamel": "ruamel-yaml",
    "segment_anything": "segment-anything",
    "skimage": "scikit-image",
    "sqlalchemy": "optuna",
    "starlette": "fastapi",
}
# What a user runs with an extra -> the extra. The commands themselves import late: each entry is a module they import.
NEEDS = {
    "inference.files": "",
    "inference.predictor": "",
    "experiment.auto": "",
    "tracking.registry": "",
    "data.check.page": "",
    "formats.convert": "",
    "annotation.serve": "annotate",
    "integrations.cvat": "cvat",
    "integrations.serve": "annotate",
    "formats.dicom_seg": "",
    "annotation.text": "annotate hub",
    "detection.prompts": "hub",
    "video.run": "video",
    "video.series": "",
    "export.base": "export",
    "export.plain": "",
    "experiment.run": "train",
    "sweep.search": "train",
    "cluster.slurm": "slurm",
    "report.page": "train",
    "engine.command": "train annotate",
}


def canonical(name: str) -> str:
    """Return a distribution's name as the lock writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def ranges() -> list[Requirement]:
    groups = PROJECT["dependency-groups"].values()
    texts = [text for group in groups for text in group]
    return [
        *BASE,
        *(one for extra in EXTRAS.values() for one in extra if one.name != "lesionsam"),
        *map(Requirement, [*texts, *PROJECT["build-system"]["requires"]]),
    ]


@pytest.mark.parametrize("requirement", ranges(), ids=str)
def test_the_locked_version_is_inside_the_range(requirement: Requirement) -> None:
    assert requirement.specifier, f"{requirement}: give a lower bound"
    assert requirement.specifier.contains(LOCKED[canonical(requirement.name)])


def test_all_is_every_other_extra() -> None:
    (everything,) = EXTRAS["all"]
    assert everything.name == "lesionsam"
    assert everything.extras == EXTRAS.keys() - {"all"}


@pytest.mark.parametrize("module", NEEDS)
def test_what_an_import_needs_is_declared(module: str) -> None:
    """Every library that importing the module imports is a dependency, or in the extras that the module belongs to."""
    extras = NEEDS[module].split()
    declared = {canonical(one.name) for one in [*BASE, *(one for extra in extras for one in EXTRAS[extra])]}
    foreign = {canonical(DISTRIBUTIONS.get(name, name)) for name in libraries(f"lesionsam.{module}")}
    assert foreign & LOCKED.keys() <= declared


@pytest.mark.parametrize("requirement", BASE, ids=str)
def test_no_dependency_is_there_for_nothing(requirement: Requirement) -> None:
    """Some module that a base command runs imports it, at its top or inside a function."""
    modules = [module for module in [*NEEDS, "cli.app", "cli.doctor"] if not NEEDS.get(module)]
    names = {name for module in modules for name in libraries(f"lesionsam.{module}", late=True)}
    assert canonical(requirement.name) in {canonical(DISTRIBUTIONS.get(name, name)) for name in names}

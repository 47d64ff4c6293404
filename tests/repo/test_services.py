"""compose.yaml holds together; what DVC pushes a fresh clone pulls, and has nothing to do."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from helpers.pipeline import repository_copy, run, set_parameter

ROOT = Path(__file__).resolve().parents[2]


def compose() -> dict:
    return YAML(typ="safe").load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def test_every_name_in_the_services_is_defined() -> None:
    described = compose()
    services = described["services"]
    assert services.keys() == {"postgres", "s3", "buckets", "mlflow", "dashboard"}
    for name, service in services.items():
        assert {"image", "build"} & service.keys(), name
        assert set(service.get("depends_on", ())) <= services.keys(), name
        assert {entry["source"] for entry in service.get("configs", ())} <= described["configs"].keys(), name
        assert {entry.split(":")[0] for entry in service.get("volumes", ())} <= described["volumes"].keys(), name
    text = str(services)
    for host, port in re.findall(r"(?:@|//)(postgres|s3):(\d+)", text):
        assert f"127.0.0.1:{port}:{port}" in services[host]["ports"]


def test_mlflow_and_optuna_have_a_database_each() -> None:
    described = compose()
    services = described["services"]
    mlflow = next(word for word in services["mlflow"]["command"] if word.startswith("--backend-store-uri="))
    assert mlflow.endswith(f"/{services['postgres']['environment']['POSTGRES_DB']}")
    optuna = services["dashboard"]["command"].rpartition("/")[2]
    assert f"CREATE DATABASE {optuna} " in described["configs"]["databases"]["content"]
    assert not mlflow.endswith(f"/{optuna}")


def test_no_service_is_open_to_a_network_and_no_password_is_written_down() -> None:
    for name, service in compose()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    secrets = re.findall(r"(?:PASSWORD|SECRET_ACCESS_KEY|secretKey\")\s*:\s*\"?([^\s\"]+)", text)
    assert len(secrets) == 3
    assert all(secret.startswith("${LESIONSAM_PASSWORD") for secret in secrets)


@pytest.mark.pipeline
def test_a_fresh_clone_pulls_what_was_pushed_and_has_nothing_to_do(tmp_path: Path) -> None:
    first, remote = repository_copy(tmp_path / "first"), tmp_path / "remote"
    set_parameter(first, "runtime.device", "cpu")
    run(first, "dvc", "init", "--quiet", "--force")
    run(first, "dvc", "repro", "--quiet", "boxes", "weights")
    run(first, "dvc", "remote", "add", "--quiet", "--default", "team", str(remote))
    run(first, "dvc", "push", "--quiet")
    run(first, "git", "add", "--all")
    run(first, "git", "commit", "--quiet", "--message", "results")
    run(tmp_path, "git", "clone", "--quiet", str(first), "second")
    second = tmp_path / "second"
    shutil.rmtree(first / ".dvc" / "cache")
    run(second, "dvc", "pull", "--quiet", "download", "boxes", "weights")
    assert (second / "data" / "boxes.csv").read_bytes() == (first / "data" / "boxes.csv").read_bytes()
    said = run(second, "dvc", "repro", "boxes", "weights").stdout
    assert said.count("didn't change, skipping") == 3
    assert "Running stage" not in said
    set_parameter(second, "boxes.seed", 1)
    said = run(second, "dvc", "repro", "boxes").stdout
    assert re.findall(r"Running stage '(\w+)'", said) == ["boxes"]

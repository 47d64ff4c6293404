"""What every test stands on: few threads, nothing sent anywhere, nothing written outside temporary folders."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch and numpy are first imported: several test processes share the cores.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DVC_NO_ANALYTICS"] = "true"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
# Stages that tests start find the very python and dvc that run the tests.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# No clocks: a busy machine is no failed test.
settings.register_profile(
    "project", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tests first, so that the other processes have work meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("pipeline") is None)


@pytest.fixture(autouse=True)
def own_tracking_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's default store is a temporary one: no test writes runs into the repository's."""
    folder = tmp_path_factory.getbasetemp() / "mlflow"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test reads on stderr does not depend on how busy the machine is."""
    monkeypatch.setattr("lesionsam.utils.progress.LINE_SECONDS", 600.0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def isic_sample(root: Path) -> Path:
    """Real ISIC images and masks beside the checkout; tests that want them are skipped where there are none."""
    folder = root.parent / "shared" / "data" / "isic"
    if not folder.is_dir():
        pytest.skip("needs the sample of real ISIC images in ../shared/data/isic")
    return folder

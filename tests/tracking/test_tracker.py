"""Tracking against a real MLflow server and a real SQLite store, with the server and the network failing for real."""

from __future__ import annotations

import http.client
import json
import math
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lesionsam.errors import UserError
from lesionsam.tracking.lineage import lineage_tags, repository_root
from lesionsam.tracking.mlflow_upload import Unreachable, Uploader
from lesionsam.tracking.registry import resolve_model
from lesionsam.tracking.sender import catch_up
from lesionsam.tracking.spool import Appender, Spool, clean_name, read_lines, spool_root
from lesionsam.tracking.tracker import STALL_SECONDS, NullTracker, Tracker, sync

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: nothing to track with")
# MLflow leaves connections to be collected; its own warnings are not ours to cure.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:::(mlflow|sqlalchemy|alembic)"),
]
SOURCE = Path(__file__).resolve().parents[2] / "src"
EXPERIMENT = "tests"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """`mlflow server` on a SQLite file, that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--workers",
            "1",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--backend-store-uri",
            f"sqlite:///{folder}/server.db",
            "--artifacts-destination",
            str(folder / "artifacts"),
        ]
        self.environment = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 150
        while not self.answers():
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail((self.folder / "server.log").read_text())
            time.sleep(0.2)

    def answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """SIGKILL. What `mlflow server` had started is what the next start runs: half the processor time."""
        if self.process is None:
            return
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        if children:
            entry = Path("/proc") / children[0]
            self.command = entry.joinpath("cmdline").read_text().rstrip("\0").split("\0")
            variables = entry.joinpath("environ").read_text().rstrip("\0").split("\0")
            self.environment = dict(variable.split("=", 1) for variable in variables)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


class Gate:
    """A proxy before the server that passes requests on and, where told, keeps the answer to itself or answers 500.

    lose: part of a path or body; the next such request reaches the server, but the connection is cut, not answered.
    """

    def __init__(self, target: Server) -> None:
        self.lose: str | None = None
        self.broken = False
        self.fault: str | None = None  # of the database, when it is given points
        self.num_points = 0
        gate = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if gate.broken:
                    self.send_error(500)
                    return
                if gate.fault is not None and self.path.endswith("runs/log-batch"):
                    content = json.dumps({"error_code": "BAD_REQUEST", "message": gate.fault}).encode()
                    self.send_response(400)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                    return
                if self.path.endswith("runs/log-batch"):
                    gate.num_points += len(json.loads(body).get("metrics", []))
                connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=20)
                connection.request(self.command, self.path, body, {**self.headers, "Accept-Encoding": "identity"})
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                writes = self.command in ("POST", "PUT")
                if gate.lose is not None and writes and gate.lose.encode() in self.path.encode() + body:
                    gate.lose = None
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._httpd.server_address[1]}"
        threading.Thread(target=self._httpd.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()


@pytest.fixture
def gate(server: Server) -> Iterator[Gate]:
    gate = Gate(server)
    yield gate
    gate.close()


def start(root: Path, uri: str, *, send: bool = False, **settings: Any) -> Tracker:
    keywords: dict[str, Any] = {"params": {"lr": 0.1}, "tags": {}, "system_metrics": False} | settings
    return Tracker.open(root / "run", uri=uri, experiment=EXPERIMENT, root=root, run_name="r", send=send, **keywords)


def spool_of(root: Path) -> Spool:
    return Spool.all(root)[0]


def drain(root: Path, *, lost: int = 0) -> Uploader:
    """Ship all that waits, in this process; `lost` answers are expected not to come."""
    uploader = Uploader(spool_of(root), replace_gone=True)
    while True:
        try:
            while uploader.upload():
                pass
        except Unreachable:
            lost -= 1
            assert lost >= 0
            continue
        assert lost == 0, "the fault did not happen"
        return uploader


def history(uploader: Uploader, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in uploader.client.get_metric_history(uploader.state["run_id"], name)]


# ------------------------------------------------------------------------------------------------- without a server


def test_names_are_made_of_what_mlflow_takes() -> None:
    assert clean_name("dev/iou_box+core") == "dev/iou_box_core"
    assert clean_name("iou@0.5") == "iou_0.5"
    assert clean_name("../a//b/./c") == "a/b/c"
    assert len(clean_name("x" * 400)) == 250


def test_params_are_cut(tmp_path: Path) -> None:
    start(tmp_path, "", params={"a.c": [1, 2], "d": "x" * 600, "e": None, "box+core": 0.5}).close()
    entries = [entry for entry, _ in read_lines(spool_of(tmp_path).path("journal")) if entry is not None]
    (params,) = [entry["values"] for entry in entries if entry["kind"] == "params"]
    assert params == {"a.c": "[1, 2]", "d": "x" * 500, "e": "None", "box_core": "0.5"}


def test_lineage_names_commit_dirty_flag_and_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("DVC_EXP_NAME", "calm-moth")
    assert lineage_tags(tmp_path) == {"dvc_exp_name": "calm-moth"}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    tags = lineage_tags(tmp_path)
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["git.dirty"] == "false"
    (tmp_path / "file").write_text("2")
    assert lineage_tags(tmp_path)["git.dirty"] == "true"
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert repository_root(tmp_path / "a" / "b") == tmp_path.resolve()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "a"))
    assert repository_root(tmp_path) == (tmp_path / "a").resolve()


def test_switched_off_it_still_writes_the_metrics(tmp_path: Path) -> None:
    tracker = NullTracker(tmp_path)
    tracker.log({"loss": math.inf, "iou_box+core": 0.5}, 3)
    tracker.log_picture(tmp_path / "none.png", "x", 0)
    tracker.close()
    ((entry, _),) = read_lines(tmp_path / "metrics.jsonl")
    assert entry is not None
    assert (entry["step"], entry["seq"], entry["values"]) == (3, 0, {"loss": "inf", "iou_box_core": 0.5})
    assert float(entry["values"]["loss"]) == math.inf
    resumed = NullTracker(tmp_path)
    resumed.log({"loss": 1.0}, 3)
    resumed.log({"loss": 1.0}, 4)
    resumed.close()
    assert [entry["step"] for entry, _ in read_lines(tmp_path / "metrics.jsonl") if entry] == [3, 4]
    NullTracker(None).log({"loss": 1.0}, 0)


def test_a_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Appender(path)
    first.append({"seq": 0})
    first.close()
    with path.open("ab") as file:
        file.write(b'{"seq": 1, "val')
    assert [entry for entry, _ in read_lines(path)] == [{"seq": 0}]
    second = Appender(path)
    second.append({"seq": 2})
    second.close()
    assert [entry for entry, _ in read_lines(path)] == [{"seq": 0}, None, {"seq": 2}]


def test_a_full_disk_does_not_stop_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = NullTracker(tmp_path)
    assert tracker._metrics is not None
    tracker._metrics.close()
    tracker._metrics = Appender(Path("/dev/full"))
    for step in range(3):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    said = capsys.readouterr().err
    assert said.count("No space left") == 1
    assert "the disk did not take 3 tracking entries; they are lost" in said


def test_points_that_a_full_disk_does_not_take_are_written_when_there_is_room_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files, which tears a line first."""
    tracker = NullTracker(tmp_path)
    tracker.log({"loss": 0.5}, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, hard))
    try:
        tracker.log({"loss": 1.5}, 1)
        tracker.log({"loss": 2.5}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.log({"loss": 3.5}, 3)
    tracker.close()
    points = [entry for entry, _ in read_lines(tmp_path / "metrics.jsonl") if entry is not None]
    assert [(entry["step"], entry["values"]["loss"]) for entry in points] == [(k, k + 0.5) for k in range(4)]
    assert capsys.readouterr().err.count("tracking cannot write") == 1


def test_a_damaged_record_is_one_clear_line(tmp_path: Path) -> None:
    for content, words in (('{"local_id": "../x"}', "letters and digits"), ("{", "damaged file"), ("[]", "local_id")):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UserError, match=words):
            Tracker.reopen(tmp_path, uri="", experiment=EXPERIMENT, root=tmp_path)


# ------------------------------------------------------------------------------------------------- processes


def test_a_dead_server_costs_less_than_a_millisecond_a_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = start(tmp_path, f"http://127.0.0.1:{free_port()}", send=True)
    values = {f"loss_{index}": 0.1 * index for index in range(8)}
    seconds = []
    for step in range(300):
        begun = time.perf_counter()
        tracker.log(values, step)
        seconds.append(time.perf_counter() - begun)
    assert sorted(seconds)[150] < 1e-3
    begun = time.monotonic()
    tracker.close()
    assert time.monotonic() - begun < STALL_SECONDS
    assert "kept and sent at the next start" in capsys.readouterr().err
    assert len(list(read_lines(tmp_path / "run" / "metrics.jsonl"))) == 300
    assert spool_of(tmp_path).pending()[0] == 303  # with parameters, tags and status


def test_a_whole_run_with_the_default_store(tmp_path: Path) -> None:
    """Process, SQLite below the root, system metrics; then an evaluation that fails, and one whose run is gone."""
    run = tmp_path / "run"
    tracker = start(tmp_path, "", send=True, tags={"data": "abc"}, system_metrics=True, params={"method.name": "x"})
    for step in range(40):
        tracker.log({"loss": 1 / (step + 1), "dev/iou_box+core": step / 40}, step)
    weights = tmp_path / "best.safetensors"
    weights.write_bytes(b"weights")
    tracker.log_checkpoint(weights, "best", {"dev/iou_box+core": 39 / 40, "extra": 1.0}, 39)
    weights.unlink()
    tracker.log_dataset("train", "f" * 64, "data/boxes.csv", "train")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "a.md").write_text("hello")
    tracker.log_artifact(tmp_path / "table", "results")
    for step in (0, 1):
        Image.new("RGB", (40, 30), (step * 200, 0, 0)).save(tmp_path / "p.png")
        tracker.log_picture(tmp_path / "p.png", "overlays/img 1", step)
        (tmp_path / "p.png").unlink()
    tracker.close()
    assert spool_of(tmp_path).pending() == (0, 0)
    assert not list((spool_of(tmp_path).folder / "files").glob("*"))

    run_id = json.loads((run / "run.json").read_text())["run_id"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"method.name": "x"}
    assert found.data.tags["data"] == "abc"
    assert found.info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())
    assert found.data.metrics["system/cpu_utilization_percentage"] >= 0
    for name, value in (("loss", 1 / 40), ("dev/iou_box_core", 39 / 40), ("extra", 1.0)):
        points = client.get_metric_history(run_id, name)
        assert [point.step for point in points] == ([39] if name == "extra" else list(range(40)))
        assert points[-1].value == value
    (model,) = client.search_logged_models([found.info.experiment_id])
    assert model.source_run_id == run_id
    assert model.status == "READY"
    assert {metric.key: metric.value for metric in model.metrics} == {"dev/iou_box_core": 39 / 40, "extra": 1.0}
    assert [output.model_id for output in found.outputs.model_outputs] == [model.model_id]
    (kept,) = (tmp_path / "mlartifacts").rglob("best.safetensors")
    assert kept.read_bytes() == b"weights"
    assert model.artifact_location in kept.as_uri()
    (dataset,) = found.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest, dataset.tags[0].value) == ("train", "f" * 36, "train")
    assert [item.path for item in client.list_artifacts(run_id, "results")] == ["results/a.md"]
    pictures = [item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
    assert sorted(path.split("+")[:3] for path in pictures) == [["images/overlays~img 1", "step", s] for s in "01"]

    before = (run / "run.json").read_bytes(), (run / "metrics.jsonl").read_bytes()
    again = Tracker.reopen(run, uri="", experiment=EXPERIMENT, root=tmp_path, tags={"evaluate.seed": "1"}, send=False)
    again.log({"test/iou": 0.5, "loss": 1.0}, 0)  # loss 1.0 at step 0 is there already
    again.close("FAILED")
    assert ((run / "run.json").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before
    uploader = drain(tmp_path)
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["evaluate.status"] == "FAILED"
    assert found.data.tags["evaluate.seed"] == "1"
    assert history(uploader, "test/iou") == [(0, 0.5)]
    assert len(history(uploader, "loss")) == 40

    client.delete_run(run_id)
    again = Tracker.reopen(run, uri="", experiment=EXPERIMENT, root=tmp_path, send=False)
    again.log({"test/iou": 0.75}, 0)
    again.close()
    uploader = drain(tmp_path)
    replacement = client.get_run(uploader.state["run_id"])
    assert replacement.info.run_id != run_id
    assert replacement.data.tags["lesionsam.replaces"] == run_id
    assert replacement.info.status == "FINISHED"
    assert history(uploader, "test/iou") == [(0, 0.5), (0, 0.75)]
    assert [step for step, _ in history(uploader, "loss")] == list(range(40))


@pytest.mark.parametrize("kind", ["newer", "foreign"])
def test_a_database_that_mlflow_cannot_use_is_named_and_left_alone(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow would recommend `db upgrade`, which fails, and add its tables to another program's file."""
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as database:
        for table in ("experiments", "runs") if kind == "newer" else ("patients", "visits"):
            database.execute(f"CREATE TABLE {table} (a)")
        if kind == "newer":
            database.execute("CREATE TABLE alembic_version (version_num)")
            database.execute("INSERT INTO alembic_version VALUES ('f4a9b2c7d1e6')")
        database.commit()
    before = path.read_bytes()
    tracker = start(tmp_path, "")
    tracker.log({"loss": 1.0}, 0)
    tracker.close()
    says = "made by a newer MLflow" if kind == "newer" else "another program's database"
    with pytest.raises(Unreachable, match=says):
        Uploader(spool_of(tmp_path), replace_gone=True).upload()
    with pytest.raises(UserError, match=says):
        resolve_model("0123456789abcdef" * 2, root=tmp_path)
    assert path.read_bytes() == before
    assert "db upgrade" not in capsys.readouterr().err


def test_the_reason_of_a_failed_run_is_tagged_and_cleared_by_a_resumed_one(tmp_path: Path) -> None:
    start(tmp_path, "").close("FAILED", UserError("masks/a.png: no such file"))
    uploader = drain(tmp_path)
    tags = uploader.client.get_run(uploader.state["run_id"]).data.tags
    assert tags["lesionsam.failure"] == "UserError: masks/a.png: no such file"
    assert tags["mlflow.note.content"] == "FAILED: UserError: masks/a.png: no such file"
    start(tmp_path, "").close()
    uploader = drain(tmp_path)
    found = uploader.client.get_run(uploader.state["run_id"])
    assert found.info.status == "FINISHED"
    assert (found.data.tags["lesionsam.failure"], found.data.tags["mlflow.note.content"]) == ("", "")


def test_a_store_whose_making_is_killed_is_made_again(tmp_path: Path) -> None:
    """MLflow itself cannot go on with one whose tables are half made."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lesionsam.tracking.store import make_store\n"
        "if sys.argv[2] == 'kill': os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "make_store(Path(sys.argv[1]) / 'mlflow.db', Path(sys.argv[1]) / 'beside')"
    )
    for how, status in (("kill", -signal.SIGKILL), ("finish", 0)):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, str(tmp_path), how],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert (tmp_path / "mlflow.db").exists() is (how == "finish")
        assert bool(list((tmp_path / "beside").glob("store-*"))) is (how == "kill")
    assert mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_experiments()[0].name == "Default"


def test_a_killed_owner_leaves_no_orphan_and_no_gap(tmp_path: Path, server: Server) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lesionsam.tracking.tracker import Tracker\n"
        "root = Path(sys.argv[1])\n"
        "t = Tracker.open(root / 'run', uri=sys.argv[2], experiment='tests', root=root, run_name='r', params={},\n"
        "                 tags={}, system_metrics=False)\n"
        "for step in range(20): t.log({'loss': step}, step)\n"
        "print(t._sender.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), server.uri],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    status = Path("/proc") / done.stdout.strip() / "status"
    deadline = time.monotonic() + 20
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline, "the sender outlived its owner"
    assert spool_of(tmp_path).pending()[0] > 0
    assert catch_up(tmp_path)
    assert spool_of(tmp_path).pending()[0] == 0
    uploader = Uploader(spool_of(tmp_path), replace_gone=False)
    assert history(uploader, "loss") == [(step, float(step)) for step in range(20)]
    assert uploader.client.get_run(uploader.state["run_id"]).info.status == "KILLED"
    resumed = start(tmp_path, server.uri)
    resumed.log({"loss": 99.0}, 19)
    resumed.log({"loss": 20.0}, 20)
    resumed.close()
    assert sync(tmp_path) == 0
    assert history(uploader, "loss") == [(step, float(step)) for step in range(21)]
    assert uploader.client.get_run(uploader.state["run_id"]).info.status == "FINISHED"


# ------------------------------------------------------------------------------------------------- faults of the server


def test_a_server_killed_in_the_middle_loses_and_doubles_nothing(tmp_path: Path, server: Server) -> None:
    first = start(tmp_path, server.uri)
    for step in range(30):
        first.log({"loss": step, "nan": math.nan}, step)
    uploader = drain(tmp_path)
    run_id = uploader.state["run_id"]
    server.kill()
    for step in range(30, 60):
        first.log({"loss": step, "nan": math.nan}, step)
    with pytest.raises(Unreachable):
        uploader.upload()
    first.close("FAILED")
    server.start()
    resumed = start(tmp_path, server.uri)  # from a checkpoint at step 50
    for step in range(50, 70):
        resumed.log({"loss": step, "nan": math.nan}, step)
    resumed.close()
    uploader = drain(tmp_path)
    assert uploader.state["run_id"] == run_id
    assert history(uploader, "loss") == [(step, float(step)) for step in range(70)]
    assert Counter(step for step, _ in history(uploader, "nan")) == Counter(range(70))
    assert uploader.client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    "path",
    [
        "experiments/create",
        "runs/create",
        "runs/log-batch",
        '"key": "loss"',
        "runs/outputs",
        "logged-models",
        "images/",
    ],
)
def test_an_answer_that_gets_lost_is_no_second_entry(tmp_path: Path, gate: Gate, path: str) -> None:
    (tmp_path / "w.bin").write_bytes(b"1")
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    name = tmp_path.name
    tracker = Tracker.open(
        tmp_path / "run",
        uri=gate.uri,
        experiment=name,
        root=tmp_path,
        run_name="r",
        params={},
        tags={"a": "b"},
        system_metrics=False,
        send=False,
    )
    for step in range(5):
        tracker.log({"loss": step}, step)
    tracker.log_checkpoint(tmp_path / "w.bin", "best", {"loss": 4.0}, 4)
    tracker.log_picture(tmp_path / "p.png", "overlay", 4)
    tracker.close()
    gate.lose = path
    uploader = drain(tmp_path, lost=1)
    experiment = uploader.client.get_experiment_by_name(name)
    assert experiment is not None
    (run,) = uploader.client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert history(uploader, "loss") == [(step, float(step)) for step in range(5)]
    assert gate.num_points == 5 + 1  # none of the curve was even sent again; the last one is the model's own
    (model,) = uploader.client.search_logged_models([experiment.experiment_id])
    assert [metric.value for metric in model.metrics or []] == [4.0]
    assert run.outputs is not None
    assert len(run.outputs.model_outputs) == 1
    paths = sorted(item.path.rsplit(".", 1)[1] for item in uploader.client.list_artifacts(run.info.run_id, "images"))
    assert paths == ["png", "webp"]


def test_errors_of_the_server_keep_the_run(tmp_path: Path, gate: Gate) -> None:
    tracker = start(tmp_path, gate.uri)
    tracker.log({"loss": 1.0}, 0)
    run_id = drain(tmp_path).state["run_id"]
    gate.broken = True
    tracker.log({"loss": 2.0}, 1)
    uploader = Uploader(spool_of(tmp_path), replace_gone=True)
    for _ in range(3):
        with pytest.raises(Unreachable, match="500"):
            uploader.upload()
    gate.broken = False
    tracker.close()
    assert drain(tmp_path).state["run_id"] == run_id
    assert history(uploader, "loss") == [(0, 1.0), (1, 2.0)]


def test_a_database_that_is_damaged_loses_no_point_and_a_value_that_it_refuses_does_not_block(
    tmp_path: Path, gate: Gate
) -> None:
    """MLflow calls both a bad request; the words are SQLAlchemy's, after a page of the file was written over."""
    tracker = start(tmp_path, gate.uri)
    drain(tmp_path)
    gate.fault = "(sqlite3.DatabaseError) database disk image is malformed [SQL: INSERT INTO metrics"
    tracker.log({"loss": 1.0}, 0)
    with pytest.raises(Unreachable, match="malformed"):
        Uploader(spool_of(tmp_path), replace_gone=True).upload()
    gate.fault = None
    uploader = drain(tmp_path)
    assert (history(uploader, "loss"), uploader.state["rejected"]) == ([(0, 1.0)], 0)
    gate.fault = "(psycopg2.errors.NumericValueOutOfRange) integer out of range [SQL: INSERT INTO metrics"
    tracker.log({"loss": 2.0}, 1)
    assert drain(tmp_path).state["rejected"] == 1
    tracker.close()


def test_a_spool_that_cannot_be_read_does_not_keep_others_from_being_sent(tmp_path: Path, gate: Gate) -> None:
    for name in ("old", "new"):
        tracker = Tracker.open(
            tmp_path / name,
            uri=gate.uri,
            experiment=EXPERIMENT,
            root=tmp_path,
            run_name=name,
            params={},
            tags={},
            system_metrics=False,
            send=False,
        )
        tracker.log({"loss": 1.0}, 0)
        tracker.close()
    old, new = (
        Spool(spool_root(tmp_path) / json.loads((tmp_path / name / "run.json").read_text())["local_id"])
        for name in ("old", "new")
    )
    (old.folder / "meta.json").write_text("")
    for earlier, later in ((old, new), (new, old)):  # whichever comes first
        os.utime(earlier.folder, (1, 1))
        os.utime(later.folder, (2, 2))
        assert not catch_up(tmp_path)
        assert (old.pending()[0] > 0, new.pending()) == (True, (0, 0))


def test_a_run_that_is_caught_up_with_may_be_taken_up_again_meanwhile(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait until a slow server has all that was left, and it is not called killed."""
    tracker = start(tmp_path, gate.uri)
    tracker.log({"loss": 1.0}, 0)
    assert tracker._owner is not None
    tracker._owner.close()  # as when it is killed
    real, taken = Uploader.upload, []

    def upload(self: Uploader) -> bool:
        if not taken:
            lock = spool_of(tmp_path).lock("owner", shared=True)
            assert lock is not None, "it would have to wait for the server"
            taken.append(lock)
            lock.close()
            taken.append(start(tmp_path, gate.uri))
        return real(self)

    monkeypatch.setattr(Uploader, "upload", upload)
    assert catch_up(tmp_path)
    taken[1].log({"loss": 2.0}, 1)
    uploader = drain(tmp_path)
    assert uploader.client.get_run(uploader.state["run_id"]).info.status == "RUNNING"
    taken[1].close()
    assert history(drain(tmp_path), "loss") == [(0, 1.0), (1, 2.0)]


def test_a_spool_that_was_cleaned_away_is_made_again(tmp_path: Path, gate: Gate) -> None:
    tracker = start(tmp_path, gate.uri)
    for step in range(3):
        tracker.log({"loss": step}, step)
    drain(tmp_path)
    tracker.close()
    spool_root(tmp_path).rename(tmp_path / "elsewhere")
    resumed = start(tmp_path, gate.uri, params={"lr": 0.2, "new": 1})
    resumed.log({"loss": 3}, 3)
    resumed.close()
    uploader = drain(tmp_path)
    assert history(uploader, "loss") == [(step, float(step)) for step in range(4)]
    assert gate.num_points == 4
    run = uploader.client.get_run(uploader.state["run_id"])
    assert run.data.params == {"lr": "0.1", "new": "1"}
    assert run.data.tags["changed.lr"] == "0.2"


def test_evaluating_a_model_whose_training_was_not_tracked_is_a_run_of_its_own(tmp_path: Path, gate: Gate) -> None:
    tracker = Tracker.reopen(tmp_path / "run", uri=gate.uri, experiment=EXPERIMENT, root=tmp_path, send=False)
    tracker.log({"test/iou": 0.5}, 0)
    tracker.close()
    assert not (tmp_path / "run").exists()
    uploader = drain(tmp_path)
    run = uploader.client.get_run(uploader.state["run_id"])
    assert (run.info.run_name, run.info.status) == ("evaluate", "FINISHED")
    assert history(uploader, "test/iou") == [(0, 0.5)]


def test_what_the_server_refuses_does_not_block_the_rest_and_is_told(
    tmp_path: Path, gate: Gate, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = start(tmp_path, gate.uri)
    (tmp_path / "p.png").write_text("no picture")
    tracker.log_picture(tmp_path / "p.png", "broken", 0)
    tracker.set_tags({"": "a tag without a name"})
    tracker.log_artifact(tmp_path / "missing")
    tracker.log({"loss": 1.0}, 0)
    tracker.close()
    uploader = drain(tmp_path)
    assert uploader.state["rejected"] == 2
    start(tmp_path, gate.uri).close()
    assert "the MLflow server refused 2 entries of this run, which are not there" in capsys.readouterr().err
    drain(tmp_path)
    assert history(uploader, "loss") == [(0, 1.0)]
    assert spool_of(tmp_path).pending() == (0, 0)


def test_a_run_that_was_deleted_is_not_brought_back_by_catching_up(tmp_path: Path, server: Server) -> None:
    tracker = start(tmp_path, server.uri)
    tracker.log({"loss": 1.0}, 0)
    uploader = drain(tmp_path)
    uploader.client.delete_run(uploader.state["run_id"])
    tracker.log({"loss": 2.0}, 1)
    assert catch_up(tmp_path), "its owner still lives: left alone"
    assert spool_of(tmp_path).pending()[0] == 1
    tracker.close()
    assert catch_up(tmp_path)
    assert spool_of(tmp_path).pending()[0] == 0
    assert spool_of(tmp_path).read_json("state.json")["run_id"] == uploader.state["run_id"]


def test_children_share_one_parent_however_late_the_server_comes(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was sent while they ran: the child's sender makes the parent, another machine's finds it by asking."""
    client = mlflow.MlflowClient(server.uri)

    def opened(root: Path, name: str, **keywords: Any) -> Tracker:
        return Tracker.open(
            root / name,
            uri=server.uri,
            experiment="children",
            root=root,
            run_name=name,
            params={},
            tags={},
            system_metrics=False,
            send=False,
            **keywords,
        )

    parent = opened(tmp_path / "here", "parent")
    for root in ("here", "there"):
        opened(tmp_path / root, "child", parent=parent.local_id).close()
        assert catch_up(tmp_path / root)
    opened(tmp_path / "alone", "child", parent="f" * 32).close()
    uploader = Uploader(spool_of(tmp_path / "alone"), replace_gone=False)
    with pytest.raises(Unreachable, match="belongs to is not there yet"):
        uploader.upload()
    monkeypatch.setattr("lesionsam.tracking.mlflow_upload.PARENT_SECONDS", 0.0)
    assert catch_up(tmp_path / "alone")
    (tmp_path / "here" / "parent" / "run.json").unlink()  # cleaned away: whoever knows the id goes on with that run
    again = opened(tmp_path / "here", "parent", local_id=parent.local_id)
    again.close()
    parent.close()
    assert sync(tmp_path / "here") == 0
    runs = client.search_runs([client.get_experiment_by_name("children").experiment_id])
    (one,) = [run for run in runs if run.info.run_name == "parent"]
    found = [run.data.tags.get("mlflow.parentRunId") for run in runs if run.info.run_name == "child"]
    assert sorted(map(str, found)) == sorted([one.info.run_id, one.info.run_id, "None"])
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_model_on_a_server_is_promoted_and_fetched_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry over HTTP: the copy is whole, and a second call fetches no other."""
    from lesionsam.tracking.registry import promote, resolve_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / ".git").mkdir()
    (tmp_path / "params.yaml").write_text(f"tracking:\n  uri: {server.uri}\n")
    tracker = start(tmp_path, server.uri)
    (tmp_path / "run" / "best.safetensors").write_bytes(b"weights")
    tracker.log_checkpoint(tmp_path / "run" / "best.safetensors", "lesionsam", {"objective": 0.5}, 4)
    for name in ("table.md", "summary.json"):
        (tmp_path / name).write_text("{}")
        tracker.log_artifact(tmp_path / name, "evaluation")
    tracker.log({"test/adapted.objective": 0.75}, 0)
    tracker.close()
    drain(tmp_path)
    done = promote("run")
    assert (done.is_new, done.objective) == (True, 0.75)
    found = resolve_model("models:/lesionsam@champion")
    assert found.read_bytes() == b"weights"
    assert found.is_relative_to(".cache/registry")
    assert [path.name for path in found.parent.iterdir()] == ["best.safetensors"]
    before = found.stat().st_mtime_ns
    assert resolve_model(done.run_id) == found
    assert found.stat().st_mtime_ns == before

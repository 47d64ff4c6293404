"""A Slurm cluster of a test: Debian's munged, slurmctld and slurmd on one node, with own ports and folders."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
START_SECONDS = 60.0
CPUS = 4  # that Slurm is told; it binds nothing to them
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=86400
SchedulerParameters=sched_interval=5,batch_sched_delay=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Return why there can be no cluster here; empty where there can."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]:
        return f"needs {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge"
    if os.geteuid() != 0:
        return "needs root: slurmd starts jobs as other users"
    return ""


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin"])


@dataclass
class SlurmServer:
    """A running cluster of one node, with the partition `main`."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str) -> str:
        """Return what one of Slurm's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """Return the state of a job or of an array's task, as long as Slurm remembers it."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """Return a field of `scontrol show job`."""
        fields = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)[name]


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def slurm_server() -> Iterator[SlurmServer]:
    """Run a cluster for the block; its processes and those of its jobs end with it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged's user and Slurm's read in it
    munge_user = next(entry.pw_name for entry in pwd.getpwall() if entry.pw_name in ("munge", "nobody"))
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (folder / "munge", key):
        shutil.chown(path, munge_user)
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(2)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(host=host, folder=folder, controller_port=ports[0], node_port=ports[1], cpus=CPUS)
    )
    environment = {**os.environ, "SLURM_CONF": str(configuration), "PATH": _path()}
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: str, user: str | None = None) -> None:
        with (folder / f"{Path(command[0]).name}.out").open("wb") as log:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd="/", user=user, process_group=0)
            )

    try:
        munge = folder / "munge"
        start(
            shutil.which("munged", path=_path()) or "munged",
            "--foreground",
            f"--key-file={key}",
            f"--socket={munge / 'socket'}",
            f"--pid-file={munge / 'pid'}",
            f"--log-file={munge / 'log'}",
            f"--seed-file={munge / 'seed'}",
            user=munge_user,
        )
        _wait_for(lambda: (munge / "socket").exists(), folder)
        start(shutil.which("slurmctld", path=_path()) or "slurmctld", "-D", "-f", str(configuration))
        start(shutil.which("slurmd", path=_path()) or "slurmd", "-D", "-f", str(configuration))
        _wait_for(lambda: _is_idle(environment), folder)
        server = SlurmServer(folder, environment)
        yield server
        subprocess.run(["scancel", "--me"], env=environment, capture_output=True, check=False)
        _wait_for(lambda: not server.call("squeue", "--noheader", "--states=RUNNING,COMPLETING").strip(), folder)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _is_idle(environment: dict[str, str]) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode == 0 and done.stdout.split() == ["idle"]


def _wait_for(is_done: object, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_done():  # pyright: ignore[reportCallIssue]
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"{path.name}: {path.read_text(errors='replace')[-800:]}"
                for path in [*folder.glob("*.log"), *folder.glob("*.out"), folder / "munge" / "log"]
                if path.is_file()
            )
            raise AssertionError(f"Slurm does not start:\n{logs}")
        time.sleep(0.2)

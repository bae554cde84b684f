"""Ray heads of a test's own: ports, files and process groups that no other Ray of this machine shares."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_S = 90  # for a head, which takes about 8 s
# For a cluster that gives a node or its head up sooner: Ray waits 60 s for a lost head,
# and 25 s for a node that is silent.
IMPATIENT = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",  # of what is sent and never acknowledged too; else 120 s
}
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """Where it answers."""

    jobs: str  # URL of its job server
    address: str  # host:port that nodes and drivers attach to
    scratch: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], limit_s: float = START_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except OSError:
        return False


@contextmanager
def running(command: list[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with all that it starts, ended by its process group alone."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # jobs are `python ...`
    process = subprocess.Popen(
        command,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def head(num_cpus: int = 2, **environment: str) -> Iterator[Head]:
    """`ray start --head` on 127.0.0.1 with a job server."""
    scratch = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: socket paths end at 107 characters
    port, jobs_port = free_port(), free_port()
    words = [RAY, "start", "--head", "--block", "--port", port, "--num-cpus", num_cpus, "--temp-dir", scratch]
    words += ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--dashboard-port", jobs_port]
    words += ["--dashboard-agent-listen-port", free_port(), "--ray-client-server-port", free_port()]
    words += ["--min-worker-port", 0, "--max-worker-port", 0, "--object-store-memory", 100 * 1024**2]
    found = Head(f"http://127.0.0.1:{jobs_port}", f"127.0.0.1:{port}", scratch)
    try:
        with running([str(word) for word in words], RAY_TMPDIR=scratch, **environment) as process:
            wait_until(lambda: process.poll() is not None or answers(f"{found.jobs}/api/authentication_mode"))
            assert process.poll() is None, "the head has ended"
            yield found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

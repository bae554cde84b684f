"""`mmkt submit` against real heads of their own: one that wants a token, one that knows none."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
import yaml

from mmkt_ray.cli import main
from mmkt_ray.config import Config, parse_override
from mmkt_ray.errors import ConfigError
from mmkt_ray.submit import STOPPED, exit_status, prepare
from tests.heads import free_port, head, wait_until

ROOT = Path(__file__).parents[2]

# what jobs/*.py is here: it tells what came with it, waits for a file where it is told to,
# ends with the config's seed
SCRIPT = """\
import os, pathlib, sys, time
print("came along:", sorted(os.listdir()), flush=True)
wait = pathlib.Path({run_root!r}, "wait")
while wait.exists():
    time.sleep(0.1)
print("arguments:", sys.argv[1:], flush=True)
sys.exit(int(sys.argv[-1].rpartition("=")[2]))
"""


@pytest.fixture
def project(tmp_path: Path, make_config: Callable[..., Config]) -> Path:
    """A folder with a config and jobs, and much that must stay where it is."""
    folder = tmp_path / "project"
    (folder / "jobs").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    raw = make_config().model_dump(mode="json")
    (folder / "c.yaml").write_text(yaml.safe_dump(raw))
    (folder / "jobs" / "run.py").write_text(SCRIPT.format(run_root=str(tmp_path / "runs")))
    for name in ("data", "runs", ".venv", ".git", ".mypy_cache", "__pycache__", "ignored"):
        (folder / name).mkdir()
        (folder / name / "x").write_text("x")
    (folder / ".gitignore").write_text("/ignored/\n")
    return folder


def start_submit(project: Path, address: str, *more: str, **environment: str) -> subprocess.Popen[str]:
    """`mmkt submit` as a user types it: nothing is said of how the cluster authenticates."""
    kept = {k: v for k, v in os.environ.items() if k not in {"RAY_AUTH_MODE", "RAY_ADDRESS"}}
    return subprocess.Popen(
        [sys.executable, "-m", "mmkt_ray.cli", "submit", "c.yaml", "--address", address, *more],
        cwd=project,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.cluster
def test_a_job_on_a_cluster_with_tokens(project: Path, tmp_path: Path) -> None:
    """Catches a token that is not sent, a folder that travels whole, an exit code that becomes 0 or 1, a job that is
    started twice under one id, and a stranger's job that is taken for ours."""
    token = tmp_path / "token"
    token.write_text("a" * 64)
    ours = {"RAY_AUTH_TOKEN_PATH": str(token)}
    with head(RAY_AUTH_MODE="token", **ours) as cluster:
        address = cluster.jobs
        wait = tmp_path / "runs" / "wait"
        wait.touch()
        code, _, err = ended(
            start_submit(project, address, "--set", "seed=7", "--submission-id", "j", "--no-wait", **ours)
        )
        assert (code, "--submission-id j follows it again" in err) == (0, True), err

        same = ("--set", "seed=7", "--submission-id", "j")
        following = start_submit(project, address, *same, **ours)
        other = start_submit(project, address, "--set", "seed=8", "--submission-id", "j", **ours)
        stranger = start_submit(project, address, RAY_AUTH_TOKEN="b" * 64)
        assert ended(other)[0] == 2
        code, _, err = ended(stranger)
        assert (code, "refuses the token" in err) == (2, True), err
        wait.unlink()
        code, out, err = ended(following)
        assert (code, "runs already" in err, "failed with exit code 7" in err) == (7, True, True), err
        assert "came along: ['.gitignore', 'c.yaml', 'jobs']" in out
        assert out.count("arguments: ['c.yaml', '--set', 'seed=7']") == 1

        code, out, err = ended(start_submit(project, address, *same, **ours))
        assert (code, out) == (7, "")
        assert "another --submission-id runs it again" in err


@pytest.mark.cluster
def test_a_job_on_a_cluster_without_tokens(project: Path, tmp_path: Path) -> None:
    """Catches a client that insists on a token, a lost connection that ends the following or doubles the log, a job
    that was stopped and is told as done."""
    wait = tmp_path / "runs" / "wait"
    wait.touch()
    with head(RAY_AUTH_MODE="disabled") as cluster, wire(cluster.jobs) as (address, cut):
        following = start_submit(project, address, "--set", "seed=0", "--submission-id", "a")
        assert following.stdout is not None
        while not (line := following.stdout.readline()).startswith("came along"):
            assert line, following.stderr.read() if following.stderr else ""
        cut()
        wait.unlink()
        code, rest, err = ended(following)
        assert (code, "a is done" in err) == (0, True), err
        assert (rest.count("came along"), rest.count("arguments:")) == (0, 1)

        wait.touch()
        following = start_submit(project, address, "--set", "seed=1", "--submission-id", "b")
        wait_until(lambda: is_running(cluster.jobs, "b"))
        stop = urllib.request.Request(f"{cluster.jobs}/api/jobs/b/stop", method="POST")
        urllib.request.urlopen(stop, timeout=30)
        code, _, err = ended(following)
        assert (code, "b was stopped" in err) == (STOPPED, True), err


@contextmanager
def wire(url: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Another URL that leads to the same server, and a call that cuts all connections made through it so far."""
    ends: list[socket.socket] = []
    port = int(url.rpartition(":")[2])

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        cut([source, sink])

    def cut(sockets: list[socket.socket]) -> None:
        for end in sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", port))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", lambda: cut(list(ends))


def is_running(address: str, name: str) -> bool:
    try:
        return b"RUNNING" in urllib.request.urlopen(f"{address}/api/jobs/{name}", timeout=5).read()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("overrides", "command", "complaint"),
    [
        (["run_root=runs"], "run", "run_root 'runs' is relative"),
        (["data_root=data"], "run", "data_root 'data' is relative"),
        ([], "train", "no jobs/train.py"),
        (["trainin.epochs=1"], "run", "did you mean 'training'"),
    ],
)
def test_what_cannot_work_there_is_refused_here(
    project: Path, overrides: list[str], command: str, complaint: str
) -> None:
    """Catches results written into the job's copy of the folder, which is removed,
    and mistakes told after the upload."""
    with pytest.raises(ConfigError, match=complaint):
        prepare("c.yaml", overrides, command, project)


def test_config_outside_of_the_folder_is_refused(project: Path) -> None:
    """Catches a config that does not travel."""
    shutil.copy(project / "c.yaml", project.parent / "c.yaml")
    with pytest.raises(ConfigError, match="outside of"):
        prepare("../c.yaml", [], "run", project)


def test_data_inside_the_folder_stays(project: Path) -> None:
    """Catches a data set of 100 GB that is uploaded because its folder is not called data;
    quoting that a shell undoes."""
    overrides = [f"data_root={project}/corpus", "name=a"]
    assert dict(map(parse_override, overrides))["data_root"] == f"{project}/corpus"
    job = prepare("c.yaml", overrides, "run", project)
    assert "/corpus/" in job.excludes
    assert "--set 'training.exclude=a b'" in prepare("c.yaml", ["training.exclude=a b"], "run", project).entrypoint


def test_exit_status_of_a_killed_driver_is_none_of_success() -> None:
    """Catches 0 for a driver that a signal ended or that never started."""
    assert [exit_status(code) for code in (3, -9, None, 0)] == [3, 137, 1, 1]


def test_nobody_there_is_a_sentence(project: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Catches a traceback for a wrong address."""
    monkeypatch.chdir(project)
    assert main(["submit", "c.yaml", "--address", f"http://127.0.0.1:{free_port()}"]) == 2
    assert "no job server answers" in capsys.readouterr().err
    assert main(["submit", "c.yaml", "--address", "10.0.0.1:8265"]) == 2
    assert "no URL of a job server" in capsys.readouterr().err


class Forgetful(BaseHTTPRequestHandler):
    """A job server without jobs that breaks off as one is submitted."""

    def do_GET(self) -> None:
        """What Ray's client asks for first."""
        known = {
            "/api/authentication_mode": {"authentication_mode": "disabled"},
            "/api/version": {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""},
            "/api/jobs/": [],
        }
        self.send_response(200 if self.path in known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(known.get(self.path)).encode())

    def do_PUT(self) -> None:
        """Takes the package."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        """No answer."""

    def log_message(self, *_: object) -> None:
        """Not to standard error."""


def test_a_connection_that_breaks_off_at_the_submission(project: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Catches a job that may be there, under an id that nobody was told:
    the same command again would be a second job."""
    monkeypatch.chdir(project)
    with ThreadingHTTPServer(("127.0.0.1", 0), Forgetful) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert main(["submit", "c.yaml", "--address", f"http://127.0.0.1:{server.server_port}"]) == 2
        server.shutdown()
    assert "the same command with --submission-id shapes-run-" in capsys.readouterr().err

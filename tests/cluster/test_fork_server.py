"""Workers that are forks: as Ray would have started them, only sooner."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmkt_ray.cluster import fork_server, forked_worker, local
from mmkt_ray.cluster.fork_server import PRELOADED, TRAINING

LOOK = """
import gc, json, os, signal, sys
told = {"arguments": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "variable": os.environ.get("OF_WORKER"),
        "job": os.environ.get("RAY_JOB_ID"), "group": os.getpgid(0) == os.getpid(), "parent": os.getppid(),
        "dies": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "collects": gc.isenabled(),
        "random": __import__("numpy").random.random()}
print(json.dumps(told))
"""


ENDS = """
import atexit, sys
class Late:
    def __del__(self, write=sys.stdout.write):
        write("late")
late = sys.modules["sys"].late = Late()
atexit.register(print, "in order")
sys.exit(3)
"""


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[subprocess.Popen[bytes], list[str], dict[str, str]]]:
    """A server without Ray, the command that stands for a worker and its environment."""
    folder = tmp_path_factory.mktemp("server")
    script, variables = fork_server.fork_server(str(folder), modules=["numpy"])
    process = fork_server._servers.pop()
    yield process, [sys.executable, script], os.environ | variables | {forked_worker.OWN_SCRIPT: str(folder / "none")}
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_worker_ends_without_last_words_of_its_libraries(server: tuple, tmp_path: Path) -> None:
    """Catches a worker whose libraries, as the interpreter is taken down, tell the terminal what they still hold
    (nanobind's "leaked" lines, a dozen for each encoder); and one that ends before what was registered for its
    end."""
    _, command, environment = server
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    done = subprocess.run([*command, str(script)], env=environment, cwd=tmp_path, capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"in order\n", b"")


@pytest.mark.slow
def test_a_fork_is_what_ray_asked_for(server: tuple, tmp_path: Path) -> None:
    """Catches a worker with the arguments, folder, variables or output of another process, one that Ray ends with all
    others as it ends its group, one with everybody's random numbers, one that keeps all cycles of objects; and a
    server that outlives its driver."""
    process, command, environment = server
    script = tmp_path / "look.py"
    script.write_text(LOOK)
    context = {"command_prefix": [], "py_executable": sys.executable, "env_vars": {"OF_WORKER": "of ${OTHER}"}}
    given = [
        str(script),
        "--first=1",
        f"{forked_worker.CONTEXT}{json.dumps(context)}",
        f"{forked_worker.LANGUAGE}PYTHON",
        "last",
    ]
    environment = environment | {"OTHER": "its own"}
    runs = [
        subprocess.run([*command, *given], env=environment, cwd=tmp_path, capture_output=True, timeout=60, check=True)
        for _ in range(2)
    ]
    assert not b"".join(done.stderr for done in runs)
    told, again = (json.loads(done.stdout) for done in runs)
    assert told.pop("random") != again.pop("random")
    assert told == again == {
        "arguments": [str(script), "--first=1", "last"], "path": str(tmp_path), "folder": str(tmp_path),
        "variable": "of its own", "job": None, "group": True, "parent": process.pid, "dies": True,
        "collects": True,
    }  # fmt: skip
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_where_no_fork_can_be_ray_s_own_way_is_taken(tmp_path: Path) -> None:
    """Catches a run that waits for a server which has died."""
    own = tmp_path / "own.py"
    own.write_text("import sys; print(sys.argv[1:])")
    environment = os.environ | {forked_worker.SOCKET: str(tmp_path / "gone"), forked_worker.OWN_SCRIPT: str(own)}
    command = [sys.executable, forked_worker.__file__, "worker.py", f"{forked_worker.LANGUAGE}PYTHON"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == f"{command[2:]}\n"


@pytest.mark.parametrize(
    ("arguments", "fork"),
    [
        ([], True),
        (["--language=PYTHON", "--serialized-runtime-env-context={}"], True),
        (["--language=JAVA"], False),
        (['--serialized-runtime-env-context={"env_vars": {"A": "1"}, "command_prefix": []}'], True),
        (['--serialized-runtime-env-context={"py_executable": "/other/python"}'], False),
        (['--serialized-runtime-env-context={"command_prefix": ["source", "activate"]}'], False),
        (['--serialized-runtime-env-context={"override_worker_entrypoint": "/in/container.py"}'], False),
    ],
)
def test_what_cannot_be_a_fork(arguments: list[str], fork: bool) -> None:
    """Catches a worker in the wrong interpreter or outside of its container."""
    assert forked_worker.forkable(arguments) == fork


@pytest.mark.usefixtures("ray_local")
def test_ray_takes_forks() -> None:
    """Catches a Ray that starts workers otherwise, so that they are slow again and nobody sees it;
    and modules that are gone."""
    import ray

    def look() -> tuple[list[str], set[str], int]:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
        return parent, {entry.partition(":")[0] for entry in (*PRELOADED, *TRAINING)} - sys.modules.keys(), os.getpid()

    parent, missing, pid = ray.get(ray.remote(look).remote())
    assert fork_server.START in parent
    assert not missing
    os.kill(pid, signal.SIGKILL)
    assert ray.get(ray.remote(look).remote())[2] != pid


@pytest.mark.usefixtures("ray_local")
def test_no_server_starts_ahead_where_a_ray_is_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches seconds of imports, and their memory, for nothing: `mm.run` in a program that has called `ray.init`."""
    monkeypatch.setattr(local, "_own", {})
    monkeypatch.setattr(local, "fork_server", lambda *_: pytest.fail("started"))
    local.start_ahead()
    assert not local._own


IDS = """
import mmkt_ray.cluster.fork_server as server
server.serve_forks = lambda *_: print(server.forks_differ(), server.random_id() and server.forks_differ())
server.gc.freeze()
"""


@pytest.mark.cluster
def test_each_fork_draws_ids_of_its_own() -> None:
    """Catches two workers whose objects have the same id: a crash of Ray at best, else one's data in place of the
    other's; and a worker whose end reports hundreds of leaks in the user's terminal."""
    told = json.dumps({"path": sys.path, "modules": [*PRELOADED, *TRAINING], "listener": 0})
    code = fork_server.START.replace("sys.modules[", f"exec({IDS!r})\nsys.modules[")
    done = subprocess.run([sys.executable, "-c", code, told], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False"], done.stderr
    assert "leaked" not in done.stderr


@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forks on Linux alone")
def test_a_server_that_starts_ahead_is_that_of_the_ray_or_ends_unused() -> None:
    """Catches a second server with its imports for the Ray that starts then, and a folder or a process that a command
    leaves which needed no Ray."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short, as paths of sockets must be
    code = """
import os, ray
from mmkt_ray import cluster
from mmkt_ray.cluster import fork_server, local
local.start_ahead()
local.stop_local()
print(os.listdir({folder!r}), [server.wait(30) is not None for server in fork_server._servers])
local.start_ahead()
cluster.connect()
parent = ray.get(ray.remote(lambda: os.getppid()).remote())
print([parent] == [server.pid for server in fork_server._servers[1:]], len(os.listdir({folder!r})))
local.stop_local()
print(os.listdir({folder!r}), [server.wait(30) is not None for server in fork_server._servers])
local.start_ahead()  # the process's end removes this one
"""
    script = code.format(folder=str(folder))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[] [True]", "True 1", "[] [True, True]"], done.stderr
    assert not list(folder.iterdir())
    attached = {"RAY_TMPDIR": str(folder), "RAY_ADDRESS": "127.0.0.1:6379"}
    code = f"import os; from mmkt_ray.cluster import local; local.start_ahead(); print(os.listdir({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | attached, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr
    folder.rmdir()

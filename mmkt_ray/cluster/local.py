"""A Ray of our own on this machine: it listens on loopback alone, in a private folder, and ends with the command."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # comes with Ray, which the package has imported

from mmkt_ray.cluster.fork_server import PRELOADED, fork_server
from mmkt_ray.errors import ResourceError
from mmkt_ray.ray_private import (
    SERVERS,
    STARTED_TOO_SLOWLY,
    WORKER_TITLE,
    init_local,
    keep_signals,
    loopback_alone,
    quieten,
    shut_down,
    without_dashboard,
    without_noise,
    workers_from,
)

MIN_LOGICAL_CPUS = 4  # Ray counts CPUs to place actors; two cores would leave no room for a read beside two encoders
OBJECT_STORE_BYTES = 1_000_000_000
PREFIX = "mmkt-ray-"
# of a socket
MAX_PARENT = 107 - len(f"/{PREFIX}12345678/ray/session_2026-11-30_11-18-23_402342_1234567/sockets/plasma_store")
LOCK = "in-use"  # locked as long as the folder's owner lives, also on a /tmp that containers share
TOKEN_BYTES = 32  # of the token by which Ray's processes know each other
END_TIMEOUT_S = 10.0  # for Ray to end by itself before it is killed, and for what was killed to be gone

_own: dict[int, str] = {}  # process that started a Ray (a fork of it has not) -> the Ray's folder
_ahead: dict[str, tuple[str, dict[str, str]]] = {}  # folder of a Ray that will start -> what `fork_server` has returned


def start_ahead(trains: bool = True) -> None:
    """Where a Ray of our own will be wanted: have the process that its workers are forks of import what they need,
    while this one still imports what it needs itself. trains: whether workers will train."""
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local") or _own.get(os.getpid()) or sys.platform != "linux":
        return
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # by whoever calls us from Python
        return
    with suppress(OSError, ResourceError):  # `start_local` will tell
        set_ray_defaults()
        keep_token_private()
        folder = private_folder()
        _ahead[folder] = fork_server(folder) if trains else fork_server(folder, PRELOADED)


def start_local() -> None:
    """Start it; it ends when this process does, and its folder is removed.

    Raises: ResourceError if there is no place for it, or if this machine is too busy.
    """
    set_ray_defaults()
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quieten()
    try:
        keep_token_private()
        folder = next(iter(_ahead), None) or private_folder()
    except OSError as error:
        raise ResourceError(
            f"Ray cannot start: {error}; it needs a folder for its session (set RAY_TMPDIR to another) and its token "
            "in ~/.ray (set RAY_AUTH_TOKEN_PATH to another)"
        ) from None
    with loopback_alone(), without_dashboard(), without_noise(), keep_signals(), told_if_slow(), forked_workers(folder):
        init_local(
            f"{folder}/ray",  # Ray opens this one to everybody, hence the private one around it
            num_cpus=max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level=logging.WARNING,
        )


@contextmanager
def forked_workers(folder: str) -> Iterator[None]:
    """A Ray that starts meanwhile forks its workers, see fork_server.py; the socket lies in `folder`. Nothing but on
    Linux: a fork of a process with Apple's frameworks may crash."""
    if sys.platform != "linux":
        yield
        return
    with workers_from(*(_ahead.pop(folder, None) or fork_server(folder))):
        yield


def set_ray_defaults() -> None:
    """What Ray reads from the environment of this process and of those that it starts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # before the lines of workers: they go to files as often as to a screen
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # Ray's own 15: beside another busy program its workers stand still
    os.environ.setdefault("RAY_worker_niceness", "0")


@contextmanager
def told_if_slow() -> Iterator[None]:
    """Ray waits 30 s for its own processes, then raises a bare Exception. Raises: ResourceError instead."""
    try:
        yield
    except Exception as error:  # Ray has no class of its own for it
        if STARTED_TOO_SLOWLY not in str(error):
            raise
        raise ResourceError(
            "Ray did not start within 30 s: this machine is too busy with other processes; give the same command "
            "again when there is less to do, it goes on from here"
        ) from None


def private_folder() -> str:
    """A new folder for this user alone, removed at exit with the Ray in it;
    those that a killed command left are removed now."""
    parent = session_parent()
    remove_left(parent)
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=parent)  # mode 0700
    lock = os.open(f"{folder}/{LOCK}", os.O_CREAT | os.O_RDWR, 0o600)  # closed by the kernel with this process
    fcntl.flock(lock, fcntl.LOCK_EX)
    _own[os.getpid()] = folder
    atexit.register(stop_local)
    return folder


def session_parent() -> str:
    """Where Ray itself would put its sessions; /tmp where a TMPDIR, as batch systems set it, is too long for sockets.
    Short elsewhere than on Linux, too.

    Raises: ResourceError if RAY_TMPDIR is too long.
    """
    if asked := os.environ.get("RAY_TMPDIR"):
        if len(asked) > MAX_PARENT:
            raise ResourceError(
                f"RAY_TMPDIR is '{asked}': paths of sockets below it would be longer than Linux allows; set it to a "
                f"folder of at most {MAX_PARENT} characters, or unset it"
            )
        return asked
    common = (sys.platform == "linux" and os.environ.get("TMPDIR")) or "/tmp"
    return common if len(common) <= MAX_PARENT else "/tmp"


def remove_left(parent: str) -> None:
    """Remove this user's folders of commands that were killed."""
    for folder in Path(parent).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, in use, or just removed
            if folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def stop_local() -> None:
    """End our Ray, and remove its folder."""
    if folder := _own.get(os.getpid()):
        started = family(folder)  # asked now: a worker that is ending says no more whose it is
        overdue = threading.Timer(END_TIMEOUT_S, kill, (started,))  # what hangs goes on when its peer is gone
        overdue.daemon = True
        overdue.start()
        with suppress(Exception):  # a Ray that has broken down; what is left of it ends below
            shut_down(lambda: end_processes(folder, started))
        overdue.cancel()
        end_processes(folder, started)
        shutil.rmtree(folder, ignore_errors=True)
        _ahead.pop(folder, None)
        _own.pop(os.getpid(), None)  # last: a signal until here ends what is left


def kill_local() -> None:
    """The same at once, whatever state they are in. The process must end right after it: Ray's C++ code aborts one
    whose servers are gone, so these are held until all else is done."""
    if folder := _own.get(os.getpid()):
        servers, others = hold_servers(folder)
        kill(others, timeout_s=1)
        shutil.rmtree(folder, ignore_errors=True)
        kill(servers, timeout_s=0)


def end_processes(folder: str, started: Sequence[psutil.Process] = ()) -> None:
    """SIGKILL to the processes of the Ray in that folder and to those that were `started` by it, all at once."""
    servers, others = hold_servers(folder)
    kill([*{*servers, *others, *started}])


def hold_servers(folder: str) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Ray's servers, suspended so that they start nothing more, and the other processes of the Ray in that folder."""
    for process in filter(is_server, family(folder)):
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    ours = family(folder)
    servers = [process for process in ours if is_server(process)]
    return servers, [process for process in ours if process not in servers]


def family(folder: str) -> list[psutil.Process]:
    """The processes below this one that belong to the Ray in that folder."""
    return [process for process in psutil.Process().children(recursive=True) if is_of(process, folder)]


def kill(processes: Sequence[psutil.Process], timeout_s: float = END_TIMEOUT_S) -> None:
    """SIGKILL to those of them that still run; waits for their end.
    One that its parent does not ask for, as the first process of a container may not, has ended too."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + timeout_s
    while (left := [*filter(still_runs, processes)]) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.1)
    psutil.wait_procs(processes, timeout=0)  # asks for our own children


def still_runs(process: psutil.Process) -> bool:
    """Whether it is there, and more than its exit status."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def is_of(process: psutil.Process, folder: str) -> bool:
    """Whether a process belongs to the Ray in that folder."""
    with suppress(psutil.Error):
        return any(folder in word or word.startswith(WORKER_TITLE) for word in process.cmdline())
    return False


def is_server(process: psutil.Process) -> bool:
    """Whether it is one of those that Ray's other processes need."""
    with suppress(psutil.Error):
        return process.name() in SERVERS
    return False


def keep_token_private() -> None:
    """Ray's token file is this user's alone before Ray reads it; Ray would write it for everybody to read."""
    token = Path.home() / ".ray" / "auth_token"
    elsewhere = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if elsewhere or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError), open(token, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(secrets.token_hex(TOKEN_BYTES))
    if token.stat().st_uid == os.getuid():
        token.chmod(0o600)

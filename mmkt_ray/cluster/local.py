"""A Ray of our own on this machine: it listens on loopback alone, in a private folder, and ends with the command."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # it comes with Ray
import ray
from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants
from ray._private import utils as ray_utils
from ray._private.authentication.authentication_token_generator import generate_new_authentication_token

from mmkt_ray.errors import ResourceError

MIN_LOGICAL_CPUS = 4  # Ray counts CPUs to place actors; two cores would leave no room for a read beside two encoders
OBJECT_STORE_BYTES = 1_000_000_000
PREFIX = "mmkt-ray-"  # short: paths of sockets below it end at 107 characters
SERVERS = {"raylet", "gcs_server"}
LOCK = "in-use"  # locked as long as the folder's owner lives, also on a /tmp that containers share
END_TIMEOUT_S = 10.0  # for Ray to end by itself before it is killed, and for what was killed to be gone

_own: dict[int, str] = {}  # process that started a Ray (a fork of it has not) -> the Ray's folder


def start_local() -> None:
    """Start it; it ends when this process does, and its folder is removed.

    Raises: ResourceError if there is no place for it, or if this machine is too busy.
    """
    for name in ("ray", "ray.data", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        keep_token_private()
        folder = private_folder()
    except OSError as error:
        raise ResourceError(
            f"Ray cannot start: {error}; it needs a folder for its session (set RAY_TMPDIR to another) and its token in "
            "~/.ray (set RAY_AUTH_TOKEN_PATH to another)"
        ) from None
    with loopback_alone(), keep_signals(), told_if_slow():
        ray.init(
            address="local",  # never join a Ray that happens to run here
            num_cpus=max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level=logging.WARNING,
            _temp_dir=f"{folder}/ray",  # Ray opens this one to everybody, hence the private one around it
        )


@contextmanager
def told_if_slow() -> Iterator[None]:
    """Ray waits 30 s for its own processes, then raises a bare Exception. Raises: ResourceError instead."""
    try:
        yield
    except Exception as error:  # Ray has no class of its own for it
        if "timed out during startup" not in str(error):
            raise
        raise ResourceError(
            "Ray did not start within 30 s: this machine is too busy with other processes; give the same command again when "
            "there is less to do, it goes on from here"
        ) from None


def private_folder() -> str:
    """A new folder for this user alone, removed at exit with the Ray in it; those that a killed command left are removed now."""
    parent = get_default_system_temp_dir()
    remove_left(parent)
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=parent)  # mode 0700
    lock = os.open(f"{folder}/{LOCK}", os.O_CREAT | os.O_RDWR, 0o600)  # closed by the kernel with this process
    fcntl.flock(lock, fcntl.LOCK_EX)
    _own[os.getpid()] = folder
    atexit.register(stop_local)
    return folder


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
        # asked now: workers lose their parent with the raylet, and one that is ending says no more whose it is
        started = [process for process in psutil.Process().children(recursive=True) if is_of(process, folder)]
        overdue = threading.Timer(END_TIMEOUT_S, kill, (started,))  # what hangs goes on when its peer is gone
        overdue.daemon = True
        overdue.start()
        with suppress(Exception):  # a Ray that has broken down; what is left of it ends below
            ray.shutdown()
        overdue.cancel()
        psutil.wait_procs(started, timeout=1)
        kill(started)
        shutil.rmtree(folder, ignore_errors=True)


def kill_local() -> None:
    """The same at once, whatever state they are in. The process must end right after it: Ray's C++ code aborts one whose
    servers are gone, so these are held until all else is done."""
    if folder := _own.get(os.getpid()):
        ours = [process for process in psutil.Process().children(recursive=True) if is_of(process, folder)]
        servers = [process for process in ours if process.name() in SERVERS]
        for end in [p.suspend for p in servers] + [p.kill for p in reversed(ours) if p not in servers]:
            with suppress(psutil.NoSuchProcess):
                end()
        psutil.wait_procs([process for process in ours if process not in servers], timeout=1)
        shutil.rmtree(folder, ignore_errors=True)
        for process in servers:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def kill(started: Sequence[psutil.Process]) -> None:
    """SIGKILL to those of them that still run, the ones started last first; waits for their end."""
    for process in reversed(started):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=END_TIMEOUT_S)


def is_of(process: psutil.Process, folder: str) -> bool:
    """Whether a process belongs to the Ray in that folder."""
    with suppress(psutil.Error):
        return any(folder in word or word.startswith("ray::") for word in process.cmdline())
    return False


def keep_token_private() -> None:
    """Ray's token file is this user's alone before Ray reads it; Ray would write it for everybody to read."""
    token = Path.home() / ".ray" / "auth_token"
    elsewhere = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if elsewhere or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError), open(token, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(generate_new_authentication_token())
    if token.stat().st_uid == os.getuid():
        token.chmod(0o600)


@contextmanager
def keep_signals() -> Iterator[None]:
    """A Ray that starts or is joined meanwhile leaves a handler of SIGTERM that is ours as it is."""
    ours = threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGTERM))
    set_handler = ray_utils.set_sigterm_handler
    if ours:
        ray_utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = set_handler
        if ours:  # Ray's C++ code has put one before it, which prints a trace
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@contextmanager
def loopback_alone() -> Iterator[None]:
    """A Ray that starts meanwhile listens on 127.0.0.1 alone.

    Its processes do so if that is their node's address; on Linux Ray replaces it by one that other machines reach.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before

"""Ray's workers on one machine as forks of one process that has imported what they need.

Ray starts a new interpreter for each worker and each actor, which imports Ray Data, PyTorch and this package anew: 2
to 4 seconds of a core each, a dozen times in a small run. A fork takes a tenth of a second,
and shares the memory of the imports.

    Ray's raylet -> forked_worker.py, a stand-in for each worker -> socket -> this process -> fork: the worker

It ends with the process that started it.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmkt_ray.cluster import forked_worker
from mmkt_ray.ray_private import WORKER_MODULES, random_id, set_variables, worker_environment

FILE = "fork-server"  # the socket, in the session's folder
PRELOADED = (  # what actors that encode and the tasks around them import; after a colon, call
    *WORKER_MODULES,
    "pandas",
    "scipy.sparse",
    "numba",
    "torch",
    "mmkt_ray.features.extract",
    "mmkt_ray.kinds.images",
    "mmkt_ray.encoders.text:compile_kernels",  # Numba's own imports, which wait for the first call: 0.4 s
)
TRAINING = (  # what workers that train and score import more
    "mmkt_ray.evaluation.scoring_baselines",
    "mmkt_ray.training.trainer",
    "torch._dynamo",  # the first optimizer imports it, though nothing is compiled: 1 s
)
# The driver may have found the package by a path of its own, which is not that of a worker. `leave` is registered
# first, so it is called last: without it, the end of the interpreter finds objects that `serve_forks` froze,
# and nanobind reports them as leaks.
START = """
import atexit, gc, importlib, json, os, sys
gc.disable()  # it would walk all that is imported, again and again: 1.5 s; `serve_forks` ends that
def leave():
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # nobody looks at it
atexit.register(leave)
own, settings = [*sys.path], json.loads(sys.argv[1])
sys.path[:] = settings["path"]
from mmkt_ray.ray_private import randomness_unspent
with randomness_unspent():
    for entry in ("mmkt_ray.cluster.fork_server", *settings["modules"]):
        name, _, function = entry.partition(":")
        module = importlib.import_module(name)
        if function:
            getattr(module, function)()
sys.modules["mmkt_ray.cluster.fork_server"].serve_forks(own, settings["listener"])
"""
MAX_REQUEST_BYTES = 1 << 20

_servers: list[subprocess.Popen[bytes]] = []  # that this process has started: each ends as its pipe is closed


def fork_server(folder: str, modules: Sequence[str] = (*PRELOADED, *TRAINING)) -> tuple[str, dict[str, str]]:
    """Start the server, with its socket in `folder`, on Linux. Returns the script that stands for a worker, and the
    variables that its environment needs."""
    path = f"{folder}/{FILE}"
    os.makedirs(folder, exist_ok=True)
    # 1: NumPy starts threads as it is imported
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **worker_environment()}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.chmod(path, 0o600)  # whoever connects has code run
        listener.listen(128)  # a worker that comes before the server has its imports waits
        settings = json.dumps({"path": sys.path, "modules": list(modules), "listener": listener.fileno()})
        server = subprocess.Popen(
            [sys.executable, "-c", START, settings, path],  # the path: tells whose process it is
            stdin=subprocess.PIPE,  # whose end tells that this process has ended
            env=environment,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is the driver's
        )
    _servers.append(server)
    return forked_worker.__file__, {forked_worker.SOCKET: path}


def serve_forks(worker_path: list[str], listening: int) -> None:
    """Fork until the driver has ended. Returns in each worker, when that has ended.

    worker_path: `sys.path` of a worker. listening: number of the socket's file.
    """
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)  # its only thread is jemalloc's
    if not forks_differ():  # Ray starts its workers in its own way, see forked_worker.py
        return
    sys.path[:] = worker_path
    gc.collect()
    gc.freeze()  # the collector of a fork writes to none of these pages
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    listener = socket.socket(fileno=listening)
    while (request := next_request(listener)) is not None:
        if os.fork() == 0:
            listener.close()
            become(*request)
            return
        close(*request[1:])


def forks_differ() -> bool:
    """Whether forks of this process draw ids of their own."""
    drawn = set()
    for _ in range(2):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.write(writing, random_id())
            os._exit(0)
        os.close(writing)
        drawn.add(os.read(reading, 1024))
        os.close(reading)
        os.waitpid(child, 0)
    return len(drawn) == 2


Request = tuple[dict[str, Any], socket.socket, list[int]]


def next_request(listener: socket.socket) -> Request | None:
    """The next worker that Ray wants, the connection to its stand-in and the standard streams;
    None when the driver has ended."""
    watched: list[Any] = [listener, 0]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if 0 in ready:
            return None
        connection, _ = listener.accept()
        request, streams, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
        while request and not request.endswith(b"\n"):
            more = connection.recv(MAX_REQUEST_BYTES)
            request = request + more if more else b""
        if request and len(streams) == 3:
            return json.loads(request), connection, streams
        close(connection, streams)  # killed as it asked


def close(connection: socket.socket, streams: list[int]) -> None:
    """Close what came with a request."""
    connection.close()
    for stream in streams:
        os.close(stream)


def become(request: dict[str, Any], connection: socket.socket, streams: list[int]) -> None:
    """Be that worker, to its end."""
    os.setpgid(0, 0)  # Ray ends all of a worker's group with it
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    set_variables(request["variables"])
    os.chdir(request["folder"])
    os.setpriority(os.PRIO_PROCESS, 0, max(request["niceness"], os.getpriority(os.PRIO_PROCESS, 0)))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"])
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # as a new interpreter has it: another one in each worker
    try:
        connection.sendall(b"1")  # it stays open to this process's end, for which the stand-in waits
    except BrokenPipeError:
        return  # Ray has given the stand-in up
    sys.argv[:] = arguments = request["arguments"]
    sys.path[0] = os.path.dirname(arguments[0])
    runpy.run_path(arguments[0], run_name="__main__")

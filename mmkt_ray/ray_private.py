"""Everything that this package uses of Ray beyond its documented interface, each with its reason.

Ray may move or remove any of it in any release. tests/test_ray_private.py fails when one is gone, and
tests/test_layout.py when another file reaches for one. Nothing is imported before it is used:
a command that needs no Ray loads none.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Reason: these print a line or more at every start (that a token was made, which ignore file was read),
# and have no switch.
TALKATIVE = ("ray._private.authentication.authentication_token_setup", "ray._private.runtime_env.packaging")
# Reason: it prints the traceback of an error in a task that is raised as well.
TOLD_TWICE = "ray.data._internal.execution.streaming_executor_state"
# Reason: `ray.init` raises a bare Exception when its own processes take too long; only its text tells which.
STARTED_TOO_SLOWLY = "timed out during startup"
# Reason: see `without_noise`.
LOG_LEVEL, TOLD_LEVEL = "RAY_BACKEND_LOG_LEVEL", "Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL"
NOISE = "has constructor arguments in the object store and max_restarts > 0"
CLEANER = "PlacementGroupCleanerCallback"  # reason: see `trainer_class`
# Reason: a command that ends at once must stop Ray's servers before the others, and Ray gives out no process numbers.
SERVERS = {"raylet", "gcs_server"}  # names of processes
OWN_SCRIPT = "MMKT_RAY_SETUP_WORKER"  # an environment variable of ours, see `workers_from`
NONE_AHEAD = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}  # reason: see `workers_from`
WORKER_MODULES = (  # reason: what a worker and an actor of Ray Data import, for `workers_from`
    "ray._private.workers.default_worker",
    "ray.data._internal.execution.operators.actor_pool_map_operator",
)
EVERYWHERE = "[::]"  # reason: see `keep_replica_on_its_node`
WORKER_TITLE = "ray::"  # how the title of a worker or an agent begins


def quieten() -> None:
    """Only errors from loggers that have no other switch, and no escape code on the terminal as the process ends.

    Reason: Ray's colorama registers that code for the end, whether or not it has written anything in colour.
    """
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(TOLD_TWICE).setLevel(logging.CRITICAL)
    import ray  # noqa: F401  (it ships colorama, and puts it on the path)

    colours: Any = importlib.import_module("colorama.initialise")
    colours.atexit_done = True  # for what loads it later
    atexit.unregister(colours.reset_all)


def init_local(folder: str, **settings: Any) -> None:
    """`ray.init` for a Ray of our own, with its session in `folder`.

    Reason: `_temp_dir` is a private argument; RAY_TMPDIR, the public way,
    goes on to every other Ray that is started from here.
    """
    import ray

    ray.init(address="local", _temp_dir=folder, **settings)  # `local`: never join a Ray that happens to run here


@contextmanager
def without_dashboard() -> Iterator[None]:
    """A Ray that starts meanwhile has neither dashboard nor autoscaler.

    Reason: with `include_dashboard=False` Ray starts the dashboard's process all the same, for usage statistics
    alone, and waits for it; the autoscaler's one does nothing on a single machine. Without them Ray starts in two
    thirds of the time. The agent that a node has for the dashboard must be; it is the small one, as where Ray is
    installed without a dashboard.
    """
    from ray._private import utils
    from ray._private.node import Node

    before = Node.start_api_server, Node.start_monitor, utils.get_dashboard_dependency_error
    Node.start_api_server = lambda self, **_: None
    Node.start_monitor = lambda self: None
    utils.get_dashboard_dependency_error = lambda: ImportError("not wanted")
    try:
        yield
    finally:
        Node.start_api_server, Node.start_monitor, utils.get_dashboard_dependency_error = before


@contextmanager
def workers_from(script: str, environment: dict[str, str]) -> Iterator[None]:
    """A Ray that starts meanwhile starts its workers by that Python file, in an environment with these variables and
    the file that Ray itself would take, as OWN_SCRIPT; none before it is needed.

    Reason: Ray starts a new interpreter for each worker. It can have that import ahead
    (https://github.com/ray-project/ray/pull/33572), but cannot share what is imported. It starts some workers as the
    driver connects and has that wait for them: for ever, if they take longer than a minute.
    """
    from ray._private import services

    start = services.start_raylet

    def start_raylet(*args: Any, **options: Any) -> Any:
        call = inspect.signature(start).bind(*args, **options)
        own = {OWN_SCRIPT: call.arguments["setup_worker_path"], **NONE_AHEAD}
        call.arguments["setup_worker_path"] = script
        call.arguments["env_updates"] = {**(call.arguments.get("env_updates") or {}), **environment, **own}
        return start(*call.args, **call.kwargs)

    services.start_raylet = start_raylet
    try:
        yield
    finally:
        services.start_raylet = start


def worker_environment() -> dict[str, str]:
    """Of a process whose forks become workers.

    Reason: Ray's C++ code reads its environment once, as it is imported. A worker must find a job there: with the id
    of none it learns its job with its first task, as the workers do that Ray starts ahead. It ends when the process
    that RAY_RAYLET_PID names is gone; here that is the driver, with which the raylet ends too. Where nothing is said
    of tokens, `ray.init` turns them on in the driver's environment, which is too late for this process.
    """
    variables = {"RAY_JOB_ID": "ffffffff", "RAY_RAYLET_PID": str(os.getpid())}
    return variables | {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}


@contextmanager
def randomness_unspent() -> Iterator[None]:
    """Imports meanwhile draw no ids from the generator of Ray's C++ code.

    Reason: Ray Data's actor classes draw theirs as they are imported. Forks of a process that has drawn one would
    draw the same ids as each other from then on, those of objects too.
    """
    from ray import actor

    own = actor.ActorClassID
    actor.ActorClassID = SimpleNamespace(from_random=lambda: own(os.urandom(own.nil().size())))
    try:
        yield
    finally:
        actor.ActorClassID = own


def random_id() -> bytes:
    """One of those that Ray's C++ code draws."""
    import ray

    return bytes(ray.ObjectRef.from_random().binary())


def set_variables(variables: dict[str, str]) -> None:
    """Those of a runtime environment. Reason: they may name others, as ${HOME}."""
    from ray._private.utils import update_envs

    update_envs(variables)


def shut_down(end: Callable[[], None]) -> None:
    """`ray.shutdown`, with `end` in place of Ray's own way to end the processes that it has started.

    Reason: Ray ends one after the other and gives each a second,
    which the user waits for at the end of every command.
    """
    import ray
    from ray._private import worker

    if (node := worker._global_node) is not None:
        node.kill_all_processes = lambda **_: end()
    ray.shutdown()


@contextmanager
def loopback_alone() -> Iterator[None]:
    """A Ray that starts meanwhile listens on 127.0.0.1 alone.

    Reason: its processes do so if that is their node's address. On Linux Ray replaces it by an address that other
    machines reach, unless this constant is False, also where it is asked for
    (https://github.com/ray-project/ray/issues/26293).
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def keep_replica_on_its_node() -> None:
    """In a replica of Ray Serve, before it is ready: its gRPC server listens on the node's address alone.

    Reason: it takes pickled calls of other deployments, listens on all interfaces, and has no setting for it; on a
    Ray of our own the address is 127.0.0.1.
    """
    import ray
    from ray.serve._private import replica

    address, add_port = ray.util.get_node_ip_address(), replica.add_port_to_grpc_server
    own = f"[{address}]" if ":" in address else address
    replica.add_port_to_grpc_server = lambda server, where: add_port(server, where.replace(EVERYWHERE, own))


@contextmanager
def without_noise() -> Iterator[None]:
    """A driver that connects meanwhile neither prints nor passes on what Ray says of actors that may be restarted.

    Reason: Ray's C++ code prints an error for each that gets an argument by reference, as all actors of Ray Data and
    Ray Train do (https://github.com/ray-project/ray/issues/53727).
    Only its level can be set, and only as the driver connects.
    """
    from ray._private import worker

    connect, show = worker.connect, worker.print_to_stdstream

    def connect_quietly(*args: Any, **options: Any) -> Any:
        if LOG_LEVEL in os.environ:
            return connect(*args, **options)
        os.environ[LOG_LEVEL] = "fatal"  # for this process: Ray's own were started before
        try:
            with standard_error_without(TOLD_LEVEL):
                return connect(*args, **options)
        finally:
            del os.environ[LOG_LEVEL]

    def show_others(data: dict[str, Any], *args: Any, **options: Any) -> None:
        if lines := [line for line in data["lines"] if NOISE not in line]:
            show(data | {"lines": lines}, *args, **options)

    worker.connect, worker.print_to_stdstream = connect_quietly, show_others
    try:
        yield
    finally:
        worker.connect, worker.print_to_stdstream = connect, show


@contextmanager
def standard_error_without(noise: str) -> Iterator[None]:
    """What this process writes there meanwhile, C++ code too, comes when it is over, but for lines with `noise`."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            os.write(2, b"".join(line for line in file if noise.encode() not in line))


@contextmanager
def keep_signals() -> Iterator[None]:
    """A Ray that starts or is joined meanwhile leaves our handler of SIGTERM as it is.

    Reason: `ray.init` puts one of its own in place of whatever is there, which ends the process with status 15
    (https://github.com/ray-project/ray/issues/17308).
    """
    from ray._private import utils

    ours = threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGTERM))
    set_handler = utils.set_sigterm_handler
    if ours:
        utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler
        if ours:  # Ray's C++ code has put one before it, which prints a trace
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def has_dashboard() -> bool:
    """Whether the Ray that this process is connected to has one.
    Reason: Ray tells its address on the terminal alone."""
    from ray._private import worker

    return bool(worker._global_node and worker._global_node.webui_url)


def trainer_class() -> Any:
    """Ray Train's `TorchTrainer`, whose `fit` ends at Ctrl-C as any other call does.

    Reasons: its own handler swallows the signal, and the third one ends the process with status 0
    (https://github.com/ray-project/ray/pull/54188). Beside each training it starts an actor that gives its resources
    back if the driver is lost; that one asks the dashboard, and where there is none it dies with a traceback.
    Neither has a switch.
    """
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """None."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if has_dashboard() or type(c).__name__ != CLEANER]

    return Trainer


def remove_groups(group_ids: Sequence[str]) -> None:
    """Give back placement groups, by the ids that `placement_group_table` lists.

    Reason: the public call takes a PlacementGroup object, and none can be had for a group that another process made.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group_id in group_ids:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group_id)))


def attempt_number() -> int:
    """How often the Ray task that runs here was tried before; 0 outside of tasks.

    Reason: `ray.get_runtime_context()` tells a task its id, but not its attempt.
    """
    import ray

    return int(ray.get_runtime_context().worker.core_worker.get_current_task_attempt_number())


def walk(root: Path, excludes: Sequence[str], skip: Callable[[Path], bool], take: Callable[[Path], None]) -> None:
    """Call `take` for each path below `root` that Ray would upload with a job, but for what `skip` holds back.

    excludes: lines of a .gitignore, beside those of the folder's own .gitignore and .rayignore files.
    Reason: what is counted and shown before an upload must be what travels,
    and Ray tells nobody which files it takes.
    """
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    ignored = _get_excludes(root, list(excludes))
    _dir_travel(root, [lambda path: bool(path != root and ignored(path)), skip], take, include_gitignore=True)

"""The Ray that a job runs on: its own on this machine, or the cluster that it was pointed to;
never another by accident."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.data
from ray.util.placement_group import placement_group_table

from mmkt_ray.cluster.local import set_ray_defaults, start_local
from mmkt_ray.errors import ResourceError, UserError
from mmkt_ray.ray_private import keep_signals, remove_groups, trainer_class, without_noise

if TYPE_CHECKING:
    import torch  # imported where a model trains: a process that counts words or writes files starts seconds sooner

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0  # for a head to take a connection, and again to say its first word
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # as gRPC begins: RFC 9113, 3.4
HTTP2_SETTINGS = b"\x04"  # the type of the frame that the other side begins with
NO_PROGRESS_TIMEOUT_S = 300
MAX_FAILURES = 2  # deaths of training workers after which all are started again
ON_ONE_MACHINE = {  # Ray Train there: nobody takes a node away or gathers its metrics, and workers are asked at once
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
MAX_INIT_DEATHS = 2  # encoder actors in a row that may die while they load, each replaced by another


@dataclass(frozen=True)
class Resources:
    """What the cluster has in all."""

    num_cpus: float
    num_gpus: float


def connect() -> Resources:
    """Attach to the cluster in RAY_ADDRESS (set inside a submitted job), else start a Ray of our own on this machine.

    Raises: ResourceError if the address does not answer.
    """
    set_ray_defaults()
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        if address and address != "local":
            _attach(address)
        else:
            start_local()
    configure_data()
    total = ray.cluster_resources()
    return Resources(total.get("CPU", 0.0), total.get("GPU", 0.0))


def _attach(address: str) -> None:
    check_answers(address)
    try:
        with keep_signals(), without_noise():
            ray.init(logging_level=logging.WARNING)
    except ConnectionError as error:
        raise no_cluster(address, str(error)) from None


def check_answers(address: str) -> None:
    """Ray itself waits minutes for a head that is gone. Raises:
    ResourceError if no gRPC server answers in 10 s or less."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isascii() and port.isdigit()):
        if address == "auto" or "://" in address:
            return  # Ray finds the address by itself, or says that there is none
        raise no_cluster(address, "it is not HOST:PORT")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("1", "true"):
                connection.settimeout(ANSWER_TIMEOUT_S)
                connection.sendall(HTTP2_HELLO)
                if connection.recv(9)[3:4] != HTTP2_SETTINGS:
                    raise ConnectionError("what listens there is no Ray head")
    except (OSError, OverflowError) as error:
        raise no_cluster(address, str(error) or type(error).__name__) from None


def no_cluster(address: str, why: str) -> ResourceError:
    """The error for an address where no cluster answers."""
    return ResourceError(
        f"no Ray cluster answers at RAY_ADDRESS={address} ({why}); if the cluster uses tokens set "
        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, or unset RAY_ADDRESS to run on this machine alone"
    )


def configure_data() -> None:
    """Ray Data settings that every pipeline here wants."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_fallback_to_arrow_object_ext_type = (
        False  # a stray Python object fails; it is never pickled into a file
    )
    context.raise_original_map_exception = True  # a user's error says what to do, Ray's hides it
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    context.max_consecutive_actor_init_deaths = MAX_INIT_DEATHS  # Ray's own: the first one ends the job
    # fewer chunks than actors are no fault
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # the error itself comes, and the CLI prints it
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)


@contextmanager
def one_row_blocks() -> Iterator[None]:
    """Ray Data inside makes a block of every row: for pipelines whose rows are chunks of many samples."""
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1
    with ray.data.DataContext.current(context):
        yield


def gpu_places(resources: Resources, gpus_each: float) -> int:
    """How many actors of so many GPUs each the cluster holds: a share of a GPU lies within one."""
    if gpus_each < 1:
        return int(resources.num_gpus) * int(1 / gpus_each + 1e-6)  # 1 / 0.1 is not 9.99..
    return int(resources.num_gpus // gpus_each)


def check_fits(resources: Resources, num_actors: int, cpus_each: float, gpus_each: float) -> None:
    """Refuse an actor pool that could never run: Ray Data needs one whole CPU beside it for reads and writes.

    Raises: ResourceError saying what is there, what is asked, and what to set.
    """
    needed = num_actors * cpus_each + 1
    most = int(max(0, (resources.num_cpus - 1) // cpus_each))
    if needed > resources.num_cpus:
        raise ResourceError(
            f"{num_actors} encoder actors of {cpus_each:g} CPU and one CPU for reading need {needed:g} CPUs, the "
            f"cluster has {resources.num_cpus:g}: set extract.num_actors to at most {most}, or add nodes"
        )
    if gpus_each and num_actors > gpu_places(resources, gpus_each):
        raise ResourceError(
            f"{num_actors} encoder actors of {gpus_each:g} GPU need {num_actors * gpus_each:g} GPUs, the cluster has "
            f"{resources.num_gpus:g}, room for {gpu_places(resources, gpus_each)}: lower extract.num_actors or "
            "extract.num_gpus (0 runs on CPUs)"
        )


Run = Callable[[Callable[..., Any], Any, int, str | None], Any]  # `run_on_workers`, or what stands in for it


def ask_workers(run: Run, loop: Callable[..., Any], job: Any, num_workers: int, scratch_uri: str | None = None) -> Any:
    """What the workers come to. Raises: the user's error, which a loop returns as a value: raised there, it would be
    tried again as a crash."""
    outcome = run(loop, job, num_workers, scratch_uri)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def run_on_workers(
    loop: Callable[[Any, int, int, torch.device], Any], job: Any, num_workers: int, scratch_uri: str | None = None
) -> Any:
    """Run `loop(job, rank, world_size, device)` on Ray Train workers; returns rank 0's result.
    One worker runs right here.

    With several workers torch.distributed is set up (gloo on CPUs, NCCL on GPUs) and a dead worker restarts them all,
    up to twice; the loop itself resumes from its own checkpoint.
    Raises: ResourceError if the cluster can't place them.
    """
    import torch

    if num_workers == 1:
        keep_freed_memory()
        torch.set_num_threads(cores())
        return loop(job, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return _run_train(loop, job, num_workers, scratch_uri)


def _run_train(
    loop: Callable[[Any, int, int, torch.device], Any], job: Any, num_workers: int, scratch_uri: str | None
) -> Any:
    import torch
    from ray.exceptions import RayActorError
    from ray.train import ControllerError, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, get_context
    from ray.train.torch import get_device

    from mmkt_ray.cluster.process_group import NodeAddressConfig

    resources = connect()
    level = "INFO"  # which worker is on which node
    if not os.environ.get("RAY_ADDRESS"):
        level = "WARNING"
        for name, value in ON_ONE_MACHINE.items():
            os.environ.setdefault(name, value)
    use_gpu = resources.num_gpus >= num_workers
    if num_workers + 1 > resources.num_cpus:
        raise ResourceError(
            f"{num_workers} training workers and their driver need {num_workers + 1} CPUs, "
            f"the cluster has {resources.num_cpus:g}: set num_workers to at most {int(resources.num_cpus) - 1}, or "
            "add nodes"
        )

    def on_worker(payload: dict[str, Any]) -> Any:
        keep_freed_memory()
        context = get_context()
        torch.set_num_threads(max(1, cores() // context.get_local_world_size()))
        return loop(payload["job"], context.get_world_rank(), context.get_world_size(), get_device())

    trainer_of, before = trainer_class(), set(placement_group_table())
    with tempfile.TemporaryDirectory(prefix="mmkt-train-") as scratch:
        for attempt in range(MAX_FAILURES + 1):
            name = f"fit-{uuid.uuid4().hex[:12]}"  # Ray Train resumes by name; ours resume from their own checkpoints
            trainer = trainer_of(
                on_worker,
                train_loop_config={"job": job},
                torch_config=NodeAddressConfig(),
                scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
                run_config=RunConfig(
                    name=name,
                    storage_path=scratch_uri or scratch,
                    failure_config=FailureConfig(max_failures=MAX_FAILURES),
                    logging_config=LoggingConfig(log_level=level),
                ),
            )
            try:
                return trainer.fit().return_value
            except ControllerError as error:
                # Ray Train does not try again by itself if a worker dies just as it is given its work
                if attempt == MAX_FAILURES or not isinstance(error.controller_failure, RayActorError):
                    raise
                log.warning("a training worker died as it started; all start again")
                release_groups(before)


def release_groups(before: set[str]) -> None:
    """Give back this job's placement groups that came since `before`: Ray Train leaves them, with the workers, if it
    fails while it starts them."""
    own = ray.get_runtime_context().get_job_id()
    # other jobs' groups are not ours
    remove_groups([g for g in set(placement_group_table()) - before if g.endswith(own)])


def keep_freed_memory() -> None:
    """Have glibc keep large freed buffers for the next batch rather than map and unmap pages each time (1.2x in the
    CNN)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, num_bytes in (
            (-3, 1 << 30),
            (-1, 2**31 - 1),
            (-2, 64 << 20),
        ):  # mmap and trim threshold, top pad
            libc.mallopt(parameter, num_bytes)


def cores() -> int:
    """Cores of this machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

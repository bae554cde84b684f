"""Calls that do not wait for each other, each on its share of the cores:
the fits of a run, its baselines, its studies.

One call runs right here. Several run as Ray tasks, on this machine or on the cluster that the command was pointed to;
a task whose worker dies is given to another one, so a call must be one that can be made again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from mmkt_ray.cluster import connect, cores, keep_freed_memory
from mmkt_ray.errors import UserError

if TYPE_CHECKING:
    import torch

MAX_RETRIES = 2  # of a call whose worker has died
LINES_S = 1.0  # after which what calls have logged is shown
PACKAGE = __name__.partition(".")[0]

Loop = Callable[[Any, int, int, "torch.device"], Any]


@dataclass(frozen=True)
class Call:
    """A function of a module, its arguments, and the calls that must have ended before it begins, by name."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    after: Sequence[str] = ()


@dataclass(frozen=True)
class _Share:
    """What each of several calls gets."""

    threads: int
    level: int  # of what is logged
    num_cpus: float  # as Ray counts them, which on one machine may be more than there are
    num_gpus: float
    memory: float  # bytes
    spread: bool  # over the nodes of a cluster


class SideBySide:
    """Several calls that have begun.

    calls: those that others come after stand before them. of: how many there were before some were found to be done,
    so that what is left gets the threads that it would have had, and with them the same last bits. gpu: each takes a
    GPU if there is one. num_bytes: that each holds, so that no more run at once than a node has memory for.
    """

    def __init__(
        self, calls: Mapping[str, Call], of: int | None = None, gpu: bool = False, num_bytes: int = 0
    ) -> None:
        self._calls, self._refs = dict(calls), dict[str, Any]()
        self._lines: Any = None
        num = max(len(calls), of or 0)
        if not calls:
            return
        if len(calls) == 1 or (cores() == 1 and not os.environ.get("RAY_ADDRESS")):
            self._threads = max(1, cores() // num)
            return
        share = _share(num, gpu, num_bytes)
        task = ray.remote(_call).options(
            num_cpus=share.num_cpus,
            num_gpus=share.num_gpus,
            memory=share.memory,
            max_retries=MAX_RETRIES,
            scheduling_strategy="SPREAD" if share.spread else "DEFAULT",
        )
        self._lines = ray.remote(num_cpus=0)(_Lines).remote()
        for name, call in self._calls.items():
            before = [self._refs[other] for other in call.after if other in self._calls]
            self._refs[name] = task.remote(call.function, call.args, share.threads, share.level, self._lines, *before)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Name and value of each as it ends. Raises: the first UserError of a call; the others are given up."""
        if not self._refs:
            for name, call in self._calls.items():
                with _threads(self._threads):
                    value = call.function(*call.args)
                yield name, value
            return
        names = {ref: name for name, ref in self._refs.items()}
        waiting = list(names)
        try:
            while waiting:
                ended, waiting = ray.wait(waiting, num_returns=1, timeout=LINES_S)
                for record in ray.get(self._lines.take.remote()):
                    logging.getLogger(record.name).handle(record)
                for ref in ended:
                    value = ray.get(ref)
                    if isinstance(value, UserError):
                        raise value
                    yield names[ref], deepcopy(value)  # arrays in Ray's store are read-only
        finally:
            for ref in waiting:
                ray.cancel(ref, force=True)
            ray.kill(self._lines)


def side_by_side(calls: Mapping[str, Call], of: int | None = None, num_bytes: int = 0) -> dict[str, Any]:
    """Name -> value of each call, see `SideBySide`."""
    found = dict(SideBySide(calls, of, num_bytes=num_bytes))
    return {name: found[name] for name in calls}


def run_here(loop: Loop, job: Any, num_workers: int, scratch_uri: str | None) -> Any:
    """As `run_on_workers` with one worker, within a call: in this process,
    with the threads and the GPU that the call has."""
    import torch

    return loop(job, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _share(num_calls: int, gpu: bool, num_bytes: int) -> _Share:
    resources, alone = connect(), not os.environ.get("RAY_ADDRESS")
    there = cores() if alone else max(1, int(resources.num_cpus))
    at_once = min(num_calls, there)
    threads = max(1, min(cores(), there // at_once))
    num_cpus = max(1, int(resources.num_cpus / at_once)) if alone else threads
    memory = [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]
    num_gpus = 1.0 if gpu and resources.num_gpus >= 1 else 0.0
    level = logging.getLogger(PACKAGE).getEffectiveLevel()
    return _Share(threads, level, num_cpus, num_gpus, min(num_bytes, *memory), not alone)  # one fits anywhere


class _Lines:
    """An actor: what calls have logged and the driver has not shown yet."""

    def __init__(self) -> None:
        self._records = list[logging.LogRecord]()

    def add(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def take(self) -> list[logging.LogRecord]:
        taken, self._records = self._records, []
        return taken


def _call(
    function: Callable[..., Any], args: tuple[Any, ...], threads: int, level: int, lines: Any, *_before: Any
) -> Any:
    """In a task: the value, or the user's error as one, because raised it would come back as Ray's."""
    keep_freed_memory()
    sent = list[Any]()
    with _threads(threads), _logged(level, lambda record: sent.append(lines.add.remote(record))):
        try:
            value = function(*args)
        except UserError as error:
            value = error
    with suppress(RayActorError):  # whoever shows them has ended
        ray.get(sent)  # they come before the value
    return value


@contextmanager
def _threads(num: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _logged(level: int, send: Callable[[logging.LogRecord], Any]) -> Iterator[None]:
    """Send what the package logs from this level on, in place of writing it to a worker's file."""

    class Sending(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            record.msg, record.args, record.exc_info = record.getMessage(), None, None
            send(record)

    logger, handler = logging.getLogger(PACKAGE), Sending()
    before, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagate

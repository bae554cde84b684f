"""Encoded files are decoded by a child process, so that data that crashes,
hangs or bloats a decoder costs one sample.

    parent: decode_samples --request: a group of samples--> child: serve
                           <--replies: one for each sample--

A request is a line of JSON and the samples' bytes; a reply is a `REPLY` header, a note in JSON and the decoded array,
which where all arrays have one size stands in memory that both map instead: the same for all requests, as fresh pages
cost several times what a copy does. The child reads a request whole before it decodes, so neither waits for the
other; its replies are buffered, so small images cost few system calls. Which sample it is at stands in shared memory
too: when the child dies, that one is tried once more, alone in a new child, and is broken if that dies too. Whatever
the child lost for another reason (the machine was out of memory, someone killed it) is decoded again. A child imports
NumPy and its decoder only and starts in a fraction of a second. It decodes one sample after another, so that its
timer and its crash are one sample's; more cores are used by more children.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmkt_ray.errors import ResourceError
from mmkt_ray.sandbox.child import IN_PLACE, OUT_OF_MEMORY, READY, REPLY, ROWS_BYTES, TYPES, Limits, map_shared

if TYPE_CHECKING:
    from mmkt_ray.kinds.images import InputSize
    from mmkt_ray.kinds.modality_kind import ModalityKind

GROUP_BYTES, GROUP_SAMPLES = 4 << 20, 1024  # of a request, at most; a larger sample goes alone
FEW_SAMPLES = 64  # of a request, which a system call each costs nothing
PIPE_BYTES = 1 << 20  # a photo's pixels at once
START_TIMEOUT_S = 300.0  # the child's imports, on a busy machine
# freed pages are kept: fresh ones for each photo take more time than resizing it
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
GRACE_S = 10.0  # the child keeps the limit itself; if it does not, the parent ends it this much later


class DecodedSample(NamedTuple):
    """A decoded sample."""

    value: Any  # of the kind; an array of the size that was asked for
    changes: list[str]  # what was normalised
    digest: int  # 64-bit hash of the content: equal for what counts as a duplicate


class Broken(NamedTuple):
    """A sample that could not be decoded."""

    reason: str


def decode_samples(
    values: Sequence[Any],
    kind: ModalityKind,
    limits: Limits,
    size: InputSize | None = None,
    into: np.ndarray | None = None,
    num_children: int = 1,
) -> Iterator[DecodedSample | Broken]:
    """Decode encoded samples of one kind, as bytes or buffers, in order; never hangs, never dies of one.

    size: images of this size, as an encoder reads them; None: values of the kind. into: (N, ..) uint8, of which each
    sample's row gets its image. num_children: processes that decode side by side.
    Raises: ConfigError if the kind's decoder is not installed, ResourceError if no child process starts.
    """
    kind.check()
    order, sent = _Order(kind, limits, size, into), deque[_Sent]()
    try:
        for group in _groups(values, into, num_children):
            if len(sent) == num_children:
                yield from _outcomes(sent.popleft(), order)
            sent.append(_send(group, order))
        while sent:
            yield from _outcomes(sent.popleft(), order)
    finally:  # whoever wanted the rest is gone: these children are in the middle of their replies
        for _, decoder in sent:
            decoder.end()


class _Order(NamedTuple):
    kind: ModalityKind
    limits: Limits
    size: InputSize | None
    into: np.ndarray | None


# of this process, by what they decode with; another thread at work in the meantime starts one of its own
_idle: dict[str, list[Decoder]] = {}
os.register_at_fork(after_in_child=_idle.clear)  # two processes must not read from one pipe


class _Group(NamedTuple):
    start: int  # number of its first sample among all
    samples: list[Any]
    is_suspect: bool = False  # a child has died of it before


_Sent = tuple[_Group, "Decoder"]


def _groups(values: Sequence[Any], into: np.ndarray | None, num_children: int) -> Iterator[_Group]:
    most = min(GROUP_SAMPLES, -(-len(values) // num_children))
    if into is not None and len(into):
        most = max(1, min(most, ROWS_BYTES // into[0].nbytes))
    samples: list[Any] = []
    start = num_bytes = 0
    for i, value in enumerate(values):
        if samples and (num_bytes + len(value) > GROUP_BYTES or len(samples) == most):
            yield _Group(start, samples)
            start, samples, num_bytes = i, [], 0
        samples.append(value)
        num_bytes += len(value)
    if samples:
        yield _Group(start, samples)


def _send(group: _Group, order: _Order) -> _Sent:
    """Give the group to a child."""
    decoder = _take_decoder(order.kind.decoder)
    try:
        decoder.send(group, order)
    except BaseException:
        decoder.end()
        raise
    return group, decoder


def _outcomes(sent: _Sent, order: _Order) -> Iterator[DecodedSample | Broken]:
    """Of what was sent; what a child dies of is tried again, what it only lost too."""
    work: deque[_Group] = deque()
    while True:
        (start, samples, is_suspect), decoder = sent
        num_done = 0
        try:
            for outcome in decoder.receive(sent[0], order):
                yield outcome
                num_done += 1
        except _ChildDied:
            reason = decoder.why_it_died(order.limits)
            if is_suspect:
                yield Broken(reason)
            else:
                at = min(max(decoder.progress[0], num_done), len(samples) - 1)
                parts = [
                    _Group(start + num_done, samples[num_done:at]),
                    _Group(start + at, samples[at : at + 1], is_suspect=True),
                    _Group(start + at + 1, samples[at + 1 :]),
                ]
                work.extendleft(part for part in reversed(parts) if part.samples)
        except BaseException:  # as in decode_samples
            decoder.end()
            raise
        else:
            _idle.setdefault(order.kind.decoder, []).append(decoder)
        if not work:
            return
        sent = _send(work.popleft(), order)


def _take_decoder(function: str) -> Decoder:
    try:
        return _idle[function].pop()
    except (KeyError, IndexError):
        return Decoder(function)


class _ChildDied(Exception):
    pass


class Decoder:
    """A child process that decodes with a function (`module:function`), and the pipes to it.

    Raises: ResourceError if it does not start.
    """

    def __init__(self, function: str) -> None:
        shared = os.memfd_create("progress")
        self.progress, self.rows = map_shared(shared)  # [0]: index of the sample at work; arrays of the group at work
        root = str(Path(__file__).parents[2])  # the same code, wherever a job brought it
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mmkt_ray.sandbox.child", str(shared), function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[shared],
            bufsize=0,
            # threads would reserve address space
            env=MALLOC | os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"},
        )
        os.close(shared)
        assert self.process.stdin
        assert self.process.stdout
        self.requests, replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        for pipe in (self.requests, replies):
            with suppress(OSError):  # more pipes of this size than the user may have: slower
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.replies = io.BufferedReader(_Patient(replies, self._wait), 1 << 16)
        self.patience_s, self.is_overdue = START_TIMEOUT_S, False
        try:
            self._read(len(READY))
        except _ChildDied:
            self.end()
            raise ResourceError(
                f"the process that decodes samples does not start (exit code {self.process.returncode}); what it "
                "said is above or in the Ray worker's log: is the machine out of memory or processes?"
            ) from None

    def send(self, group: _Group, order: _Order) -> None:
        """Have a group decoded; if the child is dead, `receive` finds out."""
        self.progress[0], self.patience_s = 0, order.limits.timeout_s + GRACE_S
        row = None if order.into is None else order.into[group.start]
        request: dict[str, Any] = {"limits": order.limits, "lengths": list(map(len, group.samples))}
        request |= {"size": order.size, "row": row.shape if row is not None and row.nbytes <= ROWS_BYTES else None}
        head = json.dumps(request).encode() + b"\n"
        with suppress(BrokenPipeError):
            self._write(b"".join([head, *group.samples]) if len(group.samples) > FEW_SAMPLES else head)
            if len(group.samples) <= FEW_SAMPLES:  # large ones: not put together in memory
                for sample in group.samples:
                    self._write(sample)

    def _write(self, data: Any) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.requests, rest) :]

    def receive(self, group: _Group, order: _Order) -> Iterator[DecodedSample | Broken]:
        """Outcomes one by one. Raises: _ChildDied."""
        for i in range(len(group.samples)):
            is_decoded, note_bytes, number, digest, code, num_axes, *lengths = REPLY.unpack(self._read(REPLY.size))
            note = json.loads(self._read(note_bytes)) if note_bytes else []
            if not is_decoded:
                yield Broken(str(note))
                continue
            array = np.empty(lengths[:num_axes], TYPES[code]) if order.into is None else order.into[group.start + i]
            if code == IN_PLACE:
                array.reshape(-1)[:] = self.rows[i * array.nbytes : (i + 1) * array.nbytes]
            else:
                self._fill(array)
            yield DecodedSample(
                array if order.size is not None else order.kind.from_decoder(array, number), note, digest
            )

    def _read(self, num_bytes: int) -> bytes:
        data = self.replies.read(num_bytes)
        if len(data) < num_bytes:
            raise _ChildDied
        return data

    def _fill(self, array: np.ndarray) -> np.ndarray:
        if self.replies.readinto(array.reshape(-1).view(np.uint8).data) < array.nbytes:
            raise _ChildDied
        return array

    def _wait(self, poll: select.poll) -> None:
        """Until there is something to read. Raises: _ChildDied if the child stays with a sample for too long."""
        before = self.progress[0]
        while not poll.poll(self.patience_s * 1000):
            if self.progress[0] == before:
                self.is_overdue = True
                raise _ChildDied
            before = self.progress[0]

    def why_it_died(self, limits: Limits) -> str:
        """The reason that a user reads."""
        if not self.is_overdue:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
        self.end()
        code = self.process.returncode
        if self.is_overdue or code == -signal.SIGALRM:
            return f"took longer than samples.decode_timeout_s = {limits.timeout_s:g} s"
        if code == OUT_OF_MEMORY:
            return f"needs more memory to be decoded than {limits.memory_bytes / (1 << 30):.1f} GiB"
        if code < 0:
            return f"the decoder crashed: signal {-code} ({signal.Signals(-code).name})"
        return f"the decoder ended with exit code {code}"

    def end(self) -> None:
        """Kill the child if it lives."""
        with self.process:  # closes the pipes
            self.process.kill()


class _Patient(io.RawIOBase):
    """A pipe to read from after waiting as `wait` does."""

    def __init__(self, pipe: int, wait: Callable[[select.poll], None]) -> None:
        self.pipe, self.wait, self.poll = pipe, wait, select.poll()
        self.poll.register(pipe, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.wait(self.poll)
        return os.readv(self.pipe, [buffer])

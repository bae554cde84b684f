"""Encoded files are decoded by a child process, so that data that crashes, hangs or bloats a decoder costs one sample.

    parent: decode_samples --request: a group of samples--> child: serve
                           <--replies: one for each sample--

A request is a line of JSON and the samples' bytes; a reply is a `_REPLY` header, a note in JSON and the decoded array. The
child reads a request whole before it decodes, so neither waits for the other; its replies are buffered, so small images cost
few system calls. Which sample it is at stands in memory that both map: when the child dies, that one is tried once more,
alone in a new child, and is broken if that dies too. Whatever the child lost for another reason (the machine was out of
memory, someone killed it) is decoded again. A child imports NumPy and its decoder only and starts in a fraction of a second.
"""

from __future__ import annotations

import fcntl
import importlib
import io
import json
import mmap
import os
import resource
import select
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmkt_ray.errors import ResourceError

if TYPE_CHECKING:
    from mmkt_ray.config.samples import SamplesConfig  # a child imports neither
    from mmkt_ray.kinds.modalities import ModalityKind

GROUP_BYTES, GROUP_SAMPLES = 4 << 20, 1024  # of a request, at most; a larger sample goes alone
PIPE_BYTES = 1 << 20  # a photo's pixels at once
BASE_BYTES, BYTES_PER_PIXEL = 1 << 30, 40  # memory of the child: itself and any sound; the largest image in floats
START_TIMEOUT_S = 300.0  # the child's imports, on a busy machine
GRACE_S = 10.0  # the child keeps the limit itself; if it does not, the parent ends it this much later
OUT_OF_MEMORY = 71  # exit code
READY = b"ready\n"
# decoded or not; bytes of the note; the kind's number; of the array its type's code, number of axes, and their lengths
_REPLY = struct.Struct("<?IqBB4Q")
_TYPES = ("uint8", "float32", "int16", "int32", "int64", "float64")

Outcome = tuple[Any, list[str]]  # a value of the kind; what was normalised
Reply = tuple[np.ndarray, int, list[str]]  # of a kind's decoding function: array, number, what was normalised


class Broken(NamedTuple):
    """A sample that could not be decoded."""

    reason: str


class Limits(NamedTuple):
    """What one sample may take."""

    max_pixels: int
    timeout_s: float

    @classmethod
    def of(cls, samples: SamplesConfig) -> Limits:
        """As the config has them."""
        return cls(samples.max_image_pixels, samples.decode_timeout_s)

    @property
    def memory_bytes(self) -> int:
        """The address space of the child, for itself, its libraries and one sample."""
        return BASE_BYTES + BYTES_PER_PIXEL * self.max_pixels


def decode_samples(values: Sequence[bytes], kind: ModalityKind, limits: Limits) -> Iterator[Outcome | Broken]:
    """Decode encoded samples of one kind, in order; never hangs, never dies of one.

    Raises: ConfigError if the kind's decoder is not installed, ResourceError if no child process starts.
    """
    kind.check()
    for group in _groups(values):
        yield from _decode_group(group, kind, limits)


# --- parent --------------------

# of this process, by what they decode with; another thread at work in the meantime starts one of its own
_idle: dict[str, list[Decoder]] = {}
os.register_at_fork(after_in_child=_idle.clear)  # two processes must not read from one pipe


def _groups(values: Sequence[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    num_bytes = 0
    for value in values:
        if group and (num_bytes + len(value) > GROUP_BYTES or len(group) == GROUP_SAMPLES):
            yield group
            group, num_bytes = [], 0
        group.append(value)
        num_bytes += len(value)
    if group:
        yield group


def _decode_group(group: list[bytes], kind: ModalityKind, limits: Limits) -> Iterator[Outcome | Broken]:
    work = deque([(group, False)])  # samples, and whether a child has died of them before
    while work:
        samples, is_suspect = work.popleft()
        decoder = _take_decoder(kind.decoder)
        num_done = 0
        try:
            for outcome in decoder.decode(samples, kind, limits):
                yield outcome
                num_done += 1
        except _ChildDied:
            reason = decoder.why_it_died(limits)
            if is_suspect:
                yield Broken(reason)
                continue
            at = min(max(decoder.progress[0], num_done), len(samples) - 1)
            parts = [(samples[num_done:at], False), (samples[at : at + 1], True), (samples[at + 1 :], False)]
            work.extendleft(part for part in reversed(parts) if part[0])
        except BaseException:  # whoever wanted the rest is gone: the child is in the middle of its replies
            decoder.end()
            raise
        else:
            _idle.setdefault(kind.decoder, []).append(decoder)


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
        os.truncate(shared, mmap.PAGESIZE)
        self.progress = memoryview(mmap.mmap(shared, mmap.PAGESIZE)).cast("Q")  # [0]: index of the sample at work
        root = str(Path(__file__).parents[2])  # the same code, wherever a job brought it
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mmkt_ray.sandbox.decoding", str(shared), function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[shared],
            bufsize=0,
            env=os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"},  # threads would reserve address space
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

    def decode(self, samples: list[bytes], kind: ModalityKind, limits: Limits) -> Iterator[Outcome | Broken]:
        """Outcomes one by one. Raises: _ChildDied."""
        self.progress[0], self.patience_s = 0, limits.timeout_s + GRACE_S
        request = {"limits": limits, "lengths": [len(data) for data in samples]}
        rest = memoryview(b"".join([json.dumps(request).encode(), b"\n", *samples]))
        try:
            while rest:
                rest = rest[os.write(self.requests, rest) :]
        except BrokenPipeError:
            raise _ChildDied from None
        for _ in samples:
            yield self._receive(kind)

    def _receive(self, kind: ModalityKind) -> Outcome | Broken:
        is_decoded, note_bytes, number, code, num_axes, *lengths = _REPLY.unpack(self._read(_REPLY.size))
        note = json.loads(self._read(note_bytes)) if note_bytes else []
        if not is_decoded:
            return Broken(str(note))
        return kind.from_decoder(self._fill(np.empty(lengths[:num_axes], _TYPES[code])), number), note

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


# --- child --------------------


def serve(progress_fd: int, function: str) -> None:
    """Answer requests with `function` until the parent closes the pipe or is gone."""
    requests, replies = _take_pipes()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also in the midst of C code
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    progress = memoryview(mmap.mmap(progress_fd, mmap.PAGESIZE)).cast("Q")
    module, _, name = function.partition(":")
    decode = getattr(importlib.import_module(module), name)
    getattr(sys.modules[module], "warm_up", lambda: None)()
    replies.write(READY)
    replies.flush()
    while line := requests.readline():
        request = json.loads(line)
        samples = [requests.read(length) for length in request["lengths"]]
        limits = Limits(*request["limits"])
        _limit_memory(limits.memory_bytes)
        for i, data in enumerate(samples):
            progress[0] = i
            _reply(replies, *_decode(decode, data, limits))
        replies.flush()


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output; from here on what libraries print goes to standard error."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return open(requests, "rb"), open(replies, "wb", buffering=1 << 18)


def _limit_memory(num_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = 1 << 62 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_AS, (min(num_bytes, most), hard))


def _decode(
    decode: Callable[[bytes, int], Reply], data: bytes, limits: Limits
) -> tuple[np.ndarray | None, int, list[str] | str]:
    """The array, the kind's number, what was changed; None and a reason if the sample is broken."""
    signal.setitimer(signal.ITIMER_REAL, limits.timeout_s)
    try:
        return decode(data, limits.max_pixels)
    except MemoryError:  # perhaps of samples before this one: a new child tells
        os._exit(OUT_OF_MEMORY)
    except ValueError as error:
        return None, 0, str(error) or "damaged"
    except Exception as error:  # decoders meet damaged data with errors of every kind
        return None, 0, f"damaged: {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # writing may wait for the parent


def _reply(replies: IO[bytes], array: np.ndarray | None, number: int, note: list[str] | str) -> None:
    text = json.dumps(note).encode() if note else b""
    code, shape = (0, ()) if array is None else (_TYPES.index(array.dtype.name), array.shape)
    lengths = (*shape, *[0] * (4 - len(shape)))
    replies.write(_REPLY.pack(array is not None, len(text), number, code, len(shape), *lengths) + text)
    if array is not None:
        replies.write(np.ascontiguousarray(array).data)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        serve(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # without another try to write what the parent did not take

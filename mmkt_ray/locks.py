"""One command at a time in a folder, by a lock that does not outlive the process that holds it.

On a local disk the kernel keeps the lock (flock) and gives it back however the process ends. On an object store, and
on a disk without flock, it is a signature in <folder>/.lock that the process renews every HEARTBEAT_S: one that is
older than STALE_S, or whose process on this machine is gone, is taken over. pyarrow knows no "create if absent": of
two commands that begin at the same moment the one goes on whose signature is still there after SETTLE_S.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Annotated, Any

import pyarrow.fs as pafs
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from mmkt_ray import storage
from mmkt_ray.errors import DataError, ResourceError

log = logging.getLogger(__name__)

NAME = ".lock"
HEARTBEAT_S, STALE_S = 20.0, 120.0
SETTLE_S = 2.0  # longer than a put to an object store takes

Seconds = Annotated[float, Field(ge=0, lt=2**33)]  # since 1970


class _Signature(TypedDict):
    token: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    host: str
    since: Seconds
    at: Seconds


_SIGNATURE = TypeAdapter(_Signature)
_held: set[str] = set()  # folders that this process holds


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """Hold a folder, which is made if it is not there; within this process it may be held again meanwhile.

    Raises: ResourceError that says who holds it, and since when.
    """
    uri = storage.absolute(uri).rstrip("/")
    if uri in _held:
        yield
        return
    storage.make_dir(uri)
    is_local = isinstance(storage.resolve(uri)[0], pafs.LocalFileSystem)
    with (hold_by_kernel if is_local else hold_by_signature)(storage.join(uri, NAME)):
        _held.add(uri)
        try:
            yield
        finally:
            _held.discard(uri)


@contextmanager
def hold_by_kernel(uri: str) -> Iterator[None]:
    """Hold a file on a local disk. Raises: ResourceError if another process does, or if it is no file of its own."""
    with open(storage.resolve(uri)[1], "a+", opener=_open_regular) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked_error(uri, _read(uri)) from None
        except OSError:  # a file system that has no such locks
            with hold_by_signature(f"{uri}.json"):
                yield
            return
        file.truncate(0)
        file.write(json.dumps(_signature()))
        file.flush()
        yield
        file.truncate(0)


@contextmanager
def hold_by_signature(uri: str) -> Iterator[None]:
    """Hold an object. Raises: ResourceError if another process does."""
    other = _read(uri)
    if other and not _is_stale(other):
        raise _locked_error(uri, other)
    own = _signature()
    storage.write_json(uri, own)
    time.sleep(SETTLE_S)
    if (now := _read(uri)).get("token") != own["token"]:
        raise _locked_error(uri, now)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(uri, own, ended), daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        if _read(uri).get("token") == own["token"]:
            storage.remove(uri)


def _open_regular(path: str, flags: int) -> int:
    """Of a link it would be the file at its other end that is emptied; to open a pipe may take for ever."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise ResourceError(f"'{path}' is a link, a folder or a pipe where mmkt keeps its lock: remove it")
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _beat(uri: str, own: dict[str, Any], ended: threading.Event) -> None:
    """Renew the signature until the work has ended, or another process has taken over."""
    while not ended.wait(HEARTBEAT_S):
        try:
            if (now := _read(uri)).get("token", own["token"]) != own["token"]:
                log.error("%s; this command did not renew its lock for %g s", _locked_error(uri, now), STALE_S)
                return
            storage.write_json(uri, own | {"at": time.time()})
        except (OSError, ResourceError) as error:
            log.warning("cannot renew the lock %s (%s); trying again", uri, error)


def _signature() -> dict[str, Any]:
    now = time.time()
    return {"token": uuid.uuid4().hex, "pid": os.getpid(), "host": socket.gethostname(), "since": now, "at": now}


def _read(uri: str) -> dict[str, Any]:
    """The signature; empty if there is none, or none yet, or something else."""
    with suppress(FileNotFoundError, DataError, ValidationError):
        return dict(_SIGNATURE.validate_python(storage.read_json(uri), strict=True))
    return {}


def _is_stale(other: dict[str, Any]) -> bool:
    if other["host"] == socket.gethostname():
        with suppress(PermissionError):  # it lives, as another user's
            try:
                os.kill(other["pid"], 0)
            except ProcessLookupError:
                return True
    return bool(time.time() - other["at"] > STALE_S)


def _locked_error(uri: str, other: dict[str, Any]) -> ResourceError:
    """What a user reads who gave a second command."""
    who = "another process"
    if other:
        since = datetime.fromtimestamp(other["since"]).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
        who = f"process {other['pid']} on {other['host']}, since {since}"
    folder = uri.rpartition("/")[0]
    return ResourceError(f"'{folder}' is in use by {who}: wait for it to end, or choose another folder")

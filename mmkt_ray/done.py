"""What of a run was done, and from what, so that the same command does what is missing and nothing else.

`<run>/done.json` keeps for each step a digest of all that decides its result (settings, what it reads, this code) and
the checksums of the files that it wrote. A step is skipped where all of that is as it was. For `mmkt run` as a whole
it keeps the shards' identities, a listing of the run folder and what was printed:
if nothing changed, not even Ray and PyTorch are loaded.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from mmkt_ray import storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.errors import DataError
from mmkt_ray.record import IfAny, Record

log = logging.getLogger(__name__)

FILE = "done.json"
NOTHING = "nothing was to be done: the run is finished"
_NOT_RESULTS = (FILE, ".lock", ".lock.json")  # files in a run folder that come and go, or are about the others


class StepDone(Record, frozen=True, strict=True):
    """A step that is done."""

    digest: str  # of all that decides its result
    files: dict[str, str]  # place in the run folder -> checksum


class RunDone(Record, frozen=True, strict=True):
    """A whole `mmkt run`."""

    digest: str | None  # of all that decides it; None: it must be done again
    text: str  # that was printed


class Done(Record, frozen=True, strict=True):
    """What `done.json` holds."""

    steps: dict[str, StepDone] = Field(default_factory=dict)
    run: IfAny[RunDone] = None


def run_folder(config: Config) -> str:
    """Absolute path or URI of the run's folder."""
    return storage.absolute(storage.join(config.run_root, config.name))


@cache
def code_digest() -> str:
    """Of this package's source: another version does its steps again."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".j2"):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def listing(run_uri: str) -> dict[str, list[int]]:
    """Size in bytes and modification time in ns of each file in a run folder, by place in it."""
    start = storage.resolve(run_uri)[1].rstrip("/") + "/"
    files = storage.list_files(run_uri, recursive=True)
    found = {f.path.removeprefix(start): [f.size, f.mtime_ns] for f in files}
    return {place: about for place, about in found.items() if place not in _NOT_RESULTS}


# --- one step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step of a run.

    decided_by: JSON-able, all that decides the result, but for the code. files: that it writes, by place in the run
    folder; one that is not there afterwards is no result of this step.
    """

    run_uri: str
    name: str
    decided_by: Any
    files: Sequence[str]

    def is_done(self) -> bool:
        """Whether it was done from the same before, and its files are as it left them."""
        why = self._why_again()
        log.debug("step %s: %s", self.name, why or "is done, from the same")
        return why is None

    def _why_again(self) -> str | None:
        known = _read(self.run_uri).steps.get(self.name)
        if known is None:
            return "was not done before"
        if known.digest != self._digest():
            return "its settings, what it reads or this version are not as they were"
        found = _checksums(self.run_uri, known.files)
        changed = [place for place, checksum in known.files.items() if found[place] != checksum]
        return f"not as they were left: {', '.join(changed)}" if changed else None

    def keep(self) -> None:
        """It has just been done."""
        found = {
            place: checksum for place, checksum in _checksums(self.run_uri, self.files).items() if checksum is not None
        }
        before = _read(self.run_uri)
        done = StepDone(digest=self._digest(), files=found)
        _write(self.run_uri, before.replaced(steps=before.steps | {self.name: done}))

    def once(self, work: Callable[[], Any], again: bool = False) -> bool:
        """Do it, unless it is done; again: in any case. Returns whether it did it."""
        if not again and self.is_done():
            return False
        work()
        self.keep()
        return True

    def _digest(self) -> str:
        return fingerprint([code_digest(), self.decided_by])


def steps_done(run_uri: str, prefixes: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """Step -> what is kept of it, JSON-able, of the steps whose names begin so."""
    steps = _read(run_uri).steps
    return {name: about.to_dict() for name, about in sorted(steps.items()) if name.startswith(prefixes)}


def _checksums(run_uri: str, places: Iterable[str]) -> dict[str, str | None]:
    """None where there is no file."""
    uris = {place: storage.join(run_uri, place) for place in places}
    return {place: storage.file_checksum(uri) if storage.exists(uri) else None for place, uri in sorted(uris.items())}


# --- a whole run ----------------------------------------------------------------------------------------------------


def printed_before(config: Config) -> str | None:
    """What `mmkt run` printed when it had done all of this; None if it has not, or anything is not as it was then."""
    uri = run_folder(config)
    known = _read(uri).run
    return known.text if known and known.digest and known.digest == _run_digest(config, uri) else None


def keep_printed(config: Config, text: str) -> None:
    """Everything is done, and this is what was printed."""
    uri = run_folder(config)
    _write(uri, _read(uri).replaced(run=RunDone(digest=_run_digest(config, uri), text=text)))


def _run_digest(config: Config, uri: str) -> str | None:
    """Of the code, the config, the shards, and all that is in the run folder;
    None where models come from elsewhere."""
    from mmkt_ray.samples.reading_plan import ReadingPlan
    from mmkt_ray.samples.shards import list_shards

    variants = [config, *config.expand_variants().values()]
    if any(
        "/" in name for v in variants for name in (*v.training.transfer.init.values(), *v.training.transfer.teachers)
    ):
        return None
    excluded = [storage.absolute(v.training.exclude) for v in variants if v.training.exclude]
    left_out = [storage.file_checksum(file) if storage.exists(file) else None for file in excluded]
    shards = [shard.unit for variant in variants for shard in list_shards(ReadingPlan.of(variant))]
    return fingerprint([code_digest(), uri, config.model_dump(mode="json"), shards, left_out, listing(uri)])


def _read(run_uri: str) -> Done:
    """done.json; empty if there is none, or it is damaged: then all is done again."""
    try:
        return Done.read(storage.join(run_uri, FILE))
    except (FileNotFoundError, DataError):
        return Done()


def _write(run_uri: str, done: Done) -> None:
    done.write(storage.join(run_uri, FILE))

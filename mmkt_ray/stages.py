"""What a run keeps in `run.json` as its stages go by: their seconds, what each adds, the machine and the versions.

Called by steps.py and study_steps.py around each stage; scoring/run_file.py says what the file holds.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmkt_ray import cluster, progress, storage
from mmkt_ray.config import Config
from mmkt_ray.done import listing, run_folder
from mmkt_ray.features.store import Store
from mmkt_ray.locks import locked
from mmkt_ray.scoring.run_file import Place, RunFile

log = logging.getLogger(__name__)

LIBRARIES = ("ray", "torch", "torchvision", "scikit-learn", "pyarrow", "pandas", "numpy")


@dataclass
class Added:
    """What a stage adds to run.json, beside its seconds."""

    extracted: dict[str, str] | None = None
    singles: dict[str, Place] | None = None


@contextmanager
def recorded(config: Config, stage: str) -> Iterator[Added]:
    """Keep the seconds of a stage that did something, and what it adds, in run.json;
    a run folder that is there is locked."""
    start, added, uri = time.perf_counter(), Added(), run_folder(config)
    with locked(uri) if storage.exists(uri) else nullcontext(), progress.stage(stage):
        before = listing(uri)
        yield added
        known = RunFile.of(uri)
        changed = known.replaced(**{name: value for name, value in vars(added).items() if value is not None})
        if listing(uri) == before and changed.to_dict() == known.to_dict():
            log.info("%s: nothing was to be done", stage)
            return
        seconds = known.seconds | {stage: round(time.perf_counter() - start, 2)}
        changed.replaced(seconds=seconds).keep(uri)


def without_seconds(uri: str) -> dict[str, Any]:
    """What run.json says of the run, but for how long its stages took."""
    return {key: value for key, value in RunFile.of(uri).to_dict().items() if key != "seconds"}


def write_run_json(config: Config, stores: dict[str, Store]) -> None:
    """What was run: the config, where each variant's features and model lie, versions, commit and machine."""
    uri = run_folder(config)
    known = RunFile.of(uri)
    changed = known.replaced(
        name=config.name,
        config=config.model_dump(mode="json"),
        variants={name: Place(store=store.place, model=f"models/{name}") for name, store in stores.items()},
        versions={name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        commit=read_commit(),
        hardware=hardware(),
    )
    if changed.to_dict() != known.to_dict():
        changed.keep(uri)


def read_commit() -> str | None:
    """The commit of the code that ran, if it is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> str:
    """Cores, processor kind and memory of this machine."""
    memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return f"{cluster.cores()} cores, {platform.machine()}, {memory_gib} GiB"

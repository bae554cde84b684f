"""A process that reads damaged files of one kind: `python -m tests.samples.fuzz_worker KIND COUNT FOLDER`.

Wrong is what the readers' contract excludes: any exception but a UserError (a ValueError of a decoder), a table that
is not valid, the open of a file outside the folder, a pickle or code loaded, a process started, more memory than
GROWTH_BYTES, a file that takes longer than HANG_S. The file that is being read lies in FOLDER/in (image, sound, or
shard): after a crash it is still there. The last line of stdout counts the outcomes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from mmkt_ray.config import Config, parse_config
from mmkt_ray.errors import UserError
from mmkt_ray.kinds import images, sounds
from mmkt_ray.samples import archives, files, manifests, pages, parquet
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import UNMAPPED, reject_table
from mmkt_ray.samples.shards import list_shards
from tests.samples import fuzz_seeds
from tests.samples.fuzz_seeds import Case

# The limits that bound a reader's memory, at the size of these files
MAX_PIXELS, MAX_FRAMES, MAX_BYTES, CHUNK_BYTES = 1_000_000, 1_000_000, 4_000_000, 1_000_000
GROWTH_BYTES = 200_000_000  # of the peak, over what this process takes when it has read every undamaged file
ADDRESS_BYTES = 4_000_000_000  # beyond it an allocation fails, before it harms the machine
HANG_S = 20
SECRET = b"what lies outside of the folder"

Outcome = str


def main(kind: str, count: int, folder: Path) -> None:
    """Read `count` files of the kind; raises what is wrong with one of them."""
    limit()
    inside, outside = folder / "in", folder / "outside"
    prepare(inside, outside)
    for case in SEEDS[kind]().items():
        assert READ[kind](*written(kind, case, inside)) in ("decoded", "all rows"), case[0]
    outcomes: Counter[Outcome] = Counter()
    watch = Watch(outside)
    peak = peak_bytes()

    def check(case: Case) -> None:
        path, layout = written(kind, case, inside)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        with watch:
            outcomes[READ[kind](path, layout)] += 1
        faulthandler.cancel_dump_traceback_later()
        assert peak_bytes() - peak < GROWTH_BYTES, f"{case[0]}: {peak_bytes() - peak:,} bytes more than before"

    fuzz = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # the file itself is kept: no need to find a smaller one
        suppress_health_check=list(HealthCheck),
    )(seed(0)(given(fuzz_seeds.strategies()[kind])(check)))
    sys.addaudithook(watch.audit)
    fuzz()
    print(json.dumps({"outcomes": outcomes, "peak_growth_bytes": peak_bytes() - peak}))


SEEDS: dict[str, Callable[[], dict[str, bytes]]] = {
    "images": fuzz_seeds.images,
    "sounds": fuzz_seeds.sounds,
    "tars": fuzz_seeds.tars,
    "parquet": fuzz_seeds.parquets,
    "manifests": fuzz_seeds.manifests,
}


def limit() -> None:
    """Small limits, so that what is beyond them shows."""
    sounds.MAX_AUDIO_FRAMES = MAX_FRAMES
    for module in (archives, files, manifests, pages, parquet):
        for name in ("MAX_FILE_BYTES", "MAX_ROW_BYTES", "MAX_PAGE_BYTES"):
            if hasattr(module, name):
                setattr(module, name, MAX_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Watch:
    """Within it nothing forbidden may be done: the kernel tells opens below `outside`,
    Python's audit events all else."""

    FORBIDDEN = ("pickle.find_class", "marshal.loads", "exec", "subprocess.Popen", "os.system", "os.exec", "os.fork")
    FORBIDDEN += (
        "os.posix_spawn",
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.symlink",
        "shutil.rmtree",
        "socket.connect",
    )
    FORBIDDEN += ("socket.getaddrinfo", "ctypes.dlopen")

    def __init__(self, outside: Path) -> None:
        self.seen: list[str] = []
        self.active = False
        libc = ctypes.CDLL(None, use_errno=True)
        self.inotify = libc.inotify_init1(os.O_NONBLOCK)
        opened_or_read = 0x20 | 0x1
        watched = libc.inotify_add_watch(self.inotify, bytes(outside), opened_or_read)
        assert watched > 0, os.strerror(ctypes.get_errno())

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook; it cannot be removed, for which this is a process of its own."""
        if not self.active:
            return
        mode = args[1] if event == "open" and isinstance(args[1], str) else ""
        if event.startswith(self.FORBIDDEN) or set(mode) & set("wax+"):
            caller = traceback.extract_stack(limit=2)[0].filename
            if not caller.startswith("<frozen importlib"):  # a module that is imported late
                self.seen.append(f"{event} {args[:2]!r:.200} by {caller}")

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *_: object) -> None:
        self.active = False
        with suppress(BlockingIOError):
            self.seen.append(f"outside opened: {os.read(self.inotify, 4096)!r}")
        assert not self.seen, self.seen


# --- what is read --------------------


def prepare(inside: Path, outside: Path) -> None:
    """The folder that is read, with links that lead out of it."""
    for folder in (inside, outside):
        folder.mkdir(parents=True)
    (outside / "secret.png").write_bytes(SECRET)
    for name in ("a.png", "b.png"):
        (inside / name).write_bytes(fuzz_seeds.PNG)
    (inside / "link.png").symlink_to(outside / "secret.png")
    (inside / "linked").symlink_to(outside)
    (inside / "loop").symlink_to("loop")
    os.mkfifo(inside / "pipe")


def written(kind: str, case: Case, folder: Path) -> tuple[Path, str]:
    """The case as a file, and its layout."""
    name, data = case
    layout = name.split()[0]
    suffix = {"tars": "tar", "parquet": "parquet", "manifests": layout}.get(kind, kind)
    path = folder / f"case.{suffix}"
    path.write_bytes(data)
    return path, layout if kind == "tars" else kind


def read_image(path: Path, _: str) -> Outcome:
    """Decode one image."""
    try:
        pixels = images.decode_image(path.read_bytes(), MAX_PIXELS)
    except ValueError:
        return "refused"
    assert pixels.ndim == 3, pixels.shape
    assert pixels.shape[2] == 3, pixels.shape
    return "decoded"


def read_sound(path: Path, _: str) -> Outcome:
    """Decode one sound."""
    try:
        clip = sounds.decode_audio(path.read_bytes())
    except ValueError:
        return "refused"
    assert 0 < len(clip.samples) <= MAX_FRAMES, clip.samples.shape
    return "decoded"


def read_shard(path: Path, layout: str) -> Outcome:
    """Read one shard as the pipeline does, and decode its images."""
    num_rows = num_rejects = 0
    try:
        for config in configs(layout, path):
            plan = ReadingPlan.of(config)
            for chunk in (chunk for shard in list_shards(plan) for chunk in read_chunks(plan, shard)):
                chunk.table.validate(full=True)
                reject_table(chunk.rejects).validate(full=True)
                num_rows += chunk.table.num_rows
                num_rejects += sum(reject.stage != UNMAPPED for reject in chunk.rejects)
                use(chunk.table.to_pylist())
    except UserError:
        return "user error"
    return ("some rows" if num_rejects else "all rows") if num_rows else ("no rows" if num_rejects else "empty")


READ: dict[str, Callable[[Path, str], Outcome]] = {
    **{"images": read_image, "sounds": read_sound, "tars": read_shard, "parquet": read_shard, "manifests": read_shard}
}


def use(rows: list[dict[str, Any]]) -> None:
    """What comes after reading: cells as Python's, images decoded."""
    for row in rows:
        assert SECRET not in row.values(), "a file outside of the folder was read"
        if row.get("image") is not None:
            try:
                images.decode_image(row["image"], MAX_PIXELS)
            except ValueError:
                continue


_COLUMNS: dict[str, list[dict[str, str]]] = {
    "webdataset": [{"image": "png,jpg", "text": "txt", "label": "json.kind", "key": "__key__"}],
    "folders": [{"text": "content", "label": "folder"}],
    "parquet": [
        {"image": "image", "text": "text", "label": "label", "tags": "tags"},
        {"image": "raw", "text": "name", "label": "when", "sample_id": "id"},
        {"image": "image.bytes", "text": "text", "label": "name", "tags": "text"},
    ],
    "manifests": [{"image": "file", "text": "text", "label": "label", "tags": "tags"}],
}
_parsed: dict[str, list[Config]] = {}


def configs(layout: str, path: Path) -> list[Config]:
    """Configs that read the shard, each in other columns."""
    if (known := f"{layout} {path}") not in _parsed:
        _parsed[known] = [
            _config(layout.removesuffix("s") if layout == "manifests" else layout, path, c) for c in _COLUMNS[layout]
        ]
    return _parsed[known]


def _config(reader: str, path: Path, columns: dict[str, str]) -> Config:
    kinds = {"image": {"kind": "image", "encoder": "pixels"}, "text": {"kind": "text", "encoder": "tfidf"}}
    tasks = {"label": {}, "tags": {"kind": "multilabel"}}
    return parse_config(
        {
            "name": "fuzz",
            "data_root": str(path.parent),
            "samples": {"sources": [{"reader": reader, "path": path.name, "columns": columns}]},
            "modalities": {m: kind for m, kind in kinds.items() if m in columns},
            "tasks": {t: task for t, task in tasks.items() if t in columns},
            "extract": {"chunk_bytes": CHUNK_BYTES},
        }
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

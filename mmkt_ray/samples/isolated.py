"""A shard that has killed its reader is read by a child process,
so that a file that crashes Arrow costs no more than a part.

Who reads in a Ray task knows by the task's attempt number that a process died of it before (or a node was lost):
nothing has to be written down, and a shard that is read at the first attempt costs nothing. The child sends blocks; a
row group of a Parquet file that ends two children is told in one reject, and the next one follows.
Of another file the rest is lost.

    parent: read_isolated --a line of JSON--> child: serve
                          <--frames: a line of JSON, and a block's columns as an Arrow IPC stream--
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from mmkt_ray.errors import ConfigError, DataError, ResourceError
from mmkt_ray.kinds.cells import escape_id
from mmkt_ray.ray_private import attempt_number
from mmkt_ray.samples.columns import Block, Reading
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import DAMAGE, Reject, Shard

MEMORY_BYTES = 8 << 30  # address space of a child: pages of a Parquet file may be 1 GB, packed and unpacked
BLOCK_TIMEOUT_S = 600  # for a block to be read, not for the parent to take it


def died_before() -> bool:
    """Whether this is the second or a later attempt of a Ray task:
    the process, or the node, of the first one died."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and attempt_number() > 0


# --- parent --------------------


def read_isolated(reading: Reading) -> Iterator[Block]:
    """Blocks of a shard, in order, and a reject for each part of it that two children died of.

    Raises: DataError and ConfigError as the reader does, OSError for what else went wrong,
    ResourceError if no child starts.
    """
    group = num_blocks = num_deaths = 0  # what is here: all row groups before this one, and so many blocks of it
    num_groups = group_rows = 0  # not known yet
    while True:
        num_frames = num_seen = 0
        with _child(reading, group) as child:
            assert child.stdout
            for frame, data in _frames(child.stdout):
                num_frames += 1
                if "end" in frame:
                    return
                if "error" in frame:
                    kinds = {"DataError": DataError, "ConfigError": ConfigError}
                    raise kinds.get(frame["error"], OSError)(frame["text"])
                if "group" in frame:
                    num_groups, group_rows = frame["num_groups"], frame["num_rows"]
                    if frame["group"] != group:
                        group, num_blocks, num_seen, num_deaths = frame["group"], 0, 0, 0
                    continue
                num_seen += 1
                if num_seen > num_blocks:
                    num_blocks += 1
                    yield _unpack(frame, data)
        if not num_frames and child.returncode > 0:
            raise ResourceError(
                f"the process that reads '{reading.shard.name}' does not start (exit code {child.returncode}); what "
                "it said is in the log above, or in Ray's logs of the worker"
            )
        num_deaths += 1
        if num_deaths == 2:
            yield Block([], {}, rejects=[_lost(reading, group, num_groups, group_rows, child.returncode)])
            group, num_blocks, num_deaths = group + 1, 0, 0
            if group >= num_groups:
                return


def _lost(reading: Reading, group: int, num_groups: int, num_rows: int, code: int) -> Reject:
    """What stands for a part that cannot be read. num_rows: of the row group, 0 if that is not known."""
    why = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
    if code == -signal.SIGALRM:
        why = f"nothing came in {BLOCK_TIMEOUT_S} s"
    name = escape_id(reading.shard.name)
    what = f"row group {group + 1} of {num_groups}" if num_groups > 1 else "the shard"
    reason = (
        f"reading {what} ends the process that reads it, each time: {why}; its rows from here on are lost: write the "
        "file again with another version of the writer, or take it out"
    )
    return reading.reject(f"{name}#row-group-{group}" if num_groups > 1 else name, reason, DAMAGE, num_rows)


@contextmanager
def _child(reading: Reading, group: int) -> Iterator[subprocess.Popen[bytes]]:
    """A child that reads a shard from a row group on; it has ended afterwards, also where nobody wants the rest."""
    request = {"plan": reading.plan.to_json(), "shard": vars(reading.shard), "group": group}
    root = str(Path(__file__).parents[2])  # the same code, wherever a job brought it
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "mmkt_ray.samples.isolated"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as child:
        try:
            assert child.stdin
            with suppress(BrokenPipeError), child.stdin as stream:  # it died already: no frame will come
                stream.write(json.dumps(request).encode())
            yield child
            child.wait()  # before the kill, which would hide what it died of
        finally:
            child.kill()


def _frames(stream: IO[bytes]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Whole frames, up to where the child died."""
    while (line := stream.readline()).endswith(b"\n"):
        frame = json.loads(line)
        data = stream.read(frame.get("num_bytes", 0))
        if len(data) < frame.get("num_bytes", 0):
            return
        yield frame, data


def _unpack(frame: dict[str, Any], data: bytes) -> Block:
    table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
    columns = {n: table.column(n).combine_chunks() for n in table.column_names}
    errors, unread = ({int(i): why for i, why in frame[name].items()} for name in ("errors", "unread"))
    return Block(frame["ids"], columns, errors, unread, [Reject(*reject) for reject in frame["rejects"]])


# --- child --------------------


def serve_shard() -> None:
    """Read one shard from a row group on, and send what is in it."""
    request, out = json.loads(sys.stdin.buffer.read()), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is for the log
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    reading = Reading(ReadingPlan.from_json(request["plan"]), Shard(**request["shard"]))
    try:
        signal.alarm(BLOCK_TIMEOUT_S)
        for frame, data in _read(reading, request["group"]):
            signal.alarm(0)  # the parent takes a block when it has use for it
            out.write(json.dumps(frame | {"num_bytes": len(data)}).encode() + b"\n" + data)
            out.flush()  # or what is read is lost with what crashes
            signal.alarm(BLOCK_TIMEOUT_S)
    except MemoryError:  # of a part that wants more than it may: as a crash, the next part may be read
        raise
    except Exception as error:  # told by the parent
        signal.alarm(0)
        kind = type(error).__name__
        text = str(error) if isinstance(error, DataError | ConfigError) else f"{kind}: {error}"
        out.write(json.dumps({"error": kind, "text": text}).encode() + b"\n")
        out.flush()


def _read(reading: Reading, group: int) -> Iterator[tuple[dict[str, Any], bytes]]:
    from mmkt_ray.samples.parquet import count_row_groups, read_parquet, rows_before
    from mmkt_ray.samples.readers import read_blocks

    parts: Iterator[tuple[int, Iterator[Block]]]
    if reading.source.reader == "parquet":
        num_groups = count_row_groups(reading)
        parts = ((g, read_parquet(reading, g)) for g in range(group, num_groups))
    else:
        num_groups, parts = 1, iter([(0, read_blocks(reading))])
    for number, blocks in parts:
        rows = rows_before(reading, number + 1) - rows_before(reading, number) if num_groups > 1 else 0
        yield {"group": number, "num_groups": num_groups, "num_rows": rows}, b""
        for block in blocks:
            yield _pack(block)
            if reading.source.reader == "parquet" and not block.columns:  # damage: the rest is lost, as for any reader
                yield {"end": True}, b""
                return
    yield {"end": True}, b""


def _pack(block: Block) -> tuple[dict[str, Any], bytes]:
    table = pa.table(block.columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    rejects = [list(vars(r).values()) for r in block.rejects]
    rest = {"ids": block.ids, "errors": block.errors, "unread": block.unread, "rejects": rejects}
    return rest, sink.getvalue().to_pybytes()


if __name__ == "__main__":
    serve_shard()

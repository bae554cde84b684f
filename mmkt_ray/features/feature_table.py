"""The table that training and evaluation read. Arrays over 4 MB are memory-mapped from unlinked temporary files.

Such a file vanishes with its array, and the kernel drops its pages when memory is short. So any length fits.

Axes: N samples, D features of one modality, C classes of one task.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from mmkt_ray import storage
from mmkt_ray.encoders.encoder import Features
from mmkt_ray.errors import ResourceError
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.kinds.task_kind import TaskKind

MAPPED_BYTES = 4_000_000  # of one array, above which it is mapped
TAKE_ROWS = 8192  # copied at a time
LABEL_PARTS = ("values", "labelled", "known")  # arrays of `Labels`


@dataclass(frozen=True)
class Ids:
    """Sample ids, read like an array (N,) of str: all of them end to end in UTF-8, and where each begins."""

    text: np.ndarray  # (bytes,) uint8
    starts: np.ndarray  # (N + 1,) int64

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Ids:
        """Of a column of strings without nulls."""
        whole = column.cast(pa.large_string()).combine_chunks()
        starts = np.append(0, np.cumsum(pc.binary_length(whole).to_numpy(), dtype=np.int64))
        data = whole.buffers()[2]
        first = np.frombuffer(whole.buffers()[1], np.int64)[whole.offset] if len(whole) else 0
        return cls(np.frombuffer(data or b"", np.uint8)[first : first + starts[-1]], starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, rows: Any) -> Any:
        """One id as str, or those of a slice, of indices or of a mask as an array of str."""
        if isinstance(rows, slice):
            return self._arrow()[rows].to_numpy(zero_copy_only=False)
        if np.ndim(rows) == 0:
            return self._arrow()[int(rows)].as_py()
        return self._arrow().take(pa.array(np.arange(len(self))[rows])).to_numpy(zero_copy_only=False)

    def __iter__(self) -> Iterator[str]:
        return (scalar.as_py() for scalar in self._arrow())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def astype(self, dtype: Any) -> np.ndarray:
        """All of them as NumPy's strings (`str`) or objects."""
        return np.asarray(self, dtype)

    def tolist(self) -> list[str]:
        """All of them."""
        values: list[str] = self._arrow().to_pylist()
        return values

    def take(self, rows: np.ndarray) -> Ids:
        """Those of some rows."""
        return Ids.of(pa.chunked_array([self._arrow().take(pa.array(rows))]))

    def _arrow(self) -> pa.LargeStringArray:
        return pa.LargeStringArray.from_buffers(len(self), pa.py_buffer(self.starts), pa.py_buffer(self.text))


@dataclass(frozen=True)
class FeatureTable:
    """What training and evaluation read: N samples."""

    sample_id: np.ndarray | Ids  # (N,) str
    split: np.ndarray  # (N,) str
    features: dict[str, Features]  # modality -> (N, D) float32, zero rows where absent
    present: dict[str, np.ndarray]  # modality -> (N,) bool
    labels: dict[str, Labels]  # task -> of N rows; they know their kind
    class_names: dict[str, list[str]]  # task -> sorted classes of the train split

    @property
    def kinds(self) -> dict[str, TaskKind]:
        """task -> kind."""
        return {task: labels.kind for task, labels in self.labels.items()}

    def width(self, task: str) -> int:
        """How many numbers a model gives for a row of a task: K."""
        return self.labels[task].kind.width(self.class_names[task])

    def rows(self, split: str) -> np.ndarray:
        """Indices of the samples of one split."""
        return np.flatnonzero(self.split == split)

    def take(self, rows: np.ndarray) -> FeatureTable:
        """The table of some rows, by index; mapped like any other where it is large."""
        if len(rows) <= TAKE_ROWS:
            return self._take(rows)
        return concat_tables(self._take(rows[i : i + TAKE_ROWS]) for i in range(0, len(rows), TAKE_ROWS))

    def _take(self, rows: np.ndarray) -> FeatureTable:
        ids = self.sample_id
        return FeatureTable(
            ids.take(rows) if isinstance(ids, Ids) else ids[rows],
            self.split[rows],
            {m: f[rows] for m, f in self.features.items()},
            {m: p[rows] for m, p in self.present.items()},
            {t: y[rows] for t, y in self.labels.items()},
            self.class_names,
        )


class Growing:
    """An array that grows along its first axis, in memory; in a file above MAPPED_BYTES, unless it holds Python
    objects."""

    def __init__(self) -> None:
        self.pieces: list[np.ndarray] = []
        self.num_bytes = 0
        self.file: IO[bytes] | None = None

    def add(self, piece: np.ndarray) -> None:
        """More rows, of the same type and width. Raises: ResourceError if there is no room for the file."""
        self.pieces.append(piece)
        self.num_bytes += piece.nbytes
        if self.num_bytes > MAPPED_BYTES and piece.dtype != object:
            with _explained_if_full():
                self.file = self.file or tempfile.TemporaryFile(prefix="mmkt-features-")  # noqa: SIM115  (the array keeps it)
                for waiting in self.pieces:
                    self.file.write(np.ascontiguousarray(waiting).data)
            self.pieces = [piece[:0]]

    def array(self) -> np.ndarray:
        """All that was added. Raises: as `add`."""
        if self.file is None:
            return np.concatenate(self.pieces)
        with _explained_if_full():
            self.file.flush()
        mapped = np.memmap(self.file, self.pieces[0].dtype, mode="r+")
        return np.asarray(mapped).reshape(-1, *self.pieces[0].shape[1:])


@contextmanager
def _explained_if_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in storage.FULL:
            raise
        raise ResourceError(
            f"disk full: '{tempfile.gettempdir()}' has no room for the features of a table, which are mapped from a "
            "file there; free some space, or set TMPDIR to a folder on a larger disk, and run the same command again"
        ) from error


def concat_tables(tables: Iterable[FeatureTable]) -> FeatureTable:
    """The rows of tables of the same columns (at least one table);
    besides the result one table is in memory at a time."""
    arrays: dict[tuple[str, str], Growing] = {}
    for table in tables:
        for key, piece in _arrays(table):
            arrays.setdefault(key, Growing()).add(piece)
        last = table
    whole = {key: growing.array() for key, growing in arrays.items()}
    features: dict[str, Features] = {}
    for m, own in last.features.items():
        if isinstance(own, np.ndarray):
            features[m] = whole["dense", m]
        else:
            parts = (whole["data", m], whole["indices", m], _starts(whole["counts", m]))
            features[m] = sp.csr_matrix(parts, shape=(len(parts[2]) - 1, own.shape[1]), copy=False)
    ids = last.sample_id
    return replace(
        last,
        sample_id=Ids(whole["text", "sample_id"], _starts(whole["counts", "sample_id"]))
        if isinstance(ids, Ids)
        else whole["", "sample_id"],
        split=whole["", "split"],
        features=features,
        present={m: whole["present", m] for m in last.present},
        labels={t: Labels(y.kind, *(whole[part, t] for part in LABEL_PARTS)) for t, y in last.labels.items()},
    )


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each of N runs of so many values begins, and the last one ends: (N + 1,)."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _arrays(table: FeatureTable) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """The arrays of a table, all of which grow with its rows."""
    if isinstance(table.sample_id, Ids):
        yield ("text", "sample_id"), table.sample_id.text
        yield ("counts", "sample_id"), np.diff(table.sample_id.starts).astype(np.int32)
    else:
        yield ("", "sample_id"), table.sample_id
    yield ("", "split"), table.split
    yield from ((("present", m), p) for m, p in table.present.items())
    yield from (((part, t), getattr(y, part)) for t, y in table.labels.items() for part in LABEL_PARTS)
    for m, features in table.features.items():
        if isinstance(features, np.ndarray):
            yield ("dense", m), features
        else:
            yield ("data", m), features.data
            yield ("indices", m), features.indices
            yield ("counts", m), np.diff(features.indptr)

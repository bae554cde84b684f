"""The feature store: a Parquet folder that any reader opens, its manifest, and the table that training reads.

    <store>/data/part-*.parquet   sample_id, split, <modality>_features (null when absent), one column per task;
                                  <modality>_hash of the content, `cleaned`: what was normalised in the row
    <store>/rejects.parquet       sample_id, source, stage, reason
    <store>/manifest.json         published last, with the checksum of each part; a folder without it is not a store

Axes: N samples, D features of one modality, C classes of one task. Dense features are fixed-size lists of float32 or
float16; sparse ones are structs of `indices: list<int32>` and `values: list<float32>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from mmkt_ray import storage
from mmkt_ray.config import SPLITS, Config
from mmkt_ray.encoders.encoder import Features
from mmkt_ray.errors import ConfigError, DataError, nearest
from mmkt_ray.features.feature_table import FeatureTable, Ids, concat_tables
from mmkt_ray.features.manifest import MANIFEST, Manifest
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.kinds.tasks import task_kind

SPARSE = pa.struct([("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float32()))])


def column_of(modality: str) -> str:
    """Name of a modality's feature column."""
    return f"{modality}_features"


def hash_of(modality: str) -> str:
    """Name of the column with the 64-bit hash of a modality's content."""
    return f"{modality}_hash"


def feature_type(dim: int, sparse: bool, dtype: str = "float32") -> pa.DataType:
    """Arrow type of a feature column of width `dim`; `dtype` is that of dense features."""
    return SPARSE if sparse else pa.list_(pa.from_numpy_dtype(dtype), dim)


def part_schema(config: Config, widths: dict[str, tuple[int, bool]]) -> pa.Schema:
    """The schema of every part of a store, whatever is null in it. widths: modality -> (D, sparse)."""
    columns = [("sample_id", pa.string()), ("split", pa.string()), ("key", pa.string())]
    columns += [(column_of(m), feature_type(*w, config.extract.feature_dtype)) for m, w in sorted(widths.items())]
    columns += [(hash_of(m), pa.uint64()) for m in sorted(widths)]
    columns += [(task, config.tasks[task].kind.arrow_type) for task in sorted(config.tasks)]
    return pa.schema([*columns, ("cleaned", pa.list_(pa.string()))])


def to_arrow(features: Features, present: np.ndarray, dtype: str = "float32") -> pa.Array:
    """Features of the present rows (P, D) -> column of N rows with nulls. present: (N,) bool with P true."""
    null = pa.array(~present)
    if isinstance(features, sp.csr_matrix):
        matrix = features
        starts = np.zeros(len(present) + 1, dtype=np.int32)
        starts[1:][present] = np.diff(matrix.indptr)
        starts = np.cumsum(starts, dtype=np.int32)
        indices = pa.ListArray.from_arrays(pa.array(starts), pa.array(matrix.indices.astype(np.int32)))
        values = pa.ListArray.from_arrays(pa.array(starts), pa.array(matrix.data.astype(np.float32)))
        return pa.StructArray.from_arrays([indices, values], fields=list(SPARSE), mask=null)
    dense = np.zeros((len(present), features.shape[1]), dtype=dtype)
    dense[present] = features
    return pa.FixedSizeListArray.from_arrays(pa.array(dense.ravel()), dense.shape[1], mask=null)


def from_arrow(column: pa.Array | pa.ChunkedArray, dim: int) -> tuple[Features, np.ndarray]:
    """Column of N rows -> features (N, D), zero rows where null, and presence (N,) bool."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    present = ~column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_struct(column.type):
        indices, values = (column.field(i).filter(pa.array(present)) for i in (0, 1))
        counts = np.zeros(len(column) + 1, dtype=np.int64)
        counts[1:][present] = np.diff(indices.offsets.to_numpy())
        data = (values.flatten().to_numpy(), indices.flatten().to_numpy(), np.cumsum(counts))
        return sp.csr_matrix(data, shape=(len(column), dim), dtype=np.float32), present
    dense = np.zeros((len(column), dim), dtype=np.float32)
    dense[present] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return dense, present


_COMPARED: set[tuple[str, str | None]] = set()  # parts and checksums that this process found to agree


@dataclass(frozen=True)
class Store:
    """An opened, complete feature store."""

    uri: str
    manifest: Manifest

    @property
    def place(self) -> str:
        """The store's folder in its run folder."""
        return f"features/{self.uri.rsplit('/', 1)[-1]}"

    @property
    def identity(self) -> list[Any]:
        """What tells the store's content from any other's, JSON-able."""
        return [self.manifest.fingerprint, self.manifest.checksums]

    def parts(self) -> list[str]:
        """URIs of the data files, in the order of the shards that they came from."""
        return [storage.join(self.uri, "data", name) for name in self.manifest.parts]

    def table_bytes(self) -> int:
        """About what `table` of all modalities takes: features of 16 bits in the files have 32 in memory."""
        return 2 * sum(int(file.size) for file in storage.list_files(storage.join(self.uri, "data")))

    def dim(self, modality: str) -> int:
        """Feature width of a modality."""
        return self.manifest.modalities[modality].dim

    def kind(self, task: str) -> TaskKind:
        """Kind of a task."""
        return task_kind(self.manifest.tasks[task].kind)

    def read(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The parts one after another, with some or all columns.
        Raises: DataError for a part that is damaged or gone.

        A process compares a part with its checksum once, when it reads it first,
        for which the part is read as a whole.
        """
        for name, uri in zip(self.manifest.parts, self.parts(), strict=True):
            expected = self.manifest.checksums.get(name)
            try:
                yield storage.read_table(uri, columns, expected=None if (uri, expected) in _COMPARED else expected)
            except FileNotFoundError:
                raise DataError(f"'{uri}' is gone: run the same command again, which makes it anew") from None
            _COMPARED.add((uri, expected))

    def table(self, modalities: Sequence[str] | None = None, tasks: Sequence[str] | None = None) -> FeatureTable:
        """Load features and labels. Raises: ConfigError for a modality or task that the store does not have."""
        about = self.manifest
        modalities = sorted(about.modalities) if modalities is None else sorted(modalities)
        tasks = sorted(about.tasks) if tasks is None else sorted(tasks)
        for what, names, known in (("modality", modalities, [*about.modalities]), ("task", tasks, [*about.tasks])):
            for name in names:
                if name not in known:
                    raise ConfigError(f"the store has no {what} '{name}': {nearest(name, known)}")
        return concat_tables(self.tables(modalities, tasks))

    def tables(self, modalities: Sequence[str], tasks: Sequence[str]) -> Iterator[FeatureTable]:
        """The same as `table`, part by part."""
        for piece in self.read(["sample_id", "split", *map(column_of, modalities), *tasks]):
            yield self._load(piece, modalities, tasks)

    def copy_encoders(self, modalities: Iterable[str], run_uri: str, model_uri: str) -> None:
        """Put the run's encoders that these features came from into a model's folder,
        which predicts by itself then."""
        for modality in modalities:
            for folder in self.manifest.modalities[modality].folders:
                storage.copy_folder(
                    storage.join(run_uri, "encoders", folder), storage.join(model_uri, "encoders", folder)
                )

    def _load(self, rows: pa.Table, modalities: Sequence[str], tasks: Sequence[str]) -> FeatureTable:
        loaded = {m: from_arrow(rows.column(column_of(m)), self.dim(m)) for m in modalities}
        class_names = {t: list(self.manifest.tasks[t].classes) for t in tasks}
        return FeatureTable(
            sample_id=Ids.of(rows.column("sample_id")),
            split=np.array(SPLITS, dtype=object)[pc.index_in(rows.column("split"), pa.array(SPLITS)).to_numpy()],
            features={m: f for m, (f, _) in loaded.items()},
            present={m: p for m, (_, p) in loaded.items()},
            labels={t: self.kind(t).encode(rows.column(t), class_names[t]) for t in tasks},
            class_names=class_names,
        )


def open_store(uri: str) -> Store:
    """Open a published store. Raises: DataError if it is none, is unfinished, or is of another schema version."""
    try:
        return Store(uri, Manifest.read(storage.join(uri, MANIFEST)))
    except FileNotFoundError:
        raise DataError(
            f"'{uri}' is no finished feature store (no manifest.json): run `mmkt extract` with the same config"
        ) from None


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Publish a store: from now on `open_store` opens it."""
    manifest.write(storage.join(uri, MANIFEST))

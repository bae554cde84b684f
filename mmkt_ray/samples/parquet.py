"""Parquet shards, read column by column: plain, nested, and as the Hugging Face libraries write them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, KeysView, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mmkt_ray import storage
from mmkt_ray.errors import DataError, nearest
from mmkt_ray.kinds.arrow import Converted, is_list
from mmkt_ray.kinds.cells import TEXT_OF, escape_id
from mmkt_ray.kinds.content import what_else
from mmkt_ray.kinds.label_columns import label_column
from mmkt_ray.kinds.modality_kind import Source
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.samples.arrays import ArrayFile, open_arrays
from mmkt_ray.samples.columns import BLOCK_BYTES, BLOCK_ROWS, MAX_FILE_BYTES, Block, Reading
from mmkt_ray.samples.files import FileReader
from mmkt_ray.samples.pages import WatchedFile, most_bytes_of_a_value

_MAX_LISTS = 8  # in one another
_READ_BYTES = 4 << 20  # read at a time from each column of a shard

RENAME = "rename all but the one that is meant, and write the file again"


def read_parquet(reading: Reading, group: int | None = None) -> Iterator[Block]:
    """Blocks of a Parquet shard, or of one row group of it; the id of a row is its index.

    Raises: DataError if a column that the config names is missing or of a type that cannot be read.
    """
    reading = narrowed_to_shard(reading)
    first = rows_before(reading, group) if group else 0
    with open_arrays(reading) as arrays:
        for batch in read_batches(reading, reading.paths, group):
            if isinstance(batch, Block):
                yield batch
                continue
            if first == 0:
                _check_lengths(reading, arrays)
            yield _convert(reading, batch, first, {c: a.column(first, batch.num_rows) for c, a in arrays.items()})
            first += batch.num_rows


def _check_lengths(reading: Reading, arrays: Mapping[str, ArrayFile]) -> None:
    """Raises: DataError for an array with another number of rows than the shard, whose footer can be read."""
    fs, path = storage.resolve(reading.shard.uri)
    for array in arrays.values():
        array.check_length(pq.read_metadata(path, filesystem=fs).num_rows)


def narrowed_to_shard(reading: Reading) -> Reading:
    """The reading without what the shard has no column for, where `absent: null` says so,
    and with names for patterns."""
    known = parquet_columns(reading) if reading.source.absent == "null" or reading.has_patterns else None
    return reading.settled(known).narrowed(known) if known else reading


def parquet_columns(reading: Reading) -> KeysView[str]:
    """The columns of a shard, in their order, and those nested in them, by dotted path;
    none where its footer is damaged."""
    fs, path = storage.resolve(reading.shard.uri)
    try:
        schema = pq.read_schema(path, filesystem=fs)
    except (pa.ArrowException, OSError, ValueError):  # told by the reader, which opens it again
        return dict[str, None]().keys()
    return {leaf: None for f in schema for leaf, _ in _leaves(f.name, f.type)}.keys()


def count_row_groups(reading: Reading) -> int:
    """At least one, which its reader finds empty, or damaged where the footer cannot be read."""
    fs, path = storage.resolve(reading.shard.uri)
    try:
        return max(1, int(pq.read_metadata(path, filesystem=fs).num_row_groups))
    except (pa.ArrowException, OSError, ValueError) as error:
        if not is_damage(error, fs):  # it may have more of them
            raise
        return 1


def rows_before(reading: Reading, group: int) -> int:
    """Rows in the row groups before this one."""
    fs, path = storage.resolve(reading.shard.uri)
    metadata = pq.read_metadata(path, filesystem=fs)
    return sum(metadata.row_group(g).num_rows for g in range(group))


def read_batches(reading: Reading, paths: list[str], group: int | None = None) -> Iterator[pa.RecordBatch | Block]:
    """Small batches of the columns `paths` (dotted for nested ones), at most `limit` rows in all;
    of one row group, if named.

    If the file is damaged, the last item is a block with the reject that says so.
    Raises: DataError for a missing column.
    """
    fs, path = storage.resolve(reading.shard.uri)
    remaining = reading.source.limit
    if remaining is not None and group:
        remaining -= rows_before(reading, group)
        if remaining <= 0:
            return
    try:
        with fs.open_input_file(path) as stream:
            watched = None if isinstance(fs, pafs.LocalFileSystem) else WatchedFile(stream)
            # pages are read one by one: buffering ahead would hold a whole row group of the shard
            source = stream if watched is None else pa.PythonFile(watched, mode="r")
            file = pq.ParquetFile(source, pre_buffer=False, buffer_size=_READ_BYTES)
            _check_columns(reading, file.schema_arrow, paths)
            paths = sorted({_to_read(file.schema_arrow, path) for path in paths})
            groups = range(file.num_row_groups)[slice(group, None if group is None else group + 1)]
            num_rows = _rows_per_block(file, paths, groups, stream, watched)
            for batch in file.iter_batches(num_rows, groups, columns=paths, use_threads=False):
                if remaining is not None:
                    batch = batch.slice(0, remaining)
                    remaining -= batch.num_rows
                if batch.num_rows:
                    yield batch
                if remaining == 0:
                    return
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a size or a name in the file's metadata
        if not is_damage(error, fs):
            raise
        start = next(storage.read_pieces(reading.shard.uri, 64), b"")
        yield Block([], {}, rejects=[reading.unreadable(error, "" if start.startswith(b"PAR1") else what_else(start))])


def is_damage(error: Exception, fs: pafs.FileSystem) -> bool:
    """True if the file's content is at fault; False for disk or network, which a retry may mend."""
    if isinstance(error, OSError):  # pyarrow raises OSError without errno for damaged pages too
        return error.errno is None and isinstance(fs, pafs.LocalFileSystem)
    return True


def _check_columns(reading: Reading, schema: pa.Schema, paths: list[str]) -> None:
    leaves = [leaf for f in schema for leaf in _leaves(f.name, f.type)]
    known, times = dict(leaves), Counter(path for path, _ in leaves)
    where = f"samples.sources[{reading.shard.source}].columns"
    for path in paths:
        if path not in known:
            raise DataError(f"{where}: '{reading.shard.name}' has no column '{path}'; {nearest(path, known)}")
        if times[path] > 1:
            raise DataError(f"{where}: '{reading.shard.name}' has {times[path]} columns called '{path}': {RENAME}")
        if name := storage.extension_in(known[path]):
            raise DataError(
                f"{where}: '{reading.shard.name}' has '{path}' as '{name}', an extension type, whose code would run "
                "on the file's values (Ray's unpickles them): write the column with a plain type"
            )


def _leaves(path: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """A column and the columns nested in it, by dotted path."""
    yield path, kind
    if pa.types.is_struct(kind):
        for inner in kind:
            yield from _leaves(f"{path}.{inner.name}", inner.type)
    elif is_list(kind) and pa.types.is_struct(kind.value_type):
        for inner in kind.value_type:
            yield f"{path}.{inner.name}", pa.list_(inner.type)


def _to_read(schema: pa.Schema, path: str) -> str:
    """The column to read for a path: itself, or the list of structs that holds it."""
    known = dict(leaf for f in schema for leaf in _leaves(f.name, f.type))
    outer = path.rpartition(".")[0]
    return outer if path not in schema.names and outer in known and is_list(known[outer]) else path


def _rows_per_block(
    file: pq.ParquetFile, paths: list[str], groups: Sequence[int], stream: Any, watched: WatchedFile | None
) -> int:
    """Rows that make up about a block's bytes in the row group with the largest rows;
    fewer where a value may be in many rows.

    stream: the file, for its pages' headers to be looked at;
    watched: the same on a server, which looks at most of them later.
    Raises: ValueError for a page that is too large.
    """
    names = [file.schema.column(c).path for c in range(len(file.schema))]
    columns = [c for c, name in enumerate(names) if any(f"{name}.".startswith(f"{path}.") for path in paths)]
    largest = 1.0
    for g in groups:
        group = file.metadata.row_group(g)
        num_bytes = sum(group.column(c).total_uncompressed_size for c in columns)
        largest = max(largest, num_bytes / max(group.num_rows, 1))
    repeated = most_bytes_of_a_value(file, stream, columns, groups, thrifty=watched is not None)
    if watched is not None:
        watched.watch(file, columns, groups, repeated)
    return int(max(1, min(BLOCK_ROWS, BLOCK_BYTES // largest, MAX_FILE_BYTES // max(repeated, 1))))


def _convert(reading: Reading, batch: pa.RecordBatch, first: int, beside: Mapping[str, pa.Array]) -> Block:
    """beside: columns by our name, of arrays beside the shard."""
    places = escape_id(f"{reading.shard.name}#")
    ids = [f"{places}{first + i}" for i in range(batch.num_rows)]
    converted: dict[str, pa.Array] = {}
    errors: dict[int, str] = {}
    unread: dict[int, str] = {}
    features = features_in(batch.schema)
    for column, path in reading.source.columns.items():
        raw = beside.get(column)
        if raw is None:
            raw = column_at(batch, path) if isinstance(path, str) else _struct_of(batch, path)
        try:
            converted[column], wrong = _convert_column(reading, column, raw, features, path)
        except (pa.ArrowException, TypeError) as error:
            raise DataError(
                f"'{reading.shard.name}': column '{path}' ({raw.type}) cannot be read as {column}: {error}"
            ) from None
        reasons = unread if column in reading.plan.modalities else errors
        for i, reason in wrong.items():
            reason = f"{column}: {reason}{reading.theirs(column)}"
            reasons[i] = f"{reasons[i]}; {reason}" if i in reasons else reason
    if "sample_id" in converted:
        mapped = converted.pop("sample_id").to_pylist()
        for i, value in enumerate(mapped):
            if value is None:
                errors.setdefault(i, "sample_id is null")
        ids = [place if value is None else escape_id(value) for place, value in zip(ids, mapped, strict=True)]
    return Block(ids, converted, errors, unread)


def column_at(batch: pa.RecordBatch, path: str) -> pa.Array:
    """The column at a dotted path, null where a struct above it is; a top-level name with dots wins."""
    if path in batch.schema.names:
        column = batch.column(path)
    else:
        outer, _, inner = path.rpartition(".")
        column = _field_of(column_at(batch, outer), inner)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _struct_of(batch: pa.RecordBatch, paths: Sequence[str]) -> pa.Array:
    """Columns side by side as one of structs."""
    return pa.StructArray.from_arrays([column_at(batch, path) for path in paths], names=list(paths))


def _field_of(column: pa.Array, name: str) -> pa.Array:
    """A field of structs, or of lists of them: then as lists, null where these are."""
    if not is_list(column.type):
        return pc.struct_field(column, name)
    ends = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False))
    mask = np.append(column.is_null().to_numpy(zero_copy_only=False), False)
    starts = pa.array(np.append(0, ends), pa.int32(), mask=mask)
    return pa.ListArray.from_arrays(starts, pc.struct_field(column.flatten(), name))


def _convert_column(
    reading: Reading, column: str, raw: pa.Array, features: Any, path: str | tuple[str, ...]
) -> Converted:
    """features: as `features_in` has them."""
    if pa.types.is_null(raw.type) or (pa.types.is_floating(raw.type) and _is_empty(raw)):
        return pa.nulls(len(raw), reading.schema.field(column).type), {}
    kind = reading.kinds[column]

    def names_of(name: str) -> list[str] | None:
        return class_names_in(features, name or str(path))

    if isinstance(kind, TaskKind):
        return kind.from_arrow(raw, names_of(""), reading.separator(column))
    if not isinstance(kind, str):
        return kind.from_arrow(raw, Source(reading.source.encoding, FileReader(reading).read, names_of))
    converted, errors = label_column(raw, names_of(""), TEXT_OF[kind])
    return converted.cast(reading.schema.field(column).type), errors


def _is_empty(raw: pa.Array) -> bool:
    """True if all values of a float column are null or NaN: pandas makes it of a column in which nothing is there."""
    return int(raw.is_null(nan_is_null=True).true_count) == len(raw)



def features_in(schema: pa.Schema) -> Any:
    """What the metadata of the Hugging Face `datasets` library say of the columns; None without such."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):  # other metadata than this
        return None


def class_names_in(features: Any, path: str) -> list[str] | None:
    """Names of a column of ClassLabel, or of lists of it; None if it is none."""
    try:
        feature = _without_lists(_feature_at(features, path))
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
        return [str(name) for name in names] if names else None
    except (KeyError, TypeError, ValueError):  # the integers stand for themselves
        return None


def _feature_at(features: Any, path: str) -> Any:
    """The feature of a column at a dotted path, through structs and lists of them; a name with dots wins."""
    features = _without_lists(features)
    if path in features:
        return features[path]
    outer, _, inner = path.rpartition(".")
    if not outer:
        raise KeyError(path)
    return _feature_at(_feature_at(features, outer), inner)


def _without_lists(feature: Any) -> Any:
    """What a feature's lists hold: `Sequence`, `List` and `LargeList` name it, older files write a list of one."""
    for _ in range(_MAX_LISTS):
        if isinstance(feature, list):
            feature = feature[0] if feature else None
        elif isinstance(feature, dict) and isinstance(feature.get("_type"), str) and "feature" in feature:
            feature = feature["feature"]
        else:
            break
    return feature

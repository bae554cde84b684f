"""The middle stages of the pipeline: encode and reduce one chunk. Decoding comes before them, see decode.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.encoders.build import build_encoder, load_fitted
from mmkt_ray.errors import ResourceError
from mmkt_ray.features.chunks import ChunkRow, make_row, open_row, part_name
from mmkt_ray.features.decode import (
    UNREADABLE,
    Prepared,
    changes_of,
    decode_column,
    note_changes,
    note_content,
    prepared_values,
    select_values,
    settle_broken,
)
from mmkt_ray.features.store import column_of, feature_type, from_arrow, hash_of, part_schema, to_arrow
from mmkt_ray.kinds.lists import pool_features
from mmkt_ray.samples.schema import reject_table

if TYPE_CHECKING:
    import torch  # imported where something is encoded: the other stages' processes start seconds sooner

NOT_ENCODED = "not encoded"  # in `cleaned`: it was decoded, and its encoder gave no usable features
FEW_ROWS = 16  # of a chunk, that networks on a CPU may take one by one
FIRST_CALLS, QUICK_S = 3, 0.05  # calls that tell whether one thread is quick, and what is: seconds for a row


@dataclass(frozen=True)
class EncodePlan:
    """What an encoder actor needs to know."""

    config: Config
    encoders: dict[str, str]  # modality -> folder of its fitted encoder
    reuse: dict[str, str]  # modality -> another store whose parts hold the same features already
    use_gpu: bool
    num_threads: int
    gpu_frac: float = 1.0  # of a GPU that several actors share


def assigned_device(use_gpu: bool, gpu_frac: float = 1.0) -> torch.device:
    """The device that Ray gave this actor, where a GPU is always number 0. Of a shared GPU, the actor takes no more
    than its share of memory. Raises: ResourceError if torch can't use it."""
    import torch

    if use_gpu and not torch.cuda.is_available():
        raise ResourceError(
            "Ray gave this encoder actor a GPU, but torch finds none: is the driver there, is this torch built for "
            "it? Set extract.num_gpus=0 to encode on CPUs"
        )
    if use_gpu and gpu_frac < 1:
        torch.cuda.set_per_process_memory_fraction(gpu_frac)  # Ray counts GPUs, it does not divide them
    return torch.device("cuda" if use_gpu else "cpu")


class SampleEncoder:
    """Decodes samples and makes features of every modality, with encoders that it loads once. Knows no Ray.

    Threads may share it: chunks take turns in an encoder, unless the encoder is `concurrent`.
    """

    def __init__(self, plan: EncodePlan, device: torch.device) -> None:
        self.plan, self.device, self._pass_size = plan, device, plan.config.extract.encode_batch_size
        self.encoders: dict[str, Any] = {}
        self._row_s: list[float] = []  # of the first calls with few rows
        for name, uri in sorted(plan.encoders.items()):
            encoder = load_fitted(build_encoder(plan.config.modalities[name].encoder), uri)
            if hasattr(encoder, "to"):
                encoder.to(device, self._pass_size)
            self.encoders[name] = encoder
        alone = {m: not getattr(e, "concurrent", False) for m, e in self.encoders.items()}
        self._turns = {m: threading.Lock() if alone[m] else nullcontext() for m in self.encoders}
        self._last_end = dict.fromkeys(self.encoders, 0.0)  # of a chunk in each encoder
        self.schema = part_schema(
            plan.config, {m: (e.dim, getattr(e, "sparse", False)) for m, e in self.encoders.items()}
        )

    @contextmanager
    def answering(self, num_rows: int) -> Iterator[None]:
        """Within it networks on a CPU take few rows one by one:
        a pass has one shape, and costs as much if most of it is padding.

        They do so in one thread as long as that is quick: to wake another for each of a network's operations, where
        it does not spin, costs more than it does (10 ms became 22 with EfficientNet-Lite0). Not for what goes into a
        store: its features would differ in their last bits. One thread at a time.
        """
        import torch

        few = self.device.type == "cpu" and num_rows <= FEW_ROWS
        size = 1 if few else self.plan.config.extract.encode_batch_size
        if size != self._pass_size:
            self._pass_size = size
            for encoder in self.encoders.values():
                if hasattr(encoder, "to"):
                    encoder.to(self.device, size)
        if not few or (len(self._row_s) == FIRST_CALLS and min(self._row_s) > QUICK_S):
            yield
            return
        num_threads, start = torch.get_num_threads(), time.perf_counter()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)
            if len(self._row_s) < FIRST_CALLS:  # the first one warms up
                self._row_s.append((time.perf_counter() - start) / max(1, num_rows))

    def encode_samples(
        self,
        samples: pa.Table,
        unit: str,
        stored: Mapping[str, pa.Table | None],
        seconds: dict[str, float],
        prepared: Mapping[str, pa.Buffer] = MappingProxyType({}),
    ) -> tuple[pa.Table, pa.Table]:
        """Samples -> a part of a store, and the rejects: rows that lost one or all of their modalities.

        stored: modality -> its columns for these samples, where another store has them. seconds: by stage, added to.
        prepared: modality -> the array that its column names rows of, where the stage before has decoded it.
        """
        start = time.perf_counter()
        samples, values, broken = self._decode(samples, stored, prepared)
        seconds["decode"] = seconds.get("decode", 0.0) + time.perf_counter() - start
        keep, rejects = settle_broken(samples, broken, list(self.encoders), unit)
        samples, mask = samples.filter(pa.array(keep)), pa.array(keep)
        columns: dict[str, pa.Array] = {}
        refused: dict[str, dict[int, str]] = {}
        for name in self.encoders:
            part = stored.get(name)
            if part is None:
                chosen = select_values(values[name], keep)
                columns[column_of(name)], refused[name] = self._encode(name, chosen, seconds)
                with self._turns[name]:
                    changes = changes_in(self.encoders[name], chosen)
                samples = note_changes(samples, name, changes)
            else:
                part = part.filter(mask)
                columns[column_of(name)] = part.column(column_of(name)).combine_chunks()
                refused[name] = known_refused(part, name)
        lost = {m: np.isin(np.flatnonzero(keep), np.array(list(rows), np.int64)) for m, rows in broken.items()}
        samples, more = settle_refused(samples, columns, refused, lost, unit)
        part = pa.table({name: samples.column(name) for name in self.schema.names}, schema=self.schema)
        return part, pa.concat_tables([rejects, more])

    def _encode(
        self, name: str, values: Sequence[Any], seconds: dict[str, float]
    ) -> tuple[pa.Array, dict[int, str]]:
        """Features of a modality's values, and row -> why there are none though there is a value."""
        start = time.perf_counter()
        pooled = self.plan.config.modalities[name].kind.pooled
        with self._turns[name]:
            found = encode_column(self.encoders[name], values, self.plan.config.extract.feature_dtype, pooled)
        end = time.perf_counter()  # seconds that two chunks in flight share count once
        seconds[f"encode {name}"] = max(0.0, end - max(start, self._last_end[name]))
        self._last_end[name] = end
        return found

    def _decode(
        self, samples: pa.Table, stored: Mapping[str, pa.Table | None], prepared: Mapping[str, pa.Buffer]
    ) -> tuple[pa.Table, dict[str, Sequence[Any]], dict[str, dict[int, str]]]:
        """The samples with hashes of their content; values of each modality that is not stored already, None where
        absent; and by modality the rows that can't be decoded."""
        values: dict[str, Sequence[Any]] = {}
        broken: dict[str, dict[int, str]] = {}
        for name, encoder in self.encoders.items():
            if (part := stored.get(name)) is not None:
                if hash_of(name) not in samples.column_names:  # not decoded by the stage before
                    known = [{NOT_ENCODED, *cell} for cell in changes_of(samples, name)]  # from reading
                    changes = [
                        [c for c in cell if c not in k] for cell, k in zip(changes_of(part, name), known, strict=True)
                    ]
                    lost = (i for i, cell in enumerate(changes) if UNREADABLE in cell)
                    broken[name] = dict.fromkeys(lost, "unreadable, as found when the modality was encoded")
                    samples = note_content(samples, name, part[hash_of(name)].combine_chunks(), changes)
                continue
            found = prepared_values(samples, name, prepared.get(name))
            if found is not None:
                values[name] = found
            else:
                kind, config = self.plan.config.modalities[name].kind, self.plan.config.samples
                decoded = decode_column(samples.column(name), kind, encoder, config, max(1, self.plan.num_threads))
                values[name], broken[name] = decoded.values, decoded.broken
                samples = note_content(samples, name, decoded.hashes, decoded.changes)
        return samples, values, broken


class EncodeChunk(SampleEncoder):
    """Stage 3: decode, then features of every modality. Runs in an actor that loads the encoders once."""

    def __init__(self, plan: EncodePlan) -> None:
        import torch

        from mmkt_ray import cluster

        cluster.keep_freed_memory()
        torch.set_num_threads(plan.num_threads)
        super().__init__(plan, assigned_device(plan.use_gpu, plan.gpu_frac))

    def __call__(self, row: ChunkRow) -> ChunkRow:
        unit, index, last, samples, rejects, seconds, prepared = open_row(row)
        stored = {m: _stored(uri, unit, index, last, m, samples) for m, uri in self.plan.reuse.items()}
        part, own = self.encode_samples(samples, unit, stored, seconds, prepared)
        return make_row(unit, index, last, part, pa.concat_tables([rejects, own]), seconds)


def encode_column(
    encoder: Any, values: Sequence[Any], dtype: str = "float32", pooled: str | None = None
) -> tuple[pa.Array, dict[int, str]]:
    """Values (N, None where absent) -> feature column of N rows, and row -> what is wrong with the features it got.

    Null where a value is absent or its features are refused: they are of another width, or not finite as `dtype`.
    pooled: mean or max, of the features of values that are lists of several.
    """
    wrong = _refused(encoder, values)
    rows = np.array([i for i, value in enumerate(values) if value is not None and i not in wrong], dtype=np.int64)
    kind = feature_type(encoder.dim, getattr(encoder, "sparse", False), dtype)
    if not len(rows):
        return pa.nulls(len(values), kind), wrong
    given: Any = values.take(rows) if isinstance(values, Prepared) else [values[i] for i in rows]
    features, refused = _features_of_rows(encoder, given, dtype, pooled)
    good = np.array([i not in refused for i in range(len(rows))])
    present = np.zeros(len(values), dtype=bool)
    present[rows[good]] = True
    if not good.any():
        column = pa.nulls(len(values), kind)
    else:
        column = to_arrow(features if good.all() else features[np.flatnonzero(good)], present, dtype)
    return column, wrong | {int(rows[i]): why for i, why in refused.items()}


def _refused(encoder: Any, values: Sequence[Any]) -> dict[int, str]:
    """Row -> why the encoder takes no such value."""
    if not hasattr(encoder, "refused"):
        return {}
    rows = [i for i, value in enumerate(values) if value is not None]
    return {rows[i]: why for i, why in encoder.refused([values[i] for i in rows]).items()}


def changes_in(encoder: Any, values: Sequence[Any]) -> list[list[str]]:
    """For each value (N, None where absent), what the encoder ignores in it; empty for one that reads all."""
    if not hasattr(encoder, "changes"):
        return []
    found = iter(encoder.changes([value for value in values if value is not None]))
    return [[] if value is None else next(found) for value in values]


def _features_of_rows(encoder: Any, values: Any, dtype: str, pooled: str | None) -> tuple[Any, dict[int, str]]:
    """As `checked_features`; pooled where values are lists. One item without features rejects the row."""
    if pooled is None:
        return checked_features(encoder, values, dtype)
    counts = np.array([len(several) for several in values])
    features, wrong = checked_features(encoder, [item for several in values for item in several], dtype)
    row = np.repeat(np.arange(len(values)), counts)
    return pool_features(features, counts, pooled), {int(row[i]): why for i, why in wrong.items()}


def checked_features(encoder: Any, values: Any, dtype: str) -> tuple[Any, dict[int, str]]:
    """Features (B, D) of values, and row -> why its features are none: such rows hold zeros.

    A batch whose features are not (B, D) is encoded value by value, so that only the faulty values are lost.
    """
    features, why = _as_features(encoder, encoder.encode(values), len(values))
    if features is None and len(values) > 1:
        alone = [checked_features(encoder, values[i : i + 1], dtype) for i in range(len(values))]
        rows: Any = [own for own, _ in alone]
        whole = sp.vstack(rows, format="csr") if getattr(encoder, "sparse", False) else np.concatenate(rows)
        return whole, {i: w[0] for i, (_, w) in enumerate(alone) if w}
    if features is None:
        empty = np.zeros((1, encoder.dim), dtype=np.float32)
        return (sp.csr_matrix(empty) if getattr(encoder, "sparse", False) else empty), {0: why}
    return features, _not_finite(features, dtype)


def _as_features(encoder: Any, given: Any, num_values: int) -> tuple[Any, str]:
    """What an encoder returned as (B, D), sparse if it says so, or None and what is wrong with it."""
    try:
        sparse = getattr(encoder, "sparse", False)
        features: Any = sp.csr_matrix(given) if sparse else given.toarray() if sp.issparse(given) else np.asarray(given)
        if features.dtype.kind not in "biuf":
            raise ValueError(f"values of type {features.dtype}")
        if features.shape != (num_values, encoder.dim):
            raise ValueError(f"shape {features.shape} for {num_values} values")
        if sparse:
            features.check_format(full_check=True)
        return features, ""
    except (TypeError, ValueError) as error:
        return None, f"the encoder gave no features of width {encoder.dim}: {error}"


def _not_finite(features: Any, dtype: str) -> dict[int, str]:
    """Row -> why its features cannot be kept as `dtype`."""
    sparse = sp.issparse(features)
    with np.errstate(over="ignore"):
        numbers = (features.data if sparse else features).astype(np.float32 if sparse else dtype)
    if np.isfinite(numbers).all():
        return {}
    bad = ~np.isfinite(numbers)
    rows = (
        np.searchsorted(features.indptr, np.flatnonzero(bad), side="right") - 1
        if sparse
        else bad.any(axis=1).nonzero()[0]
    )
    return {
        int(i): f"the encoder gave NaN, infinity or a number too large for {numbers.dtype}" for i in np.unique(rows)
    }


def known_refused(part: pa.Table, name: str) -> dict[int, str]:
    """Rows of a stored part whose features of a modality were refused."""
    return {
        i: "no usable features, as found when the modality was encoded"
        for i, changes in enumerate(changes_of(part, name))
        if NOT_ENCODED in changes
    }


def settle_refused(
    samples: pa.Table,
    columns: dict[str, pa.Array],
    refused: dict[str, dict[int, str]],
    lost: dict[str, np.ndarray],
    unit: str,
) -> tuple[pa.Table, pa.Table]:
    """The samples that stay, with their features, and a reject for each row whose features of a modality were
    refused.

    Args as in `settle_broken`; columns: name -> features of all samples.
    """
    none = np.zeros(len(samples), dtype=bool)
    gone = {m: lost.get(m, none) for m in refused}
    keep, rejects = settle_broken(samples, refused, list(refused), unit, "encode", gone)
    for name, rows in refused.items():
        if rows:
            changes = [[NOT_ENCODED] if i in rows else [] for i in range(len(samples))]
            samples = note_changes(samples, name, changes)
    for name, column in columns.items():
        samples = samples.append_column(name, column)
    return samples if keep.all() else samples.filter(pa.array(keep)), rejects


def _stored(uri: str, unit: str, index: int, last: bool, modality: str, samples: pa.Table) -> pa.Table | None:
    """The modality's columns for these samples from another store's part, or None if it lacks any of them."""
    columns = ["sample_id", column_of(modality), hash_of(modality), "cleaned"]
    try:
        part = storage.read_table(storage.join(uri, "data", part_name(unit, index, last)), columns)
    except FileNotFoundError:
        return None
    where = pc.index_in(samples.column("sample_id").combine_chunks(), part.column("sample_id").combine_chunks())
    if where.null_count:
        return None
    return part.take(where)


def reduce_part(
    batch: dict[str, Any], source_uri: str, reducers: dict[str, Any], dims: dict[str, int], dtype: str = "float32"
) -> ChunkRow:
    """Reducers applied to one stored part; every other column as it is."""
    start = time.perf_counter()
    name = str(batch["name"][0])
    part = reduce_features(storage.read_table(storage.join(source_uri, "data", name)), reducers, dims, dtype)
    unit, index, *end = name.removesuffix(".parquet").split("-")
    seconds = {"reduce": time.perf_counter() - start}
    return make_row(unit, int(index), bool(end), part, reject_table([]), seconds)


def reduce_features(part: pa.Table, reducers: dict[str, Any], dims: dict[str, int], dtype: str = "float32") -> pa.Table:
    """A part with reducers (by modality) applied. dims: widths of the features before, by modality."""
    for modality, reducer in reducers.items():
        position = part.column_names.index(column_of(modality))
        features, present = from_arrow(part.column(position), dims[modality])
        if present.any():
            reduced = to_arrow(reducer.encode(features[present]), present, dtype)
        else:
            reduced = pa.nulls(len(part), feature_type(reducer.dim, getattr(reducer, "sparse", False), dtype))
        part = part.set_column(position, column_of(modality), reduced)
    return part

"""The values of a chunk: decoded, resized for their encoder, hashed.

Axes: N rows, P values of one size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray.config import Config
from mmkt_ray.config.samples_config import SamplesConfig
from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.features.chunks import ChunkRow, cell_buffers, make_row, open_row
from mmkt_ray.features.store import hash_of
from mmkt_ray.kinds.content import hash_json
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.samples.schema import MODALITY, Reject, reject_table
from mmkt_ray.sandbox.child import Limits
from mmkt_ray.sandbox.decoding import Broken, decode_samples

if TYPE_CHECKING:
    from mmkt_ray.kinds.images import InputSize

PREPARED = b"prepared"  # metadata of a column of rows of an array: that they are, its shape and its type
UNREADABLE = "unreadable"  # in `cleaned`: the modality was there and could not be decoded


class Prepared(Sequence[Any]):
    """Values (N,) of one size in one array; None for a row without one."""

    def __init__(self, array: np.ndarray, places: np.ndarray) -> None:
        """array: (P, ..). places: (N,) of the values in it, -1 for none."""
        self.array, self.places = array, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        at = self.places[i]
        return None if at < 0 else self.array[at]

    def filter(self, keep: np.ndarray) -> Prepared:
        """Those with `keep` (N,) true."""
        return Prepared(self.array, self.places[keep])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The values of rows that have one; without a copy where the rows are consecutive, as in most chunks."""
        at = self.places[rows]
        if len(at) and (np.diff(at) == 1).all():
            return self.array[at[0] : at[-1] + 1]
        return np.asarray(self.array[at])


class Decoded(NamedTuple):
    """The values of a column of N cells."""

    values: Sequence[Any]  # prepared; None where null or broken
    broken: dict[int, str]  # row -> why it could not be decoded
    hashes: list[int | None]  # of the content
    changes: list[list[str]]  # what was normalised while decoding


def input_size(kind: ModalityKind, encoder: Any, samples: SamplesConfig) -> InputSize | None:
    """The size of images that an encoder reads; None where it gets values as they are, or prepares them itself."""
    size: InputSize | None = getattr(encoder, "input_size", None) if kind.scales else None
    return None if size is None else size._replace(scaled=samples.decode == "scaled")


def decoding(kinds: Sequence[ModalityKind], samples: SamplesConfig) -> dict[str, str]:
    """What the fingerprint of features has in addition where images are not decoded in full."""
    return {"decode": samples.decode} if samples.decode != "exact" and any(kind.scales for kind in kinds) else {}


def decode_column(
    column: pa.ChunkedArray,
    kind: ModalityKind,
    encoder: Any,
    samples: SamplesConfig,
    num_children: int = 1,
    *,
    only_hashes: bool = False,
) -> Decoded:
    """The values of a column: decoded and prepared for the encoder where the kind has a decoder, else as they are.

    encoder: None prepares nothing. num_children: processes that decode side by side.
    only_hashes: all values are None.
    """
    if kind.pooled:
        single = kind.model_copy(update={"pool": None})
        items = decode_column(_items(column), single, encoder, samples, num_children, only_hashes=only_hashes)
        return _regrouped(column, items)
    num_rows = len(column)
    values: list[Any] = [None] * num_rows
    decoded = Decoded(values, {}, [None] * num_rows, [[] for _ in range(num_rows)])
    if not kind.decoder:
        for i, value in enumerate(kind.values(column)):
            if value is not None:
                values[i], decoded.hashes[i] = value, kind.digest(value)
        return decoded
    cells = [(i, cell) for i, cell in enumerate(cell_buffers(column)) if cell is not None]
    size, prepare = input_size(kind, encoder, samples), getattr(encoder, "prepare", None)
    into = None if size is None or only_hashes else np.empty((len(cells), *size.shape), np.uint8)
    places = np.full(num_rows, -1)
    outcomes = decode_samples([cell for _, cell in cells], kind, Limits.of(samples), size, into, num_children)
    for at, ((i, _), outcome) in enumerate(zip(cells, outcomes, strict=True)):
        if isinstance(outcome, Broken):
            decoded.broken[i], decoded.changes[i] = outcome.reason, [UNREADABLE]
            continue
        value, decoded.changes[i], decoded.hashes[i] = outcome
        if into is not None:
            places[i] = at
        elif not only_hashes:
            values[i] = value if prepare is None else prepare(value)
    return decoded if into is None else decoded._replace(values=Prepared(into, places))


def _items(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The items of a column of lists, one after another."""
    return pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)


def _regrouped(column: pa.ChunkedArray, items: Decoded) -> Decoded:
    """What was decoded of a column's items, by row: a list of values. A row with a broken item is broken."""
    num_rows, counts = len(column), pc.fill_null(pc.list_value_length(column), 0).to_pylist()
    values: list[Any] = [None] * num_rows
    decoded, start = Decoded(values, {}, [None] * num_rows, [[] for _ in range(num_rows)]), 0
    for i, num in enumerate(counts):
        own = range(start, start + num)
        start += num
        decoded.changes[i] = list(dict.fromkeys(change for k in own for change in items.changes[k]))
        wrong = [f"item {k - own.start + 1} of {num}: {items.broken[k]}" for k in own if k in items.broken]
        if wrong:
            decoded.broken[i] = "; ".join(wrong)
        elif num:
            values[i] = [items.values[k] for k in own]
            decoded.hashes[i] = hash_json([items.hashes[k] for k in own])
    return decoded


def select_values(values: Sequence[Any], keep: np.ndarray) -> Sequence[Any]:
    """Of the values (N,) those with `keep` (N,) true."""
    if isinstance(values, Prepared):
        return values.filter(keep)
    return [value for value, wanted in zip(values, keep, strict=True) if wanted]


def note_content(samples: pa.Table, name: str, hashes: Any, changes: Sequence[Sequence[str]]) -> pa.Table:
    """The samples with the hashes of a modality's content, and `cleaned` extended by what was changed in it."""
    return note_changes(samples.append_column(hash_of(name), pa.array(hashes, pa.uint64())), name, changes)


def note_changes(samples: pa.Table, name: str, changes: Sequence[Sequence[str]]) -> pa.Table:
    """The samples with `cleaned` extended by what was changed in a modality."""
    if not any(changes):
        return samples
    before = samples.column("cleaned").to_pylist()
    after = [[*(b or ()), *(f"{name}: {c}" for c in more)] or None for b, more in zip(before, changes, strict=True)]
    return samples.set_column(samples.column_names.index("cleaned"), "cleaned", pa.array(after, pa.list_(pa.string())))


def changes_of(part: pa.Table, name: str) -> list[list[str]]:
    """What was changed in a modality of each row of a stored part."""
    cells = part.column("cleaned").to_pylist()
    return [[c.removeprefix(f"{name}: ") for c in cell or () if c.startswith(f"{name}: ")] for cell in cells]


def decode_chunk(row: ChunkRow, config: Config) -> ChunkRow:
    """Stage 2, only where encoders run on GPUs: files are decoded and prepared on CPUs,
    so that the GPU does not wait.

    The prepared values of a modality travel as one array beside the samples, whose column then names rows of it; a
    broken one becomes null.
    """
    start = time.perf_counter()
    broken: dict[str, dict[int, str]] = {}
    arrays: dict[str, np.ndarray] = {}
    chunk = open_row(row)
    samples = chunk.samples
    for name, modality in sorted(config.modalities.items()):
        encoder, kind = build_encoder(modality.encoder), modality.kind
        sized = hasattr(encoder, "prepare") or input_size(kind, encoder, config.samples)
        if not kind.decoder or not sized:  # the size is unknown: the encoder's actor decodes
            continue
        decoded = decode_column(samples.column(name), kind, encoder, config.samples)
        broken[name] = decoded.broken
        arrays[name], rows = _in_one_array(decoded.values)
        column = pa.array(rows, pa.list_(pa.int32()) if kind.pooled else pa.int32())
        look = json.dumps([arrays[name].shape, arrays[name].dtype.name])
        samples = samples.set_column(
            samples.column_names.index(name), pa.field(name, column.type, metadata={PREPARED: look}), column
        )
        samples = note_content(samples, name, decoded.hashes, decoded.changes)
    keep, own = settle_broken(samples, broken, sorted(config.modalities), chunk.unit)
    samples, rejects = samples.filter(pa.array(keep)), pa.concat_tables([chunk.rejects, own])
    seconds = chunk.seconds | {"decode": time.perf_counter() - start}
    return make_row(chunk.unit, chunk.number, chunk.last, samples, rejects, seconds, arrays)


def _in_one_array(values: Sequence[Any]) -> tuple[np.ndarray, list[Any]]:
    """Prepared values, or lists of them, as one array (P, ..), and of each row its place or places in it,
    None for none."""
    if isinstance(values, Prepared):
        return values.array, [None if at < 0 else at for at in values.places.tolist()]
    items: list[np.ndarray] = []
    rows: list[Any] = []
    for value in values:
        own = [] if value is None else value if isinstance(value, list) else [value]
        places = range(len(items), len(items) + len(own))
        rows.append(None if value is None else list(places) if isinstance(value, list) else places[0])
        items += own
    return np.stack(items) if items else np.empty(0, np.uint8), rows


def prepared_values(samples: pa.Table, name: str, data: pa.Buffer | None) -> Sequence[Any] | None:
    """The values of a modality that the stage before has prepared; None if it has not. data: its array."""
    field = samples.schema.field(name)
    if data is None or not field.metadata or PREPARED not in field.metadata:
        return None
    shape, dtype = json.loads(field.metadata[PREPARED])
    array = np.frombuffer(data, dtype).reshape(shape)
    column = samples.column(name)
    if pa.types.is_list(column.type):
        return [None if rows is None else [array[at] for at in rows] for rows in column.to_pylist()]
    return Prepared(array, pc.fill_null(column, -1).to_numpy())


def settle_broken(
    samples: pa.Table,
    broken: dict[str, dict[int, str]],
    modalities: Sequence[str],
    unit: str,
    stage: str = "decode",
    lost: dict[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, pa.Table]:
    """Which rows stay (N,) bool, and a reject for each row with a broken modality. broken: modality -> row -> reason.

    A row with another modality keeps that one; its reject has stage="modality".
    lost: modality -> (N,) bool, rows that lost it at an earlier stage.
    """
    left = np.zeros(len(samples), dtype=bool)
    reasons: dict[int, list[str]] = {}
    for name in modalities:
        present = samples.column(name).is_valid().to_numpy().copy()
        if lost is not None:
            present &= ~lost[name]
        for i, reason in broken.get(name, {}).items():
            present[i] = False
            reasons.setdefault(i, []).append(f"{name}: {reason}")
        left |= present
    keep = left.copy()
    keep[[i for i in range(len(samples)) if i not in reasons]] = True
    ids = samples.column("sample_id").to_pylist()
    return keep, reject_table(
        [Reject(ids[i], unit, MODALITY if keep[i] else stage, "; ".join(reasons[i])) for i in sorted(reasons)]
    )

"""Rows that an exported graph is checked on, and what the library itself makes of them.

Axes: B rows, C classes of one task.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.encoders.build import load_reducer
from mmkt_ray.errors import DataError, UserError
from mmkt_ray.export.graph import ExportGraph
from mmkt_ray.export.inputs import Arrays, GraphInputs, prepared
from mmkt_ray.features.decode import input_size
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.outputs import Proba, predict_table
from mmkt_ray.inference.rows import without_unreadable
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.samples.readers import find_samples
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.sandbox.child import Limits
from mmkt_ray.sandbox.decoding import Broken, decode_samples

log = logging.getLogger(__name__)

NUM_ROWS = 100
TOLERANCE = 1e-4  # of a probability, and of other values relative to their size
PREDICTIONS = "predictions-test.parquet"  # in a model folder that was evaluated
WORDS = 8  # of a random text


@dataclass(frozen=True)
class CheckRows:
    """Decoded values to check with."""

    values: dict[str, list[Any]]  # modality -> (B,), None where the row has none
    about: str  # what rows they are
    stored: Proba | None = None  # what the run's own evaluation made of them


def check_rows(
    model_uri: str, config: Config, graph: ExportGraph, class_names: Mapping[str, Sequence[str]]
) -> CheckRows:
    """Test rows of the run, if its predictions and its data are where they were; else random ones."""
    try:
        return _test_rows(model_uri, config, graph, class_names)
    except (UserError, OSError, KeyError) as error:
        log.info("test rows are out of reach (%s): checking with random ones", " ".join(str(error).split())[:200])
    return _random_rows(config, graph)


def hide_some(rows: CheckRows, kept: int) -> CheckRows:
    """The rows, of which all after the first `kept` lack one of their modalities, in turn: experts answer these."""
    values = {m: list(column) for m, column in rows.values.items()}
    names = sorted(values)
    for i in range(kept, len(values[names[0]])):
        hidden = names[i % len(names)]
        if any(values[m][i] is not None for m in names if m != hidden):
            values[hidden][i] = None
    return replace(rows, values=values)


def graph_arrays(graph: ExportGraph, values: Mapping[str, Sequence[Any]]) -> Arrays:
    """The graph's inputs for decoded values, by name and in the graph's order."""
    found: Arrays = {}
    for m, part in zip(graph.modalities, graph.parts, strict=True):
        found |= part.arrays(values[m])
        found[f"{m}_present"] = np.array([value is not None for value in values[m]], bool)
    return found


def library_proba(graph: ExportGraph, folders: Mapping[str, list[str]], values: Mapping[str, Sequence[Any]]) -> Proba:
    """What the library's own encoders, reducers and model make of decoded values, by none of the graph's code."""
    features, present = {}, {}
    for m, part in zip(graph.modalities, graph.parts, strict=True):
        there = np.array([value is not None for value in values[m]], bool)
        given = [prepared(part.encoder, value) for value in values[m] if value is not None]
        found = part.encoder.encode(given) if given else None
        if found is not None and len(folders[m]) > 1:
            found = load_reducer(folders[m][1]).encode(found)
        features[m], present[m] = _spread(found, there, graph.model.spec.modalities[m]), there
    num_rows = len(present[graph.modalities[0]])
    ids = np.arange(num_rows).astype(str)
    table = FeatureTable(ids, np.full(num_rows, "test"), features, present, {}, {})
    return without_unreadable(predict_table(graph.model, table), table, graph.model.spec.inputs)


def _spread(found: Any, there: np.ndarray, spec: Any) -> Any:
    """Features of the present rows as those of all, zeros where absent."""
    if spec.sparse:
        chosen = sp.csr_matrix((np.ones(there.sum(), np.float32), (np.flatnonzero(there), np.arange(there.sum()))))
        chosen.resize(len(there), there.sum())
        return (
            (chosen @ found).tocsr() if found is not None else sp.csr_matrix((len(there), spec.dim), dtype=np.float32)
        )
    dense = np.zeros((len(there), spec.dim), np.float32)
    if found is not None:
        dense[there] = found
    return dense


def largest_difference(found: Proba, expected: Proba) -> float:
    """Over all tasks, rows and classes, relative to values above one; infinite where only one of both is a number."""
    largest = 0.0
    for task, values in expected.items():
        if not np.array_equal(np.isnan(values), np.isnan(found[task])):
            return float("inf")
        gap = np.abs(found[task] - values) / np.maximum(1.0, np.abs(values))
        largest = max(largest, float(np.nan_to_num(gap, nan=0.0).max(initial=0.0)))
    return largest


# --- test rows ------------------------------------------------------------------------------------------------------


def _test_rows(
    model_uri: str, config: Config, graph: ExportGraph, class_names: Mapping[str, Sequence[str]]
) -> CheckRows:
    """Raises: UserError, OSError, KeyError where something of it is not there."""
    columns = ["sample_id", "missing", *graph.outputs]
    table = storage.read_table(storage.join(model_uri, PREDICTIONS), columns).slice(0, NUM_ROWS)
    stored = {}
    for name, t in zip(graph.outputs, graph.tasks, strict=True):
        empty = [np.nan] * len(class_names[t])
        cells = [empty if cell is None else cell for cell in table.column(name).to_pylist()]
        stored[t] = np.array(cells, np.float32).reshape(len(cells), -1)
    values = raw_values(config, graph, table.column("sample_id").to_pylist())
    for i, missing in enumerate(table.column("missing").to_pylist()):
        for m in missing:
            values[m][i] = None
        if lost := [m for m in graph.modalities if m not in missing and values[m][i] is None]:
            raise DataError(f"the data has no {lost[0]} of '{table.column('sample_id')[i]}' any more")
    return CheckRows(values, f"{len(table)} test rows of the run", stored)


def raw_values(config: Config, graph: ExportGraph, sample_ids: Sequence[str]) -> dict[str, list[Any]]:
    """Modality -> values of these samples, decoded as for extraction; a combined sample `a|b` has both's."""
    parts = [[i, *i.split("|")] for i in sample_ids]
    asked = find_samples(ReadingPlan.of(config), sorted({p for ps in parts for p in ps}))
    rows = {sample_id: i for i, sample_id in enumerate(asked.column("sample_id").to_pylist())}
    values: dict[str, list[Any]] = {}
    for m, part in zip(graph.modalities, graph.parts, strict=True):
        kind = config.modalities[m].kind
        given = kind.values(asked.column(m))
        own = ((given[rows[p]] for p in ps if p in rows) for ps in parts)
        raw = [next((value for value in found if value is not None), None) for found in own]
        values[m] = _decoded(raw, kind, config, part.encoder)
    return values


def _decoded(raw: list[Any], kind: ModalityKind, config: Config, encoder: Any) -> list[Any]:
    if not kind.decoder:
        return raw
    size = input_size(kind, encoder, config.samples)
    outcomes = decode_samples([value for value in raw if value is not None], kind, Limits.of(config.samples), size)
    decoded = iter([None if isinstance(outcome, Broken) else outcome[0] for outcome in outcomes])
    return [None if value is None else next(decoded) for value in raw]


# --- random rows ----------------------------------------------------------------------------------------------------


class GivenFeatures:
    """Stands for an encoder outside the graph when nobody knows what it reads: its features are given."""

    def __init__(self, encoder: Any) -> None:
        self.dim, self.sparse = encoder.dim, getattr(encoder, "sparse", False)

    def encode(self, values: Sequence[np.ndarray]) -> Any:
        """Rows (B, D) as they are."""
        rows = np.stack(values) if len(values) else np.zeros((0, self.dim), np.float32)
        return sp.csr_matrix(rows) if self.sparse else rows


def _random_rows(config: Config, graph: ExportGraph) -> CheckRows:
    rng = np.random.default_rng(0)
    values = {}
    for m, part in zip(graph.modalities, graph.parts, strict=True):
        values[m] = [_random_value(config.modalities[m].kind, part, rng) for _ in range(NUM_ROWS)]
    return CheckRows(values, f"{NUM_ROWS} rows of random values")


def _random_value(kind: ModalityKind, part: GraphInputs, rng: np.random.Generator) -> Any:
    known = (part.vocabulary() or {}).get("terms") or ["a", "good", "red", "bird", "over", "every", "house", "sings"]
    if (value := kind.example(rng, known[:10_000])) is not None:
        return value
    if not isinstance(part.encoder, GivenFeatures):
        part.encoder = GivenFeatures(part.encoder)
    return rng.normal(size=part.encoder.dim).astype(np.float32)

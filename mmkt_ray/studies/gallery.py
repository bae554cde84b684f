"""Some test samples a model got right and wrong, with what it saw: for people to look at."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray import storage
from mmkt_ray.config import Config, parse_config
from mmkt_ray.errors import DataError
from mmkt_ray.inference.rows import read_parts
from mmkt_ray.kinds.base import TaskKind
from mmkt_ray.kinds.modalities import ModalityKind
from mmkt_ray.samples.plan import ReadingPlan
from mmkt_ray.samples.readers import find_samples
from mmkt_ray.sandbox.decoding import Broken, Limits, decode_samples

log = logging.getLogger(__name__)

NUM_PER_GROUP = 4


def write_gallery(model_uri: str, split: str = "test") -> dict[str, Any]:
    """Choose samples from the model's predictions, fetch their raw image and text, write `<model>/gallery.json`.

    Returns {split, tasks: {task: {right, wrong, tie: [{sample_id, label, pred, proba, second, second_proba,
    inputs: {modality: {kind, png (base64) | text} or None if the sample has none}}]}}}: the most confident right and
    wrong ones, and those with the least between the two most probable classes. In a multilabel task label and pred are
    the classes joined by commas, proba is that of the least sure decision about a class, and `second` that class. Of numbers
    `right` are the closest predictions, `wrong` those furthest off, and proba is null. If the
    shards are no longer where the config says, `inputs` is empty and `note` tells why.

    Raises: DataError if the model was not evaluated on the split.
    """
    card = storage.read_json_or_none(storage.join(model_uri, "config.json"))
    uri = storage.join(model_uri, f"predictions-{split}.parquet")
    if card is None or not storage.exists(uri):
        raise DataError(f"no predictions on '{split}' in '{model_uri}': run `mmkt evaluate` first")
    config = parse_config(card["config"])
    tasks = {t: _choose(_candidates(uri, t, config.tasks[t].kind), card["class_names"][t]) for t in config.model_tasks}
    chosen = [s for groups in tasks.values() for group in groups.values() for s in group]
    gallery: dict[str, Any] = {"split": split, "tasks": tasks, **add_inputs(chosen, config)}
    storage.write_json(storage.join(model_uri, "gallery.json"), gallery)
    return gallery


@dataclass(frozen=True)
class _Judged:
    """Labelled rows that have a prediction."""

    ids: np.ndarray  # (N,) str
    labels: np.ndarray  # (N,) str
    pred: np.ndarray  # (N,) str
    top: np.ndarray  # (N, 2) the largest two probabilities, (N, 1) of a single class
    second: np.ndarray  # (N,) class of the second one
    error: np.ndarray  # (N,) of numbers how far the prediction is off; NaN of classes
    has_second: np.ndarray  # (N,) bool: there is one

    def take(self, rows: np.ndarray) -> _Judged:
        return _Judged(*(getattr(self, f.name)[rows] for f in fields(self)))

    def groups(self) -> dict[str, np.ndarray]:
        """The rows of each group, at most NUM_PER_GROUP; near ties are of neither other group."""
        if not np.isnan(self.error).any() and len(self.error):
            closest = np.argsort(self.error, kind="stable")
            return {"right": closest[:NUM_PER_GROUP], "wrong": closest[::-1][: min(NUM_PER_GROUP, len(closest) // 2)]}
        right, confidence = self.labels == self.pred, np.argsort(-self.top[:, 0], kind="stable")
        groups = {"right": confidence[right[confidence]], "wrong": confidence[~right[confidence]]}
        groups = {name: rows[:NUM_PER_GROUP] for name, rows in groups.items()}
        closest = np.argsort(self.top[:, 0] - self.top[:, -1], kind="stable")
        taken = np.concatenate(list(groups.values()))
        return groups | {"tie": closest[~np.isin(closest, taken)][:NUM_PER_GROUP]}


def _candidates(uri: str, task: str, kind: TaskKind) -> _Judged:
    """Rows of a file of predictions, in its order, among which are those of all groups; one batch of it is in memory."""
    best: _Judged | None = None
    columns = ("label", "pred", "proba") if kind.classes else ("label", "pred")
    for rows in read_parts(uri, ["sample_id", *(f"{task}_{c}" for c in columns)]):
        judged = _judge(rows, task, kind)
        if best is not None:
            pairs = [(getattr(best, f.name), getattr(judged, f.name)) for f in fields(judged)]
            judged = _Judged(*map(np.concatenate, pairs))
        best = judged.take(np.sort(np.concatenate(list(judged.groups().values()))))
    assert best is not None, "a file of predictions has rows"
    return best


def _judge(table: pa.Table, task: str, kind: TaskKind) -> _Judged:
    """The rows of a batch of predictions."""
    told = [table.column(f"{task}_{c}") for c in ("label", "pred")]
    table = table.filter(pc.and_(told[0].is_valid(), told[1].is_valid()))
    if kind.classes:
        top, second, has_second = kind.two_best(kind.read_outputs(table, task))
        error = np.full(len(table), np.nan)
    else:
        error = np.abs(np.subtract(*(c.to_numpy() for c in (table.column(f"{task}_label"), table.column(f"{task}_pred")))))
        top, second, has_second = np.zeros((len(table), 1)), np.zeros(len(table), int), np.zeros(len(table), bool)
    names = ("sample_id", f"{task}_label", f"{task}_pred")
    ids, labels, pred = (table.column(n).to_pylist() for n in names)
    told_labels, told_pred = (np.array([kind.tell(v) for v in cells], dtype=object) for cells in (labels, pred))
    return _Judged(np.array(ids, dtype=object), told_labels, told_pred, top, second, error, has_second)


def _choose(judged: _Judged, class_names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The groups of one task, each of at most NUM_PER_GROUP samples."""

    def describe(row: int) -> dict[str, Any]:
        second, proba, sure = class_names[judged.second[row]], float(judged.top[row, -1]), np.isnan(judged.error[row])
        runner_up = {"second": second, "second_proba": proba} if judged.has_second[row] else {}
        return {
            "sample_id": judged.ids[row],
            "label": judged.labels[row],
            "pred": judged.pred[row],
            "proba": float(judged.top[row, 0]) if sure else None,
            **runner_up,
        }

    return {name: [describe(int(r)) for r in rows] for name, rows in judged.groups().items()}


def add_inputs(chosen: list[dict[str, Any]], config: Config) -> dict[str, str]:
    """Give each of these samples (with `sample_id`) its `inputs`: {modality: thumbnail, excerpt or None}. Where the raw samples
    can't be read they are empty, and the returned {note} tells why."""
    note: dict[str, str] = {}
    try:
        raw = _raw_values(config, [s["sample_id"] for s in chosen]) if chosen else {}
    except (DataError, OSError) as error:
        raw, note["note"] = {}, f"The raw samples could not be read: {error}"
        log.warning("samples are shown without their inputs: %s", error)
    for sample in chosen:
        sample["inputs"] = raw.get(sample["sample_id"], {})
    return note


def _raw_values(config: Config, sample_ids: list[str]) -> dict[str, dict[str, Any]]:
    """sample_id -> {modality the model reads: thumbnail, excerpt or None}; a combined sample `a|b` has both's."""
    parts = {i: [i, *i.split("|")] for i in sample_ids}
    table = find_samples(ReadingPlan.of(config), sorted({p for ps in parts.values() for p in ps}))
    found = {row["sample_id"]: row for row in table.to_pylist()}
    values = {}
    limits = Limits.of(config.samples)
    for sample_id, sources in parts.items():
        rows = [found[s] for s in sources if s in found]
        raw = {m: next((r[m] for r in rows if r.get(m) is not None), None) for m in config.model_modalities}
        values[sample_id] = (
            {m: show(v, config.modalities[m].kind, limits) for m, v in raw.items()} if rows else {}
        )
    return values


def show(cell: Any, kind: ModalityKind, limits: Limits) -> dict[str, Any] | None:
    """What people see of a cell; None where there is none."""

    def decode(data: bytes) -> Any:
        (outcome,) = decode_samples([data], kind, limits)
        return None if isinstance(outcome, Broken) else outcome[0]

    return None if cell is None else kind.show(cell, decode)

"""Some test samples a model got right and wrong, with what it saw: for people to look at."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray import storage
from mmkt_ray.config import Config, parse_config
from mmkt_ray.errors import DataError
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.inference.rows import read_parts
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.samples.readers import find_samples
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.sandbox.child import Limits
from mmkt_ray.sandbox.decoding import Broken, decode_samples
from mmkt_ray.studies.gallery_results import Gallery, GallerySample

log = logging.getLogger(__name__)

NUM_PER_GROUP = 4

Inputs: TypeAlias = dict[str, dict[str, Any] | None]  # modality -> `ModalityKind.show`; None: the sample has none


def write_gallery(model_uri: str, split: str = "test") -> Gallery:
    """Choose samples from the model's predictions, fetch their raw image and text, write `<model>/gallery.json`.

    If the shards are no longer where the config says, samples have no inputs and the note says why.

    Raises: DataError if the model was not evaluated on the split.
    """
    card = read_card(model_uri)
    uri = storage.join(model_uri, f"predictions-{split}.parquet")
    if card is None or not storage.exists(uri):
        raise DataError(f"no predictions on '{split}' in '{model_uri}': run `mmkt evaluate` first")
    config = parse_config(card.config)
    found = {t: _candidates(uri, t, config.tasks[t].kind) for t in config.model_tasks}
    groups = {t: predicted.groups() for t, predicted in found.items()}
    chosen = [i for t, rows in groups.items() for group in rows.values() for i in found[t].ids[group].tolist()]
    inputs, note = read_inputs(chosen, config)
    gallery = Gallery(
        split=split,
        tasks={
            t: {
                name: [found[t].sample(int(i), card.class_names[t], inputs) for i in group]
                for name, group in rows.items()
            }
            for t, rows in groups.items()
        },
        note=note,
    )
    gallery.write(storage.join(model_uri, "gallery.json"))
    return gallery


@dataclass(frozen=True)
class _Predicted:
    """Labelled rows that have a prediction."""

    ids: np.ndarray  # (N,) str
    labels: np.ndarray  # (N,) str
    pred: np.ndarray  # (N,) str
    top: np.ndarray  # (N, 2) the largest two probabilities, (N, 1) of a single class
    second: np.ndarray  # (N,) class of the second one
    error: np.ndarray  # (N,) of numbers how far the prediction is off; NaN of classes
    has_second: np.ndarray  # (N,) bool: there is one

    def take(self, rows: np.ndarray) -> _Predicted:
        return _Predicted(*(getattr(self, f.name)[rows] for f in fields(self)))

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

    def sample(self, row: int, class_names: list[str], inputs: Mapping[str, Inputs]) -> GallerySample:
        """One of the rows. inputs: of each sample."""
        sample_id, has_second = self.ids[row], self.has_second[row]
        return GallerySample(
            sample_id=sample_id,
            label=self.labels[row],
            pred=self.pred[row],
            proba=float(self.top[row, 0]) if np.isnan(self.error[row]) else None,
            second=class_names[self.second[row]] if has_second else None,
            second_proba=float(self.top[row, -1]) if has_second else None,
            inputs=inputs.get(sample_id, {}),
        )


def _candidates(uri: str, task: str, kind: TaskKind) -> _Predicted:
    """Rows of a file of predictions, in its order, among which are those of all groups;
    one batch of it is in memory."""
    best: _Predicted | None = None
    columns = ("label", "pred", "proba") if kind.classes else ("label", "pred")
    for rows in read_parts(uri, ["sample_id", *(f"{task}_{c}" for c in columns)]):
        rows_so_far = _read_batch(rows, task, kind)
        if best is not None:
            pairs = [(getattr(best, f.name), getattr(rows_so_far, f.name)) for f in fields(rows_so_far)]
            rows_so_far = _Predicted(*map(np.concatenate, pairs))
        best = rows_so_far.take(np.sort(np.concatenate(list(rows_so_far.groups().values()))))
    assert best is not None, "a file of predictions has rows"
    return best


def _read_batch(table: pa.Table, task: str, kind: TaskKind) -> _Predicted:
    """The rows of a batch of predictions."""
    given = [table.column(f"{task}_{c}") for c in ("label", "pred")]
    table = table.filter(pc.and_(given[0].is_valid(), given[1].is_valid()))
    if kind.classes:
        top, second, has_second = kind.two_best(kind.read_outputs(table, task))
        error = np.full(len(table), np.nan)
    else:
        error = np.abs(
            np.subtract(*(c.to_numpy() for c in (table.column(f"{task}_label"), table.column(f"{task}_pred"))))
        )
        top, second, has_second = np.zeros((len(table), 1)), np.zeros(len(table), int), np.zeros(len(table), bool)
    names = ("sample_id", f"{task}_label", f"{task}_pred")
    ids, labels, pred = (table.column(n).to_pylist() for n in names)
    label_texts, pred_texts = (np.array([kind.tell(v) for v in cells], dtype=object) for cells in (labels, pred))
    return _Predicted(np.array(ids, dtype=object), label_texts, pred_texts, top, second, error, has_second)


def read_inputs(sample_ids: list[str], config: Config) -> tuple[dict[str, Inputs], str | None]:
    """What the modalities of these samples show, by sample; none where the raw samples can't be read, and then a note
    that says why."""
    try:
        return (_raw_values(config, sample_ids) if sample_ids else {}), None
    except (DataError, OSError) as error:
        log.warning("samples are shown without their inputs: %s", error)
        return {}, f"The raw samples could not be read: {error}"


def _raw_values(config: Config, sample_ids: list[str]) -> dict[str, Inputs]:
    """sample_id -> {modality the model reads: thumbnail, excerpt or None}; a combined sample `a|b` has both's."""
    parts = {i: [i, *i.split("|")] for i in sample_ids}
    table = find_samples(ReadingPlan.of(config), sorted({p for ps in parts.values() for p in ps}))
    found = {row["sample_id"]: row for row in table.to_pylist()}
    values: dict[str, Inputs] = {}
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

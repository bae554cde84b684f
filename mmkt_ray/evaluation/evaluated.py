"""The evaluated models of a run: their metrics, their cards, and their predictions, read when needed.

Called by compare.py and by studies. Result files only: no model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mmkt_ray import storage
from mmkt_ray.evaluation.answers import Scored
from mmkt_ray.evaluation.recommend import HeldOutRows
from mmkt_ray.inference.model_card import Card, read_card
from mmkt_ray.inference.rows import LabelledPredictions, read_outcomes, read_predictions
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring.metrics import BaselinesFile, ModelMetrics, TaskScores
from mmkt_ray.scoring.results import Described
from mmkt_ray.scoring.run_file import RunFile

HELD_OUT = "predictions-heldout.parquet"


@dataclass
class Evaluated:
    """One evaluated model: its metrics and its predictions, read when needed."""

    name: str  # in the run; distinct
    kind: str  # trained | baseline
    folder: str  # relative to the run folder, or absolute
    record: ModelMetrics
    predictions_uri: str
    card: Card | None = None  # of a trained one
    automatic: bool = False  # trained without being asked for, to compare with
    _outcomes: dict[str, LabelledPredictions] = field(default_factory=dict)  # of the task that was last asked for
    _held_out: dict[str, HeldOutRows | None] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """As it was trained with; empty of a baseline."""
        return self.card.config if self.card else {}

    @property
    def tasks(self) -> dict[str, TaskScores]:
        return self.record.tasks

    def scores(self, task: str) -> TaskScores | None:
        """Of a task; None if it was scored on no row of it."""
        found = self.tasks.get(task)
        return found if found is not None and found.num_rows else None

    def describe(self) -> Described:
        """What the results say about a model beside its scores."""
        model = self.config.get("model", {})
        fusion = model.get("fusion") or {}
        depth = f" (depth {fusion['depth']})" if fusion.get("name") == "hierarchical" else ""
        return Described(
            kind=self.kind,
            name=self.record.name,
            automatic=self.automatic,
            modalities=self.record.modalities,
            fusion=f"{fusion['name']}{depth}" if fusion and len(self.record.modalities) > 1 else None,
            sharing=model.get("sharing"),
            num_params=self.record.num_params,
            training_s=self.record.training_s,
            num_train_rows=self.record.num_train_rows,
            store=self.record.store,
            folder=self.folder,
            folder_to_ship=self.folder_to_ship,
        )

    @property
    def folder_to_ship(self) -> str | None:
        """The model folder in the run; None of a baseline that has none."""
        return self.folder if self.kind == "trained" else self.record.folder_to_ship

    def reads(self, task: str) -> tuple[str, ...]:
        """The modalities that it reads for a task."""
        inputs = self.config.get("tasks", {}).get(task, {}).get("inputs")
        return tuple(m for m in self.record.modalities if inputs is None or m in inputs)

    def kind_of(self, task: str) -> TaskKind:
        """A task's kind."""
        return task_kind(self.tasks[task].kind)

    def predictions(self, task: str) -> pd.DataFrame:
        """Columns label and pred of `read_predictions`."""
        return read_predictions(self.predictions_uri, task, self.kind_of(task), self._own_name())

    def outcomes(self, task: str) -> LabelledPredictions:
        """The same as codes."""
        if task not in self._outcomes:
            self._outcomes.clear()
            self._outcomes[task] = read_outcomes(self.predictions_uri, task, self.kind_of(task), self._own_name())
        return self._outcomes[task]

    def scored(self, task: str, held_out: float, vocabulary: dict[Any, int]) -> Scored:
        """Its labelled rows; vocabulary: label -> code, of all models of the task."""
        found = self.outcomes(task)
        codes = np.array([vocabulary.setdefault(v, len(vocabulary)) for v in found.values], np.int32)
        pairs, which = np.unique(np.stack([found.label, found.pred]), axis=1, return_inverse=True)
        by_pair = np.array([found.kind.score_pair(found.values[y], found.values[p]) for y, p in pairs.T], float)
        labels, scores = codes[found.label], by_pair[which.reshape(-1)]
        training, metric, trained = self.config.get("training"), found.kind.row_metric, self.kind == "trained"

        def among(some: np.ndarray, of: np.ndarray) -> np.ndarray:
            names = list(vocabulary)
            return found.kind.among(some, [names[code] for code in of.tolist()])

        rest = (training, metric, None if found.kind.classes else among)
        return Scored(self.name, trained, self.reads(task), held_out, found.ids, labels, scores, *rest)

    def held_out(self, task: str) -> HeldOutRows | None:
        """How right it has each held-out row, where it left their predictions."""
        if task not in self._held_out:
            uri = storage.join(self.predictions_uri.rpartition("/")[0], HELD_OUT)
            found = read_outcomes(uri, task, self.kind_of(task)) if storage.exists(uri) else None
            self._held_out[task] = (found.ids, found.right()) if found else None
        return self._held_out[task]

    def shares_samples(self, other: Evaluated, task: str) -> bool:
        """True if both predicted some sample of the task."""
        ours, theirs = self.outcomes(task).ids, other.outcomes(task).ids
        return bool(np.array_equal(ours, theirs) and len(ours)) or bool(np.isin(ours, theirs).any())

    def _own_name(self) -> str | None:
        """What a file of several models calls this one."""
        return self.record.name if self.kind == "baseline" else None


def evaluated_models(run_uri: str, run: RunFile) -> list[Evaluated]:
    """What was evaluated in a run folder, trained models first."""
    return [*_trained(run_uri, run), *_baselines(run_uri, run)]


def _trained(run_uri: str, run: RunFile) -> list[Evaluated]:
    """Variants in the order of run.json, else the folders under models/."""
    singles = {name: place.model for name, place in run.singles.items()}
    folders = {name: place.model for name, place in run.variants.items()} | singles
    if not run.variants:
        found = storage.glob(storage.join(run_uri, "models", "*", "metrics.json"), fixed=run_uri)
        names = [f.path.split("/")[-2] for f in found]
        folders = {name: f"models/{name}" for name in names} | singles
    models = []
    for name, folder in folders.items():
        uri = storage.join(run_uri, folder)
        if record := ModelMetrics.read_or_none(storage.join(uri, "metrics.json")):
            card = read_card(uri)
            if is_stale(record, card):
                continue
            predictions = storage.join(uri, f"predictions-{record.split}.parquet")
            models.append(Evaluated(name, "trained", folder, record, predictions, card, automatic=name in singles))
    return models


def is_stale(record: ModelMetrics, card: Card | None) -> bool:
    """Whether metrics are those of another model than the one that lies there now."""
    return (
        card is not None
        and None not in (record.fingerprint, card.fingerprint)
        and record.fingerprint != card.fingerprint
    )


def _baselines(run_uri: str, run: RunFile) -> list[Evaluated]:
    """Baselines of the stores that variants of run.json were trained on (of all, if it names none).

    Where there are several stores, the store's name is in theirs, without its digest if that leaves it unique.
    """
    named = {place.store.rpartition("/")[2] for place in run.variants.values() if place.store}
    found_in = storage.glob(storage.join(run_uri, "baselines", "*", "metrics.json"), fixed=run_uri)
    found = [f.path.split("/")[-2] for f in found_in]
    stores = [store for store in found if store in named or not named]
    kinds = [store.rpartition("-")[0] or store for store in stores]
    models = []
    for store, kind in zip(stores, kinds, strict=True):
        folder = f"baselines/{store}"
        whole = BaselinesFile.read(storage.join(run_uri, folder, "metrics.json"))
        uri = storage.join(run_uri, folder, f"predictions-{whole.split}.parquet")
        for name in whole.models:
            place = kind if kinds.count(kind) == 1 else store
            shown = name if len(stores) == 1 else f"{name} ({place})"
            models.append(Evaluated(shown, "baseline", folder, whole.of(name), uri))
    return models

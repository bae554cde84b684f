"""What any model must beat: the majority class, logistic regression on the same features, and gradient boosting on a table.

Logistic regression is the model without towers (`num_levels: 0`), solved to its optimum on all rows of train and val, its
penalty chosen on held-out rows: see training/linear.py. It can be shipped like any model.

Axes: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from mmkt_ray import storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.evaluation.evaluate import Proba, ScoreSettings, heldout_record, identity_of, part_of, scores_of_task
from mmkt_ray.evaluation.heldout import make_folds, pattern_name, save_heldout
from mmkt_ray.evaluation.inference import predict_table
from mmkt_ray.evaluation.model_folder import save_model
from mmkt_ray.evaluation.rows import (
    Rows,
    load_rows,
    prediction_parts,
    readable,
    without_unreadable,
    write_parts,
)
from mmkt_ray.features.store import FeatureTable, Store
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.training.boosting import Boosting, boosted_modalities, fit_boosting
from mmkt_ray.training.linear import LinearFit, fit_linear
from mmkt_ray.training.loop import can_learn

MAJORITY, BOOSTING = "majority", "boosting:"


def baseline_name(modalities: Sequence[str]) -> str:
    """`logreg:image+text` for logistic regression on these modalities."""
    return "logreg:" + pattern_name(modalities)


def fit_baselines(config: Config, table: FeatureTable) -> tuple[dict[str, Majority], dict[str, Logreg]]:
    """The baselines of the tasks in the table: task -> Majority, and name -> Logreg.

    A logistic regression for each modality, and for all that a task reads: "logreg:<modality>", "logreg:<all joined by
    +>". For a task, a modality that none of its labelled train rows has is left out, so is the concatenation of fewer than
    two, and rows with one class only, which teach nothing. Tasks without labelled train rows have none.
    """
    majorities: dict[str, Majority] = {}
    tasks: dict[tuple[str, ...], list[str]] = {}  # modalities -> tasks
    for t in sorted(table.labels):
        labels = table.labels[t]
        rows = np.flatnonzero((table.split == "train") & labels.known)
        if not len(rows):
            continue
        read = config.tasks[t].inputs or sorted(table.features)
        there = [m for m in sorted(read) if table.present[m][rows].any()]
        majorities[t] = Majority.fit(labels[rows], table.width(t), there)
        for modalities in dict.fromkeys([*((m,) for m in there), *([tuple(there)] if there else [])]):
            if can_learn(logreg_config(config, modalities, [t]), table):
                tasks.setdefault(modalities, []).append(t)
    fitted = {}
    for modalities in sorted(tasks, key=lambda names: (len(names), names)):
        own = logreg_config(config, modalities, tasks[modalities])
        fitted[baseline_name(modalities)] = Logreg(own, fit_linear(own, table))
    return majorities, fitted


def logreg_config(config: Config, modalities: Sequence[str], tasks: Sequence[str]) -> Config:
    """The config of logistic regression on some modalities, with the labels that the config's models have."""
    training = {"label_frac": config.training.label_frac, "exclude": config.training.exclude}
    model = {"modalities": list(modalities), "tasks": list(tasks), "num_levels": 0, "experts": False}
    return config.with_overrides({"variants": {}, "model": model, "training": training})


@dataclass(frozen=True)
class Majority:
    """Predicts what fits the train split best whatever the sample is: of classes their frequencies."""

    modalities: tuple[str, ...]  # those a sample must have one of, so that it is scored on the rows of the others
    outputs: np.ndarray  # (K,) float32
    num_rows: int  # that it was fitted on

    @classmethod
    def fit(cls, labels: Labels, width: int, modalities: Sequence[str]) -> Majority:
        """Learn from labels that are all known."""
        return cls(tuple(modalities), labels.kind.baseline(labels, width), len(labels))

    def predict(self, table: FeatureTable) -> np.ndarray:
        """Probabilities (N, C) float32; NaN for rows without any of the modalities."""
        proba = np.tile(self.outputs, (len(table.sample_id), 1))
        proba[~readable(table, self.modalities)] = np.nan
        return proba


@dataclass(frozen=True)
class Logreg:
    """Logistic regression on one modality or on several side by side."""

    config: Config
    fit: LinearFit

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it reads, sorted."""
        return self.config.model_modalities

    @property
    def num_params(self) -> int:
        """Weights and biases."""
        return sum(p.numel() for p in self.fit.model.parameters())

    def predict(self, table: FeatureTable) -> dict[str, np.ndarray]:
        """Task -> probabilities (N, C) float32; NaN for rows without any of the modalities."""
        return self._known(predict_table(self.fit.model, table), table)

    def held_out(self, table: FeatureTable) -> tuple[FeatureTable, dict[str, np.ndarray]]:
        """The held-out rows of the table that it was fitted on, and what models that had not seen them say."""
        part = table.take(self.fit.heldout.rows)
        logits = self.fit.heldout.logits[pattern_name(self.modalities)]
        kinds = self.fit.model.spec.kinds
        return part, self._known({t: kinds[t].outputs_of(z) for t, z in logits.items()}, part)

    def _known(self, proba: Mapping[str, np.ndarray], table: FeatureTable) -> dict[str, np.ndarray]:
        return without_unreadable(proba, table, {t: self.config.task_inputs(t) for t in proba})

    def save(self, uri: str, store: Store, encoders_uri: str) -> None:
        """Publish it as a model folder, with the encoders of its modalities, so that raw samples can be predicted."""
        manifest, fit = store.manifest, self.fit
        parts = {"store": manifest["fingerprint"], "config": self.config.model_dump(mode="json"), "l2": fit.l2}
        training = {"seconds": fit.seconds, "l2": fit.l2, "path": fit.path, "num_params": self.num_params}
        for m in self.modalities:
            for folder in manifest["modalities"][m].get("folders", []):
                storage.copy_folder(storage.join(encoders_uri, folder), storage.join(uri, "encoders", folder))
        save_heldout(uri, fit.heldout)
        save_model(uri, fit.model, self.config, manifest, {"fingerprint": fingerprint(parts), "training": training})


# --- scoring them ----------------------------------------------------------------------------------------------------


def evaluate_baselines(config: Config, store: Store, out_uri: str) -> dict[str, Any]:
    """Fit the baselines on a store's train and val rows and score them on `test`.

    Writes `<out_uri>/metrics.json`, {split, store, .., models: {name: record as of `evaluate_model`, without subsets
    and patterns; `val` is of held-out rows, see heldout.py, and says which in `on`}}, `<out_uri>/predictions-test.parquet`
    with one more column, `model`, and each logistic regression as a model folder, of which its record tells
    `folder_to_ship` in the run. Returns the former. Raises: DataError if the split has no rows.
    """
    modalities, tasks = sorted(config.modalities), sorted(config.tasks)
    settings = ScoreSettings(config.evaluation, config.seed)
    data = load_rows(store, modalities, tasks)
    part = part_of(data, store, "test")
    majorities, fitted = fit_baselines(config, data.table)
    run_uri = out_uri.rpartition("/baselines/")[0] or out_uri
    found: dict[str, Proba] = {name: model.predict(part.table) for name, model in fitted.items()}
    records = {name: _logreg_record(model, store, data, run_uri) for name, model in fitted.items()}
    if majorities:
        found = {MAJORITY: {t: m.predict(part.table) for t, m in majorities.items()}, **found}
        records = {MAJORITY: _majority_record(majorities, data, config.seed), **records}
    for name, boosted in fit_boosted(config, data.table).items():
        found[name] = {t: model.predict(part.table) for t, model in boosted.items()}
        records[name] = _boosting_record(boosted, data)
    parts = []
    for name, record in records.items():
        val = record.pop("val")
        record |= {"name": name, "tasks": {t: scores_of_task(part, t, p, settings) for t, p in found[name].items()}}
        for t, scores in record["tasks"].items():
            scores["val"] = val[t]
        parts.append(prediction_parts(part, modalities, found[name], name))
    result = {**identity_of(store, "test", config.evaluation, part), "models": records}
    write_parts(storage.join(out_uri, "predictions-test.parquet"), chain.from_iterable(parts))
    storage.write_json(storage.join(out_uri, "metrics.json"), result)
    return result


def _logreg_record(model: Logreg, store: Store, data: Rows, run_uri: str) -> dict[str, Any]:
    """What is known of a logistic regression before it is scored; publishes it."""
    folder = f"models/.linear/{store.manifest['fingerprint']}/{pattern_name(model.modalities)}"
    model.save(storage.join(run_uri, folder), store, storage.join(run_uri, "encoders"))
    return {
        "modalities": list(model.modalities),
        "num_params": model.num_params,
        "num_train_rows": max(model.fit.num_rows.values()),
        "training_s": model.fit.seconds,
        "l2": model.fit.l2,
        "folder_to_ship": folder,
        "val": _held_out_scores(*model.held_out(data.table), model.fit.heldout.on),
    }


def fit_boosted(config: Config, table: FeatureTable) -> dict[str, dict[str, Boosting]]:
    """`boosting:<modality>` -> task -> gradient boosting, of each table; see boosting.py."""
    found: dict[str, dict[str, Boosting]] = {}
    for task in sorted(table.labels):
        for modality in boosted_modalities(config, table, task):
            if (model := fit_boosting(config, table, task, modality)) is not None:
                found.setdefault(BOOSTING + modality, {})[task] = model
    return found


def _boosting_record(boosted: Mapping[str, Boosting], data: Rows) -> dict[str, Any]:
    """What is known of gradient boosting before it is scored."""
    first = next(iter(boosted.values()))
    val: dict[str, Any] = {}
    for task, model in boosted.items():
        val |= _held_out_scores(data.table.take(model.heldout), {task: model.outputs}, model.on)
    return {
        "modalities": [first.modality],
        "num_params": None,
        "num_train_rows": max(m.num_rows for m in boosted.values()),
        "training_s": sum(m.seconds for m in boosted.values()),
        "val": val,
    }


def _majority_record(majorities: Mapping[str, Majority], data: Rows, seed: int) -> dict[str, Any]:
    """What is known of the majority class before it is scored."""
    folds = make_folds(data.table, seed)
    held = data.table.take(np.flatnonzero(np.isin(folds.fold, range(folds.num_held))))
    return {
        "modalities": [],
        "num_params": 0,
        "num_train_rows": max(m.num_rows for m in majorities.values()),
        "training_s": 0.0,
        "val": _held_out_scores(held, {t: m.predict(held) for t, m in majorities.items()}, folds.on),
    }


def _held_out_scores(table: FeatureTable, proba: Proba, on: str) -> dict[str, Any]:
    """Task -> scores of held-out rows, None without a labelled one; on: cv or val."""
    return {t: heldout_record(table, t, values, on) for t, values in proba.items()}

"""What any model must beat: the majority class, logistic regression on the same features, and gradient boosting on a table.

Logistic regression is the model without towers (`num_levels: 0`), solved to its optimum on all rows of train and val, its
penalty chosen on held-out rows: see training/linear.py. It can be shipped like any model.

Axes: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmkt_ray import storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.features.store import FeatureTable, Store
from mmkt_ray.inference.model_folder import save_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import readable, without_unreadable
from mmkt_ray.inference.training_record import Penalty, Solved
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.scoring.heldout import pattern_name, save_heldout
from mmkt_ray.training.linear import LinearFit, fit_linear
from mmkt_ray.training.loop import can_learn

MAJORITY, BOOSTING = "majority", "boosting:"


def baseline_name(modalities: Sequence[str]) -> str:
    """`logreg:image+text` for logistic regression on these modalities."""
    return "logreg:" + pattern_name(modalities)


def fit_logregs(config: Config, table: FeatureTable) -> dict[str, Logreg]:
    """Name -> Logreg, see `logreg_configs`."""
    return {name: Logreg(own, fit_linear(own, table)) for name, own in logreg_configs(config, table).items()}


def fit_majorities(config: Config, table: FeatureTable) -> dict[str, Majority]:
    """Task -> Majority; tasks without labelled train rows have none."""
    found = {}
    for t, (rows, there) in _taught(config, table).items():
        found[t] = Majority.fit(table.labels[t][rows], table.width(t), there)
    return found


def logreg_configs(config: Config, table: FeatureTable) -> dict[str, Config]:
    """Name -> the config of logistic regression on each modality, "logreg:<modality>", and on all that a task reads,
    "logreg:<all joined by +>".

    For a task, a modality that none of its labelled train rows has is left out, so is the concatenation of fewer than two,
    and rows with one class only, which teach nothing.
    """
    tasks: dict[tuple[str, ...], list[str]] = {}  # modalities -> tasks
    for t, (_, there) in _taught(config, table).items():
        for modalities in dict.fromkeys([*((m,) for m in there), *([tuple(there)] if there else [])]):
            if can_learn(logreg_config(config, modalities, [t]), table):
                tasks.setdefault(modalities, []).append(t)
    by_width = sorted(tasks, key=lambda names: (len(names), names))
    return {baseline_name(names): logreg_config(config, names, tasks[names]) for names in by_width}


def _taught(config: Config, table: FeatureTable) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Task -> its labelled train rows, if there are any, and the modalities that one of them has."""
    found = {}
    for t in sorted(table.labels):
        rows = np.flatnonzero((table.split == "train") & table.labels[t].known)
        if len(rows):
            read = config.tasks[t].inputs or sorted(table.features)
            found[t] = rows, [m for m in sorted(read) if table.present[m][rows].any()]
    return found


def logreg_config(config: Config, modalities: Sequence[str], tasks: Sequence[str]) -> Config:
    """The config of logistic regression on some modalities, with the labels that the config's models have."""
    training = {"label_frac": config.training.label_frac, "exclude": config.training.exclude}
    model = {"modalities": list(modalities), "tasks": list(tasks), "num_levels": 0, "experts": False}
    return config.with_overrides({"variants": {}, "model": model, "training": training})


@dataclass(frozen=True)
class Majority:
    """Predicts the same for every sample: what fits the train split best, such as the class frequencies."""

    modalities: tuple[str, ...]  # a sample must have one of them: so it is scored on the same rows as the other models
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
    """Logistic regression on one modality, or on several concatenated."""

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
        """The held-out rows of the table that it was fitted on, and their out-of-fold predictions."""
        part = table.take(self.fit.heldout.rows)
        logits = self.fit.heldout.logits[pattern_name(self.modalities)]
        kinds = self.fit.model.spec.kinds
        return part, self._known({t: kinds[t].outputs_of(z) for t, z in logits.items()}, part)

    def _known(self, proba: Mapping[str, np.ndarray], table: FeatureTable) -> dict[str, np.ndarray]:
        return without_unreadable(proba, table, {t: self.config.task_inputs(t) for t in proba})

    def save(self, uri: str, store: Store, encoders_uri: str) -> None:
        """Publish it as a model folder, with the encoders of its modalities, so that raw samples can be predicted."""
        manifest, fit = store.manifest, self.fit
        parts = {"store": manifest.fingerprint, "config": self.config.model_dump(mode="json"), "l2": fit.l2}
        path = [Penalty.model_validate(step) for step in fit.path]
        training = Solved(seconds=fit.seconds, l2=fit.l2, path=path, num_params=self.num_params)
        for m in self.modalities:
            for folder in manifest.modalities[m].folders:
                storage.copy_folder(storage.join(encoders_uri, folder), storage.join(uri, "encoders", folder))
        save_heldout(uri, fit.heldout)
        save_model(uri, fit.model, self.config, manifest, training, fingerprint(parts))

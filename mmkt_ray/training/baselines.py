"""What any model must beat: the majority class, logistic regression on the same features,
and gradient boosting on a table.

Logistic regression is the model without towers (`num_levels: 0`), solved to its optimum on all rows of train and val,
its penalty chosen on held-out rows: see training/linear.py. It can be shipped like any model.

Axes: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmkt_ray.cluster.side_by_side import run_here
from mmkt_ray.config import Config
from mmkt_ray.errors import DataError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import Store
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import readable, without_unreadable
from mmkt_ray.inference.training_record import LinearPath
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.models.predictor import Predictor
from mmkt_ray.scoring.heldout import HeldOut, load_heldout, pattern_name
from mmkt_ray.training.fingerprint import linear_place
from mmkt_ray.training.setup import can_learn
from mmkt_ray.training.trainer import train
from mmkt_ray.training.wide import linear_config

MAJORITY, BOOSTING = "majority", "boosting:"


def baseline_name(modalities: Sequence[str]) -> str:
    """`logreg:image+text` for logistic regression on these modalities."""
    return "logreg:" + pattern_name(modalities)


def fit_logregs(config: Config, store: Store, table: FeatureTable, folder: str) -> dict[str, Logreg]:
    """Name -> Logreg, see `logreg_configs`. Each is published in the folder of the run's models;
    one that lies there is used.

    table: all rows of the store.
    """
    found = {}
    for name, own in logreg_configs(config, table).items():
        uri = linear_place(own, store, folder)
        train(own, store.uri, uri, run=run_here)
        found[name] = Logreg.load(own, uri)
    return found


def fit_majorities(config: Config, table: FeatureTable) -> dict[str, Majority]:
    """Task -> Majority; tasks without labelled train rows have none."""
    found = {}
    for t, (rows, there) in _taught(config, table).items():
        found[t] = Majority.fit(table.labels[t][rows], table.width(t), there)
    return found


def logreg_configs(config: Config, table: FeatureTable) -> dict[str, Config]:
    """Name -> the config of logistic regression on each modality, "logreg:<modality>", and on all that a task reads,
    "logreg:<all joined by +>".

    For a task, a modality that none of its labelled train rows has is left out, so is the concatenation of fewer than
    two, and rows with one class only, which teach nothing.
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
    return linear_config(config, modalities, tasks, config.training.model_dump(include={"label_frac", "exclude"}))


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
    uri: str  # its model folder
    model: Predictor
    heldout: HeldOut  # logits at the chosen penalties
    path: LinearPath
    seconds: float

    @classmethod
    def load(cls, config: Config, uri: str) -> Logreg:
        """From the model folder that `train` made of its config. Raises: DataError as `load_model`."""
        model, card = load_model(uri)
        heldout = load_heldout(uri)
        if heldout is None or card.fit is None or card.fit.linear is None:
            raise DataError(f"'{uri}' is no linear model with held-out predictions: remove the folder and run again")
        return cls(config, uri, model, heldout, card.fit.linear, card.fit.seconds)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it reads, sorted."""
        return self.config.model_modalities

    @property
    def num_params(self) -> int:
        """Weights and biases."""
        return sum(p.numel() for p in self.model.parameters())

    def predict(self, table: FeatureTable) -> dict[str, np.ndarray]:
        """Task -> probabilities (N, C) float32; NaN for rows without any of the modalities."""
        return self._known(predict_table(self.model, table), table)

    def held_out(self, table: FeatureTable) -> tuple[FeatureTable, dict[str, np.ndarray]]:
        """The held-out rows of the table that it was fitted on, and their out-of-fold predictions."""
        part = table.take(self.heldout.rows)
        logits = self.heldout.logits[pattern_name(self.modalities)]
        kinds = self.model.spec.kinds
        return part, self._known({t: kinds[t].outputs_of(z) for t, z in logits.items()}, part)

    def _known(self, proba: Mapping[str, np.ndarray], table: FeatureTable) -> dict[str, np.ndarray]:
        return without_unreadable(proba, table, {t: self.config.task_inputs(t) for t in proba})

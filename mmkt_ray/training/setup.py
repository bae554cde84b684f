"""What a fit starts from: the rows to learn from, an untrained model of them, the losses of its tasks.

Called by loop.py, and by whatever trains many models as one.

Axes: N rows of the table, C classes of one task.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.sparse as sp

from mmkt_ray.config import Config
from mmkt_ray.errors import DataError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.models import ModelSpec, MultimodalModel, build_spec
from mmkt_ray.scoring.heldout import as_train
from mmkt_ray.training.batches import Worker, complete_rows, feature_statistics, narrow, usable_rows
from mmkt_ray.training.criterion import Criterion, Distillation
from mmkt_ray.training.methods.imbalance import keep_labels, leave_out, read_excluded


def spec_of(config: Config, table: FeatureTable) -> ModelSpec:
    """The model that `config` describes over the features of `table`."""
    return build_spec(
        config,
        dims={m: f.shape[1] for m, f in table.features.items()},
        sparse={m: sp.issparse(f) for m, f in table.features.items()},
        num_classes={t: table.width(t) for t in table.labels},
        kinds=table.kinds,
    )


def training_rows(
    config: Config, table: FeatureTable, targets: Mapping[str, np.ndarray]
) -> tuple[FeatureTable, np.ndarray]:
    """The table without the rows and labels that `training` leaves out, and the train rows to learn from.

    targets: task -> teachers' probabilities (N, C); rows with targets are learnt from even without a label.

    Raises: DataError if a task has nothing to learn.
    """
    training = config.training
    if training.exclude:
        table = leave_out(table, read_excluded(training.exclude))
    rows = usable_rows(table, "train")
    if config.model.missing == "drop":
        rows = complete_rows(table, rows)
    if min(config.label_fracs().values()) < 1:
        table = keep_labels(table, rows, config.label_fracs(), config.seed)
        rows = np.intersect1d(rows, usable_rows(table, "train"))
    for t, labels in sorted(table.labels.items()):
        counts = labels.kind.count(labels[rows], table.width(t))
        labels.kind.check_learnable(t, counts, table.class_names[t])
    if targets:
        taught = np.any([~np.isnan(values).any(axis=1) for values in targets.values()], axis=0)
        readable = np.any(list(table.present.values()), axis=0) & (table.split == "train")
        rows = np.union1d(rows, np.flatnonzero(taught & readable))
    return table, rows


def can_learn(config: Config, table: FeatureTable) -> bool:
    """Whether each task of the model can be learnt from train and val together."""
    try:
        training_rows(config, as_train(narrow(table, config.model_modalities, config.model_tasks)), {})
    except DataError:
        return False
    return True


def build_model(config: Config, table: FeatureTable) -> MultimodalModel:
    """An untrained model that knows the statistics of the train rows' features.
    Raises: DataError as `fit_generators`."""
    model = MultimodalModel(spec_of(config, table))
    for m, features in table.features.items():
        statistics = feature_statistics(features, table.present[m] & (table.split == "train"))
        model.input_stage(m).set_statistics(*statistics)
    if config.model.missing == "generate":
        train = table.rows("train")
        model.fit_generators(
            {m: f[train] for m, f in table.features.items()}, {m: p[train] for m, p in table.present.items()}
        )
    return model


def build_criterion(config: Config, table: FeatureTable, rows: np.ndarray, worker: Worker) -> Criterion:
    """The losses of the tasks, with the class frequencies of `rows`."""
    return Criterion.of(
        {t: labels.kind.count(labels[rows], table.width(t)) for t, labels in table.labels.items()},
        table.kinds,
        class_weights=config.training.class_weights,
        label_smoothing=config.training.label_smoothing,
        logit_adjustment=config.training.logit_adjustment,
        loss_weights={t: config.tasks[t].loss_weight for t in table.labels},
        distillation=Distillation(config.training.transfer.distill_weight, config.training.transfer.temperature),
    ).to(worker.device)

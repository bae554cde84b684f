"""`model.wide`: a network and a linear model of the same features as one model.

The linear model is solved to its optimum by itself (linear.py); the run's baselines are the same models.
The logits are
    z = w z_n / T_n + (1 - w) z_l / T_l
of the network's z_n and the linear model's z_l. On held-out rows T_n and T_l are the best temperatures, and the share
w is that of the lowest log loss. The two err on different rows: few words decide a label by themselves, others do so
together.

Sources: Cheng et al. 2016, Wide & Deep Learning, https://arxiv.org/abs/1606.07792 (which trains both as one network);
Stone 1974 and Wolpert 1992, Stacked Generalization, https://doi.org/10.1016/S0893-6080(05)80023-1 (shares from
held-out predictions).

Axes: H held-out rows, C classes of one task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmkt_ray.config import Config
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.rows import readable
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.models import MultimodalModel
from mmkt_ray.scoring.calibration import fit_temperature
from mmkt_ray.scoring.heldout import HeldOut, pattern_name
from mmkt_ray.training.linear import is_linear

SHARES = tuple(tenth / 10 for tenth in range(11))  # of the network, that are tried


def is_wide(config: Config) -> bool:
    """Whether the config's model gets a linear model beside its network: its settings are left to held-out rows, and
    it does not learn from other class frequencies than the linear model would."""
    training = config.training
    adjusted = training.resample or training.logit_adjustment
    return config.model.wide and bool(training.auto) and not adjusted and not is_linear(config)


def wide_config(config: Config) -> Config:
    """The config of the linear model of what the config's model reads, from the same labels."""
    training = config.training.model_dump(include={"label_frac", "exclude", "class_weights"})
    return linear_config(config, config.model_modalities, config.model_tasks, training)


def linear_config(
    config: Config, modalities: Sequence[str], tasks: Sequence[str], training: Mapping[str, Any]
) -> Config:
    """The config of logistic (ridge) regression. training: the keys that it has of this section."""
    model = {"modalities": list(modalities), "tasks": list(tasks), "num_levels": 0, "experts": False}
    return config.with_overrides({"variants": {}, "model": model, "training": dict(training)})


def widen(
    network: MultimodalModel, known: HeldOut, linear: MultimodalModel, known_linear: HeldOut, table: FeatureTable
) -> tuple[HeldOut, dict[str, float]]:
    """Put the linear model into the network, unless it has no share of any task. known, known_linear: what each says
    of held-out rows.

    Returns what the model says of the rows that both know, and the network's share of each task.
    """
    rows, ours, theirs = np.intersect1d(known.rows, known_linear.rows, return_indices=True)
    every = pattern_name(list(network.spec.modalities))
    scales, shares = dict[str, tuple[float, float]](), dict[str, float]()
    for t, inputs in network.spec.inputs.items():
        able = readable(table, inputs)[rows]
        labels = table.labels[t][rows[able]]
        z, z_linear = known.logits[every][t][ours][able], known_linear.logits[every][t][theirs][able]
        shares[t], scales[t] = best_share(z, z_linear, labels)
    if all(share == 1 for share in shares.values()):
        return known, shares
    network.add_wide(linear, scales)
    logits = {
        given: {
            t: scales[t][0] * z[ours] + scales[t][1] * known_linear.logits[given][t][theirs] for t, z in by_task.items()
        }
        for given, by_task in known.logits.items()
        if given in known_linear.logits
    }
    return HeldOut(known.on, rows, logits), shares


def best_share(network: np.ndarray, linear: np.ndarray, labels: Labels) -> tuple[float, tuple[float, float]]:
    """The network's share w, and what its logits and the linear model's are multiplied by: w / T_n and (1 - w) / T_l.

    network, linear: logits (H, C). Where no label is known the network keeps all.
    """
    some = labels.known
    network, linear, labels = network[some], linear[some], labels[some]
    if not len(labels):
        return 1.0, (1.0, 0.0)
    inverse = 1 / fit_temperature(network, labels), 1 / fit_temperature(linear, labels)
    tried = [(w * inverse[0], (1 - w) * inverse[1]) for w in SHARES]
    losses = [float(labels.kind.each_loss(a * network + b * linear, labels).mean()) for a, b in tried]
    best = int(np.argmin(losses))
    return SHARES[best], tried[best]

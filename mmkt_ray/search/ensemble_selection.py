"""A greedy ensemble of the best candidates: models are added, with replacement,
as long as the validation score allows.

Source: ensemble selection, Caruana et al. 2004 (https://doi.org/10.1145/1015330.1015432).
Axes: E candidates, N val rows, C classes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch

from mmkt_ray import cluster
from mmkt_ray.config import SearchConfig
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.outputs import Proba, predict_table
from mmkt_ray.inference.training_record import Ensembled, EnsembleMember
from mmkt_ray.models import MultimodalModel
from mmkt_ray.models.ensemble import EnsembleModel, EnsembleSpec
from mmkt_ray.search.leaderboard import overrides_of
from mmkt_ray.search.space import Overrides, Space
from mmkt_ray.search.trial import search_score
from mmkt_ray.training.batches import narrow, usable_rows
from mmkt_ray.training.population import Population
from mmkt_ray.training.validation import proba_scores

NUM_CANDIDATES = 50  # the library that is picked from



def select_ensemble(
    library: Sequence[Proba], score: Callable[[Proba], float], num_picks: int
) -> tuple[list[int], float]:
    """Indices picked from the library, best first and perhaps several times, and the validation score of their mean.

    Starts with the best one; each step adds the one that does most for the mean of the probabilities. What is kept is
    the best of the ensembles on the way, the smallest of equals.
    """
    total: dict[str, np.ndarray] = {t: np.zeros_like(p) for t, p in library[0].items()}
    picks: list[int] = []
    best: tuple[list[int], float] = ([], -np.inf)
    for size in range(1, num_picks + 1):
        scores = [score({t: (total[t] + p[t]) / size for t in total}) for p in library]
        picks.append(int(np.argmax(scores)))
        total = {t: total[t] + library[picks[-1]][t] for t in total}
        if scores[picks[-1]] > best[1]:
            best = (list(picks), float(scores[picks[-1]]))
    return best


def build_ensemble(
    space: Space, settings: SearchConfig, rows: pd.DataFrame, table: FeatureTable
) -> tuple[EnsembleModel, Ensembled] | tuple[None, None]:
    """The ensemble of `settings.ensemble` picks among the leaderboard's best that have every task, trained again in
    stacks, and what it is; None where there is no such candidate."""
    every = set(space.config.model_tasks)
    whole = np.array([set(overrides_of(row).get("model.tasks") or every) == every for _, row in rows.iterrows()], bool)
    best = rows[rows["score"].notna() & whole].sort_values("score", ascending=False, kind="stable")[:NUM_CANDIDATES]
    if best.empty:
        return None, None
    models = train_again(space, settings, [overrides_of(row) for _, row in best.iterrows()], table)
    val = table.take(usable_rows(narrow(table, space.config.model_modalities, space.config.model_tasks), "val"))
    library = [predict_table(model, val) for model in models]
    objective = search_score(space, table)

    def score(proba: Proba) -> float:
        return objective(quick_scores(val, proba, objective.extra))

    picks, value = select_ensemble(library, score, settings.ensemble)
    counts = Counter(picks)
    spec = EnsembleSpec(tuple(models[i].spec for i in counts), tuple(counts.values()))
    about = Ensembled(
        val=value,
        best_member_val=max(score(p) for p in library),
        library=len(library),
        members=[EnsembleMember(candidate=best.iloc[i]["candidate"], picks=n) for i, n in counts.items()],
    )
    return EnsembleModel(spec, [models[i] for i in counts]).eval(), about


def quick_scores(table: FeatureTable, proba: Proba, metric: str | None = None) -> dict[str, dict[str, float]]:
    """`accuracy` and `macro_f1` by task, as evaluation defines them, of the labelled rows, and one more metric if
    asked for; only these, because selection asks for them thousands of times."""
    found: dict[str, dict[str, float]] = {"accuracy": {}, "macro_f1": {}}
    if metric:
        found[metric] = proba_scores(metric, table, np.arange(len(table.split)), proba)
    for t, values in proba.items():
        labels = table.labels[t][table.labels[t].labelled]
        if len(labels):
            for name, score in labels.kind.quick_scores(labels, values[table.labels[t].labelled]).items():
                found.setdefault(name, {})[t] = score
    return found


def train_again(
    space: Space, settings: SearchConfig, candidates: Sequence[Overrides], table: FeatureTable
) -> list[MultimodalModel]:
    """The candidates' models in their order, those of one architecture trained together to the last epoch."""
    torch.set_num_threads(cluster.cores())
    groups: dict[str, list[int]] = {}
    for i, overrides in enumerate(candidates):
        architecture = {k: v for k, v in overrides.items() if k not in space.members}
        groups.setdefault(json.dumps(architecture, sort_keys=True), []).append(i)
    found: dict[int, MultimodalModel] = {}
    for key, indices in groups.items():
        own = space.configure(json.loads(key))
        members = [{k: v for k, v in candidates[i].items() if k in space.members} for i in indices]
        population = Population.start(own, table, members, score=search_score(space, table))
        population.train(own.training.epochs)
        found |= {i: population.model(j) for j, i in enumerate(indices)}
    return [found[i] for i in range(len(candidates))]

"""What the leaderboard shows as a whole: which architectures, which parameters, how fast. Data for the report."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import optuna
import pandas as pd

from mmkt_ray.search.leaderboard import overrides_of
from mmkt_ray.search.search_results import CurvePoint, HeatMap, SearchSummary, SlicePoint
from mmkt_ray.search.space import Space, text_of
from mmkt_ray.search.tuner import frozen_trial

MAX_IMPORTANCE_ROWS = 500  # fANOVA takes minutes on some thousand
MAX_SLICE_POINTS = 500
MAX_CURVE_POINTS = 300


def summarise_search(space: Space, rows: pd.DataFrame) -> SearchSummary:
    """rows: of a leaderboard."""
    scored = rows[rows["score"].notna()]
    return SearchSummary(
        heat_maps=[m for keys in heat_map_keys(space) if (m := heat_map(scored, *keys))],
        curve=anytime_curve(rows),
        importance=importance(space, scored),
        slices={key: slice_points(scored, key) for key in space.parameters},
    )


def anytime_curve(rows: pd.DataFrame) -> list[CurvePoint]:
    """Steps of the best score against seconds of search, with the candidates tried by then."""
    ordered = rows.sort_values("finished_at", kind="stable")
    if ordered.empty:
        return []
    best = ordered["score"].cummax().to_numpy()
    at, count = ordered["finished_at"].to_numpy(), np.arange(1, len(ordered) + 1)
    known = np.nan_to_num(best, nan=-np.inf)
    rises = np.flatnonzero(known > np.append(-np.inf, known[:-1]))
    kept = np.unique([*rises[-MAX_CURVE_POINTS:], len(ordered) - 1]).astype(int)
    return [(float(at[i]), float(best[i]), int(count[i])) for i in kept if np.isfinite(best[i])]


def heat_map_keys(space: Space) -> list[tuple[str, str]]:
    """Fusion x sharing and depth x sharing, where they are searched."""
    sharing = "model.sharing"
    return [
        (key, sharing)
        for key in ("model.fusion.name", "model.fusion.depth")
        if {key, sharing} <= space.architecture.keys()
    ]


def heat_map(scored: pd.DataFrame, row_key: str, column_key: str) -> HeatMap | None:
    """The best score and the number of candidates of each cell; None if no candidate has both keys."""
    part = scored[(scored["reference"].isna()) & scored[row_key].notna() & scored[column_key].notna()]
    if part.empty:
        return None
    cells = part.groupby([row_key, column_key])["score"].agg(["max", "count"])
    names = [sorted(part[key].unique()) for key in (row_key, column_key)]
    score = [[_cell(cells, r, c, "max") for c in names[1]] for r in names[0]]
    count = [[_cell(cells, r, c, "count") or 0 for c in names[1]] for r in names[0]]
    return HeatMap(
        rows=row_key,
        columns=column_key,
        row_names=[text_of(_plain(n)) for n in names[0]],
        column_names=[text_of(_plain(n)) for n in names[1]],
        score=score,
        candidates=[[int(n) for n in row] for row in count],
    )


def _cell(cells: pd.DataFrame, row: Any, column: Any, name: str) -> float | None:
    return float(cells.loc[(row, column), name]) if (row, column) in cells.index else None


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def importance(space: Space, scored: pd.DataFrame) -> dict[str, float] | None:
    """Share of the variance of scores that each key explains, of the keys that every candidate has (fANOVA, Hutter et
    al. 2014, https://proceedings.mlr.press/v32/hutter14.html), 0 for a key that never changed; None if all scores are
    equal, or all candidates. The scores are those after the first rung,
    where all candidates have trained equally long."""
    part = scored[scored["reference"].isna() & scored["first_score"].notna()]
    if len(part) > MAX_IMPORTANCE_ROWS:
        part = part.sample(MAX_IMPORTANCE_ROWS, random_state=0)
    if part["first_score"].nunique() < 2:
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for _, row in part.iterrows():
        study.add_trial(frozen_trial(space, overrides_of(row), row["first_score"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=0)
        )
    chosen = [overrides_of(row) for _, row in part.iterrows()]
    changed = {key for key in found if any(c.get(key) != chosen[0].get(key) for c in chosen)}
    total = sum(found[key] for key in changed)
    return {key: float(share) / total if key in changed else 0.0 for key, share in found.items()} if total else None


def slice_points(scored: pd.DataFrame, key: str) -> list[SlicePoint]:
    """Value and score of the candidates, of many a sample that has the best ones in it."""
    part = scored[scored[key].notna()].sort_values("score", ascending=False)
    if len(part) > MAX_SLICE_POINTS:
        head = part[: MAX_SLICE_POINTS // 5]
        part = pd.concat([head, part[len(head) :].sample(MAX_SLICE_POINTS - len(head), random_state=0)])
    columns = zip(part[key], part["score"], part["epochs"], strict=True)
    return [(v if isinstance(v, str) else float(v), float(score), int(epochs)) for v, score, epochs in columns]

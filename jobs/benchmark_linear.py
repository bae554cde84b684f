"""The linear model against scikit-learn's at the same penalty, on the same features: seconds and test accuracy.

    python jobs/benchmark_linear.py jobs/configs/openmoji.yaml jobs/configs/openmoji_pretrained.yaml --rounds 3

For each task of a config's model: features of all of its modalities as the linear model sees them (standardised, each
scaled to rows of unit mean squared length; one dense or one sparse matrix), the penalty that it chose itself.
scikit-learn's L-BFGS has a tolerance of TOLERANCE: with its default, 1e-4, it ends up to a tenth above the optimum of
OpenMoji's subcategory. Of a multilabel task it solves one problem for each class. Each round solves every problem
once by each, one after the other; the ratio is the median over rounds. Prints a Markdown table.

--choose measures what a user does, for multiclass tasks: the penalty is chosen on held-out rows, then the model of
all rows is solved. scikit-learn's LogisticRegressionCV, with its own tolerance, goes through the penalties that ours
went through, each on all folds; ours goes through them on two,
and leaves held-out predictions of all folds at the chosen one.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge

from mmkt_ray.config import Config, load_config, parse_override
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.outputs import predict_logits
from mmkt_ray.inference.rows import load_rows, readable
from mmkt_ray.kinds.labels import Labels
from mmkt_ray.models.imputation import mean_squared_norm
from mmkt_ray.scoring.heldout import make_folds
from mmkt_ray.steps import extract_step
from mmkt_ray.training.batches import feature_statistics, narrow
from mmkt_ray.training.linear import fit_linear, solve, standardised

TOLERANCE = 1e-6  # of scikit-learn's gradient


def main() -> None:
    """Measure the configs one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--choose", action="store_true", help="measure the choice of the penalty with the fit")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    print(
        "| set | task | rows x columns, classes | penalty | seconds, scikit-learn | seconds, ours | ratio | accuracy "
        "| ours |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for path in args.configs:
        config = load_config(path, dict(parse_override(text) for text in args.overrides))
        plain = {"model.num_levels": 0, "model.fusion": "concat", "model.missing": "mask", "model.experts": False}
        linear = config.model_copy(update={"variants": {}}).with_overrides(plain)
        for row in (measure_choosing if args.choose else measure)(linear, args.rounds):
            print(row, flush=True)


def measure(config: Config, num_rounds: int) -> Iterator[str]:
    """A line of the table for each task of the config's model."""
    store = extract_step(config)["model"]
    table = load_rows(store, config.model_modalities, config.model_tasks).table
    penalties = fit_linear(config, table).l2
    for t in config.model_tasks:
        labels, rows = table.labels[t], readable(table, config.task_inputs(t))
        learnt = np.flatnonzero(rows & labels.known & np.isin(table.split, ("train", "val")))
        test = np.flatnonzero(rows & labels.labelled & (table.split == "test"))
        x, l2, width = stacked(table, config.task_inputs(t), learnt), penalties[t], table.width(t)
        found: dict[str, list[float]] = {"theirs": [], "ours": []}
        logits: dict[str, np.ndarray] = {}
        for _ in range(num_rounds):
            for name, fit in (("theirs", scikit_learn), ("ours", ours)):
                started = time.perf_counter()
                weights, bias = fit(x[learnt], labels[learnt], width, l2)
                found[name].append(time.perf_counter() - started)
                logits[name] = np.asarray(x[test] @ weights + bias)
        kind = table.kinds[t]
        scores = {
            n: 100 * kind.row_scores(labels[test], kind.predict(z.astype(np.float32))).mean() for n, z in logits.items()
        }
        yield line(config, t, f"{len(learnt)} x {x.shape[1]}, {width}", l2, found, scores)


def measure_choosing(config: Config, num_rounds: int) -> Iterator[str]:
    """A line for each multiclass task: choosing among the penalties that ours tried, and the fit of all rows."""
    table = load_rows(extract_step(config)["model"], config.model_modalities, config.model_tasks).table
    folds = make_folds(table, config.seed)
    for t in config.model_tasks:
        labels, inputs = table.labels[t], config.task_inputs(t)
        learnt = np.flatnonzero(
            readable(table, inputs) & labels.known & np.isin(table.split, ("train", "val")) & (folds.fold >= 0)
        )
        test = np.flatnonzero(readable(table, inputs) & labels.labelled & (table.split == "test"))
        target, kind = labels.kind.linear_target(labels[learnt], table.width(t), False), table.kinds[t]
        if target.squared or not target.one_of:
            continue
        alone = config.with_overrides({"model.tasks": [t]})
        x, fold = stacked(table, inputs, learnt), folds.fold[learnt]
        parts = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(folds.num_held)]
        found: dict[str, list[float]] = {"theirs": [], "ours": []}
        scores: dict[str, float] = {}
        for _ in range(num_rounds):
            started = time.perf_counter()
            fitted = fit_linear(alone, table)
            found["ours"].append(time.perf_counter() - started)
            logits = predict_logits(fitted.model, narrow(table, config.model_modalities, [t]))[t][test]
            scores["ours"] = 100 * kind.row_scores(labels[test], kind.predict(logits)).mean()
            tried = [1 / step["l2"] for step in fitted.path]
            started = time.perf_counter()
            model = LogisticRegressionCV(
                Cs=tried, cv=parts, scoring="neg_log_loss", max_iter=10_000, l1_ratios=(0,), use_legacy_attributes=False
            ).fit(x[learnt], target.labels)
            found["theirs"].append(time.perf_counter() - started)
            weights, bias = target.expanded(model.coef_.T, model.intercept_, table.width(t))
            theirs = np.asarray(x[test] @ weights + bias, np.float32)
            scores["theirs"] = 100 * kind.row_scores(labels[test], kind.predict(theirs)).mean()
        yield line(config, t, f"{len(learnt)} x {x.shape[1]}, {table.width(t)}", fitted.l2[t], found, scores)


def line(
    config: Config, task: str, shape: str, l2: float, found: dict[str, list[float]], scores: dict[str, float]
) -> str:
    """Of the table."""
    theirs, ours = (statistics.median(found[name]) for name in ("theirs", "ours"))
    ratio = statistics.median(a / b for a, b in zip(found["theirs"], found["ours"], strict=True))
    return (
        f"| {config.name} | {task} | {shape} | {l2:.3g} | {theirs:.2f} | {ours:.2f} | {ratio:.1f} | "
        f"{scores['theirs']:.1f} | {scores['ours']:.1f} |"
    )


def stacked(table: FeatureTable, modalities: tuple[str, ...], learnt: np.ndarray) -> Any:
    """Features of all rows (N, D), sparse where all modalities are."""
    parts = []
    rows = np.arange(len(table.split))
    for m in modalities:
        features = table.features[m]
        mean, std = feature_statistics(features, np.isin(rows, learnt) & table.present[m])
        x = standardised(features, table.present[m], rows, mean.numpy(), np.where(std > 0, std, 1.0).astype(np.float32))
        parts.append(x * np.float32((table.present[m][learnt].mean() / mean_squared_norm(x[learnt])) ** 0.5))
    if all(sp.issparse(part) for part in parts):
        return sp.hstack(parts).tocsr()
    return np.hstack([part if isinstance(part, np.ndarray) else part.toarray() for part in parts])


def ours(x: Any, labels: Labels, width: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (D, C) and bias (C,)."""
    return solve(x, labels, width, l2)


def scikit_learn(x: Any, labels: Labels, width: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """The same of scikit-learn; a class of a multilabel task that all rows are alike in is told by its bias alone."""
    target = labels.kind.linear_target(labels, width, False)
    if target.squared:
        ridge = Ridge(alpha=l2).fit(x, target.labels)
        return target.expanded(ridge.coef_.reshape(-1, x.shape[1]).T, np.atleast_1d(ridge.intercept_), width)
    if target.one_of:
        model = LogisticRegression(C=1 / l2, max_iter=10_000, tol=TOLERANCE).fit(x, target.labels)
        return target.expanded(model.coef_.T, model.intercept_, width)
    weights, bias = np.zeros((x.shape[1], target.labels.shape[1])), np.zeros(target.labels.shape[1])
    for k, y in enumerate(target.labels.T):
        if y.min() == y.max():
            bias[k] = 30.0 if y[0] else -30.0
            continue
        model = LogisticRegression(C=1 / l2, max_iter=10_000, tol=TOLERANCE).fit(x, y)
        weights[:, k], bias[k] = model.coef_[0], model.intercept_[0]
    return target.expanded(weights, bias, width)


if __name__ == "__main__":
    main()

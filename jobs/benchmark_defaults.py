"""The fused model with default settings against the best single modality and tuned logistic regression, on the same test rows.

    python jobs/benchmark_defaults.py jobs/configs/openmoji.yaml jobs/configs/openmoji_pretrained.yaml --seeds 3

Of each config the model without its variants is trained from several seeds, and one of each modality alone; the logistic
regression reads all modalities, its penalty chosen on held-out rows. The best single modality is the one with the highest
held-out accuracy. Intervals are over seeds and test rows, of paired differences; the calibration error on test rows is the fused
model's, at the temperature of its held-out rows, the mean over seeds. Prints a Markdown table, row by row.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmkt_ray import storage
from mmkt_ray.config import Config, load_config, parse_override
from mmkt_ray.features.store import FeatureTable, Store
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import load_rows, readable
from mmkt_ray.kinds.probabilities import probability_scores
from mmkt_ray.scoring.calibration import fit_temperatures
from mmkt_ray.scoring.heldout import load_heldout, pattern_name
from mmkt_ray.scoring.seeds import mean_interval
from mmkt_ray.steps import extract_step, run_folder
from mmkt_ray.training.baselines import baseline_name, fit_baselines
from mmkt_ray.training.trainer import train, train_singles


def main() -> None:
    """Measure the configs one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args()
    print(
        "| set | task | test rows | fused, default | best single modality | difference | logistic regression | difference | "
        "calibration error |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for path in args.configs:
        config = load_config(path, dict(parse_override(text) for text in args.overrides))
        for row in measure(config.model_copy(update={"variants": {}}), args.seeds):
            print(row, flush=True)


def measure(config: Config, num_seeds: int) -> Iterator[str]:
    """A line of the table for each task of the config's model."""
    store = extract_step(config)["model"]
    uris = [fit_all(config, store, seed) for seed in range(num_seeds)]
    data = load_rows(store, config.model_modalities, config.model_tasks)
    regressions = fit_baselines(config, data.table)[1]
    for t in config.model_tasks:
        rows = data.table.labels[t].labelled & readable(data.table, config.task_inputs(t))
        test = data.table.take(np.flatnonzero(rows & (data.table.split == "test")))
        scores = {name: np.stack([scores_of(by_name[name], test, t) for by_name in uris]) for name in uris[0]}
        fused = scores.pop("fused")
        able = {name: s for name, s in scores.items() if s.size}
        single = max(able, key=lambda name: np.mean([held_out(by_name[name], t) for by_name in uris]))
        linear = regressions[baseline_name(config.task_inputs(t))].predict(test)[t]
        logreg = test.kinds[t].row_scores(test.labels[t], test.kinds[t].predict(linear))[None].repeat(num_seeds, axis=0)
        cells = [f"{100 * fused.mean():.1f}"]
        for name, other in ((single.removeprefix("only:"), able[single]), ("", logreg)):
            gain = mean_interval(fused - other, 1000, 0.95, seed=0)
            ends = [f"{100 * gain[key]:+.1f}" for key in ("value", "low", "high")]
            cells += [f"{name} {100 * other.mean():.1f}".strip(), f"{ends[0]} [{ends[1]}, {ends[2]}]"]
        cells.append(f"{100 * np.mean([calibration_of(by_name['fused'], data.table, test, t) for by_name in uris]):.1f}")
        yield f"| {config.name} | {t} | {len(test.split)} | " + " | ".join(cells) + " |"


def fit_all(config: Config, store: Store, seed: int) -> dict[str, str]:
    """Folders of the fused model (`fused`) and of each modality alone (`only:<modality>`), from one seed."""
    config = config.with_overrides({"training.seed": seed})
    folder = storage.join(run_folder(config), "defaults", str(seed))
    train(config, store.uri, storage.join(folder, "fused"))
    singles = train_singles({"fused": config}, store, folder)
    return {"fused": storage.join(folder, "fused"), **{f"only:{m}": uri for m, uri in singles.items()}}


def scores_of(uri: str, test: FeatureTable, task: str) -> np.ndarray:
    """(N,) score of each test row, see `TaskKind.row_scores`; empty if the model has no such task."""
    model: Any = load_model(uri)[0]
    if task not in model.spec.tasks:
        return np.zeros(0)
    kind = test.kinds[task]
    return kind.row_scores(test.labels[task], kind.predict(predict_table(model, test)[task]))


def calibration_of(uri: str, table: FeatureTable, test: FeatureTable, task: str) -> float:
    """The calibration error of the test rows' probabilities, 0..1; table: all rows of the store."""
    model: Any = load_model(uri)[0]
    if (found := load_heldout(uri)) is not None:
        logits = found.logits[pattern_name(list(model.spec.modalities))]
        fitted = fit_temperatures(logits, {t: table.labels[t][found.rows] for t in logits})
        model.temperatures = {t: fitted[t].temperature for t in fitted}
    return float(probability_scores(test.labels[task], predict_table(model, test)[task])["calibration_error"])


def held_out(uri: str, task: str) -> float:
    """A model's accuracy on held-out rows."""
    card = read_card(uri)
    assert card is not None
    assert card.fit is not None
    assert card.fit.val is not None
    return card.fit.val.metrics["accuracy"][task]


if __name__ == "__main__":
    main()

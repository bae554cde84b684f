"""The fused model with default settings against the best single modality and tuned logistic regression on test.

    python jobs/benchmark_defaults.py jobs/configs/openmoji.yaml jobs/configs/openmoji_pretrained.yaml --seeds 3
    python jobs/benchmark_defaults.py jobs/configs/openmoji.yaml --rare    what a modality costs that few rows have

Of each config the model without its variants is trained from several seeds, and one of each modality alone; the
logistic regression reads all modalities, its penalty chosen on held-out rows. The best single modality is the one
with the highest held-out accuracy. Intervals are over seeds and test rows, of paired differences; the calibration
error on test rows is the fused model's, at the temperature of its held-out rows, the mean over seeds. Prints a
Markdown table, row by row.

With --rare the fused model is compared with one that has another modality beside, `rare`: vectors of 16 numbers, of
which one in eight says a little about the first task's class, in a tenth of the rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmkt_ray import storage
from mmkt_ray.config import Config, load_config, parse_override
from mmkt_ray.done import run_folder
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.manifest import ModalityFeatures
from mmkt_ray.features.store import Store, column_of, open_store, to_arrow, write_manifest
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import load_rows, readable
from mmkt_ray.kinds.probabilities import probability_scores
from mmkt_ray.scoring.calibration import fit_temperatures
from mmkt_ray.scoring.heldout import load_heldout, pattern_name
from mmkt_ray.scoring.seeds import mean_interval
from mmkt_ray.steps import extract_step
from mmkt_ray.training.baselines import baseline_name, fit_logregs
from mmkt_ray.training.trainer import train
from mmkt_ray.training.variants import train_singles

RARE = "rare"


def main() -> None:
    """Measure the configs one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--rare", action="store_true", help="with and without a modality that most rows lack")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args()
    if args.rare:
        print(
            "| set | task | test rows | fused | with a rare modality | difference |\n|---|---|---|---|---|---|",
            flush=True,
        )
        for path in args.configs:
            config = load_config(path, dict(parse_override(text) for text in args.overrides))
            for row in measure_rare(config.model_copy(update={"variants": {}}), args.seeds):
                print(row, flush=True)
        return
    print(
        "| set | task | test rows | fused, default | best single modality | difference | logistic regression | "
        "difference | calibration error |"
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
    regressions = fit_logregs(config, store, data.table, storage.join(run_folder(config), "defaults"))
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
        cells.append(
            f"{100 * np.mean([calibration_of(by_name['fused'], data.table, test, t) for by_name in uris]):.1f}"
        )
        yield f"| {config.name} | {t} | {len(test.split)} | " + " | ".join(cells) + " |"


def measure_rare(config: Config, num_seeds: int) -> Iterator[str]:
    """A line of the table for each task of the config's model."""
    store = extract_step(config)["model"]
    sources = [source.model_dump(mode="json") for source in config.samples.sources]
    sources[0]["columns"][RARE] = RARE
    own = {f"modalities.{RARE}": {"kind": "vector", "encoder": "identity"}, "samples.sources": sources}
    wider = config.with_overrides(own)
    more = with_rare_modality(store, config, storage.join(run_folder(config), "defaults", RARE, "store"))
    uris: dict[str, list[str]] = {"fused": [], RARE: []}
    for seed in range(num_seeds):
        for name, part, uri in (("fused", config, store.uri), (RARE, wider, more.uri)):
            folder = storage.join(run_folder(config), "defaults", RARE, str(seed), name)
            train(part.with_overrides({"training.seed": seed}), uri, folder)
            uris[name].append(folder)
    table = load_rows(more, wider.model_modalities, wider.model_tasks).table
    for t in config.model_tasks:
        rows = table.labels[t].labelled & readable(table, config.task_inputs(t)) & (table.split == "test")
        test = table.take(np.flatnonzero(rows))
        scores = {name: np.stack([scores_of(uri, test, t) for uri in uris[name]]) for name in uris}
        gain = mean_interval(scores[RARE] - scores["fused"], 1000, 0.95, seed=0)
        told = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * gain[key] for key in ("value", "low", "high")))
        means = " | ".join(f"{100 * scores[name].mean():.1f}" for name in uris)
        yield f"| {config.name} | {t} | {len(test.split)} | {means} | {told} |"


def with_rare_modality(store: Store, config: Config, uri: str) -> Store:
    """A copy of a store's rows with the modality `rare` beside."""
    rng, task = np.random.default_rng(0), config.model_tasks[0]
    classes = {name: number for number, name in enumerate(store.table([], [task]).class_names[task])}
    checksums = {}
    for part, rows in zip(store.manifest.parts, store.read(), strict=True):
        labels = [classes.get(name, -1) for name in rows[task].to_pylist()]
        values = rng.normal(size=(len(labels), 16)).astype(np.float32)
        values[np.arange(len(labels)), np.array(labels) % 16] += rng.random(len(labels)) < 1 / 8
        present = rng.random(len(labels)) < 0.1
        column = to_arrow(values[present], present)
        checksums[part] = storage.write_table(
            storage.join(uri, "data", part), rows.append_column(column_of(RARE), column)
        )
    about = {"dim": 16, "sparse": False, "kind": "vector", "encoder": {"name": "identity"}, "reduce": None}
    entry = ModalityFeatures.model_validate({**about, "fingerprint": RARE, "folders": []})
    modalities = {**store.manifest.modalities, RARE: entry}
    fingerprint = f"{store.manifest.fingerprint}-{RARE}"
    changed = {"fingerprint": fingerprint, "checksums": checksums, "modalities": modalities}
    write_manifest(uri, store.manifest.model_copy(update=changed))
    return open_store(uri)


def fit_all(config: Config, store: Store, seed: int) -> dict[str, str]:
    """Folders of the fused model (`fused`) and of each modality alone (`only:<modality>`), from one seed."""
    config = config.with_overrides({"training.seed": seed})
    folder = storage.join(run_folder(config), "defaults")  # of all seeds, which share linear models
    fused = storage.join(folder, f"seed-{seed}")
    train(config, store.uri, fused)
    singles = train_singles({"fused": config}, store, folder)
    return {"fused": fused, **{f"only:{m}": uri for m, uri in singles.items()}}


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

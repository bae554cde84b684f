"""All ways to train, with a number to predict beside a class:
each on rows whose number is known to follow the features."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor

from mmkt_ray.config import Config
from mmkt_ray.evaluation.scoring_baselines import fit_boosted
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.conformal import conformal_quantile, coverage, fit_margins, margins_of
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.kinds.regression import Regression
from mmkt_ray.studies.label_issues import predict_out_of_fold
from mmkt_ray.training import boosting
from mmkt_ray.training.auto import choose_settings
from mmkt_ray.training.baselines import fit_majorities
from mmkt_ray.training.boosting import boosted_modalities, fit_boosting
from mmkt_ray.training.experts import expert_configs
from mmkt_ray.training.linear import fit_linear
from mmkt_ray.training.loop import fit
from mmkt_ray.training.population import Population
from tests.training.test_baselines import logregs

NUM_ROWS = 400


def prices(**options) -> FeatureTable:
    """Two modalities, a number that both tell, and the number's half as a class."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(NUM_ROWS, 6)).astype(np.float32), rng.normal(size=(NUM_ROWS, 4)).astype(np.float32)
    z = a[:, 0] + b[:, 0] + 0.1 * rng.normal(size=NUM_ROWS)
    price = np.exp(2 + z / 2)
    kind = Regression(transform="log", **options).fitted("price", [pa.chunked_array([pa.array(price[:300])])])
    split = np.where(np.arange(NUM_ROWS) < 250, "train", np.where(np.arange(NUM_ROWS) < 300, "val", "test")).astype(
        object
    )
    present = {"a": np.ones(NUM_ROWS, bool), "b": np.arange(NUM_ROWS) % 7 > 0}
    b[~present["b"]] = 0
    ids = np.array([f"r{i}" for i in range(NUM_ROWS)], dtype=object)
    return FeatureTable(ids, split, {"a": a, "b": b}, present, {"price": kind.labels(price)}, {"price": ["value"]})


def config_of(table: FeatureTable, **overrides) -> Config:
    """A config of models over the table."""
    from mmkt_ray.config import parse_config

    kind = dataclasses.replace(table.kinds["price"], scale=None).as_json()
    vector = {"kind": {"name": "vector"}, "encoder": "identity"}
    facts = {"kind": {"name": "table"}, "encoder": "table"}
    raw = {
        "name": "numbers",
        "samples": {
            "sources": [{"reader": "parquet", "path": "x", "columns": {"a": "a", "b": ["c", "d"], "price": "price"}}]
        },
        "modalities": {"a": vector, "b": facts},
        "tasks": {"price": {"kind": kind}},
        "model": {"hidden_dim": 32},
        "training": {"auto": [], "epochs": 25, "lr": 0.01},
    }
    return parse_config(raw).with_overrides({key.replace("__", "."): value for key, value in overrides.items()})


def r2_on_test(model, table: FeatureTable) -> float:
    """R2 of the test rows."""
    test = table.take(table.rows("test"))
    labels = test.labels["price"]
    return float(labels.kind.quick_scores(labels, predict_table(model.eval(), test)["price"])["r2"])


@pytest.mark.parametrize("options", [{}, {"loss": "absolute"}, {"loss": "huber"}, {"loss": "pinball"}])
def test_a_network_learns_a_number(options: dict) -> None:
    """Catches a loss on another scale than the prediction."""
    table = prices(**options)
    result = fit(config_of(table, model__experts=False), table)
    assert r2_on_test(result.model, table) > 0.75
    assert result.val.metrics["r2"]["price"] > 0.55


@pytest.mark.parametrize(
    "overrides",
    [
        {"model__fusion": "decision"},
        {"model__fusion": "gated", "model__missing": "generate"},
        {"training__balance": "ogm_ge"},
        {"training__balance": "mmpareto"},
        {"training__task_weighting": "uncertainty"},
        {"training__augment": {"mixup": 0.2}},
        {"training__patience": 5},
    ],
)
def test_methods_of_training_work_with_numbers(overrides: dict) -> None:
    """Catches a method that asks a number for the probability of its class."""
    table = prices()
    assert r2_on_test(fit(config_of(table, model__experts=False, **overrides), table).model, table) > 0.5


@pytest.mark.slow
def test_baselines_choose_and_stack() -> None:
    """Catches a ridge on raw prices, a choice of settings by a log loss that numbers lack,
    and members whose losses mix."""
    table = prices()
    config = config_of(table)
    majorities, linear = fit_majorities(config, table), logregs(config, table)
    assert majorities["price"].outputs[0] == pytest.approx(table.labels["price"].values[:250].mean(), rel=1e-5)
    assert r2_on_test(linear["logreg:a+b"].model, table) > 0.7
    assert r2_on_test(linear["logreg:a+b"].model, table) > r2_on_test(linear["logreg:a"].model, table)
    open_keys = ["training.lr", "training.steps", "training.label_smoothing"]
    choice, _ = choose_settings(config.with_overrides({"training.auto": open_keys}), table)
    assert choice.settings["training.label_smoothing"] == 0
    assert choice.num_rows > 0
    population = Population.start(config, table, [{"training.lr": 0.01}, {"training.lr": 1e-6}])
    population.train(10)
    assert population.scores[0] > population.scores[1]
    assert population.scores[0] > 0.4
    assert set(expert_configs(config, table)) >= {"a", "b"}
    assert predict_out_of_fold(table.take(table.rows("train")), "price", config) is None


def test_numbers_are_learnt_longer_and_without_hidden_features_where_that_is_better() -> None:
    """Catches settings of classes for a number: a fifth of the steps it takes, with three of ten features hidden."""
    table = prices()
    config = config_of(table, model__wide=False, model__experts=False)
    choice, _ = choose_settings(
        config.with_overrides({"training.auto": ["training.steps", "model.feature_dropout", "model.dropout"]}), table
    )
    first, second = (candidate.settings for candidate in choice.candidates)
    assert second["training.steps"] == 4 * first["training.steps"]
    assert choice.settings == second
    assert choice.settings["model.feature_dropout"] == 0


def test_intervals_hold_as_many_labels_as_said() -> None:
    """Catches a margin on the wrong scale, or of the wrong rank: coverage would be far from 90 %."""
    errors = np.arange(1, 100, dtype=float)
    assert conformal_quantile(errors, 0.9) == 90.0
    assert conformal_quantile(errors[:5], 0.9) is None
    table = prices()
    model = fit_linear(config_of(table, model__num_levels=0, model__experts=False), table).model
    held, test = table.take(np.arange(150, 300)), table.take(table.rows("test"))
    margins = fit_margins(held, predict_table(model, held), 0.9)["price"]
    assert set(margins) == {"", "a+b"}  # too few rows have a alone
    told = coverage(test, "price", predict_table(model, test)["price"], margins_of(test, ["a", "b"], margins), 0.9)
    assert told is not None
    assert 0.8 <= told.covered <= 1.0


def test_boosting_is_that_of_scikit_learn_and_predicts_each_held_out_row_blindly() -> None:
    """Catches boosting of raw prices, of test rows, and held-out predictions by a model that knew the row."""
    table = prices()
    config = config_of(table)
    assert set(fit_boosted(config, table)) == {"boosting:b"}
    found = fit_boosting(config, table, "price", "b")
    assert found is not None
    train = np.flatnonzero((table.split != "test") & table.present["b"])
    z = np.log(table.labels["price"].values[train])
    x = table.features["b"]
    expected = HistGradientBoostingRegressor(random_state=0, early_stopping=True).fit(x[train], z)
    said, there = found.predict(table)[:, 0], table.present["b"]
    np.testing.assert_allclose(np.log(said[there]), expected.predict(x[there]), atol=0.3)
    assert np.isnan(said[~there]).all()
    assert set(found.heldout) == set(np.flatnonzero(table.split != "test"))
    y, blind = table.labels["price"].values[found.heldout], found.outputs[:, 0]
    known = np.isfinite(blind)
    error, seen = np.abs(np.log(blind / y))[known].mean(), np.abs(np.log(said[found.heldout] / y))[known].mean()
    assert seen < error < 0.5


def test_boosting_of_what_is_wide_for_many_classes_is_left_out(monkeypatch, caplog) -> None:
    """Catches a run that waits minutes for thousands of trees on an embedding, and a table left out in silence."""
    table = prices()
    config = config_of(table)
    assert boosted_modalities(config, table, "price") == ["b"]
    monkeypatch.setattr(boosting, "MAX_SPLITS", 3)
    with caplog.at_level("INFO"):
        assert boosted_modalities(config, table, "price") == []
    assert "no gradient boosting of b for price: 4 features for each of 1 outputs" in caplog.text

"""`training: auto`: settings from a stack of candidates that each leave rows out, judged on these rows."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmkt_ray.config import load_config
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import open_store
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.scoring.heldout import HeldOut, as_train, load_heldout, make_folds, save_heldout
from mmkt_ray.training import auto, chosen_settings
from mmkt_ray.training.auto import (
    choose_candidate,
    choose_settings,
    for_depth,
    screening_config,
    settings_of,
    with_settings,
)
from mmkt_ray.training.batches import Worker
from mmkt_ray.training.fold_stack import WHOLE, FoldStack, fit_and_hold_out, hold_out
from mmkt_ray.training.loop import Fitting, fit, seed_of
from mmkt_ray.training.optimizer import build_optimizer, lr_factor
from mmkt_ray.training.trainer import train
from tests.labels import coded, codes_of, labels_of
from tests.training.test_trainer import write_store

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
CPU = torch.device("cpu")
ALL = {"training.auto": ["training.lr", "training.steps", "model.dropout", "training.batch_size_per_worker"]}


@pytest.fixture(scope="module")
def make_auto(make_config):
    """A config that leaves the learning rate, dropout, steps and batch size open."""
    return lambda **overrides: make_config(**{**ALL, **overrides})


# --- the config -----------------------------------------------------------------------------------------------------


def test_what_is_given_is_not_chosen():
    """Catches a learning rate of the user's that is overruled, also where a variant, --set or epochs gives it."""
    path = CONFIGS / "openmoji.yaml"
    config = load_config(path, {"training": "auto"})
    assert len(config.training.auto) == 8
    assert "training.lr" not in config.with_overrides({"training.lr": 0.1}).training.auto
    assert "model.dropout" not in load_config(path, {"model.dropout": 0.1}).training.auto
    assert "training.steps" not in load_config(path, {"training.epochs": 3}).training.auto
    assert load_config(path, {"training.auto": False}).training.auto == ()
    again = load_config(path, {"training.lr": 0.1})
    assert type(again).model_validate(again.model_dump(mode="json")) == again
    with pytest.raises(ConfigError, match=r"training\.lr"):
        load_config(path, {"training.auto": ["training.lrr"]})


def test_a_single_modality_hides_none_and_small_data_has_enough_steps(make_auto):
    """467 rows were 60 steps."""
    config = make_auto(**{"training.auto": ["training.steps", "model.modality_dropout"], "model.modalities": ["text"]})
    assert settings_of(config, {}, 467) == {"training.steps": auto.MIN_STEPS, "model.modality_dropout": 0.0}
    assert settings_of(config, {"training.steps": 3.0}, 467)["training.steps"] == 3 * auto.MIN_STEPS


def test_models_of_the_same_inputs_have_one_choice(make_auto):
    """Catches a choice made again for each way of sharing, one of another fusion's that does not learn like it, and a
    deep fusion that ends before it has learnt."""
    every = {"training.auto": ["training.steps", "model.dropout"]}
    asked = screening_config(make_auto(**every))
    deep = make_auto(**every, **{"model.fusion": {"name": "hierarchical", "depth": 2}})
    assert screening_config(make_auto(**every, **{"model.sharing": "separate"})) == asked
    assert screening_config(deep) == asked
    assert screening_config(make_auto(**every, **{"model.fusion": "attention"})) != asked
    settings = {"training.steps": 150, "model.dropout": 0.35}
    assert for_depth(make_auto(**every), settings) == settings
    assert for_depth(deep, settings) == {"training.steps": 300, "model.dropout": 0.2}
    assert for_depth(deep, {}) == {}  # what the user gave stays


# --- held-out rows --------------------------------------------------------------------------------------------------


def test_folds_follow_the_ids(table):
    """Catches folds that change with the order of the rows, test rows in a fold,
    and a large val split that is not used."""
    folds = make_folds(table, seed=0)
    assert (folds.on, folds.num_held) == ("cv", 5)
    assert ((folds.fold >= 0) == np.isin(table.split, ["train", "val"])).all()
    order = np.random.default_rng(0).permutation(len(table.split))
    np.testing.assert_array_equal(make_folds(table.take(order), seed=0).fold, folds.fold[order])
    assert (make_folds(table, seed=1).fold != folds.fold).any()
    many = 3000
    split = np.array(["val"] * many + ["train"] * many, dtype=object)
    ids = np.array([f"s{i}" for i in range(2 * many)], dtype=object)
    large = FeatureTable(ids, split, {}, {}, {}, {})
    assert (make_folds(large, 0).on, make_folds(large, 0).num_held) == ("val", 1)
    assert make_folds(dataclasses.replace(large, split=np.full(2 * many, "train", object)), 0).num_held == 3


def test_heldout_files_come_back(tmp_path):
    """Catches tasks and modalities whose names the file mixes up."""
    found = HeldOut("val", np.arange(3), {"image+text": {"rows": np.ones((3, 2), np.float32), "a/b": np.zeros((3, 1))}})
    save_heldout(str(tmp_path), found)
    again = load_heldout(str(tmp_path))
    assert again is not None
    assert (again.on, again.rows.tolist(), again.logits.keys()) == ("val", [0, 1, 2], found.logits.keys())
    np.testing.assert_array_equal(again.logits["image+text"]["rows"], found.logits["image+text"]["rows"])
    assert load_heldout(str(tmp_path / "none")) is None


def test_a_held_out_row_teaches_its_own_prediction_nothing(make_auto, table):
    """Catches a label that leaks into the fold that holds it out: with noise for labels there, nothing may change."""
    config = with_settings(make_auto(), {"training.steps": 12})
    first = hold_out(config, table)
    assert first is not None
    part = make_folds(table, config.seed).held(0)
    codes = {t: codes_of(y) for t, y in table.labels.items()}
    labels = coded({t: np.where(part & (y >= 0), np.roll(y, 7).clip(min=0) % 2, y) for t, y in codes.items()})
    assert not any(labels[t].same_as(y) for t, y in table.labels.items())
    other = hold_out(config, dataclasses.replace(table, labels=labels))
    assert other is not None
    for given, by_task in first.logits.items():
        for t, logits in by_task.items():
            own = part[first.rows]
            np.testing.assert_allclose(other.logits[given][t][own], logits[own], atol=1e-4)
            assert np.abs(other.logits[given][t][~own] - logits[~own]).max() > 1e-3


# --- the stack ------------------------------------------------------------------------------------------------------


def test_a_member_is_what_it_would_be_alone(make_auto, table):
    """Against a plain loop with torch's own AdamW. Catches members that see their part, each other's masks, rates or
    number of epochs, and sparse features that a stack reads otherwise."""
    settings = [
        {"training.lr": 0.01, "training.steps": 6, "model.dropout": 0.3},
        {"training.lr": 0.003, "training.steps": 17, "model.dropout": 0.0},
    ]
    config = with_settings(make_auto(), {"training.batch_size_per_worker": 64})
    folds, whole = make_folds(table, 0), as_train(table)
    stack = FoldStack(config, whole, folds, settings, [1, 3], CPU)
    stack.train_all()
    for member, part in enumerate([1, 3]):
        expected = alone(with_settings(config, settings[member]), whole, folds.fold, part)
        found = stack.predict(member, np.arange(len(table.split)), ["image", "text"])
        model = predict_table(expected, whole)
        for t, logits in found.items():
            proba = torch.from_numpy(logits).softmax(dim=1).numpy()
            np.testing.assert_allclose(proba, model[t], atol=5e-3)


def alone(config, table, fold, part):
    """A model trained by hand on all rows but a part."""
    run = Fitting(config, table, Worker())
    optimizer, criterion = (
        build_optimizer(run.model, config.training.lr, config.training.weight_decay),
        run.learner.criterion,
    )
    num_steps = run.batches.num_steps
    num_epochs = math.ceil(config.training.steps / num_steps)
    for epoch in range(1, num_epochs + 1):
        torch.manual_seed(seed_of(config.training_seed, epoch, 0))
        for step, rows in enumerate(run.batches.order(epoch)[:, 0], start=(epoch - 1) * num_steps):
            batch = run.batches.read(rows)
            seen = torch.from_numpy(fold[rows] != part).float()
            totals = {t: (y.known * seen).sum() for t, y in batch.labels.items()}
            logits = run.model.train()(batch.features, batch.present)
            losses = criterion.losses(logits, batch.labels, totals, seen)
            for group in optimizer.param_groups:
                group["lr"] = config.training.lr * lr_factor(step, num_epochs * num_steps)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    return run.model.eval()


# --- the choice -----------------------------------------------------------------------------------------------------


def test_the_first_candidate_stays_unless_another_is_clearly_better():
    """Catches a choice by chance, and a candidate that diverged."""
    rng = np.random.default_rng(0)
    first = rng.random(400)
    level, better, best = first + rng.normal(0, 0.5, 400), first - 0.1, first - 0.2 + rng.normal(0, 0.05, 400)
    assert choose_candidate(np.stack([first, level - level.mean() + first.mean() - 0.01])) == 0
    assert choose_candidate(np.stack([first, better, best])) == 2
    assert choose_candidate(np.stack([first, np.full(400, np.nan)])) == 0
    assert choose_candidate(np.stack([np.full(400, np.nan), level, best])) == 2


def test_a_candidate_that_learns_nothing_is_not_chosen(make_auto, table, monkeypatch):
    """Catches candidates that are judged by another's predictions."""
    monkeypatch.setattr(auto, "CANDIDATES", ({"training.lr": 1e-7}, {"training.lr": 0.02}, {"training.lr": 1e-6}))
    config = make_auto(**{"training.auto": ["training.lr"], "training.steps": 30})
    choice, heldout = choose_settings(config, table)
    assert choice.settings == {"training.lr": 0.02}
    assert [record.chosen for record in choice.candidates] == [False, True, False]
    assert (choice.on, choice.num_rows > 100) == ("cv", True)
    every = hold_out(with_settings(config, choice.settings), table)
    known = np.isin(every.rows, heldout.rows)
    assert known.sum() == len(heldout.rows)
    for given, by_task in heldout.logits.items():
        for t, logits in by_task.items():
            np.testing.assert_allclose(logits, every.logits[given][t][known], atol=1e-3)


def test_held_out_rows_may_lack_a_class():
    """A class of few rows that no held-out row has ended the run."""
    assert Multiclass().log_frequencies(labels_of(np.array([0, 1, 1])), 4).shape == (4,)
    assert np.exp(Multiclass().log_frequencies(labels_of(np.array([0, 1, 1])), 4)).sum() == pytest.approx(1)


def test_the_choice_is_fitted_on_train_and_val_and_told_in_the_card(make_auto, table, tmp_path, monkeypatch):
    """Catches val rows that are left out of the last fit, a choice made again for each seed or resume,
    and a card without it."""
    uri, store = str(tmp_path / "model"), write_store(str(tmp_path / "store"), table)
    config = make_auto(**{"training.steps": 20, "evaluation.calibrate": False, "model.wide": False})
    asked = []
    real = chosen_settings.choose_settings
    monkeypatch.setattr(chosen_settings, "choose_settings", lambda *args: asked.append(1) or real(*args))
    summary = train(config, store, uri)
    train(config.with_overrides({"training.seed": 5}), store, str(tmp_path / "other"))
    assert len(asked) == 1
    assert summary.auto.settings.keys() == {"training.lr", "model.dropout", "training.batch_size_per_worker"}
    assert read_card(uri).fit.auto == summary.auto
    assert summary.val.on == "cv"
    held = load_heldout(uri)
    assert held is not None
    assert set(held.logits) == {"image", "text", "image+text"}
    every = open_store(store).table()
    expected = fit(with_settings(config, summary.auto.settings), as_train(every)).model
    for t, proba in predict_table(load_model(uri)[0], every).items():
        np.testing.assert_allclose(proba, predict_table(expected, every)[t], atol=1e-3)
    assert [epoch.epoch for epoch in summary.history] == list(range(1, summary.best_epoch + 1))
    assert train(config, store, uri).status == "up to date"


def test_what_is_known_of_held_out_parts_is_not_trained_again(make_auto, table, monkeypatch):
    """Catches members of the choice that are thrown away, taken for a model of another seed,
    or put into the wrong rows."""
    config = make_auto(**{"training.steps": 20})
    choice, known = choose_settings(config, table)
    assert auto.is_screened(config)
    assert auto.is_screened(config.with_overrides({"model.experts": True}))
    assert not auto.is_screened(config.with_overrides({"training.seed": 5}))
    assert not auto.is_screened(config.with_overrides({"model.fusion": "gated"}))
    settled = with_settings(config, choice.settings)
    stacks, real = [], FoldStack.train_all
    monkeypatch.setattr(FoldStack, "train_all", lambda self: stacks.append(self.parts.tolist()) or real(self))
    result, found = fit_and_hold_out(settled, table, CPU, known)
    assert stacks == [[2, 3, 4, WHOLE]]
    expected = hold_out(settled, table)
    assert found.rows.tolist() == expected.rows.tolist()
    for given, by_task in expected.logits.items():
        for t, logits in by_task.items():
            np.testing.assert_allclose(found.logits[given][t], logits, atol=1e-3)
    alone = fit(settled, as_train(table)).model
    assert result.model.num_parameters_by_part() == alone.num_parameters_by_part()

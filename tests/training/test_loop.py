"""Fitting: it learns, says the same again, goes on after a kill, and several workers count like one."""

import dataclasses
import multiprocessing
import queue

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import accuracy_score, f1_score

from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.evaluation.inference import predict_table
from mmkt_ray.features.store import MISSING, UNSEEN
from mmkt_ray.training.batches import World
from mmkt_ray.training.checkpoint import FileCheckpoint
from mmkt_ray.training.loop import build_optimizer, fit, rate
from mmkt_ray.training.validation import validate


def weights(result):
    return {name: value.numpy() for name, value in result.model.state_dict().items()}


def without_seconds(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def readable_val_rows(table):
    return np.flatnonzero((table.split == "val") & (table.present["image"] | table.present["text"]))


def assert_equal_runs(a, b):
    assert without_seconds(a.history) == without_seconds(b.history)
    assert a.best_epoch == b.best_epoch
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    assert all(np.array_equal(x[k], y[k]) for k in x)


class Killed(Exception):
    pass


def stop_after(epoch):
    def report(record):
        if record["epoch"] == epoch:
            raise Killed

    return report


@pytest.mark.parametrize(
    "model",
    [{"model.num_levels": 0}, {"model.sharing": "task_modality", "model.fusion": {"name": "hierarchical", "depth": 2}}],
)
def test_it_learns_what_the_features_tell(make_config, table, model):
    """A loss that does not reach the parameters; labels shuffled against features."""
    result = fit(make_config(**model, **{"training.epochs": 12, "training.lr": 0.02}), table)
    assert result.val["accuracy"]["topic"] > 0.75
    assert result.history[-1]["train_loss"] < 0.6 * result.history[0]["train_loss"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make_config, table):
    """Order, initialisation or dropout from a generator that nobody seeded, or the caller's random state changed."""
    before = torch.get_rng_state()
    one = fit(make_config(), table)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert_equal_runs(one, fit(make_config(), table))
    assert fit(make_config(seed=1), table).history[0]["train_loss"] != one.history[0]["train_loss"]


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(make_config, table, tmp_path, epoch):
    """Optimiser state, best weights, schedule or dropout lost in the checkpoint."""
    config = make_config(**{"training.lr": 0.05, "model.dropout": 0.3})
    whole = fit(config, table)
    checkpoint = FileCheckpoint(str(tmp_path / "checkpoint.safetensors"))
    with pytest.raises(Killed):
        fit(config, table, checkpoint=checkpoint, report=stop_after(epoch))
    epochs = []
    resumed = fit(config, table, checkpoint=checkpoint, report=lambda record: epochs.append(record["epoch"]))
    assert epochs == list(range(epoch + 1, config.training.epochs + 1))
    assert_equal_runs(resumed, whole)


def test_validation_scores_are_scikit_learns(make_config, table):
    """Macro-F1 over other classes than scikit-learn's, an UNSEEN label counted as right or left out, absent labels counted."""
    result = fit(make_config(), table)
    val = table.take(table.rows("val"))
    readable = val.present["image"] | val.present["text"]
    scores = validate(result.model, table, readable_val_rows(table), World(), batch_size=7)
    assert (val.labels["mood"] == UNSEEN).any()
    for t, proba in predict_table(result.model, val).items():
        kept = readable & (val.labels[t] != MISSING)
        truth, pred = val.labels[t][kept], proba[kept].argmax(1)
        assert scores["accuracy"][t] == pytest.approx(accuracy_score(truth, pred))
        assert scores["macro_f1"][t] == pytest.approx(f1_score(truth, pred, average="macro", zero_division=0))
    assert scores["score"] == pytest.approx(np.mean(list(scores["macro_f1"].values())))
    assert scores["macro_f1"] == result.val["macro_f1"]


def test_the_best_epoch_is_kept_and_patience_stops(make_config, table):
    """The last weights returned for the best ones; patience counted from the start."""
    result = fit(make_config(**{"training.epochs": 40, "training.patience": 3, "training.lr": 0.05}), table)
    scores = [record["val"]["score"] for record in result.history]
    assert result.best_epoch == int(np.argmax(scores)) + 1
    assert len(scores) == min(40, result.best_epoch + 3)
    assert len(scores) < 40
    assert validate(result.model, table, readable_val_rows(table), World())["score"] == max(scores)


def test_without_validation_rows_the_last_epoch_is_kept(make_config, table):
    """A crash, or a model of the first epoch, where no val split is given."""
    kept = table.take(np.flatnonzero(table.split != "val"))
    result = fit(make_config(**{"training.patience": 1}), kept)
    assert (result.best_epoch, result.val) == (4, None)


def test_the_model_reads_only_what_the_config_names(make_config, table):
    """A unimodal baseline that sees the other modality after all."""
    config = make_config(**{"model.modalities": ["image"], "model.tasks": ["topic"]})
    result = fit(config, table)
    assert (list(result.model.spec.modalities), list(result.model.spec.tasks)) == (["image"], ["topic"])
    other = dataclasses.replace(table, features={**table.features, "text": table.features["text"] * 5})
    assert_equal_runs(result, fit(config, other))


def test_a_task_of_one_class_is_refused(make_config, table):
    """An hour of training towards an accuracy of 1."""
    labels = {**table.labels, "mood": np.where(table.labels["mood"] >= 0, 0, MISSING)}
    with pytest.raises(DataError, match="'mood'"):
        fit(make_config(), dataclasses.replace(table, labels=labels))


def test_a_loss_that_is_no_number_stops_the_run(make_config, table):
    """Thirty epochs of NaN and a model folder at the end."""
    features = {**table.features, "image": np.full_like(table.features["image"], np.nan)}
    with pytest.raises(ConfigError, match=r"epoch 1: .*training\.lr"):
        fit(make_config(), dataclasses.replace(table, features=features))


def test_biases_and_norms_are_not_decayed(make_config, table):
    """Weight decay that pulls the scale of a norm to zero."""
    model = fit(make_config(**{"training.epochs": 1, "model.fusion": "decision"}), table).model
    decayed, free = build_optimizer(model, 1e-3, 0.1).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" not in names[id(p)] and not names[id(p)].endswith("bias") for p in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_the_learning_rate_warms_up_and_comes_down():
    """A first step of rate zero or a schedule longer than the run."""
    rates = [rate(step, 100) for step in range(100)]
    assert np.argmax(rates) == 4
    assert rates[4] == 1
    assert rates[0] == 0.2
    assert rates[-1] < 0.001
    assert sorted(rates[5:], reverse=True) == rates[5:]


def fit_as_rank(rank, port, config, table, queue):
    """One of two workers; they meet at the port."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        world = World(rank, 2)
        result = fit(config, table, world=world)
        assert_equal_runs(result, fit(config, table, world=world))
        scores = validate(result.model, table, np.flatnonzero(table.split == "val"), world)
        queue.put((weights(result), without_seconds(result.history), scores))
    finally:
        dist.destroy_process_group()


def test_two_workers_count_and_learn_like_one(make_config, table, free_port):
    """Rank 0's share reported as the whole; ranks that drift apart; a gradient that depends on how a step is split."""
    options = {"model.dropout": 0.0, "training.epochs": 2, "training.class_weights": "balanced"}
    context = multiprocessing.get_context("spawn")
    config = make_config(**options, **{"training.batch_size_per_worker": 32})
    theirs, mine = context.Queue(), queue.Queue()
    worker = context.Process(target=fit_as_rank, args=(1, free_port, config, table, theirs))
    worker.start()
    fit_as_rank(0, free_port, config, table, mine)  # this process is the other worker
    (first, history, scores), (second, other_history, other_scores) = mine.get(), theirs.get(timeout=60)
    worker.join(timeout=60)
    assert all(np.array_equal(first[k], second[k]) for k in first)
    assert (history, scores) == (other_history, other_scores)

    one = fit(make_config(**options, **{"training.batch_size_per_worker": 64}), table)
    for name, value in weights(one).items():
        np.testing.assert_allclose(first[name], value, atol=2e-4)
    one.model.load_state_dict({k: torch.from_numpy(v) for k, v in first.items()})
    alone = validate(one.model, table, np.flatnonzero(table.split == "val"), World())
    assert (alone["accuracy"], alone["macro_f1"]) == (scores["accuracy"], scores["macro_f1"])
    assert alone["loss"] == pytest.approx(scores["loss"])

"""Fitting: it learns, says the same again, goes on after a kill, and several workers count like one."""

import dataclasses
import math
import multiprocessing
import queue

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import accuracy_score, f1_score

from mmkt_ray import storage
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.training.batches import Worker, narrow
from mmkt_ray.training.checkpoint import FileCheckpoint
from mmkt_ray.training.loop import Fitting, fit
from mmkt_ray.training.methods.transfer import Knowledge, SourceModel
from mmkt_ray.training.optimizer import build_optimizer, lr_factor
from mmkt_ray.training.validation import validate
from tests.labels import MISSING, UNSEEN, codes_of, labels_of


def weights(result):
    return {name: value.numpy() for name, value in result.model.state_dict().items()}


def without_seconds(epochs):
    return [epoch.replaced(seconds=0.0) for epoch in epochs]


def readable_val_rows(table):
    return np.flatnonzero((table.split == "val") & (table.present["image"] | table.present["text"]))


def assert_equal_runs(a, b):
    assert without_seconds(a.epochs) == without_seconds(b.epochs)
    assert a.best_epoch == b.best_epoch
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    assert all(np.array_equal(x[k], y[k]) for k in x)


class Killed(Exception):
    pass


def stop_after(epoch):
    def report(record, num_epochs):
        if record.epoch == epoch:
            raise Killed

    return report


@pytest.mark.parametrize(
    "model",
    [{"model.num_levels": 0}, {"model.sharing": "task_modality", "model.fusion": {"name": "hierarchical", "depth": 2}}],
)
def test_it_learns_what_the_features_tell(make_config, table, model):
    """A loss that does not reach the parameters; labels shuffled against features."""
    result = fit(make_config(**model, **{"training.epochs": 12, "training.lr": 0.02}), table)
    assert result.val.metrics["accuracy"]["topic"] > 0.75
    assert result.epochs[-1].train_loss < 0.6 * result.epochs[0].train_loss


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make_config, table):
    """Order, initialisation or dropout from a generator that nobody seeded, or the caller's random state changed."""
    before = torch.get_rng_state()
    one = fit(make_config(), table)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert_equal_runs(one, fit(make_config(), table))
    assert fit(make_config(seed=1), table).epochs[0].train_loss != one.epochs[0].train_loss


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(make_config, table, tmp_path, epoch):
    """Optimiser state, best weights, schedule or dropout lost in the checkpoint."""
    config = make_config(**{"training.lr": 0.05, "model.dropout": 0.3})
    whole = fit(config, table)
    checkpoint = FileCheckpoint(str(tmp_path / "checkpoint.safetensors"))
    with pytest.raises(Killed):
        fit(config, table, checkpoint=checkpoint, report=stop_after(epoch))
    epochs = []
    resumed = fit(config, table, checkpoint=checkpoint, report=lambda record, _: epochs.append(record.epoch))
    assert epochs == list(range(epoch + 1, config.training.epochs + 1))
    assert_equal_runs(resumed, whole)


def test_validation_scores_are_scikit_learns(make_config, table):
    """Macro-F1 over other classes than scikit-learn's, an UNSEEN label counted as right or left out,
    absent labels counted."""
    result = fit(make_config(), table)
    val = table.take(table.rows("val"))
    readable = val.present["image"] | val.present["text"]
    scores = validate(result.model, table, readable_val_rows(table), Worker(), batch_size=7)
    assert (codes_of(val.labels["mood"]) == UNSEEN).any()
    for t, proba in predict_table(result.model, val).items():
        kept = readable & val.labels[t].labelled
        truth, pred = codes_of(val.labels[t])[kept], proba[kept].argmax(1)
        assert scores.metrics["accuracy"][t] == pytest.approx(accuracy_score(truth, pred))
        assert scores.metrics["macro_f1"][t] == pytest.approx(f1_score(truth, pred, average="macro", zero_division=0))
    assert scores.score == pytest.approx(np.mean(list(scores.metrics["macro_f1"].values())))
    assert scores.metrics["macro_f1"] == result.val.metrics["macro_f1"]


def test_the_best_epoch_is_kept_and_patience_stops(make_config, table):
    """The last weights returned for the best ones; patience counted from the start."""
    result = fit(make_config(**{"training.epochs": 40, "training.patience": 3, "training.lr": 0.05}), table)
    scores = [epoch.val.score for epoch in result.epochs]
    assert len(scores) == min(40, result.best_epoch + 3)
    assert len(scores) < 40
    kept = scores[result.best_epoch - 1]
    assert kept > max(scores) - 0.5 * np.sqrt(0.25 / len(readable_val_rows(table)))
    assert validate(result.model, table, readable_val_rows(table), Worker()).score == pytest.approx(kept)


def test_of_level_epochs_the_one_with_the_lower_loss_is_kept(make_config, table):
    """Epoch 2 was kept with 100 % accuracy and a calibration error of 16 %, as no later one could be better."""
    easy = dataclasses.replace(table, features={**table.features, "image": 5 * table.features["image"]})
    easy = narrow(easy.take(np.flatnonzero(easy.present["image"])), ["image"], ["topic"])
    config = make_config(**{"model.modalities": ["image"], "model.tasks": ["topic"], "training.epochs": 12})
    result = fit(config, easy)
    level = [e for e in result.epochs if e.val.score == max(e.val.score for e in result.epochs)]
    assert len(level) > 3
    assert result.epochs[result.best_epoch - 1].val.loss == min(e.val.loss for e in level)


def test_without_validation_rows_the_last_epoch_is_kept(make_config, table):
    """A crash, or a model of the first epoch, where no val split is given."""
    kept = table.take(np.flatnonzero(table.split != "val"))
    result = fit(make_config(), kept)
    assert (result.best_epoch, result.val) == (4, None)


def test_patience_without_validation_rows_is_refused(make_config, table):
    """Patience that waits for nothing and is never told so: all epochs are trained, the last one is kept."""
    kept = table.take(np.flatnonzero(table.split != "val"))
    with pytest.raises(ConfigError, match=r"training\.patience: 1 waits for .* on val.*val_frac above 0"):
        fit(make_config(**{"training.patience": 1}), kept)


def test_the_model_reads_only_what_the_config_names(make_config, table):
    """A unimodal baseline that sees the other modality after all."""
    config = make_config(**{"model.modalities": ["image"], "model.tasks": ["topic"]})
    result = fit(config, table)
    assert (list(result.model.spec.modalities), list(result.model.spec.tasks)) == (["image"], ["topic"])
    other = dataclasses.replace(table, features={**table.features, "text": table.features["text"] * 5})
    assert_equal_runs(result, fit(config, other))


def test_a_task_of_one_class_is_refused(make_config, table):
    """An hour of training towards an accuracy of 1."""
    mood = table.labels["mood"]
    labels = {**table.labels, "mood": labels_of(np.where(mood.known, 0, MISSING))}
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
    rates = [lr_factor(step, 100) for step in range(100)]
    assert np.argmax(rates) == 4
    assert rates[4] == 1
    assert rates[0] == 0.2
    assert rates[-1] < 0.001
    assert sorted(rates[5:], reverse=True) == rates[5:]


WORLD_OPTIONS = [
    {"training.class_weights": "balanced"},
    {"training.balance": "ogm_ge", "training.resample": "balanced"},
    {"training.balance": "gradient_blending", "training.task_weighting": "uncertainty"},
    {"training.balance": "mmpareto", "training.task_weighting": "gradnorm", "training.generate": "mixup"},
]


def fit_as_rank(rank, port, configs, table, queue):
    """One of two workers; they meet at the port."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        worker, rows = Worker(rank, 2), np.flatnonzero(table.split == "val")
        for config in configs:
            result = fit(config, table, worker=worker)
            assert_equal_runs(result, fit(config, table, worker=worker))
            scores = validate(result.model, table, rows, worker)
            queue.put((weights(result), without_seconds(result.epochs), scores))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_count_and_learn_like_one(make_config, table, free_port):
    """Rank 0's share reported as the whole; ranks that drift apart; a gradient that depends on how a step is split.

    Also under balance and task weighting: scores, gradients or norms of one rank's rows, noise that differs by rank.
    """
    context = multiprocessing.get_context("spawn")
    common = {"model.dropout": 0.0, "training.epochs": 2}
    configs = [make_config(**common, **o, **{"training.batch_size_per_worker": 32}) for o in WORLD_OPTIONS]
    theirs, mine = context.Queue(), queue.Queue()
    worker = context.Process(target=fit_as_rank, args=(1, free_port, configs, table, theirs))
    worker.start()
    fit_as_rank(0, free_port, configs, table, mine)  # this process is the other worker
    for config in configs:
        (first, history, scores), (second, other_history, other_scores) = mine.get(), theirs.get(timeout=60)
        assert all(np.array_equal(first[k], second[k]) for k in first)
        assert (history, scores) == (other_history, other_scores)

        one = fit(config.with_overrides({"training.batch_size_per_worker": 64}), table)
        for name, value in weights(one).items():
            np.testing.assert_allclose(first[name], value, atol=5e-4, err_msg=f"{config.training.balance} {name}")
        one.model.load_state_dict({k: torch.from_numpy(v) for k, v in first.items()})
        alone = validate(one.model, table, np.flatnonzero(table.split == "val"), Worker())
        assert (alone.metrics["accuracy"], alone.metrics["macro_f1"]) == (
            scores.metrics["accuracy"],
            scores.metrics["macro_f1"],
        )
        assert alone.loss == pytest.approx(scores.loss)
    worker.join(timeout=60)


# --- which rows and labels, kinds of task ---------------------------------------------------------------------------


@pytest.fixture
def tagged(table):
    """The table with `mood` as a multilabel task: three tags, told by the text."""
    tags = (table.features["text"][:, :3].toarray() > 0).astype(np.int8)
    tags[::7] = MISSING
    return dataclasses.replace(
        table,
        labels={**table.labels, "mood": labels_of(tags)},
        class_names={**table.class_names, "mood": ["a", "b", "c"]},
    )


def test_a_multilabel_task_is_learned_and_scored_as_scikit_learn_does(make_config, tagged):
    """Catches softmax over the classes of a multilabel task, unlabelled rows scored,
    accuracy of decisions for that of rows."""
    options = {"tasks.mood.kind": "multilabel", "training.epochs": 25, "training.lr": 0.03}
    result = fit(make_config(**options), tagged)
    val = tagged.take(tagged.rows("val"))
    kept = (val.present["image"] | val.present["text"]) & val.labels["mood"].labelled
    truth, proba = val.labels["mood"].values[kept], predict_table(result.model, val)["mood"][kept]
    pred = proba >= 0.5
    assert result.val.metrics["accuracy"]["mood"] == pytest.approx(accuracy_score(truth, pred))
    assert result.val.metrics["macro_f1"]["mood"] == pytest.approx(
        f1_score(truth, pred, average="macro", zero_division=0)
    )
    assert result.val.metrics["macro_f1"]["mood"] > 0.55
    text = val.present["text"][kept]
    assert (truth[text] == pred[text]).mean() > 0.85


def test_a_binary_task_is_two_classes(make_config, table):
    """Catches a binary task that is trained otherwise than one of two classes."""
    mood = labels_of(codes_of(table.labels["mood"]), "binary")
    binary = dataclasses.replace(table, labels={**table.labels, "mood": mood})
    result = fit(make_config(**{"tasks.mood.kind": "binary"}), binary)
    assert_equal_runs(result, fit(make_config(), table))


def test_missing_drop_trains_on_complete_rows_and_validates_on_all(make_config, table):
    """Catches incomplete rows in training, or a val score that is better because the hard rows are gone."""
    config = make_config(**{"model.missing": "drop"})
    complete = table.present["image"] & table.present["text"]
    kept = table.take(np.flatnonzero((table.split != "train") | complete))
    run = Fitting(config, table, Worker())
    assert complete[run.train_rows].all()
    assert len(run.val_rows) == len(Fitting(make_config(), kept, Worker()).val_rows)
    assert not complete[run.val_rows].all()


def test_fewer_labels_are_fewer_rows_and_not_fewer_val_rows(make_config, table):
    """Catches labels taken from the val split, and rows without any label left that still count in an epoch."""
    run, whole = (Fitting(make_config(**{"training.label_frac": f}), table, Worker()) for f in (0.1, 1.0))
    assert len(run.train_rows) < 0.25 * len(whole.train_rows)
    assert np.array_equal(run.val_rows, whole.val_rows)
    for t in table.labels:
        assert run.table.labels[t][run.val_rows].same_as(table.labels[t][run.val_rows])
        before, after = (
            table.kinds[t].count(r.table.labels[t][r.train_rows], table.width(t)) for r in (whole, run)
        )
        assert np.abs(after - 0.1 * before).max() <= 0.5


def test_excluded_rows_change_nothing_any_more(make_config, table, tmp_path):
    """Catches excluded rows that still shape the statistics or the batches."""
    uri, rows = str(tmp_path / "out.parquet"), np.flatnonzero(table.split == "train")[:30]
    storage.write_table(uri, pa.table({"sample_id": table.sample_id[rows]}))
    config = make_config(**{"training.exclude": uri})
    image = table.features["image"].copy()
    image[rows] = 1e3
    spoilt = dataclasses.replace(table, features={**table.features, "image": image})
    assert_equal_runs(fit(config, table), fit(config, spoilt))


@pytest.mark.parametrize("method", ["smote", "mixup"])
def test_synthetic_rows_are_trained_on_and_do_not_shift_the_statistics(make_config, table, method):
    """Catches rows made up and never read, a rare class that stays rare, statistics of made up rows."""
    topic = codes_of(table.labels["topic"])
    labels = {**table.labels, "topic": labels_of(np.where((topic == 2) & (np.arange(420) % 2 > 0), 0, topic))}
    rare = dataclasses.replace(table, labels=labels)
    run, plain = (Fitting(make_config(**{"training.generate": m}), rare, Worker()) for m in (method, None))
    counts = table.kinds["topic"].count(run.table.labels["topic"][run.train_rows], 3)
    assert np.ptp(counts) <= 4, "rounded in each presence pattern"
    assert set(run.batches.order(1).ravel()) == set(run.train_rows)
    assert all(torch.equal(run.stds[m], plain.stds[m]) for m in run.stds)
    assert math.isfinite(run.run_epoch().train_loss)


def test_the_imbalance_methods_help_the_rare_class(make_config, table):
    """Catches an option that is accepted and not used: the recall of a rare class must rise with each of them."""
    noisy = table.features["image"] + 2.0 * np.random.default_rng(0).normal(size=table.features["image"].shape)
    topic = codes_of(table.labels["topic"])
    topic[(topic == 2) & (table.split == "train") & (np.arange(420) % 6 > 0)] = MISSING
    rare = dataclasses.replace(
        table,
        features={**table.features, "image": noisy.astype(np.float32)},
        labels={**table.labels, "topic": labels_of(topic)},
    )
    kept = np.flatnonzero((rare.split != "train") & (topic == 2) & rare.present["image"])

    def recall(**options):
        config = make_config(**{"model.tasks": ["topic"], "training.epochs": 10, **options})
        return (predict_table(fit(config, rare).model, rare)["topic"][kept].argmax(axis=1) == 2).mean()

    plain = recall()
    for option, value in {
        "class_weights": "balanced",
        "resample": "balanced",
        "generate": "smote",
        "logit_adjustment": 1.0,
    }.items():
        assert recall(**{f"training.{option}": value}) > plain, option


def test_two_answers_to_imbalance_at_once_are_refused(make_config):
    """Catches rare classes that count twice."""
    with pytest.raises(ConfigError, match="class_weights and resample"):
        make_config(**{"training.class_weights": "balanced", "training.resample": "balanced"})


# --- knowledge of other models --------------------------------------------------------------------------------------


def test_frozen_towers_stay_and_gradual_ones_are_freed_from_the_top(make_config, table):
    """Catches towers that weight decay or momentum moves though they are frozen, and stages freed from the bottom."""
    classes = dict(table.class_names)
    source = SourceModel(
        fit(make_config(**{"model.modalities": ["image"], "model.num_levels": 2}), table).model, classes
    )
    start = source.model.state_dict()

    def moved(tuning, epochs):
        options = {"training.transfer.tuning": tuning, "training.transfer.init": {"image": "x"}, "model.num_levels": 2}
        run = Fitting(make_config(**options), table, Worker(), Knowledge(init={"image": source}))
        for _ in range(epochs):
            run.run_epoch()
        now, name_of = run.model.state_dict(), {p: name for name, p in run.model.named_parameters()}
        stages = [[name_of[p] for p in stage if name_of[p] in start] for stage in run.taken_over]
        return [any(not torch.equal(now[n], start[n]) for n in names) for names in stages]

    assert moved("finetune", 1) == [False, True, True], "the input stage has statistics only"
    assert moved("frozen", 2) == [False, False, False]
    assert moved("gradual", 1) == [False, False, False]
    assert moved("gradual", 2) == [False, False, True]
    assert moved("gradual", 4) == [False, True, True]


def test_a_student_learns_what_only_its_teacher_was_told(make_config, table):
    """Catches targets of other rows, and teachers that are loaded and not listened to."""
    teacher = SourceModel(fit(make_config(**{"training.epochs": 12}), table).model, dict(table.class_names))
    true = codes_of(table.labels["topic"])
    topic = np.where(table.split == "train", np.where(true >= 0, (true + 1) % 3, MISSING), true)
    lied_to = dataclasses.replace(table, labels={**table.labels, "topic": labels_of(topic)})
    options = {"model.modalities": ["image"], "model.tasks": ["topic"], "training.epochs": 12}
    alone = fit(make_config(**options), lied_to)
    options |= {"training.transfer.teachers": ["x"], "training.transfer.distill_weight": 1.0}
    taught = fit(make_config(**options), lied_to, knowledge=Knowledge(teachers=(teacher,)))
    assert taught.val.metrics["accuracy"]["topic"] > 0.75 > alone.val.metrics["accuracy"]["topic"] + 0.1

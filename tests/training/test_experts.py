"""`model.experts`: rows are answered by a model of fewer modalities where it is clearly better on held-out rows."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ttest_rel

from mmkt_ray import cluster, storage
from mmkt_ray.errors import DataError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.features.store import open_store
from mmkt_ray.inference.model_card import read_card, write_card
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_logits, predict_table
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.kinds.multilabel import Multilabel
from mmkt_ray.models import ExpertModel, InputSpec, MultimodalModel, fused_part, model_of_spec
from mmkt_ray.scoring.calibration import fit_temperature
from mmkt_ray.studies.contribution import shapley_values
from mmkt_ray.training import composite, trainer
from mmkt_ray.training import experts as experts_module
from mmkt_ray.training.experts import (
    ALPHA,
    choose_routes,
    clearly_better,
    expert_configs,
    expert_sets,
    join_experts,
    levels,
    with_heldout,
)
from mmkt_ray.training.fingerprint import model_identity, training_fingerprint
from mmkt_ray.training.loop import fit
from mmkt_ray.training.trainer import train
from tests.labels import MISSING, coded, codes_of, labels_of
from tests.models.examples import make_spec
from tests.training.test_trainer import write_store

DIMS = {"audio": 3, "image": 4, "text": 5}


@pytest.fixture(scope="module")
def make_config(make_config):
    """That of all tests of training, with experts."""
    return lambda **overrides: make_config(**{"model.experts": True, **overrides})


@pytest.fixture(scope="module")
def trio():
    """A fused model of three modalities, its experts (that of text knows one task only),
    and a table with all that may lack."""
    torch.manual_seed(17)
    rng, num_rows = np.random.default_rng(1), 400
    inputs = {"a": ("audio", "image", "text"), "b": ("audio", "image")}
    fused = make_spec(dims=DIMS, sparse=(), inputs=inputs, kinds={"a": Multiclass(), "b": Multilabel()})
    alone = {}
    for m, tasks in {"audio": "ab", "image": "ab", "text": "a"}.items():
        own = {"modalities": {m: InputSpec(DIMS[m], False, 4)}, "inputs": dict.fromkeys(tasks, (m,))}
        own |= {"tasks": {t: fused.tasks[t] for t in tasks}, "kinds": {t: fused.kinds[t] for t in tasks}}
        alone[m] = MultimodalModel(replace(fused, **own)).eval()
    b = (rng.random((num_rows, 3)) < 0.5).astype(np.int8)
    b[rng.random(num_rows) < 0.2] = MISSING
    table = FeatureTable(
        sample_id=np.array([f"s{i}" for i in range(num_rows)], dtype=object),
        split=np.resize(["train", "val"], num_rows).astype(object),
        features={m: rng.normal(size=(num_rows, d)).astype(np.float32) for m, d in DIMS.items()},
        present={m: rng.random(num_rows) < 0.6 for m in DIMS},
        labels=coded({"a": rng.integers(-1, 2, num_rows), "b": b}),
        class_names={"a": ["x", "y"], "b": ["u", "v", "w"]},
    )
    # labels that experts know: text's for three rows of four of task a, image's for those of b
    proba = {m: predict_table(model, table) for m, model in alone.items()}
    says = rng.random(num_rows) < 0.75
    a, b = (codes_of(table.labels[t]) for t in "ab")
    known = np.where(says & table.present["text"], proba["text"]["a"].argmax(axis=1), a)
    sets = np.where((says & table.present["image"])[:, None], proba["image"]["b"] >= 0.5, b).astype(np.int8)
    table = replace(table, labels=coded({"a": known, "b": sets}))
    whole = with_heldout(MultimodalModel(fused).eval(), None, table)
    return whole, {m: with_heldout(model, None, table) for m, model in alone.items()}, table


def f1(labels, proba):
    """Of one row of a multilabel task, as the model's users count it."""
    real, found = labels == 1, proba >= 0.5
    return 2 * (real & found).sum() / (real.sum() + found.sum()) if (real | found).any() else 1.0


def scores_on_val(model, table, task, part, rows):
    """By hand: the scores of these rows when they have nothing but `part`."""
    only = {m: there & (m in part) for m, there in table.present.items()}
    proba, labels = predict_table(model, replace(table, present=only))[task], codes_of(table.labels[task])
    if labels.ndim == 2:
        return np.array([f1(labels[i], proba[i]) for i in rows])
    return np.array([float(proba[i].argmax() == labels[i]) for i in rows])


def losses_on_val(model, table, task, part, rows):
    """By hand: the log losses of these rows when they have nothing but `part`, at the best temperature."""
    only = {m: there & (m in part) for m, there in table.present.items()}
    logits = predict_logits(model, replace(table, present=only))[task][rows]
    labels = codes_of(table.labels[task])[rows]
    logits = torch.from_numpy(logits / fit_temperature(logits, labels_of(labels)))
    if labels.ndim == 2:
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(labels).to(logits.dtype), reduction="none"
        ).mean(dim=1).numpy()
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none").numpy()


def test_each_pattern_goes_to_who_is_clearly_better_on_val(trio):
    """Catches routes by other rows than val's or with the rest not hidden, an expert that takes rows over by chance,
    and one that must not answer complete rows although it is better there."""
    fused, experts, table = trio
    routes = choose_routes(fused, experts, table)
    chosen = []
    for task, inputs in {"a": ("audio", "image", "text"), "b": ("audio", "image")}.items():
        for mask in list(product([False, True], repeat=len(inputs)))[1:]:
            part = [m for m, there in zip(inputs, mask, strict=True) if there]
            rows = np.flatnonzero((table.split == "val") & table.labels[task].labelled)
            rows = [i for i in rows if all(table.present[m][i] for m in part)]
            able = {m: experts[m].model for m in part if task in experts[m].model.spec.tasks} | {"fused": fused.model}
            scores = {
                m: scores_on_val(model, table, task, part if m == "fused" else [m], rows) for m, model in able.items()
            }
            default = part[0] if len(part) == 1 and part[0] in able else "fused"
            gains = {}
            for m in able.keys() - {default}:
                theirs, own = scores[m], scores[default]
                if task == "a":
                    wins, losses = int((theirs > own).sum()), int((theirs < own).sum())
                    p = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1
                else:
                    p = ttest_rel(theirs, own, alternative="greater").pvalue
                losses = [
                    losses_on_val(able[k], table, task, part if k == "fused" else [k], rows) for k in (default, m)
                ]
                p_loss = ttest_rel(*losses, alternative="greater").pvalue
                if min(p, p_loss) < ALPHA / (len(able) - 1) and theirs.mean() >= own.mean():
                    gains[m] = (theirs - own).mean()
            expected = max(gains, key=gains.get) if gains else default
            assert routes.get(task, {}).get("+".join(part), "fused") == expected
            chosen.append((expected, len(part) == len(inputs)))
    assert {("text", True), ("image", False), ("fused", False)} <= set(chosen)  # else the draw of weights says nothing


def test_rows_are_answered_by_what_they_have(trio):
    """Catches the wrong expert, a task's route taken by another task's modalities, and held-out predictions of the
    whole that are not those that the whole makes."""
    fused, experts, table = trio
    model, heldout = join_experts(fused, experts, table)
    found, plain = predict_logits(model, table), predict_logits(fused.model, table)
    own = {m: predict_logits(e.model, table) for m, e in experts.items()}
    for task, inputs in fused.model.spec.inputs.items():
        for there in product([False, True], repeat=len(inputs)):
            rows = np.all([table.present[m] == here for m, here in zip(inputs, there, strict=True)], axis=0)
            name = "+".join(m for m, here in zip(inputs, there, strict=True) if here)
            m = model.spec.routes.get(task, {}).get(name)
            np.testing.assert_allclose(found[task][rows], (own[m] if m else plain)[task][rows], atol=1e-6)
            assert rows.any()
    for given, by_task in heldout.logits.items():
        hidden = set(DIMS) - set(given.split("+"))
        whole = predict_logits(model, table.take(heldout.rows), drop=hidden)
        for task, logits in by_task.items():
            np.testing.assert_allclose(logits, whole[task], atol=1e-5)


def test_without_val_rows_who_learnt_from_just_these_answers(trio):
    """Catches a choice by the mean of nothing, and a run that ends in a KeyError where nothing is held out:
    `val_frac: 0` with `training.auto: []`."""
    fused, experts, table = trio
    blind = replace(table, split=np.full(len(table.split), "train", dtype=object))
    none = with_heldout(fused.model, None, blind)
    model, heldout = join_experts(none, {m: with_heldout(e.model, None, blind) for m, e in experts.items()}, blind)
    assert len(heldout.rows) == 0
    assert model.spec.routes == {"a": {m: m for m in DIMS}, "b": {"audio": "audio", "image": "image"}}


def test_modalities_that_often_come_without_the_others_have_an_expert(make_config, table):
    """A modality that most rows lack cost three points: rows without it were left to the model of all three."""
    rng = np.random.default_rng(0)
    third = {"sound": rng.random(len(table.split)) < 0.1}
    there = {m: np.ones(len(table.split), bool) for m in ("image", "text")}
    wide = replace(table, features={**table.features, "sound": table.features["image"]}, present={**there, **third})
    columns = {c: c for c in ("image", "text", "sound", "topic", "mood")}
    config = make_config(
        **{
            "samples.sources": [{"reader": "parquet", "path": "x", "columns": columns}],
            "modalities.sound": {"kind": "audio", "encoder": {"name": "logmel_cnn", "pretrain": "topic"}},
        }
    )
    assert expert_sets(config, wide) == [("image",), ("sound",), ("text",), ("image", "text")]
    found = expert_configs(config, wide)["image+text"]
    assert (found.model_modalities, found.model_tasks) == (("image", "text"), ("mood", "topic"))


def test_a_task_that_one_modality_cannot_teach_has_no_expert_of_it(make_config, table):
    """Catches a second training of what is there already, a run that ends because an expert has no labels to learn
    from, and options of a fused model that make no sense for one modality."""
    single = make_config(**{"tasks.mood.inputs": ["text"], "training.balance": "ogm_ge"})
    assert {m: c.model_tasks for m, c in expert_configs(single, table).items()} == {
        "image": ("topic",),
        "text": ("topic",),
    }
    assert expert_configs(make_config(**{"model.modalities": ["text"]}), table) == {}
    mood = table.labels["mood"].keep(~table.present["image"])
    unpaired = replace(table, labels={**table.labels, "mood": mood})
    changes = {
        "training.task_weighting": "gradnorm",
        "training.augment.word_dropout": 0.1,
        "training.augment.noise": 0.1,
    }
    found = expert_configs(make_config(**changes), unpaired)
    assert {m: c.model_tasks for m, c in found.items()} == {"image": ("topic",), "text": ("mood", "topic")}
    for config in found.values():
        fit(config.with_overrides({"training.epochs": 1, "training.task_weighting": "sum"}), unpaired)


@pytest.mark.parametrize(
    "other", [{"model.missing": "token"}, {"model.sharing": "task_modality"}, {"model.experts": False}]
)
def test_what_changes_nothing_with_one_modality_changes_no_fingerprint(make_config, table, other):
    """Catches two models that are not the same behind one fingerprint, and one model trained twice under two."""
    changes = {"model.modalities": ["text"], "training.epochs": 1, "model.modality_dropout": 0.1, "model.dropout": 0.2}
    one = make_config(**changes)
    same = one.with_overrides({**other, "model.modality_dropout": 0.3})
    assert model_identity(one) == model_identity(same)
    expected = predict_table(fit(one, table).model, table)
    for t, proba in predict_table(fit(same, table).model, table).items():
        np.testing.assert_array_equal(proba, expected[t])
    for change in ({"model.dropout": 0.1}, {"model.fusion": "gated"}, {"model.sharing": "architecture"}):
        assert model_identity(one.with_overrides(change)) != model_identity(one)


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fits(monkeypatch):
    """The modalities of each fit, in their order; on one core."""
    done, real = [], trainer.fit

    def counted(config, *args, **options):
        result = real(config, *args, **options)
        done.append("+".join(config.model_modalities))
        return result

    monkeypatch.setattr(trainer, "fit", counted)
    monkeypatch.setattr(experts_module, "ALPHA", 2.0)  # whoever is better answers, clearly or not
    monkeypatch.setattr(cluster, "cores", lambda: 1)
    return done


@pytest.fixture(scope="module")
def store_uri(table, tmp_path_factory):
    return write_store(str(tmp_path_factory.mktemp("store")), table)


def test_variants_share_their_experts(make_config, store_uri, table, tmp_path, fits):
    """Catches an expert that is trained once per variant, parts left in folders,
    and a card that can't build the model again."""
    base = make_config(**{"training.epochs": 2})
    uri = {name: str(tmp_path / name) for name in ("text_only", "concat", "gated", "plain")}
    train(base.with_overrides({"model.modalities": ["text"]}), store_uri, uri["text_only"])
    summary = train(base, store_uri, uri["concat"])
    assert fits == ["text", "image+text", "image"]
    train(base.with_overrides({"model.fusion": "gated", "model.missing": "mean"}), store_uri, uri["gated"])
    train(base.with_overrides({"model.experts": False}), store_uri, uri["plain"])
    assert fits[3:] == ["image+text", "image+text"]
    assert train(base, store_uri, uri["concat"]).status == "up to date"
    assert sorted(p.name for p in Path(uri["concat"]).iterdir()) == ["config.json", "model.safetensors"]
    assert len(list((tmp_path / ".experts").iterdir())) == 1

    model, card = load_model(uri["concat"])
    assert isinstance(model, ExpertModel)
    assert summary.num_params == sum(p.numel() for p in model.parameters())
    assert summary.num_params == sum(summary.num_params_by_part.values())
    assert summary.experts_for == model.spec.routes == card.fit.experts_for
    every = open_store(store_uri).table()
    (image_uri,) = (tmp_path / ".experts").iterdir()
    alone = {"image": load_model(str(image_uri))[0], "text": load_model(uri["text_only"])[0]}
    asked = [(t, part, name) for t, by_pattern in model.spec.routes.items() for part, name in by_pattern.items()]
    assert asked
    for t, part, m in asked:
        rows = np.logical_and.reduce([every.present[name] for name in part.split("+")])
        proba = predict_table(model, every, drop={"image", "text"} - {*part.split("+")})
        np.testing.assert_allclose(proba[t][rows], predict_table(alone[m], every)[t][rows], atol=1e-6)


def test_a_killed_job_fits_what_is_missing(make_config, store_uri, tmp_path, fits, monkeypatch):
    """Catches parts that are fitted again, a whole that differs from one that was never killed, and a model folder
    that looks finished before it is."""
    config, uri = make_config(**{"training.epochs": 2}), str(tmp_path / "run" / "concat")
    whole = train(config, store_uri, str(tmp_path / "other" / "concat"))
    real = composite.train_expert

    def killed(part, *args):
        if part.model_modalities == ("text",):
            raise KeyboardInterrupt
        return real(part, *args)

    monkeypatch.setattr(composite, "train_expert", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, store_uri, uri)
    assert read_card(uri) is None
    monkeypatch.setattr(composite, "train_expert", real)
    fits.clear()
    again = train(config, store_uri, uri)
    assert fits == ["text"]
    assert not storage.exists(storage.join(uri, ".parts"))
    assert again.experts_for == whole.experts_for
    one, other = (load_model(str(tmp_path / name / "concat"))[0].state_dict() for name in ("run", "other"))
    assert all(torch.equal(one[k], other[k]) for k in one.keys() | other.keys())


def test_an_expert_that_cannot_be_trained_is_left_out(make_config, store_uri, tmp_path, fits, monkeypatch):
    """Catches a run that ends because of a model that nobody asked for."""
    real = composite.train_expert

    def train_expert(part, *args):
        if part.model_modalities == ("text",):
            raise DataError("nothing to learn")
        return real(part, *args)

    monkeypatch.setattr(composite, "train_expert", train_expert)
    uri = str(tmp_path / "concat")
    train(make_config(**{"training.epochs": 2}), store_uri, uri)
    routes = getattr(load_model(uri)[0].spec, "routes", {})
    assert {m for by_pattern in routes.values() for m in by_pattern.values()} <= {"image"}


def test_the_fused_part_is_what_transfer_and_shapley_values_see(make_config, store_uri, tmp_path, fits):
    """Catches towers that can't be taken over from a model with experts,
    and experts that answer for the fused model."""
    base = make_config(**{"training.epochs": 2, "evaluation.bootstrap_samples": 100})
    experts, plain = str(tmp_path / "experts"), str(tmp_path / "plain")
    train(base, store_uri, experts)
    train(base.with_overrides({"model.experts": False}), store_uri, plain)
    source, bare = load_model(experts)[0], load_model(plain)[0]
    assert isinstance(source, ExpertModel)
    assert all(torch.equal(v, bare.state_dict()[k]) for k, v in fused_part(source).state_dict().items())
    start = {"training.transfer": {"init": {"image": "experts"}, "tuning": "frozen"}}
    train(base.with_overrides(start), store_uri, str(tmp_path / "student"))
    student = fused_part(load_model(str(tmp_path / "student"))[0]).state_dict()
    names = [name for stage in bare.modality_parameters("image") for name in stage]
    assert names
    assert all(torch.equal(student[name], bare.state_dict()[name]) for name in names)
    store = open_store(store_uri)
    with_experts, without = shapley_values(experts, store), shapley_values(plain, store)
    assert {t: v.shares["accuracy"] for t, v in with_experts.items()} == {
        t: v.shares["accuracy"] for t, v in without.items()
    }


def test_a_teacher_is_asked_with_its_experts_and_the_students_experts_have_none(make_config, store_uri, tmp_path, fits):
    """Catches experts trained anew for every student."""
    base = make_config(**{"training.epochs": 1})
    train(base, store_uri, str(tmp_path / "teacher"))
    fits.clear()
    student = base.with_overrides({"training.transfer.teachers": ["teacher"]})
    assert train(student, store_uri, str(tmp_path / "student")).status == "trained"
    assert fits == ["image+text"]


def test_the_model_of_all_but_a_rare_modality_has_half_of_the_level():
    """Catches a level that single modalities, which nobody would choose, take away from the model of all others."""
    found = levels({"image+text": 2, "image": 1, "text": 1, "rare": 1})
    assert found["image+text"] == pytest.approx(ALPHA / 2)
    assert sum(found.values()) == pytest.approx(ALPHA)
    assert levels({"image": 1, "text": 1}) == {"image": ALPHA / 2, "text": ALPHA / 2}
    assert levels({}) == {}


def test_losses_decide_where_scores_differ_by_chance():
    """Catches a model that fuses and has clearly smaller losses, but is left because of one row of a hundred; and a
    single modality that takes rows with a lower score."""
    rng = np.random.default_rng(0)
    right = (rng.random(100) < 0.8).astype(float)
    one_less = right.copy()
    one_less[[*np.flatnonzero(right)[:3], *np.flatnonzero(1 - right)[:2]]] = [0, 0, 0, 1, 1]
    losses = rng.exponential(0.8, 100)
    ours, theirs = np.stack([one_less, losses * 0.7]), np.stack([right, losses])
    assert not clearly_better(ours, theirs, 0.05)
    assert clearly_better(ours, theirs, 0.05, slack=1)
    many_less = np.stack([np.where(np.arange(100) < 10, 0, right), losses * 0.7])
    assert not clearly_better(many_less, theirs, 0.05, slack=1)
    assert not clearly_better(ours[:, :1], theirs[:, :1], 0.05, slack=1)


def test_experts_are_part_of_the_fingerprint_where_something_is_fused(make_config, store_uri, tmp_path):
    """Catches a model that stays without experts when they are asked for."""
    store = open_store(store_uri)
    digests = set()
    for experts in (True, False):
        config = make_config(**{"model.experts": experts})
        digests.add(training_fingerprint(config, store, str(tmp_path)))
    assert len(digests) == 2


def test_a_model_of_an_earlier_kind_says_train_again(make_config, store_uri, tmp_path, fits):
    """Catches a traceback for the routes of an earlier version."""
    uri = str(tmp_path / "model")
    train(make_config(**{"training.epochs": 1}), store_uri, uri)
    card = read_card(uri)
    assert model_of_spec(card.spec).spec.to_dict() == card.spec
    card.spec["routes"] = {"topic": ["image", "text"]}
    write_card(uri, card)
    with pytest.raises(DataError, match="train again"):
        load_model(uri)

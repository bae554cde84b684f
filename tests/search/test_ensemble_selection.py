"""Greedy selection, and an ensemble as one model."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from mmkt_ray.inference.outputs import model_inputs, predict_table
from mmkt_ray.models import model_of_spec
from mmkt_ray.models.ensemble import EnsembleModel, EnsembleSpec
from mmkt_ray.search.ensemble_selection import build_ensemble, quick_scores, select_ensemble, train_again
from mmkt_ray.search.leaderboard import Leaderboard
from mmkt_ray.search.space import build_space
from mmkt_ray.search.trial import SearchContext, Trial
from tests.labels import codes_of

CANDIDATES = [
    {"model.modalities": ["image"], "model.fusion.name": "concat", "training.lr": 0.01, "model.dropout": 0.1},
    {"model.modalities": ["text"], "model.fusion.name": "concat", "training.lr": 0.02, "model.dropout": 0.3},
    {"model.modalities": ["image"], "model.fusion.name": "concat", "training.lr": 0.03, "model.dropout": 0.0},
]


@pytest.fixture(scope="module")
def space(make_config):
    return build_space(make_config(**{"training.epochs": 3}))


@pytest.fixture(scope="module")
def models(space, make_config, store):
    return train_again(space, make_config().search, CANDIDATES, store.table())


def one_hot(codes, num_classes=3):
    return {"t": np.eye(num_classes)[codes]}


def test_selection_takes_what_helps_the_mean_and_may_take_it_twice():
    """Catches picks by their own score alone, without replacement, and an ensemble that got worse on its way."""
    labels = np.array([0, 0, 1, 1, 2, 2, 0, 1])
    good = np.array([0, 0, 1, 1, 2, 2, 1, 0])  # wrong on the last two
    helper = np.array([1, 1, 2, 2, 0, 0, 0, 1])  # right on those only
    worse = np.array([0, 0, 1, 1, 0, 0, 1, 0])
    library = [one_hot(worse), one_hot(good), one_hot(helper)]
    library[2] = {"t": library[2]["t"] * 0.0 + np.where(np.arange(8)[:, None] >= 6, 1.2 * one_hot(labels)["t"], 1 / 3)}

    def accuracy(proba):
        return float((proba["t"].argmax(axis=1) == labels).mean())

    assert select_ensemble(library, accuracy, 1) == ([1], 0.75)
    assert select_ensemble(library, accuracy, 5) == ([1, 2], 1.0)
    twice = [one_hot(good), {"t": 1.5 * one_hot(helper)["t"]}]
    picks, score = select_ensemble(
        twice, lambda p: -float(np.abs(p["t"] - (2 * twice[0]["t"] + twice[1]["t"]) / 3).sum()), 3
    )
    assert sorted(picks) == [0, 0, 1]
    assert score == pytest.approx(0, abs=1e-9)


def test_quick_scores_are_scikit_learns(store):
    """Catches a selection by another metric than evaluation tells."""
    table = store.table()
    rng = np.random.default_rng(0)
    proba = {"topic": rng.random((len(table.sample_id), 3))}
    expected = f1_score(codes_of(table.labels["topic"]), proba["topic"].argmax(axis=1), average="macro")
    assert quick_scores(table, proba)["macro_f1"]["topic"] == pytest.approx(expected)


def test_candidates_come_back_in_their_order(models, space, make_config, store):
    """Catches models that are handed to the wrong candidate when those of an architecture are trained together."""
    assert [sorted(m.spec.modalities) for m in models] == [["image"], ["text"], ["image"]]
    alone = train_again(space, make_config().search, [CANDIDATES[2]], store.table())[0]
    ours, theirs = (predict_table(m, store.table())["topic"] for m in (models[2], alone))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_an_ensemble_predicts_the_mean_of_those_who_can_read_the_row(models, store):
    """Catches members that vote on rows of which they see nothing, picks that do not count,
    and logits for probabilities."""
    table = store.table()
    ensemble = EnsembleModel(EnsembleSpec(tuple(m.spec for m in models), (1, 2, 1)), models).eval()
    proba = predict_table(ensemble, table)["topic"]
    each = [predict_table(m, table)["topic"] for m in models]
    both = table.present["image"] & table.present["text"]
    no_text = table.present["image"] & ~table.present["text"]
    np.testing.assert_allclose(proba[both], ((each[0] + 2 * each[1] + each[2]) / 4)[both], atol=1e-5)
    np.testing.assert_allclose(proba[no_text], ((each[0] + each[2]) / 2)[no_text], atol=1e-5)
    assert no_text.any()
    assert np.isfinite(proba).all()


def test_an_ensemble_is_rebuilt_from_its_card(models, store):
    """Catches an ensemble that can be saved and not loaded."""
    ensemble = EnsembleModel(EnsembleSpec(tuple(m.spec for m in models), (1, 2, 1)), models).eval()
    again = model_of_spec(json.loads(json.dumps(ensemble.spec.to_dict())))
    again.load_state_dict(ensemble.state_dict())
    table = store.table()
    rows = slice(0, 50)
    inputs = model_inputs(table, rows, ensemble.spec.modalities, torch.device("cpu"))
    torch.testing.assert_close(again.eval()(*inputs), ensemble(*inputs))
    assert type(model_of_spec(models[0].spec.to_dict())) is type(models[0])


def test_the_ensemble_is_at_least_as_good_on_val_as_its_best_member(space, make_config, store, tmp_path):
    """Catches a selection that does not start from the best candidate,
    and members that are not on the leaderboard."""
    search = make_config(**{"search.ensemble": 6}).search
    board = Leaderboard(str(tmp_path), space, "digest")
    job = SearchContext(space, search, board, num_stacks=1, started_at=0.0)
    for number, fusion in enumerate(("concat", "gated")):
        trial = Trial(job, store.table(), number, {"model.fusion.name": fusion})
        while not trial.halving.done:
            trial.step()
    board.publish()
    rows = board.read()
    ensemble, about = build_ensemble(space, search, rows, store.table())
    assert about.val >= about.best_member_val
    assert {m.candidate for m in about.members} <= set(rows["candidate"])
    assert 1 <= sum(m.picks for m in about.members) <= 6
    assert set(predict_table(ensemble, store.table())) == {"mood", "topic"}

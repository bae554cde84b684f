"""A stacked population: each member is what `fit` makes of its config alone."""

from itertools import product

import numpy as np
import pytest
import torch

from mmkt_ray.config import FUSION_NAMES, SCHEME_NAMES
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.training.loop import fit
from mmkt_ray.training.population import Population

MEMBERS = [
    {"training.lr": 0.01, "model.dropout": 0.0, "training.label_smoothing": 0.1},
    {"training.lr": 0.003, "model.dropout": 0.4, "training.weight_decay": 0.5, "model.modality_dropout": 0.3},
    {"training.lr": 0.02, "model.feature_dropout": 0.3},
]


@pytest.fixture(scope="module")
def dense(table) -> FeatureTable:
    return FeatureTable(**{**vars(table), "features": {**table.features, "text": table.features["text"].toarray()}})


@pytest.mark.parametrize(("fusion", "scheme"), list(product(FUSION_NAMES, SCHEME_NAMES)))
def test_a_member_gives_what_its_config_gives_alone(make_config, dense, fusion, scheme):
    """Catches members that see each other, other batches, masks or decay than alone,
    and a stack that forgets a buffer."""
    depth = {"model.fusion.depth": 2} if fusion == "hierarchical" else {}
    config = make_config(**{"model.fusion.name": fusion, "model.sharing": scheme, "training.epochs": 2, **depth})
    population = Population.start(config, dense, MEMBERS)
    population.train(2)
    for i in (0, 1, 2) if scheme == "task" else (1,):
        alone = fit(config.with_overrides(MEMBERS[i]), dense)
        assert population.best_epoch[i] == alone.best_epoch
        for metric in ("accuracy", "macro_f1"):
            for task, value in alone.val.metrics[metric].items():
                assert population.val[i].metrics[metric][task] == pytest.approx(value, abs=1e-3)
        theirs, own = (predict_table(model, dense) for model in (population.model(i), alone.model))
        for task in own:
            np.testing.assert_allclose(theirs[task], own[task], atol=5e-3)


@pytest.mark.parametrize("missing", ["zero", "token", "generate"])
def test_a_member_with_filled_modalities_gives_what_it_gives_alone(make_config, dense, missing):
    """Catches fills that mix up rows and members, and rates of the members that are equal and so not stacked."""
    changes = {"model.missing": missing, "model.modality_dropout": 0.2, "training.epochs": 2}
    config = make_config(**changes, **{"modalities.text.reduce": {"name": "svd", "dim": 30}})
    population = Population.start(config, dense, [{"training.lr": 0.01}, {"training.lr": 0.003}])
    population.train(2)
    alone = fit(config.with_overrides({"training.lr": 0.003}), dense)
    theirs, own = (predict_table(model, dense) for model in (population.model(1), alone.model))
    for task in own:
        np.testing.assert_allclose(theirs[task], own[task], atol=5e-3)


def test_a_step_of_all_members_at_once_is_the_same_step(make_config, dense, monkeypatch):
    """Catches another AdamW on GPUs than on CPUs: decay of biases, a rate of another member,
    a correction left out."""
    config = make_config(**{"training.epochs": 3, "model.feature_dropout": 0.2})
    one_by_one = Population.start(config, dense, MEMBERS)
    one_by_one.train(3)
    at_once = Population.start(config, dense, MEMBERS)
    monkeypatch.setattr(at_once.stack, "update", at_once.stack.update_at_once)
    at_once.train(3)
    torch.testing.assert_close(at_once.stack.weights, one_by_one.stack.weights, rtol=1e-3, atol=2e-4)
    assert not torch.equal(at_once.stack.weights[0], at_once.stack.weights[1])


def test_halving_and_merging_change_no_member(make_config, dense):
    """Catches optimiser state or rates that stay behind when the stack is sliced or put together again."""
    config = make_config(**{"training.epochs": 4})
    whole = Population.start(config, dense, MEMBERS)
    whole.train(4)
    first, second = Population.start(config, dense, MEMBERS[:2]), Population.start(config, dense, MEMBERS[2:])
    first.train(2)
    second.train(2)
    merged = Population.merge([second, first.select([1])])
    assert merged.members == [MEMBERS[2], MEMBERS[1]]
    merged.train(4)
    np.testing.assert_allclose(merged.scores, whole.scores[[2, 1]], atol=1e-3)
    assert merged.best_epoch.tolist() == whole.best_epoch[[2, 1]].tolist()


def test_a_diverging_member_costs_only_itself(make_config, dense):
    """Catches NaN that spreads over the stack, or a diverged candidate that wins."""
    config = make_config(**{"training.epochs": 3})
    population = Population.start(config, dense, [MEMBERS[0], {"training.lr": 1e30}])
    population.train(3)
    assert np.isnan(population.scores[1])
    lone = Population.start(config, dense, MEMBERS[:1])
    lone.train(3)
    assert population.scores[0] == pytest.approx(lone.scores[0], abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "member", "message"),
    [
        ({}, {"model.hidden_dim": 8}, "can't differ in"),
        ({"training.balance": "ogm_ge"}, {}, "training.balance"),
        ({"model.modalities": ["text"]}, {}, "give modalities.text a reduce"),
    ],
)
def test_what_cannot_be_stacked_is_refused(make_config, table, changes, member, message):
    """Catches a stack that would silently train something else."""
    with pytest.raises(ConfigError, match=message):
        Population.start(make_config(**changes), table, [member])

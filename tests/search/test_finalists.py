"""Finalists of a search as the models that it leaves."""

import torch

from mmkt_ray import storage
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.models import ExpertModel
from mmkt_ray.search.finalists import _fit_one, score_finalists, seeded
from mmkt_ray.search.space import build_space
from mmkt_ray.search.trial import search_score
from mmkt_ray.training.fingerprint import training_fingerprint
from mmkt_ray.training.loop import fit


def test_a_finalist_has_experts_and_takes_no_more_cores_than_its_call_has(make_config, store, tmp_path):
    """Catches a winner that is worse than a model of what is there, and trials that take each other's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a call among several has it
    config, uri = (
        make_config(**{"model.experts": True, "training.epochs": 2, "training.num_workers": 7}),
        str(tmp_path / "finalist"),
    )
    try:
        _fit_one(config, store.uri, uri)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    model, card = load_model(uri)
    assert isinstance(model, ExpertModel)
    assert set(model.spec.routes["topic"]) >= {"image", "text"}
    assert card.fingerprint == training_fingerprint(config, store, str(tmp_path))
    assert storage.exists(storage.join(str(tmp_path), ".experts"))


def test_every_seed_of_a_finalist_is_another_model(make_config, store):
    """Catches `training.seed` that makes all seeds of a finalist one model,
    whose interval holds no luck of the seed."""
    config = make_config(**{"training.seed": 7, "training.epochs": 1})
    first, second, third = (fit(c, store.table()).model.state_dict() for c in seeded(config, 3))
    alone = fit(config, store.table()).model.state_dict()
    matrices = [name for name, values in first.items() if values.ndim > 1]
    assert matrices
    for name in matrices:
        assert torch.equal(first[name], alone[name])
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(second[name], third[name])
    assert [c.training_seed for c in seeded(make_config(**{"seed": 3}), 2)] == [3, 4]


def test_finalists_of_different_tasks_are_compared_on_those_that_both_have(make_config, store, tmp_path):
    """Catches a KeyError after all finalists are trained, and a winner that left out the hard task."""
    space = {"model.tasks": {"choice": [["topic"], ["mood", "topic"]]}}
    changes = {"search.objective": {"metric": "balanced_accuracy"}, "training.epochs": 4, "training.lr": 0.05}
    built = build_space(make_config(**changes, **{"search.space": space}))
    folders = {}
    for role, tasks in (("both", ["mood", "topic"]), ("alone", ["topic"])):
        folders[role] = [str(tmp_path / role)]
        _fit_one(built.configure({"model.tasks": tasks}), store.uri, folders[role][0])
    result = score_finalists(built, search_score(built, store.table()), folders, store)
    assert result.winner == "both"
    assert result.finalists["alone"].test.keys() == {"topic"}
    assert result.versus["alone"].keys() == {"topic"}
    assert set(result.versus["alone"]["topic"].metrics) == {"accuracy", "macro_f1", "balanced_accuracy"}
    card = load_model(folders["alone"][0])[1]
    val = [epoch.score("balanced_accuracy", "topic") for epoch in card.fit.history]
    assert card.fit.best_epoch == val.index(max(val)) + 1

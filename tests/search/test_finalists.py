"""Finalists of a search as the models that it leaves."""

import torch

from mmkt_ray import storage
from mmkt_ray.evaluation.model_folder import load_model
from mmkt_ray.models import ExpertModel
from mmkt_ray.search.finalists import _fit_one, seeded
from mmkt_ray.training.loop import fit
from mmkt_ray.training.trainer import training_fingerprint


def test_a_finalist_has_experts_and_takes_one_core(make_config, store, tmp_path):
    """Catches a winner that is worse than a model of what is there, and trials that take each other's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
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
    assert set(model.spec.routes["topic"]) == {"image", "text"}
    assert card["fingerprint"] == training_fingerprint(config, store, str(tmp_path))
    assert storage.exists(storage.join(str(tmp_path), ".experts"))


def test_every_seed_of_a_finalist_is_another_model(make_config, store):
    """Catches `training.seed` that makes all seeds of a finalist one model, whose interval holds no luck of the seed."""
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

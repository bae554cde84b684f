"""`model.missing: expert`: rows with one modality alone are answered by a model of that modality."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmkt_ray import storage
from mmkt_ray.errors import ConfigError
from mmkt_ray.evaluation.inference import predict_table
from mmkt_ray.evaluation.model_folder import load_model
from mmkt_ray.features.store import open_store
from mmkt_ray.models import MultimodalModel
from mmkt_ray.training.experts import expert_configs, join_experts
from mmkt_ray.training.loop import fit
from mmkt_ray.training.population import check_stackable
from mmkt_ray.training.trainer import train
from tests.training.test_trainer import write_store


@pytest.fixture(scope="module")
def parts(make_config, table):
    """A fused model and its experts, each from its own fit."""
    config = make_config(**{"model.missing": "expert"})
    experts = {m: fit(c, table).model for m, c in expert_configs(config).items()}
    return fit(config, table).model, experts


def test_rows_of_one_modality_get_the_single_models_answer(parts, table):
    """Catches an expert that answers complete rows, the wrong modality's expert, and rows that lose the fused answer."""
    fused, experts = parts
    without_val = replace(table, split=np.where(table.split == "val", "train", table.split))
    model = join_experts(fused, experts, without_val)
    assert model.spec.routes == {"topic": ("image", "text"), "mood": ("image", "text")}
    found, plain = predict_table(model, table), predict_table(fused, table)
    image, text = table.present["image"], table.present["text"]
    for task in table.labels:
        for m, alone in (("image", image & ~text), ("text", text & ~image)):
            own = predict_table(experts[m], table)[task]
            np.testing.assert_allclose(found[task][alone], own[alone], atol=1e-6)
            assert np.abs(own[alone] - plain[task][alone]).max() > 1e-3
        np.testing.assert_array_equal(found[task][image & text], plain[task][image & text])
        hidden = predict_table(model, table, drop=["text"])[task]
        np.testing.assert_allclose(hidden[image], predict_table(experts["image"], table)[task][image], atol=1e-6)


def test_an_expert_that_is_worse_on_val_does_not_answer(parts, table):
    """Catches experts that are asked whatever they know, and a choice by rows other than val."""
    fused, experts = parts
    torch.manual_seed(0)
    untrained = {m: MultimodalModel(e.spec).eval() for m, e in experts.items()}
    routes = join_experts(fused, {**experts, "image": untrained["image"]}, table).spec.routes
    assert "image" not in routes["topic"]


def test_a_task_of_one_modality_needs_no_expert(make_config):
    """Catches a second training of what is there already, and options of a fused model that make no sense for one."""
    config = make_config(**{"model.missing": "expert", "tasks.mood.inputs": ["text"], "training.balance": "ogm_ge"})
    assert {m: c.model_tasks for m, c in expert_configs(config).items()} == {"image": ("topic",), "text": ("topic",)}
    assert all(c.training.balance is None for c in expert_configs(config).values())
    assert expert_configs(make_config(**{"model.missing": "expert", "model.modalities": ["text"]})) == {}


def test_one_folder_holds_them_all(make_config, table, tmp_path):
    """Catches parts left in the folder, a card that can't build the model again, and a second training of the same."""
    uri, store = str(tmp_path / "models" / "both"), write_store(str(tmp_path / "store"), table)
    config = make_config(**{"model.missing": "expert", "training.epochs": 2})
    summary = train(config, store, uri)
    assert summary["status"] == "trained"
    assert train(config, store, uri)["status"] == "up to date"
    assert not storage.exists(storage.join(uri, ".parts"))
    model, card = load_model(uri)
    assert card["training"]["experts_for"].keys() == set(table.labels)
    assert summary["num_params"] == sum(p.numel() for p in model.parameters())
    every = open_store(store).table()
    for proba in predict_table(model, every, drop=["image"]).values():
        assert np.isfinite(proba[every.present["text"]]).all()


def test_a_search_refuses_experts(make_config, table):
    """Catches candidates that are searched as if they had experts."""
    with pytest.raises(ConfigError, match=r"model\.missing: expert"):
        check_stackable(make_config(**{"model.missing": "expert"}), table, [{}])

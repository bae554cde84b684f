"""The model folder and prediction from it: what was saved is what is used, and a broken folder is told as such."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from mmkt_ray import __version__, storage
from mmkt_ray.config import parse_config
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.inference import predict_table
from mmkt_ray.evaluation.model_folder import load_model, read_card, save_model
from mmkt_ray.features.store import FeatureTable
from mmkt_ray.models import MultimodalModel, build_spec

MANIFEST = {
    "modalities": {
        "image": {"dim": 8, "fingerprint": "abc", "folders": ["image-1"]},
        "text": {"dim": 30, "fingerprint": "def", "folders": []},
    },
    "tasks": {"topic": {"classes": ["x", "y", "z"]}, "unused": {"classes": ["p", "q"]}},
}
N = 50


@pytest.fixture(scope="module")
def config():
    return parse_config(
        {
            "name": "test",
            "samples": {
                "sources": [
                    {"reader": "parquet", "path": "x.parquet", "columns": {"image": "i", "text": "t", "topic": "y"}}
                ]
            },
            "modalities": {
                "image": {"kind": "image", "encoder": "pixels"},
                "text": {"kind": "text", "encoder": "tfidf"},
            },
            "tasks": {"topic": {}},
            "model": {"fusion": {"name": "hierarchical", "depth": 2}, "sharing": "task_modality", "hidden_dim": 16},
        }
    )


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    model = MultimodalModel(build_spec(config, {"image": 8, "text": 30}, {"image": False, "text": True}, {"topic": 3}))
    model.inputs["[image]"].set_statistics(torch.full((8,), 0.5), torch.full((8,), 2.0))
    return model.eval()


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    present = {"image": rng.random(N) < 0.7, "text": rng.random(N) < 0.7}
    text = sp.random(N, 30, 0.2, format="csr", dtype=np.float32, random_state=0)
    return FeatureTable(
        sample_id=np.arange(N).astype(str).astype(object),
        split=np.full(N, "test", dtype=object),
        features={"image": rng.normal(size=(N, 8)).astype(np.float32), "text": text},
        present=present,
        labels={"topic": rng.integers(0, 3, N)},
        class_names={"topic": ["x", "y", "z"]},
    )


@pytest.fixture
def folder(tmp_path, model, config):
    save_model(str(tmp_path / "model"), model, config, MANIFEST, {"fingerprint": "f00", "training": {"seconds": 1.0}})
    return tmp_path / "model"


def test_a_loaded_model_predicts_the_same(folder, model, table):
    """Statistics of the input stage, a shared tower or an adapter not in the file; a model left in training mode."""
    loaded, _ = load_model(str(folder))
    assert np.array_equal(predict_table(loaded, table)["topic"], predict_table(model, table)["topic"])


def test_the_card_says_all_that_is_needed_to_use_the_model(folder, config):
    """Class names of tasks that the model does not predict; encoders missing; a config that does not parse again."""
    _, card = load_model(str(folder))
    assert card["class_names"] == {"topic": ["x", "y", "z"]}
    assert card["encoders"] == MANIFEST["modalities"]
    assert parse_config(card["config"]) == config
    assert (card["fingerprint"], card["training"], card["versions"]["mmkt_ray"]) == (
        "f00",
        {"seconds": 1.0},
        __version__,
    )
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def change_card(folder, key, value):
    card = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(card | {key: value}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "mmkt train"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors"),
        (cut_weights, "damaged"),
        (lambda f: (f / "config.json").write_text("{"), "damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "damaged"),
        (lambda f: change_card(f, "schema_version", 99), "99"),
        (lambda f: change_card(f, "spec", {"modalities": {}}), "damaged"),
        (
            lambda f: change_card(f, "spec", {**json.loads((f / "config.json").read_text())["spec"], "hidden_dim": 17}),
            "damaged",
        ),
    ],
)
def test_a_broken_folder_is_told_as_such(folder, damage, says):
    """A traceback of safetensors or torch, or a model with weights of chance, from a folder that is not whole."""
    damage(folder)
    with pytest.raises(DataError, match=says):
        load_model(str(folder))


def test_new_weights_never_stand_beside_an_old_card(folder, model, config, monkeypatch):
    """A run killed between two writes, whose folder then says "up to date" for a config that it does not hold."""
    monkeypatch.setattr(storage, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_model(str(folder), model, config, MANIFEST, {"fingerprint": "f01"})
    assert read_card(str(folder)) is None


def test_no_folder_is_no_card(tmp_path):
    """A crash where `train` only asks whether a model is there."""
    assert read_card(str(tmp_path / "nothing")) is None


def test_predictions_do_not_depend_on_the_batch(model, table):
    """Rows that see their neighbours, or a last short batch at the wrong place."""
    together = predict_table(model, table)["topic"]
    assert together.dtype == np.float32
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-6)
    for batch_size in (1, 7, 49):
        np.testing.assert_allclose(predict_table(model, table, batch_size=batch_size)["topic"], together, atol=1e-6)


@pytest.mark.parametrize("dropped", [["image"], ["text"], ["image", "text"]])
def test_a_dropped_modality_counts_as_absent(model, table, dropped):
    """A subset's score that still sees the dropped modality."""
    absent = {m: p & (m not in dropped) for m, p in table.present.items()}
    without = FeatureTable(**{**vars(table), "present": absent})
    got = predict_table(model, table, drop=dropped)["topic"]
    assert np.array_equal(got, predict_table(model, without)["topic"])
    assert not np.array_equal(got, predict_table(model, table)["topic"])


def test_features_of_another_encoder_are_refused(model, table):
    """A shape error deep in torch, or worse none, after the encoder was changed."""
    narrower = FeatureTable(**{**vars(table), "features": {**table.features, "image": table.features["image"][:, :5]}})
    with pytest.raises(DataError, match=r"'image' are 5 wide .* 8"):
        predict_table(model, narrower)
    dense = FeatureTable(**{**vars(table), "features": {**table.features, "text": table.features["text"].toarray()}})
    with pytest.raises(DataError, match="dense"):
        predict_table(model, dense)
    with pytest.raises(DataError, match="'text'"):
        predict_table(model, FeatureTable(**{**vars(table), "features": {"image": table.features["image"]}}))

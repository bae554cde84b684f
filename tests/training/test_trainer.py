"""Training as a job: store in, model folder out, on one process or on Ray Train workers."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmkt_ray import cluster, storage
from mmkt_ray.errors import DataError, ResourceError
from mmkt_ray.features.store import column_of, open_store, to_arrow, write_manifest
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.training import trainer
from mmkt_ray.training.batches import Worker, usable_rows
from mmkt_ray.training.loop import fit
from mmkt_ray.training.trainer import train
from mmkt_ray.training.validation import validate
from tests.labels import codes_of
from tests.manifests import make_manifest


def write_store(uri, table, mood=None):
    """A store of the table's rows in two parts; `mood`: one label for all rows."""
    features = {column_of(m): to_arrow(f[table.present[m]], table.present[m]) for m, f in table.features.items()}
    names = {
        t: np.array([*classes, None, None], dtype=object)[codes_of(y)]
        for t, y in table.labels.items()
        for classes in [table.class_names[t]]
    }
    names |= {"mood": np.full(len(table.split), mood, dtype=object)} if mood else {}
    labels = {t: pa.array(v, pa.string()) for t, v in names.items()}
    rows = pa.table({"sample_id": pa.array(table.sample_id), "split": pa.array(table.split), **features, **labels})
    storage.write_table(f"{uri}/data/part-0.parquet", rows.slice(0, 100))
    storage.write_table(f"{uri}/data/part-1.parquet", rows.slice(100))
    about = {
        "fingerprint": f"store-{mood}",
        "parts": ["part-0.parquet", "part-1.parquet"],
        "modalities": {m: {"dim": f.shape[1], "fingerprint": m, "folders": []} for m, f in table.features.items()},
        "tasks": {
            t: {"kind": "multiclass", "classes": [mood] if mood and t == "mood" else c}
            for t, c in table.class_names.items()
        },
    }
    write_manifest(uri, make_manifest(**about))
    return uri


@pytest.fixture(scope="module")
def store_uri(table, tmp_path_factory):
    return write_store(str(tmp_path_factory.mktemp("store")), table)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """More than one OpenMP thread on a machine that does other work is many times slower, for models this small."""
    monkeypatch.setattr(cluster, "cores", lambda: 1)


def untimed(summary):
    about = summary.to_dict()
    record = {k: v for k, v in about.items() if k not in ("status", "seconds", "history")}
    return record | {"history": [{k: v for k, v in h.items() if k != "seconds"} for h in about["history"]]}


def test_one_worker_trains_here_and_publishes(make_config, store_uri, tmp_path):
    """A summary that is not what was published; leftovers of training in the model folder."""
    config, uri = make_config(), str(tmp_path / "model")
    summary = train(config, store_uri, uri)
    model, card = load_model(uri)
    assert (summary.status, summary.num_workers, len(summary.history)) == ("trained", 1, 4)
    assert summary.num_params == sum(p.numel() for p in model.parameters())
    assert untimed(card.training) == untimed(summary)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    table = open_store(store_uri).table(config.model_modalities, config.model_tasks)
    expected = predict_table(fit(config, table).model, table)
    assert all(np.array_equal(v, expected[t]) for t, v in predict_table(model, table).items())


def test_a_finished_model_is_not_trained_again_and_a_changed_one_is(make_config, store_uri, tmp_path, monkeypatch):
    """A rerun that does the work twice; a changed config or seed that is served the old model."""
    uri = str(tmp_path / "model")
    first = train(make_config(), store_uri, uri)
    runs = []
    fit_ = trainer.fit
    monkeypatch.setattr(trainer, "fit", lambda *a, **k: runs.append(1) or fit_(*a, **k))
    again = train(make_config(**{"evaluation.bootstrap_samples": 200, "name": "renamed"}), store_uri, uri)
    assert (again.status, runs) == ("up to date", [])
    assert untimed(again) == untimed(first)
    for change in (
        {"seed": 1},
        {"training.lr": 0.02},
        {"model.sharing": "modality"},
        {"model.tasks": ["topic"]},
        {"modalities.text.hidden_dim": 4},
    ):
        runs.clear()
        assert train(make_config(**change), store_uri, uri).status == "trained", change
        assert runs == [1]


def test_a_killed_job_goes_on_where_it_was(make_config, store_uri, tmp_path, monkeypatch):
    """A checkpoint that a second start does not find, or that outlives the run it belongs to."""
    monkeypatch.setattr(trainer, "CHECKPOINT_INTERVAL_S", 0.0)
    config, uri = make_config(), str(tmp_path / "model")
    whole = train(config, store_uri, str(tmp_path / "whole"))
    publish = trainer.save_model
    monkeypatch.setattr(trainer, "save_model", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config, store_uri, uri)
    assert list((tmp_path / "model" / ".train").glob("*.safetensors"))
    monkeypatch.setattr(trainer, "save_model", publish)
    resumed = train(config, store_uri, uri)
    assert untimed(resumed) == untimed(whole)
    assert not (tmp_path / "model" / ".train").exists()


def test_a_store_that_is_none_is_told_before_anything_starts(make_config, tmp_path):
    """An empty model folder left behind by a run that could not start."""
    with pytest.raises(DataError, match="mmkt extract"):
        train(make_config(), str(tmp_path / "nothing"), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_more_workers_than_the_cluster_has_are_refused(make_config, store_uri, tmp_path, ray_local):
    """Ray Train waiting for workers for ever."""
    with pytest.raises(ResourceError, match="num_workers"):
        train(make_config(**{"training.num_workers": 50}), store_uri, str(tmp_path / "model"))


def test_an_error_of_the_user_crosses_processes_as_a_value(make_config, table, tmp_path):
    """A user's error raised in a Ray Train worker: retried twice as a crash,
    then shown with Ray's traceback around it."""
    hopeless = write_store(str(tmp_path / "store"), table, mood="same")
    job = trainer.WorkerArgs(make_config(), None, hopeless, "", str(tmp_path), "f00", str(tmp_path))
    outcome = trainer.train_on_worker(job, 0, 1, torch.device("cpu"))
    assert isinstance(pickle.loads(pickle.dumps(outcome)), DataError)
    with pytest.raises(DataError, match="'mood'"):
        train(make_config(), hopeless, str(tmp_path / "model"))


@pytest.mark.timeout(300)
def test_two_ray_workers_train_one_model(make_config, store_uri, tmp_path, ray_local):
    """Ranks that publish each their own model; scores of one rank's share;
    a rerun that does not see that all is done."""
    config = make_config(**{"training.num_workers": 2, "training.epochs": 2, "training.batch_size_per_worker": 32})
    uri = str(tmp_path / "model")
    summary = train(config, store_uri, uri)
    model, card = load_model(uri)
    assert (summary.status, summary.num_workers) == ("trained", 2)
    assert card.training.to_dict() | {"status": "trained"} == summary.to_dict()
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    table = open_store(store_uri).table(config.model_modalities, config.model_tasks)
    scores = validate(model, table, usable_rows(table, "val"), Worker())
    assert scores.metrics == summary.val.metrics
    again = train(config, store_uri, uri)
    assert again == summary.replaced(status="up to date")


@pytest.mark.parametrize("wanted", ["fused", "expert"])
def test_a_full_disk_ends_the_training_with_its_own_words(make_config, store_uri, tmp_path, monkeypatch, wanted):
    """Catches an error that leaves a worker as a crash, and an expert that is left out because there was no room for
    it."""
    write = trainer.save_model

    def full(uri, *rest):
        if ("expert-" in uri) == (wanted == "expert"):
            raise ResourceError(f"disk full while writing '{uri}'")
        write(uri, *rest)

    monkeypatch.setattr(trainer, "save_model", full)
    config = make_config(**{"training.epochs": 1, "model.experts": True})
    with pytest.raises(ResourceError, match=f"disk full while writing '.*{'expert-' if wanted == 'expert' else ''}"):
        train(config, store_uri, str(tmp_path / "model"))

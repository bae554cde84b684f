"""A new kind of task: what its class and its entry say is enough, from shards to report and predictions."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from mmkt_ray import storage
from mmkt_ray.config import parse_config
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.store import open_store
from mmkt_ray.inference.prediction import predict
from mmkt_ray.kinds.tasks import TASK_KINDS, task_kind
from mmkt_ray.steps import run_steps
from mmkt_ray.studies.gallery import write_gallery
from tests.shapes import shapes_config, write_shards

KIND = {"name": "initial", "letters": 2}


@pytest.fixture(autouse=True)
def _entry() -> Iterator[None]:
    """The entry of toy_tasks.py, for one test alone."""
    before = dict(TASK_KINDS)
    import toy_tasks

    TASK_KINDS["initial"] = toy_tasks.Initial
    yield
    TASK_KINDS.clear()
    TASK_KINDS.update(before)


@pytest.mark.usefixtures("ray_local")
def test_from_shards_to_report_and_predictions(tmp_path: Path) -> None:
    """Catches a place that knows the kinds by name, an entry that workers and the child that reads a shard lack, and
    a parameter of the kind that is lost between config, store and model."""
    write_shards(tmp_path)
    options = {"training__epochs": 30, "training__lr": 0.02, "evaluation__bootstrap_samples": 100}
    config = shapes_config(tmp_path, tasks={"colour": {"kind": KIND}}, **options)
    assert "report: " in run_steps(config)
    (store_uri,) = (tmp_path / "runs" / "shapes" / "features").glob("encoded-*")
    store = open_store(str(store_uri))
    assert store.manifest.tasks["colour"].to_dict() == {"kind": KIND, "classes": ["BL", "GR", "RE"]}
    assert store.table().kinds == {"colour": task_kind(KIND)}
    model_uri = f"{tmp_path}/runs/shapes/models/model"
    assert storage.read_json(f"{model_uri}/config.json")["spec"]["kinds"] == {"colour": KIND}
    assert storage.read_json(f"{model_uri}/metrics.json")["tasks"]["colour"]["accuracy"] > 0.9
    results = storage.read_json(f"{tmp_path}/runs/shapes/report/results.json")
    assert results["tasks"]["colour"]["kind"] == KIND
    right = write_gallery(model_uri).tasks["colour"]["right"][0]
    assert right.label == right.pred != right.label.removesuffix("..")
    assert ">BL<" in Path(tmp_path, "runs", "shapes", "report", "index.html").read_text()
    predictions = pd.read_parquet(
        predict(model_uri, [str(tmp_path / "data" / "shapes" / "0.parquet")], str(tmp_path / "out"))
    )
    assert set(predictions["colour_pred"]) == {"BL", "GR", "RE"}
    assert (predictions["colour_pred"] == predictions["colour_label"]).mean() > 0.9


def test_a_config_keeps_the_kind_and_its_parameters(tmp_path: Path) -> None:
    """Catches a kind that is written as an object's name or without its parameters,
    and errors that do not name the known."""
    config = shapes_config(tmp_path, tasks={"colour": {"kind": KIND}})
    told = json.loads(json.dumps(config.model_dump(mode="json")))
    assert told["tasks"]["colour"]["kind"] == KIND
    assert parse_config(told) == config
    assert shapes_config(tmp_path).model_dump(mode="json")["tasks"]["colour"]["kind"] == "multiclass"
    for kind, message in (("initail", "did you mean 'initial'"), ({"name": "initial", "leters": 1}, "leters")):
        with pytest.raises(ConfigError, match=message):
            shapes_config(tmp_path, tasks={"colour": {"kind": kind}})


def test_a_setting_without_meaning_for_a_kind_is_refused_before_any_work(tmp_path: Path, monkeypatch) -> None:
    """Catches class weights of a kind that has none, which a run would take in and not use."""
    monkeypatch.setattr(TASK_KINDS["initial"], "cannot", {"class_weights": "which has no weights"})
    options = {"tasks": {"colour": {"kind": "initial"}}, "training__class_weights": "balanced"}
    with pytest.raises(ConfigError, match=r"training\.class_weights: 'colour' is a initial task, which has no weights"):
        shapes_config(tmp_path, **options)

"""A table, vectors and selected features from shards to predictions and the report."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.inference.prediction import predict
from mmkt_ray.steps import run_steps
from mmkt_ray.studies.gallery import write_gallery

MakeConfig = Callable[..., Config]


def goods(start: int, num_rows: int) -> pd.DataFrame:
    """The class shows in the price, the maker and what is told of it; some cells are bad or missing."""
    rng = np.random.default_rng(start)
    of_class = np.arange(start, start + num_rows) % 3
    frame = pd.DataFrame({"id": [f"s{i}" for i in range(start, start + num_rows)]})
    frame["colour"] = np.array(["red", "green", "blue"])[of_class]
    frame["price"] = [f"{np.exp(c + rng.normal(0, 0.2)):.2f}" for c in of_class]
    frame["maker"] = np.where(rng.random(num_rows) < 0.8, np.array(["Acme", "Bolt", "Crux"])[of_class], "Zed")
    frame["told"] = [f"of {'abc'[c] * 3} kind, number w{i}" for i, c in enumerate(of_class)]
    frame.loc[frame.index % 9 == 4, "maker"] = None
    frame.loc[frame.index % 20 == 3, "price"] = "12,5"
    return frame


def config_of(make_config: MakeConfig, **overrides: Any) -> Config:
    columns = {"sample_id": "id", "table": ["price", "maker"], "text": "told", "colour": "colour"}
    source = {"reader": "manifest", "path": "shapes/*.csv", "columns": columns}
    modalities = {
        "table": {"kind": "table", "encoder": {"name": "table", "min_count": 3}},
        "text": {
            "kind": "text",
            "encoder": "tfidf",
            "reduce": {"name": "select", "by": "chi2", "task": "colour", "dim": 3},
        },
    }
    settings = {"training__epochs": 30, "training__lr": 0.02, "evaluation__bootstrap_samples": 100}
    settings["variants"] = {"model": {}, "table_alone": {"model.modalities": ["table"]}}
    return make_config(**({"samples__sources": [source], "modalities": modalities} | settings | overrides))


@pytest.mark.usefixtures("ray_local")
def test_from_shards_to_predictions(tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Catches types and bad cells that nobody hears of; names of selected terms that are lost, or features that
    become dense; new files without a column that lose the modality;
    vectors that are not what they were in the run that made them."""
    folder = tmp_path / "data" / "shapes"
    folder.mkdir(parents=True)
    for start in (0, 60, 120):
        goods(start, 60).to_csv(folder / f"{start}.csv", index=False)
    config = config_of(make_config)
    run_steps(config)
    run_folder = tmp_path / "runs" / "shapes"
    (store,) = (run_folder / "features").glob("reduced-*")
    manifest = storage.read_json(str(store / "manifest.json"))
    columns = manifest["modalities"]["table"]["columns"]
    assert {name: (c["type"], c["stated"]) for name, c in columns.items()} == {
        "maker": ("category", False), "price": ("number", False),
    }  # fmt: skip
    assert columns["price"]["unreadable"] > 0
    (encoded,) = (run_folder / "features").glob("encoded-*")
    assert storage.read_json(str(encoded / "audit.json"))["nulled"] == {"table: 'price' is no number, read as null": 9}
    text = manifest["modalities"]["text"]
    assert text["sparse"]
    assert sorted(name for name, _ in text["selected"]) == ["aaa", "bbb", "ccc"]
    page = (run_folder / "report" / "index.html").read_text()
    assert "Columns of table" in page
    assert "number (found)" in page
    assert "Selected features of text, the best first, by chi2 for colour" in page
    gallery = write_gallery(str(run_folder / "models" / "model"))
    assert gallery.tasks["colour"]["right"][0].inputs["table"]["text"].startswith("price: ")
    (tmp_path / "new").mkdir()
    goods(300, 30).drop(columns="price").to_csv(tmp_path / "new" / "a.csv", index=False)
    with caplog.at_level(logging.WARNING):
        path = predict(str(run_folder / "models" / "model"), [str(tmp_path / "new")], str(tmp_path / "out"))
    predictions = pd.read_parquet(path)
    assert "has no column 'price' of 'table': it counts as null there" in caplog.text
    assert (predictions["colour_pred"] == predictions["colour_label"]).mean() > 0.9
    assert (predictions["missing"].str.len() > 0).sum() == 3  # rows without a maker
    check_as_vectors(tmp_path, config)


def check_as_vectors(tmp_path: Path, config: Config) -> None:
    """The table's features of one run as the vectors of another: the same features, the same predictions."""
    raw = config.model_dump(mode="json") | {"variants": {}}
    source = raw["samples"]["sources"][0]
    (features,) = (tmp_path / "runs" / "shapes" / "features").glob("encoded-*")
    names = storage.read_json(str(features / "manifest.json"))["parts"]
    rows = pd.concat([pd.read_parquet(features / "data" / name) for name in names])
    (tmp_path / "data" / "vectors").mkdir()
    rows[["sample_id", "split", "table_features", "colour"]].to_parquet(tmp_path / "data" / "vectors" / "a.parquet")
    source |= {"reader": "parquet", "path": "vectors/a.parquet"}
    source["columns"] = {"sample_id": "sample_id", "split": "split", "table": "table_features", "colour": "colour"}
    raw["name"] = "after"
    raw["modalities"] = {"table": {"kind": "vector", "encoder": "identity"}}
    run_steps(Config.model_validate(raw))
    (again,) = (tmp_path / "runs" / "after" / "features").glob("encoded-*")
    vectors = pd.read_parquet(again / "data").set_index("sample_id")["table_features"]
    for sample_id, vector in rows.set_index("sample_id")["table_features"].items():
        np.testing.assert_array_equal(vectors[sample_id], vector)
    models = [tmp_path / "runs" / place for place in ("shapes/models/table_alone", "after/models/model")]
    told = [pd.read_parquet(model / "predictions-test.parquet") for model in models]
    proba = [np.stack(t.set_index("sample_id").sort_index()["colour_proba"]) for t in told]
    np.testing.assert_allclose(proba[0], proba[1], atol=1e-6)

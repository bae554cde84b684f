"""A number to predict, from shards to report and predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mmkt_ray import storage
from mmkt_ray.config import Config, parse_config
from mmkt_ray.errors import ConfigError
from mmkt_ray.inference.prediction import predict
from mmkt_ray.steps import run_steps

WORDS = {"chair": 40.0, "table": 90.0, "lamp": 25.0, "sofa": 300.0}


def write_things(folder: Path, num_rows: int = 240) -> Path:
    """A CSV of titles, weights and prices, which are made of both; some cells are absent or no numbers."""
    rng = np.random.default_rng(0)
    names, weight = rng.choice(list(WORDS), num_rows), rng.uniform(1, 9, num_rows)
    price = np.array([WORDS[n] for n in names]) * (1 + weight / 5) * np.exp(rng.normal(size=num_rows) * 0.05)
    frame = pd.DataFrame(
        {"id": [f"r{i}" for i in range(num_rows)], "title": [f"a {n}" for n in names], "weight": weight}
    )
    frame["price"] = [f"{p:.2f}" for p in price]
    frame.loc[3, "price"], frame.loc[5, "price"], frame.loc[7, "title"] = "12,5", None, None
    path = folder / "data" / "things.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)
    return path


def things_config(folder: Path, **overrides: Any) -> Config:
    """A config over that file."""
    columns = {"sample_id": "id", "text": "title", "table": ["weight"], "price": "price"}
    raw = {
        "name": "things",
        "data_root": str(folder / "data"),
        "run_root": str(folder / "runs"),
        "samples": {
            "sources": [{"reader": "manifest", "path": "things.csv", "columns": columns}],
            "max_reject_frac": 0.1,
            "split": {"val_frac": 0.3, "test_frac": 0.2},
        },
        "modalities": {
            "text": {"kind": "text", "encoder": "tfidf"},
            "table": {"kind": "table", "encoder": "table"},
        },
        "tasks": {"price": {"kind": {"name": "regression", "transform": "log"}}},
        "model": {"experts": False},
        "training": {"auto": [], "epochs": 60, "lr": 0.02},
        "evaluation": {"bootstrap_samples": 100},
    }
    return parse_config(raw).with_overrides({key.replace("__", "."): value for key, value in overrides.items()})


@pytest.mark.usefixtures("ray_local")
def test_from_shards_to_report_and_predictions(tmp_path: Path) -> None:
    """Catches a stage that takes numbers for classes: a report of accuracies, predictions on the scale of the
    logarithm, a label that is guessed, intervals that hold few labels,
    and a fused model that is no better than its parts."""
    shard = write_things(tmp_path)
    text = run_steps(things_config(tmp_path))
    assert "price: numbers" in text
    uri = tmp_path / "runs" / "things"
    results = storage.read_json(str(uri / "report" / "results.json"))
    rows = {row["model"]: row for row in results["tasks"]["price"]["rows"]}
    assert rows["majority"]["r2"]["value"] < 0.1
    assert rows["logreg:table+text"]["r2"]["value"] > 0.9
    assert rows["model"]["r2"]["value"] > 0.8
    assert rows["model"]["r2"]["value"] > rows["logreg:table"]["r2"]["value"]
    for answer in results["tasks"]["price"]["answers"]:  # one R2 of a model over the same rows, wherever it stands
        if answer["num_rows"] == rows[answer["fused"]]["num_rows"]:
            assert answer["scores"]["fused"] == pytest.approx(rows[answer["fused"]]["r2"]["value"])
    assert any(a["num_rows"] == rows[a["fused"]]["num_rows"] for a in results["tasks"]["price"]["answers"])
    page = (uri / "report" / "index.html").read_text()
    assert "R2" in page
    assert "RMSE" in page
    for absent in ("Macro-F1", "Accuracy of every model", "onfusion matrix", "of 0 samples"):
        assert absent not in page, absent
    rejects = storage.read_table(next(iter(uri.glob("features/*/rejects.parquet"))).as_posix()).to_pylist()
    assert any("12,5" in r["reason"] and "point" in r["reason"] for r in rejects)
    record = storage.read_json(str(uri / "models" / "model" / "metrics.json"))["tasks"]["price"]
    assert 0.8 <= record["coverage"]["covered"] <= 1
    out = predict(str(uri / "models" / "model"), [str(shard)], str(tmp_path / "out"))
    found = pd.read_parquet(out)
    known = found.dropna(subset=["price_pred", "price_label"])
    assert not [c for c in found if c.endswith("proba")]
    assert np.median(np.abs(known["price_pred"] / known["price_label"] - 1)) < 0.3
    assert ((known["price_low"] <= known["price_label"]) & (known["price_label"] <= known["price_high"])).mean() > 0.75
    assert (known["price_low"] < known["price_high"]).all()


def test_settings_of_classes_are_refused_before_any_work(tmp_path: Path) -> None:
    """Catches weights of classes that a number does not have, which a run would take in and not use."""
    for setting, value in (
        ("class_weights", "balanced"),
        ("resample", "balanced"),
        ("generate", "smote"),
        ("label_smoothing", 0.1),
        ("logit_adjustment", 1.0),
    ):
        with pytest.raises(
            ConfigError, match=rf"training\.{setting}: 'price' is a regression task, whose labels are numbers"
        ):
            things_config(tmp_path, **{f"training__{setting}": value})
    with pytest.raises(ConfigError, match="'macro_f1' is no metric of 'price', a regression task"):
        things_config(tmp_path, training__objective={"metric": "macro_f1"})

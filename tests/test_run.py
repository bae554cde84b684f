"""A whole run on a small set, as the command line does it: results, resuming, predictions on new shards."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml

from mmkt_ray import run as steps
from mmkt_ray.cli import main
from mmkt_ray.config import Config
from mmkt_ray.evaluation.prediction import predict
from tests.shapes import png, write_shard

VARIANTS = {
    "image_only": {"model.modalities": ["image"]},
    "concat": {"model.fusion": "concat"},
    "shared": {"model.sharing": "task_modality", "model.fusion": {"name": "hierarchical", "depth": 2}},
}
QUICK = {"epochs": 4, "lr": 0.01, "batch_size_per_worker": 32}
REDUCE = {"name": "pca", "dim": 6}


@pytest.fixture
def config(shapes: Path, make_config: Callable[..., Config]) -> Config:
    return make_config(variants=VARIANTS, training=QUICK, model__hidden_dim=16, modalities__image__reduce=REDUCE)


@pytest.mark.usefixtures("ray_local")
def test_run_resume_and_predict(config: Config, shapes: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run whose steps do not fit together; a rerun that trains again; predictions that differ from evaluation's."""
    text = steps.run(config)
    assert "concat" in text
    assert "majority" in text
    folder = Path(steps.run_folder(config))
    assert (folder / "report" / "index.html").stat().st_size > 10_000
    metrics = json.loads((folder / "models" / "concat" / "metrics.json").read_text())
    assert metrics["tasks"]["colour"]["accuracy"] > 0.8  # the colour is in the picture and in the caption

    weights = (folder / "models" / "concat" / "model.safetensors").stat().st_mtime_ns
    caplog.set_level("INFO", logger="mmkt_ray")
    assert steps.run(config) == text
    assert "features are up to date" in caplog.text
    assert (folder / "models" / "concat" / "model.safetensors").stat().st_mtime_ns == weights

    for variant in ("concat", "image_only"):
        check_predictions(folder / "models" / variant, shapes)


def check_predictions(model: Path, shapes: Path) -> None:
    """The same raw shards through the model folder alone give evaluation's probabilities."""
    path = predict(str(model), [str(shapes / "data" / "shapes" / "*.parquet")], str(shapes / "out" / model.name))
    predicted = pd.read_parquet(path).set_index("sample_id")
    evaluated = pd.read_parquet(model / "predictions-test.parquet").set_index("sample_id")
    assert len(predicted) == 120
    assert len(evaluated) > 10
    ours = np.stack(predicted.loc[evaluated.index, "colour_proba"])
    assert np.abs(ours - np.stack(evaluated["colour_proba"])).max() < 1e-5
    assert (predicted.loc[evaluated.index, "colour_pred"] == evaluated["colour_pred"]).all()


@pytest.mark.usefixtures("ray_local")
def test_predict_with_missing_modalities_and_no_labels(config: Config, shapes: Path) -> None:
    """New rows without labels refused, or rows that lack a modality dropped instead of flagged."""
    only = config.with_overrides({"variants": {"concat": VARIANTS["concat"]}, "evaluation.baselines": False})
    stores = steps.extract_step(only)
    steps.train_step(only, stores)
    new = shapes / "new" / "0.parquet"
    images = [png("red", 900), None, b"broken", png("blue", 901)]
    captions = ["a red square", "a green square", "a green square", None]
    write_shard(new, 0, 4, id=["n0", "n1", "n2", "n3"], image=pa.array(images, pa.binary()), caption=pa.array(captions))
    model = Path(steps.run_folder(only)) / "models" / "concat"
    with pytest.raises(Exception, match="max_reject_frac"):
        predict(str(model), [str(new)], str(shapes / "strict"))
    path = predict(str(model), [str(new)], str(shapes / "out"), max_reject_frac=0.5)
    rows = pd.read_parquet(path).set_index("sample_id")
    assert sorted(rows.index) == ["n0", "n1", "n2", "n3"]
    assert rows.loc["n0", "colour_pred"] == "red"
    assert list(rows.loc["n1", "missing"]) == list(rows.loc["n2", "missing"]) == ["image"]
    assert list(rows.loc["n3", "missing"]) == ["text"]
    assert np.allclose([p.sum() for p in rows["colour_proba"]], 1, atol=1e-5)
    rejects = pd.read_parquet(shapes / "out" / "rejects.parquet")
    assert (rejects["sample_id"].tolist(), rejects["stage"].tolist()) == (["n2"], ["modality"])


def test_user_errors_are_sentences_with_status_2(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback for a misspelt key, or a status that a scheduler takes for success."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["extract", str(path), "--set", "trainin.epochs=1"]) == 2
    assert "did you mean 'training'" in capsys.readouterr().err
    assert main(["extract", str(path), "--set", "samples.sources.0.path=nowhere/*.parquet"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["predict", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "no finished model folder" in capsys.readouterr().err


def test_help_lists_every_command_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    """A command or a key that only the source tells of."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("run", "extract", "train", "evaluate", "predict", "report", "fetch", "config"))
    assert main(["config"]) == 0
    assert "modalities.<name>.encoder(cnn).epochs" in capsys.readouterr().out


def test_help_is_quick() -> None:
    """`mmkt --help` loading torch and Ray."""
    command = [
        sys.executable,
        "-c",
        "import sys, mmkt_ray.cli as c; c.build_parser(); print('torch' in sys.modules, 'ray' in sys.modules)",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == ["False", "False"]

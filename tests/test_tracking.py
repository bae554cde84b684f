"""What trackers get is what the comparison says, once for each result;
a tracker that is not installed is named before work."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from mmkt_ray import tracking
from mmkt_ray.errors import ConfigError
from mmkt_ray.scoring.results import ResultsFile
from tests.evaluation.runs import make_config

ABOUT = {"fusion": None, "sharing": None, "store": None}
RESULTS = ResultsFile.from_dict(
    {
        "run": "things", "split": "test", "confidence": 0.95, "recommended": None, "main": "concat", "notes": [],
        "models": {
            "concat": {
                **ABOUT, "kind": "trained", "name": "concat", "modalities": ["image", "text"], "num_params": 12,
                "training_s": 1.5, "folder": "models/concat",
            },
            "majority": {
                **ABOUT, "kind": "baseline", "name": "majority", "modalities": [], "num_params": 0, "training_s": 0.0,
                "folder": "baselines/s",
            },
        },
        "tasks": {
            "thing": {
                "kind": "multiclass", "num_classes": 4, "selected_on": "val", "best": "concat",
                "best_trained": "concat", "best_fused": "concat", "best_single": None,
                "rows": [
                    {
                        "model": "concat", "reads": [], "rows_id": "3", "num_rows": 50, "verdict": "better",
                        "num_unseen": None, "balanced_accuracy": None, "val_accuracy": None, "versus": None,
                        "accuracy": {"value": 0.75, "low": 0.5, "high": 0.875}, "macro_f1": None,
                    },
                    {
                        "model": "majority", "reads": [], "num_rows": 50, "verdict": "", "num_unseen": None,
                        "balanced_accuracy": None, "val_accuracy": None, "versus": None,
                        "accuracy": {"value": 0.25, "low": 0.1, "high": 0.4},
                    },
                ],
            }
        },
    },
    "results.json",
)  # fmt: skip
EXPECTED = {
    "thing.accuracy": 0.75, "thing.accuracy_low": 0.5, "thing.accuracy_high": 0.875, "thing.num_rows": 50.0,
    "num_params": 12.0, "training_s": 1.5,
}  # fmt: skip


def config_with(folder, **asked):
    config = make_config(folder, tracking=dict(asked))
    (folder / "runs" / config.name).mkdir(parents=True, exist_ok=True)
    return config


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def test_only_trained_models_are_told_with_all_their_numbers(tmp_path):
    (model,) = tracking.tracked_models(config_with(tmp_path), RESULTS)
    assert model.metrics == EXPECTED
    assert model.settings["training.epochs"] == "6"
    assert model.settings["model.fusion.name"] == "concat"
    assert model.report.endswith("report/index.html")


def test_a_result_is_written_once_and_a_new_one_again(tmp_path, monkeypatch):
    """A rerun must not fill a tracker with copies."""
    written = []
    monkeypatch.setattr(
        tracking, "to_tensorboard", lambda place, run, model: written.append(model.metrics["thing.accuracy"])
    )
    config = config_with(tmp_path, tensorboard=str(tmp_path / "tb"))
    tracking.track(config, RESULTS)
    tracking.track(config, RESULTS)
    assert written == [0.75]
    better = RESULTS.model_copy(deep=True)
    better.tasks["thing"].rows[0].interval("accuracy")["value"] = 0.8
    tracking.track(config, better)
    assert written == [0.75, 0.8]


def test_what_is_not_installed_is_named_before_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"tracking\.mlflow needs mlflow .*pip install mlflow-skinny"):
        tracking.check_tracking(config_with(tmp_path, mlflow=str(tmp_path)))


def test_an_object_store_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="local folder"):
        tracking.check_tracking(config_with(tmp_path, tensorboard="s3://bucket/tb"))


@needs("tensorboardX")
def test_tensorboard_files_hold_the_numbers(tmp_path):
    config = config_with(tmp_path, tensorboard=str(tmp_path / "tb"))
    tracking.check_tracking(config)
    tracking.track(config, RESULTS)
    (file,) = (tmp_path / "tb" / config.name).glob("concat-*/events*")
    assert scalars(file) == pytest.approx({key.replace(".", "/", 1): value for key, value in EXPECTED.items()})


def scalars(file: Path) -> dict[str, float]:
    """Those of an event file, by its own format: length, checksum, record, checksum."""
    event_class = importlib.import_module("tensorboardX.proto.event_pb2").Event
    data, found = file.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        event = event_class.FromString(data[12 : 12 + length])
        found |= {v.tag: v.simple_value for v in event.summary.value if v.WhichOneof("value") == "simple_value"}
        data = data[16 + length :]
    return found


@needs("mlflow")
def test_mlflow_reads_back_what_was_written(tmp_path):
    config = config_with(tmp_path, mlflow=str(tmp_path / "ml"))
    tracking.check_tracking(config)
    tracking.track(config, RESULTS)
    client = importlib.import_module("mlflow").MlflowClient(tracking_uri=(tmp_path / "ml").as_uri())
    experiment = client.get_experiment_by_name(config.name)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics == pytest.approx(EXPECTED)
    assert run.data.params["model.fusion.name"] == "concat"
    assert run.data.tags["report"].endswith("report/index.html")
    assert (run.info.run_name, run.info.status) == ("concat", "FINISHED")


@needs("wandb")
def test_wandb_writes_an_offline_run(tmp_path):
    config = config_with(tmp_path, wandb="offline")
    tracking.check_tracking(config)
    tracking.track(config, RESULTS)
    (folder,) = (tmp_path / "runs" / config.name / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))

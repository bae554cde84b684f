"""`tracking`: what a run found, written to MLflow, TensorBoard or Weights & Biases files;
one of their runs for each model.

Nothing is sent anywhere: all three write files on this machine.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkt_ray import storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.done import Step, run_folder
from mmkt_ray.errors import ConfigError
from mmkt_ray.scoring.results import ResultsFile

MAX_VALUE = 250  # characters of a setting: MLflow's limit was this
MODULES = {"mlflow": "mlflow", "tensorboard": "tensorboardX", "wandb": "wandb"}  # by tracker
INSTALLED_BY = {"mlflow": "mlflow-skinny", "tensorboard": "mmkt-ray", "wandb": "wandb"}


@dataclass(frozen=True)
class Tracked:
    """One model as trackers see it."""

    name: str
    identity: str  # the same for the same results
    settings: dict[str, str]
    metrics: dict[str, float]
    report: str


def check_tracking(config: Config) -> None:
    """Raises: ConfigError if a package is missing or a place is no local folder, before anything is trained."""
    for tracker, place in _wanted(config).items():
        try:
            importlib.import_module(MODULES[tracker])
        except ImportError as error:
            raise ConfigError(
                f"tracking.{tracker} needs {MODULES[tracker]} ({error}): pip install {INSTALLED_BY[tracker]}, "
                "or leave the key out"
            ) from None
        if "://" in place:
            raise ConfigError(
                f"tracking.{tracker} writes to a local folder, '{place}' is none: copy the files from there"
            )


def track(config: Config, results: ResultsFile) -> None:
    """Write all trained models that have not been written just so."""
    uri = run_folder(config)
    for tracker, place in _wanted(config).items():
        for model in tracked_models(config, results):
            decided_by = [model.identity, os.path.abspath(place)]
            step = Step(uri, f"tracking {tracker} {model.name}", decided_by, [])
            step.once(_writer(tracker, place, config.name, model))


def _wanted(config: Config) -> dict[str, str]:
    """Tracker -> folder, of those that are asked for."""
    asked = config.tracking
    wandb = storage.join(run_folder(config), "wandb") if asked.wandb else None
    places = {"mlflow": asked.mlflow, "tensorboard": asked.tensorboard, "wandb": wandb}
    return {tracker: place for tracker, place in places.items() if place is not None}


def _writer(tracker: str, place: str, run: str, model: Tracked) -> Callable[[], None]:
    write = {"mlflow": to_mlflow, "tensorboard": to_tensorboard, "wandb": to_wandb}[tracker]
    return lambda: write(Path(place).absolute(), run, model)


def tracked_models(config: Config, results: ResultsFile) -> list[Tracked]:
    """The trained models of the results, with their variant's settings."""
    uri, variants, found = run_folder(config), config.expand_variants(), []
    for name, about in results.models.items():
        if about.kind != "trained":
            continue
        metrics: dict[str, float] = {}
        for task, shown in results.tasks.items():
            if (row := shown.row(name)) is not None:
                metrics |= _numbers(task, row.to_dict())
        further = {"num_params": about.num_params, "training_s": about.training_s}
        metrics |= {key: float(value) for key, value in further.items() if value is not None}
        variant = variants.get(name, config)
        sections = variant.model_dump(mode="json", include={"seed", "model", "training", "modalities", "tasks"})
        settings = {**flat(sections), "modalities_read": "+".join(about.modalities)}
        identity = fingerprint([settings, metrics])
        found.append(Tracked(name, identity, settings, metrics, storage.join(uri, "report", "index.html")))
    return found


def _numbers(task: str, row: Mapping[str, Any]) -> dict[str, float]:
    """`<task>.<metric>` and the ends of its interval, of a row of the comparison."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
            found |= {
                f"{task}.{key}": value["value"],
                f"{task}.{key}_low": value["low"],
                f"{task}.{key}_high": value["high"],
            }
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "rows_id":
            found[f"{task}.{key}"] = value
    return {key: float(value) for key, value in found.items() if value is not None}


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys; what is null or empty is left out."""
    if isinstance(value, Mapping):
        parts = [flat(own, f"{prefix}.{key}" if prefix else str(key)) for key, own in value.items()]
        return {key: text for part in parts for key, text in part.items()}
    return {} if value in (None, "", [], {}) else {prefix: str(value)[:MAX_VALUE]}


def to_mlflow(place: Path, run: str, model: Tracked) -> None:
    """One MLflow run in the experiment of the run's name. Metric names keep what MLflow allows."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = importlib.import_module("mlflow")
    client = mlflow.MlflowClient(tracking_uri=place.as_uri())
    experiment = client.get_experiment_by_name(run)
    number = client.create_experiment(run) if experiment is None else experiment.experiment_id
    entities = importlib.import_module("mlflow.entities")
    made = client.create_run(number, run_name=model.name, tags={"report": model.report, "identity": model.identity})
    now = made.info.start_time
    client.log_batch(
        made.info.run_id,
        metrics=[entities.Metric(allowed(key), value, now, 0) for key, value in model.metrics.items()],
        params=[entities.Param(allowed(key), value) for key, value in model.settings.items()],
    )
    client.set_terminated(made.info.run_id)


def allowed(key: str) -> str:
    """A name of letters, digits and `_-. /`, which all trackers take."""
    return "".join(c if (c.isascii() and c.isalnum()) or c in "_-. /" else "_" for c in key)


def to_tensorboard(place: Path, run: str, model: Tracked) -> None:
    """Event files in <place>/<run>/<model>-<identity>: scalars, the settings as a table."""
    writer_class = importlib.import_module("tensorboardX").SummaryWriter
    with writer_class(logdir=str(place / run / f"{model.name}-{model.identity[:8]}")) as writer:
        for key, value in model.metrics.items():
            writer.add_scalar(key.replace(".", "/", 1), value, 0)
        table = "\n".join(f"| {key} | {value} |" for key, value in model.settings.items())
        writer.add_text("settings", f"| key | value |\n|---|---|\n{table}\n| report | {model.report} |")


def to_wandb(place: Path, run: str, model: Tracked) -> None:
    """An offline run of the project of the run's name."""
    wandb = importlib.import_module("wandb")
    place.parent.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(mode="offline", silent=True, console="off", disable_git=True, save_code=False)
    made = wandb.init(
        project=allowed(run).replace("/", "_"),
        name=model.name,
        config=model.settings,
        dir=str(place.parent),
        settings=settings,
    )
    made.summary.update({**model.metrics, "report": model.report})
    made.finish()

"""A model folder and raw shards -> predictions, through the same readers, encoders and reducers as in training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.config import Config, PairCombine, UnionCombine, parse_config
from mmkt_ray.errors import ConfigError
from mmkt_ray.evaluation.inference import predict_table
from mmkt_ray.evaluation.model_folder import load_model
from mmkt_ray.evaluation.rows import missing_column, prediction_columns, without_unreadable, write_parts
from mmkt_ray.features.combine import combine
from mmkt_ray.features.extract import encode, reduce
from mmkt_ray.features.store import Store
from mmkt_ray.models import Predictor
from mmkt_ray.samples.readers import list_shards

log = logging.getLogger(__name__)


def predict(
    model_uri: str,
    inputs: Sequence[str],
    out_uri: str,
    *,
    like: int = 0,
    reader: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_reject_frac: float | None = None,
) -> str:
    """Write `<out>/predictions.parquet` (and rejects.parquet); returns its path.

    inputs: shards read as the model's `like`-th source is, or as `reader` and `columns` say; none: the sources of training.
    Columns written: sample_id, missing (the absent modalities), and per task <task>_pred (of a multilabel task a list) and
    <task>_proba (class probabilities in the order of the model's class names); null where no modality that the model reads
    for the task is there; where some row of the input has a label, <task>_label too. A modality that new Parquet or CSV
    shards have no column for is absent in all of their rows.
    Raises: ConfigError, DataError.
    """
    model, card = load_model(model_uri)
    trained = parse_config(card["config"])
    if max_reject_frac is not None:
        trained = trained.with_overrides({"samples.max_reject_frac": max_reject_frac})
    config = prediction_config(trained, inputs, like, reader, columns or {}, sorted(card["class_names"]))
    out_uri = storage.absolute(out_uri)
    storage.make_dir(out_uri)
    saved = storage.join(storage.absolute(model_uri), "encoders")
    folders = {m: [storage.join(saved, f) for f in card["encoders"][m]["folders"]] for m in config.modalities}
    store = encode(config, out_uri, list_shards(config), {m: f[0] for m, f in folders.items()})
    store = reduce(config, out_uri, store, {m: f[1] for m, f in folders.items() if len(f) > 1})
    store = combine(config, out_uri, store)
    path = storage.join(out_uri, "predictions.parquet")
    write_predictions(path, model, store, card["class_names"])
    storage.write_bytes(
        storage.join(out_uri, "rejects.parquet"), storage.read_bytes(storage.join(store.uri, "rejects.parquet"))
    )
    log.info("%d predicted, %d rejected", store.manifest["counts"]["rows"], store.manifest["counts"]["rejects"])
    return path


def prediction_config(
    config: Config,
    inputs: Sequence[str],
    like: int,
    reader: str | None,
    columns: Mapping[str, str],
    tasks: Sequence[str] = (),
) -> Config:
    """The model's config with the new shards as sources, only its own modalities, and the labels of `tasks`, which may be
    absent. Raises: ConfigError."""
    sources = config.samples.sources
    if inputs:
        if not 0 <= like < len(sources):
            raise ConfigError(
                f"--like {like}: the model was trained with {len(sources)} sources, 0 to {len(sources) - 1}"
            )
        known = sources[like]
        mapping = dict(columns) or {k: v for k, v in known.columns.items() if k not in config.tasks or k in tasks}
        changes = {"reader": reader or known.reader, "columns": mapping, "split": "test", "limit": None}
        sources = tuple(known.model_copy(update=changes | {"path": storage.absolute(path)}) for path in inputs)
    modalities = {m: config.modalities[m] for m in config.model_modalities}
    if unknown := {c for s in sources for c in s.columns} - {
        *config.modalities,
        *config.tasks,
        "sample_id",
        "split",
        "key",
    }:
        raise ConfigError(f"--column: {sorted(unknown)} is no modality of the model; it reads {sorted(modalities)}")
    wanted = {*modalities, *tasks, "sample_id", "split", "key"}
    narrowed = [
        s.model_copy(update={"columns": {k: v for k, v in s.columns.items() if k in wanted}, "absent": "null"})
        for s in sources
    ]
    feeding = tuple(s for s in narrowed if set(s.columns) & set(modalities))
    how = config.samples.combine
    combined = (
        UnionCombine() if isinstance(how, PairCombine) else how
    )  # synthetic pairs need labels; new rows may have none
    samples = config.samples.model_copy(update={"sources": feeding, "combine": combined, "drop_leakage": False})
    return config.model_copy(update={"samples": samples, "modalities": modalities, "tasks": {t: config.tasks[t] for t in tasks}})


def write_predictions(path: str, model: Predictor, store: Store, class_names: Mapping[str, list[str]]) -> None:
    """Predict part by part: one part of the store is in memory at a time."""
    modalities = sorted(model.spec.modalities)
    tasks = [t for t in sorted(class_names) if any(part[t].null_count < len(part) for part in store.read([t]))]

    def parts() -> Iterator[pa.Table]:
        for table, labels in zip(store.tables(modalities, tasks=[]), store.read(["sample_id", *tasks]), strict=True):
            proba = without_unreadable(predict_table(model, table), table, model.spec.inputs)
            columns = {
                "sample_id": pa.array(table.sample_id[:], pa.string()),
                "missing": missing_column(table, modalities),
            }
            for task, names in sorted(class_names.items()):
                columns |= {f"{task}_label": labels[task]} if task in tasks else {}
                columns |= prediction_columns(task, proba[task], names, model.spec.kinds[task])
            yield pa.table(columns)

    write_parts(path, parts())

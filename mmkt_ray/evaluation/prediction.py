"""A model folder and raw shards -> predictions, through the same readers, encoders and reducers as in training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.config import Config, PairCombine, UnionCombine, parse_config
from mmkt_ray.errors import ConfigError, DataError, nearest
from mmkt_ray.evaluation.inference import predict_table
from mmkt_ray.evaluation.model_folder import load_model
from mmkt_ray.evaluation.rows import missing_column, prediction_columns, without_unreadable, write_parts
from mmkt_ray.features.combine import combine
from mmkt_ray.features.extract import encode, reduce
from mmkt_ray.features.store import Store
from mmkt_ray.models import Predictor
from mmkt_ray.samples.readers import has_column, known_columns, list_shards
from mmkt_ray.samples.schema import Shard
from mmkt_ray.samples.shards import has_suffix

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
    for the task is there. A modality that new shards have no column for is absent in all of their rows, unless `columns` names
    it; one that is absent in more than half of the rows is a warning. New shards need neither split nor labels nor ids.
    Raises: ConfigError, DataError.
    """
    model, card = load_model(model_uri)
    trained = parse_config(card["config"])
    if max_reject_frac is not None:
        trained = trained.with_overrides({"samples.max_reject_frac": max_reject_frac})
    config = prediction_config(trained, inputs, like, reader, columns or {})
    config = settle_columns(config, columns or {})
    out_uri = storage.absolute(out_uri)
    storage.make_dir(out_uri)
    saved = storage.join(storage.absolute(model_uri), "encoders")
    folders = {m: [storage.join(saved, f) for f in card["encoders"][m]["folders"]] for m in config.modalities}
    store = encode(config, out_uri, list_shards(config), {m: f[0] for m, f in folders.items()})
    store = reduce(config, out_uri, store, {m: f[1] for m, f in folders.items() if len(f) > 1})
    store = combine(config, out_uri, store)
    absent = tell_absent(config, store, columns or {})
    path = storage.join(out_uri, "predictions.parquet")
    write_predictions(path, model, store, card["class_names"])
    storage.write_bytes(
        storage.join(out_uri, "rejects.parquet"), storage.read_bytes(storage.join(store.uri, "rejects.parquet"))
    )
    log.info(
        "%d predicted, %d rejected%s", store.manifest["counts"]["rows"], store.manifest["counts"]["rejects"], absent
    )
    return path


def prediction_config(
    config: Config, inputs: Sequence[str], like: int, reader: str | None, columns: Mapping[str, str]
) -> Config:
    """The model's config with the new shards as sources, only its own modalities, and no label needed. Raises: ConfigError."""
    sources = config.samples.sources
    if inputs:
        if not 0 <= like < len(sources):
            raise ConfigError(
                f"--like {like}: the model was trained with {len(sources)} sources, 0 to {len(sources) - 1}"
            )
        known = sources[like]
        mapping = dict(columns) or {k: v for k, v in known.columns.items() if k not in {*config.tasks, "split", "key"}}
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
    wanted = {*modalities, "sample_id", "split", "key"}
    narrowed = [
        s.model_copy(update={"columns": {k: v for k, v in s.columns.items() if k in wanted}, "absent": "null"})
        for s in sources
    ]
    feeding = tuple(s for s in narrowed if set(s.columns) & set(modalities))
    how = config.samples.combine
    joins = not isinstance(how, PairCombine) and any("key" in s.columns for s in feeding)
    combined = how if joins else UnionCombine()  # synthetic pairs need labels; new rows have none
    samples = config.samples.model_copy(update={"sources": feeding, "combine": combined, "drop_leakage": False})
    return config.model_copy(update={"samples": samples, "modalities": modalities, "tasks": {}})


def settle_columns(config: Config, named: Mapping[str, str]) -> Config:
    """The config without ids where new shards have none; their rows are then called by their place.

    named: our column -> theirs, as the user gave it. Raises: DataError for a column that is named and in no Parquet or CSV shard.
    """
    shards, sources = list_shards(config), list(config.samples.sources)
    if all(has_suffix(shard.name, (".csv", ".parquet")) for shard in shards):  # others tell only when they are read
        for column in named:
            check_found(config, shards, column)
    for number, source in enumerate(sources):
        if "sample_id" not in source.columns or "sample_id" in named:
            continue
        if not any(has_column(config, shard, "sample_id") for shard in shards if shard.source == number):
            log.info("'%s' has no '%s': its rows are called by their place", source.path, source.columns["sample_id"])
            columns = {k: v for k, v in source.columns.items() if k != "sample_id"}
            sources[number] = source.model_copy(update={"columns": columns})
    return config.model_copy(update={"samples": config.samples.model_copy(update={"sources": tuple(sources)})})


def check_found(config: Config, shards: list[Shard], column: str) -> None:
    """Raises: DataError if no shard has what the user named as one of our columns."""
    mapped = [s for s in shards if column in config.samples.sources[s.source].columns]
    if mapped and not any(has_column(config, shard, column) for shard in mapped):
        theirs, known = config.samples.sources[mapped[0].source].columns[column], known_columns(config, mapped[0])
        hint = f"; {nearest(theirs, known)}" if known else ""
        raise DataError(f"--column {column}={theirs}: '{mapped[0].name}' has no '{theirs}'{hint}")


def tell_absent(config: Config, store: Store, named: Mapping[str, str]) -> str:
    """Modalities that are absent in more than half of the rows, as a warning and as the end of the summary.

    Raises: DataError for one that the user named and that no row has.
    """
    num_rows, told = store.manifest["counts"]["rows"], ""
    for modality, by_split in sorted(store.manifest["counts"]["missing"].items()):
        absent = sum(by_split.values())
        if absent == num_rows and modality in named:
            check_found(config, list_shards(config), modality)
        if absent > num_rows / 2:
            told += f"; {modality} is absent in {absent} of {num_rows} rows"
    if told:
        log.warning("predicting from what is left%s: do columns and suffixes have the right names?", told)
    return told


def write_predictions(path: str, model: Predictor, store: Store, class_names: Mapping[str, list[str]]) -> None:
    """Predict part by part: one part of the store is in memory at a time."""
    modalities = sorted(model.spec.modalities)

    def parts() -> Iterator[pa.Table]:
        for table in store.tables(modalities, tasks=[]):
            proba = without_unreadable(predict_table(model, table), table, model.spec.inputs)
            columns = {
                "sample_id": pa.array(table.sample_id[:], pa.string()),
                "missing": missing_column(table, modalities),
            }
            for task, names in sorted(class_names.items()):
                columns |= prediction_columns(task, proba[task], names, model.spec.kinds[task])
            yield pa.table(columns)

    write_parts(path, parts())

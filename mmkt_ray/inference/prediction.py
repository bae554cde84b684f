"""A model folder and raw shards -> predictions, through the same readers, encoders and reducers as in training.

A model folder is data, and may come from anyone: its card runs no code, names no file outside the folder, and raises
no limit, unless whoever predicts says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from mmkt_ray import storage
from mmkt_ray.config import Config, CustomEncoder, PairCombine, Section, UnionCombine, fingerprint, parse_config
from mmkt_ray.config.samples_config import HttpConfig, SamplesConfig
from mmkt_ray.config.training_config import ExtractConfig
from mmkt_ray.encoders.build import read_encoder_card
from mmkt_ray.errors import ConfigError, DataError, nearest
from mmkt_ray.features.manifest import ModalityFeatures
from mmkt_ray.features.store import Store
from mmkt_ray.inference.conformal import margins_of
from mmkt_ray.inference.model_card import Card
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.output_formats import Output, classes_metadata, write_output
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import missing_column, prediction_columns, without_unreadable, write_parts
from mmkt_ray.locks import locked
from mmkt_ray.models import Predictor
from mmkt_ray.samples.columns import Reading
from mmkt_ray.samples.readers import has_column, known_columns
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Shard
from mmkt_ray.samples.shards import has_suffix, list_shards
from mmkt_ray.scoring.results import ResultsFile

log = logging.getLogger(__name__)

# a card may ask for less than this installation's defaults, not for more
LIMITS: dict[str, tuple[type[Section], tuple[str, ...]]] = {
    "samples": (SamplesConfig, ("max_image_pixels", "decode_timeout_s")),
    "extract": (ExtractConfig, ("chunk_rows", "chunk_bytes", "encode_batch_size")),
}
OPENED = ("allow_outside", "allow_http", "allow_private_addresses")  # of a source: what only the user may open
# keys that a trained model is past
LEARNT = ("model", "training", "search", "evaluation", "transfer", "variants", "seed")



@dataclass(frozen=True)
class NewShards:
    """How new shards are read, where that differs from training."""

    like: int = 0  # as the model's so many-th source
    reader: str | None = None  # their layout
    columns: Mapping[str, str] = field(default_factory=dict)  # our name -> theirs
    max_reject_frac: float | None = None
    # dotted keys of the model's config -> values of your own
    overrides: Mapping[str, Any] = field(default_factory=dict)
    trust_code: bool = False  # import what the card names as module:Class, and read the files that it names elsewhere

    @property
    def own(self) -> dict[str, Any]:
        """All values of the reader's own by dotted key."""
        budget = {} if self.max_reject_frac is None else {"samples.max_reject_frac": self.max_reject_frac}
        return dict(self.overrides) | budget


def predict(
    model_uri: str,
    inputs: Sequence[str],
    out_uri: str,
    reading: NewShards = NewShards(),
    output: Output | None = None,
) -> str:
    """Write `<out>/predictions.parquet` (and rejects.parquet); returns its path.

    inputs: shards; none: the sources of training.
    Columns written: sample_id, missing (the absent modalities), and per task <task>_pred (of a multilabel task a
    list) and <task>_proba (class probabilities in the order of the model's class names), of numbers <task>_low and
    _high; null where no modality that the model reads for the task is there. Where some row of the input has a label,
    <task>_label too. A modality that new shards have no column for is absent in all of their rows, unless
    `reading.columns` names it; one that is absent in more than half of the rows is a warning. New shards need neither
    split nor labels nor ids. output: another form of the predictions,
    written beside the file and returned in its place.
    Raises: ConfigError, DataError.
    """
    model_uri = model_to_ship(model_uri)
    model, card = load_model(model_uri)
    own, columns = reading.own, reading.columns
    trained = restrict(parse_config(card.config), own)
    config = prediction_config(trained, inputs, reading.like, reading.reader, columns, sorted(card.class_names))
    folders = usable_encoders(model_uri, model, card, config, own, reading.trust_code)
    config = settle_columns(config, columns)
    tell_lacking(config, folders)
    out_uri = storage.absolute(out_uri)
    with locked(out_uri):
        path = _predict(config, model, card, folders, out_uri, columns)
        classes = card.class_names
        return path if output is None or output.is_plain else write_output(path, config, classes, output)


def _predict(
    config: Config,
    model: Predictor,
    card: Card,
    folders: Mapping[str, list[str]],
    out_uri: str,
    named: Mapping[str, str],
) -> str:
    from mmkt_ray.features.combine import combine  # Ray loads here: who predicts without it checks a card as above
    from mmkt_ray.features.extract import encode, reduce

    storage.make_dir(out_uri)
    store = encode(config, out_uri, list_shards(ReadingPlan.of(config)), {m: f[0] for m, f in folders.items()})
    store = reduce(config, out_uri, store, {m: f[1] for m, f in folders.items() if len(f) > 1})
    store = combine(config, out_uri, store)
    absent = tell_absent(config, store, named)
    path = storage.join(out_uri, "predictions.parquet")
    write_predictions(path, model, store, card.class_names)
    storage.write_bytes(
        storage.join(out_uri, "rejects.parquet"), storage.read_bytes(storage.join(store.uri, "rejects.parquet"))
    )
    counts = store.manifest.counts
    message = "%d predicted, %d of them without a modality that could not be read; %d rejected%s"
    log.info(message, counts.rows, counts.unreadable_modalities, counts.rejects, absent)
    return path


def model_to_ship(uri: str) -> str:
    """The model folder itself, or of a run's folder the one that its report recommends. Raises: DataError if it has
    none, or is a file."""
    fs, path = storage.resolve(uri)
    if fs.get_file_info(path).is_file:
        raise DataError(f"'{uri}' is a file: name the folder of a model or of a run")
    place = storage.join(uri, "report", "results.json")
    results = None if storage.exists(storage.join(uri, "config.json")) else ResultsFile.read_or_none(place)
    if results is None:
        return uri
    chosen = results.recommended
    if chosen is None:
        raise DataError(f"the run '{uri}' recommends no model: name one of the folders in '{uri}/models'")
    return storage.join(uri, chosen.folder)


def restrict(config: Config, own: Mapping[str, Any]) -> Config:
    """The model's config with no more than this installation's limits, then with the values of whoever predicts."""
    if fixed := sorted(key for key in own if key.partition(".")[0] in LEARNT):
        raise ConfigError(f"--set {fixed[0]}: a trained model has this in its weights, and predicts with it as it is")
    lowered: dict[str, Any] = {}
    for name, (section, keys) in LIMITS.items():
        for key in keys:
            asked, ours = getattr(getattr(config, name), key), section.model_fields[key].default
            if asked > ours:
                lowered[f"{name}.{key}"] = ours
    for i, source in enumerate(config.samples.sources):
        place = f"samples.sources.{i}"
        lowered |= {f"{place}.{key}": False for key in OPENED if getattr(source, key)}
        for key, about in HttpConfig.model_fields.items():
            if getattr(source.http, key) > about.default:
                lowered[f"{place}.http.{key}"] = about.default
    for key in sorted(lowered.keys() - own.keys()):
        log.warning("the model's card asks for more: %s is %s here; --set %s=.. raises it", key, lowered[key], key)
    return config.with_overrides(lowered | dict(own)) if lowered or own else config


def usable_encoders(
    model_uri: str,
    model: Predictor,
    card: Card,
    config: Config,
    own: Mapping[str, Any],
    trust_code: bool,
) -> dict[str, list[str]]:
    """Modality -> folders of its encoder and its reducer, if the card may use them.
    Raises: ConfigError, DataError."""
    if not trust_code:
        check_encoders(config, own)
    if config.modalities.keys() != model.spec.modalities.keys():
        raise DataError(f"'{model_uri}/config.json' is damaged: config and spec name different modalities; train again")
    folders = {m: encoder_folders(storage.absolute(model_uri), m, card.encoders[m]) for m in config.modalities}
    for m, modality in config.modalities.items():
        if not any(key.startswith(f"modalities.{m}.encoder") for key in own):
            check_options(folders[m][0], modality.encoder.model_dump(mode="json"))
    return folders


def check_encoders(config: Config, own: Mapping[str, Any]) -> None:
    """Raises: ConfigError for an encoder that the card takes from elsewhere: code to import, or files to read."""
    for m, modality in sorted(config.modalities.items()):
        encoder = modality.encoder
        if isinstance(encoder, CustomEncoder):
            raise ConfigError(
                f"the model's card names the encoder '{encoder.name}' for '{m}', code of this machine that would be "
                "imported and run: if you trust whoever made the model, add --trust-code (in Python: trust_code=True)"
            )
        for option, value in encoder.files.items():
            if (key := f"modalities.{m}.encoder.{option}") not in own:
                raise ConfigError(
                    f"the model's card names files outside of its folder, '{value}', for the encoder of '{m}': if "
                    f"you trust whoever made the model, add --trust-code, else say where they are by --set {key}=PATH"
                )


def encoder_folders(model_uri: str, modality: str, about: ModalityFeatures) -> list[str]:
    """Folders of a modality's encoder and, where it has one, its reducer. about: the model's card on the modality.

    Raises: DataError if they lead out of the model's folder, or are not those that the model was trained with.
    """
    saved = storage.join(model_uri, "encoders")
    folders = [storage.join(saved, name) for name in about.folders]
    for folder in folders:
        if "://" not in folder and os.path.dirname(os.path.realpath(folder)) != os.path.realpath(saved):
            raise DataError(f"'{folder}' is a link out of the model's folder: copy what it leads to in its place")
    if not folders:
        raise DataError(f"'{model_uri}' has no encoder of '{modality}': copy the model's folder again as a whole")
    found = [read_encoder_card(folder).fingerprint for folder in folders]
    if (found[0] if len(found) == 1 else fingerprint(found)) != about.fingerprint:
        raise DataError(
            f"the encoder of '{modality}' in '{saved}' is not the one that the model was trained with: copy the "
            "folder again as a whole, or train again"
        )
    return folders


def check_options(folder: str, asked: Mapping[str, Any]) -> None:
    """Raises: DataError if an encoder was fitted with other options than the model's card says."""
    differing = {k: v for k, v in read_encoder_card(folder).config.items() if asked.get(k) != v}
    if differing:
        raise DataError(
            f"the encoder in '{folder}' was fitted with {differing}, the model's card says otherwise: copy the "
            "model's folder again as a whole, or train again"
        )


def prediction_config(
    config: Config,
    inputs: Sequence[str],
    like: int,
    reader: str | None,
    columns: Mapping[str, str],
    tasks: Sequence[str] = (),
) -> Config:
    """The model's config with the new shards as sources, only its own modalities, and the labels of `tasks`, which
    may be absent. Raises: ConfigError."""
    sources = config.samples.sources
    if inputs:
        if not 0 <= like < len(sources):
            raise ConfigError(
                f"--like {like}: the model was trained with {len(sources)} sources, 0 to {len(sources) - 1}"
            )
        known = sources[like]
        left_out = {"split", "key", *(t for t in config.tasks if t not in tasks)}
        mapping: Mapping[str, str | tuple[str, ...]]
        kinds = {m: modality.kind for m, modality in config.modalities.items()}
        named = {c: kinds[c].columns_in(theirs) if c in kinds else theirs for c, theirs in columns.items()}
        mapping = named or {k: v for k, v in known.columns.items() if k not in left_out}
        changes = {"reader": reader or known.reader, "columns": dict(mapping), "split": "test", "limit": None}
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
    joins = not isinstance(how, PairCombine) and any("key" in s.columns for s in feeding)
    combined = how if joins else UnionCombine()  # synthetic pairs need labels; new rows may have none
    samples = config.samples.model_copy(update={"sources": feeding, "combine": combined, "drop_leakage": False})
    return config.model_copy(
        update={"samples": samples, "modalities": modalities, "tasks": {t: config.tasks[t] for t in tasks}}
    )


def check_finite(proba: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The probabilities, task -> (N, C), as they are. Raises: DataError if one is not finite:
    the weights overflow."""
    for task, values in proba.items():
        if not np.isfinite(values).all():
            raise DataError(
                f"the model gives no finite probabilities for '{task}', its weights overflow: train it again"
            )
    return proba
def settle_columns(config: Config, named: Mapping[str, str]) -> Config:
    """The config without ids where new shards have none; their rows are then called by their place.

    named: our column -> theirs, as the user gave it. Raises:
    DataError for a column that is named and in no Parquet or CSV shard.
    """
    plan, sources = ReadingPlan.of(config), list(config.samples.sources)
    shards = list_shards(plan)
    if all(has_suffix(shard.name, (".csv", ".parquet")) for shard in shards):  # others tell only when they are read
        for column in named:
            check_found(plan, shards, column)
    for number, source in enumerate(sources):
        if "sample_id" not in source.columns or "sample_id" in named:
            continue
        if not any(has_column(plan, shard, "sample_id") for shard in shards if shard.source == number):
            log.info("'%s' has no '%s': its rows are called by their place", source.path, source.columns["sample_id"])
            columns = {k: v for k, v in source.columns.items() if k != "sample_id"}
            sources[number] = source.model_copy(update={"columns": columns})
    return config.model_copy(update={"samples": config.samples.model_copy(update={"sources": tuple(sources)})})


def tell_lacking(config: Config, folders: Mapping[str, list[str]]) -> None:
    """A warning for each column that a fitted encoder knows and a new shard lacks,
    as far as that shows before reading."""
    plan = ReadingPlan.of(config)
    lacking: dict[tuple[str, str], str] = {}
    for modality, (encoder, *_) in sorted(folders.items()):
        fitted = read_encoder_card(encoder).found.get("columns", {})
        for shard in list_shards(plan) if fitted else ():
            known = known_columns(plan, shard)
            if known and modality in plan.sources[shard.source].columns:
                read = {name for name in Reading(plan, shard).only(modality).settled(known).paths if name in known}
                for column in fitted:
                    if column not in read and not any(column.startswith(f"{name}.") for name in read):
                        lacking.setdefault((modality, column), shard.name)
    for (modality, column), where in lacking.items():
        log.warning("'%s' has no column '%s' of '%s': it counts as null there", where, column, modality)


def check_found(plan: ReadingPlan, shards: list[Shard], column: str) -> None:
    """Raises: DataError if no shard has what the user named as one of our columns."""
    mapped = [s for s in shards if column in plan.sources[s.source].columns]
    if mapped and not any(has_column(plan, shard, column) for shard in mapped):
        theirs, known = plan.sources[mapped[0].source].theirs(column)[0], known_columns(plan, mapped[0])
        hint = f"; {nearest(theirs, known)}" if known else ""
        raise DataError(f"--column {column}={theirs}: '{mapped[0].name}' has no '{theirs}'{hint}")


def tell_absent(config: Config, store: Store, named: Mapping[str, str]) -> str:
    """Modalities that are absent in more than half of the rows, as a warning and as the end of the summary.

    Raises: DataError for one that the user named and that no row has.
    """
    num_rows, absences = store.manifest.counts.rows, ""
    for modality, by_split in sorted(store.manifest.counts.missing.items()):
        absent = sum(by_split.values())
        if absent == num_rows and modality in named:
            plan = ReadingPlan.of(config)
            check_found(plan, list_shards(plan), modality)
        if absent > num_rows / 2:
            absences += f"; {modality} is absent in {absent} of {num_rows} rows"
    if absences:
        log.warning("predicting from what is left%s: do columns and suffixes have the right names?", absences)
    return absences


def write_predictions(path: str, model: Predictor, store: Store, class_names: Mapping[str, list[str]]) -> None:
    """Predict part by part: one part of the store is in memory at a time."""
    modalities = sorted(model.spec.modalities)
    tasks = [t for t in sorted(class_names) if any(part[t].null_count < len(part) for part in store.read([t]))]

    def parts() -> Iterator[pa.Table]:
        for table, labels in zip(store.tables(modalities, tasks=[]), store.read(["sample_id", *tasks]), strict=True):
            proba = without_unreadable(check_finite(predict_table(model, table)), table, model.spec.inputs)
            columns = {
                "sample_id": pa.array(table.sample_id[:], pa.string()),
                "missing": missing_column(table, modalities),
            }
            for task, names in sorted(class_names.items()):
                columns |= {f"{task}_label": labels[task]} if task in tasks else {}
                margin = margins_of(table, modalities, model.margins[task]) if task in model.margins else None
                columns |= prediction_columns(task, proba[task], names, model.spec.kinds[task], margin)
            yield pa.table(columns)

    write_parts(path, parts(), classes_metadata(class_names))

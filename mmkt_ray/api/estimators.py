"""Estimators in the manner of scikit-learn: `fit(df, y)`, `predict`, `predict_proba`, `score`.

Each fit is a run: the rows become a shard in a folder, and features and models come from it as from anybody's data.

Axes: N rows, C classes.
"""

from __future__ import annotations

import tempfile
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.validation import check_is_fitted

from mmkt_ray.api.frames import TableLike, column_names, column_values, file_reader, raw_cell
from mmkt_ray.api.model import Model, load, proba_array
from mmkt_ray.config import Config, parse_config
from mmkt_ray.errors import ConfigError, DataError, nearest
from mmkt_ray.init.classify import KINDS, Look, classify_all
from mmkt_ray.init.looking import clean_name
from mmkt_ray.init.writing import default_encoder
from mmkt_ray.kinds.cells import canonical, class_name, convert_cell
from mmkt_ray.kinds.regression import Regression
from mmkt_ray.lazy import uncollected
from mmkt_ray.samples.columns import Reading
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Shard, sample_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

TASK = "target"  # what is predicted, in the run
LOOK_ROWS = 1000  # that show what a column holds


class MultimodalEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """What all estimators here share: which columns are read, and the run that fits a model of them."""

    def __init__(
        self,
        *,
        modalities: Mapping[str, str] | None = None,
        encoders: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        folder: str | None = None,
        random_state: int = 0,
    ) -> None:
        """modalities: column -> image, text, ..; None: as the values of each column show. encoders: column ->
        encoder, as in a config. settings: dotted keys of the config -> values, e.g. {"training.steps": 200}. folder:
        of the run, which then stays and is resumed by the same data; None: a temporary one.
        random_state: seed of everything random.
        """
        self.modalities = modalities
        self.encoders = encoders
        self.settings = settings
        self.folder = folder
        self.random_state = random_state

    def _fit(self, rows: TableLike, labels: Sequence[Any], task: Mapping[str, Any]) -> None:
        """Train a model of a task. labels: one of each row, as the task's kind writes them.
        task: its section of a config."""
        kinds = dict(self.modalities) if self.modalities is not None else tell_modalities(rows)
        if unknown := [name for name in kinds if name not in column_names(rows)]:
            raise ConfigError(
                f"modalities: no column '{unknown[0]}': {nearest(unknown[0], map(str, column_names(rows)))}"
            )
        self.columns_ = own_names(kinds)
        with self._place() as folder:
            config = self._config(folder, {own: kinds[name] for own, name in self.columns_.items()}, task)
            write_shard(folder / "data" / "train.parquet", rows, self.columns_, labels, config)
            self.model_ = load(_train(config))
        self.modalities_ = kinds
        names = column_names(rows)
        self.n_features_in_ = len(names)
        if isinstance(rows, pd.DataFrame) and all(isinstance(name, str) for name in names):
            self.feature_names_in_ = np.array(names, dtype=object)

    @contextmanager
    def _place(self) -> Iterator[Path]:
        if self.folder is not None:
            yield Path(self.folder).expanduser().absolute()
            return
        with tempfile.TemporaryDirectory(prefix="mmkt-fit-") as folder:  # the model is in memory afterwards
            yield Path(folder)

    def _config(self, folder: Path, kinds: Mapping[str, str], task: Mapping[str, Any]) -> Config:
        own = {column: name for name, column in self.columns_.items()}
        if unknown := sorted((self.encoders or {}).keys() - own.keys()):
            raise ConfigError(f"encoders: no modality '{unknown[0]}': {nearest(unknown[0], map(str, own))}")
        chosen = {own[name]: encoder for name, encoder in (self.encoders or {}).items()}
        columns = {"sample_id": "row", "split": "split", **{c: c for c in (*kinds, TASK)}}
        source = {"reader": "parquet", "path": "train.parquet", "columns": columns}
        raw = {
            "name": "run",
            "seed": self.random_state,
            "data_root": str(folder / "data"),
            "run_root": str(folder),
            "samples": {"sources": [source], "max_reject_frac": 0.5},
            "modalities": {m: {"kind": k, "encoder": chosen.get(m) or _encoder(k)} for m, k in kinds.items()},
            "tasks": {TASK: dict(task)},
        }
        return parse_config(raw).with_overrides(dict(self.settings or {}))

    def _answers(self, rows: TableLike) -> pa.Table:
        """The model's columns of predictions for new rows."""
        check_is_fitted(self, "model_")
        model: Model = self.model_
        return model.predict_arrow(rows, columns=self.columns_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.allow_nan = True
        tags.input_tags.two_d_array = False  # a table of images and texts, not of numbers
        tags.target_tags.required = True
        return tags


class MultimodalClassifier(ClassifierMixin, MultimodalEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A classifier of rows with images and texts, some of which may be missing.

        model = MultimodalClassifier(modalities={"photo": "image", "title": "text"}).fit(df, df["category"])
        model.predict_proba(df)      # (N, C), columns as in model.classes_

    X: a DataFrame, an Arrow table or a list of dicts; cells as `mmkt_ray.Model.predict` takes them.
    """

    classes_: np.ndarray

    def fit(self, X: TableLike, y: Any) -> MultimodalClassifier:
        """Train on N rows and their classes (N,), of any type that can be sorted.
        Needs Ray, which it starts on this machine.

        Raises: ValueError (ConfigError, DataError) for labels that are missing, of one class,
        or more or fewer than the rows.
        """
        labels, self.classes_ = self._checked_labels(X, y)
        names = class_names(self.classes_)
        self._priors = np.bincount(labels, minlength=len(names)) / len(labels)
        kind = "binary" if len(names) == 2 else "multiclass"
        self._fit(X, [names[code] for code in labels], {"kind": kind})
        known = self.model_.classes[TASK]
        self._order = np.array([known.index(name) if name in known else -1 for name in names])
        return self

    def predict_proba(self, X: TableLike) -> np.ndarray:
        """(N, C) probabilities, columns as in `classes_`; of a row without any modality how frequent the classes
        were."""
        values = proba_array(self._answers(X).column(f"{TASK}_proba"), len(self.model_.classes[TASK])).astype(
            np.float64
        )
        found = np.where(self._order < 0, 0.0, values[:, self._order])
        found[np.isnan(found).any(axis=1)] = self._priors
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    def predict(self, X: TableLike) -> np.ndarray:
        """(N,) classes."""
        best = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[best])

    def _checked_labels(self, rows: TableLike, y: Any) -> tuple[np.ndarray, np.ndarray]:
        """Codes (N,) and the classes (C,). Raises: ValueError."""
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        values = column_or_1d(np.asarray(y.to_pandas() if isinstance(y, pa.Array | pa.ChunkedArray) else y), warn=True)
        check_consistent_length(range(len(rows)), values)
        if (absent := np.flatnonzero(pd.isna(values))).size:
            raise DataError(f"y has no value in row {absent[0]} (of {len(absent)} in all): leave such rows out")
        try:
            classes, codes = np.unique(values, return_inverse=True)
        except TypeError as error:
            raise DataError(f"the values of y have several types ({error}): make them one, y.astype(str)") from None
        if len(classes) < 2:
            raise DataError(f"y has {len(classes)} class: there is nothing to tell apart")
        return codes, classes


class MultimodalRegressor(RegressorMixin, MultimodalEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A regressor of rows with images and texts, some of which may be missing; the rest as in MultimodalClassifier.

        model = MultimodalRegressor(transform="log").fit(df, df["price"])
        model.predict(df)            # (N,) numbers
    """

    def __init__(
        self,
        *,
        modalities: Mapping[str, str] | None = None,
        encoders: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        folder: str | None = None,
        random_state: int = 0,
        transform: str = "standardize",
        loss: str = "squared",
    ) -> None:
        """transform: none, log, sqrt, standardize or rank; loss: squared, absolute or huber, on that scale; the
        rest as in MultimodalEstimator."""
        super().__init__(
            modalities=modalities, encoders=encoders, settings=settings, folder=folder, random_state=random_state
        )
        self.transform = transform
        self.loss = loss

    def fit(self, X: TableLike, y: Any) -> MultimodalRegressor:
        """Train on N rows and their numbers (N,). Needs Ray, which it starts on this machine.

        Raises: ValueError (ConfigError, DataError) for labels that are no finite numbers,
        or more or fewer than the rows.
        """
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        given = column_or_1d(np.asarray(y.to_pandas() if isinstance(y, pa.Array | pa.ChunkedArray) else y), warn=True)
        check_consistent_length(range(len(X)), given)
        values = np.asarray(given, np.float64)
        if (wrong := np.flatnonzero(~np.isfinite(values))).size:
            raise DataError(f"y has no finite number in row {wrong[0]} (of {len(wrong)} in all): leave such rows out")
        self.mean_ = float(values.mean())
        kind = Regression(transform=self.transform, loss=self.loss)
        self._fit(X, values.tolist(), {"kind": kind.as_json()})
        return self

    def predict(self, X: TableLike) -> np.ndarray:
        """(N,) numbers; of a row without any modality the mean of y."""
        found = self._answers(X).column(f"{TASK}_pred").to_numpy()
        return np.where(np.isnan(found), self.mean_, found)


# --- columns --------------------


def tell_modalities(rows: TableLike) -> dict[str, str]:
    """Column -> its kind, for those that can be read. Raises: DataError if there are none."""
    looks, given = [], {}
    names = column_names(rows)
    for name in names:
        values = [value for value in column_values(rows, name)[:LOOK_ROWS] if value is not None]
        looks.append(Look(str(name), values, min(len(rows), LOOK_ROWS)))
        if values and all(isinstance(v, Image.Image) or (isinstance(v, np.ndarray) and v.ndim > 1) for v in values):
            given[str(name)] = "image"
    found = classify_all(looks, given)
    kinds = {name: c.kind for name, c in zip(names, found, strict=True) if KINDS[c.kind].role == "modality"}
    if not kinds:
        columns = ", ".join(f"{c.name}: {c.kind} ({c.why})" for c in found)
        raise DataError(
            f"no column holds images, sounds or texts: {columns or 'there are no columns'}; say modalities={{..}}"
        )
    return kinds


def own_names(kinds: Mapping[str, str]) -> dict[str, str]:
    """Name in the config -> column."""
    found: dict[str, str] = {}
    for column in kinds:
        own = clean_name(str(column)) or "column"
        while own in found or own in (TASK, "row", "split", "sample_id", "key", "cleaned", "missing"):
            own += "_1"
        found[own] = column
    return found


def _encoder(kind: str) -> Any:
    return yaml.safe_load(default_encoder(kind, TASK))


def class_names(classes: np.ndarray) -> list[str]:
    """What the classes are called in the run: as written where a run takes them for distinct ones,
    else `class <number>`."""
    names = [_name_in_run(value.item() if isinstance(value, np.generic) else value) for value in classes]
    if None in names or len({canonical(str(name)) for name in names}) < len(names):
        return [f"class {number}" for number in range(len(names))]
    return [str(name) for name in names]


def _name_in_run(value: Any) -> str | None:
    """A class as a reader takes it; None where it takes none."""
    try:
        name = class_name(value)
        return None if name is None else unicodedata.normalize("NFC", name).encode().decode()
    except ValueError:  # text that is a list, or no valid Unicode
        return None


# --- the run --------------------


def write_shard(path: Path, rows: TableLike, columns: Mapping[str, str], labels: Sequence[Any], config: Config) -> None:
    """The rows as one Parquet shard: `row`, `split`, the modalities as bytes and texts, the labels. Cells that cannot
    be read are null there, and a warning says so."""
    plan = ReadingPlan.of(config)
    reading = Reading(plan, Shard(0, "rows", "rows", ""))
    files, schema = file_reader(reading, None), sample_schema(plan)
    table: dict[str, pa.Array] = {"row": pa.array([f"{i:09d}" for i in range(len(rows))])}
    table["split"] = pa.array(["train"] * len(rows))
    broken: list[str] = []
    for own, column in columns.items():
        kind = config.modalities[own].kind
        cells = []
        for i, value in enumerate(column_values(rows, column)):
            try:
                cells.append(convert_cell(own, kind, raw_cell(kind, value, files), "utf-8"))
            except ValueError as error:
                broken.append(f"row {i}: {error}")
                cells.append(None)
        table[own] = pa.array(cells, schema.field(own).type)
    table[TASK] = pa.array(list(labels), schema.field(TASK).type)
    if broken:
        warnings.warn(f"{len(broken)} cells cannot be read and count as absent; {broken[0]}", stacklevel=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)


def _train(config: Config) -> str:
    """Features and a model of the shard; returns the model's folder."""
    with uncollected():
        from mmkt_ray.cluster.local import start_ahead

        start_ahead()
        from mmkt_ray import steps
        from mmkt_ray.done import run_folder
        from mmkt_ray.locks import locked

    with locked(run_folder(config)):
        stores = steps.extract_step(config, trains=True)
        steps.train_step(config, stores)
    return f"{run_folder(config)}/models/model"

"""A trained model in this process: rows of a DataFrame -> predictions, without Ray.

It reads, cleans, decodes and encodes through the same functions as `mmkt predict`, and answers the same to 1e-6.

Axes: N rows, C classes of one task.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mmkt_ray import storage
from mmkt_ray.api.frames import TableLike, column_names, column_values, file_reader, raw_cell
from mmkt_ray.config import Config, parse_config
from mmkt_ray.encoders.build import load_reducer
from mmkt_ray.errors import ConfigError, DataError, nearest
from mmkt_ray.features.encode import EncodePlan, SampleEncoder, reduce_features
from mmkt_ray.features.feature_table import FeatureTable, Ids
from mmkt_ray.features.store import column_of, from_arrow
from mmkt_ray.inference.conformal import margins_of
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.prediction import check_finite, model_to_ship, prediction_config, restrict, usable_encoders
from mmkt_ray.inference.rows import missing_column, prediction_columns, without_unreadable
from mmkt_ray.kinds.modality_kind import ModalityKind
from mmkt_ray.models import Predictor
from mmkt_ray.samples.columns import Reading, Row, clean, rows_to_blocks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Reject, Shard


def load(
    folder: str, *, overrides: Mapping[str, Any] | None = None, trust_code: bool = False, device: str = "cpu"
) -> Model:
    """A model for this process, from its folder (`runs/NAME/models/MODEL`), or from a run's folder: the one to ship.

    overrides: dotted keys of the model's config -> values of your own, as `mmkt predict --set`. trust_code: import
    what the model's card names as module:Class, and read the files that it names outside of its folder.
    device: as torch names it.

    Raises: DataError if there is no whole model, ConfigError if it asks for code or files and `trust_code` is not
    set.
    """
    uri = model_to_ship(storage.absolute(str(folder)))
    network, card = load_model(uri)
    own = dict(overrides or {})
    trained = restrict(parse_config(card.config), own)
    names = {m: m for m in trained.model_modalities}
    config = prediction_config(trained, ["rows"], 0, "manifest", names)
    folders = usable_encoders(uri, network, card, config, own, trust_code)
    plan = EncodePlan(config, {m: own[0] for m, own in folders.items()}, {}, use_gpu=device != "cpu", num_threads=0)
    encoder = SampleEncoder(plan, torch.device(device))
    reducers = {m: load_reducer(own[1]) for m, own in folders.items() if len(own) > 1}
    aliases: dict[str, list[str]] = {m: [] for m in names}
    parts: dict[str, list[str]] = {}
    for source in trained.samples.sources:
        for m in names:
            if m in source.columns:
                several = not isinstance(source.columns[m], str)
                (parts.setdefault(m, []) if several else aliases[m]).extend(source.theirs(m))
    return Model(
        uri, dict(card.class_names), network.to(torch.device(device)), config, encoder, reducers, aliases, parts
    )


@dataclass(frozen=True)
class Model:
    """A loaded model; several threads may predict with it. Made by `load`."""

    folder: str  # where it was loaded from
    classes: Mapping[str, list[str]]  # task -> its class names, in the order of the probabilities
    network: Predictor = field(repr=False)
    config: Config = field(repr=False)  # as it predicts: limits are this installation's
    encoder: SampleEncoder = field(repr=False)
    reducers: Mapping[str, Any] = field(repr=False)
    aliases: Mapping[str, list[str]] = field(repr=False)  # modality -> what the columns of training were called
    # modality made of several columns -> their names, or patterns for them
    parts: Mapping[str, list[str]] = field(repr=False)
    # of a thread in the encoders
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __repr__(self) -> str:
        reads = ", ".join(f"{m} ({kind})" for m, kind in self.modalities.items())
        tells = ", ".join(f"{task} ({len(self.classes[task])} classes)" for task in self.tasks)
        return f"Model({self.folder!r}: {reads} -> {tells})"

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it predicts, sorted."""
        return tuple(sorted(self.classes))

    @property
    def modalities(self) -> dict[str, str]:
        """Modality -> the name of its kind: what it reads."""
        return {m: kind.name for m, kind in self.kinds.items()}

    @property
    def kinds(self) -> dict[str, ModalityKind]:
        """Modality -> its kind."""
        return {m: modality.kind for m, modality in sorted(self.config.modalities.items())}

    def predict(
        self,
        rows: TableLike,
        *,
        proba: bool = False,
        columns: Mapping[str, str] | None = None,
        root: str | None = None,
        read_files: bool = True,
    ) -> pd.DataFrame:
        """One row of answers for each of N rows, with the index of a DataFrame that was given.

        rows: a DataFrame, an Arrow table or a list of dicts, with a column for each modality, called as the modality
        or as the column of training; other columns are ignored, and a modality without a column is absent in all rows
        (a warning says so). An image is a path, bytes of a file, a PIL image or an array (H, W, 3) of uint8; a sound
        is a path or bytes; None and NaN are absent. columns: modality -> column, where it is called otherwise. root:
        the folder of relative paths, out of which none may lead; without it any path is read, from the current
        folder. read_files: False refuses paths, for rows that come from others.

        Returns per task `<task>_pred`: the class's name, of a multilabel task a list of names, of a regression
        task a number, with the ends of its interval `<task>_low` and `_high` where the model knows them; None where
        the row has none of the modalities that the task reads. With `proba` also `<task>_proba_<class>`, C columns of
        float32. Then `missing`: the modalities that the row lacks, and `unreadable`: why, where one was there and
        could not be read, else None.

        Raises: DataError if no column is a modality of the model's.
        """
        found = self.predict_arrow(rows, columns=columns, root=root, read_files=read_files)
        parts = {}
        for name in found.column_names:
            task = name.removesuffix("_proba")
            if name == task or task not in self.classes:
                parts[name] = found.column(name).to_pandas()
            elif proba:
                parts |= wide(task, self.classes[task], found.column(name))
        frame = pd.DataFrame(parts)
        if isinstance(rows, pd.DataFrame):
            frame.index = rows.index
        return frame

    def predict_proba(self, rows: TableLike, task: str | None = None, **how: Any) -> pd.DataFrame:
        """Probabilities of one task (N, C), a column for each class; NaN where there is no prediction.

        task: may be left out where the model has one. how: as in `predict`. Raises: ConfigError for an unknown task.
        """
        name = self.tasks[0] if task is None and len(self.tasks) == 1 else task or ""
        if name not in self.classes:
            given = "say which task" if task is None else f"the model has no task '{task}'"
            raise ConfigError(f"{given}: {nearest(name, self.tasks)}")
        if not self.network.spec.kinds[name].classes:
            raise ConfigError(
                f"'{name}' is a number, which has no probabilities: `predict` gives its interval, _low and _high"
            )
        values = proba_array(self.predict_arrow(rows, **how).column(f"{name}_proba"), len(self.classes[name]))
        index = rows.index if isinstance(rows, pd.DataFrame) else None
        return pd.DataFrame(values, columns=self.classes[name], index=index)

    def predict_arrow(
        self,
        rows: TableLike,
        *,
        columns: Mapping[str, str] | None = None,
        root: str | None = None,
        read_files: bool = True,
    ) -> pa.Table:
        """The same as `predict`, as an Arrow table whose columns `<task>_proba` are lists of C float32."""
        mapping = self._columns(rows, columns or {})
        config = prediction_config(self.config, ["rows"], 0, "manifest", {m: m for m in mapping})
        reading = Reading(ReadingPlan.of(config), Shard(0, "rows", "rows", ""))
        files = file_reader(reading, root) if read_files else None
        cells = {m: _cells(rows, name) for m, name in mapping.items()}
        kinds = self.kinds
        rejects: list[Reject] = []

        def items() -> Iterator[Row | Reject]:
            for i in range(len(rows)):
                yield reading.convert(str(i), {m: raw_cell(kinds[m], cells[m][i], files) for m in cells})

        parts = [self._predict(*clean(reading, block, None), rejects) for block in rows_to_blocks(reading, items())]
        return self._in_order(parts, rejects, len(rows))

    def _columns(self, rows: TableLike, named: Mapping[str, str]) -> dict[str, str | tuple[str, ...]]:
        """Modality -> the column of the rows that holds it, or several that make it.
        Raises: DataError, ConfigError."""
        known = column_names(rows)
        found: dict[str, str | tuple[str, ...]] = {}
        if unknown := sorted(named.keys() - self.modalities.keys()):
            raise ConfigError(
                f"columns: the model has no modality '{unknown[0]}': {nearest(unknown[0], self.modalities)}"
            )
        for m in self.modalities:
            wanted = [named[m]] if m in named else [m, *self.aliases[m]]
            if (name := next((n for n in wanted if n in known), None)) is not None:
                found[m] = name
            elif own := tuple(n for n in known if any(fnmatchcase(str(n), part) for part in self.parts.get(m, ()))):
                found[m] = own
            elif m in named:
                raise DataError(
                    f"columns: there is no column '{named[m]}' for '{m}': {nearest(named[m], map(str, known))}"
                )
        if absent := sorted(self.modalities.keys() - found.keys()):
            message = f"no column for {', '.join(map(repr, absent))}; the columns are {[str(n) for n in known]}"
            if not found:
                raise DataError(f"{message}: rename one, or say columns={{'{absent[0]}': ..}}")
            warnings.warn(f"{message}: predicting from what is left", stacklevel=4)
        return found

    def _predict(self, samples: pa.Table, lost: Sequence[Reject], rejects: list[Reject]) -> pa.Table:
        """Columns of predictions for samples whose ids are positions; rejects are added to."""
        with self._turn, self.encoder.answering(len(samples)):
            part, lost_rows = self.encoder.encode_samples(samples, "rows", {}, {})
        dims = {m: e.dim for m, e in self.encoder.encoders.items()}
        part = reduce_features(part, dict(self.reducers), dims, self.config.extract.feature_dtype)
        dims |= {m: reducer.dim for m, reducer in self.reducers.items()}
        rejects += [*lost, *(Reject(**row) for row in lost_rows.to_pylist())]
        read = {m: from_arrow(part.column(column_of(m)), dim) for m, dim in dims.items()}
        features, present = {m: f for m, (f, _) in read.items()}, {m: p for m, (_, p) in read.items()}
        split = np.full(len(part), "test", dtype=object)
        table = FeatureTable(Ids.of(part.column("sample_id")), split, features, present, {}, {})
        proba = without_unreadable(check_finite(predict_table(self.network, table)), table, self.network.spec.inputs)
        found: dict[str, Any] = {"row": part.column("sample_id").cast(pa.int64())}
        for task, names in sorted(self.classes.items()):
            margins = self.network.margins.get(task)
            margin = margins_of(table, sorted(self.modalities), margins) if margins else None
            found |= prediction_columns(task, proba[task], names, self.network.spec.kinds[task], margin)
        return pa.table(found | {"missing": missing_column(table, sorted(self.modalities))})

    def _in_order(self, parts: list[pa.Table], rejects: Sequence[Reject], num_rows: int) -> pa.Table:
        """A row for each of the rows that were asked for, null where there is no sample; `unreadable` added."""
        if not parts:
            reading = Reading(ReadingPlan.of(self.config), Shard(0, "rows", "rows", ""))
            parts = [self._predict(reading.schema.empty_table(), [], [])]
        found = pa.concat_tables(parts)
        order = pa.array(np.arange(num_rows))
        found = found.take(pc.index_in(order, found.column("row").combine_chunks())).drop_columns(["row"])
        every = pa.scalar(sorted(self.modalities), pa.list_(pa.string()))
        missing = pc.coalesce(found.column("missing"), every)
        why = {int(reject.sample_id): reject.reason for reject in rejects}
        unreadable = pa.array([why.get(i) for i in range(num_rows)], pa.string())
        at = found.column_names.index("missing")
        return found.set_column(at, "missing", missing).append_column("unreadable", unreadable)


def _cells(rows: TableLike, name: str | tuple[str, ...]) -> list[Any]:
    """The cells of a column; of several a dict for each row."""
    if isinstance(name, str):
        return column_values(rows, name)
    columns = {own: column_values(rows, own) for own in name}
    return [{own: values[i] for own, values in columns.items()} for i in range(len(rows))]


def wide(task: str, names: Sequence[str], column: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """A column of probabilities as one for each class, `<task>_proba_<class>`, NaN where null."""
    values = proba_array(column, len(names))
    return {f"{task}_proba_{name}": values[:, i] for i, name in enumerate(names)}


def proba_array(column: pa.ChunkedArray, num_classes: int) -> np.ndarray:
    """Lists of C float32 -> (N, C), NaN where null."""
    values = np.full((len(column), num_classes), np.nan, dtype=np.float32)
    present = column.is_valid().to_numpy()
    values[present] = column.drop_null().combine_chunks().flatten().to_numpy().reshape(-1, num_classes)
    return values

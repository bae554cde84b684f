"""A run from Python, and what it left: tables as DataFrames, the report, the model to ship."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import pandas as pd

from mmkt_ray import storage
from mmkt_ray.config import Config, load_config, parse_config
from mmkt_ray.credentials import refuse_credentials
from mmkt_ray.done import run_folder
from mmkt_ray.errors import DataError, nearest
from mmkt_ray.lazy import uncollected
from mmkt_ray.scoring.metrics import BaselinesFile, ModelMetrics
from mmkt_ray.scoring.provenance import Current, about_table
from mmkt_ray.scoring.results import Recommended, ResultsFile
from mmkt_ray.scoring.run_file import RunFile

if TYPE_CHECKING:
    from mmkt_ray.api.model import Model


def run(
    config: Config | Mapping[str, Any] | str | PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    quick: bool = False,
) -> Results:
    """Everything of a run that is not done yet, as `mmkt run` does it: extract, train, evaluate, report.

    config: a path of a YAML file, the same as a dict, or a `Config`. overrides: dotted keys -> values, as `--set`.
    quick: a first answer, in a run folder of its own: some of the rows, few steps, no studies.

    Raises: ConfigError, DataError, ResourceError: what is wrong and what to do next.
    """
    from mmkt_ray import quick as shortened

    with uncollected():
        from mmkt_ray.cluster.local import start_ahead

        start_ahead()
        from mmkt_ray import steps

    checked = _checked(config, dict(overrides or {}))
    checked = shortened.quick(checked) if quick else checked
    text = steps.run_steps(checked)
    return Results(run_folder(checked), text)


def _checked(config: Config | Mapping[str, Any] | str | PathLike[str], overrides: dict[str, Any]) -> Config:
    if isinstance(config, str | PathLike):
        return load_config(str(config), overrides)
    if not isinstance(config, Config):
        refuse_credentials(dict(config), "the config")
        config = parse_config(config)
    found = config.with_overrides(overrides) if overrides else config
    found.expand_variants()  # a wrong variant is refused now, not after an hour of extraction
    return found


def results(folder: str | PathLike[str]) -> Results:
    """What a finished run left in its folder. Raises: DataError if there is none."""
    uri = storage.absolute(str(folder))
    if not storage.exists(storage.join(uri, "report", "results.json")):
        raise DataError(
            f"'{uri}' is no folder of a finished run (no report/results.json): run it first, e.g. by mm.run(..)"
        )
    return Results(uri)


@dataclass(frozen=True)
class Results:
    """What a run left. Made by `run` and `results`; files are read when they are asked for."""

    folder: str  # of the run: a path or URI
    text: str = field(default="", repr=False)  # the comparison, as `mmkt run` prints it; empty if it was opened only

    @cached_property
    def summary(self) -> ResultsFile:
        """All of `report/results.json`; `summary.to_dict()` is its JSON."""
        return ResultsFile.read(storage.join(self.folder, "report", "results.json"))

    @property
    def report(self) -> str:
        """Where the HTML page is."""
        return storage.join(self.folder, "report", "index.html")

    @property
    def best_name(self) -> str:
        """The model to ship. Raises: DataError if none is recommended."""
        return self._recommended().model

    @property
    def best(self) -> str:
        """The folder of the model to ship, for `mm.load` and `mmkt predict`. Raises: as `best_name`."""
        return storage.join(self.folder, self._recommended().folder)

    def load(self, name: str | None = None, **how: Any) -> Model:
        """The model to ship, or the one of this name, ready to predict. how: as `mm.load`. Raises: DataError."""
        from mmkt_ray.api.model import load

        if name is None:
            return load(self.best, **how)
        known = {n: about.folder_to_ship for n, about in self.summary.models.items() if about.folder_to_ship}
        if name not in known:
            raise DataError(f"no model '{name}' that predicts: {nearest(name, known)}")
        return load(storage.join(self.folder, known[name]), **how)

    @cached_property
    def tables(self) -> Tables:
        """Name -> DataFrame; `list(results.tables)` names those that the run has."""
        return Tables(self)

    def _recommended(self) -> Recommended:
        chosen = self.summary.recommended
        if chosen is None:
            raise DataError(f"the run '{self.folder}' recommends no model: choose one of {sorted(self.summary.models)}")
        return chosen

    def __repr__(self) -> str:
        chosen = self.summary.recommended
        return (
            f"Results(folder={self.folder!r}, best={chosen.model if chosen else None!r}, "
            f"tables={list(self.tables)})"
        )


class Tables(Mapping[str, pd.DataFrame]):
    """The tables of a run by name, each read when it is asked for."""

    def __init__(self, found: Results) -> None:
        self._results = found
        self._read: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in self._names:
            raise KeyError(f"the run has no table '{name}': {nearest(name, self._names)}")
        if name not in self._read:
            self._read[name] = TABLES[name][1](self._results)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _names(self) -> list[str]:
        run = self._results
        return [n for n, (file, _) in TABLES.items() if storage.exists(storage.join(run.folder, _place(run, file)))]


def _place(found: Results, file: str) -> str:
    """A file of the run; `BEST` stands for the folder of the best model, or of its baseline, that has its scores."""
    chosen = found.summary.recommended
    return file.replace("BEST", found.summary.models[chosen.model].folder if chosen else "none")


def _scores(found: Results) -> pd.DataFrame:
    rows = []
    for task, about in found.summary.tasks.items():
        for row in about.rows:
            cells = {k: v for k, v in row.to_dict().items() if k not in ("rows_id", "unseen", "versus")}
            cells = {"task": task, "model": row.model} | dict(sorted(cells.items()))
            rows.append(
                _flat(cells) | _flat(dict(sorted(row.versus.to_dict().items())) if row.versus else {}, "versus_")
            )
    return pd.DataFrame(rows)


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row of numbers and words: an interval as three columns, its ends `_low` and `_high`; a list as `a+b`."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            for end, number in value.items():
                flat[f"{prefix}{key}" if end == "value" else f"{prefix}{key}_{end}"] = number
        else:
            flat[prefix + key] = "+".join(map(str, value)) if isinstance(value, list) else value
    return flat


def _candidates(found: Results) -> pd.DataFrame:
    chosen = found.summary.recommended
    return pd.DataFrame([_flat(dict(sorted(one.to_dict().items()))) for one in chosen.considered] if chosen else [])


def _classes(found: Results) -> pd.DataFrame:
    chosen, rows = found.summary.models[found.best_name], []
    uri = storage.join(found.folder, _place(found, "BEST/metrics.json"))
    tasks = (
        BaselinesFile.read(uri).models[chosen.name].tasks if chosen.kind == "baseline" else ModelMetrics.read(uri).tasks
    )
    for task, about in tasks.items():
        rows += [
            {"task": task, "class": name} | dict(sorted(s.to_dict().items())) for name, s in about.per_class.items()
        ]
    return pd.DataFrame(rows)


def _predictions(found: Results) -> pd.DataFrame:
    frame = storage.read_table(storage.join(found.folder, _place(found, "BEST/predictions-test.parquet"))).to_pandas()
    return frame[frame["model"] == found.best_name].drop(columns="model") if "model" in frame else frame


def _suspects(found: Results) -> pd.DataFrame:
    uri = storage.join(found.folder, "suspects.parquet")
    if not Current.of(found.folder, RunFile(), found.summary).holds(about_table(uri)):
        raise DataError(f"'{uri}' is about other features than the run has now: give `mmkt run` with its config again")
    return storage.read_table(uri).to_pandas()


TABLES: dict[str, tuple[str, Callable[[Results], pd.DataFrame]]] = {  # name -> the file it needs, how it is made
    "scores": ("report/results.json", _scores),  # one row for each task and model: scores on test with their intervals
    # the models that may be shipped, by held-out rows, the chosen one first
    "candidates": ("report/results.json", _candidates),
    "classes": ("BEST/metrics.json", _classes),  # precision, recall and F1 of each class, of the best model
    "predictions": ("BEST/predictions-test.parquet", _predictions),  # of the best model on test, with labels
    "suspects": ("suspects.parquet", _suspects),  # train rows that their label or the other modality contradicts
}

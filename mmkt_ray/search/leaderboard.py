"""Every candidate in Parquet: a part for each trial, written anew after each rung, and the parts as one leaderboard.

    <run>/search/parts/<digest>-<trial>.parquet   digest: of what decides results; other searches' parts lie beside.
                                                  A part with candidates of status `running` is of a trial that goes
                                                  on, or died
    <run>/search/leaderboard.parquet              all candidates of this search, in the order of the trials

Columns: those of `LeaderboardRow`, one for each searched key (null where it does not apply), and one for each metric
and task, accuracy.<task> say. A log loss is negated, so that higher is better.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmkt_ray import storage
from mmkt_ray.config import Config, ParameterConfig
from mmkt_ray.record import OpenRecord
from mmkt_ray.scoring.objective import COUNTED, Score
from mmkt_ray.search.halving import SearchCandidate
from mmkt_ray.search.space import Overrides, Space, label_of, text_of

NUMBERS = {"epochs": pa.int32(), "best_epoch": pa.int32(), "seconds": pa.float64(), "finished_at": pa.float64()}


class LeaderboardRow(OpenRecord, frozen=True):
    """What is known of a candidate."""

    spread: ClassVar[str] = "further"

    candidate: str
    trial: int
    reference: str | None
    architecture: str  # in words
    modalities: str | None  # `image+text`; None: the architecture is impossible
    fusion: str | None
    overrides: str  # JSON of all that was chosen
    score: float | None
    first_score: float | None  # after the first rung
    loss: float | None
    epochs: int
    best_epoch: int
    seconds: float
    status: str  # running | finished | stopped | diverged | failed | out_of_memory
    reason: str | None
    finished_at: float  # seconds since the start
    further: dict[str, Any]  # searched key, or `<metric>.<task>` -> value

    @property
    def chosen(self) -> Overrides:
        """What was chosen."""
        return dict(json.loads(self.overrides))


@dataclass(frozen=True)
class Known:
    """A trial of which there is a part."""

    number: int
    reference: str | None
    architecture: Overrides  # {} of a reference
    score: float  # its best, `Score.worst` without one
    ended: bool  # else it goes on, or whoever ran it died


class Leaderboard:
    """The files of one search."""

    def __init__(self, search_uri: str, space: Space, digest: str) -> None:
        self.space, self.digest = space, digest
        self.parts_uri = storage.join(search_uri, "parts")
        self.uri = storage.join(search_uri, "leaderboard.parquet")
        self.score = Score.of(space.config.training.objective, space.config.task_kinds)
        usual = [
            m
            for kind in space.config.task_kinds.values()
            for m in ((*COUNTED,) if kind.classes else (kind.val_metric,))
        ]
        self.metrics = list(dict.fromkeys([*usual, *([self.score.metric] if self.score.metric else [])]))

    @property
    def schema(self) -> pa.Schema:
        """The columns, equal in every part."""
        texts = ("candidate", "reference", "architecture", "modalities", "fusion", "overrides")
        tasks = self.space.config.model_tasks
        columns = [("trial", pa.int64()), *((name, pa.string()) for name in texts)]
        columns += [(key, arrow_type(p)) for key, p in self.space.parameters.items()]
        columns += [(name, pa.float64()) for name in ("score", "first_score", "loss")]
        columns += [(f"{metric}.{t}", pa.float64()) for metric in self.metrics for t in tasks]
        return pa.schema([*columns, *NUMBERS.items(), ("status", pa.string()), ("reason", pa.string())])

    def write_part(
        self,
        trial: int,
        reference: str | None,
        architecture: Overrides,
        config: Config | None,
        candidates: Sequence[SearchCandidate],
    ) -> None:
        """What is known of a trial's candidates by now. config: of the architecture, None if it has none."""
        rows = [
            LeaderboardRow(
                candidate=f"{trial}-{i}",
                trial=trial,
                reference=reference,
                architecture=f"reference: {reference}" if reference else label_of(architecture),
                modalities="+".join(config.model_modalities) if config else None,
                fusion=config.model.fusion.name if config else None,
                overrides=json.dumps({**architecture, **c.member}),
                score=c.score if np.isfinite(c.score) else None,
                first_score=c.first_score if np.isfinite(c.first_score) else None,
                loss=c.val.loss if c.val is not None else None,
                epochs=c.epochs,
                best_epoch=c.best_epoch,
                seconds=c.seconds,
                status=c.status,
                reason=c.reason,
                finished_at=c.finished_at,
                further=self._further({**architecture, **c.member}, c.val.metrics if c.val else {}),
            )
            for i, c in enumerate(candidates)
            if c.epochs or c.status != "running"
        ]
        if rows:
            uri = storage.join(self.parts_uri, f"{self.digest}-{trial:06d}.parquet")
            storage.write_table(uri, pa.Table.from_pylist([row.to_dict() for row in rows], self.schema))

    def _further(self, overrides: Overrides, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """The values of searched keys and metrics."""
        found = {}
        for key, parameter in self.space.parameters.items():
            if key in overrides:
                found[key] = text_of(overrides[key]) if arrow_type(parameter) == pa.string() else overrides[key]
        for metric in self.metrics:
            found |= {f"{metric}.{t}": value for t, value in metrics.get(metric, {}).items()}
        return found

    def parts(self) -> Iterator[pa.Table]:
        """The parts there are, one after another."""
        for info in storage.list_files(self.parts_uri, f"{self.digest}-*.parquet"):
            yield self._part(info.base_name)

    def _part(self, name: str) -> pa.Table:
        return storage.read_table(storage.join(self.parts_uri, name))

    def close_part(self, trial: int) -> None:
        """The trial was given up: what it still ran is stopped, and is not tried again."""
        name = f"{self.digest}-{trial:06d}.parquet"
        if storage.exists(storage.join(self.parts_uri, name)) and is_running(part := self._part(name)):
            storage.write_table(storage.join(self.parts_uri, name), give_up(part))

    def publish(self) -> int:
        """Write the leaderboard, part by part; returns how many candidates it has."""
        num_rows = 0
        with storage.atomic(self.uri) as (fs, path), pq.ParquetWriter(path, self.schema, filesystem=fs) as writer:
            for part in self.parts():
                writer.write_table(give_up(part))
                num_rows += len(part)
        return num_rows

    def read(self) -> pd.DataFrame:
        """The published leaderboard."""
        return storage.read_table(self.uri).to_pandas()

    def trials(self) -> list[Known]:
        """The trials on disk."""
        found = []
        for part in self.parts():
            row = LeaderboardRow.model_validate(part.slice(0, 1).to_pylist()[0])
            chosen = {} if row.reference else row.chosen
            architecture = {key: chosen[key] for key in self.space.architecture if key in chosen}
            best = pc.max(part["score"]).as_py()
            score = self.score.worst if best is None else best
            found.append(Known(row.trial, row.reference, architecture, score, not is_running(part)))
        return found

    def progress(self) -> tuple[int, float]:
        """What is on disk: candidates of trials that have ended, but for references, and seconds of search so far."""
        num_candidates, elapsed = 0, 0.0
        for part in self.parts():
            num_candidates += 0 if is_running(part) else part["reference"].null_count
            elapsed = max(elapsed, *part.column("finished_at").to_pylist())
        return num_candidates, elapsed


def is_running(part: pa.Table) -> bool:
    """Whether there are candidates in it that nobody has stopped."""
    return bool(pc.any(pc.equal(part["status"], "running")).as_py())


def give_up(part: pa.Table) -> pa.Table:
    """The part, what runs in it stopped."""
    running = pc.equal(part["status"], "running")
    reasons = pc.binary_join_element_wise(
        "its architecture was given up after epoch", part["epochs"].cast(pa.string()), " "
    )
    for name, values in (("status", pa.scalar("stopped")), ("reason", reasons)):
        at = part.schema.get_field_index(name)
        part = part.set_column(at, part.schema.field(name), pc.if_else(running, values, part[name]))
    return part


def arrow_type(parameter: ParameterConfig) -> pa.DataType:
    """The type of a searched key's column; choices are text."""
    if parameter.choice is not None:
        return pa.string()
    return pa.int64() if parameter.int is not None else pa.float64()


def overrides_of(row: Mapping[str, Any]) -> Overrides:
    """What a leaderboard's row has chosen."""
    return dict(json.loads(row["overrides"]))

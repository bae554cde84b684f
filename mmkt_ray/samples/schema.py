"""The sample schema: what a row is between the readers and everything after them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmkt_ray.samples.reading_plan import ReadingPlan

# stages of a reject that stand for something else than one row that could not become a sample
MODALITY = "modality"  # one of the row's modalities was unreadable, the row itself is kept
DAMAGE = "damage"  # the shard itself is damaged: all rows from there on
LEAKAGE = "leakage"  # a row that is left out on request, as it leaks
# members of an archive whose suffix no column maps: sample_id is the suffix; told, but no rejects
UNMAPPED = "unmapped"
REJECT_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("num_rows", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Shard:
    """One input file (or one leaf folder of files) with what identifies its content."""

    source: int  # index into samples.sources
    uri: str  # absolute path or URI
    name: str  # path relative to data_root: the stable part of sample ids
    identity: str  # digest of size and modification time (or etag): changes when the content does

    @property
    def unit(self) -> str:
        """Name of the shard's parts in a store: changes when path, content or reading does."""
        return hashlib.sha256(f"{self.source}|{self.name}|{self.identity}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Reject:
    """A row that could not become a sample, and why."""

    sample_id: str
    source: str  # the shard's name
    stage: str  # read | decode | encode | combine | check, or one of the above
    reason: str
    num_rows: int = 1  # that it stands for; of a damaged shard 0 until they are estimated


def sample_schema(plan: ReadingPlan) -> pa.Schema:
    """Columns of a chunk of samples: sample_id, split, key, one per modality, one per task (class names), `cleaned`.

    `cleaned` lists what was normalised in the row, `text: control characters`; null where nothing was.
    """
    columns = [("sample_id", pa.string()), ("split", pa.string()), ("key", pa.string())]
    columns += [(name, kind.arrow_type) for name, kind in sorted(plan.modalities.items())]
    columns += [(name, task.kind.arrow_type) for name, task in sorted(plan.tasks.items())]
    return pa.schema([*columns, ("cleaned", pa.list_(pa.string()))])


def train_rows(samples: pa.Table, leaking: Sequence[str]) -> pa.Table:
    """The samples of the train split, without those whose id is in `leaking`."""
    train = samples.filter(pc.equal(samples.column("split"), "train"))
    if not leaking:
        return train
    return train.filter(pc.invert(pc.is_in(train.column("sample_id"), pa.array(leaking, pa.string()))))


def count_stages(rejects: pa.Table) -> Counter[str]:
    """Stage -> rows that rejects of it stand for."""
    counts = rejects.group_by("stage").aggregate([("num_rows", "sum")]).to_pylist()
    return Counter({row["stage"]: row["num_rows_sum"] for row in counts})


def reject_table(rejects: list[Reject]) -> pa.Table:
    """Rejects as a table of REJECT_SCHEMA."""
    rows: list[dict[str, Any]] = [vars(r) for r in rejects]
    return pa.Table.from_pylist(rows, schema=REJECT_SCHEMA)

"""What can be said of all rows without reading their content:
split names, and whether the files that they name are there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmkt_ray.samples.addresses import is_address
from mmkt_ray.samples.columns import Reading
from mmkt_ray.samples.files import FileReader
from mmkt_ray.samples.manifests import is_missing
from mmkt_ray.samples.readers import has_column, read_blocks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Shard
from mmkt_ray.samples.splits import normalise_split


@dataclass(frozen=True)
class Survey:
    """One column of a source."""

    column: str
    num_rows: int  # that were looked at
    whole: bool  # these are all rows
    reasons: list[str]  # one for each row that will be rejected or lose a modality


def survey_source(plan: ReadingPlan, shards: Sequence[Shard], seconds: float) -> list[Survey]:
    """A look at each column of a plan's only source that is cheap to look at, in at most so many seconds for each.

    A Parquet shard gives up its split column by itself, and a manifest is text. Archives and folders are not read.
    Raises: DataError for a shard that lacks the column.
    """
    (source,) = plan.sources
    cheap = []
    if source.reader in ("parquet", "manifest") and "split" in source.columns and source.split is None:
        cheap.append("split")
    if source.reader == "manifest":
        cheap += [
            m for m, kind in plan.modalities.items() if m in source.columns and kind.is_file and not kind.takes_several
        ]
    return [_survey(plan, column, shards, time.monotonic() + seconds) for column in cheap]


def _survey(plan: ReadingPlan, column: str, shards: Sequence[Shard], until: float) -> Survey:
    num_rows = 0
    reasons: list[str] = []
    for shard in shards:
        reading = Reading(plan, shard)
        if reading.source.absent == "null" and not has_column(plan, shard, column):
            continue
        files = FileReader(reading)
        for cell in _cells(reading.as_text(column)):
            if time.monotonic() > until:
                return Survey(column, num_rows, False, reasons)
            num_rows += 1
            if column != "split" and cell and reading.source.allow_http and is_address(cell):
                continue  # is fetched when it is read
            if why := _unknown_split(cell) if column == "split" else _no_file(files, cell):
                reasons.append(why if column == "split" else f"{column}: {why}")
    return Survey(column, num_rows, True, reasons)


def _cells(reading: Reading) -> Iterator[str | None]:
    for block in read_blocks(reading):
        if "split" in block.columns:
            yield from block.columns["split"].to_pylist()


def _unknown_split(cell: str | None) -> str:
    try:
        normalise_split(cell or "train")
    except ValueError as error:
        return str(error)
    return ""


def _no_file(files: FileReader, cell: str | None) -> str:
    try:
        if not is_missing(cell):
            files.find(str(cell))
    except ValueError as error:
        return str(error)
    return ""

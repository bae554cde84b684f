"""Whether the files that tables name are there: a sample of the paths, from all over the tables."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from mmkt_ray.config import Config
from mmkt_ray.errors import UserError
from mmkt_ray.samples.cells import FILE_KINDS
from mmkt_ray.samples.columns import Reading
from mmkt_ray.samples.files import FileReader
from mmkt_ray.samples.manifests import raw_rows
from mmkt_ray.samples.readers import list_shards

SAMPLE = 100  # paths that are looked at, of each source
MOST_ROWS = 20_000  # of a shard, among which they are chosen
MOST_SHARDS = 5


def look_at_files(config: Config) -> Iterator[tuple[str, str, float]]:
    """For each source of tables with paths: its name, what was found, and the share of the sampled files that cannot be read."""
    kinds = {m: modality.kind for m, modality in config.modalities.items()}
    for number, source in enumerate(config.samples.sources):
        columns = [theirs for ours, theirs in source.columns.items() if kinds.get(ours) in FILE_KINDS]
        if source.reader != "manifest" or not columns:
            continue
        try:
            outcomes = list(_outcomes(config, number, columns))
        except UserError:  # told by whoever looks at the source as a whole
            continue
        faults = [outcome for outcome in outcomes if isinstance(outcome, ValueError)]
        if outcomes:
            told = f"{len(outcomes) - len(faults)} of {len(outcomes)} sampled files are there"
            text = f"{told}; the first that is not: {faults[0]}" if faults else told
            yield f"files of source {number} ({source.path})", text, len(faults) / len(outcomes)


def _outcomes(config: Config, number: int, columns: list[str]) -> Iterator[bytes | ValueError]:
    """What reading each of some files of a source gives, spread evenly over its shards and their rows."""
    shards = [shard for shard in list_shards(config) if shard.source == number]
    chosen = shards[:: max(1, len(shards) // MOST_SHARDS)][:MOST_SHARDS]
    for shard in chosen:
        reading = Reading(config, shard)
        files = FileReader(reading)
        rows = [placed[1] for placed in islice(raw_rows(reading), MOST_ROWS) if isinstance(placed, tuple)]
        cells = [row[name] for row in rows for name in columns if isinstance(row.get(name), str) and row[name] not in ("", "nan")]
        yield from map(files.read_cell, cells[:: max(1, len(cells) * len(chosen) // SAMPLE)])

"""What a pipeline counts while parts come in: rows, rejects and seconds. It stops a run that rejects too many rows.

Called by extract.py.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable

import ray.data

from mmkt_ray.config.samples_config import SamplesConfig
from mmkt_ray.features.manifest import Speed
from mmkt_ray.features.publish import check_budget, is_spent, num_rejected, tell_counts
from mmkt_ray.samples.schema import DAMAGE, MODALITY

log = logging.getLogger(__name__)

BUDGET_GRACE_ROWS = 1000  # rows before the reject budget is first checked in a run
PROGRESS_EVERY_S = 5.0


class ShardSizes:
    """Rows of the largest shard of which all parts have come."""

    def __init__(self) -> None:
        self.largest = 0
        self._parts: Counter[str] = Counter()  # of a unit, so far
        self._rows: Counter[str] = Counter()
        self._ends: dict[str, int] = {}  # unit -> number of its parts

    def add(self, part: str, num_rows: int) -> None:
        """A part's name, and its rows, rejected ones included."""
        unit, index, *end = part.removesuffix(".parquet").split("-")
        self._parts[unit] += 1
        self._rows[unit] += num_rows
        if end:
            self._ends[unit] = int(index) + 1
        if self._parts[unit] == self._ends.get(unit):
            self.largest = max(self.largest, self._rows.pop(unit))


class RunStats:
    """Counts rows, rejects and seconds as parts come in; tells progress;
    stops the job when too many rows are rejected."""

    def __init__(self, uri: str, samples: SamplesConfig | None = None, names: dict[str, str] | None = None) -> None:
        """uri: of the store that the parts go to. samples: None where rows cannot be lost.
        names: unit -> shard name."""
        self.uri, self.samples, self.names = uri, samples, names or {}
        self.num_rows = 0
        self.lost: Counter[str] = Counter()  # stage -> rows
        self.seconds: Counter[str] = Counter()
        self.checksums: dict[str, str] = {}  # by part
        self.sizes = ShardSizes()
        self.wall_s = self.startup_s = 0.0

    def follow(self, parts: ray.data.Dataset, on_part: Callable[[str], None]) -> None:
        """Run the pipeline to its end, calling `on_part` with each part's name. Raises: DataError when the reject
        budget is spent."""
        start = logged = time.perf_counter()
        for part in parts.iter_rows():
            self.num_rows += part["num_rows"]
            self.lost.update(json.loads(part["lost"]))
            self.checksums[part["name"]] = part["checksum"]
            on_part(part["name"])
            seconds = json.loads(part["seconds"])
            self.seconds.update(seconds)
            self.wall_s = time.perf_counter() - start
            # until the first part is there, less the work on it: processes, imports, loading encoders
            self.startup_s = self.startup_s or self.wall_s - sum(seconds.values())
            if time.perf_counter() - logged > PROGRESS_EVERY_S:
                logged = time.perf_counter()
                log.info("%s, %.0f rows/s", tell_counts(self.num_rows, self.lost), self.num_rows / self.wall_s)
            self.sizes.add(part["name"], part["num_rows"] + num_rejected(Counter(json.loads(part["lost"]))))
            if self.samples is not None:
                self._check_budget(self.samples)
        log.info("%s in %.1f s", tell_counts(self.num_rows, self.lost), self.wall_s)

    def _check_budget(self, samples: SamplesConfig) -> None:
        """Compare rejects with the rows read so far, and damaged shards with an estimate of all rows: twice the rows
        of the largest shard, for each shard. (One of the first ten shards may be a thousandth of all.) Raises:
        DataError."""
        rows = Counter({stage: n for stage, n in self.lost.items() if stage != DAMAGE})
        if self.num_rows + num_rejected(rows) >= BUDGET_GRACE_ROWS:
            check_budget(self.uri, samples, self.num_rows, rows, self.names)
        lost, likely = num_rejected(self.lost), len(self.names) * self.sizes.largest
        if (
            self.lost[DAMAGE]
            and likely
            and is_spent(samples, lost + self.lost[MODALITY], max(self.num_rows + lost, 2 * likely))
        ):
            check_budget(self.uri, samples, max(self.num_rows, likely - lost), self.lost, self.names, estimated=True)

    def speed(self) -> Speed | None:
        """For the manifest; None when nothing was run."""
        if not self.wall_s:
            return None
        return Speed(
            stages={k: round(v, 3) for k, v in sorted(self.seconds.items())},
            wall_s=round(self.wall_s, 3),
            startup_s=round(self.startup_s, 3),
            rows_per_s=round((self.num_rows + num_rejected(self.lost)) / self.wall_s, 1),
        )

"""The reject budget: what is put up with, what stops a job, and what the message says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmkt_ray import storage
from mmkt_ray.config.samples_config import SamplesConfig
from mmkt_ray.errors import DataError
from mmkt_ray.features.chunks import part_name
from mmkt_ray.features.dropping import read_rejects
from mmkt_ray.features.publish import check_budget, count_reasons, count_unmapped, tell_counts
from mmkt_ray.features.run_stats import RunStats
from mmkt_ray.samples.schema import DAMAGE, LEAKAGE, MODALITY, UNMAPPED, Reject, count_stages, reject_table

SOURCE = {"reader": "parquet", "path": "a", "columns": {"text": "t"}}


def check(num_rows: int, lost: dict[str, int], uri: str = "/nowhere", **budget: float) -> None:
    check_budget(
        uri, SamplesConfig.model_validate({"sources": [SOURCE], **budget}), num_rows, Counter(lost), {"u": "a/0.tar"}
    )


@pytest.mark.parametrize(
    ("num_rows", "lost", "is_fine"),
    [
        (53, {"read": 1}, True),  # one bad file of 54
        (54, {MODALITY: 10}, True),
        (54, {MODALITY: 5, "read": 6}, False),
        (20, {"decode": 10}, True),
        (8, {"decode": 8, LEAKAGE: 900}, True),  # half of what was not left out on request
        (7, {"decode": 8}, False),
        (0, {"decode": 8}, False),  # 8 of 8 rows: the config is wrong, not the rows
        (8, {MODALITY: 8}, False),
        (9_900, {"read": 100}, True),
        (9_899, {"read": 101}, False),
        (900, {DAMAGE: 300}, False),
        (1000, {UNMAPPED: 4000}, True),
    ],
)
def test_a_few_rows_are_put_up_with_and_most_rows_never(num_rows: int, lost: dict[str, int], is_fine: bool) -> None:
    """Catches one bad file of 54 rows that stops a run; and a fault that hits every row of a small set,
    let through."""
    if is_fine:
        check(num_rows, lost)
        return
    with pytest.raises(
        DataError, match="mend the data, or allow it" if num_rows else "mend the data, or name other columns"
    ):
        check(num_rows, lost)


def test_both_limits_can_be_set() -> None:
    """Catches a minimum that cannot be taken away."""
    check(53, {"read": 1}, min_reject_budget=1)
    with pytest.raises(DataError, match=r"--set samples.max_reject_frac=0.019 \(predict: --max-reject-frac 0.019\)"):
        check(53, {"read": 1}, min_reject_budget=0)
    check(53, {"read": 1}, min_reject_budget=0, max_reject_frac=0.019)


def test_the_message_names_file_row_and_reason(tmp_path: Path) -> None:
    """Catches reasons whose numbers and names are blanked, rows that nobody can find (10 is not before 7), two kinds
    of loss in one number,
    and what is no loss (members that no column maps, rows left out on request) told as the most frequent one."""
    rejects = [
        Reject("a/0.tar#10", "u", "read", "not valid JSON: Unexpected UTF-8 BOM (decode using utf-8-sig): line 3"),
        Reject("a/0.tar#7", "u", "read", "not valid JSON: Unexpected UTF-8 BOM (decode using utf-8-sig): line 1"),
        Reject("mine", "u", MODALITY, "image: no file 'x.png'"),
        Reject("a/0.tar", "u", DAMAGE, "the shard is damaged", 300),
        Reject("jpg", "u", UNMAPPED, "no column maps this suffix", 4000),
        Reject("b", "u", LEAKAGE, "the same content is in val or test", 500),
    ]
    storage.write_table(str(tmp_path / "rejects" / "u-000000-end.parquet"), reject_table(rejects))
    storage.write_table(str(tmp_path / "rejects" / "gone-000000-end.parquet"), reject_table(rejects))
    with pytest.raises(DataError) as told:
        check(698, dict(count_stages(reject_table(rejects))), str(tmp_path))
    text = str(told.value)
    assert text.startswith(
        "302 of 1,000 rows were rejected (about 300 of them in damaged shards) and 1 lost a modality"
    )
    assert "300 x the shard is damaged (first: a/0.tar)" in text
    assert "2 x not valid JSON: Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 (first: a/0.tar#7)" in text
    assert "1 x image: no file 'x.png' (first: mine in a/0.tar)" in text
    assert "no column maps" not in text
    assert "val or test" not in text


class Parts:
    """What comes out of the pipeline: two parts of each of so many shards, of which some are damaged."""

    def __init__(self, uri: str, num_shards: int, damaged: set[int]) -> None:
        self.uri, self.num_shards, self.damaged, self.taken = uri, num_shards, damaged, 0

    def iter_rows(self) -> Iterator[dict[str, object]]:
        for shard in range(self.num_shards):
            self.taken += 1
            lost = {DAMAGE: 10} if shard in self.damaged else {}
            for last in (False, True):
                name = part_name(f"u{shard}", int(last), last)
                if last and lost:
                    reject = Reject("a", "s", DAMAGE, "the shard is damaged", 10)
                    storage.write_table(f"{self.uri}/rejects/{name}", reject_table([reject]))
                told = lost if last else {}
                num_rows = 0 if told else 10
                yield {"name": name, "num_rows": num_rows, "checksum": "", "seconds": "{}", "lost": json.dumps(told)}


@pytest.mark.parametrize(
    ("num_shards", "damaged", "taken"),
    [
        (8, {1}, 2),  # of eight shards one is too much, whatever follows
        (8, {0}, 1),
        (400, {0}, 400),  # a four hundredth is allowed: no reason to stop at the first shard
        (400, set(range(8)), 400),  # 80 rows of 8,000: as much as is allowed
        (400, set(range(0, 400, 4)), 65),  # the 17th of them: 170 rows are more than a hundredth of 16,000
    ],
)
def test_a_damaged_shard_stops_a_job_as_soon_as_it_must(
    tmp_path: Path, num_shards: int, damaged: set[int], taken: int
) -> None:
    """Catches hours of work on a data set that is refused at its end,
    and a job that stops for a share that is allowed."""
    parts = Parts(str(tmp_path), num_shards, damaged)
    samples = SamplesConfig.model_validate({"sources": [SOURCE], "max_reject_frac": 0.01, "min_reject_budget": 0})
    stats = RunStats(str(tmp_path), samples, {f"u{i}": f"{i}.parquet" for i in range(num_shards)})
    if taken < num_shards:
        with pytest.raises(DataError, match=r"in damaged shards.*the shard is damaged"):
            stats.follow(parts, lambda name: None)  # type: ignore[arg-type]
    else:
        stats.follow(parts, lambda name: None)  # type: ignore[arg-type]
    assert parts.taken == taken


def test_notes_are_counted_apart() -> None:
    """Catches members that no column maps counted as rejected rows."""
    notes = [Reject("json", "a", UNMAPPED, "-", 5), Reject("json", "b", UNMAPPED, "-", 7)]
    table = reject_table([*notes, Reject("x", "a", "read", "-")])
    assert count_unmapped(table) == {"json": 12}
    assert tell_counts(10, count_stages(table) + Counter({MODALITY: 2})) == (
        "10 rows, 1 rejected, 2 kept without an unreadable modality"
    )


def test_rejects_of_before_are_one_row_each(tmp_path: Path) -> None:
    """Catches a run that cannot go on with what an earlier version wrote."""
    old = reject_table([Reject("x", "u", "read", "why")]).drop_columns("num_rows")
    storage.write_table(str(tmp_path / "old.parquet"), old)
    assert [told.num_rows for told in count_reasons(read_rejects(str(tmp_path / "old.parquet")))] == [1]

"""Which split a row belongs to: as given, or drawn by a hash, stable under reordering and growth."""

from __future__ import annotations

import hashlib

from mmkt_ray.config import SourceConfig
from mmkt_ray.samples.reading_plan import ReadingPlan

_SPELLINGS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def normalise_split(given: str) -> str:
    """train, val or test for any usual spelling. Raises: ValueError for any other word."""
    split = _SPELLINGS.get(given.strip().lower())
    if split is None:
        raise ValueError(f"unknown split '{given}': known: {', '.join(_SPELLINGS)}")
    return split


def split_in_name(name: str) -> str | None:
    """The split that a folder's name is or ends in, as `train` or `set-train`; None if it says none."""
    return _SPELLINGS.get(name.lower().replace("_", "-").rpartition("-")[2])


def assign_split(sample_id: str, key: str | None, given: str | None, plan: ReadingPlan, source: SourceConfig) -> str:
    """The split of one row: train, val or test.

    A source's own `split` outranks the row's `given` one. Rows without any are drawn by the fractions of
    `samples.split`. Given train rows give `val_frac` of themselves to val where no source of the config says
    which rows are val: none has `split: val`, none maps a split column. What is drawn depends on the sample
    id and `split.draw` alone, or under `combine: join` on the key, so that the partners of a sample never part.

    Raises: ValueError if the given split is no known word.
    """
    fractions = plan.split
    drawn_by = key if key is not None and plan.joins else sample_id
    if source.split is not None or given is not None:
        split = source.split or normalise_split(given or "")
        lacks_val = split == "train" and fractions.val_frac > 0 and not _any_source_gives_val(plan)
        return "val" if lacks_val and _draw(drawn_by, fractions.draw) < fractions.val_frac else split
    drawn = _draw(drawn_by, fractions.draw)
    if drawn < fractions.test_frac:
        return "test"
    return "val" if drawn < fractions.test_frac + fractions.val_frac else "train"


def _any_source_gives_val(plan: ReadingPlan) -> bool:
    return any(source.split == "val" or "split" in source.columns for source in plan.sources)


def _draw(text: str, number: int) -> float:
    """A number in [0, 1) that depends on `text` and on which draw it is alone."""
    text = f"{number}/{text}" if number else text
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64

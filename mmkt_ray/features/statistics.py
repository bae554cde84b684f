"""What one task of a fit does: statistics of the train rows of one shard (encoders) or of one stored part (reducers)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc
import ray

from mmkt_ray import storage
from mmkt_ray.encoders.base import EncoderSection
from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.features.store import column_of, from_arrow
from mmkt_ray.samples.plan import ReadingPlan
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.schema import Shard, train_rows


def encoder_statistics(
    section: EncoderSection, plan: ReadingPlan, modality: str, shard: Shard, leaking: Sequence[str]
) -> Any:
    """An encoder's statistics of one shard's train rows, those with an id in `leaking` left out; None if it has none.

    Holds one chunk and the merged statistics.
    """
    encoder: Any = build_encoder(section)
    total = None
    for chunk in read_chunks(plan, shard):
        train = train_rows(chunk.table, leaking).column(modality).drop_null()
        if len(train):
            part = encoder.partial(plan.modalities[modality].values(train))
            total = part if total is None else encoder.merge([total, part])
    return total


def reducer_statistics(reducer: ray.ObjectRef, part: str, modality: str, dim: int) -> Any:
    """Statistics of one part's train rows; None if it has none."""
    table = storage.read_table(part, ["split", column_of(modality)])
    column = table.filter(pc.equal(table.column("split"), "train")).column(column_of(modality)).drop_null()
    return ray.get(reducer).partial(from_arrow(column, dim)[0]) if len(column) else None

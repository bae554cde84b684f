"""One Ray task of a fit: statistics of the train rows of a shard (encoders) or of a stored part (reducers)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc
import ray

from mmkt_ray import storage
from mmkt_ray.config.samples_config import SamplesConfig
from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.encoders.encoder import EncoderSection
from mmkt_ray.features.decode import decode_column
from mmkt_ray.features.store import column_of, from_arrow
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Shard, train_rows


def encoder_statistics(
    section: EncoderSection, plan: ReadingPlan, samples: SamplesConfig, shard: Shard, leaking: Sequence[str]
) -> Any:
    """An encoder's statistics of one shard's train rows, those with an id in `leaking` left out; None if it has none.

    plan: of the encoder's modality alone. Broken values are left out too: extraction will reject them.
    Holds one chunk and the merged statistics.
    """
    encoder: Any = build_encoder(section)
    ((modality, kind),) = plan.modalities.items()
    total = None
    for chunk in read_chunks(plan, shard):
        train = train_rows(chunk.table, leaking).column(modality).drop_null()
        values = kind.values(train) if not kind.decoder else []
        if kind.decoder:
            decoded = decode_column(train, kind, encoder, samples)
            values = [value for value in decoded.values if value is not None]
        if kind.pooled:
            values = [item for several in values for item in several]
        if values:
            part = encoder.partial(values)
            total = part if total is None else encoder.merge([total, part])
    return total


def reducer_statistics(reducer: ray.ObjectRef, part: str, modality: str, dim: int, task: str | None) -> Any:
    """Statistics of one part's train rows, of those with a label where they need the labels of a task;
    None if it has none."""
    columns = [column_of(modality), *([task] if task is not None else [])]
    table = storage.read_table(part, ["split", *columns])
    rows = table.filter(pc.equal(table.column("split"), "train")).select(columns).drop_null()
    if not len(rows):
        return None
    features = from_arrow(rows.column(0), dim)[0]
    labels = [] if task is None else [rows.column(1).to_pylist()]
    return ray.get(reducer).partial(features, *labels)

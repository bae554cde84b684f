"""Finds train rows whose content is in val or test too, so that no encoder is fitted on them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from mmkt_ray import cluster, storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.config.samples_config import SamplesConfig
from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.encoders.encoder import EncoderSection, fit_of
from mmkt_ray.features.audit import leaking_rows, read_contents
from mmkt_ray.features.decode import decode_column
from mmkt_ray.features.resume import reading_layout
from mmkt_ray.features.store import hash_of
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Shard

log = logging.getLogger(__name__)


def find_leaking(
    plan: ReadingPlan, samples: SamplesConfig, encoders: Mapping[str, EncoderSection], uri: str, shards: list[Shard]
) -> dict[str, list[str]]:
    """Ids of train rows whose whole content is in val or test too, by the unit of their shard (if it has any).

    encoders: by modality; their input size decides how images are decoded, and so which are equal.
    Reads and decodes every shard once and keeps the hashes in the folder `uri`: another call takes them from there.
    """
    cluster.connect()
    hash_one = ray.remote(hash_shard)
    ray.get([hash_one.remote(plan, samples, encoders, shard, uri) for shard in shards])
    parts = [f"{shard.unit}.parquet" for shard in shards]
    contents = read_contents(uri, parts, sorted(plan.modalities))
    found = {}
    for shard, leaks in zip(shards, np.split(leaking_rows(contents), np.cumsum(contents.lengths)[:-1]), strict=True):
        if leaks.any():
            ids = storage.read_table(storage.join(uri, "data", f"{shard.unit}.parquet"), ["sample_id"]).column(0)
            found[shard.unit] = ids.filter(pa.array(leaks)).to_pylist()
    log.info("%d train rows are in val or test too: no encoder is fitted on them", sum(map(len, found.values())))
    return found


def hash_shard(
    plan: ReadingPlan, samples: SamplesConfig, encoders: Mapping[str, EncoderSection], shard: Shard, uri: str
) -> None:
    """Write ids, splits and hashes of the content of a shard's rows, named and typed as in a store's part."""
    target = storage.join(uri, "data", f"{shard.unit}.parquet")
    if storage.exists(target):
        return
    names, built = sorted(plan.modalities), {m: build_encoder(section) for m, section in encoders.items()}
    schema = pa.schema(
        [("sample_id", pa.string()), ("split", pa.string()), *((hash_of(m), pa.uint64()) for m in names)]
    )
    with storage.atomic(target) as (fs, path), pq.ParquetWriter(path, schema, filesystem=fs) as writer:
        for chunk in read_chunks(plan, shard):
            columns = {name: chunk.table.column(name) for name in ("sample_id", "split")}
            for modality in names:
                column, kind = chunk.table.column(modality), plan.modalities[modality]
                # the same as the pipeline writes to a store: None where the modality is absent or can't be decoded
                columns[hash_of(modality)] = decode_column(
                    column, kind, built[modality], samples, only_hashes=True
                ).hashes
            writer.write_table(pa.table(columns, schema=schema))


def drops_rows(config: Config) -> bool:
    """Whether leaking rows are left out before combining. With join and pair, combined samples are."""
    return config.samples.drop_leakage and config.samples.combine.name == "union"


def leaking_train_rows(config: Config, run_uri: str, shards: list[Shard]) -> dict[str, list[str]]:
    """Unit of a shard -> ids of its train rows that will be left out, so that no encoder is fitted on them."""
    sections = [modality.encoder for modality in config.modalities.values()]
    if not drops_rows(config) or all(fit_of(build_encoder(section)) == "none" for section in sections):
        return {}
    uri = storage.join(run_uri, "features", f"contents-{fingerprint(reading_layout(config))}")
    encoders = {m: modality.encoder for m, modality in config.modalities.items()}
    return find_leaking(ReadingPlan.of(config), config.samples, encoders, uri, shards)

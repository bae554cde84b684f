"""Raw shards -> feature store: one lazy Ray Data chain, resumable chunk by chunk.

Called by steps.py; reads by samples/readers.py; the store that it leaves is opened by training/trainer.py.

    shards -> read (Ray tasks) -> encode (actor pool, on GPUs where there are any) -> write (Ray tasks) -> publish

It leaves a store `encoded-<fingerprint>` and, where a modality has a reducer, `reduced-<fingerprint>`. Joined or
paired samples are one more store (combine.py).
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from typing import Any

import ray.data

from mmkt_ray import cluster, progress, storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.encoders.build import load_reducer, read_encoder_card
from mmkt_ray.errors import DataError
from mmkt_ray.features.chunks import read_shard, write_part
from mmkt_ray.features.combine import combine
from mmkt_ray.features.decode import decode_chunk
from mmkt_ray.features.encode import EncodeChunk, EncodePlan, reduce_part
from mmkt_ray.features.fit import encoded_by_user, fit_encoders, fit_reducers
from mmkt_ray.features.leakage import drops_rows, leaking_train_rows
from mmkt_ray.features.manifest import ModalityFeatures
from mmkt_ray.features.publish import Origin, publish, published, tell_reasons
from mmkt_ray.features.resume import find_reusable, reading_layout, same_length, stored_chunks
from mmkt_ray.features.run_stats import RunStats
from mmkt_ray.features.siblings import copy_store_from_sibling
from mmkt_ray.features.store import Store
from mmkt_ray.samples.lines import that_may_be_cut
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Shard
from mmkt_ray.samples.shards import list_shards

log = logging.getLogger(__name__)

READ_CPUS = 0.5  # differs from an actor's on purpose: equal demands would fuse reading into the encoder actors
GPU_CHUNKS = 2  # in flight in an actor with a GPU: while one is unpacked and packed, the other is on the device


def extract(config: Config, run_uri: str) -> Store:
    """Fit what has to be fitted, encode, reduce and combine; each step is skipped where its result is there already.

    Raises: ConfigError, DataError (bad paths, too many rejects), ResourceError (the cluster can't place the work).
    """
    shards = list_shards(ReadingPlan.of(config))
    encoders = fit_encoders(config, run_uri, shards, leaking_train_rows(config, run_uri, shards))
    encoded = encode(config, run_uri, shards, encoders)
    check_not_empty(encoded)
    reduced = reduce(config, run_uri, encoded, fit_reducers(config, run_uri, encoded))
    return combine(config, run_uri, reduced)


def check_not_empty(store: Store) -> None:
    """Raises: DataError for a modality or a task that no row has:
    most likely its column is mapped to the wrong name."""
    counts = store.manifest.counts
    empty = [f"modality '{m}'" for m, by_split in counts.missing.items() if sum(by_split.values()) == counts.rows]
    empty += [f"task '{t}'" for t, by_split in counts.by_task.items() if not by_split]
    if empty:
        raise DataError(
            f"{' and '.join(empty)}: null in all {counts.rows} rows; check what the sources' columns map it to "
            "(a tar suffix or a json field that is misspelt is a null, not an error)"
            + tell_reasons(Counter(store.manifest.reject_reasons))
        )


def encode(config: Config, run_uri: str, shards: list[Shard], encoders: dict[str, str]) -> Store:
    """Encode all shards; returns their store. encoders: modality -> folder of the fitted encoder."""
    cards = {m: read_encoder_card(uri) for m, uri in sorted(encoders.items())}
    layout = fingerprint(reading_layout(config))
    plan: dict[str, Any] = {"layout": layout, "encoders": {m: c.fingerprint for m, c in cards.items()}}
    if drops_rows(config):
        plan["drop_leakage"] = True
        layout += "-without-leakage"  # reducers are fitted on the rows that stay
    if config.samples.combine.name == "join":
        plan["ids"] = "once in each source"
    uri = storage.join(run_uri, "features", f"encoded-{fingerprint(plan)}")
    units = [shard.unit for shard in shards]
    done, complete = stored_chunks(uri)
    if store := published(uri, units):
        log.info("features are up to date: %s", uri)
        return store
    if not encoded_by_user(config) and (store := copy_store_from_sibling(run_uri, uri, units)):
        return store
    todo = [shard for shard in shards if shard.unit not in complete]
    stats = RunStats(uri, config.samples, {s.unit: s.name for s in shards})
    if todo:
        storage.make_dir(uri)
        storage.write_json(storage.join(uri, "plan.json"), plan)
        if cut := that_may_be_cut(shards):
            message = (
                "'%s'%s ends without a line end, unlike other shards of its source: it may be cut within its last "
                "cell"
            )
            log.warning(message, cut[0], f" and {len(cut) - 1} more" if cut[1:] else "")
        log.info("encoding %d of %d shards (%s)", len(todo), len(shards), ", ".join(sorted(cards)))
        run_encode(config, uri, todo, done, encoders, find_reusable(run_uri, uri, plan), stats)
    modalities = {
        m: ModalityFeatures(
            dim=c.dim,
            sparse=c.sparse,
            kind=config.modalities[m].kind.name,
            encoder=c.config,
            reduce=None,
            fingerprint=c.fingerprint,
            folders=[encoders[m].rsplit("/", 1)[-1]],
            found=c.found,
        )
        for m, c in cards.items()
    }
    return publish(uri, config, Origin(units, shards, layout), modalities, stats.speed(), stats.checksums)


def encoder_pool(config: Config, resources: cluster.Resources) -> tuple[int, float]:
    """Number of encoder actors, and GPUs of each. Where the config leaves it open, there are as many actors as the
    GPUs hold, or one for two logical CPUs."""
    num_gpus = config.extract.num_gpus if config.extract.num_gpus is not None else float(resources.num_gpus > 0)
    default = cluster.gpu_places(resources, num_gpus) if num_gpus else resources.num_cpus // 2
    return config.extract.num_actors or max(1, int(default)), num_gpus


def chunks_in_flight(num_gpus: float) -> int:
    """Chunks that an encoder actor works on at once. A CPU has nothing that could run beside the network."""
    return GPU_CHUNKS if num_gpus else 1


def run_encode(
    config: Config,
    uri: str,
    todo: list[Shard],
    done: dict[str, set[int]],
    encoders: dict[str, str],
    reuse: dict[str, str],
    stats: RunStats,
) -> None:
    """The pipeline on Ray Data: read, decode, encode, write."""
    resources = cluster.connect()
    num_actors, num_gpus = encoder_pool(config, resources)
    cluster.check_fits(resources, num_actors, 1, num_gpus)
    in_flight, gpu_frac = chunks_in_flight(num_gpus), min(1.0, num_gpus or 1.0)
    num_threads = max(1, cluster.cores() // num_actors)
    plan = EncodePlan(config, encoders, reuse, use_gpu=num_gpus > 0, num_threads=num_threads, gpu_frac=gpu_frac)
    with cluster.one_row_blocks():
        chunks = ray.data.from_items([vars(shard) for shard in todo], override_num_blocks=len(todo))
        chunks = chunks.map_batches(
            partial(read_shard, plan=ReadingPlan.of(config), done=done), batch_size=1, num_cpus=READ_CPUS
        )
        if num_gpus:
            chunks = chunks.map_batches(
                partial(decode_chunk, config=config), batch_size=1, batch_format="pyarrow", num_cpus=1
            )
        features = chunks.map_batches(
            EncodeChunk,
            fn_constructor_args=(plan,),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            num_gpus=num_gpus,
            compute=ray.data.ActorPoolStrategy(
                size=num_actors,
                max_concurrent_calls_per_actor=in_flight,
                enable_true_multi_threading=in_flight > 1,  # in threads that share the encoders
            ),
        )
        write = partial(write_part, store_uri=uri)
        parts = features.map_batches(write, batch_size=1, batch_format="pyarrow", num_cpus=READ_CPUS)
        with progress.stage("encode", len(todo), "shards") as shown:
            stats.follow(parts, lambda name: shown.advance(name.endswith("-end.parquet")))


def reduce(config: Config, run_uri: str, encoded: Store, reducers: dict[str, str]) -> Store:
    """Reduce the features of a store; returns the reduced store, or `encoded` itself if there are no reducers.

    reducers: modality -> folder of the fitted reducer.
    """
    if not reducers:
        return encoded
    cards = {m: read_encoder_card(uri) for m, uri in sorted(reducers.items())}
    plan = {"encoded": encoded.uri.rsplit("/", 1)[-1], "reducers": {m: c.fingerprint for m, c in cards.items()}}
    uri = storage.join(run_uri, "features", f"reduced-{fingerprint(plan)}")
    units = encoded.manifest.units
    if store := published(uri, units, source=encoded):
        log.info("reduced features are up to date: %s", uri)
        return store
    if not encoded_by_user(config) and (store := copy_store_from_sibling(run_uri, uri, units, encoded)):
        return store
    present = {f.base_name for f in storage.list_files(storage.join(uri, "data"), "*.parquet")}
    todo = [
        name for name in encoded.manifest.parts if name not in present or not same_length(encoded.uri, uri, name)
    ]
    stats = RunStats(uri)
    if todo:
        storage.make_dir(uri)
        loaded = {m: load_reducer(folder) for m, folder in reducers.items()}
        cluster.connect()
        dims, dtype = {m: encoded.dim(m) for m in loaded}, config.extract.feature_dtype
        work = partial(reduce_part, source_uri=encoded.uri, reducers=loaded, dims=dims, dtype=dtype)
        with cluster.one_row_blocks():
            names = ray.data.from_items([{"name": name} for name in todo], override_num_blocks=min(len(todo), 64))
            reduced = names.map_batches(work, batch_size=1)
            parts = reduced.map_batches(partial(write_part, store_uri=uri), batch_size=1, batch_format="pyarrow")
            with progress.stage("reduce", len(todo), "parts") as shown:
                stats.follow(parts, lambda _: shown.advance())
    modalities = dict(encoded.manifest.modalities)
    for m, card in cards.items():
        own = modalities[m]
        modalities[m] = own.replaced(
            dim=card.dim,
            sparse=card.sparse,
            reduce=card.config,
            fingerprint=fingerprint([own.fingerprint, card.fingerprint]),
            folders=[*own.folders, reducers[m].rsplit("/", 1)[-1]],
            found=own.found | card.found,
        )
    return publish(uri, config, Origin(units, source=encoded), modalities, stats.speed(), stats.checksums)

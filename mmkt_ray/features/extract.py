"""Raw shards -> feature store: one lazy Ray Data chain, resumable chunk by chunk.

Called by steps.py; reads by samples/readers.py; the store that it leaves is opened by training/trainer.py.

    shards -> read (Ray tasks) -> encode (actor pool, on GPUs where there are any) -> write (Ray tasks) -> publish

It leaves a store `encoded-<fingerprint>` and, where a modality has a reducer, `reduced-<fingerprint>`. Joined or
paired samples are one more store (combine.py).
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow.parquet as pq
import ray.data

from mmkt_ray import cluster, progress, storage
from mmkt_ray.config import Config, fingerprint
from mmkt_ray.config.samples import SamplesConfig
from mmkt_ray.encoders.base import fit_of
from mmkt_ray.encoders.build import build_encoder, load_reducer, read_encoder_card
from mmkt_ray.errors import DataError
from mmkt_ray.features.chunks import read_shard, write_part
from mmkt_ray.features.combine import combine
from mmkt_ray.features.decode import decode_chunk, decoding
from mmkt_ray.features.encode import EncodeChunk, EncodePlan, reduce_part
from mmkt_ray.features.fit import encoded_by_user, fit_encoders, fit_reducers
from mmkt_ray.features.leakage import find_leaking
from mmkt_ray.features.manifest import ModalityFeatures, Speed
from mmkt_ray.features.publish import (
    Origin,
    check_budget,
    is_spent,
    num_rejected,
    publish,
    published,
    tell_counts,
    tell_reasons,
)
from mmkt_ray.features.siblings import copy_store_from_sibling
from mmkt_ray.features.store import Store
from mmkt_ray.kinds.content import NORMALISATION
from mmkt_ray.samples.lines import that_may_be_cut
from mmkt_ray.samples.plan import ReadingPlan
from mmkt_ray.samples.readers import list_shards
from mmkt_ray.samples.schema import DAMAGE, MODALITY, Shard

log = logging.getLogger(__name__)

READ_CPUS = 0.5  # differs from an actor's on purpose: equal demands would fuse reading into the encoder actors
BUDGET_GRACE_ROWS = 1000  # rows before the reject budget is first checked in a run
PROGRESS_EVERY_S = 5.0
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


def check_not_empty(store: Store) -> None:
    """Raises: DataError for a modality or a task that no row has: most likely its column is mapped to the wrong name."""
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
    """The store of all shards through fitted encoders (modality -> folder)."""
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
            message = "'%s'%s ends without a line end, unlike other shards of its source: it may be cut within its last cell"
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
    """Encoder actors, and the GPUs of each: as the config says, else as many as the GPUs hold, or one per two logical CPUs."""
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
    """The pipeline itself."""
    resources = cluster.connect()
    num_actors, num_gpus = encoder_pool(config, resources)
    cluster.check_fits(resources, num_actors, 1, num_gpus)
    in_flight, gpu_frac = chunks_in_flight(num_gpus), min(1.0, num_gpus or 1.0)
    num_threads = max(1, cluster.cores() // num_actors)
    plan = EncodePlan(config, encoders, reuse, use_gpu=num_gpus > 0, num_threads=num_threads, gpu_frac=gpu_frac)
    with cluster.one_row_blocks():
        chunks = ray.data.from_items([vars(shard) for shard in todo], override_num_blocks=len(todo))
        chunks = chunks.map_batches(partial(read_shard, plan=ReadingPlan.of(config), done=done), batch_size=1, num_cpus=READ_CPUS)
        if num_gpus:
            chunks = chunks.map_batches(partial(decode_chunk, config=config), batch_size=1, batch_format="pyarrow", num_cpus=1)
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
    """The store with fitted reducers (modality -> folder) applied; the encoded store itself where there are none."""
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


def reading_layout(config: Config) -> dict[str, Any]:
    """All that decides which rows a chunk holds and what is in them before encoding."""
    apart = {"max_reject_frac", "min_reject_budget", "combine", "drop_leakage", "decode_timeout_s", "decode"}
    samples = config.samples.model_dump(mode="json", exclude=apart)
    return {
        "samples": samples,
        "normalisation": NORMALISATION,
        "by_key": config.samples.combine.name == "join",  # the split is then drawn by the key
        "columns": {
            "modalities": {m: c.kind.model_dump(mode="json") for m, c in sorted(config.modalities.items())},
            "tasks": [c.kind.reading(t, c.separator) for t, c in sorted(config.tasks.items())],
        },
        "chunk": [config.extract.chunk_rows, config.extract.chunk_bytes],
        **decoding([modality.kind for modality in config.modalities.values()], config.samples),
    } | ({} if config.extract.feature_dtype == "float32" else {"dtype": config.extract.feature_dtype})


def stored_chunks(uri: str) -> tuple[dict[str, set[int]], set[str]]:
    """Chunks that are written already, by unit; and the units of which every chunk is."""
    done: dict[str, set[int]] = {}
    ends: dict[str, int] = {}
    for info in storage.list_files(storage.join(uri, "data"), "*.parquet"):
        unit, index, *end = info.base_name.removesuffix(".parquet").split("-")
        done.setdefault(unit, set()).add(int(index))
        if end:
            ends[unit] = int(index)
    return done, {unit for unit, last in ends.items() if len(done[unit]) == last + 1}


def same_length(uri: str, other_uri: str, name: str) -> bool:
    """Whether two stores' parts of one name have as many rows: publishing may have taken duplicates out of one since."""
    parts = [storage.resolve(storage.join(u, "data", name)) for u in (uri, other_uri)]
    lengths = {pq.read_metadata(path, filesystem=fs).num_rows for fs, path in parts}
    return len(lengths) == 1


def find_reusable(run_uri: str, uri: str, plan: dict[str, Any]) -> dict[str, str]:
    """Modalities that another store of this run read in the same way through the same encoder: modality -> that store."""
    reuse: dict[str, str] = {}
    for info in storage.list_files(storage.join(run_uri, "features"), "plan.json", recursive=True):
        other_uri = storage.join(run_uri, "features", info.path.split("/")[-2])
        other = storage.read_json(storage.join(other_uri, "plan.json"))
        if other_uri == uri or other["layout"] != plan["layout"]:
            continue
        same = (m for m, print_ in plan["encoders"].items() if other["encoders"].get(m) == print_)
        reuse |= {m: other_uri for m in same}
    for modality, other_uri in reuse.items():
        log.info("%s features are taken from %s where they are there", modality, other_uri)
    return reuse


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
    """Counts rows, rejects and seconds as parts come in; tells progress; stops the job when too many rows are rejected."""

    def __init__(self, uri: str, samples: SamplesConfig | None = None, names: dict[str, str] | None = None) -> None:
        """uri: of the store that the parts go to. samples: None where rows cannot be lost. names: unit -> shard name."""
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
        if self.lost[DAMAGE] and likely and is_spent(samples, lost + self.lost[MODALITY], max(self.num_rows + lost, 2 * likely)):
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

"""What a sample costs: from the manifests of a run where there is one, else as measured here.
A rate is seconds of one core.

All constants of the model are in this file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.encoders.encoder import Encoder
from mmkt_ray.errors import ConfigError, OtherVersionError
from mmkt_ray.features.manifest import MANIFEST, Manifest, Speed
from mmkt_ray.features.store import open_store
from mmkt_ray.inference.model_card import read_card

# Per sample, docs/performance.md and docs/scale.md; 2 cores, AVX-512 bf16, no GPU. Images of 32 x 32 pixels: decoding
# grows with the pixels of an image, so a run of one's own tells more.
READ_S, DECODE_S, WRITE_S, REDUCE_S = 18e-6, 22e-6, 10e-6, 22e-6
ENCODE_S = {"cnn": 748e-6, "tfidf": 29e-6, "pixels": 620e-6, "efficientnet-lite0": 23e-3, "minilm": 12.6e-3}
ENCODE_S |= {"table": 15e-6, "identity": 5e-6}  # of ten columns; of 384 numbers
FIT_S = {"tfidf": 73e-6, "table": 10e-6, "identity": 2e-6}  # all passes together
FIT_S |= {"svd": 1.2e-3, "pca": 6e-6, "select": 6e-6, "standardize": 6e-6}
PRETRAIN_S = 2.15e-3  # per image and epoch: cnn and logmel_cnn
FORTH_AND_BACK = 3  # an epoch of adapting an encoder, in times of encoding
TRAIN_S = 77e-6  # per row and epoch, of one worker with two cores: hierarchical fusion of two reduced modalities
WORKER_CPUS = 2  # of that worker
CANDIDATE_S = 14e-6  # per train row and epoch of a search's candidate, start-up included

# What one process does for all: it does not get faster with more machines
CHUNK_S = 12e-3  # of the driver per chunk: two Ray tasks, an actor's call and a line of statistics
PUBLISH_S = 5.5e-6  # of the driver per row and store: ids, counts, audit

# Bytes a row
USUAL_DIM = 768  # of an encoder that does not know yet
REDUCED_BYTES = 3.7  # a stored float32 component
SPARSE_TERMS, SPARSE_BYTES = 154, 840  # terms of a TF-IDF text, and their bytes in a store
ROW_BYTES = 30  # the rest of a stored row: id, labels, hashes
PUBLISH_BYTES = 250  # on the driver while a store is published: ids of 30 characters, twice, and hashes
COMBINE_BYTES = 100  # on the driver under join and pair: ids, keys, labels
LABELLED_BYTES = 140  # in each training worker, mapped or not: id, split, labels, row numbers
TABLE_COPIES = 3  # of the features while that worker reads them

# A machine of an ordinary kind, where nothing else is known
MEMORY_PER_CPU = 4 * 2**30
DISK_BYTES = 10**12

MAX_TRIALS = 10_000  # of one Ray Tune experiment, by Ray's own scalability tests


@dataclass(frozen=True)
class Rates:
    """What one sample costs."""

    stages: dict[str, float]  # read, decode, `encode <modality>`, write -> seconds of a core
    reduce: float  # the same for reducing and writing; 0 without reducers
    train: dict[str, float]  # variant -> seconds of a worker per train row and epoch
    train_frac: float  # share of the rows
    store_bytes: float  # of all stores together
    source: str  # where these are from


def rates_of(config: Config, run_uri: str) -> Rates:
    """Measured by the run where it has features, else by default.
    Raises: ConfigError for an encoder without either."""
    stores = read_stores(run_uri)
    encoded = largest(s for s in stores if "read" in s.speed.stages and same_encoders(config, s.manifest))
    if encoded is None:
        return defaults(config)
    reduced = largest(
        s for s in stores if "reduce" in s.speed.stages and s.manifest.source == encoded.manifest.fingerprint
    )
    split = encoded.manifest.counts.by_split
    epochs = {name: read_epoch_s(run_uri, name) for name in config.expand_variants()}
    return Rates(
        {stage: seconds / encoded.rows_done for stage, seconds in encoded.speed.stages.items()},
        sum(reduced.speed.stages.values()) / reduced.rows_done if reduced else reduce_s(config),
        {name: seconds / max(1, split.get("train", 0)) if seconds else TRAIN_S for name, seconds in epochs.items()},
        split.get("train", 0) / sum(split.values()),
        sum(store.row_bytes for store in (encoded, reduced) if store),
        f"this run's own, over {encoded.rows_done:,.0f} rows; {sum(map(bool, epochs.values()))} of {len(epochs)} "
        "models trained",
    )


def defaults(config: Config) -> Rates:
    """As on the machine of docs/performance.md. Raises: ConfigError for an encoder that was not measured there."""
    stages = {"read": READ_S, "decode": DECODE_S, "write": WRITE_S}
    for name, modality in sorted(config.modalities.items()):
        if modality.encoder.name not in ENCODE_S:
            raise ConfigError(
                f"no rate is known of encoder '{modality.encoder.name}' ({name}): run `mmkt extract` with this "
                "config on a few rows first, e.g. --set samples.sources.0.limit=1000; the plan then takes the rates "
                "of that run"
            )
        stages[f"encode {name}"] = ENCODE_S[modality.encoder.name]
    split = config.samples.split
    train = dict.fromkeys(config.expand_variants(), TRAIN_S)
    train_frac = 1 - split.val_frac - split.test_frac
    where = "docs/performance.md and docs/scale.md, as this run has no features yet"
    return Rates(stages, reduce_s(config), train, train_frac, stored_bytes(config), where)


@dataclass(frozen=True)
class Timed:
    """A store that says how long it took."""

    manifest: Manifest
    speed: Speed
    num_bytes: int  # of its parts

    @property
    def rows_done(self) -> float:
        """Rows that the seconds are of: fewer than the store has where that went on from an earlier extraction."""
        speed, counts = self.speed, self.manifest.counts
        done, rounding = speed.rows_per_s * speed.wall_s, 0.05 * speed.wall_s + 1
        rows = counts.rows + counts.rejects
        return float(rows if abs(done - rows) < rounding else done)

    @property
    def row_bytes(self) -> float:
        """Of a row."""
        return self.num_bytes / self.manifest.counts.rows


def read_stores(run_uri: str) -> list[Timed]:
    """The run's feature stores whose making was timed; those of another version of this package are left out."""
    found = []
    for info in storage.list_files(storage.join(run_uri, "features"), MANIFEST, recursive=True):
        uri = storage.join(run_uri, "features", info.path.split("/")[-2])
        try:
            manifest = open_store(uri).manifest
        except OtherVersionError:
            continue
        files = storage.list_files(storage.join(uri, "data"), "*.parquet")
        if manifest.speed is not None:
            found.append(Timed(manifest, manifest.speed, sum(file.size for file in files)))
    return found


def largest(stores: Iterable[Timed]) -> Timed | None:
    """The one whose rates are over most rows."""
    return max(stores, key=lambda store: store.rows_done, default=None)


def same_encoders(config: Config, manifest: Manifest) -> bool:
    """Whether a store's features are those that the config asks for."""
    asked = {name: modality.encoder.model_dump(mode="json") for name, modality in config.modalities.items()}
    return asked == {name: entry.encoder for name, entry in manifest.modalities.items()}


def read_epoch_s(run_uri: str, variant: str) -> float:
    """Mean seconds of an epoch of the run's model; 0 if it is not trained."""
    card = read_card(storage.join(run_uri, "models", variant))
    history = card.fit.history if card and card.fit else []
    return sum(epoch.seconds for epoch in history) / len(history) if history else 0.0


def widths(config: Config) -> dict[str, list[int]]:
    """Features of each modality as encoded and as reduced, the same without a reducer; 0: sparse, of any width."""
    found = {}
    for name, modality in sorted(config.modalities.items()):
        encoder = build_encoder(modality.encoder)
        dim = 0 if getattr(encoder, "sparse", False) else expected_dim(encoder)
        found[name] = [dim, (modality.reduce.dim or dim) if modality.reduce else dim]
    return found


def expected_dim(encoder: Encoder) -> int:
    """Features of an encoder; USUAL_DIM where it only knows once it is fitted."""
    try:
        return int(encoder.dim)
    except Exception:  # what a user's own class says before that is its own affair
        return USUAL_DIM


def stored_bytes(config: Config) -> float:
    """Of a row in all stores together."""
    half = 0.5 if config.extract.feature_dtype == "float16" else 1.0
    encoded = reduced = float(ROW_BYTES)
    for name, (dim, final_dim) in widths(config).items():
        modality = config.modalities[name]
        own = modality.kind.stored_bytes * half * dim if dim else SPARSE_BYTES
        encoded += own
        reduced += own if modality.reduce is None else REDUCED_BYTES * half * final_dim
    has_reducer = any(modality.reduce for modality in config.modalities.values())
    return encoded + reduced * (has_reducer + (config.samples.combine.name != "union"))


def table_bytes(config: Config) -> float:
    """Of a row in the memory of a training worker: the features that models read, and the rest."""
    dims = widths(config)
    features = sum(4 * dims[m][-1] or 8 * SPARSE_TERMS for m in config.model_modalities)
    return TABLE_COPIES * features + LABELLED_BYTES


def reduce_s(config: Config) -> float:
    """Default of `Rates.reduce`."""
    return REDUCE_S + WRITE_S if any(modality.reduce for modality in config.modalities.values()) else 0.0


def size(num_bytes: float) -> str:
    """In a unit that fits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} PB"

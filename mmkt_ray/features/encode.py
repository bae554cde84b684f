"""The stages in the middle of the pipeline: decode, encode, reduce one chunk."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from mmkt_ray import cluster, storage
from mmkt_ray.config import Config
from mmkt_ray.encoders.build import build_encoder, load_fitted
from mmkt_ray.errors import ResourceError
from mmkt_ray.features.chunks import Row, make_row, part_name, unpack
from mmkt_ray.features.store import column_of, feature_type, from_arrow, part_schema, to_arrow
from mmkt_ray.samples.cleaning import decode_image
from mmkt_ray.samples.schema import Reject, reject_table

SHAPE = b"shape"  # metadata of a column of decoded images


def decode_column(column: pa.ChunkedArray, prepare: Any, max_pixels: int) -> tuple[list[Any], dict[int, str]]:
    """Encoded images (N,) -> N prepared images (None where null or broken), and row -> reason for the broken."""
    values: list[Any] = []
    broken: dict[int, str] = {}
    for i, data in enumerate(column.to_pylist()):
        image = None
        if data is not None:
            try:
                image = decode_image(data, max_pixels)
            except ValueError as error:
                broken[i] = str(error)
        values.append(prepare(image) if image is not None and prepare is not None else image)
    return values, broken


def decode_chunk(batch: Row, config: Config) -> Row:
    """Stage 2, only where encoders run on GPUs: images are decoded and prepared on CPUs, so that the GPU does not wait.

    A prepared image replaces the encoded one as raw bytes, its shape in the column's metadata; a broken one becomes a reject.
    """
    start = time.perf_counter()
    samples, rejects = unpack(batch["table"][0]), unpack(batch["rejects"][0])
    for name, modality in sorted(config.modalities.items()):
        prepare = getattr(build_encoder(modality.encoder), "prepare", None)
        if modality.kind != "image" or prepare is None:  # without prepare the size is unknown: the encoder decodes
            continue
        images, broken = decode_column(samples.column(name), prepare, config.samples.max_image_pixels)
        shape = next((image.shape for image in images if image is not None), ())
        column = pa.array([None if image is None else image.tobytes() for image in images], pa.large_binary())
        field = pa.field(name, pa.large_binary(), metadata={SHAPE: json.dumps(shape)})
        samples = samples.set_column(samples.column_names.index(name), field, column)
        samples, lost = drop_broken(
            samples, {i: f"{name}: {reason}" for i, reason in broken.items()}, str(batch["unit"][0])
        )
        rejects = pa.concat_tables([rejects, lost])
    seconds = json.loads(batch["seconds"][0]) | {"decode": time.perf_counter() - start}
    return make_row(str(batch["unit"][0]), int(batch["index"][0]), bool(batch["last"][0]), samples, rejects, seconds)


def drop_broken(samples: pa.Table, broken: dict[int, str], unit: str) -> tuple[pa.Table, pa.Table]:
    """The samples without the broken rows, and these as rejects."""
    if not broken:
        return samples, reject_table([])
    ids = samples.column("sample_id").to_pylist()
    keep = np.ones(len(samples), dtype=bool)
    keep[list(broken)] = False
    return samples.filter(pa.array(keep)), reject_table(
        [Reject(ids[i], unit, "decode", reason) for i, reason in sorted(broken.items())]
    )


@dataclass(frozen=True)
class EncodePlan:
    """What an encoder actor needs to know."""

    config: Config
    encoders: dict[str, str]  # modality -> folder of its fitted encoder
    reuse: dict[str, str]  # modality -> another store whose parts hold the same features already
    use_gpu: bool
    num_threads: int


def assigned_device(use_gpu: bool) -> torch.device:
    """The device that Ray gave this actor: inside it a GPU is always number 0. Raises: ResourceError if torch can't use it."""
    if use_gpu and not torch.cuda.is_available():
        raise ResourceError(
            "Ray gave this encoder actor a GPU, but torch finds none: is the driver there, is this torch built for it? "
            "Set extract.num_gpus=0 to encode on CPUs"
        )
    return torch.device("cuda" if use_gpu else "cpu")


class EncodeChunk:
    """Stage 3: decode, then features of every modality. Runs in an actor that loads the encoders once."""

    def __init__(self, plan: EncodePlan) -> None:
        cluster.keep_freed_memory()
        torch.set_num_threads(plan.num_threads)
        self.plan = plan
        device = assigned_device(plan.use_gpu)
        self.encoders: dict[str, Any] = {}
        for name, uri in sorted(plan.encoders.items()):
            encoder = load_fitted(build_encoder(plan.config.modalities[name].encoder), uri)
            if hasattr(encoder, "to"):
                encoder.to(device, plan.config.extract.encode_batch_size)
            self.encoders[name] = encoder
        self.schema = part_schema(
            plan.config, {m: (e.dim, getattr(e, "sparse", False)) for m, e in self.encoders.items()}
        )

    def __call__(self, batch: Row) -> Row:
        samples, rejects = unpack(batch["table"][0]), unpack(batch["rejects"][0])
        seconds: dict[str, float] = json.loads(batch["seconds"][0])
        unit, index, last = str(batch["unit"][0]), int(batch["index"][0]), bool(batch["last"][0])
        stored = {m: _stored(uri, unit, index, last, m, samples) for m, uri in self.plan.reuse.items()}
        values, broken = self._decode(samples, stored, seconds)
        kept, lost = drop_broken(samples, broken, unit)
        keep = np.array([i not in broken for i in range(len(samples))], dtype=bool)
        columns = {name: kept.column(name) for name in ("sample_id", "split", "key")}
        for name, encoder in self.encoders.items():
            start = time.perf_counter()
            column = stored.get(name)
            if column is None:
                chosen = [value for value, wanted in zip(values[name], keep, strict=True) if wanted]
                columns[column_of(name)] = encode_column(encoder, chosen)
                seconds[f"encode {name}"] = time.perf_counter() - start
            else:
                columns[column_of(name)] = column.filter(pa.array(keep))
        columns |= {task: kept.column(task) for task in sorted(self.plan.config.tasks)}
        part = pa.table(columns, schema=self.schema)
        return make_row(unit, index, last, part, pa.concat_tables([rejects, lost]), seconds)

    def _decode(
        self, samples: pa.Table, stored: dict[str, pa.Array | None], seconds: dict[str, float]
    ) -> tuple[dict[str, list[Any]], dict[int, str]]:
        """Values of each modality that is not stored already, None where absent; and the rows that can't be decoded."""
        start = time.perf_counter()
        values: dict[str, list[Any]] = {}
        broken: dict[int, str] = {}
        for name, encoder in self.encoders.items():
            if stored.get(name) is not None:
                continue
            field, column = samples.schema.field(name), samples.column(name)
            if self.plan.config.modalities[name].kind != "image":
                values[name] = column.to_pylist()
            elif field.metadata and SHAPE in field.metadata:  # decoded by the stage before
                shape = json.loads(field.metadata[SHAPE])
                values[name] = [
                    None if v is None else np.frombuffer(v, np.uint8).reshape(shape) for v in column.to_pylist()
                ]
            else:
                values[name], reasons = decode_column(
                    column, getattr(encoder, "prepare", None), self.plan.config.samples.max_image_pixels
                )
                broken |= {i: f"{name}: {reason}" for i, reason in reasons.items()}
        seconds["decode"] = seconds.get("decode", 0.0) + time.perf_counter() - start
        return values, broken


def encode_column(encoder: Any, values: list[Any]) -> pa.Array:
    """Values (N, None where absent) -> feature column of N rows, null where absent."""
    present = np.array([value is not None for value in values], dtype=bool)
    if not present.any():
        return pa.nulls(len(values), feature_type(encoder.dim, getattr(encoder, "sparse", False)))
    return to_arrow(encoder.encode([value for value in values if value is not None]), present)


def _stored(uri: str, unit: str, index: int, last: bool, modality: str, samples: pa.Table) -> pa.Array | None:
    """The modality's column for these samples from another store's part, or None if it lacks any of them."""
    fs, path = storage.resolve(storage.join(uri, "data", part_name(unit, index, last)))
    try:
        part = pq.read_table(path, filesystem=fs, columns=["sample_id", column_of(modality)])
    except FileNotFoundError:
        return None
    where = pc.index_in(samples.column("sample_id").combine_chunks(), part.column("sample_id").combine_chunks())
    if where.null_count:
        return None
    return part.column(column_of(modality)).combine_chunks().take(where)


def reduce_part(batch: Row, source_uri: str, reducers: dict[str, Any], dims: dict[str, int]) -> Row:
    """Reducers applied to one stored part; every other column as it is."""
    start = time.perf_counter()
    name = str(batch["name"][0])
    fs, path = storage.resolve(storage.join(source_uri, "data", name))
    part = pq.read_table(path, filesystem=fs)
    for modality, reducer in reducers.items():
        position = part.column_names.index(column_of(modality))
        features, present = from_arrow(part.column(position), dims[modality])
        if present.any():
            reduced = to_arrow(reducer.encode(features[present]), present)
        else:
            reduced = pa.nulls(len(part), feature_type(reducer.dim, sparse=False))
        part = part.set_column(position, column_of(modality), reduced)
    unit, index, *end = name.removesuffix(".parquet").split("-")
    seconds = {"reduce": time.perf_counter() - start}
    return make_row(unit, int(index), bool(end), part, reject_table([]), seconds)

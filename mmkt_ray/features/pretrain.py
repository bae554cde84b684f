"""Training an encoder on one modality and one task: the unimodal knowledge that is transferred.

Values (images, spectrograms of audio) are decoded and prepared once into Parquet parts beside the encoder; each
worker maps them as one array of uint8, so that every epoch is a true shuffle of all and memory is the page cache's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mmkt_ray import cluster, storage
from mmkt_ray.config.samples_config import SamplesConfig
from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.encoders.encoder import EncoderTraining
from mmkt_ray.errors import DataError
from mmkt_ray.features.decode import decode_column
from mmkt_ray.features.publish import tell_reasons, without_details
from mmkt_ray.features.spellings import respelled
from mmkt_ray.kinds.labels import Labels, concat_labels
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.schema import Shard, train_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretraining:
    """What trains an encoder of one modality on one task, and where it is kept."""

    section: Any  # of a Trained encoder
    plan: ReadingPlan  # of that modality and that task alone
    samples: SamplesConfig
    seed: int
    uri: str

    @property
    def modality(self) -> str:
        """The only one of the plan."""
        (modality,) = self.plan.modalities
        return modality

    @property
    def pieces(self) -> str:
        """Folder of the prepared values, with their labels."""
        return storage.join(self.uri, "images")


def pretrain(encoder: Any, job: Pretraining, shards: list[Shard], leaking: Mapping[str, Sequence[str]]) -> None:
    """Train a Trained encoder on the labelled train rows of `shards`.

    leaking: unit of a shard -> ids of its train rows to leave out.

    Resumes from the last finished epoch after a kill. Raises: DataError if fewer than two classes are there.
    """
    section = job.section
    decode = ray.remote(_decode_shard)
    found = ray.get([decode.remote(job, shard, leaking.get(shard.unit, ())) for shard in shards])
    kind = job.plan.tasks[section.task].kind
    counts = _count_classes(job.pieces, kind)
    class_names = kind.class_names(counts)
    if not counts or (kind.exclusive and len(class_names) < 2):
        wanted = "two classes" if kind.exclusive else "labels"
        raise DataError(
            f"the {section.name} encoder of '{job.modality}' needs {wanted} of '{section.task}' in the train "
            f"split, got {sorted(counts) or 'none'}{tell_reasons(sum(map(Counter, found), Counter()))}"
        )
    kind = kind.fitted(section.task, _train_labels(job.pieces))
    args = {"job": job, "kind": kind, "class_names": class_names}
    state = cluster.run_on_workers(_train, args, section.num_workers)
    encoder.load_state({k: np.asarray(v) for k, v in state.items()}, encoder.rest_of_state(class_names))
    storage.remove_folder(job.pieces)
    storage.remove(storage.join(job.uri, "checkpoint.safetensors"))


def _decode_shard(job: Pretraining, shard: Shard, leaking: Sequence[str]) -> dict[str, int]:
    """Write the shard's labelled train values, prepared, as parts of (pixels, label, held_out); extraction will
    reject broken ones. Held out: values of val, for encoders that ask for them.

    Returns why values are not among them -> how many.
    """
    encoder: Any = build_encoder(job.section)
    modality, task, pieces = job.modality, job.section.task, job.pieces
    done, reasons = storage.join(pieces, f"{shard.unit}.done"), Counter[str]()
    if storage.exists(done):
        return dict(json.loads(storage.read_bytes(done) or b"{}"))
    for chunk in read_chunks(job.plan, shard):
        reasons.update(reject.reason for reject in chunk.rejects)
        used = train_rows(chunk.table, leaking)
        if encoder.held_out_rows:
            used = pa.concat_tables([used, chunk.table.filter(pc.equal(chunk.table.column("split"), "val"))])
        rows = used.filter(pc.and_(used.column(modality).is_valid(), used.column(task).is_valid()))
        kind = job.plan.modalities[modality]
        decoded = decode_column(rows.column(modality), kind, encoder, job.samples)
        reasons.update(map(without_details, decoded.broken.values()))
        found = {i: value for i, value in enumerate(decoded.values) if value is not None}
        if not kind.decoder:
            found = {i: encoder.prepare(value) for i, value in found.items()}
        if good := list(found):
            pixels = pa.array([value.tobytes() for value in found.values()], pa.binary())
            storage.write_table(
                storage.join(pieces, f"{shard.unit}-{chunk.index:06d}.parquet"),
                pa.table(
                    {
                        "pixels": pixels,
                        "label": rows.column(task).take(good),
                        "held_out": pc.equal(rows.column("split"), "val").take(pa.array(good)),
                    }
                ),
            )
    storage.write_bytes(done, json.dumps(reasons).encode())
    return dict(reasons)


def _train_labels(pieces: str) -> Iterator[pa.ChunkedArray]:
    """The labels of the train rows, piece by piece."""
    for table in _read_pieces(pieces, ["label", "held_out"]):
        yield table.filter(pc.invert(table.column("held_out"))).column("label")


def _count_classes(pieces: str, kind: TaskKind) -> dict[str, int]:
    """Train rows of each class, each class in one spelling."""
    counts: Counter[str] = Counter()
    for labels in _train_labels(pieces):
        counts.update(kind.members(labels)[1].drop_null().to_pylist())
    new, merged = respelled(counts), Counter[str]()
    for name, number in counts.items():
        merged[new.get(name, name)] += number
    return dict(merged)


def _read_pieces(pieces: str, columns: list[str]) -> Iterator[pa.Table]:
    for info in storage.list_files(pieces, "*.parquet"):
        yield storage.read_table(storage.join(pieces, info.base_name), columns)


def _map_values(
    pieces: str, encoder: Any, kind: TaskKind, class_names: list[str], folder: str
) -> tuple[np.ndarray, Labels, np.ndarray]:
    """All pieces as one memory-mapped array of prepared values (N, ..) in `folder`; their labels;
    which are held out."""
    labels, held_out = list[Labels](), [np.empty(0, bool)]
    for table in _read_pieces(pieces, ["label", "held_out"]):
        labels.append(kind.encode(table.column("label"), class_names))
        held_out.append(table.column("held_out").to_numpy())
    dtype, shape = np.dtype(encoder.prepared_dtype), encoder.prepared_shape
    images = np.lib.format.open_memmap(
        os.path.join(folder, "images.npy"), mode="w+", dtype=dtype, shape=(sum(map(len, labels)), *shape)
    )
    start = 0
    for table in _read_pieces(pieces, ["pixels"]):
        for chunk in table.column("pixels").chunks:
            block = np.frombuffer(b"".join(chunk.to_pylist()), dtype=dtype).reshape(-1, *shape)
            images[start : start + len(block)] = block
            start += len(block)
    return images, concat_labels(labels), np.concatenate(held_out)


def _train(args: dict[str, Any], rank: int, world_size: int, device: torch.device) -> dict[str, np.ndarray] | None:
    """On each worker: the training itself. Rank 0 keeps a checkpoint per epoch and returns the weights."""
    job, class_names = args["job"], args["class_names"]
    section = job.section
    encoder: Any = build_encoder(section)
    checkpoint = storage.join(job.uri, "checkpoint.safetensors")
    state = dict(load_tensors(storage.read_bytes(checkpoint))) if storage.exists(checkpoint) else None
    folder = tempfile.mkdtemp(prefix="mmkt-images-")
    epoch_start = time.perf_counter()

    def keep(epoch: int, metrics: dict[str, float], state_fn: Any) -> None:
        nonlocal epoch_start
        if rank == 0:
            tensors = {k: torch.as_tensor(v).contiguous().cpu() for k, v in state_fn().items()}
            storage.write_bytes(checkpoint, save_tensors(tensors))
            seconds = time.perf_counter() - epoch_start
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in metrics.items())
            log.info("%s epoch %d/%d: %s, %.1f s", section.name, epoch, section.epochs, shown, seconds)
        epoch_start = time.perf_counter()

    try:
        values, labels, held_out = _map_values(job.pieces, encoder, args["kind"], class_names, folder)
        training = EncoderTraining(job.seed, device, rank, world_size, state, on_epoch=keep, held_out=held_out)
        weights: dict[str, np.ndarray] = encoder.train(values, labels, class_names, training)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return weights if rank == 0 else None

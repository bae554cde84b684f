"""Training a CNN encoder on one modality and one task: the unimodal knowledge that is transferred.

Images, or spectrograms of audio, are decoded and prepared once into Parquet parts beside the encoder; each worker maps
them as one array of uint8, so that every epoch is a true shuffle of all and memory is the page cache's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mmkt_ray import cluster, storage
from mmkt_ray.config import CnnEncoder, Config, LogMelCnnEncoder
from mmkt_ray.encoders.build import build_encoder
from mmkt_ray.encoders.cnn_training import fit_cnn
from mmkt_ray.encoders.frozen import TrainedCnn
from mmkt_ray.errors import DataError
from mmkt_ray.features.encode import decode_column
from mmkt_ray.features.publish import shorten, tell_reasons
from mmkt_ray.features.spellings import respelled
from mmkt_ray.kinds.spelling import index_in, sort_classes
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.schema import Shard, train_rows

log = logging.getLogger(__name__)


def pretrain_cnn(
    encoder: TrainedCnn,
    config: Config,
    modality: str,
    shards: list[Shard],
    uri: str,
    leaking: Mapping[str, Sequence[str]],
) -> None:
    """Train `encoder` on the labelled train rows of `shards`; `config` is narrowed to its modality and task.

    leaking: unit of a shard -> ids of its train rows to leave out.

    Resumes from the last finished epoch after a kill. Raises: DataError if fewer than two classes are there.
    """
    section = encoder.config
    pieces = storage.join(uri, "images")
    decode = ray.remote(_decode_shard)
    found = ray.get([decode.remote(config, modality, shard, pieces, leaking.get(shard.unit, ())) for shard in shards])
    counts = _count_classes(pieces)
    class_names = sort_classes(counts)
    if len(class_names) < 2:
        raise DataError(
            f"the {section.name} encoder of '{modality}' needs two classes of '{section.pretrain}' in the train split, "
            f"got {class_names or 'none'}{tell_reasons(sum(map(Counter, found), Counter()))}"
        )
    job = {"config": config, "modality": modality, "class_names": class_names, "uri": uri}
    state = cluster.run_on_workers(_train, job, section.num_workers)
    encoder.load_state(
        {k: np.asarray(v) for k, v in state.items()},
        {"options": _options(section, class_names), "class_names": class_names},
    )
    storage.remove_folder(pieces)
    storage.remove(storage.join(uri, "checkpoint.safetensors"))


def _options(section: CnnEncoder | LogMelCnnEncoder, class_names: list[str]) -> dict[str, int]:
    return {"num_classes": len(class_names), "image_size": section.image_size, "width": section.width}


def _decode_shard(
    config: Config, modality: str, shard: Shard, pieces: str, leaking: Sequence[str]
) -> dict[str, int]:
    """Write the shard's labelled train values, prepared, as parts of (pixels, label); extraction will reject broken ones.

    Returns why values are not among them -> how many.
    """
    encoder: Any = build_encoder(config.modalities[modality].encoder)
    task = encoder.config.pretrain
    done, reasons = storage.join(pieces, f"{shard.unit}.done"), Counter[str]()
    if storage.exists(done):
        return dict(json.loads(storage.read_bytes(done) or b"{}"))
    for chunk in read_chunks(config, shard):
        reasons.update(reject.reason for reject in chunk.rejects)
        train = train_rows(chunk.table, leaking)
        rows = train.filter(pc.and_(train.column(modality).is_valid(), train.column(task).is_valid()))
        kind = config.modalities[modality].kind
        decoded = decode_column(rows.column(modality), kind, encoder.prepare, config.samples)
        images = decoded.values
        reasons.update(map(shorten, decoded.broken.values()))
        good = [i for i, image in enumerate(images) if image is not None]
        if good:
            pixels = pa.array([images[i].tobytes() for i in good], pa.binary())
            storage.write_table(
                storage.join(pieces, f"{shard.unit}-{chunk.index:06d}.parquet"),
                pa.table({"pixels": pixels, "label": rows.column(task).take(good)}),
            )
    storage.write_bytes(done, json.dumps(reasons).encode())
    return dict(reasons)


def _count_classes(pieces: str) -> dict[str, int]:
    """Rows of each class, each class in one spelling."""
    counts: Counter[str] = Counter()
    for table in _read_pieces(pieces, ["label"]):
        counts.update(table.column("label").to_pylist())
    new, merged = respelled(counts), Counter[str]()
    for name, number in counts.items():
        merged[new.get(name, name)] += number
    return dict(merged)


def _read_pieces(pieces: str, columns: list[str]) -> Any:
    for info in storage.list_files(pieces, "*.parquet"):
        yield storage.read_table(storage.join(pieces, info.base_name), columns)


def _map_images(pieces: str, side: int, class_names: list[str], folder: str) -> tuple[np.ndarray, np.ndarray]:
    """All pieces as one memory-mapped array of images (N, 3, S, S) uint8 in `folder`, and labels (N,) int64."""
    found = [index_in(t.column("label"), class_names) for t in _read_pieces(pieces, ["label"])]
    labels = np.concatenate([np.empty(0, np.int64), *found])
    images = np.lib.format.open_memmap(
        os.path.join(folder, "images.npy"), mode="w+", dtype=np.uint8, shape=(len(labels), 3, side, side)
    )
    start = 0
    for table in _read_pieces(pieces, ["pixels"]):
        for chunk in table.column("pixels").chunks:
            block = np.frombuffer(b"".join(chunk.to_pylist()), dtype=np.uint8).reshape(-1, 3, side, side)
            images[start : start + len(block)] = block
            start += len(block)
    return images, labels


def _train(job: dict[str, Any], rank: int, world_size: int, device: torch.device) -> dict[str, np.ndarray] | None:
    """On each worker: the training itself. Rank 0 keeps a checkpoint per epoch and returns the weights."""
    config: Config = job["config"]
    encoder: Any = build_encoder(config.modalities[job["modality"]].encoder)
    section = encoder.config
    checkpoint = storage.join(job["uri"], "checkpoint.safetensors")
    state = dict(load_tensors(storage.read_bytes(checkpoint))) if storage.exists(checkpoint) else None
    folder = tempfile.mkdtemp(prefix="mmkt-images-")
    epoch_start = time.perf_counter()

    def keep(epoch: int, metrics: dict[str, float], state_fn: Any) -> None:
        nonlocal epoch_start
        if rank == 0:
            tensors = {k: torch.as_tensor(v).contiguous().cpu() for k, v in state_fn().items()}
            storage.write_bytes(checkpoint, save_tensors(tensors))
            seconds = time.perf_counter() - epoch_start
            log.info(
                "cnn epoch %d/%d: loss %.3f, train accuracy %.3f, %.1f s",
                epoch,
                section.epochs,
                metrics["loss"],
                metrics["accuracy"],
                seconds,
            )
        epoch_start = time.perf_counter()

    try:
        images, labels = _map_images(storage.join(job["uri"], "images"), section.image_size, job["class_names"], folder)
        model = fit_cnn(
            images, labels, len(job["class_names"]), encoder.recipe(config.seed),
            device=device, rank=rank, world_size=world_size, state=state, on_epoch=keep,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {k: v.detach().cpu().numpy() for k, v in model.state_dict().items()} if rank == 0 else None

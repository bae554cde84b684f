"""How right the CNN encoder of a finished run is by itself, on images that it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from mmkt_ray import storage
from mmkt_ray.config import Config
from mmkt_ray.encoders.build import build_encoder, load_fitted
from mmkt_ray.encoders.device import Forward
from mmkt_ray.features.store import open_store
from mmkt_ray.kinds.images import decode_image
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards


def score_cnn(config: Config, run_uri: str) -> dict[str, Any]:
    """Accuracy on the test split of the task that the network was trained on:
    of one view of each image, and averaged over six.

    Works where exactly one modality of the config has the encoder `cnn`.
    """
    [(name, modality)] = [(n, m) for n, m in config.modalities.items() if m.encoder.name == "cnn"]
    task = str(modality.encoder.task)
    stores = storage.glob(storage.join(run_uri, "features", "encoded-*"))
    folder = open_store(stores[0].path).manifest.modalities[name].folders[0]
    encoder = load_fitted(build_encoder(modality.encoder), storage.join(run_uri, "encoders", folder))
    images, labels = [], []
    for shard in list_shards(ReadingPlan.of(config)):
        for chunk in read_chunks(ReadingPlan.of(config), shard):
            samples = chunk.table
            usable = pc.and_(samples.column(name).is_valid(), samples.column(task).is_valid())
            samples = samples.filter(pc.and_(usable, pc.equal(samples.column("split"), "test")))
            images += [encoder.prepare(decode_image(x, 10**8)) for x in samples.column(name).to_pylist()]
            labels += samples.column(task).to_pylist()
    truth = np.array([encoder.class_names.index(label) for label in labels])
    stacked = np.stack(images)
    plain = Forward(encoder.model, torch.device("cpu"), "bf16", 512)(stacked)
    return {
        "encoder": Path(folder).name,
        "test_images": len(truth),
        "accuracy": float((plain.argmax(1) == truth).mean()),
        "accuracy_six_views": float((encoder.predict(stacked).argmax(1) == truth).mean()),
    }

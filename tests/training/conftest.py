"""A small partly labelled, partly missing data set, as a table and as a config, for the tests of training."""

import socket
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse as sp

from mmkt_ray.config import Config
from mmkt_ray.features.feature_table import FeatureTable
from tests.configs import build_config, raw_config
from tests.labels import MISSING, UNSEEN, coded


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """make_config(**{"training.epochs": 2}): a fast run of two modalities and two tasks, without experts."""

    def make(**overrides) -> Config:
        model = {"hidden_dim": 16, "modality_dropout": 0.0, "experts": False}
        training = {"auto": [], "epochs": 4, "batch_size_per_worker": 64, "lr": 0.01}
        tasks = {"topic": "multiclass", "mood": "multiclass"}
        return build_config(raw_config(tasks, model=model, training=training), **overrides)

    return make


@pytest.fixture(scope="session")
def table() -> FeatureTable:
    """420 samples: dense image and sparse text features, each missing somewhere;
    `topic` of 3 classes, `mood` of 2."""
    rng, num_rows = np.random.default_rng(0), 420
    topic, mood = rng.integers(0, 3, num_rows), rng.integers(0, 2, num_rows)
    image = rng.normal(size=(num_rows, 8)) + 4 * np.eye(8)[topic]
    text = (rng.random((num_rows, 30)) < 0.2) * rng.random((num_rows, 30)) + np.eye(30)[mood]
    present = {"image": rng.random(num_rows) < 0.8, "text": rng.random(num_rows) < 0.8}
    features = {"image": image * present["image"][:, None], "text": text * present["text"][:, None]}
    split = np.resize(["train", "train", "val", "train", "test"], num_rows)
    topic[rng.random(num_rows) < 0.3] = MISSING
    mood[(rng.random(num_rows) < 0.1) & (split == "val")] = UNSEEN
    return FeatureTable(
        sample_id=np.array([f"s{i}" for i in range(num_rows)], dtype=object),
        split=split.astype(object),
        features={
            "image": features["image"].astype(np.float32),
            "text": sp.csr_matrix(features["text"], dtype=np.float32),
        },
        present=present,
        labels=coded({"topic": topic, "mood": mood}),
        class_names={"topic": ["x", "y", "z"], "mood": ["bad", "good"]},
    )


@pytest.fixture
def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

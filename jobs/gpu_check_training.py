"""The parts of gpu_check.py that train: a population of heads, and a small CNN."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_check_measuring import CPU, TOLERANCE, Check, LeftOut, agreement, package  # beside this file

from mmkt_ray.encoders.cnn_training import CNNRecipe, fit_cnn
from mmkt_ray.encoders.device import Forward

# --- population --------------------


def measure_population(check: Check) -> dict[str, Any]:
    """Seconds of a stack of heads, and of single fits; members are compared with a fit on the CPU."""
    try:
        config, table, parts = heads_to_train(check)
    except ImportError as error:
        raise LeftOut(f"no {error.name}") from None
    fit, predict_table, start_population, worker = parts
    num, epochs = (4, 1) if check.small else (1024, 3)
    members = [{"training.lr": 1e-4 * 100 ** (i / num), "training.weight_decay": 0.01 * (i % 5)} for i in range(num)]
    config = config.with_overrides({"training.epochs": epochs})
    start_population(config, table, members[:2], check.device).train(1)  # kernels are loaded
    check.wait()
    start = time.perf_counter()
    stack = start_population(config, table, members, check.device)
    stack.train(epochs)
    check.wait()
    stack_s = time.perf_counter() - start
    start, singles = time.perf_counter(), 0
    while singles < num and (time.perf_counter() - start < check.seconds / 3 or not singles):
        fit(config.with_overrides(members[singles]), table, worker=worker(device=check.device))
        singles += 1
    single_s = (time.perf_counter() - start) / singles
    differs = 0.0
    for i in (0, num - 1):
        alone = predict_table(fit(config.with_overrides(members[i]), table).model, table)["topic"]
        differs = max(differs, agreement(predict_table(stack.model(i), table)["topic"], alone, 0.02))
    return {
        "heads": num, "epochs": epochs, "stack_s": stack_s, "one_by_one_s_each": single_s, "singles": singles,
        "ratio": single_s * num / stack_s, "differs": differs, "best_val_score": float(np.nanmax(stack.scores)),
    }  # fmt: skip


def heads_to_train(check: Check) -> tuple[Any, Any, tuple[Any, ...]]:
    """A config and a table of two modalities of made-up features, and what trains on them. Raises: ImportError."""
    from mmkt_ray.config import parse_config
    from mmkt_ray.features.feature_table import FeatureTable
    from mmkt_ray.inference.outputs import predict_table
    from mmkt_ray.kinds.labels import Labels
    from mmkt_ray.kinds.tasks import task_kind
    from mmkt_ray.training.batches import Worker
    from mmkt_ray.training.loop import fit
    from mmkt_ray.training.population import Population

    rows, width = (120, 8) if check.small else (8192, 384)
    modality, columns = {"kind": "vector", "encoder": "identity"}, {name: name for name in ("left", "right", "topic")}
    config = parse_config(
        {
            "name": "heads",
            "samples": {"sources": [{"reader": "parquet", "path": "none", "columns": columns}]},
            "modalities": {"left": modality, "right": modality},
            "tasks": {"topic": {}},
            # no dropout: a device draws other numbers than another
            "model": {"hidden_dim": 64, "dropout": 0.0, "modality_dropout": 0.0, "experts": False},
            "training": {"auto": [], "batch_size_per_worker": 256},
        }
    )
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 10, rows)
    centres = {m: rng.normal(0, 0.2, (10, width)).astype(np.float32) for m in ("left", "right")}
    features = {m: c[topic] + rng.normal(size=(rows, width)).astype(np.float32) for m, c in centres.items()}
    everywhere = np.ones(rows, dtype=bool)
    table = FeatureTable(
        np.array([f"s{i}" for i in range(rows)], dtype=object),
        np.resize(np.array(["train", "train", "train", "val"], dtype=object), rows),
        features,
        dict.fromkeys(features, everywhere),
        {"topic": Labels(task_kind("multiclass"), topic, everywhere, everywhere)},
        {"topic": [str(i) for i in range(10)]},
    )
    return config, table, (fit, predict_table, Population.start, Worker)


# --- pretraining --------------------


def measure_pretraining(check: Check) -> dict[str, Any]:
    """Recipes of more and more work until one reaches 94 % on test images, averaged over six views."""
    data = read_cifar10(check.data) if check.data else draw_images(check.small)
    images, labels, test_images, test_labels = data
    first = CNNRecipe(epochs=1, width=8 if check.small else 64, image_size=images.shape[-1], precision="fp32")
    part = slice(0, 64 if check.small else 2000)
    losses = [loss_of_an_epoch(first, images[part], labels[part], device) for device in (check.device, CPU)]
    found: dict[str, Any] = {
        "images": "CIFAR-10" if check.data else "synthetic, not CIFAR-10: their accuracy says nothing of it",
        "loss_differs": agreement(np.array(losses[:1]), np.array(losses[1:]), 0.03),
        "tried": [],
    }
    asked = [(1, 8, ("flip", "crop"))] if check.small else [
        (10, 64, ("flip", "crop")), (25, 96, ("flip", "crop", "cutout")), (60, 128, ("flip", "crop", "cutout")),
    ]  # fmt: skip
    begin = time.perf_counter()
    for epochs, width, augment in asked:
        if found["tried"] and time.perf_counter() - begin > check.seconds / 2:
            break
        recipe = replace(first, epochs=epochs, width=width, augment=augment, precision="bf16", batch_size=500)
        start = time.perf_counter()
        model = fit_cnn(images, labels, 10, recipe, device=check.device)
        check.wait()
        seconds = time.perf_counter() - start
        logits = Forward(model.forward_tta, check.device, "bf16", min(512, len(test_images)))(test_images)
        accuracy = float((logits.argmax(1) == test_labels).mean())
        found["tried"].append({"epochs": epochs, "width": width, "seconds": seconds, "accuracy": accuracy})
        some = test_images[:32]
        got = Forward(model.features, check.device, "bf16", len(some))(some)
        model.to(CPU)
        found["differs"] = agreement(got, Forward(model.features, CPU, "fp32", len(some))(some), TOLERANCE["bf16"])
        if accuracy >= 0.94:
            found["seconds_to_94"] = seconds
            break
    return found


def loss_of_an_epoch(recipe: CNNRecipe, images: np.ndarray, labels: np.ndarray, device: torch.device) -> float:
    losses: list[float] = []
    fit_cnn(images, labels, 10, recipe, device=device, on_epoch=lambda _, metrics, __: losses.append(metrics["loss"]))
    return losses[0]


Images = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # pixels (N, 3, S, S) and labels (N,), of train and test


def read_cifar10(folder: Path) -> Images:
    """From Parquet files as Hugging Face keeps them. Raises: LeftOut."""
    parquet, image = package("pyarrow.parquet"), package("PIL.Image")
    parts: list[np.ndarray] = []
    for split in ("train", "test"):
        table = parquet.read_table(sorted((folder / "cifar10").glob(f"{split}-*.parquet")))
        cells = table.column("img").combine_chunks().field("bytes").to_pylist()
        pixels = np.stack([np.asarray(image.open(io.BytesIO(cell)).convert("RGB")) for cell in cells])
        parts += [np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), table.column("label").to_numpy().astype(np.int64)]
    return parts[0], parts[1], parts[2], parts[3]


def draw_images(small: bool) -> Images:
    """Ten coarse patterns, each shifted, mixed with another and noisy."""
    rng, side = np.random.default_rng(0), 16 if small else 32
    parts: list[np.ndarray] = []
    patterns = rng.integers(0, 256, (10, 3, 4, 4)).repeat(side // 4, axis=2).repeat(side // 4, axis=3)
    for num in (128, 64) if small else (50_000, 10_000):
        labels = rng.integers(0, 10, num)
        mixed = 0.6 * patterns[labels] + 0.4 * patterns[rng.integers(0, 10, num)]
        mixed += rng.normal(0, 40, (num, 3, side, side)).astype(np.float32)
        parts += [mixed.clip(0, 255).astype(np.uint8), labels]
    return parts[0], parts[1], parts[2], parts[3]

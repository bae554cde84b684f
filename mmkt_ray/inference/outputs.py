"""Rows of a feature table -> tensors -> class probabilities.

Axes: N samples of a table, B rows of a batch, C classes of one task.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from mmkt_ray.errors import DataError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.models import FeatureBatch, Predictor, PredictorSpec, SparseBatch

Proba: TypeAlias = Mapping[str, np.ndarray]  # task -> (N, C) probabilities


def model_inputs(
    table: FeatureTable,
    rows: np.ndarray | slice,
    modalities: Iterable[str],
    device: torch.device,
    drop: Collection[str] = (),
) -> tuple[dict[str, FeatureBatch], dict[str, Tensor]]:
    """Some rows as what `MultimodalModel.forward` takes: features and presence by modality, on a device.

    Modalities in `drop` count as absent in every row.
    """
    features: dict[str, FeatureBatch] = {}
    present: dict[str, Tensor] = {}
    for m in modalities:
        batch = table.features[m][rows]
        if not isinstance(batch, np.ndarray):
            parts = (batch.indices.astype(np.int64), batch.indptr.astype(np.int64), batch.data)
            features[m] = SparseBatch(*map(torch.from_numpy, parts)).to(device)
        else:
            features[m] = torch.from_numpy(batch).to(device, non_blocking=True)
        mask = table.present[m][rows]
        present[m] = torch.from_numpy(mask & (m not in drop)).to(device, non_blocking=True)
    return features, present


def predict_table(
    model: Predictor, table: FeatureTable, batch_size: int = 1024, drop: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Probabilities of every sample, in the table's order: task -> (N, C) float32, on the device the model is on.

    Modalities in `drop` count as absent: so a fused model is evaluated on a subset of its modalities. The model must
    be in eval mode, as `load_model` returns it; then a row's result does not depend on the rows beside it. Logits are
    divided by the model's temperatures.

    Raises: DataError if the table's features are not those the model was fitted on.
    """
    return probabilities(model, predict_logits(model, table, batch_size, drop))


def probabilities(
    model: Predictor, logits: Mapping[str, np.ndarray], temperatures: Mapping[str, float] | None = None
) -> dict[str, np.ndarray]:
    """Logits, task -> (N, C), as probabilities; at the model's temperatures where no others are given."""
    by_task = model.temperatures if temperatures is None else temperatures
    return {
        t: model.spec.kinds[t].outputs(torch.from_numpy(values) / by_task.get(t, 1.0)).numpy()
        for t, values in logits.items()
    }


@torch.inference_mode()
def predict_logits(
    model: Predictor, table: FeatureTable, batch_size: int = 1024, drop: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The same before probabilities are made of it: task -> (N, C) float32."""
    assert not model.training, "prediction wants a model in eval mode"
    check_features(model.spec, table)
    device = next(model.parameters()).device
    num_rows = len(table.sample_id)
    found = {t: np.empty((num_rows, c), dtype=np.float32) for t, c in model.spec.tasks.items()}
    for start in range(0, num_rows, batch_size):
        rows = slice(start, start + batch_size)
        logits = model(*model_inputs(table, rows, model.spec.modalities, device, drop))
        for t, values in logits.items():
            found[t][rows] = values.cpu().numpy()
    return found


def score_rows(model: Predictor, table: FeatureTable, task: str, rows: np.ndarray) -> np.ndarray:
    """The score of the chosen rows, (R,); see `TaskKind.row_scores`. rows: mask (N,) of labelled ones."""
    part = table.take(np.flatnonzero(rows))
    kind = model.spec.kinds[task]
    return kind.row_scores(part.labels[task], kind.predict(predict_table(model, part)[task]))


def check_features(spec: PredictorSpec, table: FeatureTable) -> None:
    """Raises: DataError if a modality is missing in the table or has another width than the model was built for."""
    for m, expected in spec.modalities.items():
        if m not in table.features:
            raise DataError(
                f"the model reads '{m}', the features have only {sorted(table.features)}: extract '{m}' too"
            )
        got, sparse = table.features[m].shape[1], sp.issparse(table.features[m])
        if (got, sparse) != (expected.dim, expected.sparse):
            raise DataError(
                f"features of '{m}' are {got} wide ({'sparse' if sparse else 'dense'}), the model was fitted on "
                f"{expected.dim} ({'sparse' if expected.sparse else 'dense'}): use the encoders it was trained with, "
                "or train again"
            )

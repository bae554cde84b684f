"""Transfer from trained models: towers as initial weights, and teachers to distil from.

Axes: N rows of a table, B rows of a batch, C classes of one task.

Sources: initialisation and fine-tuning, Yosinski et al. 2014 (https://arxiv.org/abs/1411.1792); gradual unfreezing
from the top, Howard & Ruder 2018 (https://arxiv.org/abs/1801.06146); distillation, Hinton et al. 2015
(https://arxiv.org/abs/1503.02531), across modalities as in Gupta et al. 2016 (https://arxiv.org/abs/1507.00448).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mmkt_ray import storage
from mmkt_ray.config import TransferConfig
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.inference.rows import readable
from mmkt_ray.kinds.task_kind import TaskKind
from mmkt_ray.models import MultimodalModel, Predictor, fused_part
from mmkt_ray.models.sharing import without_key


@dataclass(frozen=True)
class SourceModel:
    """A trained model and the class names of its tasks."""

    model: Predictor
    class_names: Mapping[str, list[str]]


@dataclass(frozen=True)
class Knowledge:
    """Trained models that a training run starts or learns from."""

    init: dict[str, SourceModel] = field(default_factory=dict)  # modality -> model whose towers it starts with
    teachers: tuple[SourceModel, ...] = ()

    @property
    def modalities(self) -> set[str]:
        """Those that the teachers read."""
        return {m for teacher in self.teachers for m in teacher.model.spec.modalities}


def source_uris(transfer: TransferConfig, folder: str) -> dict[str, str]:
    """Name -> model folder of all that `transfer` names. `folder` holds the run's models;
    a name with a slash is a path."""
    names = sorted({*transfer.init.values(), *transfer.teachers})
    return {name: storage.absolute(name) if "/" in name else storage.join(folder, name) for name in names}


def load_knowledge(transfer: TransferConfig, folder: str) -> Knowledge:
    """The models that `transfer` names. Raises: DataError if one of them is not trained yet."""
    loaded = {}
    for name, uri in source_uris(transfer, folder).items():
        model, card = load_model(uri)
        loaded[name] = SourceModel(model, card.class_names)
    return Knowledge({m: loaded[n] for m, n in transfer.init.items()}, tuple(loaded[n] for n in transfer.teachers))


# --- initialisation -------------------------------------------------------------------------------------------------


def take_over(model: MultimodalModel, knowledge: Knowledge) -> list[list[nn.Parameter]]:
    """Copy each modality's input stage and towers from its source into `model`; of an expert model, the fused part's.

    Returns the copied parameters by stage: input, level 1, ... If one side shares a tower that the other has several
    of, the first one is copied. Fusion and heads keep their initial weights.

    Raises: ConfigError if a source has no such modality, or its towers have other shapes.
    """
    stages: list[dict[str, None]] = []  # names, each once
    for modality, source in sorted(knowledge.init.items()):
        given_model = fused_part(source.model)
        if not isinstance(given_model, MultimodalModel):
            raise ConfigError(
                f"training.transfer.init.{modality}: that model is made of several, and has no towers of its own"
            )
        if modality not in given_model.spec.modalities:
            raise ConfigError(
                f"training.transfer.init.{modality}: that model reads {sorted(given_model.spec.modalities)} only"
            )
        own, theirs = (m.modality_parameters(modality) for m in (model, given_model))
        if len(own) != len(theirs):
            raise ConfigError(
                f"training.transfer.init.{modality}: that model has {len(theirs) - 1} tower levels, this one "
                f"{len(own) - 1}; set model.num_levels alike"
            )
        given = given_model.state_dict()
        for number, (names, candidates) in enumerate(zip(own, theirs, strict=True)):
            _copy_stage(model, names, {name: given[name] for name in candidates}, modality)
            stages += [{} for _ in range(number + 1 - len(stages))]
            stages[number] |= dict.fromkeys(names)
    parameters = dict(model.named_parameters())
    return [[parameters[name] for name in stage if name in parameters] for stage in stages]  # the rest are buffers


def _copy_stage(model: MultimodalModel, names: list[str], given: dict[str, Tensor], modality: str) -> None:
    """Fill `names` of the model from `given`: the same name, else that of another tower in the same place."""
    own = model.state_dict()
    by_part: dict[str, Tensor] = {}
    for name, tensor in given.items():
        by_part.setdefault(without_key(name), tensor)
    for name in names:
        value = given.get(name, by_part.get(without_key(name)))
        if value is None or value.shape != own[name].shape:
            raise ConfigError(
                f"training.transfer.init.{modality}: '{name}' is {tuple(own[name].shape)} here and "
                f"{None if value is None else tuple(value.shape)} there; set model.hidden_dim, model.sharing and the "
                "modality's encoder and reduce alike"
            )
        own[name].copy_(value)  # state_dict holds the parameters themselves


def trainable_stages(tuning: str, num_stages: int, epoch: int, num_epochs: int) -> set[int]:
    """Which copied stages are trained in this epoch (from 1). Stage 0 is the input, the last one the top level.

    `gradual` unfreezes stages from the top, in equal steps over the first half of the epochs; first none.
    """
    if tuning == "finetune":
        return set(range(num_stages))
    if tuning == "frozen":
        return set()
    num_free = int((epoch - 1) / max(1, num_epochs / 2) * num_stages)
    return set(range(max(0, num_stages - num_free), num_stages))


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Remove these parameters' gradients, so that the optimiser does not change them (nor decay them)."""
    for parameter in parameters:
        parameter.grad = None


# --- distillation ---------------------------------------------------------------------------------------------------


def distillation_targets(
    knowledge: Knowledge, table: FeatureTable, tasks: Collection[str], temperature: float
) -> dict[str, np.ndarray]:
    """Teachers' targets for the train rows, see `teacher_targets`: task -> (N, C), NaN elsewhere. Empty if there are
    no teachers."""
    if not knowledge.teachers:
        return {}
    rows = table.rows("train")
    known = teacher_targets(knowledge.teachers, table.take(rows), tasks, temperature)
    targets = {t: np.full((len(table.split), own.shape[1]), np.nan, dtype=np.float32) for t, own in known.items()}
    for t, values in known.items():
        targets[t][rows] = values
    return targets


def teacher_targets(
    teachers: Iterable[SourceModel], table: FeatureTable, tasks: Iterable[str], temperature: float
) -> dict[str, np.ndarray]:
    """Mean of the teachers' softened probabilities: task -> (N, C) float32; NaN in rows that no teacher can read.

    Softened by T: p^(1/T) renormalised, which is the softmax of logits / T.
    Raises: ConfigError if no teacher knows a task.
    """
    targets: dict[str, np.ndarray] = {}
    found = [(teacher, predict_table(teacher.model, table)) for teacher in teachers]
    for task in tasks:
        predictions = [_aligned(proba[task], t.class_names[task], table, task) for t, proba in found if task in proba]
        if not predictions:
            raise ConfigError(f"training.transfer.teachers: none of them knows the task '{task}'")
        soft = np.stack([table.kinds[task].soften(p, temperature) for p in predictions])
        # (teachers, N)
        seen = np.stack([readable(table, t.model.spec.modalities) for t, proba in found if task in proba])
        count = seen.sum(axis=0)[:, None]
        total = np.where(seen[:, :, None], soft, 0.0).sum(axis=0)
        targets[task] = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    return targets


def _aligned(proba: np.ndarray, class_names: list[str], table: FeatureTable, task: str) -> np.ndarray:
    """The teacher's columns in the order of the table's classes; 0 for classes that it does not know."""
    own = table.class_names[task]
    if class_names == own:
        return proba
    index = {name: i for i, name in enumerate(class_names)}
    columns = [index.get(name) for name in own]
    return np.stack([np.zeros(len(proba)) if c is None else proba[:, c] for c in columns], axis=1)


def distillation_loss(logits: Tensor, target: Tensor, temperature: float, kind: TaskKind) -> tuple[Tensor, Tensor]:
    """Summed T^2 KL(teacher || student) over the rows that have a target, and their number. logits, target: (B, C).

    T^2 keeps the gradient's size whatever T is, as in the source.
    """
    known = ~target.isnan().any(dim=1)
    target = torch.where(known[:, None], target, 1.0 / target.shape[1])
    rows = kind.distillation(logits, target, temperature)
    return temperature**2 * torch.where(known, rows, 0.0).sum(), known.sum()

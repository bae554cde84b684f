"""Models of one architecture and one seed, stacked: parameters with one more axis in front, and AdamW over them.

A step is a few wide products instead of P small ones each. The members start from the same weights, read the same
batches and draw the same random numbers, as each would alone with that seed. (A member's dropout mask is where the
number is below its own rate.) So a member's result is that of `fit` with its config.

Axes: P members, N trained numbers of each, B rows of a batch, C classes of one task.

Source: horizontally fused training, Wang et al. 2021 (https://arxiv.org/abs/2102.02344);
the layers are those of `models.layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmkt_ray.config import Config
from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.models import FeatureBatch, MultimodalModel
from mmkt_ray.training.batches import Worker
from mmkt_ray.training.criterion import Criterion
from mmkt_ray.training.learner import Logits
from mmkt_ray.training.loop import Fitting
from mmkt_ray.training.setup import build_criterion, spec_of

MEMBER_KEYS = frozenset(
    {
        "training.lr",
        "training.weight_decay",
        "training.label_smoothing",
        "model.dropout",
        "model.feature_dropout",
        "model.modality_dropout",
    }
)
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # as torch.optim.AdamW


@dataclass
class ModelStack:
    """P models between two steps."""

    config: Config
    run: Fitting  # rows, batches, and the initial weights of all members
    plain_criterion: Criterion  # with the config's label smoothing
    # the parameters in the order of the columns: matrices, which decay, come first
    layout: list[tuple[str, nn.Parameter]]
    rate_keys: dict[str, str]  # buffer of the model -> of MEMBER_KEYS
    values: dict[str, Tensor]  # of MEMBER_KEYS -> (P,)
    weights: Tensor  # (P, N)
    mean: Tensor  # (P, N) of the gradients, as AdamW keeps it
    square: Tensor  # (P, N) mean of their squares

    @classmethod
    def start(
        cls, config: Config, table: FeatureTable, members: Sequence[Mapping[str, Any]], device: torch.device
    ) -> ModelStack:
        """members: overrides of some of MEMBER_KEYS each; what they leave out is the config's. Raises: as `fit`."""
        run = Fitting(config, table, Worker(device=device))
        layout = sorted(run.model.named_parameters(), key=lambda item: item[1].ndim < 2)
        weights = torch.cat([p.detach().flatten() for _, p in layout]).expand(len(members), -1).clone()
        return cls(
            config,
            run,
            build_criterion(config, run.table, run.train_rows, run.worker),
            layout,
            {name: f"model.{field}" for name, field in run.model.dropout_rates().items()},
            {key: _column(config, members, key).to(device) for key in MEMBER_KEYS},
            weights,
            torch.zeros_like(weights),
            torch.zeros_like(weights),
        )

    def select(self, members: Sequence[int]) -> ModelStack:
        """These members alone, in this order."""
        index = torch.tensor(list(members), dtype=torch.long, device=self.weights.device)
        values = {key: v[index] for key, v in self.values.items()}
        weights, mean, square = self.weights[index], self.mean[index], self.square[index]
        return replace(self, values=values, weights=weights, mean=mean, square=square)

    @staticmethod
    def merge(stacks: Sequence[ModelStack]) -> ModelStack:
        """All members of stacks that have trained equally long. Raises: ValueError if they are of several configs."""
        first = stacks[0]
        if any(stack.config != first.config for stack in stacks):
            raise ValueError("only stacks of one config can be merged")
        return replace(
            first,
            values={key: torch.cat([stack.values[key] for stack in stacks]) for key in first.values},
            weights=torch.cat([stack.weights for stack in stacks]),
            mean=torch.cat([stack.mean for stack in stacks]),
            square=torch.cat([stack.square for stack in stacks]),
        )

    @property
    def criterion(self) -> Criterion:
        """Of logits (P, B, C): each member's losses with its own label smoothing."""
        return replace(self.plain_criterion, label_smoothing=self.values["training.label_smoothing"])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """(P, N) as parameter name -> (P, ..), detached."""
        columns = flat.detach().split([p.numel() for _, p in self.layout], dim=1)
        return {name: part.view(-1, *p.shape) for (name, p), part in zip(self.layout, columns, strict=True)}

    def trainable(self) -> dict[str, Tensor]:
        """The weights by parameter name, with gradients."""
        return {name: p.requires_grad_() for name, p in self.views(self.weights).items()}

    def forward(
        self,
        model: MultimodalModel,
        parameters: Mapping[str, Tensor],
        features: Mapping[str, FeatureBatch],
        present: Mapping[str, Tensor],
    ) -> Logits:
        """Each member's logits, task -> (P, B, C). model: `run.model`, in train or eval mode."""
        tensors = {**parameters, **self._rates()}
        found: Logits = functional_call(model, tensors, (features, present), tie_weights=False)  # a model ties none
        return found

    def _rates(self) -> dict[str, Tensor]:
        """The members' own dropout rates, under the names of the model's buffers: (P,), or () where all are equal."""
        rates = {key: self.values[key] for key in set(self.rate_keys.values())}
        rates = {key: v[0] if bool((v == v[0]).all()) else v for key, v in rates.items()}
        return {name: rates[key] for name, key in self.rate_keys.items()}

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], step: int, schedule: float | Tensor) -> None:
        """One step of AdamW with each member's own rate and decay; decays what `build_optimizer` decays.

        gradients: (P, ..) of each parameter in the order of `layout`;
        schedule: factor of the rates, or one for each (P,).
        """
        if self.weights.device.type != "cpu":
            return self.update_at_once(gradients, step, schedule)
        rates = (self.values["training.lr"] * schedule).tolist()
        decays = self.values["training.weight_decay"].tolist()
        num_matrices = sum(p.ndim >= 2 for _, p in self.layout)
        count = torch.tensor(float(step + 1), device=self.weights.device)
        flat = (
            self.views(self.weights).values(),
            gradients,
            self.views(self.mean).values(),
            self.views(self.square).values(),
        )
        columns = [[part.unbind() for part in parts] for parts in flat]  # each: by parameter, then by member
        alike = dict[tuple[float, float], list[int]]()  # members of one rate and decay go together
        for i, settings in enumerate(zip(rates, decays, strict=True)):
            alike.setdefault(settings, []).append(i)
        for (lr, weight_decay), members in alike.items():
            for part, decay in ((slice(num_matrices), weight_decay), (slice(num_matrices, None), 0.0)):
                p, grad, mean, square = ([by_member[i] for by_member in c[part] for i in members] for c in columns)
                torch._fused_adamw_(
                    p, grad, mean, square, [], [count] * len(p),
                    lr=lr, weight_decay=decay, beta1=BETA1, beta2=BETA2, eps=EPS, amsgrad=False, maximize=False,
                )  # fmt: skip

    @torch.no_grad()
    def update_at_once(self, gradients: Sequence[Tensor], step: int, schedule: float | Tensor) -> None:
        """The same in a few operations over all members, for a GPU, where a small operation takes as long as a wide
        one. On a CPU these would go through memory several times."""
        gradient = torch.cat([part.flatten(1) for part in gradients], dim=1)  # (P, N)
        rates = (self.values["training.lr"] * schedule)[:, None]
        num_decaying = sum(p.numel() for _, p in self.layout if p.ndim >= 2)
        self.weights[:, :num_decaying].mul_(1 - rates * self.values["training.weight_decay"][:, None])
        self.mean.lerp_(gradient, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        change = (
            gradient.copy_(self.square).div_(1 - BETA2 ** (step + 1)).sqrt_().add_(EPS).reciprocal_().mul_(self.mean)
        )
        self.weights.sub_(change.mul_(rates / (1 - BETA1 ** (step + 1))))

    def alone(self, config: Config, weights: Tensor, member: int) -> MultimodalModel:
        """One member as a model of its own, in eval mode. weights: (P, N), those of now or earlier ones."""
        model = MultimodalModel(spec_of(config, self.run.table))
        own = {name: p[member] for name, p in self.views(weights).items()}
        model.load_state_dict({**self.run.model.state_dict(), **own})
        return model.eval()


def _column(config: Config, members: Sequence[Mapping[str, Any]], key: str) -> Tensor:
    """The members' values of a key (P,)."""
    section, name = key.split(".")
    default = getattr(getattr(config, section), name)
    return torch.tensor([float(member.get(key, default)) for member in members])

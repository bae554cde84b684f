"""Balance between modalities, so that the one that learns fastest does not hold up the others.

Axes: B rows of a batch, M modalities, H width of a signal, C classes of one task, T tasks.

Each strategy is a `Learner` and an entry of `LEARNERS`; the base class does not balance.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmkt_ray.features.feature_table import FeatureTable
from mmkt_ray.inference.outputs import model_inputs
from mmkt_ray.models import FeatureBatch, MultimodalModel
from mmkt_ray.training.batches import Batch, Worker
from mmkt_ray.training.criterion import Criterion
from mmkt_ray.training.learner import Learner, Logits, UnimodalHeads, own_parameters
from mmkt_ray.training.methods.task_weighting import TaskWeighting


class OgmGe(Learner):
    """OGM-GE: scale down the gradients of the modality that is ahead, and add noise to them.

    s_m is the mean probability of the right class that the model gives with modality m alone, over the step's rows
    with several modalities; rho_m = s_m over the mean of the other modalities' s, the mean over tasks. The gradient
    of the parameters that are m's alone is multiplied by 1 - tanh(ALPHA (rho_m - 1)) where rho_m > 1, and those of
    its matrices get Gaussian noise of their own standard deviation.

    Source: Peng et al. 2022 (https://arxiv.org/abs/2203.15332), for two modalities, one task and concatenation, where
    s_m is read from the classifier's columns; it takes tanh(ALPHA rho), which jumps at rho = 1. With one pass of the
    fusion per modality instead, any fusion and any number of modalities will do.
    """

    ALPHA = 0.5

    def __init__(self, model: MultimodalModel, criterion: Criterion, weighting: TaskWeighting, worker: Worker) -> None:
        super().__init__(model, criterion, weighting, worker)
        self.own = own_parameters(model)
        self.noise = torch.Generator(worker.device)

    def begin_epoch(self, seed: int) -> None:
        """See Learner."""
        self.noise.manual_seed(seed)  # the same noise on all ranks, or they would drift apart

    def forward(
        self, features: dict[str, FeatureBatch], present: dict[str, Tensor]
    ) -> tuple[Logits, dict[str, Logits]]:
        """The logits, and those of each modality alone, which carry no gradient: modality -> task -> (B, C)."""
        signals, seen = self.model.encode(features, present)
        alone = {}
        with torch.no_grad():
            for m in self.own:
                only = {other: there if other == m else torch.zeros_like(there) for other, there in seen.items()}
                alone[m] = self.model.decide(signals, only)
        return self.model.decide(signals, seen), alone

    def gradients(self, net: nn.Module, batch: Batch) -> Tensor:
        """See Learner."""
        logits, alone = net(batch.features, batch.present)
        loss = self.backward(self.criterion.of_batch(logits, batch), batch)
        ratios = discrepancy_ratios(*self._scores(alone, batch))
        for m, ratio in zip(alone, ratios, strict=True):
            self._modulate(self.own[m], ratio)
        return loss

    def _scores(self, alone: dict[str, Logits], batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed probability of the right answer and number of rows, over all ranks: (T, M) each."""
        several = torch.stack(list(batch.present.values())).sum(dim=0) > 1
        spec = self.model.spec
        sums = torch.zeros(2, len(spec.tasks), len(alone), device=self.worker.device)
        for i, t in enumerate(sorted(spec.tasks)):
            for j, m in enumerate(alone):
                if m in spec.inputs[t]:
                    there = several & batch.present[m] & batch.labels[t].known
                    right = spec.kinds[t].right_probability(alone[m][t], batch.labels[t])
                    sums[0, i, j], sums[1, i, j] = torch.where(there, right, 0.0).sum(), there.sum()
        if self.worker.world_size > 1:
            dist.all_reduce(sums)
        return sums[0], sums[1]

    def _modulate(self, parameters: Iterable[nn.Parameter], ratio: Tensor) -> None:
        if ratio <= 1:
            return
        for p in parameters:
            if p.grad is not None:
                noise = torch.empty_like(p.grad).normal_(generator=self.noise) * p.grad.std() if p.ndim >= 2 else 0.0
                p.grad.mul_(coefficient(ratio, self.ALPHA)).add_(noise)


def coefficient(ratio: Tensor, alpha: float) -> Tensor:
    """OGM's factor of the gradient: 1 up to a ratio of 1, then down towards 0."""
    return 1 - torch.tanh(alpha * (ratio - 1).clamp(min=0))


def discrepancy_ratios(sums: Tensor, counts: Tensor) -> Tensor:
    """rho (M,): each modality's mean score over the mean of the others', averaged over tasks;
    1 where nothing compares.

    sums, counts: (T, M) summed scores and their number.
    """
    scores, there = sums / counts.clamp(min=1), counts > 0
    num_others = there.sum(dim=1, keepdim=True) - there.int()
    others = (torch.where(there, scores, 0.0).sum(dim=1, keepdim=True) - torch.where(there, scores, 0.0)) / num_others
    compares = there & (num_others > 0) & (others > 0)
    ratios = torch.where(compares, scores / torch.where(compares, others, 1.0), 0.0).sum(dim=0)
    num_tasks = compares.sum(dim=0)
    return torch.where(num_tasks > 0, ratios / num_tasks.clamp(min=1), 1.0)


class GradientBlending(UnimodalHeads):
    """Gradient blending: the fused head and a head per modality, weighted by how well each generalises.

    The loss of a task is sum over its heads k of w_k loss_k. Every few epochs w_k is set in proportion to G / O^2: G
    how much the head's val loss fell since the last look, O how much the gap between val and train loss grew. Weights
    of a task sum to 1; they are even at first, where nothing generalises, and without a val split. No head falls
    below `FLOOR` of an even share, or it could not recover.

    Source: Wang et al. 2020 (https://arxiv.org/abs/1905.12681), its online version; there each head's G and O are
    measured on a copy that trains alone, here on the joint run.
    """

    EVERY, FLOOR, SMALLEST_GAP = 5, 0.1, 0.01  # epochs, share, nats
    exists: Tensor
    shares: Tensor
    before: Tensor

    def __init__(self, model: MultimodalModel, criterion: Criterion, weighting: TaskWeighting, worker: Worker) -> None:
        super().__init__(model, criterion, weighting, worker)
        spec = model.spec
        exists = torch.tensor([[True, *(m in spec.inputs[t] for m in self.modalities)] for t in sorted(spec.tasks)])
        self.register_buffer("exists", exists, persistent=False)  # (T, 1 + M): the fused head, then one per modality
        self.register_buffer("shares", exists / exists.sum(dim=1, keepdim=True))
        # train and val losses at the last look
        self.register_buffer("before", torch.full((2, *exists.shape), torch.nan))

    def gradients(self, net: nn.Module, batch: Batch) -> Tensor:
        """See Learner."""
        logits, alone, seen = net(batch.features, batch.present)
        by_head = [self.criterion.of_batch(logits, batch)]
        by_head += [self.criterion.of_batch(alone[m], batch.restrict(m, seen[m])) for m in self.modalities]
        blended = {}
        for t, shares in zip(sorted(logits), self.shares.clone(), strict=True):
            terms = [share * losses[t] for share, losses in zip(shares, by_head, strict=True) if t in losses]
            blended[t] = torch.stack(terms).sum()
        return self.backward(blended, batch)

    def end_epoch(self, epoch: int, table: FeatureTable, train_rows: np.ndarray, val_rows: np.ndarray) -> None:
        """See Learner. Looks at the val rows and at no more train rows than that."""
        if len(val_rows) == 0 or (epoch - 1) % self.EVERY:
            return
        some = train_rows[np.linspace(0, len(train_rows) - 1, min(len(train_rows), len(val_rows))).astype(int)]
        now = torch.stack([self._head_losses(table, rows) for rows in (some, val_rows)])
        if epoch > 1:
            self.shares.copy_(blend(self.before, now, self.exists, self.FLOOR, self.SMALLEST_GAP))
        self.before.copy_(now)

    @torch.inference_mode()
    def _head_losses(self, table: FeatureTable, rows: np.ndarray, batch_size: int = 1024) -> Tensor:
        """Mean loss of each head over the rows of a split, over all ranks: (T, 1 + M)."""
        self.eval()
        sums = torch.zeros(2, *self.exists.shape, device=self.worker.device)
        mine = rows[self.worker.rank :: self.worker.world_size]
        for start in range(0, len(mine), batch_size):
            features, present = model_inputs(
                table, mine[start : start + batch_size], table.features, self.worker.device
            )
            here = mine[start : start + batch_size]
            labels = {t: y[here].tensors(self.worker.device) for t, y in table.labels.items()}
            batch = Batch(features, present, labels, present, labels)
            logits, alone, seen = self(features, present)
            heads = [(logits, batch), *((alone[m], batch.restrict(m, seen[m])) for m in self.modalities)]
            for k, (own, part) in enumerate(heads):
                totals = self.criterion.total_weights(part.labels)
                losses = self.criterion.losses(own, part.labels, dict.fromkeys(totals, torch.ones(())))
                for i, t in enumerate(sorted(logits)):
                    if t in losses:
                        sums[:, i, k] += torch.stack([losses[t], totals[t]])
        if self.worker.world_size > 1:
            dist.all_reduce(sums)
        return sums[0] / sums[1].clamp(min=torch.finfo(torch.float32).tiny)


def blend(before: Tensor, now: Tensor, exists: Tensor, floor: float, smallest_gap: float) -> Tensor:
    """Shares (T, K) of the heads from their train and val losses at two looks, (2, T, K) each; rows sum to 1.

    exists: (T, K) bool.
    """
    gain = (before[1] - now[1]).clamp(min=0)
    gap = (now[1] - now[0]) - (before[1] - before[0])
    even = exists / exists.sum(dim=1, keepdim=True)
    wanted = torch.where(exists, gain / gap.square().clamp(min=smallest_gap**2), 0.0)
    total = wanted.sum(dim=1, keepdim=True)
    return floor * even + (1 - floor) * torch.where(total > 0, wanted / total.clamp(min=1e-12), even)


class MMPareto(UnimodalHeads):
    """MMPareto: a unimodal loss helps each modality's towers only where it does not work against the fused one.

    On the parameters that are modality m's alone, with g the gradient of the fused loss and u that of m's unimodal
    loss: g + u where they agree (g.u >= 0); where they conflict 2 a g + 2 (1 - a) u with the a that makes it
    shortest, which hurts neither, brought back to the length of g + u if it is shorter, as the noise of a long step
    helps to generalise. Other parameters get the plain sum.

    Source: Wei & Hu 2024 (https://arxiv.org/abs/2405.17730), which also stretches all by a constant that AdamW would
    take out again.
    """

    def __init__(self, model: MultimodalModel, criterion: Criterion, weighting: TaskWeighting, worker: Worker) -> None:
        super().__init__(model, criterion, weighting, worker)
        self.own = own_parameters(model)

    def gradients(self, net: nn.Module, batch: Batch) -> Tensor:
        """See Learner. The gradients are wanted one by one, so they are summed over ranks here and not by DDP."""
        logits, alone, seen = self(batch.features, batch.present)
        fused = self.weigh(self.criterion.of_batch(logits, batch), batch)
        factors = dict(zip(self.weighting.tasks, self.weighting.factors().detach(), strict=True))
        parameters = [p for p in self.parameters() if p.requires_grad]
        joint = self._gradient(fused, parameters)
        total, loss = dict(joint), fused.detach()
        for m in self.modalities:
            losses = self.criterion.of_batch(alone[m], batch.restrict(m, seen[m]))
            unimodal = torch.stack([factors[t] * losses[t] for t in losses]).sum()
            unimodal_gradient = self._gradient(unimodal, parameters)
            total |= {p: total[p] + g if p in total else g for p, g in unimodal_gradient.items()}
            own = [p for p in self.own[m] if p in joint and p in unimodal_gradient]
            combined = pareto([joint[p] for p in own], [unimodal_gradient[p] for p in own])
            total |= dict(zip(own, combined, strict=True))
            loss = loss + unimodal.detach()
        for p, gradient in total.items():
            p.grad = gradient
        return loss

    def _gradient(self, loss: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """Of the step's loss, of which `loss` is this rank's part, where it reaches the parameter."""
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        gradients = {p: g for p, g in zip(parameters, found, strict=True) if g is not None}
        if self.worker.world_size > 1:
            for gradient in gradients.values():
                dist.all_reduce(gradient)
        return gradients


def pareto(joint: list[Tensor], alone: list[Tensor]) -> list[Tensor]:
    """MMPareto's combination of two gradients of the same parameters."""

    def dot(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)]).sum()

    gg, gu, uu = dot(joint, joint), dot(joint, alone), dot(alone, alone)
    a = torch.where(gu < 0, (uu - gu) / (gg + uu - 2 * gu).clamp(min=1e-30), 0.5)
    length = (4 * (a**2 * gg + 2 * a * (1 - a) * gu + (1 - a) ** 2 * uu)).clamp(min=0).sqrt()
    stretch = ((gg + uu + 2 * gu).clamp(min=0).sqrt() / length.clamp(min=1e-30)).clamp(min=1)
    return [stretch * (2 * a * g + 2 * (1 - a) * u) for g, u in zip(joint, alone, strict=True)]


LEARNERS: dict[str | None, type[Learner]] = {
    None: Learner,
    "ogm_ge": OgmGe,
    "gradient_blending": GradientBlending,
    "mmpareto": MMPareto,
}

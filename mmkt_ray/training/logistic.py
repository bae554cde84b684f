"""Logistic regression with a squared penalty, solved to its optimum: several fits over the same rows at once.

Minimised over W and b is the sum over rows of c_i loss(y_i, x_i W + b) + l2 / 2 |W|^2, scikit-learn's with C = 1 /
l2: the loss is cross-entropy; of a multilabel task, or of two classes, binary cross-entropy; of numbers half the
squared error, which is scikit-learn's ridge regression with alpha = l2. The bias is free. The solver is L-BFGS in
coordinates in which the curvature is near one: dense blocks are rotated to their principal axes, which leaves the
penalty as it is, and each axis is scaled by its curvature. A block with more columns than rows then has as many
columns as rows. Sparse blocks stay sparse.

Fits that differ in their row weights (folds) and the classes of a multilabel task are columns of the same products.
So L-BFGS is written out here: SciPy's takes one problem at a time, in float64.
The tests compare it with scikit-learn's.

Axes: N rows, D columns of a block, R of its columns after rotation, P all of these and the bias, F fits, K classes.

Sources: L-BFGS, Liu & Nocedal 1989 (https://doi.org/10.1007/BF01589116); the bound of the curvature by the features'
own, Böhning 1992 (https://doi.org/10.1007/BF00048682).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot, softplus

from mmkt_ray.encoders.encoder import Features
from mmkt_ray.models.imputation import evenly

MAX_ROTATED = 2048  # axes; the eigenvectors of a larger matrix cost more than they save
GRAM_ROWS = 4  # times D: enough for the axes
ROTATED_ROWS = 8  # times D: up to so many rows are rotated once; with more, the weights are, in each step
CHUNK_VALUES = 2_000_000  # logits in memory at a time
DOT_ROWS = 64  # products that are summed in float32
HISTORY_BYTES = 400_000_000  # of L-BFGS
MAX_PAIRS = 12
ROUND_STEPS = 25  # of L-BFGS, then the axes are scaled anew
MAX_ROUNDS = 40
TOLERANCE = 1e-9  # share of the loss by which the optimum may still be below
NOISE = 1e-7  # of a float32 loss, relative
Point: TypeAlias = tuple[Tensor, Tensor, Tensor]  # weights (P, F K), values (F K,), gradient (P, F K)


@dataclass(frozen=True)
class FeatureBlock:
    """Some columns of the rows. `x` (N, D) is dense, or sparse without empty columns. The solver works on x times
    `basis` (D, R); without a basis, on x."""

    x: Tensor | sp.csr_matrix
    basis: Tensor | None
    energy: Tensor  # (R,) squared lengths of the solver's columns
    back: Tensor | None = None  # (D', R) where x is rotated already: maps weights back
    columns: np.ndarray | None = None  # of a sparse block: which of `width` its columns are
    width: int = 0

    def original(self, weights: Tensor) -> np.ndarray:
        """Weights (R, ..) as those of the block that was given, (D, ..)."""
        basis = self.basis if self.back is None else self.back
        if self.columns is None:
            return (weights if basis is None else basis @ weights).numpy()
        whole = np.zeros((self.width, weights.shape[1]), np.float32)
        whole[self.columns] = weights.numpy()
        return whole

    def take(self, rows: np.ndarray) -> FeatureBlock:
        """Some of the rows, on the same axes."""
        x = self.x[rows] if not isinstance(self.x, Tensor) else self.x[torch.from_numpy(rows)]
        return FeatureBlock(
            x, self.basis, self.energy * (len(rows) / self.x.shape[0]), self.back, self.columns, self.width
        )


def make_block(features: Features) -> FeatureBlock:
    """Of dense (N, D) or sparse features, absent rows of zeros."""
    if not isinstance(features, np.ndarray):
        columns = np.unique(features.indices[: features.indptr[-1]])
        x = sp.csr_matrix(features[:, columns], dtype=np.float32)
        energy = np.asarray(x.multiply(x).sum(axis=0)).ravel().astype(np.float32)
        return FeatureBlock(x, None, torch.from_numpy(energy), columns=columns, width=features.shape[1])
    x = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
    num_rows, width = x.shape
    if min(num_rows, width) > MAX_ROTATED or not width:
        return FeatureBlock(x, None, x.square().sum(dim=0))
    if width > num_rows:
        return _wide_block(x)
    some = x[torch.from_numpy(evenly(np.arange(num_rows), GRAM_ROWS * width))]
    energy, axes = torch.linalg.eigh((some.T @ some).double())
    basis, energy = axes.float(), energy.clamp(min=0).float() * (num_rows / len(some))
    if num_rows <= ROTATED_ROWS * width:
        return FeatureBlock(x @ basis, None, energy, back=basis)
    return FeatureBlock(x, basis, energy)


def _wide_block(x: Tensor) -> FeatureBlock:
    """More columns than rows: by the eigenvectors of x x', only axes on which some row lies."""
    energy, axes = torch.linalg.eigh(x.double() @ x.double().T)
    kept = energy > 1e-10 * energy.max().clamp(min=1e-30)
    energy, axes = energy[kept], axes[:, kept]
    back = x.T @ (axes / energy.sqrt()).float()
    return FeatureBlock((axes * energy.sqrt()).float(), None, energy.float(), back=back)


class Problem:
    """F fits of one task to the rows of some blocks.

    Columns of all weights are F x K, fit by fit. A fit of one class per row is one problem of K columns, of any
    number of classes per row K problems of one column: problems share no number.
    """

    def __init__(
        self,
        blocks: Sequence[FeatureBlock],
        labels: np.ndarray,
        used: np.ndarray,
        class_weights: np.ndarray,
        one_of: bool,
        squared: bool = False,
    ) -> None:
        """labels: (N,) codes 0 .. K - 1 if a row is `one_of` the classes, else (N, K) of 0 and 1, or `squared`
        numbers; used: (N, F) bool, the rows that each fit learns from; class_weights: (K,) what a row of the class
        counts, or a 1 against a 0."""
        self.blocks, self.softmax, self.squared = blocks, one_of, squared
        self.num_rows, self.num_fits = used.shape
        self.num_classes = len(class_weights)
        self.labels, self.used = torch.from_numpy(labels), torch.from_numpy(used)
        self.class_weights = torch.from_numpy(class_weights).float()
        self.num_columns = self.num_fits * self.num_classes
        self.energy = torch.cat([*(b.energy for b in blocks), torch.tensor([float(self.num_rows)])])[:, None]
        self.sizes = [len(b.energy) for b in blocks]
        size = max(256, CHUNK_VALUES // self.num_columns)
        self.chunks = [slice(i, min(i + size, self.num_rows)) for i in range(0, self.num_rows, size)]
        self.pieces = [[b.x[chunk] for chunk in self.chunks] for b in blocks]
        self.turned = [[None if isinstance(x, Tensor) else x.T.tocsr() for x in pieces] for pieces in self.pieces]
        self._count()

    def _count(self) -> None:
        """Weight of each class in each fit, and which problems there is something to solve in."""
        used = self.used.float()
        if self.softmax:
            positive = used.T @ (one_hot(self.labels, self.num_classes) * self.class_weights)  # (F, K)
            self.total = positive.sum(dim=1, keepdim=True).expand_as(positive).reshape(-1)
            self.seen = positive > 0
            several = self.seen.sum(dim=1, keepdim=True) > 1
            self.open = several.expand_as(positive).reshape(-1)
            share = (positive + 0.5) / (positive + 0.5).sum(dim=1, keepdim=True)
            self.start = share.log().reshape(-1)
            self.unseen = torch.where(self.seen, 0.0, -torch.inf)
            return
        if self.squared:
            num_rows = used.sum(dim=0)[:, None].expand(-1, self.num_classes)
            self.total = num_rows.reshape(-1)
            self.open = self.total > 0
            self.start = (used.T @ self.labels.float() / num_rows.clamp(min=1)).reshape(-1)
            return
        positive = used.T @ (self.labels.float() * self.class_weights)
        negative = used.T @ (1 - self.labels.float())
        self.total = (positive + negative).reshape(-1)
        self.open = ((positive > 0) & (negative > 0)).reshape(-1)
        self.start = ((positive + 0.5) / (negative + 0.5)).log().reshape(-1)

    def initial(self) -> Tensor:
        """Weights (P, F K): zeros, and the biases that tell the class frequencies; a class counts half a row more."""
        weights = torch.zeros(len(self.energy), self.num_columns)
        weights[-1] = self.start
        return weights

    def together(self, values: Tensor) -> Tensor:
        """(F K,) sums over the columns of a problem, for each of its columns."""
        if not self.softmax:
            return values
        by_fit = values.view(self.num_fits, -1).sum(dim=1, keepdim=True)
        return by_fit.expand(-1, self.num_classes).reshape(-1)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """(F K,) float64 inner products of (P, F K), over all that belongs to a problem."""
        return self.together(column_dots(a, b))

    def products(self, weights: Sequence[Tensor], index: int) -> Tensor:
        """Logits (B, F K) of a chunk. weights: `mapped`."""
        logits = weights[-1][-1].expand(self.chunks[index].stop - self.chunks[index].start, -1).clone()
        for pieces, own in zip(self.pieces, weights, strict=False):
            x = pieces[index]
            logits += linear(x, own.T.contiguous()) if isinstance(x, Tensor) else torch.from_numpy(x @ own.numpy())
        return logits

    def mapped(self, weights: Tensor) -> list[Tensor]:
        """Weights (P, F K) as those of each block's `x`, and last of the bias (1, F K)."""
        *parts, bias = weights.split([*self.sizes, 1])
        return [
            *(p if b.basis is None else b.basis @ p for b, p in zip(self.blocks, parts, strict=True)),
            bias,
        ]

    def evaluate(self, weights: Tensor, curvature: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (F K,) float64 of the problems, the gradient (P, F K), and sums of p (1 - p) (F K,) if asked for."""
        mapped = self.mapped(weights)
        losses, curved = (torch.zeros(self.num_columns, dtype=torch.float64) for _ in range(2))
        gradients = [torch.zeros_like(m) for m in mapped]
        for index, chunk in enumerate(self.chunks):
            loss, residual, slopes = self._residual(self.products(mapped, index), chunk, curvature)
            losses += loss
            curved += slopes
            gradients[-1] += residual.sum(dim=0)
            for pieces, turned, gradient in zip(self.pieces, self.turned, gradients, strict=False):
                x, other = pieces[index], turned[index]
                gradient += (residual.T @ x).T if other is None else torch.from_numpy(other @ residual.numpy())
        parts = [g if b.basis is None else b.basis.T @ g for b, g in zip(self.blocks, gradients, strict=False)]
        gradient = torch.cat([*parts, gradients[-1]])
        return self.together(losses), gradient.mul_(self.open), curved

    def _residual(self, logits: Tensor, chunk: slice, curvature: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the losses (F K,), their slopes (B, F K), sums of the slopes' slopes (F K,) of a chunk's logits."""
        shape = (len(logits), self.num_fits, self.num_classes)
        used, labels = self.used[chunk], self.labels[chunk]
        if self.softmax:
            weights = used * self.class_weights[labels][:, None]  # (B, F)
            log_p = (logits.view(shape) + self.unseen).log_softmax(dim=-1)
            own = labels[:, None, None].expand(-1, self.num_fits, 1)
            picked = torch.where(weights > 0, log_p.gather(-1, own)[..., 0], 0.0)
            losses = torch.zeros(shape[1:], dtype=torch.float64)
            losses[:, 0] = -(weights * picked).sum(dim=0, dtype=torch.float64)
            p, weights = log_p.exp_(), weights[..., None]
            slopes = (
                (weights * p * (1 - p)).sum(dim=0, dtype=torch.float64) if curvature else losses.new_zeros(shape[1:])
            )
            residual = p.scatter_add_(-1, own, own.new_full(own.shape, -1, dtype=p.dtype)).mul_(weights)
            return losses.view(-1), residual.view_as(logits), slopes.view(-1)
        if self.squared:
            each = logits.view(shape) - labels[:, None].to(logits.dtype)
            residual = each * used[..., None]
            losses = (each * residual / 2).sum(dim=0, dtype=torch.float64)
            slopes = used.double().sum(dim=0)[:, None].expand_as(losses) * curvature
            return losses.reshape(-1), residual.view_as(logits), slopes.reshape(-1)
        y = labels.to(logits.dtype)
        weights = used[..., None] * torch.where(labels == 1, self.class_weights, 1.0)[:, None]  # (B, F, K)
        z = logits.view(shape)
        each = softplus(z) - z * y[:, None]
        losses = (weights * each).sum(dim=0, dtype=torch.float64)
        p = z.sigmoid()
        slopes = (weights * p * (1 - p)).sum(dim=0, dtype=torch.float64) if curvature else torch.zeros_like(losses)
        return losses.view(-1), ((p - y[:, None]) * weights).view_as(logits), slopes.view(-1)

    def held_out(self, weights: Tensor, fit: np.ndarray) -> np.ndarray:
        """(N, K) logits of each row by one of the fits; fit: (N,) its number."""
        mapped, chosen = self.mapped(self.complete(weights)), torch.from_numpy(fit.astype(np.int64))
        found = np.empty((self.num_rows, self.num_classes), np.float32)
        for index, chunk in enumerate(self.chunks):
            logits = self.products(mapped, index).view(-1, self.num_fits, self.num_classes)
            found[chunk] = logits[torch.arange(len(logits)), chosen[chunk]].numpy()
        return found

    def complete(self, weights: Tensor) -> Tensor:
        """Weights with biases for what a fit can't have learnt: a class without rows is as likely as half a row."""
        weights = weights.clone()
        if self.softmax:
            bias = weights[-1].view(self.num_fits, self.num_classes)
            known = (bias + self.unseen).logsumexp(dim=1, keepdim=True)
            total = self.total.view_as(bias)[:, :1]
            bias.copy_(torch.where(self.seen, bias, known + torch.log(0.5 / (total + 0.5))))
        return weights

    def original(self, weights: Tensor, fit: int) -> tuple[list[np.ndarray], np.ndarray]:
        """One fit's weights of the blocks that were given, (D, K) each, and its bias (K,)."""
        own = self.complete(weights)[:, fit * self.num_classes : (fit + 1) * self.num_classes]
        *parts, bias = own.split([*self.sizes, 1])
        return [b.original(p) for b, p in zip(self.blocks, parts, strict=True)], bias[0].numpy()


def column_dots(a: Tensor, b: Tensor) -> Tensor:
    """(K,) float64 inner products of the columns of (P, K), both contiguous,
    summed in float32 over DOT_ROWS rows at a time.

    Without a product in memory: several times as fast as `(a * b).sum(dim=0, dtype=torch.float64)`.
    """
    whole = len(a) // DOT_ROWS * DOT_ROWS
    left, right = a.numpy(), b.numpy()
    parts = np.einsum("ij,ij->j", left[whole:], right[whole:], dtype=np.float64, casting="unsafe")
    if whole:
        shape = (-1, DOT_ROWS, left.shape[1])
        parts += np.einsum("cij,cij->cj", left[:whole].reshape(shape), right[:whole].reshape(shape)).sum(
            0, dtype=np.float64
        )
    return torch.from_numpy(parts)


def minimise(problem: Problem, l2: float, start: Tensor | None = None, tolerance: float = TOLERANCE) -> Tensor:
    """The best weights (P, F K) at one penalty, to within this share of the loss.
    start: weights of another penalty."""
    weights = problem.initial() if start is None else start
    moving = problem.open
    for _ in range(MAX_ROUNDS):
        weights, moving = _descend(problem, l2, weights, moving, tolerance)
        if not moving.any():
            break
    return weights


def _descend(
    problem: Problem, l2: float, weights: Tensor, moving: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Some steps in coordinates that suit the curvature here: the new weights, and which problems (F K,) go on."""
    curved = problem.evaluate(weights, curvature=True)[2].float().clamp(min=1e-3 * problem.total / problem.num_classes)
    decay = torch.full_like(problem.energy, l2)
    decay[-1] = 0
    scale = (problem.energy * (curved / problem.num_rows) + decay).clamp(min=1e-12).rsqrt()
    point = weights / scale

    def at(point: Tensor) -> tuple[Tensor, Tensor]:
        weights = point * scale
        losses, gradient, _ = problem.evaluate(weights)
        return losses + problem.dot(decay * weights, weights) / 2, (gradient + decay * weights) * scale * problem.open

    pairs = _Pairs(problem, point.numel())
    value, gradient = at(point)
    for _ in range(ROUND_STEPS):
        direction = pairs.direction(gradient)
        slope = problem.dot(direction, gradient)  # twice what is still to be gained, about
        moving = moving & (slope < -tolerance * value.clamp(min=1e-6 * problem.total))
        if not moving.any():
            break
        step, found = _search(at, point, value, direction * moving, slope)
        moving = moving & (step > 0)
        pairs.add(found[0] - point, found[2] - gradient)
        point, value, gradient = found
    return point * scale, moving


def _search(
    at: Callable[[Tensor], tuple[Tensor, Tensor]], point: Tensor, value: Tensor, direction: Tensor, slope: Tensor
) -> tuple[Tensor, Point]:
    """Steps (F K,) that each problem's value falls enough by, halved from one; none where float32 sees no fall."""
    step = torch.ones_like(value)
    for _ in range(12):
        new = torch.addcmul(point, direction, step.to(point.dtype))
        new_value, gradient = at(new)
        short = new_value > value + 1e-4 * step * slope + NOISE * value.abs()
        if not short.any():
            break
        step = torch.where(short, step / 2 if step.min() > 1e-3 else 0.0 * step, step)
    return step, (new, new_value, gradient)


class _Pairs:
    """The last steps and changes of the gradient: an estimate of the curvature that is left."""

    def __init__(self, problem: Problem, num_values: int) -> None:
        most = HISTORY_BYTES // (8 * max(1, num_values))
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=int(min(MAX_PAIRS, max(3, most))))
        self.dot = problem.dot
        self.first = torch.ones(problem.num_columns)

    def add(self, step: Tensor, change: Tensor) -> None:
        """(P, F K) each."""
        along, length = self.dot(step, change), self.dot(change, change)
        good = along > 1e-10 * length
        self.first = torch.where(good, along / length.clamp(min=1e-30), self.first).float()
        self.pairs.append((step, change, torch.where(good, 1 / along.clamp(min=1e-30), 0.0).float()))

    def direction(self, gradient: Tensor) -> Tensor:
        """Where to go from here: downhill, bent by the pairs."""
        bent, shares = -gradient, []
        for step, change, inverse in reversed(self.pairs):
            share = (inverse * self.dot(step, bent)).float()
            bent.addcmul_(change, share, value=-1)
            shares.append(share)
        bent *= self.first
        for (step, change, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            other = (inverse * self.dot(change, bent)).float()
            bent.addcmul_(step, share - other)
        return bent

"""Transferability scores: how well features will serve a task, computed from the features before anything is trained.

LogME, H-score and linear CKA come from sums over the train rows that merge (`Moments`), so the store is read part by
part and D x D numbers are all that is kept. LEEP needs the predictions of a model of another task:
it is computed where there is one.

Sources: LogME, You et al. 2021 (https://arxiv.org/abs/2102.11005); H-score, Bao et al. 2019
(https://arxiv.org/abs/2212.10082), with the shrinkage of Ibrahim et al. 2022 (https://arxiv.org/abs/2110.06893);
LEEP, Nguyen et al. 2020 (https://arxiv.org/abs/2002.12462); linear CKA, Kornblith et al. 2019
(https://arxiv.org/abs/1905.00414).
Axes: N rows, B rows of a block, D features, K target columns (classes of all tasks in question side by side),
C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp

from mmkt_ray.encoders.encoder import Features

DENSE_FROM = 0.03  # share of non-zeros above which dense products are faster
_STEPS, _TOLERANCE = 100, 1e-4  # LogME's fixed point


@dataclass(frozen=True)
class Moments:
    """Sums over rows of features x and 0/1 targets y, float64; of disjoint rows they add up."""

    num_rows: int
    total: np.ndarray  # (D,) sum of x
    gram: np.ndarray  # (D, D) sum of x x'
    length_4: float  # sum of |x|^4
    long_total: np.ndarray  # (D,) sum of |x|^2 x
    counts: np.ndarray  # (K,) sum of y
    cross: np.ndarray  # (D, K) sum of x y'

    @classmethod
    def partial(cls, features: Features, targets: np.ndarray) -> Moments:
        """Of a block: features (B, D) dense or sparse, targets (B, K)."""
        x: Any = features.astype(np.float64)
        y = targets.astype(np.float64)
        if sp.issparse(x) and x.nnz > DENSE_FROM * x.shape[0] * x.shape[1]:
            x = x.toarray()
        squares = x.multiply(x) if sp.issparse(x) else x * x
        length_2 = np.asarray(squares.sum(axis=1)).ravel()
        gram = x.T @ x
        return cls(
            x.shape[0],
            np.asarray(x.sum(axis=0)).ravel(),
            gram.toarray() if sp.issparse(gram) else gram,
            float(length_2 @ length_2),
            np.asarray(x.T @ length_2).ravel(),
            y.sum(axis=0),
            np.asarray(x.T @ y),
        )

    @classmethod
    def merge(cls, parts: Sequence[Moments]) -> Moments:
        """Of the rows of all parts; merge([merge([a, b]), c]) equals merge([a, b, c])."""
        first, names = parts[0], [f.name for f in fields(cls)]
        return cls(**{name: sum((getattr(p, name) for p in parts[1:]), getattr(first, name)) for name in names})

    def covariance(self) -> np.ndarray:
        """(D, D), divided by N."""
        mean = self.total / self.num_rows
        return self.gram / self.num_rows - np.outer(mean, mean)

    @cached_property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues (D,) of the Gram matrix, rounding noise set to 0, and its vectors (D, D)."""
        values, vectors = scipy.linalg.eigh(self.gram)
        return np.where(values > values[-1] * len(values) * np.finfo(float).eps, values, 0.0), vectors

    def class_means(self, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Share of the rows (K,) and mean of the centred features (D, K) of each target that occurs."""
        counts, cross = self.counts[columns], self.cross[:, columns]
        counts, cross = counts[counts > 0], cross[:, counts > 0]
        return counts / self.num_rows, cross / counts - (self.total / self.num_rows)[:, None]


def logme(moments: Moments, columns: slice) -> float:
    """Log evidence per row of Bayesian linear regressions of each target column on the features, averaged;
    higher is better.

    Prior precision alpha and noise precision beta are those that maximise it (fixed point of the paper's section
    4.2), for all columns at once. Columns that no row has are left out.
    """
    used = moments.counts[columns] > 0
    sigma, vectors = moments.spectrum[0][:, None], moments.spectrum[1]
    projected = (vectors.T @ moments.cross[:, columns][:, used]) ** 2  # (D, K)
    z = np.divide(projected, sigma, out=np.zeros_like(projected), where=sigma > 0)  # squared coordinates of y
    length = moments.counts[columns][used]  # |y|^2
    outside = np.maximum(length - z.sum(axis=0), 0.0)
    num, dim = moments.num_rows, len(sigma)
    alpha, beta = np.ones(len(length)), np.ones(len(length))
    for _ in range(_STEPS):
        ratio = alpha / beta
        gamma = (sigma / (sigma + ratio)).sum(axis=0)
        weight = (sigma * z / (sigma + ratio) ** 2).sum(axis=0)
        residual = (z * (ratio / (sigma + ratio)) ** 2).sum(axis=0) + outside
        alpha, beta = gamma / (weight + 1e-5), (num - gamma) / (residual + 1e-5)
        if (np.abs(alpha / beta - ratio) <= _TOLERANCE * ratio).all():
            break
    evidence = dim * np.log(alpha) + num * np.log(beta / (2 * np.pi)) - np.log(alpha + beta * sigma).sum(axis=0)
    return float(((evidence - beta * residual - alpha * weight) / (2 * num)).mean())


def h_score(moments: Moments, columns: slice, exclusive: bool = True) -> float:
    """Variance between classes measured by the features' shrunk covariance, tr(S^-1 B) (1 - a); higher is better.

    The shrinkage a is that of Ledoit & Wolf (as scikit-learn computes it). Of classes that do not exclude each other:
    the mean over the classes of each one against the rest.
    """
    covariance = moments.covariance()
    shrinkage = ledoit_wolf_shrinkage(moments)
    dim = len(covariance)
    shrunk = (1 - shrinkage) * covariance
    shrunk.flat[:: dim + 1] += shrinkage * np.trace(covariance) / dim + np.finfo(float).eps
    share, means = moments.class_means(columns)
    if not exclusive:  # of a class and the rest: B = p m m' + (1 - p) (p / (1 - p))^2 m m'
        share, means = share[share < 1], means[:, share < 1]
        share = share / (1 - share) / max(len(share), 1)
    between = (means * scipy.linalg.solve(shrunk, means, assume_a="pos")).sum(axis=0)
    return float((1 - shrinkage) * (share * between).sum())


def ledoit_wolf_shrinkage(moments: Moments) -> float:
    """What `sklearn.covariance.ledoit_wolf_shrinkage` returns, from sums. Ledoit & Wolf 2004, section 3.3."""
    num, mean, covariance = moments.num_rows, moments.total / moments.num_rows, moments.covariance()
    dim, square = len(mean), float(mean @ mean)
    fourth = (  # sum of |x - mean|^4
        moments.length_4
        + 4 * mean @ moments.gram @ mean
        + num * square**2
        - 4 * mean @ moments.long_total
        + 2 * square * np.trace(moments.gram)
        - 4 * square * mean @ moments.total
    )
    mu, size = np.trace(covariance) / dim, float((covariance**2).sum())
    beta = (fourth / num - size) / (dim * num)
    delta = (size - dim * mu**2) / dim
    beta = min(beta, delta)
    return 0.0 if beta <= 0 else float(beta / delta)


def linear_cka(moments: Moments, width: int) -> float | None:
    """Similarity 0..1 of the first `width` features and the rest, over the same rows;
    None if one of them is constant.

    It is biased upwards where there are fewer rows than features.
    """
    covariance = moments.covariance()
    first, second, cross = covariance[:width, :width], covariance[width:, width:], covariance[:width, width:]
    norm = np.linalg.norm(first) * np.linalg.norm(second)
    return float((cross**2).sum() / norm) if norm > 0 else None


def leep(source: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """Mean log of the labels' expected probability, given a source model's predictions; at most 0, higher is better.

    source: (N, Z) probabilities of the source task's classes; labels: (N,) class codes of the target task, >= 0.
    """
    joint = np.zeros((num_classes, source.shape[1]))
    np.add.at(joint, labels, source.astype(np.float64) / len(labels))
    given = joint / np.maximum(joint.sum(axis=0), np.finfo(float).tiny)  # P(label | source class)
    return float(np.log((source * given[labels]).sum(axis=1)).mean())

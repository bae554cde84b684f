"""A task's labels as the solver of linear models wants them.

Axes: N rows, D features, C classes of the task, K classes that the solver sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class LinearTarget:
    """A task's labels of classes: logistic regression."""

    squared: ClassVar[bool] = False  # the loss
    labels: np.ndarray  # (N,) codes if `one_of`, else (N, K) of 0 and 1
    classes: np.ndarray  # the task's classes that K stands for; two classes are one column
    class_weights: np.ndarray  # (K,)
    weight: float  # of all rows, beside the class weights
    form: str  # several | two | sets

    @classmethod
    def of_codes(cls, codes: np.ndarray, class_weights: np.ndarray) -> LinearTarget:
        """codes: (N,) of one class per row; class_weights: (C,)."""
        classes, codes = np.unique(codes, return_inverse=True)
        weights = class_weights[classes]
        if len(classes) == 2:
            return cls(codes[:, None].astype(np.int8), classes, weights[1:] / weights[0], float(weights[0]), "two")
        return cls(codes, classes, weights, 1.0, "several")

    @classmethod
    def of_sets(cls, values: np.ndarray, class_weights: np.ndarray) -> LinearTarget:
        """values: (N, C) of 0 and 1; class_weights: (C,) of a positive."""
        return cls(values, np.arange(len(class_weights)), class_weights, 1.0, "sets")

    @property
    def one_of(self) -> bool:
        """The classes exclude each other: one softmax rather than a sigmoid for each."""
        return self.form == "several"

    def row_weights(self) -> np.ndarray:
        """(N,) or (N, K) what each loss counts."""
        if self.one_of:
            return np.asarray(self.class_weights[self.labels])
        return self.weight * np.where(self.labels == 1, self.class_weights, 1.0)

    def score(self, logits: np.ndarray) -> tuple[float, float]:
        """Mean log loss and accuracy of logits (N, K)."""
        import torch

        z, y, weights = torch.from_numpy(logits).double(), torch.from_numpy(self.labels), self.row_weights()
        if self.one_of:
            losses = torch.nn.functional.cross_entropy(z, y, reduction="none").numpy()
            return float(np.average(losses, weights=weights)), float((z.argmax(dim=1) == y).double().mean())
        losses = torch.nn.functional.binary_cross_entropy_with_logits(z, y.double(), reduction="none").numpy()
        right = ((z >= 0) == (y == 1)).all(dim=1)
        return float((losses * weights).sum() / weights.sum()), float(right.double().mean())

    def expanded(self, weights: np.ndarray, bias: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        """(D, K), (K,) as (D, C), (C,): a class without rows has no weights and is as likely as half a row."""
        if self.form == "sets":
            return weights, bias
        if self.form == "two":
            weights, bias = np.hstack([-weights, weights]) / 2, np.array([-bias[0], bias[0]]) / 2
        whole = np.zeros((len(weights), num_classes), np.float32)
        whole[:, self.classes] = weights
        unknown = np.logaddexp.reduce(bias) + np.log(0.5 / (len(self.labels) + 0.5))
        biases = np.full(num_classes, unknown, np.float32)
        biases[self.classes] = bias
        return whole, biases


@dataclass(frozen=True)
class NumberTarget:
    """A task's numbers (N, 1): ridge regression. The rest as in LinearTarget."""

    squared: ClassVar[bool] = True
    one_of: ClassVar[bool] = False
    weight: ClassVar[float] = 1.0
    labels: np.ndarray  # (N, 1) float32, of unit spread about

    @property
    def class_weights(self) -> np.ndarray:
        """(1,)."""
        return np.ones(1)

    def score(self, logits: np.ndarray) -> tuple[float, float]:
        """Mean of half the squared errors, and R2."""
        error = logits.astype(np.float64) - self.labels
        squared = float((error**2).mean())
        return squared / 2, 1 - squared / max(float(self.labels.var()), 1e-30)

    def expanded(self, weights: np.ndarray, bias: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        """As they are."""
        return weights, bias

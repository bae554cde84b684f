"""Leading eigenvectors of a matrix that is only known by its products with blocks,
one product per pass over the data.

Axes: D side of the matrix, L columns of a block.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

EPS = 1e-6  # relative error of sums of float32 products


class BlockLanczos:
    """Block Lanczos for the leading eigenvectors of A = X'X, given one product of A per step.

    A [Q1 .. Qm] = [Q1 .. Qm+1] T with orthonormal columns Q and block tridiagonal T; the left singular vectors of
    the right side are those of A on the Krylov space. Musco & Musco (2015), https://arxiv.org/abs/1504.05477
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self.blocks: list[np.ndarray] = []  # Q1 .. Qm+1, each (D, L) float32
        self._diagonal: list[np.ndarray] = []  # T's blocks (L, L): Qi'AQi
        self._below: list[np.ndarray] = []  # Qi+1'AQi

    def add(self, product: np.ndarray) -> np.ndarray:
        """Take A times the last block (at first: times the start block), return the next block."""
        if self.blocks:
            self._diagonal.append(self.blocks[-1].T @ product)
            product = product - self.blocks[-1] @ self._diagonal[-1]
        if len(self.blocks) > 1:
            product -= self.blocks[-2] @ self._below[-1].T
        norm = float(np.linalg.norm(self._diagonal[0], 2)) if self.blocks else 0
        block, first = self._orthonormalise(product, norm)
        for other in self.blocks:  # what rounding left, or where the space is exhausted, random directions
            block -= other @ (other.T @ block)
        block, second = self._orthonormalise(block)
        if self.blocks:
            self._below.append(second @ first)
        self.blocks.append(block)
        return block

    def leading(self, num: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The `num` largest eigenvalues, descending, their vectors (D, num) and the rank, counted up to `num`."""
        size, steps = self.blocks[0].shape[1], len(self._diagonal)
        matrix = np.zeros((steps + 1, size, steps, size))
        for i in range(steps):
            matrix[i, :, i], matrix[i + 1, :, i] = self._diagonal[i], self._below[i]
            if i + 1 < steps:
                matrix[i, :, i + 1] = self._below[i].T
        left, values, _ = scipy.linalg.svd(matrix.reshape((steps + 1) * size, -1), full_matrices=False)
        left = left[:, :num].astype(np.float32).reshape(steps + 1, size, num)
        vectors = sum(block @ part for block, part in zip(self.blocks, left, strict=True))
        rank = int((values[:num] > values[0] * EPS).sum())
        return values[:num], vectors, rank

    def _orthonormalise(self, matrix: np.ndarray, norm: float = 0) -> tuple[np.ndarray, np.ndarray]:
        """Q (D, L) and R (L, L) with QR = matrix, through the Gram matrix: several times cheaper than LAPACK's QR.

        Q is orthonormal up to float32 rounding times the condition: a second call on Q makes it so fully. Directions
        that float32 products cannot tell from zero, beside the largest one and `norm`, become random ones.
        """
        panels = (matrix[i : i + 8192].astype(np.float64) for i in range(0, len(matrix), 8192))
        values, vectors = scipy.linalg.eigh(sum(panel.T @ panel for panel in panels))
        empty = values <= max(values[-1], norm**2) * EPS**2
        scales = np.sqrt(np.where(empty, 1, values))
        block = matrix @ np.where(empty, 0, vectors / scales).astype(np.float32)
        block[:, empty] = self._generator.standard_normal((len(block), empty.sum()), np.float32) / np.sqrt(len(block))
        return block, np.where(empty, 0, vectors * scales).T.astype(np.float32)

"""Choosing the features that tell most about a task: scores as scikit-learn's,
from statistics that merge over shards.

Axes: B rows of a chunk, N labelled rows of the train split, D features in, K features out (`dim`), C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmkt_ray.encoders.encoder import Features, check_array
from mmkt_ray.encoders.reduce import Reducer, ReduceSection
from mmkt_ray.errors import DataError
from mmkt_ray.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse as sp
    from scipy import special
else:
    np, sp, special = lazy("numpy"), lazy("scipy.sparse"), lazy("scipy.special")

NUM_BINS = 8  # of a dense feature, for mutual information
NUM_NAMED = 100  # chosen features that the card and the report name
_BLOCK = 4096  # features whose counts by class are dense at once


@dataclass(frozen=True)
class ClassSums:
    """Sums over the rows of each class."""

    classes: tuple[str, ...]  # C, sorted
    num_rows: np.ndarray  # (C,)
    sums: Any  # (C, D) float64 of features, or of whether they are not zero; (C, NUM_BINS D) of whether one is in a bin
    squares: np.ndarray  # (D,) of all rows' squared features
    lowest: float  # of all features


class SelectReducer(Reducer):
    """The K features with the highest scores for a task's classes, in their order; sparse ones stay sparse."""

    does: ClassVar[str] = "the features that tell most about a task's classes, sparse ones stay sparse"

    class Section(ReduceSection):
        """See SelectReducer."""

        name: Literal["select"] = "select"
        by: Literal["chi2", "anova", "mutual_info"] = Field(
            description="scikit-learn's chi2 (features of 0 and above), f_classif, or mutual_info_classif of whether "
            "a sparse "
            f"feature is there, of a dense one which of {NUM_BINS} bins it is in"
        )
        task: str = Field(description="multiclass or binary task; its train labels are looked at")
        dim: int = Field(ge=1, description="features kept")
        keeps_sparse: ClassVar[bool] = True

        @property
        def labels_of(self) -> str | None:
            return self.task

    def __init__(self, config: ReduceSection) -> None:
        super().__init__(config)
        self._edges: np.ndarray | None = None  # (NUM_BINS - 1, D), after the first pass over dense features
        self.sparse = False  # known once features were seen

    @property
    def by(self) -> str:
        """The score."""
        return str(self._config.by)  # type: ignore[attr-defined]  # of Section

    def partial(self, features: Features, labels: Sequence[str]) -> ClassSums:
        """Sums of one chunk (B, D) with its labels (B,)."""
        classes, codes = np.unique(np.array(labels, object), return_inverse=True)
        member = sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(len(classes), len(codes)))
        is_sparse = sp.issparse(features)
        rows: Any = features.astype(np.float64)
        values = rows.data if is_sparse else rows
        if not np.isfinite(values).all():
            raise DataError("features for select hold NaN or infinite values: see what the encoder returns")
        squares = np.asarray(rows.multiply(rows).sum(axis=0)).ravel() if is_sparse else (rows**2).sum(axis=0)
        lowest = float(values.min(initial=0 if is_sparse else np.inf))
        if self.by == "mutual_info" and is_sparse:
            rows = (rows != 0).astype(np.float64)
        elif self.by == "mutual_info" and self._edges is not None:
            bins = self.bins(features)
            sums = np.concatenate([member @ (bins == k).astype(np.float64) for k in range(NUM_BINS)], axis=1)
            return ClassSums(tuple(classes), np.bincount(codes), sums, squares, lowest)
        return ClassSums(tuple(classes), np.bincount(codes), member @ rows, squares, lowest)

    def merge(self, parts: list[ClassSums]) -> ClassSums:
        """Sums of all rows."""
        classes = sorted({name for part in parts for name in part.classes})
        place = {name: i for i, name in enumerate(classes)}
        num_rows, sums = np.zeros(len(classes), np.int64), None
        for part in parts:
            own = [place[name] for name in part.classes]
            num_rows[own] += part.num_rows
            spread = sp.csr_matrix((np.ones(len(own)), (own, np.arange(len(own)))), shape=(len(classes), len(own)))
            moved = spread @ part.sums
            sums = moved if sums is None else sums + moved
        squares = sum((part.squares for part in parts[1:]), parts[0].squares)
        return ClassSums(tuple(classes), num_rows, sums, squares, min(part.lowest for part in parts))

    def finish(self, total: ClassSums) -> None:
        """End a pass; the last one leaves it fitted.

        Raises: DataError for fewer than two classes or D features, and for chi2 of features below zero.
        """
        task, width = self._config.labels_of, len(total.squares)
        if len(total.classes) < 2:
            raise DataError(f"select needs two classes of '{task}' in the train split, got {list(total.classes)}")
        if self.dim > width:
            raise DataError(f"select of dim={self.dim} is impossible, there are {width} features: lower reduce.dim")
        if self.by == "chi2" and total.lowest < 0:
            raise DataError(f"chi2 is of counts, and features go down to {total.lowest:.3g}: set reduce.by to anova")
        self.sparse = sp.issparse(total.sums)
        if self.by == "mutual_info" and not self.sparse and self._edges is None:
            mean = total.sums.sum(axis=0) / total.num_rows.sum()
            spread = np.sqrt(np.maximum(total.squares / total.num_rows.sum() - mean**2, 0))
            self._edges = mean + spread * special.ndtri(np.arange(1, NUM_BINS) / NUM_BINS)[:, None]
            return
        # scipy sorts in place, and what comes from Ray's object store is read-only
        own = replace(total, sums=total.sums.copy())
        scores = np.nan_to_num(SCORES[self.by](own), nan=-1.0, posinf=np.finfo(np.float64).max)
        best = np.argsort(-scores, kind="stable")[: self.dim]
        self._tensors = {"columns": np.sort(best).astype(np.int64), "scores": scores[np.sort(best)]}
        self._rest = {"width": width, "sparse": self.sparse}
        self.name_features([])

    def bins(self, features: np.ndarray) -> np.ndarray:
        """Which bin each feature is in, (B, D) 0..NUM_BINS - 1."""
        assert self._edges is not None, "the first pass is over"
        return np.asarray(sum((features > edge).astype(np.int8) for edge in self._edges))

    def name_features(self, names: Sequence[str]) -> None:
        """Name the chosen ones in the card, the best first. names: of all D features, or none."""
        columns, scores = self._tensors["columns"], self._tensors["scores"]
        first = np.argsort(-scores, kind="stable")[:NUM_NAMED]
        selected = [[names[columns[i]] if names else f"feature {columns[i]}", float(f"{scores[i]:.6g}")] for i in first]
        self._rest["found"] = {"selected": selected}

    def encode(self, features: Features) -> Features:
        """(B, D) -> (B, K) float32."""
        self._check_fitted()
        self._check_width(features, self._rest["width"])
        chosen = features[:, self._tensors["columns"]].astype(np.float32)
        return sp.csr_matrix(chosen) if sp.issparse(chosen) else np.ascontiguousarray(chosen)

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        """Become what `state` was taken of. Raises: ValueError, KeyError if that was no state."""
        columns = check_array("columns", tensors["columns"], "int64", (self.dim,))
        if (np.diff(columns) <= 0).any() or columns[0] < 0 or columns[-1] >= rest["width"]:
            raise ValueError("columns do not ascend within the width")
        self._tensors = {"columns": columns, "scores": check_array("scores", tensors["scores"], "float64", (self.dim,))}
        self._rest, self.sparse = dict(rest), bool(rest["sparse"])


# --- scores (D,) --------------------


def chi2(total: ClassSums) -> np.ndarray:
    """As scikit-learn's `chi2`: sums of (observed - expected)^2 / expected over classes."""
    observed = total.sums
    of_class = total.num_rows / total.num_rows.sum()
    squared = observed.copy().power(2) if sp.issparse(observed) else observed**2
    all_sums = np.asarray(observed.sum(axis=0)).ravel()
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((squared.T @ (1 / of_class)) / all_sums - all_sums)


def anova(total: ClassSums) -> np.ndarray:
    """As scikit-learn's `f_classif`: the variance between classes over that within them."""
    num_rows, num_classes = total.num_rows.sum(), len(total.classes)
    squared = total.sums.power(2) if sp.issparse(total.sums) else total.sums**2
    correction = np.asarray(total.sums.sum(axis=0)).ravel() ** 2 / num_rows
    between = squared.T @ (1 / total.num_rows) - correction
    within = total.squares - correction - between
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((between / (num_classes - 1)) / (within / (num_rows - num_classes)))


def mutual_info(total: ClassSums) -> np.ndarray:
    """As scikit-learn's `mutual_info_classif` of discrete features, in nats."""
    width = len(total.squares)
    return np.concatenate([_information(_counts(total, slice(i, i + _BLOCK))) for i in range(0, width, _BLOCK)])


def _counts(total: ClassSums, block: slice) -> np.ndarray:
    """Rows by class, value and feature (C, values, D of the block)."""
    if sp.issparse(total.sums):
        there = total.sums.tocsc()[:, block].toarray()
        return np.stack([total.num_rows[:, None] - there, there], axis=1)
    return np.asarray(total.sums.reshape(len(total.classes), NUM_BINS, -1)[:, :, block])


def _information(counts: np.ndarray) -> np.ndarray:
    """counts: (C, values, D)."""
    joint = counts / counts.sum(axis=(0, 1))
    apart = joint.sum(axis=0, keepdims=True) * joint.sum(axis=1, keepdims=True)
    return np.asarray(special.rel_entr(joint, apart).sum(axis=(0, 1)))


SCORES: dict[str, Callable[[ClassSums], np.ndarray]] = {"chi2": chi2, "anova": anova, "mutual_info": mutual_info}

"""Linear reducers of features, exact, from statistics that merge over shards in any order and as any tree.

How to fit one, where `chunks()` yields the train split's features:

    while not reducer.fitted:  # once for pca and standardize, `num_passes` times for svd of wide features
        reducer.finish(reducer.merge([reducer.partial(chunk) for chunk in chunks()]))

Axes: B rows of a chunk, N rows of the train split, D features in, K features out (`dim`), L columns of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mmkt_ray.encoders.encoder import Features, check_array
from mmkt_ray.errors import DataError
from mmkt_ray.lazy import lazy
from mmkt_ray.section import Choice

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse as sp
    from scipy import linalg

    from mmkt_ray.encoders import lanczos
    from mmkt_ray.encoders.lanczos import BlockLanczos
else:
    np, sp, linalg = lazy("numpy"), lazy("scipy.sparse"), lazy("scipy.linalg")
    lanczos = lazy("mmkt_ray.encoders.lanczos")

EXACT_WIDTH = 4096  # up to this width D x D matrices are cheap and sparse chunks may be made dense


@dataclass(frozen=True)
class CentredMoments:
    """Count, mean and centred second moment of rows, float64."""

    num_rows: int
    mean: np.ndarray  # (D,)
    scatter: np.ndarray  # sum of squared deviations (D,), or of their products (D, D)


@dataclass(frozen=True)
class Products:
    """X' X Q of rows X (B, D) and a block Q (D, L), without its zero rows."""

    num_rows: int
    width: int  # D
    square_sum: float  # of all values of X
    columns: np.ndarray  # (C,) ascending: the features that are not zero in all rows
    sums: np.ndarray  # (C, L): those rows of the product


class ReduceSection(Choice):
    """Base of the config section of a reducer: a linear reduction of one modality's features,
    fitted on the train split."""

    dim: int | None = Field(None, ge=1, description="features kept")
    keeps_sparse: ClassVar[bool] = False  # what it makes of sparse features is sparse

    @property
    def labels_of(self) -> str | None:
        """The task whose labels `partial` takes beside features."""
        return None


class Reducer:
    """What reducers have in common: fitted arrays, their way to disk and back, checks."""

    Section: ClassVar[type[ReduceSection]]
    does: ClassVar[str]  # for the config's help

    version = 1
    _shapes: ClassVar[dict[str, tuple[Any, str]]]  # fitted array -> type, axes
    num_passes = 1  # passes over the train split that the fit takes

    def __init__(self, config: ReduceSection) -> None:
        self._config = config
        self._tensors: dict[str, np.ndarray] = {}
        self._rest: dict[str, Any] = {}

    @property
    def fitted(self) -> bool:
        """Whether the last pass is finished."""
        return bool(self._tensors)

    @property
    def dim(self) -> int:
        """K."""
        assert self._config.dim is not None, "the config demands it"
        return self._config.dim

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Fitted arrays; of pca and svd also `kept_frac`, the share of variance (svd: of squared length) kept."""
        self._check_fitted()
        return dict(self._tensors), dict(self._rest)

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        """Become what `state` was taken of. Raises: ValueError, KeyError if that was no state."""
        width = len(tensors["mean"]) if "mean" in self._shapes else len(tensors["components"])
        shapes = {"D": width, "K": self._config.dim}
        self._tensors = {
            name: check_array(name, tensors[name], dtype, tuple(shapes[axis] for axis in axes))
            for name, (dtype, axes) in self._shapes.items()
        }
        self._rest = dict(rest)

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise DataError(f"{self._config.name} is not fitted: fit it on the train split, or load its state, first")

    def _check_width(self, features: Features, width: int) -> None:
        if features.ndim != 2 or features.shape[1] != width:
            raise DataError(f"{self._config.name} was fitted on features of width {width}, got shape {features.shape}")

    def _check_parts(self, parts: list[Any]) -> None:
        if not parts:
            raise DataError(f"no features to fit {self._config.name} on: has any train row this modality?")

    def _check_rank(self, rank: int, num_rows: int, width: int) -> None:
        if self.dim > rank:
            raise DataError(
                f"{self._config.name} to dim={self.dim} is impossible: the {num_rows} train rows of width {width} "
                f"have rank {rank}; set reduce.dim to {rank} or less"
            )

    def _check_finite(self, value: np.ndarray | float) -> None:
        if not np.isfinite(value).all():
            raise DataError(
                f"features for {self._config.name} hold NaN or infinite values: see what the encoder returns"
            )


def _flip_signs(components: np.ndarray) -> np.ndarray:
    """Components (D, K) float32 whose entry of largest magnitude is positive (scikit-learn's svd_flip on V)."""
    largest = np.abs(components).argmax(axis=0)
    signs = np.sign(components[largest, np.arange(components.shape[1])])
    return np.ascontiguousarray(components * signs, dtype=np.float32)


def _largest_eigenvectors(matrix: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The `num` largest eigenvalues, descending, of a positive semidefinite matrix (D, D),
    and their vectors (D, num).

    Third comes its rank, counted up to `num`. If `num` exceeds D, all D are returned.
    """
    width = len(matrix)
    values, vectors = linalg.eigh(matrix, subset_by_index=[max(width - num, 0), width - 1])
    rank = int((values > values[-1] * width * np.finfo(np.float64).eps).sum())
    return values[::-1], vectors[:, ::-1], rank


class _CentringReducer(Reducer, ABC):
    """What fits on moments."""

    @abstractmethod
    def _scatter(self, centred: np.ndarray) -> np.ndarray:
        """Second moment of centred rows (B, D), as in CentredMoments: (D,) or (D, D)."""

    def partial(self, features: Features) -> CentredMoments:
        """CentredMoments of one chunk (B, D)."""
        dense = self._dense(features)
        mean = dense.mean(axis=0) if len(dense) else np.zeros(dense.shape[1])
        return CentredMoments(len(dense), mean, self._scatter(dense - mean))

    def merge(self, parts: list[CentredMoments]) -> CentredMoments:
        """CentredMoments of all rows: what Chan, Golub & LeVeque (1979) do for two parts, for any number at once."""
        self._check_parts(parts)
        num_rows = sum(part.num_rows for part in parts)
        shares = np.array([part.num_rows for part in parts]) / max(num_rows, 1)
        mean = shares @ np.stack([part.mean for part in parts])
        offsets = np.stack([np.sqrt(part.num_rows) * (part.mean - mean) for part in parts])
        within = sum((part.scatter for part in parts[1:]), parts[0].scatter)
        return CentredMoments(num_rows, mean, within + self._scatter(offsets))

    def _dense(self, features: Features) -> np.ndarray:
        """The chunk as (B, D) float64. Raises: DataError where sparse features are too wide for that."""
        if isinstance(features, np.ndarray):
            return features.astype(np.float64)
        if features.shape[1] > EXACT_WIDTH:
            raise DataError(
                f"{self._config.name} centres features, which would make {features.shape[1]}-wide sparse ones dense: "
                f"use `reduce: {{name: svd, dim: ...}}`, or max_features <= {EXACT_WIDTH} in the encoder"
            )
        return np.asarray(features.toarray().astype(np.float64))

    def _centred(self, features: Features) -> np.ndarray:
        """The features less their fitted mean, (B, D) float64."""
        self._check_fitted()
        mean = self._tensors["mean"]
        self._check_width(features, len(mean))
        return np.asarray(self._dense(features) - mean)


class PcaReducer(_CentringReducer):
    """Projection of centred features onto their K directions of largest variance."""

    does: ClassVar[str] = "projection of centred features"

    class Section(ReduceSection):
        """See PcaReducer."""

        name: Literal["pca"] = "pca"
        dim: int = Field(ge=1, description="features kept")

    _shapes: ClassVar = {"mean": ("float64", "D"), "components": ("float32", "DK")}

    def _scatter(self, centred: np.ndarray) -> np.ndarray:
        return np.asarray(centred.T @ centred)

    def finish(self, total: CentredMoments) -> None:
        """Raises: DataError if `dim` exceeds the rank, or values are not finite."""
        self._check_finite(total.scatter)
        values, vectors, rank = _largest_eigenvectors(total.scatter, self.dim)
        self._check_rank(rank, total.num_rows, len(total.mean))
        self._tensors = {"mean": total.mean, "components": _flip_signs(vectors)}
        self._rest = {"kept_frac": float(values.sum() / np.trace(total.scatter))}

    def encode(self, features: Features) -> np.ndarray:
        """(B, D) -> (B, K) float32."""
        return np.asarray(self._centred(features).astype(np.float32) @ self._tensors["components"])


class Standardizer(_CentringReducer):
    """Features less their mean, divided by their standard deviation; constant ones become 0."""

    does: ClassVar[str] = "zero mean and unit variance, no change of width"

    class Section(ReduceSection):
        """See Standardizer."""

        name: Literal["standardize"] = "standardize"
        dim: None = Field(None, description="none: the width does not change")

    _shapes: ClassVar = {"mean": ("float64", "D"), "scale": ("float64", "D")}

    @property
    def dim(self) -> int:
        """D."""
        self._check_fitted()
        return len(self._tensors["mean"])

    def _scatter(self, centred: np.ndarray) -> np.ndarray:
        return np.asarray((centred**2).sum(axis=0))

    def load_state(self, tensors: dict[str, np.ndarray], rest: dict[str, Any]) -> None:
        super().load_state(tensors, rest)
        if not (self._tensors["scale"] > 0).all():
            raise ValueError("scale is not above 0 throughout")

    def finish(self, total: CentredMoments) -> None:
        """Raises: DataError if there are no rows, or values are not finite."""
        self._check_parts([total] if total.num_rows else [])
        self._check_finite(total.scatter)
        variance = total.scatter / total.num_rows
        # Rounding leaves a constant feature a variance of about this much (scikit-learn's bound).
        eps = total.num_rows * np.finfo(np.float64).eps
        constant = variance <= eps * variance + (eps * total.mean) ** 2
        self._tensors = {"mean": total.mean, "scale": np.where(constant, 1.0, np.sqrt(variance))}

    def encode(self, features: Features) -> np.ndarray:
        """(B, D) -> (B, D) float32."""
        return np.asarray((self._centred(features) / self._tensors["scale"]).astype(np.float32))


class SvdReducer(Reducer):
    """Projection of uncentred features, sparse ones too, onto their K leading right singular vectors.

    Narrow features: one pass that sums X'X, then its eigenvectors. Wide ones: randomised block Lanczos on X'X, one
    product X'XQ per pass, which neither makes X dense nor forms X'X. TF-IDF spectra decay slowly: plain subspace
    iteration would take twice the passes. The process that calls `finish` keeps D x (K + OVERSAMPLING) x num_passes
    float32; a pickled reducer carries one of these blocks, all that `partial` needs.
    """

    does: ClassVar[str] = "projection of uncentred features, sparse ones too"

    class Section(ReduceSection):
        """See SvdReducer."""

        name: Literal["svd"] = "svd"
        dim: int = Field(ge=1, description="features kept")

    _shapes: ClassVar = {"components": ("float32", "DK")}
    KRYLOV_PASSES = 8
    OVERSAMPLING = 20
    SEED = 0

    def __init__(self, config: ReduceSection) -> None:
        super().__init__(config)
        self.num_passes = self.KRYLOV_PASSES  # 1 as soon as `finish` has seen narrow features
        self._lanczos: BlockLanczos | None = None
        self._block: np.ndarray | None = None  # Q (D, L) of the next pass; None: the start block

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lanczos": None}

    def partial(self, features: Features) -> Products:
        """X'XQ of a chunk X (B, D): Q is the pass's block, or the identity where features are narrow."""
        num_rows, width = features.shape
        values = features.data if sp.issparse(features) else features
        square_sum = float(np.square(values, dtype=np.float64).sum())
        if self._is_narrow(width):
            rows: Any = features.astype(np.float64)
            sums = rows.T @ rows
            sums = sums.toarray() if sp.issparse(sums) else sums
            return Products(num_rows, width, square_sum, np.arange(width), sums)
        block = self._start_block(width) if self._block is None else self._block
        rows = features.astype(np.float32, copy=False)
        columns = np.arange(width)
        if sp.issparse(rows):
            columns = np.unique(rows.indices)
            rows, block = rows[:, columns], block[columns]
        return Products(num_rows, width, square_sum, columns, rows.T @ (rows @ block))

    def merge(self, parts: list[Products]) -> Products:
        """X'XQ of all rows."""
        self._check_parts(parts)
        columns = np.unique(np.concatenate([part.columns for part in parts]))
        sums = np.zeros((len(columns), parts[0].sums.shape[1]), parts[0].sums.dtype)
        for part in parts:
            sums[np.searchsorted(columns, part.columns)] += part.sums
        num_rows, square_sum = sum(part.num_rows for part in parts), sum(part.square_sum for part in parts)
        return Products(num_rows, parts[0].width, square_sum, columns, sums)

    def finish(self, total: Products) -> None:
        """End a pass; the last one leaves it fitted.

        Raises: DataError if `dim` exceeds the rank, or values are not finite.
        """
        self._check_finite(total.square_sum)
        product = np.zeros((total.width, total.sums.shape[1]), total.sums.dtype)
        product[total.columns] = total.sums
        if self._is_narrow(total.width):
            self.num_passes = 1
            self._become_fitted(total, *_largest_eigenvectors(product, self.dim))
            return
        if self._block is None:
            self._lanczos = lanczos.BlockLanczos(np.random.default_rng(self.SEED))
        assert self._lanczos is not None, "call `finish` on the reducer of the first pass, not on a pickled copy"
        self._block = self._lanczos.add(product)
        if len(self._lanczos.blocks) == self.num_passes:
            self._become_fitted(total, *self._lanczos.leading(self.dim))
            self._lanczos = self._block = None

    def encode(self, features: Features) -> np.ndarray:
        """(B, D) -> (B, K) float32."""
        self._check_fitted()
        components = self._tensors["components"]
        self._check_width(features, len(components))
        return np.asarray(features.astype(np.float32, copy=False) @ components)

    def _become_fitted(self, total: Products, eigenvalues: np.ndarray, vectors: np.ndarray, rank: int) -> None:
        self._check_rank(min(rank, total.num_rows), total.num_rows, total.width)
        self._tensors = {"components": _flip_signs(vectors)}
        self._rest = {"kept_frac": float(eigenvalues.sum() / total.square_sum)}

    def _is_narrow(self, width: int) -> bool:
        """Whether X'X is small, or smaller than all Lanczos blocks together."""
        return width <= max(EXACT_WIDTH, self.KRYLOV_PASSES * (self.dim + self.OVERSAMPLING))

    def _start_block(self, width: int) -> np.ndarray:
        """Random signs (D, L), the same in every process."""
        shape = (width, self.dim + self.OVERSAMPLING)
        return np.random.default_rng(self.SEED).integers(0, 2, shape, np.int8).astype(np.float32) * 2 - 1

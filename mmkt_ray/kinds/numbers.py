"""Numbers as models learn them: a transform that is fitted on train labels,
and what reading a cell as a number means.

Axes: N labels, Q quantiles.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.kinds.cells import decode_text, is_nan

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from mmkt_ray.kinds.arrow import Converted

TRANSFORMS = ("none", "log", "sqrt", "standardize", "rank")
NUM_QUANTILES = 257  # that a rank transform keeps
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


# --- reading --------------------------------------------------------------------------------------------------------


def number_in(cell: Any) -> float | None:
    """A raw cell as a finite number; null, NaN and blanks are none. Raises: ValueError that says what is wrong."""
    if isinstance(cell, bytes):
        cell = decode_text(cell, "utf-8")
    if cell is None or is_nan(cell):
        return None
    if isinstance(cell, str):
        text = cell.strip().strip("\ufeff").strip()
        if not text or text.lower() == "nan":
            return None
        if not _NUMBER.fullmatch(text):
            raise ValueError(f"is no number: '{text:.60}'{_hint(text)}")
        value = float(text)
    elif isinstance(cell, bool) or not hasattr(cell, "__float__"):
        several = "; give each number a task of its own" if isinstance(cell, list | tuple) else ""
        raise ValueError(f"must be one number, got a {type(cell).__name__}: {cell!r:.60}{several}")
    else:
        try:
            value = float(cell)
        except OverflowError:  # of an integer with hundreds of digits
            value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"is no finite number: {cell!r:.60}")
    return value


def _hint(text: str) -> str:
    if re.fullmatch(r"[+-]?\d+,\d+", text):
        return "; write a point for the decimals, and nothing between thousands"
    return "; leave out units, signs of money and spaces" if re.search(r"\d", text) else ""


def number_column(raw: pa.Array, class_names: list[str] | None) -> Converted:
    """A raw column as float64. class_names: what its whole numbers stand for.
    Raises: TypeError for lists and structs."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from mmkt_ray.kinds.arrow import check_value, is_list, is_string, values_of
    from mmkt_ray.kinds.label_columns import name_of_code

    kind = raw.type
    if is_list(kind) or pa.types.is_struct(kind):
        raise TypeError("it holds several values where one number is expected: give each number a task of its own")
    if class_names is None and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        column = raw.cast(pa.float64(), safe=False)
        infinite = np.flatnonzero(np.isinf(pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False)))
        errors = {int(i): f"is no finite number: {column[int(i)].as_py()}" for i in infinite}
        return pc.if_else(pc.is_finite(column), column, pa.scalar(None, pa.float64())), errors
    if is_string(kind):
        raw = raw.cast(pa.large_binary())  # unchecked: an undecodable one costs its row only
    values: list[float | None] = []
    errors = {}
    for i, cell in enumerate(values_of(raw)):
        try:
            check_value(cell)
            values.append(number_in(cell if class_names is None else name_of_code(cell, class_names)))
        except ValueError as error:
            values.append(None)
            errors[i] = str(error)
    return pa.array(values, pa.float64()), errors


# --- transforms -----------------------------------------------------------------------------------------------------


def taken_by(transform: str, labels: np.ndarray) -> np.ndarray:
    """(N,) bool: the transform can take the number. A logarithm takes those above zero, a root zero too."""
    if transform == "log":
        return np.asarray(labels > 0)
    return np.asarray(labels >= 0) if transform == "sqrt" else np.ones(len(labels), dtype=bool)


@dataclass(frozen=True)
class Scale:
    """How numbers become what a model learns, z, and back; JSON-able."""

    transform: str
    center: float  # subtracted after the logarithm or the root, where there is one
    scale: float
    low: float  # z outside of low .. high is cut off: as far beyond the train labels as these reach from end to end
    high: float
    spread: float  # standard deviation of z among the train labels
    mean: float  # of the train labels as they are
    variance: float
    values: tuple[float, ...] = ()  # (Q,) of rank: labels, ascending
    scores: tuple[float, ...] = ()  # (Q,) of rank: their normal scores

    @classmethod
    def fit(cls, task: str, transform: str, labels: np.ndarray) -> Scale:
        """labels: (N,) float64, at least one. Raises: DataError if the transform can't take them."""
        x, values, scores = labels, np.zeros(0), np.zeros(0)
        center, scale = 0.0, 1.0
        if (wrong := labels[~taken_by(transform, labels)]).size:
            limit = "not above zero" if transform == "log" else "below zero"
            raise DataError(
                f"tasks.{task}.kind has transform: {transform}, and {len(wrong):,} of {len(labels):,} train labels "
                f"are {limit}, such as {wrong[0]:g}: use transform: standardize or rank"
            )
        if transform in ("log", "sqrt"):
            x = np.log(labels) if transform == "log" else np.sqrt(labels)
        if transform == "rank":
            values, scores = _normal_scores(labels)
            x = np.interp(labels, values, scores)
        elif transform != "none":
            center, scale = float(x.mean()), float(x.std()) or 1.0
        z = (x - center) / scale
        reach = float(np.ptp(z)) if transform != "rank" else 0.0
        low, high = float(z.min()) - reach, float(z.max()) + reach
        kept = (tuple(map(float, values)), tuple(map(float, scores)))
        return cls(
            transform, center, scale, low, high, float(z.std()), float(labels.mean()), float(labels.var()), *kept
        )

    @classmethod
    def of(cls, given: Any) -> Scale:
        """The scale that `as_json` gave. Raises: ConfigError for anything else, as a card may come from anyone."""
        try:
            rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in given.items()}
            found = cls(**rest)
            numbers = np.array([getattr(found, f.name) for f in fields(cls) if f.type == "float"], float)
            points = np.array([found.values, found.scores], float)
        except (AttributeError, TypeError, ValueError):
            raise ConfigError("scale of a regression task is not what training wrote") from None
        rising = points.shape[1] == 0 or (np.diff(points, axis=1) > 0).all()
        whole = points.shape[1] > 0 or found.transform != "rank"
        if not (np.isfinite(numbers).all() and np.isfinite(points).all() and found.scale > 0 and rising and whole):
            raise ConfigError("scale of a regression task is not what training wrote")
        return found

    def as_json(self) -> dict[str, Any]:
        """JSON-able."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in fields.items() if v != []}

    def forward(self, y: Tensor) -> Tensor:
        """Numbers as z, of any shape; z is float32."""
        y = y.double()
        if self.transform == "rank":
            y = _interpolate(y, self.values, self.scores)
        elif self.transform == "log":
            y = y.clamp(min=1e-300).log()
        elif self.transform == "sqrt":
            y = y.clamp(min=0).sqrt()
        return ((y - self.center) / self.scale).clamp(self.low, self.high).float()

    def inverse(self, z: Tensor) -> Tensor:
        """z as numbers, float64."""
        x = z.double().clamp(self.low, self.high) * self.scale + self.center
        if self.transform == "rank":
            return _interpolate(x, self.scores, self.values)
        if self.transform == "sqrt":
            return x.clamp(min=0).square()
        return x.exp() if self.transform == "log" else x


def _normal_scores(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct labels and the normal quantiles of their mean ranks; of more than NUM_QUANTILES labels half of these
    evenly by rank, half by quantile, as the ends are thin."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    distinct, first = np.unique(labels, return_index=True)
    ranks = rankdata(labels)[first]
    scores = ndtri((ranks - 0.5) / len(labels))
    if len(distinct) > NUM_QUANTILES:
        at = [np.searchsorted(x, np.linspace(x[0], x[-1], NUM_QUANTILES // 2)) for x in (ranks, scores)]
        kept = np.unique(np.clip(np.concatenate([[0], *at, [len(distinct) - 1]]), 0, len(distinct) - 1))
        distinct, scores = distinct[kept], scores[kept]
    return distinct, scores


def _interpolate(x: Tensor, at: tuple[float, ...], values: tuple[float, ...]) -> Tensor:
    """Linear between points (Q,), constant outside of them."""
    import torch

    xs, ys = (torch.tensor(p, dtype=torch.float64, device=x.device) for p in (at, values))
    if len(xs) == 1:
        return torch.full_like(x, float(ys[0]))
    exporting = torch.compiler.is_exporting()  # ONNX has no search
    at_or_after = (x[..., None] > xs).sum(dim=-1) if exporting else torch.searchsorted(xs, x.contiguous())
    right = at_or_after.clamp(1, len(xs) - 1)
    left = right - 1
    share = ((x - xs[left]) / (xs[right] - xs[left])).clamp(0, 1)
    return ys[left] + share * (ys[right] - ys[left])

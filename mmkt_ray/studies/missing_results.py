"""What `missing.json` (studies/missing.py) and `missing_seeds.json` hold: scores as modalities go missing;
as text."""

from __future__ import annotations

from typing import ClassVar

from mmkt_ray.record import IfAny, OpenRecord, Record
from mmkt_ray.scoring.metrics import PointScores
from mmkt_ray.scoring.provenance import Study
from mmkt_ray.scoring.tables import metric_name

Triple = tuple[float, float, float]  # value, low, high
ANY = "any"  # one of the modalities that a row has, drawn at random


class Curve(OpenRecord, frozen=True):
    """Scores of one task at each rate."""

    spread: ClassVar[str] = "by_metric"

    num_rows: int
    by_metric: dict[str, list[Triple | None]]  # the kind's `reported`: a value for each rate, None where undefined


class ReferenceCurve(Curve, frozen=True):
    """Of the best single-modality models of what is there."""

    models: dict[str, str]  # by modality


class DifferenceCurve(Curve, frozen=True):
    """Model less reference, paired."""

    p_holm: list[float]  # that the accuracies are equal, corrected for all rates, tasks and hidden modalities together


class WorstRate(Record, frozen=True):
    """Where the model stands worst against the reference, of one hidden modality and task."""

    hidden: str  # modality, or `any`
    task: str
    rate: float
    difference: Triple | None
    below: bool  # it is shown to stand below the reference there
    text: str


class MissingCurves(Study, frozen=True):
    """`<model>/missing.json`, and what `<run>/missing_seeds.json` has of each variant: there without the patterns."""

    model: str
    split: str
    confidence: float
    num_seeds: int  # draws of hidden rows
    modalities: list[str]
    rates: list[float]  # shares of rows that lack a modality
    curves: dict[str, dict[str, Curve]]  # hidden modality, or `any` -> task
    reference: dict[str, dict[str, ReferenceCurve]]  # the same, where the run evaluated models of single modalities
    difference: dict[str, dict[str, DifferenceCurve]]
    patterns: IfAny[dict[str, dict[str, PointScores]]] = None  # `image+text`: what rows have as they are -> task
    answers: list[WorstRate]


def missing_table(result: MissingCurves) -> str:
    """The main scores as text: a line for the model and one for the reference, a column for each rate."""
    every = [main_of(curve) for by_task in result.curves.values() for curve in by_task.values()]
    names = " and ".join(dict.fromkeys(map(metric_name, every))) or "scores"
    lines = [f"{result.model}: {names} in % by the share of rows that lack a modality"]
    head = "".join(f"{100 * r:6.0f}" for r in result.rates)
    for hidden, by_task in result.curves.items():
        for task, curve in by_task.items():
            lines.append(f"  {task}, without {hidden}".ljust(34)[:34] + head)
            reference = result.reference.get(hidden, {}).get(task)
            for title, scores in (("model", curve), ("best single of what is there", reference)):
                if scores is not None:
                    values = scores.by_metric[main_of(scores)]
                    cells = ["     –" if v is None else f"{100 * v[0]:6.1f}" for v in values]
                    lines.append(f"    {title}".ljust(34) + "".join(cells))
    return "\n".join([*lines, *(a.text for a in result.answers)])


def main_of(scores: Curve) -> str:
    """The main metric of a task, the first one of its scores."""
    return next(iter(scores.by_metric))

"""What `seeds.json` holds: the same models from several seeds (repeats.py); and as text."""

from __future__ import annotations

from mmkt_ray.record import Record
from mmkt_ray.scoring.intervals import Interval
from mmkt_ray.scoring.metrics import Intervals
from mmkt_ray.scoring.provenance import Study
from mmkt_ray.scoring.tables import interval_text, metric_name

WORDS = {
    "samples_f1": "F1 by sample",
    "macro_average_precision": "average precision",
}


class SeedScores(Intervals, frozen=True):
    """One variant's scores: the kind's `reported` and `seed_metrics`, with intervals over seeds and rows."""

    by_seed: list[float]  # main metric on test
    val: float  # the same on held-out rows, the mean over seeds
    # gain over the reference; None: it is the reference, or there is no common row
    versus: dict[str, Interval | None] | None


class TaskSeeds(Record, frozen=True):
    """All variants that can read a test row of the task."""

    num_rows: int | None  # test rows that all can read; None: there are none, each has its own
    reference: str | None  # the variant that others are compared with
    models: dict[str, SeedScores]


class Seeds(Study, frozen=True):
    """`<run>/seeds.json`."""

    seeds: list[int]
    against: str | None  # the variant that was asked for as reference; None: the best single-modality one on val
    tasks: dict[str, TaskSeeds]


def seeds_table(result: Seeds) -> str:
    """What `repeat` found, as text."""
    lines = []
    for task, found in result.tasks.items():
        rows = f"{found.num_rows} test rows, " if found.num_rows else ""
        main, *metrics = next(iter(found.models.values())).intervals
        names = ", ".join(WORDS.get(m, metric_name(m)) for m in (main, *metrics))
        lines.append(f"{task}: {names}; {rows}{len(result.seeds)} seeds")
        width = max(map(len, found.models))
        for name, model in found.models.items():
            by_seed = " ".join(f"{100 * s:.1f}" for s in model.by_seed)
            line = f"  {name:{width}}  {interval_text(model[main])}  ({by_seed})  "
            line += "  ".join(interval_text(model[m], metric=m) for m in metrics)
            if model.versus:
                gains = ", ".join(interval_text(model.versus[m], "+.1f", m) for m in (main, *metrics))
                line += f"  {gains} against {found.reference}"
            lines.append(line)
    return "\n".join(lines)

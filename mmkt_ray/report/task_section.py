"""One task on the page: its table of models, its figures, the model whose mistakes are shown.

Called by page.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from mmkt_ray.inference.training_record import Epoch
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.report import plots, words
from mmkt_ray.report.figures import Figures
from mmkt_ray.scoring.metrics import TaskScores
from mmkt_ray.scoring.results import ModelScores, ResultsFile, TaskResults
from mmkt_ray.scoring.tables import kind_text, same_samples
from mmkt_ray.studies.gallery_results import Gallery


@dataclass(frozen=True)
class ShownModel:
    """A model's files; empty where there are none."""

    tasks: Mapping[str, TaskScores]
    history: list[Epoch]
    gallery: Gallery | None


@dataclass(frozen=True)
class TaskSection:
    """Table, figures and details of one task."""

    name: str
    found: TaskResults
    about: str  # its labels, in words
    classes: bool  # its labels are classes
    metrics: list[dict[str, str]]
    groups: list[list[ModelScores]]  # models that were scored on the same samples
    figures: list[dict[str, str]]
    shown: str  # the model whose mistakes are shown
    record: TaskScores  # of that model
    # of models that were scored with some of their modalities, the best fused one first
    subsets: list[tuple[str, TaskScores]]


def task_section(
    task: str, results: ResultsFile, models: dict[str, ShownModel], colors: dict[str, str], figures: Figures
) -> TaskSection:
    found = results.tasks[task]
    shown = found.best_trained or found.best or ""
    kind = task_kind(found.kind)
    subsets = [(n, m.tasks[task]) for n, m in models.items() if task in m.tasks and len(m.tasks[task].subsets) > 1]
    return TaskSection(
        name=task,
        found=found,
        about=kind_text(found).capitalize(),
        classes=kind.classes,
        metrics=words.metrics_of(kind),
        groups=same_samples(found.rows, kind.main),
        figures=_task_figures(task, found, models, colors, figures, task == next(iter(results.tasks))),
        shown=shown,
        record=models[shown].tasks[task],
        subsets=sorted(subsets, key=lambda named: named[0] != found.best_fused),
    )


def _task_figures(
    task: str,
    found: TaskResults,
    models: dict[str, ShownModel],
    colors: dict[str, str],
    figures: Figures,
    with_loss: bool,
) -> list[dict[str, str]]:
    """The figures of a task, in the page's order; those without data are left out.
    with_loss: also the loss of all tasks."""
    shown, single = found.best_trained or found.best or "", found.best_single
    kind = task_kind(found.kind)
    main, second = words.metrics_of(kind)[:2]
    groups = same_samples(found.rows, kind.main)
    rows = groups[0]  # those scored on the most samples; others have no place in their order
    best = rows[0]
    drawn = [
        figures.add(
            f"{task}-{main['name']}",
            f"{main['title']} of every model"
            if len(groups) == 1
            else f"{main['title']} of the models scored on {words.count(best.num_rows)} samples",
            f"Bars of {main['title']} on task {task}; best: {best.model}, "
            f"{words.percent(best.interval(kind.main)['value'])}",
            lambda: plots.draw_score_bars(rows, (main, second), colors),
        )
    ]
    compared = [r for r in rows if r.versus and r.reads]  # what reads nothing is far behind, and would set the scale
    if compared:
        alt = (
            f"Differences of {main['title']} to the best single modality on task {task}, with intervals; also in the "
            "table"
        )
        drawn.append(
            figures.add(
                f"{task}-differences",
                "Against the best single modality",
                alt,
                lambda: plots.draw_differences(compared, main, colors),
            )
        )
    histories = {name: m.history for name, m in models.items() if m.history and task in m.tasks}
    if histories and (with_loss or plots.has_val(histories, task, main["name"])):
        what = f"{'Loss and validation' if with_loss else 'Validation'} {main['title']}"
        alt = f"{what} over epochs on task {task} for {', '.join(histories)}"
        paint = partial(plots.draw_learning_curves, histories, task, main, colors, with_loss)
        drawn.append(figures.add(f"{task}-learning", "Learning curves", alt, paint))
    record = models[shown].tasks[task]
    if not kind.classes:
        return drawn + _number_figures(task, shown, record, colors, figures)
    if record.confusion and len(record.class_names) <= plots.MAX_CONFUSION_CLASSES:
        alt = f"Confusion matrix of {shown} on task {task}, share of each label's samples by prediction"
        drawn.append(
            figures.add(
                f"{task}-confusion",
                f"What {shown} takes for what, %",
                alt,
                lambda: plots.draw_confusion(record.confusion or [], record.class_names),
            )
        )
    other = single if single != shown else found.best_fused
    per_class = {name: models[name].tasks[task].per_class for name in (shown, other) if name}
    alt = f"F1 of each class of task {task} for {' and '.join(per_class)}; the table of classes has the numbers"
    worst, num = plots.worst_classes(per_class[shown])
    title = (
        "F1 of each class"
        if len(worst) == num
        else f"F1 of each class: the {len(worst)} worst of the {num} that were tested"
    )
    drawn.append(figures.add(f"{task}-classes", title, alt, lambda: plots.draw_class_f1(per_class, colors)))
    return drawn


def _number_figures(
    task: str, shown: str, record: TaskScores, colors: dict[str, str], figures: Figures
) -> list[dict[str, str]]:
    """Predictions against labels, and what is left, of one model."""
    points, log_scale = record.points, isinstance(record.kind, dict) and record.kind["transform"] == "log"
    if not points:
        return []
    return [
        figures.add(
            f"{task}-predicted",
            f"What {shown} says, and the label",
            f"Predictions of {shown} against labels of task {task}; R2 {words.percent(record['r2'])}",
            lambda: plots.draw_predicted(points, colors[shown], log_scale),
        ),
        figures.add(
            f"{task}-residuals",
            f"What {shown} leaves unexplained",
            f"Label minus prediction against the prediction of {shown} on task {task}",
            lambda: plots.draw_residuals(points, colors[shown], log_scale),
        ),
    ]

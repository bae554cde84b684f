"""A model folder's README.md: a model card in the Hugging Face form, from what evaluation found.

It tells data, tasks, metrics with intervals, limits and use. It names no path, no source and no option of an encoder:
a model folder travels, where its data lies does not.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.features.manifest import Manifest
from mmkt_ray.inference.model_card import Card, read_card, write_card
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring.metrics import ModelMetrics
from mmkt_ray.scoring.tables import metric_name, metric_text

README = "README.md"
FEW_ROWS = 10  # test rows of a class below which its scores say little
NUM_WORST = 5  # classes that are named
MAX_NAME = 60  # characters


def write_readme(model_uri: str, manifest: Manifest) -> str:
    """Write README.md of an evaluated model, and its checksum into the model's card; returns the text.

    manifest: of the store that it was evaluated on. Raises: DataError if the folder holds no evaluated model.
    """
    card, metrics = read_card(model_uri), storage.join(model_uri, "metrics.json")
    if card is None or not storage.exists(metrics):
        raise DataError(f"'{model_uri}' holds no evaluated model: run `mmkt evaluate` first")
    text = readme_text(model_uri.rstrip("/").rsplit("/", 1)[-1], card, ModelMetrics.read(metrics), manifest)
    data = text.encode()
    storage.write_bytes(storage.join(model_uri, README), data)
    write_card(model_uri, card.replaced(checksums=card.checksums | {README: storage.checksum(data)}))
    return text


def readme_text(
    folder: str, card: Card, metrics: ModelMetrics, manifest: Manifest
) -> str:
    """The card: a YAML header, then Markdown."""
    header = yaml.safe_dump(_header(folder, card, metrics), sort_keys=False, allow_unicode=True)
    parts = [*_opening(folder, card, metrics), *_data(card, manifest), *_results(metrics)]
    parts += [*_limits(metrics, manifest), *_use(folder)]
    return f"---\n{header}---\n\n" + "\n".join(parts) + "\n"


def _header(folder: str, card: Card, metrics: ModelMetrics) -> dict[str, Any]:
    name = card.config["name"]
    kinds = [_kind(card.config["modalities"][m]["kind"]) for m in metrics.modalities]
    results = []
    for task, scores in metrics.tasks.items():
        found = [
            {"type": _hub_metric(metric), "value": round(interval["value"], 4), "name": metric_name(metric)}
            for metric, interval in scores.intervals.items()
            if interval is not None
        ]
        kind = _kind(scores.kind) + ("-classification" if task_kind(scores.kind).classes else "")
        dataset = {"name": name, "type": name, "split": metrics.split}
        results.append({"task": {"type": kind, "name": task}, "dataset": dataset, "metrics": found})
    return {
        "library_name": "mmkt_ray",
        "tags": sorted({"multimodal", "mmkt_ray", *kinds}),
        "metrics": sorted({_hub_metric(metric) for scores in metrics.tasks.values() for metric in scores.intervals}),
        "model-index": [{"name": folder, "results": results}],
    }


def _hub_metric(metric: str) -> str:
    """What the hub calls a metric: averages have no names of their own there."""
    return metric.rpartition("_")[2] if metric.endswith(("_f1", "_precision", "_recall")) else metric


def _opening(folder: str, card: Card, metrics: ModelMetrics) -> Iterator[str]:
    model = card.config["model"]
    yield f"# {_text(folder)}\n"
    tasks = ", ".join(f"{_text(t)} ({_kind(s.kind)})" for t, s in metrics.tasks.items())
    yield f"Predicts {tasks} from {', '.join(map(_text, metrics.modalities))}; any of these may be missing in a row."
    num_experts = len(card.spec.get("experts", ()))
    experts = (
        f" Rows that lack some may be answered by {num_experts} models of fewer modalities." if num_experts else ""
    )
    num_params, seconds = metrics.num_params or 0, metrics.training_s or 0
    yield f"Fusion: {_text(model['fusion']['name'])}; {num_params:,} parameters, trained in {seconds:.0f} s.{experts}"
    yield f"Made by mmkt_ray {card.versions.mmkt_ray} with torch {card.versions.torch}.\n"


def _data(card: Card, manifest: Manifest) -> Iterator[str]:
    counts = manifest.counts
    yield "## Data\n"
    rows = ", ".join(f"{number:,} {split}" for split, number in counts.by_split.items())
    yield f"The data set `{_text(card.config['name'])}`: {rows} rows."
    if manifest.synthetic_pairs:
        yield "Rows are synthetic pairs: modalities of different samples with the same label, put together."
    yield "\n| modality | kind | encoder | features | missing in train | missing in test |\n|---|---|---|---|---|---|"
    for m, about in card.encoders.items():
        gone = counts.missing.get(m, {})
        shares = [f"{gone.get(s, 0) / max(1, counts.by_split.get(s, 0)):.1%}" for s in ("train", "test")]
        section = card.config["modalities"][m]
        named = section["encoder"]["name"].partition(":")[2] or section["encoder"]["name"]
        yield (
            f"| {_text(m)} | {_kind(section['kind'])} | {_text(named)} | {about.dim:,} | {shares[0]} | {shares[1]} "
            "|"
        )
    yield ""


def _results(metrics: ModelMetrics) -> Iterator[str]:
    yield f"## Results on the {metrics.split} split\n"
    yield f"In brackets: {metrics.confidence:.0%} intervals over the rows.\n"
    yield "| task | from | rows | metric | value |\n|---|---|---|---|---|"
    for task, scores in metrics.tasks.items():
        every = "+".join(sorted(metrics.modalities))
        for metric, interval in scores.intervals.items():
            cells = f"{scores.num_rows:,} | {metric_name(metric)} | {metric_text(metric, interval)}"
            yield f"| {_text(task)} | all that a row has | {cells} |"
        for name, subset in scores.subsets.items():
            for metric in scores.intervals:
                if name != every and (interval := subset.intervals.get(metric)) is not None:
                    cells = f"{subset.num_rows:,} | {metric_name(metric)} | {metric_text(metric, interval)}"
                    yield f"| {_text(task)} | {_text(name)} alone | {cells} |"
    yield ""


def _limits(metrics: ModelMetrics, manifest: Manifest) -> Iterator[str]:
    yield "## Limits\n"
    classes = all(task_kind(scores.kind).classes for scores in metrics.tasks.values())
    always = " Its answer is one of its classes, always." if classes else ""
    yield f"- It knows rows like those of its data set; on others it was not measured.{always}"
    for task, scores in metrics.tasks.items():
        if scores.num_unseen:
            yield (
                f"- {_text(task)}: {scores.num_unseen:,} test rows are of classes that it never saw, and count as "
                "wrong."
            )
        if (error := scores.values.get("calibration_error")) is not None:
            yield (
                f"- {_text(task)}: probabilities are off by {100 * error:.1f} points on average (expected "
                "calibration error)."
            )
        per_class = scores.per_class
        if few := [name for name, own in per_class.items() if own.support < FEW_ROWS]:
            share = f"{len(few)} of {len(per_class)} classes have fewer than {FEW_ROWS} test rows"
            yield f"- {_text(task)}: {share}; their scores say little."
        known = {
            name: f1 for name, own in per_class.items() if own.support >= FEW_ROWS and (f1 := own["f1"]) is not None
        }
        if worst := sorted(known, key=lambda name: known[name])[:NUM_WORST]:
            yield (
                f"- {_text(task)}: weakest classes (F1): "
                + ", ".join(f"{_text(n)} {known[n]:.2f}" for n in worst)
                + "."
            )
    if rejects := manifest.counts.rejects:
        yield f"- {rejects:,} rows of the source could not be read and are in none of these numbers."
    yield "- No licence is stated here: that of the data, and of pretrained encoders, holds.\n"


def _use(folder: str) -> Iterator[str]:
    name = shlex.quote(folder)
    yield "## Use\n"
    commands = (f"predict {name} NEW.parquet --out predictions", f"serve {name}", f"export {name} --to onnx")
    yield "\n".join(["```console", *(f"$ mmkt {command}" for command in commands), "```\n"])
    call = f"mm.load({json.dumps(folder)}).predict(rows, proba=True)  # rows: a DataFrame, or a list of dicts"
    yield f"```python\nimport mmkt_ray as mm\n\n{call}\n```"


def _kind(kind: Any) -> str:
    """The name of a kind, with or without options."""
    return str(kind["name"] if isinstance(kind, Mapping) else kind)


def _text(value: Any) -> str:
    """A name in Markdown: on one line, of bounded length, as text alone."""
    line = " ".join(str(value).split())
    line = line if len(line) <= MAX_NAME else line[: MAX_NAME - 1] + "…"
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in line)

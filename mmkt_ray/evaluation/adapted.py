"""Whether adapting an encoder paid: models that differ in that alone, paired over the samples that both predicted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmkt_ray import storage
from mmkt_ray.config.training_config import CHOSEN
from mmkt_ray.encoders.build import ENCODER_CARD, EncoderCard
from mmkt_ray.scoring.intervals import Interval, agreeing, holm
from mmkt_ray.scoring.results import Adapted, AdaptedEncoder, Versus
from mmkt_ray.scoring.tables import points

if TYPE_CHECKING:
    from mmkt_ray.evaluation.evaluated import Evaluated

Paired = Callable[[str, "Evaluated", "Evaluated"], Versus | None]


def adaptations(run_uri: str, models: Sequence[Evaluated], tasks: Sequence[str], paired: Paired) -> list[Adapted]:
    """Whether it paid, for each trained model with an adapted encoder beside which the same model with frozen ones
    was scored.

    paired: of `compare`. P is corrected for their number (Holm).
    """
    found = list(_pairs(run_uri, models, tasks, paired))
    for (row, confidence), p in zip(found, holm([row.p for row, _ in found]), strict=True):
        row.p_holm = p
        row.sentence = _sentence(row, agreeing(row.accuracy, p, confidence))
    return [row for row, _ in found]


def _pairs(
    run_uri: str, models: Sequence[Evaluated], tasks: Sequence[str], paired: Paired
) -> Iterator[tuple[Adapted, float]]:
    """Each of them, without sentence and correction, and the confidence of its intervals."""
    recipes = {m.name: recipe_but_for_adapting(m.config, m.record.modalities) for m in models if m.card}
    for model in models:
        encoders = list(_adapted_encoders(run_uri, model)) if model.name in recipes else []
        twins = [
            other
            for other in models
            if encoders
            and recipes.get(other.name) == recipes[model.name]
            and not list(_adapted_encoders(run_uri, other))
        ]
        for task in tasks if twins else ():
            difference = paired(task, model, twins[0]) if all(task in m.tasks for m in (model, twins[0])) else None
            if difference is not None and (accuracy := difference["accuracy"]) is not None:
                row = Adapted(
                    task=task,
                    model=model.name,
                    frozen=twins[0].name,
                    encoders=encoders,
                    num_rows=difference.num_rows,
                    accuracy=accuracy,
                    shared_accuracy=difference.shared_accuracy,
                    p=difference.p,
                )
                yield row, model.record.confidence


def recipe_but_for_adapting(config: Mapping[str, Any], modalities: Sequence[str]) -> str:
    """What decides a model, without whether its encoders are adapted,
    the modalities' names and what was chosen by data."""
    own = {key.partition(".")[2] for key in CHOSEN if key.startswith("model.")} | {"modalities"}
    read = []
    for name in modalities:
        modality = config["modalities"][name]
        read.append({**modality, "encoder": {k: v for k, v in modality["encoder"].items() if k != "adapt"}})
    model = {key: value for key, value in config["model"].items() if key not in own}
    return json.dumps([sorted(json.dumps(m, sort_keys=True) for m in read), model], sort_keys=True)


def _adapted_encoders(run_uri: str, model: Evaluated) -> Iterator[AdaptedEncoder]:
    for name in model.record.modalities:
        adapt = model.config.get("modalities", {}).get(name, {}).get("encoder", {}).get("adapt")
        if adapt:
            known = model.card.encoders.get(name) if model.card else None
            folder = known.folders[0] if known and known.folders else ""
            card = EncoderCard.read_or_none(storage.join(run_uri, model.folder, "encoders", folder, ENCODER_CARD))
            seconds = card.trained_s if card else None
            yield AdaptedEncoder(modality=name, how=adapt["how"], trained_on=adapt["task"], seconds=seconds)


def _sentence(row: Adapted, accuracy: Interval) -> str:
    value, low, high = accuracy["value"], accuracy["low"], accuracy["high"]
    seconds = [e.seconds for e in row.encoders if e.seconds is not None]
    took = f", {sum(seconds):.0f} s of training" if seconds else ""
    what = " and ".join(f"{e.modality} ({e.how} on {e.trained_on})" for e in row.encoders)
    said = "pays" if low > 0 else "costs" if high < 0 else "is not shown to pay"
    shared = row.shared_accuracy
    scores = f"{100 * shared.ours:.1f} against {100 * shared.theirs:.1f} %"
    return (
        f"Adapting {what} {said} for {row.task}: {row.model} against {row.frozen} with frozen encoders {scores}, "
        f"{points(value)} points [{points(low)}, {points(high)}] on {row.num_rows:,} samples{took}."
    )

"""Whether adapting paid: which models are compared, and what is said."""

from typing import Any

import pytest

from mmkt_ray.evaluation.adapted import adaptations
from mmkt_ray.evaluation.evaluated import Evaluated
from mmkt_ray.scoring.metrics import ModelMetrics, TaskScores
from mmkt_ray.scoring.results import Shared, Versus
from tests.manifests import make_card

MINILM = {"kind": "text", "encoder": {"name": "minilm", "max_tokens": 64}, "reduce": None}
TUNED = {**MINILM, "encoder": {**MINILM["encoder"], "adapt": {"task": "thing", "how": "lora"}}}
PIXELS = {"kind": "image", "encoder": {"name": "pixels"}, "reduce": None}


def model(name: str, modalities: dict[str, Any], **settings: Any) -> Evaluated:
    config = {"modalities": modalities, "model": {"fusion": {"name": "concat"}, "dropout": 0.1, **settings}}
    scores = TaskScores(kind="multiclass", num_rows=500, class_names=["a"], intervals={}, values={})
    about = {"name": name, "modalities": list(modalities), "tasks": {"thing": scores}}
    record = ModelMetrics(split="test", num_rows=500, confidence=0.95, **about)
    return Evaluated(name, "trained", f"models/{name}", record, "", make_card(config=config))


def paired(value: float, p: float) -> Any:
    """In place of the comparison of predictions."""
    intervals = {"accuracy": {"value": value, "low": value - 0.01, "high": value + 0.01}}
    about = {"num_rows": 500, "shared_accuracy": Shared(ours=0.88, theirs=0.86), "p": p}
    return lambda task, ours, theirs: Versus(model=theirs.name, intervals=intervals, **about)


@pytest.mark.parametrize(
    ("value", "p", "said"), [(0.02, 0.01, "pays"), (-0.02, 0.01, "costs"), (0.02, 0.3, "is not shown to pay")]
)
def test_the_same_model_is_compared_and_nothing_else(value: float, p: float, said: str):
    """Catches adapted text with fusion against frozen text alone, or one fusion against another:
    differences of two things."""
    models = [
        model("adapted", {"image": PIXELS, "tuned": TUNED}),
        model("text alone", {"text": MINILM}),
        model("other width", {"image": PIXELS, "text": MINILM}, hidden_dim=7),
        model("frozen", {"image": PIXELS, "text": MINILM}, dropout=0.4),
        model("both", {"image": PIXELS, "text": MINILM, "tuned": TUNED}),
    ]
    (found,) = adaptations("run", models, ["thing"], paired(value, p))
    assert (found.model, found.frozen, found.p_holm) == ("adapted", "frozen", p)
    assert f"Adapting tuned (lora on thing) {said} for thing: adapted against frozen" in found.sentence
    assert "88.0 against 86.0 %" in found.sentence


def test_a_run_without_adapted_encoders_says_nothing():
    """Catches a sentence about what was not done."""
    assert (
        adaptations(
            "run", [model("frozen", {"text": MINILM}), model("more", {"text": MINILM})], ["thing"], paired(0, 1)
        )
        == []
    )

"""Whether adapting paid: which models are compared, and what is said."""

from typing import Any

import pytest

from mmkt_ray.evaluation.adapted import adaptations
from mmkt_ray.evaluation.compare import Evaluated

MINILM = {"kind": "text", "encoder": {"name": "minilm", "max_tokens": 64}, "reduce": None}
TUNED = {**MINILM, "encoder": {**MINILM["encoder"], "adapt": {"task": "thing", "how": "lora"}}}
PIXELS = {"kind": "image", "encoder": {"name": "pixels"}, "reduce": None}


def model(name: str, modalities: dict[str, Any], **settings: Any) -> Evaluated:
    config = {"modalities": modalities, "model": {"fusion": {"name": "concat"}, "dropout": 0.1, **settings}}
    record = {"name": name, "modalities": list(modalities), "tasks": {"thing": {}}, "confidence": 0.95}
    return Evaluated(name, "trained", f"models/{name}", record, "", {"config": config, "encoders": {}})


def paired(value: float, p: float) -> Any:
    """In place of the comparison of predictions."""
    accuracy = {"value": value, "low": value - 0.01, "high": value + 0.01}
    shared = {"ours": 0.88, "theirs": 0.86}
    return lambda task, ours, theirs: {"num_rows": 500, "accuracy": accuracy, "shared_accuracy": shared, "p": p}


@pytest.mark.parametrize(
    ("value", "p", "said"), [(0.02, 0.01, "pays"), (-0.02, 0.01, "costs"), (0.02, 0.3, "is not shown to pay")]
)
def test_the_same_model_is_compared_and_nothing_else(value: float, p: float, said: str):
    """Catches adapted text with fusion against frozen text alone, or one fusion against another: differences of two things."""
    models = [
        model("adapted", {"image": PIXELS, "tuned": TUNED}),
        model("text alone", {"text": MINILM}),
        model("other width", {"image": PIXELS, "text": MINILM}, hidden_dim=7),
        model("frozen", {"image": PIXELS, "text": MINILM}, dropout=0.4),
        model("both", {"image": PIXELS, "text": MINILM, "tuned": TUNED}),
    ]
    (found,) = adaptations("run", models, ["thing"], paired(value, p))
    assert (found["model"], found["frozen"], found["p_holm"]) == ("adapted", "frozen", p)
    assert f"Adapting tuned (lora on thing) {said} for thing: adapted against frozen" in found["sentence"]
    assert "88.0 against 86.0 %" in found["sentence"]


def test_a_run_without_adapted_encoders_says_nothing():
    """Catches a sentence about what was not done."""
    assert adaptations("run", [model("frozen", {"text": MINILM}), model("more", {"text": MINILM})], ["thing"], paired(0, 1)) == []

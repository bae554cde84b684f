"""The loss against torch's and scikit-learn's own, and labels that are not there."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from mmkt_ray.errors import DataError
from mmkt_ray.features.store import MISSING, UNSEEN
from mmkt_ray.training.objective import Objective, balanced_weights, check_task, count_classes

LOGITS = {
    "topic": torch.randn(10, 3, generator=torch.Generator().manual_seed(0)),
    "mood": torch.randn(10, 2, generator=torch.Generator().manual_seed(1)),
}
LABELS = {
    "topic": torch.tensor([0, 1, 2, 0, MISSING, UNSEEN, 1, 1, MISSING, 0]),
    "mood": torch.tensor([0, MISSING, 1, 1, 1, 1, MISSING, 0, 0, UNSEEN]),
}
COUNTS = {"topic": np.array([50, 30, 5]), "mood": np.array([9, 90])}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, "balanced"])
def test_each_task_is_the_mean_over_its_labelled_rows(smoothing, class_weights):
    """A mean over all rows, so that a sparsely labelled task counts less; UNSEEN (-2) taken for a class."""
    objective = Objective(COUNTS, class_weights=class_weights, label_smoothing=smoothing)
    expected = 0.0
    for t in LOGITS:
        kept = LABELS[t] >= 0
        weight = torch.tensor(balanced_weights(COUNTS[t])).float() if class_weights else None
        expected += F.cross_entropy(LOGITS[t][kept], LABELS[t][kept], weight, label_smoothing=smoothing)
    torch.testing.assert_close(objective(LOGITS, LABELS), expected)


def test_rows_without_a_label_get_no_gradient():
    """A masked row that still pulls on the logits."""
    logits = {t: x.clone().requires_grad_() for t, x in LOGITS.items()}
    Objective(COUNTS, class_weights="balanced", label_smoothing=0.1)(logits, LABELS).backward()
    for t, x in logits.items():
        assert torch.equal(x.grad.abs().sum(1) > 0, LABELS[t] >= 0)


def test_a_batch_without_labels_of_a_task_gives_zero_and_a_graph():
    """NaN from a mean over nothing, or a loss that has no gradient and stops DDP."""
    logits = {t: x.clone().requires_grad_() for t, x in LOGITS.items()}
    loss = Objective(COUNTS)(logits, {t: torch.full((10,), MISSING) for t in LABELS})
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in logits.values())


def test_the_losses_of_the_parts_of_a_step_sum_to_the_loss_of_the_step():
    """A mean of the ranks' means, which weighs the rows of a rank with few labels more."""
    objective = Objective(COUNTS, class_weights="balanced", label_smoothing=0.1)
    totals = objective.total_weights(LABELS)
    parts = [slice(0, 2), slice(2, 9), slice(9, 10)]
    losses = [
        objective({t: x[p] for t, x in LOGITS.items()}, {t: y[p] for t, y in LABELS.items()}, totals) for p in parts
    ]
    torch.testing.assert_close(sum(losses), objective(LOGITS, LABELS))


def test_balanced_weights_are_those_of_scikit_learn():
    """Another normalisation, which would change the meaning of the learning rate."""
    labels = np.repeat([0, 1, 2, 3], [50, 30, 5, 1])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(balanced_weights(count_classes(np.append(labels, [MISSING, UNSEEN]), 4)), expected)
    assert balanced_weights(np.array([5, 0, 5])).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("counts", "says"), [([0, 0], "no labelled row"), ([7, 0], "all 7 .* class 'bad'"), ([], "no labelled row")]
)
def test_a_task_with_nothing_to_learn_is_refused(counts, says):
    """A model that is fitted to one class and reported with an accuracy of 1."""
    with pytest.raises(DataError, match=f"'mood'.*|{says}") as error:
        check_task("mood", np.array(counts, dtype=int), ["bad", "good"])
    assert "model.tasks" in str(error.value), "what to do"
    check_task("mood", np.array([1, 1]), ["bad", "good"])

"""The loss against torch's and scikit-learn's own, and labels that are not there."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from mmkt_ray.errors import DataError
from mmkt_ray.kinds.multiclass import Binary, Multiclass
from mmkt_ray.kinds.multilabel import Multilabel
from mmkt_ray.training.batches import Batch, Mixed
from mmkt_ray.training.criterion import Criterion, Distillation
from tests.labels import MISSING, UNSEEN, coded, labels_of

LOGITS = {
    "topic": torch.randn(10, 3, generator=torch.Generator().manual_seed(0)),
    "mood": torch.randn(10, 2, generator=torch.Generator().manual_seed(1)),
}
LABELS = {
    "topic": torch.tensor([0, 1, 2, 0, MISSING, UNSEEN, 1, 1, MISSING, 0]),
    "mood": torch.tensor([0, MISSING, 1, 1, 1, 1, MISSING, 0, 0, UNSEEN]),
}
KINDS = {"topic": Multiclass(), "mood": Binary(), "tags": Multilabel()}
COUNTS = {"topic": np.array([50, 30, 5]), "mood": np.array([9, 90])}


def total(criterion, *arguments):
    return torch.stack(list(criterion.losses(*arguments).values())).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, "balanced"])
def test_each_task_is_the_mean_over_its_labelled_rows(smoothing, class_weights):
    """A mean over all rows, so that a sparsely labelled task counts less; an unseen label taken for a class."""
    criterion = Criterion.of(COUNTS, KINDS, class_weights=class_weights, label_smoothing=smoothing)
    expected = 0.0
    for t in LOGITS:
        kept = LABELS[t] >= 0
        weight = torch.tensor(KINDS[t].balanced_weights(COUNTS[t])).float() if class_weights else None
        expected += F.cross_entropy(LOGITS[t][kept], LABELS[t][kept], weight, label_smoothing=smoothing)
    torch.testing.assert_close(total(criterion, LOGITS, coded(LABELS)), expected)


def test_rows_without_a_label_get_no_gradient():
    """A masked row that still pulls on the logits."""
    logits = {t: x.clone().requires_grad_() for t, x in LOGITS.items()}
    total(Criterion.of(COUNTS, KINDS, class_weights="balanced", label_smoothing=0.1), logits, coded(LABELS)).backward()
    for t, x in logits.items():
        assert torch.equal(x.grad.abs().sum(1) > 0, LABELS[t] >= 0)


def test_a_batch_without_labels_of_a_task_gives_zero_and_a_graph():
    """NaN from a mean over nothing, or a loss that has no gradient and stops DDP."""
    logits = {t: x.clone().requires_grad_() for t, x in LOGITS.items()}
    loss = total(Criterion.of(COUNTS, KINDS), logits, coded({t: torch.full((10,), MISSING) for t in LABELS}))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in logits.values())


def test_the_losses_of_the_parts_of_a_step_sum_to_the_loss_of_the_step():
    """A mean of the ranks' means, which weighs the rows of a rank with few labels more."""
    criterion = Criterion.of(COUNTS, KINDS, class_weights="balanced", label_smoothing=0.1)
    totals = criterion.total_weights(coded(LABELS))
    parts = [slice(0, 2), slice(2, 9), slice(9, 10)]
    losses = [
        total(criterion, {t: x[p] for t, x in LOGITS.items()}, {t: y[p] for t, y in coded(LABELS).items()}, totals)
        for p in parts
    ]
    torch.testing.assert_close(sum(losses), total(criterion, LOGITS, coded(LABELS)))


def test_balanced_weights_are_those_of_scikit_learn():
    """Another normalisation, which would change the meaning of the learning rate."""
    labels = np.repeat([0, 1, 2, 3], [50, 30, 5, 1])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    counts = Multiclass().count(labels_of(np.append(labels, [MISSING, UNSEEN])), 4)
    np.testing.assert_allclose(Multiclass().balanced_weights(counts), expected)
    assert Multiclass().balanced_weights(np.array([5, 0, 5])).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("counts", "says"), [([0, 0], "no labelled row"), ([7, 0], "all 7 .* class 'bad'"), ([], "no labelled row")]
)
def test_a_task_with_nothing_to_learn_is_refused(counts, says):
    """A model that is fitted to one class and reported with an accuracy of 1."""
    with pytest.raises(DataError, match=f"'mood'.*|{says}") as error:
        Binary().check_learnable("mood", np.array(counts, dtype=int), ["bad", "good"])
    assert "model.tasks" in str(error.value), "what to do"
    Binary().check_learnable("mood", np.array([1, 1]), ["bad", "good"])


# --- several classes per row, mixed rows, teachers ------------------------------------------------------------------

TAGS = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0], [MISSING] * 3, [0, 1, 1]], dtype=torch.int8)
TAG_LOGITS = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
TAG_COUNTS = Multilabel().count(labels_of(TAGS.numpy()), 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("class_weights", [None, "balanced"])
def test_multilabel_is_torchs_binary_cross_entropy_over_the_labelled_rows(smoothing, class_weights):
    """Catches rows without labels counted as all-negative, and classes weighted by anything but negatives /
    positives."""
    criterion = Criterion.of({"tags": TAG_COUNTS}, KINDS, class_weights=class_weights, label_smoothing=smoothing)
    kept = TAGS[:, 0] >= 0
    pos_weight = torch.tensor([2 / 2, 2 / 2, 3 / 1]) if class_weights else None
    target = TAGS[kept] * (1 - smoothing) + smoothing / 2
    expected = F.binary_cross_entropy_with_logits(TAG_LOGITS[kept], target, pos_weight=pos_weight)
    torch.testing.assert_close(criterion.losses({"tags": TAG_LOGITS}, coded({"tags": TAGS}))["tags"], expected)


def test_a_stack_has_each_members_losses_at_its_own_smoothing():
    """Catches smoothing of another member, unlabelled rows that count in a stack,
    and weights that are left out there."""
    counts, labels = {**COUNTS, "tags": TAG_COUNTS}, coded({**LABELS, "tags": TAGS})
    stack = {t: torch.stack([x, -2 * x]) for t, x in {**LOGITS, "tags": TAG_LOGITS}.items()}
    options = {"class_weights": "balanced", "logit_adjustment": 0.5, "loss_weights": {"mood": 3.0}}
    stacked = Criterion.of(counts, KINDS, label_smoothing=torch.tensor([0.0, 0.2]), **options)
    found = stacked.losses(stack, labels)
    for k, smoothing in enumerate([0.0, 0.2]):
        alone = Criterion.of(counts, KINDS, label_smoothing=smoothing, **options)
        for t, loss in alone.losses({t: x[k] for t, x in stack.items()}, labels).items():
            torch.testing.assert_close(found[t][k], loss)


def test_multilabel_counts_and_checks():
    """Catches negatives counted from unlabelled rows, and a task whose rows are all the same that is trained
    anyway."""
    assert TAG_COUNTS.tolist() == [[2, 2, 3], [2, 2, 1]]
    Multilabel().check_learnable("tags", TAG_COUNTS, ["a", "b", "c"])
    with pytest.raises(DataError, match=r"all 4 labelled train rows of task 'tags'"):
        Multilabel().check_learnable("tags", np.array([[4, 0], [0, 4]]), ["a", "b"])
    with pytest.raises(DataError, match="no labelled row"):
        Multilabel().check_learnable("tags", np.zeros((2, 2), int), ["a", "b"])


def test_logit_adjustment_is_the_formula():
    """Catches a prior with the wrong sign, or one that is applied to rare classes of an empty count as minus
    infinity."""
    prior = torch.tensor(COUNTS["topic"] / COUNTS["topic"].sum()).float()
    expected = F.cross_entropy(LOGITS["topic"] + 1.5 * prior.log(), LABELS["topic"].clamp(min=-1), ignore_index=-1)
    found = Criterion.of(COUNTS, KINDS, logit_adjustment=1.5).losses(LOGITS, coded(LABELS))["topic"]
    torch.testing.assert_close(found, expected)
    shifted = TAG_LOGITS + torch.tensor(np.log(TAG_COUNTS[1] / TAG_COUNTS[0])).float()
    kept = TAGS[:, 0] >= 0
    adjusted = Criterion.of({"tags": TAG_COUNTS}, KINDS, logit_adjustment=1.0)
    found = adjusted.losses({"tags": TAG_LOGITS}, coded({"tags": TAGS}))["tags"]
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(shifted[kept], TAGS[kept].float()))
    empty = Criterion.of({"topic": np.array([5, 0, 3])}, KINDS, logit_adjustment=1.0)
    assert empty.losses({"topic": LOGITS["topic"]}, coded({"topic": LABELS["topic"]}))["topic"].isfinite()


def test_a_loss_weight_is_a_factor():
    """Catches a task's loss_weight that normalisation takes out again."""
    plain, weighted = Criterion.of(COUNTS, KINDS), Criterion.of(COUNTS, KINDS, loss_weights={"mood": 3.0})
    a, b = plain.losses(LOGITS, coded(LABELS)), weighted.losses(LOGITS, coded(LABELS))
    torch.testing.assert_close(b["mood"], 3 * a["mood"])
    torch.testing.assert_close(b["topic"], a["topic"])


def batch_of(codes, **more):
    labels = coded(codes)
    present = {"image": torch.ones(len(next(iter(codes.values()))), dtype=torch.bool)}
    return Batch({}, present, labels, present, labels, **more)


def test_a_mixed_row_has_the_loss_of_its_soft_label():
    """Catches the partner's label counted in full, or the labels the wrong way round."""
    labels, order = {"topic": torch.tensor([0, 1, 2, 0])}, torch.tensor([1, 2, 3, 0])
    share, logits = torch.tensor([0.0, 0.3, 0.5, 1.0]), LOGITS["topic"][:4]
    hot = F.one_hot(labels["topic"], 3).float()
    soft = torch.lerp(hot, hot[order], share[:, None])
    batch = batch_of(labels, mixed=Mixed(coded({"topic": labels["topic"][order]}), share))
    found = Criterion.of({"topic": COUNTS["topic"]}, KINDS).of_batch({"topic": logits}, batch)["topic"]
    torch.testing.assert_close(found, F.cross_entropy(logits, soft))


def test_teachers_targets_take_their_share_of_the_loss():
    """Catches rows that no teacher knows giving NaN, and a distillation loss averaged over one rank's rows only."""
    labels = {"topic": LABELS["topic"]}
    target = torch.softmax(torch.randn(10, 3, generator=torch.Generator().manual_seed(3)), dim=1)
    target[4:] = torch.nan
    criterion = Criterion.of({"topic": COUNTS["topic"]}, KINDS, distillation=Distillation(0.25, 2.0))
    batch = batch_of(labels, targets={"topic": target}, num_targets={"topic": torch.tensor(8)})
    logits = {"topic": LOGITS["topic"]}
    scaled = F.log_softmax(LOGITS["topic"][:4] / 2, dim=1)
    expected = 0.75 * criterion.losses(logits, coded(labels))["topic"]
    expected += 0.25 * 4 * F.kl_div(scaled, target[:4], reduction="sum") / 8
    torch.testing.assert_close(criterion.of_batch(logits, batch)["topic"], expected)


def test_a_modality_alone_is_judged_by_the_rows_that_have_it():
    """Catches a unimodal head that is trained on rows without its modality, on this rank or in the step's total."""
    there = torch.tensor([True, False] * 5)
    labels = coded({"topic": LABELS["topic"]})
    batch = Batch({}, {"image": there}, labels, {"image": there}, labels).restrict("image", torch.ones(10).bool())
    found = Criterion.of({"topic": COUNTS["topic"]}, KINDS).of_batch({"topic": LOGITS["topic"]}, batch)["topic"]
    kept = there & (LABELS["topic"] >= 0)
    torch.testing.assert_close(found, F.cross_entropy(LOGITS["topic"][kept], LABELS["topic"][kept]))

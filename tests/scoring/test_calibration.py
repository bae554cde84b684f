"""Calibration: a temperature that is known is found again, and errors are those of the obvious loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import expit, softmax
from sklearn.calibration import calibration_curve

from mmkt_ray.kinds.probabilities import NUM_BINS, calibration_error, log_loss, probability_scores, reliability
from mmkt_ray.scoring.calibration import PRIOR_ROWS, fit_temperature, fit_temperatures
from tests.labels import MISSING, UNSEEN, coded, labels_of


def draw(kind: str, num_rows: int = 6000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose probabilities are true, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(num_rows, 4 if kind != "binary" else 2))
    if kind == "multilabel":
        return logits, (rng.random(logits.shape) < expit(logits)).astype(np.int8)
    cumulated = softmax(logits, axis=1).cumsum(axis=1)
    return logits, (rng.random((num_rows, 1)) > cumulated).sum(axis=1)


@pytest.mark.parametrize("kind", ["multiclass", "binary", "multilabel"])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found_again(kind, temperature):
    """Catches logits multiplied in place of divided, and a multilabel task fitted with a softmax."""
    logits, labels = draw(kind)
    assert fit_temperature(logits * temperature, labels_of(labels)) == pytest.approx(temperature, rel=0.06)


def test_the_temperature_is_that_of_gradient_descent():
    """Catches a search that stops early, and a prior of another weight: PyTorch's L-BFGS on the rows and on
    PRIOR_ROWS more, which are as the model foretells, must agree."""
    logits, labels = draw("multiclass", num_rows=300)
    labels[:20], labels[20:40] = MISSING, UNSEEN
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([beta], max_iter=100, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        x = torch.from_numpy(2.5 * logits[40:])
        loss = F.cross_entropy(x * beta, torch.from_numpy(labels[40:]), reduction="sum")
        loss = loss + PRIOR_ROWS * F.cross_entropy(x * beta, x.softmax(dim=1))
        loss.backward()
        return loss

    optimizer.step(step)
    assert fit_temperature(2.5 * logits, labels_of(labels)) == pytest.approx(1 / beta.item(), rel=1e-3)


def test_without_val_labels_the_temperature_stays_and_is_told(caplog):
    """Catches a temperature fitted on nothing, or one that silently stays."""
    logits, labels = draw("multiclass", num_rows=10)
    found = fit_temperatures({"a": logits, "b": logits}, coded({"a": labels, "b": np.full(10, MISSING)}))
    assert found["b"].temperature == 1.0
    assert "no labelled val rows" in found["b"].note
    assert found["b"].note in caplog.text
    assert found["a"].num_val_rows == 10
    assert "only 10 labelled val rows" in found["a"].note
    logits, labels = draw("multiclass", num_rows=PRIOR_ROWS)
    assert fit_temperatures({"a": logits}, coded({"a": labels}))["a"].note is None


@pytest.mark.parametrize("kind", ["multiclass", "binary", "multilabel"])
@pytest.mark.parametrize("right", [True, False])
def test_four_rows_move_the_temperature_little(kind, right):
    """Catches a temperature of 0.05 (or 20) from four rows that all happen to be right (or wrong)."""
    logits, _ = draw(kind, num_rows=4)
    labels = (logits > 0).astype(np.int8) if kind == "multilabel" else logits.argmax(axis=1)
    if not right:
        labels = 1 - labels if kind == "multilabel" else (labels + 1) % logits.shape[1]
    assert 0.6 < fit_temperature(logits, labels_of(labels)) < 3
    assert (fit_temperature(logits, labels_of(labels)) < 1) == right


def test_a_temperature_from_few_rows_does_little_harm_where_none_is_needed():
    """Catches a fit to noise: probabilities that are right get worse on new rows by the fit to a handful."""
    logits, labels = draw("multiclass", num_rows=4000)
    worse = []
    for start in range(0, 800, 8):
        rows = slice(start, start + 8)
        found = fit_temperature(logits[rows], labels_of(labels[rows]))
        losses = [log_loss(labels_of(labels[1000:]), softmax(logits[1000:] / t, axis=1)) for t in (1.0, found)]
        worse.append(losses[1] - losses[0])
    assert np.mean(worse) < 0.02
    assert np.max(worse) < 0.1


def test_the_error_is_that_of_the_obvious_loop():
    """Catches bins that overlap, a last bin without 1.0, and gaps that are not weighted by rows."""
    logits, labels = draw("multiclass", num_rows=500)
    proba = softmax(3 * logits, axis=1)
    proba[:9] = np.eye(4)[0]
    confidence, right = proba.max(axis=1), proba.argmax(axis=1) == labels
    slow = 0.0
    for b in range(NUM_BINS):
        low, high = b / NUM_BINS, (b + 1) / NUM_BINS
        rows = (confidence >= low) & ((confidence < high) | (b == NUM_BINS - 1))
        if rows.any():
            slow += rows.mean() * abs(confidence[rows].mean() - right[rows].mean())
    assert calibration_error(reliability(labels_of(labels), proba)) == pytest.approx(slow)


def test_the_bins_of_a_multilabel_task_are_scikit_learns():
    """Catches the probability of a class held against whether the decision was right:
    0.1 that is rightly "no" is no 0.9."""
    logits, labels = draw("multilabel", num_rows=400)
    proba = expit(logits)
    bins = reliability(labels_of(labels), proba)
    true, mean = calibration_curve(labels.ravel(), proba.ravel(), n_bins=NUM_BINS)
    assert [b["accuracy"] for b in bins] == pytest.approx(true.tolist())
    assert [b["confidence"] for b in bins] == pytest.approx(mean.tolist())


def test_nothing_labelled_scores_none():
    """Catches an error of 0, the best there is, where nothing is known."""
    found = probability_scores(labels_of(np.array([MISSING, UNSEEN])), np.full((2, 3), 1 / 3))
    assert found == {"log_loss": None, "calibration_error": None, "reliability": []}

"""Numbers as labels: reading, transforms, losses and scores, against scikit-learn, SciPy and PyTorch."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import norm, rankdata, spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.kinds.cells import convert_cell
from mmkt_ray.kinds.number_metrics import NumberOutcome
from mmkt_ray.kinds.numbers import TRANSFORMS, number_column
from mmkt_ray.kinds.regression import Regression
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.scoring.intervals import bootstrap_intervals, paired_difference
from mmkt_ray.training.linear import solve

RNG = np.random.default_rng(0)
PRICES = np.exp(RNG.normal(3, 1, 400))


def fitted(values: np.ndarray = PRICES, **options: Any) -> Regression:
    """A kind that has seen these labels."""
    return Regression(**options).fitted("price", [pa.chunked_array([pa.array(values)])])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_is_undone(transform: str) -> None:
    """Catches predictions that stay on the scale that was learnt, and a card that loses what undoes it."""
    kind = task_kind(json.loads(json.dumps(fitted(transform=transform).as_json())))
    assert kind == fitted(transform=transform)
    z = kind.logits(torch.from_numpy(PRICES)[:, None])
    np.testing.assert_allclose(kind.outputs(z)[:, 0].numpy(), PRICES, rtol=1e-3)
    if transform == "standardize":
        np.testing.assert_allclose(z[:, 0].numpy(), (PRICES - PRICES.mean()) / PRICES.std(), rtol=1e-5, atol=1e-5)
    if transform == "log":
        logs = np.log(PRICES)
        np.testing.assert_allclose(z[:, 0].numpy(), (logs - logs.mean()) / logs.std(), rtol=1e-4, atol=1e-4)
    if transform == "sqrt":
        roots = np.sqrt(PRICES)
        np.testing.assert_allclose(z[:, 0].numpy(), (roots - roots.mean()) / roots.std(), rtol=1e-4, atol=1e-4)
    if transform == "rank":
        expected = norm.ppf((rankdata(PRICES) - 0.5) / len(PRICES))
        assert np.abs(z[:, 0].numpy() - expected).max() < 0.05


def test_a_wild_logit_gives_a_finite_number() -> None:
    """Catches exp(1000): one odd row would make the whole prediction infinite."""
    for transform in TRANSFORMS:
        assert torch.isfinite(fitted(transform=transform).outputs(torch.tensor([[1e6], [-1e6]]))).all()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("squared", lambda z, y: torch.nn.functional.mse_loss(z, y, reduction="none")),
        ("absolute", lambda z, y: torch.nn.functional.l1_loss(z, y, reduction="none")),
        ("huber", lambda z, y: torch.nn.functional.huber_loss(z, y, reduction="none")),
        ("pinball", lambda z, y: torch.where(y > z, 0.9 * (y - z), 0.1 * (z - y))),
    ],
)
def test_losses_are_those_of_pytorch(loss: str, expected: Any) -> None:
    """Catches a loss of unknown labels, or one whose sides are exchanged."""
    kind = fitted(loss=loss, quantile=0.9, transform="none")
    values, z = RNG.normal(size=50) * 3 + 20, torch.randn(50, generator=torch.manual_seed(0)) * 3 + 20
    known = np.arange(50) % 5 > 0
    labels = kind.labels(values, known).tensors()
    found = kind.row_losses(z[:, None], labels, torch.ones(1), 0.0)
    np.testing.assert_allclose(
        found.numpy(), (expected(z, torch.from_numpy(values).float()) * labels.known).numpy(), rtol=1e-4
    )
    stacked = kind.stacked_losses(torch.stack([z, z])[..., None], labels, torch.ones(1), torch.zeros(2))
    np.testing.assert_allclose(stacked[1].numpy(), found.numpy())


def test_scores_are_those_of_scikit_learn_and_scipy_also_in_resamples() -> None:
    """Catches ranks of ties, a variance about the wrong mean, and rows that are drawn twice and counted once."""
    y = RNG.integers(0, 30, 200).astype(float)
    pred = y + RNG.normal(size=200) * 5
    pred[::3] = pred[0]
    counts = RNG.multinomial(200, np.ones(200) / 200, size=20)
    found = NumberOutcome(y, pred).scores(counts)
    for i, drawn in enumerate(counts):
        a, b = np.repeat(y, drawn), np.repeat(pred, drawn)
        expected = [r2_score(a, b), spearmanr(a, b).statistic, root_mean_squared_error(a, b), mean_absolute_error(a, b)]
        np.testing.assert_allclose([found[m][i] for m in ("r2", "spearman", "rmse", "mae")], expected)
    kind = fitted(y)
    told = kind.scores(kind.labels(y), pred[:, None], kind.class_names({}))
    assert told["r2"] == pytest.approx(r2_score(y, pred))
    assert kind.main_by_row(kind.labels(y), pred).mean() == pytest.approx(r2_score(y, pred))
    json.dumps(told)


def test_a_tally_adds_up_to_the_scores() -> None:
    """Catches sums that cancel far from zero: R2 of labels around 10^6 would be noise."""
    y = RNG.normal(1e6, 3, 300)
    kind = fitted(y)
    pred = y + RNG.normal(size=300)
    labels, z = kind.labels(y).tensors(), kind.logits(torch.from_numpy(pred)[:, None])
    parts = [kind.tally(z[rows], labels[rows]).numpy() for rows in (slice(0, 100), slice(100, 300))]
    found = kind.tally_scores(np.sum(parts, axis=0))
    assert found["r2"] == pytest.approx(r2_score(y, pred), abs=1e-3)
    assert found["mae"] == pytest.approx(mean_absolute_error(y, pred), rel=1e-3)
    stacked = kind.tally(torch.stack([z, z]), labels).numpy()
    np.testing.assert_allclose(stacked[1], kind.tally(z, labels).numpy())
    assert kind.tally_scores(np.zeros(7)) == {}


def test_an_undefined_score_is_none() -> None:
    """Catches R2 of one row, or of equal labels, as a number or as NaN in JSON."""
    kind = fitted()
    for values in ([5.0], [5.0, 5.0]):
        told = kind.scores(kind.labels(values), np.ones((len(values), 1)), ["value"])
        assert told["r2"] is None
        assert told["mae"] == 4.0
    assert kind.scores(kind.labels([]), np.ones((0, 1)), ["value"])["r2"] is None


def test_intervals_hold_the_score_and_no_bound_cuts_it() -> None:
    """Catches an R2 or an RMSE that is pressed into 0..1 as shares are."""
    kind = fitted()
    labels, bad = kind.labels(PRICES), PRICES[::-1].copy()
    found = bootstrap_intervals(labels, bad, 1, num_resamples=200)
    assert found["r2"]
    assert found["r2"]["high"] < 0
    assert found["r2"]["low"] < found["r2"]["value"]
    assert found["rmse"]
    assert found["rmse"]["low"] > 1
    difference = paired_difference(labels, (PRICES * 1.01, bad), "rmse", width=1, num_resamples=200)
    assert difference
    assert difference["high"] < -1


@pytest.mark.parametrize("sparse", [False, True])
def test_the_linear_model_is_ridge_regression(sparse: bool) -> None:
    """Catches another penalty than scikit-learn's alpha, a penalised bias, and a solver that stops early."""
    import scipy.sparse as sp

    x = RNG.normal(size=(300, 20)).astype(np.float32)
    y = x[:, 0] * 3 + RNG.normal(size=300) + 50
    kind = fitted(y)
    features = sp.csr_matrix(x) if sparse else x
    weights, bias = solve(features, kind.labels(y), 1, 7.0)
    expected = Ridge(alpha=7.0).fit(x, (y - y.mean()) / y.std())
    np.testing.assert_allclose(weights[:, 0], expected.coef_, atol=2e-5)
    assert bias[0] == pytest.approx(expected.intercept_, abs=2e-5)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("12,5", "write a point"),
        ("$3", "leave out units"),
        ("1.5 lbs", "leave out units"),
        ("cheap", "is no number: 'cheap'"),
        ("1_000", "is no number"),
        ("inf", "is no number"),
        (float("inf"), "is no finite number"),
        ("1e999", "is no finite number"),
        (10**400, "is no finite number"),
        (True, "must be one number, got a bool"),
        ([1, 2], "each number a task of its own"),
        ("0x10", "is no number"),
    ],
)
def test_what_is_no_number_is_refused_with_its_reason(cell: Any, message: str) -> None:
    """Catches a guess: 12,5 read as 125, true as 1."""
    with pytest.raises(ValueError, match=f"price: .*{message.replace('$', '[$]')}"):
        convert_cell("price", Regression(), cell, "utf-8")


@pytest.mark.parametrize(
    ("cell", "value"), [(" 3.5 ", 3.5), ("-1e3", -1000.0), (7, 7.0), (b".5", 0.5), ("", None), ("NaN", None)]
)
def test_a_number_is_read(cell: Any, value: float | None) -> None:
    """Catches a blank or NaN that becomes a label."""
    assert convert_cell("price", Regression(), cell, "utf-8") == value


def test_columns_are_read_as_cells_are() -> None:
    """Catches an infinite value of a float column, and a bad cell of a text column, that pass."""
    column, errors = number_column(pa.array([1, np.inf, np.nan, None]), None)
    assert column.to_pylist() == [1.0, None, None, None]
    assert list(errors) == [1]
    column, errors = number_column(pa.array(["1", "$3", None, " "]), None)
    assert column.to_pylist() == [1.0, None, None, None]
    assert list(errors) == [1]
    assert number_column(pa.array([True]), None)[1]
    for codes in (pa.array([0, 1, -1, -100, None]), pa.array([0.0, 1.0, -1.0, -100.0, np.nan])):  # of a ClassLabel
        assert number_column(codes, ["10", "20"])[0].to_pylist() == [10.0, 20.0, None, None, None]
    assert "label 2 has no name" in number_column(pa.array([2]), ["10", "20"])[1][0]
    with pytest.raises(TypeError, match="several values"):
        number_column(pa.array([[1.0, 2.0]]), None)


def test_what_the_kind_cannot_do_is_said() -> None:
    """Catches a logarithm of a negative price, labels that are all alike, and options that do not exist."""
    with pytest.raises(DataError, match=r"1 of 2 train labels are not above zero, such as -3"):
        fitted(np.array([2.0, -3.0]), transform="log")
    with pytest.raises(DataError, match=r"1 of 3 train labels are below zero, such as -3"):
        fitted(np.array([2.0, 0.0, -3.0]), transform="sqrt")
    kind = fitted(np.array([4.0, 4.0]))
    with pytest.raises(DataError, match="all 2 labelled train rows of task 'price' are 4"):
        kind.check_learnable("price", kind.count(kind.labels([4.0, 4.0]), 1), ["value"])
    for options, message in (
        ({"transform": "lg"}, "did you mean 'log'"),
        ({"loss": "mse"}, "squared"),
        ({"quantile": 2}, "above 0"),
        ({"scale": {"center": 1}}, "not what training wrote"),
        ({"scale": fitted().as_json()["scale"] | {"scale": 0.0}}, "not what training wrote"),
        ({"bins": 3}, "bins"),
    ):
        with pytest.raises(ConfigError, match=message):
            task_kind({"name": "regression", **options})


@pytest.mark.parametrize("transform", ["log", "sqrt"])
def test_labels_that_a_transform_cannot_take_are_scored_and_not_learnt(transform: str) -> None:
    """Catches test rows that vanish from the scores, or NaN losses."""
    kind = fitted(transform=transform)
    labels = kind.encode(pa.chunked_array([pa.array([3.0, -1.0, None])]), ["value"])
    assert labels.labelled.tolist() == [True, True, False]
    assert labels.known.tolist() == [True, False, False]
    losses = kind.row_losses(torch.zeros(3, 1), labels.tensors(), torch.ones(1), 0.0)
    assert torch.isfinite(losses).all()
    assert losses[1] == 0


def test_row_scores_of_some_rows_have_the_r2_of_these_rows_as_their_mean() -> None:
    """Catches a second R2 on one page: a share of the variance of train labels beside one of that of the rows."""
    kind, rng = fitted(), np.random.default_rng(0)
    labels = PRICES[:40] * 3
    predictions = labels + rng.normal(size=40)
    scores = np.array([kind.score_pair(y, p) for y, p in zip(labels, predictions, strict=True)])
    assert abs(scores.mean() - r2_score(labels, predictions)) > 1e-4
    assert kind.among(scores, labels.tolist()).mean() == pytest.approx(r2_score(labels, predictions), abs=1e-12)

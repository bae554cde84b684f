"""Grades in an order: scores against scikit-learn, the loss against its definition, and bad input."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from mmkt_ray.errors import ConfigError
from mmkt_ray.kinds.cells import convert_cell
from mmkt_ray.kinds.ordinal import Ordinal, grade_losses
from mmkt_ray.kinds.tasks import task_kind

SIZES = Ordinal(order=("S", "M", "L", "XL"))


def test_kappa_and_distance_are_those_of_scikit_learn_also_in_resamples() -> None:
    """Catches weights of another power, and chance agreement over other rows than those drawn."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 150)
    pred = np.clip(y + rng.integers(-1, 2, 150), 0, 3)
    (outcome,), ones = SIZES.outcomes(SIZES.labels(y), [pred], 4)
    counts = np.vstack([ones, rng.multinomial(150, np.ones(150) / 150, size=10)])
    found = outcome.scores(counts)
    for i, drawn in enumerate(counts):
        a, b = np.repeat(y, drawn), np.repeat(pred, drawn)
        assert found["quadratic_kappa"][i] == pytest.approx(cohen_kappa_score(a, b, weights="quadratic"))
        assert found["mae"][i] == pytest.approx(np.abs(a - b).mean())
        assert found["accuracy"][i] == pytest.approx((a == b).mean())
    told = SIZES.scores(SIZES.labels(y), np.eye(4)[pred], list(SIZES.order))
    assert told["quadratic_kappa"] == pytest.approx(found["quadratic_kappa"][0])
    json.dumps(told)


def test_the_loss_is_that_of_its_probabilities() -> None:
    """Catches sums over the wrong side of a grade, and a far miss that costs no more than a near one."""
    z, grades = torch.randn(20, 4, generator=torch.manual_seed(0)), torch.arange(20) % 4
    p = z.softmax(dim=1).numpy()
    above = np.stack([p[:, k + 1 :].sum(axis=1) for k in range(3)], axis=1)
    is_above = grades.numpy()[:, None] > np.arange(3)
    expected = -np.where(is_above, np.log(above), np.log(1 - above)).mean(axis=1)
    np.testing.assert_allclose(grade_losses(z, grades).numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(grade_losses(torch.stack([z, z]), grades)[1].numpy(), expected, rtol=1e-4)
    sure = torch.eye(4)[[3, 3]] * 10
    near, far = grade_losses(sure, torch.tensor([2, 0])).tolist()
    assert far > 2 * near


def test_bad_grades_and_orders_are_refused() -> None:
    """Catches a grade that no order has, as a class of its own, and an order that says nothing."""
    assert convert_cell("size", SIZES, " XL ", "utf-8") == "XL"
    assert convert_cell("size", Ordinal(order=("1", "2")), 1.0, "utf-8") == "1"
    with pytest.raises(ValueError, match="is none of the grades S, M, L, XL: 'XXL'"):
        convert_cell("size", SIZES, "XXL", "utf-8")
    column, errors = SIZES.from_arrow(pa.array(["S", "huge", None]), None, "|")
    assert column.to_pylist() == ["S", None, None]
    assert list(errors) == [1]
    for order in ([], ["S"], ["S", "S"], "SML", ["1", "1.0"], [None, "S"]):
        with pytest.raises(ConfigError, match="must list its grades"):
            task_kind({"name": "ordinal", "order": order})
    assert task_kind(json.loads(json.dumps(SIZES.as_json()))) == SIZES
    assert task_kind({"name": "ordinal", "order": [1, 2, 3]}).class_names({"2": 5}) == ["1", "2", "3"]

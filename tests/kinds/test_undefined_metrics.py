"""Metrics of rows none of which has a class that the model knows."""

import numpy as np
import pytest

from mmkt_ray.kinds.tasks import TASK_KINDS
from tests.labels import UNSEEN, labels_of

CASES = [(name, metric) for name in ("multiclass", "binary") for metric in TASK_KINDS[name].metrics]


@pytest.mark.parametrize(("kind", "metric"), CASES)
def test_labels_that_are_all_unknown_have_scores(kind: str, metric: str) -> None:
    """Catches a command that ends in `cannot reshape array of size 0` where all labels are of other classes: no row
    is right, and what is measured of known rows alone is undefined."""
    proba = np.full((5, 2), 0.5, np.float32)
    labels = labels_of(np.full(5, UNSEEN), kind)
    (value,) = TASK_KINDS[kind]().metric_scores(metric, labels, proba, np.ones((1, 5)))
    assert np.isnan(value) or value == 0

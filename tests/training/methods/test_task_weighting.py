"""Weights of tasks against their formulas."""

import math

import pytest
import torch
from torch import nn

from mmkt_ray.errors import ConfigError
from mmkt_ray.kinds.multiclass import Binary, Multiclass
from mmkt_ray.models import MultimodalModel
from mmkt_ray.training.batches import Worker, read_batch, usable_rows
from mmkt_ray.training.criterion import Criterion
from mmkt_ray.training.loop import fit
from mmkt_ray.training.methods.task_weighting import (
    GradNorm,
    TaskWeighting,
    Uncertainty,
    move_weights,
    shared_parameters,
)
from mmkt_ray.training.setup import spec_of

TASKS, KINDS = {"mood": 2, "topic": 3}, {"mood": Binary(), "topic": Multiclass()}
LOSSES = {"mood": torch.tensor(0.7), "topic": torch.tensor(2.0)}
BOTH = {"mood": torch.tensor(True), "topic": torch.tensor(True)}


def test_sum_is_the_sum():
    """Catches a mean, which would change the meaning of the learning rate with the number of tasks."""
    torch.testing.assert_close(TaskWeighting(TASKS, KINDS, Worker())(LOSSES, BOTH, None), torch.tensor(2.7))


def test_uncertainty_settles_where_the_formula_has_its_minimum():
    """Catches a missing regulariser (weights fall to zero) or a wrong factor: the minimum is at exp(s) = 2 loss."""
    weighting = Uncertainty(TASKS, KINDS, Worker())
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        weighting(LOSSES, BOTH, None).backward()
        optimizer.step()
    expected = torch.tensor([math.log(2 * 0.7), math.log(2 * 2.0)])
    torch.testing.assert_close(weighting.log_variances.detach(), expected, atol=1e-3, rtol=0)
    loss = sum(torch.exp(-s) * x + s / 2 for s, x in zip(expected, (0.7, 2.0), strict=True))
    torch.testing.assert_close(weighting(LOSSES, BOTH, None).detach(), loss)


def test_a_task_without_labels_keeps_its_uncertainty():
    """Catches a rarely labelled task whose weight grows in every step that does not have it."""
    weighting = Uncertainty(TASKS, KINDS, Worker())
    losses = {"mood": torch.tensor(0.0), "topic": torch.tensor(2.0)}
    weighting(losses, {**BOTH, "mood": torch.tensor(False)}, None).backward()
    assert weighting.log_variances.grad[0] == 0
    assert weighting.log_variances.grad[1] != 0


def test_gradnorm_moves_towards_small_gradients_and_late_tasks():
    """Catches the sign: the task with the smaller gradient, or the one that learned less, must gain weight."""
    even, there = torch.ones(2), torch.tensor([True, True])
    moved = move_weights(even, torch.tensor([1.0, 5.0]), torch.tensor([0.5, 0.5]), there, 1.5, 0.025)
    assert moved[0] > 1 > moved[1]
    moved = move_weights(even, torch.tensor([1.0, 1.0]), torch.tensor([0.9, 0.1]), there, 1.5, 0.025)
    assert moved[0] > 1 > moved[1]
    torch.testing.assert_close(moved.sum(), torch.tensor(2.0))
    alone = move_weights(
        even, torch.tensor([1.0, 0.0]), torch.tensor([0.9, 0.0]), torch.tensor([True, False]), 1.5, 0.1
    )
    torch.testing.assert_close(alone, even)


def test_gradnorm_evens_out_gradients_of_different_size():
    """Catches weights that oscillate or run to their limit: gradients of 1 and 4 at the same pace want weights 8 :
    2."""
    weights, norms = torch.ones(2), torch.tensor([1.0, 4.0])
    for _ in range(400):
        weights = move_weights(weights, norms, torch.tensor([0.5, 0.5]), torch.tensor([True, True]), 1.5, 0.025)
    torch.testing.assert_close(weights, torch.tensor([1.6, 0.4]), atol=0.05, rtol=0)


def test_gradnorm_measures_the_gradient_of_the_shared_parameters():
    """Catches norms of weighted losses, or of other parameters,
    and weights in the loss that move before the backward pass."""
    shared = nn.Linear(3, 2)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weighting = GradNorm(TASKS, KINDS, Worker())
    weighting.shared = [shared.weight]
    weighting.weights.copy_(torch.tensor([1.5, 0.5]))
    losses = {"mood": shared(x)[:, 0].square().mean(), "topic": 3 * shared(x)[:, 1].square().mean()}
    expected = [torch.autograd.grad(losses[t], shared.weight, retain_graph=True)[0].norm() for t in ("mood", "topic")]
    torch.testing.assert_close(weighting._norms(losses), torch.stack(expected))
    loss = weighting(losses, BOTH, None)
    torch.testing.assert_close(loss, 1.5 * losses["mood"] + 0.5 * losses["topic"])
    assert not torch.equal(weighting.weights, torch.tensor([1.5, 0.5]))
    loss.backward()
    assert shared.weight.grad.isfinite().all()


def losses_of(config, table):
    model = MultimodalModel(spec_of(config, table))
    rows = usable_rows(table, "train")[:50]
    batch = read_batch(table, rows, rows, torch.device("cpu"))
    criterion = Criterion.of({t: y.kind.count(y, table.width(t)) for t, y in table.labels.items()}, table.kinds)
    return model, criterion.of_batch(model(batch.features, batch.present), batch)


def test_the_shared_parameters_are_the_topmost_that_all_tasks_use(make_config, table):
    """Catches the bottom level, a head, or the tower of one modality alone."""
    for options, prefix in (
        ({"model.num_levels": 2}, "levels.1.towers."),
        ({"model.num_levels": 2, "model.sharing": ["task", "separate"]}, "levels.0.towers."),
        ({"model.fusion": {"name": "hierarchical", "depth": 2}}, "fusions."),
    ):
        model, losses = losses_of(make_config(**options), table)
        found = {id(p) for p in shared_parameters(model, losses)}
        names = {n for n, p in model.named_parameters() if id(p) in found}
        expected = {n for n, p in model.named_parameters() if n.startswith(prefix) and p.ndim >= 2}
        assert names == expected


def test_gradnorm_where_nothing_is_shared_or_balanced_is_refused(make_config, table):
    """Catches gradients of no parameters, which give weights of NaN."""
    with pytest.raises(ConfigError, match="share none"):
        fit(make_config(**{"training.task_weighting": "gradnorm", "model.sharing": "separate"}), table)
    with pytest.raises(ConfigError, match="the model has one"):
        make_config(**{"training.task_weighting": "gradnorm", "model.tasks": ["topic"]})

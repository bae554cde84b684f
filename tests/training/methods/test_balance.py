"""Balance between modalities against the papers' formulas, and what must hold for every strategy."""

import math

import numpy as np
import pytest
import torch

from mmkt_ray.errors import ConfigError
from mmkt_ray.kinds.multiclass import Multiclass
from mmkt_ray.kinds.multilabel import Multilabel
from mmkt_ray.models import MultimodalModel
from mmkt_ray.training.batches import Worker, read_batch, usable_rows
from mmkt_ray.training.checkpoint import FileCheckpoint
from mmkt_ray.training.criterion import Criterion
from mmkt_ray.training.learner import Learner, own_parameters
from mmkt_ray.training.loop import Fitting, fit
from mmkt_ray.training.methods.balance import (
    LEARNERS,
    GradientBlending,
    MMPareto,
    OgmGe,
    blend,
    coefficient,
    discrepancy_ratios,
    pareto,
)
from mmkt_ray.training.methods.task_weighting import TaskWeighting
from mmkt_ray.training.setup import spec_of
from tests.labels import labels_of
from tests.training.test_loop import Killed, assert_equal_runs, stop_after

STRATEGIES = [name for name in LEARNERS if name]


def make_learner(cls, config, table):
    torch.manual_seed(0)
    spec = spec_of(config, table)
    counts = {t: y.kind.count(y, table.width(t)) for t, y in table.labels.items()}
    weighting = TaskWeighting(spec.tasks, spec.kinds, Worker())
    learner = cls(MultimodalModel(spec), Criterion.of(counts, table.kinds), weighting, Worker())
    return learner.train()


def some_batch(table):
    rows = usable_rows(table, "train")[:80]
    return read_batch(table, rows, rows, torch.device("cpu"))


def gradients_of(learner, batch):
    learner.zero_grad()
    torch.manual_seed(1)
    learner.begin_epoch(3)
    loss = learner.gradients(learner, batch)
    return loss, {name: p.grad for name, p in learner.named_parameters()}


# --- OGM-GE ---------------------------------------------------------------------------------------------------------


def test_the_ratio_is_the_papers_for_two_modalities_and_one_task():
    """Catches the inverse ratio, and sums where modalities are there in different numbers of rows."""
    logits = {m: torch.randn(6, 3, generator=torch.Generator().manual_seed(s)) for s, m in enumerate("av")}
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    s_a, s_v = (sum(logits[m][i].softmax(0)[labels[i]] for i in range(6)) for m in "av")
    sums = torch.stack([Multiclass().right_probability(logits[m], labels_of(labels)).sum() for m in "av"])[None]
    ratios = discrepancy_ratios(sums, torch.full((1, 2), 6.0))
    torch.testing.assert_close(ratios, torch.stack([s_a / s_v, s_v / s_a]))


def test_ratios_of_more_modalities_and_tasks():
    """Catches a task that does not read a modality counted as a score of zero, and NaN where nothing compares."""
    sums = torch.tensor([[8.0, 4.0, 2.0], [3.0, 0.0, 6.0], [5.0, 0.0, 0.0]])
    counts = torch.tensor([[10.0, 10.0, 10.0], [10.0, 0.0, 10.0], [10.0, 0.0, 0.0]])
    expected = [(0.8 / 0.3 + 0.3 / 0.6) / 2, 0.4 / 0.5, (0.2 / 0.6 + 0.6 / 0.3) / 2]
    torch.testing.assert_close(discrepancy_ratios(sums, counts), torch.tensor(expected))
    assert discrepancy_ratios(torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [1, 1]


def test_multilabel_scores_count_right_absences():
    """Catches a modality that says yes to everything taken for the better one."""
    logits = torch.tensor([[2.0, -2.0], [2.0, 2.0]])
    p = 1 / (1 + math.exp(-2))
    found = Multilabel().right_probability(logits, labels_of(torch.tensor([[1, 0], [1, 0]], dtype=torch.int8)))
    torch.testing.assert_close(found, torch.tensor([p, 0.5]))


def test_the_coefficient_is_continuous_and_falls():
    """Catches a modality that is behind being slowed down too."""
    found = [coefficient(torch.tensor(r), 0.5).item() for r in (0.2, 1.0, 1.5, 4.0)]
    assert found == pytest.approx([1, 1, 1 - math.tanh(0.25), 1 - math.tanh(1.5)])


def test_only_the_modality_ahead_is_slowed_down(make_config, table, monkeypatch):
    """Catches the wrong modality modulated, shared parameters modulated, and noise on the other one or on biases."""
    config, batch = make_config(**{"model.dropout": 0.0}), some_batch(table)
    _, plain = gradients_of(make_learner(Learner, config, table), batch)
    learner = make_learner(OgmGe, config, table)
    monkeypatch.setattr(learner, "_scores", lambda *_: (torch.tensor([[3.0, 1.0]]), torch.ones(1, 2)))  # image, text
    _, modulated = gradients_of(learner, batch)
    own = {name for name, p in learner.named_parameters() if any(p is q for q in learner.own["image"])}
    assert own
    factor = 1 - math.tanh(OgmGe.ALPHA * 2)
    for name, gradient in modulated.items():
        if name not in own:
            torch.testing.assert_close(gradient, plain[name])
        elif gradient.ndim < 2:
            torch.testing.assert_close(gradient, factor * plain[name])
        else:
            noise = gradient - factor * plain[name]
            assert noise.std() == pytest.approx(plain[name].std().item(), rel=0.25)


def test_scores_are_of_rows_with_several_modalities_only(make_config, table):
    """Catches modalities compared on different rows."""
    learner, batch = make_learner(OgmGe, make_config(**{"model.dropout": 0.0}), table), some_batch(table)
    _, alone = learner(batch.features, batch.present)
    sums, counts = learner._scores(alone, batch)
    both = batch.present["image"] & batch.present["text"]
    for i, t in enumerate(("mood", "topic")):
        kept = both & batch.labels[t].known
        assert (counts[i] == kept.sum()).all()
        for j, m in enumerate(("image", "text")):
            only = {n: there & (n == m) for n, there in batch.present.items()}
            proba = learner.model(batch.features, only)[t].softmax(dim=1)
            expected = proba[kept].gather(1, batch.labels[t].values[kept][:, None]).sum()
            torch.testing.assert_close(sums[i, j], expected.detach())


# --- gradient blending ----------------------------------------------------------------------------------------------


def test_shares_are_gain_over_squared_gap():
    """Catches the train loss taken for the val loss, and heads that a task does not have getting a share."""
    before = torch.tensor([[[1.0, 1.0, 1.0]], [[1.2, 1.1, 1.0]]])
    now = torch.tensor([[[0.4, 0.6, 1.0]], [[0.9, 0.9, 1.0]]])
    exists = torch.tensor([[True, True, False]])
    raw = np.array([0.3 / (0.5 - 0.2) ** 2, 0.2 / (0.3 - 0.1) ** 2])
    found = blend(before, now, exists, floor=0.0, smallest_gap=0.01)
    torch.testing.assert_close(found, torch.tensor([[*(raw / raw.sum()), 0.0]]).float())
    worse = blend(before, before + 0.5, exists, floor=0.0, smallest_gap=0.01)
    torch.testing.assert_close(worse, torch.tensor([[0.5, 0.5, 0.0]]))
    floored = blend(before, torch.where(exists, now, 1.0) + torch.tensor([0, 9, 0]), exists, 0.1, 0.01)
    torch.testing.assert_close(floored, torch.tensor([[0.95, 0.05, 0.0]]))


def test_the_loss_is_the_blend_of_all_heads(make_config, table):
    """Catches a head that is not trained, or that is trained on rows without its modality."""
    learner, batch = make_learner(GradientBlending, make_config(**{"model.dropout": 0.0}), table), some_batch(table)
    learner.shares.copy_(torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1]]))
    loss, gradients = gradients_of(learner, batch)
    logits, alone, seen = learner(batch.features, batch.present)
    parts = [learner.criterion.of_batch(logits, batch)]
    parts += [learner.criterion.of_batch(alone[m], batch.restrict(m, seen[m])) for m in ("image", "text")]
    expected = sum(learner.shares[i, k] * parts[k][t] for i, t in enumerate(("mood", "topic")) for k in range(3))
    torch.testing.assert_close(loss, expected.detach())
    assert all(g is not None and g.any() for name, g in gradients.items() if name.startswith("heads."))


def test_shares_are_looked_at_again_and_stay_even_without_val(make_config, table):
    """Catches shares that never move, and a crash where there is no val split."""
    config = make_config(**{"training.balance": "gradient_blending", "training.epochs": 6})
    run = Fitting(config, table, Worker())
    even = run.learner.shares.clone()
    torch.testing.assert_close(even, torch.full((2, 3), 1 / 3))
    while not run.finished:
        run.run_epoch()
    assert not torch.allclose(run.learner.shares, even)
    torch.testing.assert_close(run.learner.shares.sum(dim=1), torch.ones(2))
    assert (run.learner.shares > 0.03).all()
    blind = Fitting(config, table.take(np.flatnonzero(table.split != "val")), Worker())
    while not blind.finished:
        blind.run_epoch()
    assert torch.equal(blind.learner.shares, even)


def test_head_losses_are_means_over_all_rows(make_config, table):
    """Catches a mean of batch means, and rows without the modality or the label counted."""
    learner, rows = make_learner(GradientBlending, make_config(), table), usable_rows(table, "val")
    found = learner._head_losses(table, rows, batch_size=7)
    torch.testing.assert_close(found, learner._head_losses(table, rows, batch_size=1000))
    whole = read_batch(table, rows, rows, torch.device("cpu"))
    logits, alone, seen = learner.eval()(whole.features, whole.present)
    torch.testing.assert_close(found[1, 0], learner.criterion.of_batch(logits, whole)["topic"])
    restricted = learner.criterion.of_batch(alone["text"], whole.restrict("text", seen["text"]))
    torch.testing.assert_close(found[0, 2], restricted["mood"])


# --- MMPareto -------------------------------------------------------------------------------------------------------


def test_gradients_that_agree_are_added():
    """Catches a changed direction or size where there is no conflict."""
    g, u = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.tensor([2.0, 0.0]), torch.tensor([[1.0]])]
    for found, x, y in zip(pareto(g, u), g, u, strict=True):
        torch.testing.assert_close(found, x + y)


def test_conflicting_gradients_take_the_shortest_combination_as_long_as_their_sum():
    """Catches a step that works against one of the two losses, or one that shrinks."""
    g, u = torch.tensor([3.0, 0.0]).double(), torch.tensor([-2.0, 1.0]).double()
    weights = torch.linspace(0, 1, 100_001).double()
    norms = (weights[:, None] * g + (1 - weights[:, None]) * u).norm(dim=1)
    best = weights[norms.argmin()]
    direction = best * g + (1 - best) * u
    (found,) = pareto([g], [u])
    torch.testing.assert_close(found / found.norm(), direction / direction.norm(), atol=1e-4, rtol=0)
    assert found.norm() >= (g + u).norm() - 1e-5
    assert found @ g >= 0
    assert found @ u >= 0
    assert pareto([g], [-g])[0].isfinite().all()


def test_each_modalitys_own_towers_get_the_combination_and_the_rest_the_sum(make_config, table):
    """Catches unimodal losses that reach the other modality's towers, and shared parameters without a gradient."""
    learner, batch = make_learner(MMPareto, make_config(**{"model.dropout": 0.0}), table), some_batch(table)
    loss, found = gradients_of(learner, batch)
    logits, alone, seen = learner(batch.features, batch.present)
    fused = sum(learner.criterion.of_batch(logits, batch).values())
    own = {m: sum(learner.criterion.of_batch(alone[m], batch.restrict(m, seen[m])).values()) for m in alone}
    torch.testing.assert_close(loss, (fused + sum(own.values())).detach())
    for m in ("image", "text"):
        g, u = (torch.autograd.grad(x, learner.own[m], retain_graph=True) for x in (fused, own[m]))
        for p, expected in zip(learner.own[m], pareto(list(g), list(u)), strict=True):
            torch.testing.assert_close(p.grad, expected)
    names = [n for n, _ in learner.named_parameters() if n.startswith("model.heads.")]
    plain = torch.autograd.grad(fused, [dict(learner.named_parameters())[n] for n in names])
    for n, g in zip(names, plain, strict=True):
        torch.testing.assert_close(found[n], g)


# --- every strategy -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_goes_on_as_if_it_had_not_been(make_config, table, tmp_path, strategy):
    """Catches heads, shares, losses of the last look or noise that a checkpoint does not hold;
    also the same seed's bits."""
    config = make_config(**{"training.balance": strategy, "training.epochs": 7, "training.task_weighting": "gradnorm"})
    whole = fit(config, table)
    checkpoint = FileCheckpoint(str(tmp_path / "checkpoint.safetensors"))
    with pytest.raises(Killed):
        fit(config, table, checkpoint=checkpoint, report=stop_after(5))
    assert_equal_runs(fit(config, table, checkpoint=checkpoint), whole)
    assert whole.val.metrics["accuracy"]["topic"] > 0.6
    plain = fit(make_config(**{"training.epochs": 1}), table).model.state_dict()
    assert whole.model.state_dict().keys() == plain.keys(), "what balances is not part of the model"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_can_not_be_balanced_is_refused(make_config, table, strategy):
    """Catches a strategy that does nothing because a task reads one modality, or there is nothing to act on."""
    with pytest.raises(ConfigError, match="no task of the model reads two"):
        make_config(**{"training.balance": strategy, "model.modalities": ["image"]})
    with pytest.raises(ConfigError, match=r"num_levels"):
        fit(make_config(**{"training.balance": strategy, "model.num_levels": 0}), table)


def test_parameters_of_one_modality_alone(make_config, table):
    """Catches shared towers taken for a modality's own, and a scheme that leaves none."""
    learner = make_learner(
        Learner, make_config(**{"model.num_levels": 2, "model.sharing": ["task", "modality"]}), table
    )
    names = {id(p): n for n, p in learner.model.named_parameters()}
    for m, parameters in own_parameters(learner.model).items():
        assert {names[id(p)].split(".")[1] for p in parameters} == {"0"}
        assert all(f"[{m}]" in names[id(p)] for p in parameters)


def test_modality_dropout_missing_rows_and_mixed_rows_go_with_every_strategy(make_config, table):
    """Catches NaN or a shape that does not fit where several methods meet."""
    for strategy in STRATEGIES:
        options = {"training.balance": strategy, "training.epochs": 2, "training.augment": {"mixup": 0.4, "noise": 0.1}}
        result = fit(make_config(**options, **{"model.modality_dropout": 0.3, "model.missing": "token"}), table)
        assert all(math.isfinite(epoch.train_loss) for epoch in result.epochs)

"""Fusions against their formulas, written out slowly, and against absent modalities."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmkt_ray.config import FusionConfig
from mmkt_ray.models.fusion import FUSIONS, Decision, DecisionHead, Hierarchical, LinearHead
from mmkt_ray.models.towers import Width

WIDTHS = {"image": Width(4), "text": Width(3)}
H, C, B = 5, 3, 6


def inputs(num_rows=B):
    parts = {m: torch.randn(num_rows, w.dim) for m, w in WIDTHS.items()}
    present = {"image": torch.arange(num_rows) % 3 != 0, "text": torch.arange(num_rows) % 3 != 1}
    return parts, present


def test_the_names_are_those_of_the_config():
    """A fusion that the config refuses, or one that it allows and no model knows."""
    assert set(FUSIONS) == set(FusionConfig.model_fields["name"].annotation.__args__)


@torch.no_grad()
def fuse_by_hand(fuse, columns):
    """norm(W [x1; ..; xn] + b), one number at a time, then ReLU; columns: name -> (D,) of one row."""
    weights = torch.cat([part.weight for part in fuse.linear.parts.values()], dim=1)  # in sorted order of names
    x = torch.cat([columns[name] for name in sorted(columns)])
    z = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weights, fuse.linear.bias, strict=True)]
    mean = sum(z) / len(z)
    variance = sum((v - mean) ** 2 for v in z) / len(z)
    norm = fuse.rest[0]
    unit = [(v - mean) / math.sqrt(variance + norm.eps) for v in z]
    return torch.tensor([max(0.0, v * g + b) for v, g, b in zip(unit, norm.weight, norm.bias, strict=True)])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_hierarchical_is_its_formula(depth):
    """Level k that reads the modalities again, or only the level before it instead of all; a mask at the wrong level."""
    torch.manual_seed(0)
    fusion = Hierarchical(WIDTHS, H, depth, dropout=0.0)
    with torch.no_grad():
        for parameter in fusion.parameters():  # also biases and norms away from their neutral start
            parameter.copy_(torch.randn_like(parameter))
    parts, present = inputs()
    [(name, got)] = fusion(parts, present)[0].items()
    assert name == f"F{depth}"
    for b in range(B):
        row = {m: x[b] if present[m][b] else torch.zeros_like(x[b]) for m, x in parts.items()}
        levels = {"F1": fuse_by_hand(fusion.fuses[0], row)}
        for k in range(2, depth + 1):
            levels[f"F{k}"] = fuse_by_hand(fusion.fuses[k - 1], levels)
        torch.testing.assert_close(got[b], levels[f"F{depth}"], atol=1e-5, rtol=1e-5)


def test_a_linear_head_is_a_linear_layer_on_the_concatenation():
    """Weights matched to the wrong part; a part scaled; initial weights larger than those of the one layer it stands for."""
    head = LinearHead(WIDTHS, C)
    parts, _ = inputs()
    weight = torch.cat([head.parts["[image]"].weight, head.parts["[text]"].weight], dim=1)
    together = torch.cat([parts["image"], parts["text"]], dim=1)
    torch.testing.assert_close(head(parts, {}), F.linear(together, weight, head.bias))
    assert all(part.weight.abs().max() <= 1 / math.sqrt(2 * part.in_features) for part in head.parts.values())


def test_absent_modalities_contribute_zeros_to_concatenation():
    """A bias of the absent part that stays in; a mask laid on the wrong modality."""
    head = LinearHead(WIDTHS, C)
    parts, present = inputs()
    zeroed = {m: x * present[m][:, None] for m, x in parts.items()}
    torch.testing.assert_close(head(parts, present), head(zeroed, {}))


@torch.no_grad()
def test_decision_averages_the_log_probabilities_of_who_is_there():
    """Weights that do not sum to one over the present ones, so that a row with one modality gets a flatter decision."""
    torch.manual_seed(0)
    head = DecisionHead(WIDTHS, C)
    with torch.no_grad():
        head.weights.copy_(torch.tensor([0.7, -0.4]))
    parts, present = inputs()
    logits = head(parts, present)
    for b in range(B):
        there = [i for i, m in enumerate(sorted(parts)) if present[m][b]]
        total = sum(math.exp(head.weights[i]) for i in there)
        expected = torch.zeros(C)
        for i in there:
            m = sorted(parts)[i]
            expected += math.exp(head.weights[i]) / total * head.classifiers[f"[{m}]"](parts[m][b]).log_softmax(0)
        torch.testing.assert_close(logits[b], expected)


def test_decision_without_any_modality_is_undecided_and_trains():
    """NaN logits or gradients from a softmax over nothing."""
    head = DecisionHead(WIDTHS, C)
    parts, _ = inputs()
    nobody = {m: torch.zeros(B, dtype=torch.bool) for m in parts}
    logits = head(parts, nobody)
    F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)).backward()
    assert torch.equal(logits, torch.zeros(B, C))
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_decision_has_its_own_head():
    """`decision` that is `concat` under another name."""
    assert Decision.head is DecisionHead

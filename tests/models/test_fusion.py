"""Fusions against their formulas, written out slowly row by row, and against absent modalities."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mmkt_ray.config import FUSE_NAMES, FUSION_NAMES, FusionConfig
from mmkt_ray.kinds.tasks import task_kind
from mmkt_ray.models import fuses
from mmkt_ray.models.fusion import FUSIONS, DecisionHead, LinearHead
from mmkt_ray.models.towers import Width
from tests.models.examples import FUSIONS_TO_TRY, sparse_batch

WIDTHS = {"audio": Width(2), "image": Width(4), "text": Width(3)}
PATTERNS = list(itertools.product([False, True], repeat=3))  # every presence pattern, one row each
H, C, B, R = 4, 3, len(PATTERNS), 2
OPTIONS = {"rank": R, "num_heads": 2}


def inputs():
    parts = {m: torch.randn(B, w.dim) for m, w in WIDTHS.items()}
    return parts, dict(zip(WIDTHS, torch.tensor(PATTERNS).unbind(dim=1), strict=True))


def build(options, widths=WIDTHS):
    options = options.model_dump()
    return FUSIONS[options["name"]](widths, H, 0.0, options)


def randomized(module):
    """With all parameters, also biases and norms, away from their neutral start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module.eval()


def rows_of(parts, present):
    """For each row, the parts that it has: name -> (D,)."""
    return [{m: x[b] for m, x in parts.items() if present[m][b]} for b in range(B)]


def linear(layer, x):
    return layer.weight @ x + layer.bias


def unit(z, norm):
    """Layer norm of one row."""
    mean = sum(z) / len(z)
    variance = sum((v - mean) ** 2 for v in z) / len(z)
    return torch.stack([(v - mean) / torch.sqrt(variance + norm.eps) for v in z]) * norm.weight + norm.bias


def concat_by_hand(fuse, row):
    together = fuse.linear.bias + sum(fuse.linear.parts[f"[{m}]"].weight @ x for m, x in row.items())
    return unit(together, fuse.rest[0]).clamp(min=0)


def sum_by_hand(fuse, row):
    return sum((linear(fuse.projections[f"[{m}]"], x).tanh() for m, x in row.items()), torch.zeros(H))


def gated_by_hand(fuse, row):
    scores = fuse.gates.bias + sum((fuse.gates.parts[f"[{m}]"].weight @ x for m, x in row.items()), 0)
    scores = dict(zip(fuse.names, scores.reshape(len(fuse.names), H), strict=True))
    total = sum(scores[m].exp() for m in row)
    values = {m: linear(fuse.projections[f"[{m}]"], x).tanh() for m, x in row.items()}
    return sum((scores[m].exp() / total * values[m] for m in row), torch.zeros(H))


def low_rank_by_hand(fuse, row):
    """Through the full outer product of all [x; 1] and its weight tensor, which the fuse never makes."""
    outer, tensor = torch.ones(1), torch.ones(R, H, 1)
    for m, x in row.items():
        outer = torch.outer(outer, torch.cat([x, torch.ones(1)])).flatten()
        factor = torch.cat([fuse.factors[f"[{m}]"].weight, fuse.factors[f"[{m}]"].bias[:, None]], dim=1)
        tensor = torch.einsum("rhi,rhj->rhij", tensor, factor.reshape(R, H, -1)).flatten(2)
    z = torch.einsum("r,rhi,i->h", fuse.weights, tensor, outer) + fuse.bias
    return unit(z, fuse.rest[0])


def attention_by_hand(fuse, row):
    tokens = [fuse.cls, *(linear(fuse.tokens[f"[{m}]"], x) for m, x in row.items())]
    normed = [unit(t, fuse.norms[0]) for t in tokens]
    w, b = fuse.attention.in_proj_weight, fuse.attention.in_proj_bias
    q, heads, size = w[:H] @ normed[0] + b[:H], [], H // OPTIONS["num_heads"]
    for part in (slice(i, i + size) for i in range(0, H, size)):
        keys = [(w[H : 2 * H] @ t + b[H : 2 * H])[part] for t in normed]
        values = [(w[2 * H :] @ t + b[2 * H :])[part] for t in normed]
        weights = torch.tensor([float(q[part] @ k) / math.sqrt(size) for k in keys]).softmax(0)
        heads.append(sum(weight * v for weight, v in zip(weights, values, strict=True)))
    c = fuse.cls + linear(fuse.attention.out_proj, torch.cat(heads))
    hidden = F.gelu(linear(fuse.mlp[0], unit(c, fuse.norms[1])))
    return unit(c + linear(fuse.mlp[3], hidden), fuse.norms[2])


BY_HAND = {
    "concat": concat_by_hand,
    "sum": sum_by_hand,
    "gated": gated_by_hand,
    "low_rank_bilinear": low_rank_by_hand,
    "attention": attention_by_hand,
}


def test_the_names_are_those_of_the_config():
    """Catches a fusion that the config refuses, or one that it allows and no model knows."""
    assert set(FUSIONS) == set(FUSION_NAMES)
    assert set(fuses.FUSES) == set(FUSE_NAMES) == set(BY_HAND)


@pytest.mark.parametrize("name", FUSE_NAMES)
@torch.no_grad()
def test_a_fuse_is_its_formula_for_every_presence_pattern(name):
    """Catches a gate, key or factor of an absent part that stays in, weights of the wrong part,
    a lost bias or norm."""
    torch.manual_seed(0)
    fuse = randomized(fuses.FUSES[name](WIDTHS, H, 0.0, OPTIONS))
    parts, present = inputs()
    got = fuse(parts, present)
    for b, row in enumerate(rows_of(parts, present)):
        torch.testing.assert_close(got[b], BY_HAND[name](fuse, row), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FUSE_NAMES)
@pytest.mark.parametrize("depth", [1, 2, 4])
@torch.no_grad()
def test_hierarchical_is_its_formula(name, depth):
    """Catches level k that reads the modalities again, or only the level before it; a mask at the wrong level."""
    torch.manual_seed(0)
    options = FusionConfig(name="hierarchical", depth=depth, fuse=name).model_dump() | OPTIONS
    fusion = randomized(FUSIONS["hierarchical"](WIDTHS, H, 0.0, options))
    parts, present = inputs()
    [(last, got)] = fusion(parts, present)[0].items()
    assert last == f"F{depth}"
    for b, row in enumerate(rows_of(parts, present)):
        levels = {"F1": BY_HAND[name](fusion.fuses[0], row)}
        for k in range(2, depth + 1):
            levels[f"F{k}"] = BY_HAND[name](fusion.fuses[k - 1], levels)
        torch.testing.assert_close(got[b], levels[last], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_gates_of_two_modalities_are_the_sigmoid_gate_of_the_paper():
    """Catches softmax gates that are no generalisation of the bimodal unit z h_1 + (1 - z) h_2,
    z = sigmoid(V [x])."""
    widths = {"image": Width(4), "text": Width(3)}
    fuse = randomized(fuses.Gated(widths, H, 0.0, {}))
    x = {m: torch.randn(B, w.dim) for m, w in widths.items()}
    weight = torch.cat([fuse.gates.parts["[image]"].weight, fuse.gates.parts["[text]"].weight], dim=1)
    z = F.linear(torch.cat(list(x.values()), 1), weight[:H] - weight[H:], fuse.gates.bias[:H] - fuse.gates.bias[H:])
    h = {m: fuse.projections[f"[{m}]"](x[m]).tanh() for m in x}
    torch.testing.assert_close(fuse(x, {}), z.sigmoid() * h["image"] + (1 - z.sigmoid()) * h["text"])


@pytest.mark.parametrize("options", FUSIONS_TO_TRY.values(), ids=FUSIONS_TO_TRY)
@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
@pytest.mark.parametrize("sparse", [(), ("text",), ("audio", "image", "text")])
def test_what_an_absent_modality_holds_has_no_influence(options, kind, sparse):
    """Catches 0 * NaN instead of a mask, a softmax over nothing, a fusion that can't read sparse signals."""
    torch.manual_seed(0)
    fusion = build(options, {m: Width(w.dim, m in sparse) for m, w in WIDTHS.items()}).eval()
    head = fusion.build_head(C, task_kind(kind))
    parts, present = inputs()
    wild = {m: torch.where(present[m][:, None], x, -77.0 if m in sparse else torch.nan) for m, x in parts.items()}
    results = []
    for content in (parts, wild):
        signals = {m: sparse_batch(x.numpy()) if m in sparse else x for m, x in content.items()}
        results.append(head(*fusion(signals, present)))
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)


@pytest.mark.parametrize("options", FUSIONS_TO_TRY.values(), ids=FUSIONS_TO_TRY)
def test_every_modality_that_is_there_counts(options):
    """Catches a modality that a fusion leaves out, or one masked by another's presence."""
    torch.manual_seed(0)
    fusion = build(options).eval()
    head = fusion.build_head(C, task_kind("multiclass"))
    parts, present = inputs()
    before = task_kind("multiclass").outputs(head(*fusion(parts, present)))
    for m in parts:
        after = task_kind("multiclass").outputs(head(*fusion(parts | {m: parts[m] + 1}, present)))
        assert torch.equal((before != after).any(dim=1), present[m])


def test_a_linear_head_is_a_linear_layer_on_the_concatenation():
    """Catches weights matched to the wrong part; a part scaled;
    initial weights larger than those of the one layer."""
    head = LinearHead(WIDTHS, C)
    parts, _ = inputs()
    weight = torch.cat([head.parts[f"[{m}]"].weight for m in sorted(parts)], dim=1)
    together = torch.cat([parts[m] for m in sorted(parts)], dim=1)
    torch.testing.assert_close(head(parts, {}), F.linear(together, weight, head.bias))
    assert all(part.weight.abs().max() <= 1 / math.sqrt(3 * part.in_features) for part in head.parts.values())


def combined_by_hand(head, row, kind):
    """Probabilities (C,) of one row, from those of its modalities."""
    names = sorted(WIDTHS)
    p = {m: task_kind(kind).outputs(linear(head.classifiers[f"[{m}]"], x)) for m, x in row.items()}
    if head.combine == "average":
        return sum(p.values()) / len(p)
    if head.combine == "product":
        share = dict.fromkeys(p, 1.0)
    else:
        share = {m: math.exp(head.weights[names.index(m)]) for m in p}
        share = {m: s / sum(share.values()) for m, s in share.items()}
    yes = math.prod(p[m] ** share[m] for m in p)
    no = math.prod((1 - p[m]) ** share[m] for m in p)
    return yes / (yes + no) if kind == "multilabel" else yes / yes.sum()


@pytest.mark.parametrize("combine", ["learned", "average", "product"])
@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
@torch.no_grad()
def test_decisions_are_combined_by_the_formula(combine, kind):
    """Catches weights that do not sum to one over the present, a product that is not renormalised,
    a mean of logits."""
    torch.manual_seed(0)
    head = randomized(DecisionHead(WIDTHS, C, task_kind(kind), combine))
    parts, present = inputs()
    got = task_kind(kind).outputs(head(parts, present))
    for b, row in enumerate(rows_of(parts, present)):
        even = torch.full((C,), 0.5 if kind == "multilabel" else 1 / C)
        torch.testing.assert_close(got[b], combined_by_hand(head, row, kind) if row else even, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("combine", ["learned", "average", "product"])
@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_decision_without_any_modality_is_undecided_and_trains(combine, kind):
    """Catches NaN logits or gradients from a softmax over nothing."""
    head = DecisionHead(WIDTHS, C, task_kind(kind), combine)
    parts, _ = inputs()
    logits = head(parts, {m: torch.zeros(B, dtype=torch.bool) for m in parts})
    F.cross_entropy(logits, torch.zeros(B, dtype=torch.long)).backward()
    assert torch.equal(logits, torch.zeros(B, C))
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize(("kind", "total"), [("multiclass", 1.0), ("binary", 1.0), ("multilabel", None)])
def test_probabilities_of_each_kind(kind, total):
    """Catches classes of a multilabel task that compete, or those of a multiclass one that do not."""
    logits = torch.randn(B, C)
    p = task_kind(kind).outputs(logits)
    if total is None:
        torch.testing.assert_close(p, 1 / (1 + torch.exp(-logits)))
    else:
        torch.testing.assert_close(p, logits.exp() / logits.exp().sum(dim=1, keepdim=True))


@torch.no_grad()
def test_attending_by_one_query_is_torchs_multi_head_attention():
    """Catches heads that are split the wrong way, a lost bias, and absent tokens that are seen."""
    torch.manual_seed(0)
    attention = randomized(torch.nn.MultiheadAttention(H, 2, batch_first=True))
    query, tokens = torch.randn(1, H), torch.randn(B, 3, H)
    mask = torch.tensor(PATTERNS)
    everything = torch.cat([query.expand(B, 1, H), tokens], dim=1)
    ignored = torch.cat([torch.zeros(B, 1, dtype=torch.bool), ~mask], dim=1)
    expected, _ = attention(everything[:, :1], everything, everything, key_padding_mask=ignored)
    found = fuses.attend(attention, query, list(tokens.unbind(dim=1)), mask)
    torch.testing.assert_close(found, expected[:, 0], atol=1e-6, rtol=1e-6)

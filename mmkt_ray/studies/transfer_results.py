"""What `transfer.json` holds: what each source of knowledge gives to each target (transfer_matrix.py);
and as text."""

from __future__ import annotations

from mmkt_ray.record import Record
from mmkt_ray.scoring.provenance import Study


class Scratch(Record, frozen=True):
    """A target that is trained from scratch."""

    target: str  # node, as `image+text:category`
    label_frac: float
    score: float  # mean over seeds and test rows


class Gain(Record, frozen=True):
    """By how much a source helps a target: the paired difference to the target from scratch."""

    source: str  # node
    target: str
    method: str
    label_frac: float
    gain: float
    low: float
    high: float
    seeds: int  # how many
    p_holm: float
    verdict: str  # positive | negative | none shown; holds after correction for all cells


class Transfers(Study, frozen=True):
    """`<run>/transfer.json`."""

    nodes: list[str]
    label_fracs: list[float]
    seeds: int  # how many
    confidence: float
    targets: list[Scratch]
    cells: list[Gain]


def transfer_table(result: Transfers) -> str:
    """The matrix as text: what helped most and what hurt most at each budget, then each target from scratch."""
    lines = []
    for frac in result.label_fracs:
        cells = [c for c in result.cells if c.label_frac == frac]
        counts = {v: sum(c.verdict == v for c in cells) for v in ("positive", "negative", "none shown")}
        lines.append(
            f"{frac:.0%} of the labels: {counts['positive']} transfers help, {counts['negative']} hurt, "
            f"{counts['none shown']} show no difference"
        )
        lines += [f"  {_text(c)}" for c in sorted(cells, key=lambda c: -c.gain) if c.verdict != "none shown"]
    scratch = (f"{t.target} {t.score:.1%} ({t.label_frac:.0%})" for t in result.targets)
    return "\n".join([*lines, f"from scratch: {', '.join(scratch)}"])


def _text(cell: Gain) -> str:
    gain = f"{100 * cell.gain:+.1f} points [{100 * cell.low:+.1f}, {100 * cell.high:+.1f}]"
    return f"{cell.verdict:8}  {cell.source} -> {cell.target} ({cell.method}): {gain}"

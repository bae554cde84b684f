"""What differs between kinds of task is said in mmkt_ray/kinds alone:
no other code asks for a name or a form of labels."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmkt_ray.kinds.tasks import TASK_KINDS

ROOT = Path(__file__).parents[2]
LABELS = r"\b(labels?|y|truth|codes|pred|predictions|prior)(\[[^\]]*\])?(\.values)?(\[[^\]]*\])?"
FORMS = re.compile(rf"{LABELS}\.(ndim|shape\[1\]|dim\(\))|np\.ndim\({LABELS}\)|\b(MISSING|UNSEEN)\b")
CLASSES = {kind.__name__ for kind in TASK_KINDS.values()}


def asked(source: str) -> Iterator[int]:
    """Lines that compare something with a kind's name, look it up by that, ask for its class,
    or for labels' dimensions."""
    for number, line in enumerate(source.splitlines(), start=1):
        if FORMS.search(line):
            yield number
    for node in ast.walk(ast.parse(source)):
        told: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            told = [node.left, *node.comparators]
            told += [item for part in told if isinstance(part, ast.Tuple | ast.List | ast.Set) for item in part.elts]
        elif isinstance(node, ast.Dict):
            told = list(node.keys)
        elif isinstance(node, ast.MatchValue):
            told = [node.value]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            named = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            yield from [node.lineno] if CLASSES & named else []
        if {part.value for part in told if isinstance(part, ast.Constant)} & {*TASK_KINDS}:
            yield node.lineno


@pytest.mark.slow
def test_no_other_code_asks() -> None:
    """Catches the first of fifty files that would have to know a new kind of task."""
    rooms = {"kinds", "init"}  # init proposes kinds
    files = [p for p in sorted((ROOT / "mmkt_ray").rglob("*.py")) if not rooms & {*p.relative_to(ROOT).parts}]
    assert len(files) > 100
    assert not [f"{path.relative_to(ROOT)}:{line}" for path in files for line in asked(path.read_text())]


def test_no_template_asks() -> None:
    """Catches a report that words a number by the kind's name."""
    for path in sorted((ROOT / "mmkt_ray").rglob("*.j2")):
        assert not re.search("|".join(TASK_KINDS), path.read_text()), path


@pytest.mark.parametrize(
    "source",
    [
        "if kind == 'multilabel': pass",
        "x = kind in ('binary', 'multiclass')",
        "x = {'multiclass': 1, 'multilabel': 2}[kind]",
        "if labels.ndim == 2: pass",
        "if table.labels[task].values.ndim == 2: pass",
        "rows = codes != MISSING",
        "x = isinstance(kind, Multilabel)",
    ],
)
def test_a_planted_question_is_found(source: str) -> None:
    """Catches a search that finds nothing whatever is there."""
    assert list(asked(source))

"""What differs between kinds of modalities is said in mmkt_ray/kinds alone."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmkt_ray.encoders.catalog import ENCODERS, REDUCERS
from mmkt_ray.kinds.modalities import MODALITY_KINDS

ROOT = Path(__file__).parents[2]
# seconds that were measured, and tensors that a graph takes, by encoder
ELSEWHERE = {"mmkt_ray/plan/rates.py", "mmkt_ray/export/inputs.py"}


def asked_by_name(source: str, names: set[str]) -> Iterator[int]:
    """Lines that compare something with one of the names, or look it up in a literal by them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts: list[ast.expr | None] = [node.left, *node.comparators]
            parts += [item for part in parts if isinstance(part, ast.Tuple | ast.List | ast.Set) for item in part.elts]
        elif isinstance(node, ast.Dict):
            parts = list(node.keys) if len(node.keys) > 1 else []
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        else:
            continue
        told = {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
        if told & names and (not isinstance(node, ast.Dict) or told <= names):
            yield node.lineno


@pytest.mark.slow
def test_no_other_code_asks_for_a_name() -> None:
    """Catches the first of thirteen files that would have to know a new kind or a new encoder."""
    names = {*MODALITY_KINDS, *ENCODERS, *REDUCERS}
    found = []
    for path in sorted((ROOT / "mmkt_ray").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(("mmkt_ray/kinds/", "mmkt_ray/encoders/", "mmkt_ray/init/")) and name not in ELSEWHERE:
            found += [f"{name}:{line}" for line in asked_by_name(path.read_text(), names)]
    assert not found


def test_no_template_asks_for_a_name() -> None:
    """Catches a page that is worded for one kind of file and fits no other."""
    for path in sorted((ROOT / "mmkt_ray").rglob("*.j2")):
        assert not re.search(r"kind\.name *[=!]=|kind\.name in", path.read_text()), path


@pytest.mark.parametrize(
    "source",
    [
        "if kind == 'text': pass",
        "x = kind in ('image', 'audio')",
        "x = {'image': 1, 'text': 2}[kind]",
        "x = 'pca' != name",
    ],
)
def test_a_planted_question_is_found(source: str) -> None:
    """Catches a search that finds nothing whatever is there."""
    assert list(asked_by_name(source, {*MODALITY_KINDS, *REDUCERS}))


def test_entries_are_called_as_their_sections() -> None:
    """Catches an entry that a saved config cannot be read back with."""
    for name, encoder in ENCODERS.items():
        assert encoder.Section.model_fields["name"].default == name
        assert set(encoder.kinds) <= set(MODALITY_KINDS)
    for name, kind in MODALITY_KINDS.items():
        assert kind.model_fields["name"].default == name
        assert kind().name == name


def test_a_config_is_read_without_what_encoders_work_with() -> None:
    """Catches an import of seconds for `mmkt config`, or for a process that only counts words."""
    code = "import sys, mmkt_ray.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "torchvision", "sklearn", "scipy", "numba", "PIL", "ray", "transformers"} & set(loaded)

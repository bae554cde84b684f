"""Imports without the collector of cycles."""

import gc
import importlib
import subprocess
import sys

import pytest

from mmkt_ray.lazy import uncollected


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_before(enabled: bool) -> None:
    """Catches a program whose cycles of objects are never collected after an import that fails; and the collector
    turned on where a program has turned it off."""
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with pytest.raises(ImportError), uncollected():
            importlib.import_module("no_such_module")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


FREEZES = """
import gc
from mmkt_ray.lazy import uncollected
with uncollected():
    import decimal
print(gc.get_freeze_count())
with uncollected(freeze=True):
    import sqlite3
first = gc.get_freeze_count()
kept = [[] for _ in range(1000)]
with uncollected(freeze=True):
    import sqlite3
print(first > 0, gc.get_freeze_count() == first)
"""


def test_only_what_came_with_imports_is_frozen() -> None:
    """Catches a program, ours or a user's, that keeps the cycles of each command it has given."""
    done = subprocess.run([sys.executable, "-c", FREEZES], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\nTrue True\n", done.stderr

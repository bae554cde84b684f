"""Model folders, cards and encoder states by the hundred, damaged or forged: refused, or a right answer;
never code that is run.

MMKT_FUZZ says how many (5,000 take some ten minutes); each run uses the same ones first.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NUM_FOLDERS = int(os.environ.get("MMKT_FUZZ", "300"))


@pytest.mark.timeout(240 + NUM_FOLDERS)
def test_folders_of_any_content_are_data(tmp_path):
    """Catches a folder that crashes or hangs the process, fills its memory, runs code,
    or answers wrongly in silence."""
    command = [sys.executable, "-m", "tests.inference.fuzz_models", str(NUM_FOLDERS), str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, errors="replace", check=False, timeout=230 + NUM_FOLDERS
    )
    told = f"the folder is {tmp_path}/in; exit code {done.returncode}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, told
    outcomes = json.loads(done.stdout.splitlines()[-1])["outcomes"]
    assert sum(outcomes.values()) == NUM_FOLDERS
    assert {"damage: refused", "forge: refused", "forge: the same", "forge: another answer"} <= outcomes.keys(), (
        outcomes
    )

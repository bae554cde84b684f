"""A small run that meets a fault of `benchmark.py chaos`, and must end as without it."""

import random
from collections.abc import Iterator
from pathlib import Path

import benchmark_faults
import pytest
import yaml
from benchmark_chaos import disturbed, in_place, write_config, write_data
from benchmark_faults import FAULTS, alone, impossible

from tests.heads import IMPATIENT

ROWS_PER_SHARD = 100
# The same steps as in `benchmark.py chaos`, each of them small: what costs time here is to notice the fault.
SMALL = {
    "training": {"epochs": 4, "batch_size_per_worker": 32, "lr": 0.01, "auto": []},
    "evaluation": {"bootstrap_samples": 100, "studies": ["insight"]},
    "extract": {"chunk_rows": 32, "num_actors": 2},
}
SMALL_SEARCH = {"population": 4, "max_candidates": 16}
STORE_FULL_S = 10  # Ray tells of a full store after some seconds


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """Config and undisturbed run of `benchmark.py chaos`, on fewer rows."""
    root = tmp_path_factory.mktemp("chaos")
    write_data(root / "data" / "shapes", ROWS_PER_SHARD)
    config = write_config(root)
    raw = yaml.safe_load(config.read_text()) | SMALL
    raw["search"] |= SMALL_SEARCH
    config.write_text(yaml.safe_dump(raw))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in IMPATIENT.items():
            patch.setenv(name, value)
        patch.setattr(benchmark_faults, "STORE_FULL_S", STORE_FULL_S)
        yield config, in_place(alone, root / "reference", config)


def ends_undisturbed(whole_run: tuple, root: Path, name: str) -> None:
    """Raises: AssertionError if the run leaves something else than without the fault, or does not end."""
    if reason := impossible(name):
        pytest.skip(reason)
    config, undisturbed = whole_run
    soon = random.Random(9)  # at two fifths of the run: not while nodes are examined, and the next one may be faster
    result = disturbed(name, FAULTS[name], root / "round", config, undisturbed, soon)
    assert result.met
    assert (result.lost, result.doubled, result.changed) == (0, 0, []), result
    assert result.commands <= 2, result.said

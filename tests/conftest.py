"""Fixtures of all tests: one local Ray for the whole run, the folder of real data, a small set of drawn shapes."""

import gc
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

# Ray reads these when it is imported, its worker processes inherit them.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",  # a token file of the user's must not decide how the tests' clusters talk
    RAY_DATA_USE_DATASOURCE_V2="0",  # the second Parquet reader starts 32 actors for each read
    RAY_DEDUP_LOGS="0",  # repeated worker messages stay whole in a failed test's output
    RAY_worker_niceness="0",  # Ray's own 15 gives workers no turn while the tests beside them compute
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",  # workers use this interpreter, also under `uv run`
    OMP_NUM_THREADS="1",  # several workers share few cores
)
# Encoders of a user's own, and what lies beside the benchmarks, as workers import them.
BESIDE = [str(Path(__file__).parent / "plugins"), str(Path(__file__).parents[1] / "jobs")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*BESIDE, os.environ.get("PYTHONPATH")]))
sys.path[:0] = BESIDE
os.environ.pop("RAY_ADDRESS", None)  # never join a cluster that happens to run

import pytest  # noqa: E402  (after what Ray reads on import)

from mmkt_ray.config import Config  # noqa: E402
from tests.shapes import shapes_config, write_shards  # noqa: E402

DATA_DIR = Path(os.environ.get("MMKT_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The collector of cycles does not walk the million objects of all imports, again and again: not while they come,
    4 s, nor later, 0.5 s each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes a Ray is marked `ray`. Files that take long come first,
    so that no core has only one of them left."""
    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
    seconds: Counter[Path] = Counter()
    for item in items:
        seconds[item.path] += likely_seconds(item)
    items.sort(key=lambda item: -seconds[item.path])  # stable: tests of a file stay together and in order


def likely_seconds(item: pytest.Item) -> float:
    """Roughly, by its marks."""
    if limit := item.get_closest_marker("timeout"):
        return float(limit.args[0]) / 10
    return 3 if {"ray", "slow"} & {mark.name for mark in item.iter_markers()} else 0.1


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One Ray on this machine alone, with 4 logical CPUs: with fewer a pipeline may wait for itself."""
    import ray
    from ray.data import DataContext

    from mmkt_ray.cluster.local import forked_workers
    from mmkt_ray.ray_private import init_local, loopback_alone, without_dashboard

    temp_dir = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: socket paths end at 107 characters
    with forked_workers(temp_dir), loopback_alone(), without_dashboard():
        init_local(temp_dir, num_cpus=4, include_dashboard=False, object_store_memory=300 * 1024**2)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = 60  # a pipeline that waits for itself fails instead of hanging
    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: $MMKT_DATA, else ../shared/data beside the repository."""
    if not DATA_DIR.is_dir():
        pytest.skip(f"no real data at {DATA_DIR}: set MMKT_DATA to the folder with cifar10/, emoji/ ...")
    return DATA_DIR


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Three shards of 40 rows in <tmp>/data/shapes."""
    write_shards(tmp_path)
    return tmp_path


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """The config over those shards, with dotted overrides."""
    return partial(shapes_config, tmp_path)

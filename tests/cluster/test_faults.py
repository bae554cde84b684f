"""Processes killed and a disk filled, step by step: what is left equals what an undisturbed run leaves.

The faults are those of jobs/benchmark_faults.py; those of a whole run are in test_lost_nodes.py and
test_cut_off_node.py, the driver's own death in an extraction in tests/features/test_extract.py.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from benchmark_chaos import compare, wait
from benchmark_faults import (
    SMALL_DISK_BYTES,
    TITLES,
    family,
    impossible,
    kill,
    kill_raylet,
    on_cluster,
    psutil,
    small_disk,
    title,
)

from mmkt_ray.cluster import configure_data, run_on_workers
from mmkt_ray.config import Config
from mmkt_ray.errors import ResourceError
from mmkt_ray.features.extract import extract
from mmkt_ray.features.store import Store
from mmkt_ray.inference.model_card import read_card
from mmkt_ray.search.leaderboard import Leaderboard
from mmkt_ray.search.search import check_search, explore, search_digest
from mmkt_ray.training.trainer import train
from tests.heads import IMPATIENT
from tests.shapes import shapes_config, write_shards

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A small run: dense features of two modalities, a model on two workers, a search of two architectures."""
    root = tmp_path_factory.mktemp("faults")
    write_shards(root)
    return shapes_config(
        root,
        name="chaos",
        modalities__text__encoder={"name": "slow_encoder:SlowLength", "options": {"delay_s": 0.05}},
        model__hidden_dim=16,
        training={"epochs": 20, "batch_size_per_worker": 16, "num_workers": 2, "auto": []},
        extract__chunk_rows=4,
        search={
            "space": {
                "model.fusion.name": {"choice": ["concat", "sum"]},
                "training.lr": {"loguniform": [1e-4, 1e-1]},
            },
            **{"population": 4, "max_candidates": 20, "rungs": 1, "time_budget_s": None},
        },
    )


@pytest.fixture(scope="module")
def reference(ray_local: None, config: Config) -> Store:
    """The features of an undisturbed run, in <run_root>/chaos."""
    configure_data()
    return extract(config, f"{config.run_root}/chaos")


def kill_when(meanwhile: Callable[[], object], role: str, ready: Callable[[], object] = lambda: True) -> None:
    """SIGKILL to the first process below this one that is in this role once it is `ready`,
    while something else goes on here."""
    killed = threading.Event()

    def look() -> None:
        end = time.monotonic() + 120
        while not killed.is_set() and time.monotonic() < end:
            if ready() and (found := [p for p in family(psutil.Process()) if TITLES[role] in title(p)]):
                kill(found[:1])
                killed.set()
            time.sleep(0.01)

    threading.Thread(target=look, daemon=True).start()
    meanwhile()
    assert killed.is_set(), f"no process was called {TITLES[role]}"


def test_a_killed_training_worker(reference: Store, config: Config, tmp_path: Path) -> None:
    """Catches a worker whose death ends the job or hangs its fellows, and a model that then differs. The worker is
    killed after the first checkpoint, and those come often."""
    config = config.with_overrides({"training.epochs": 300})

    def train_on_worker(*told: Any) -> Any:  # pickled whole
        from mmkt_ray.training import trainer

        trainer.CHECKPOINT_INTERVAL_S = 0.2
        return trainer.train_on_worker(*told)

    def run(_: Any, job: Any, num_workers: int, scratch_uri: str | None) -> Any:
        return run_on_workers(train_on_worker, job, num_workers, scratch_uri)

    train(config, reference.uri, str(tmp_path / "a"))
    checkpoints = tmp_path / "b" / ".train"
    kill_when(
        lambda: train(config, reference.uri, str(tmp_path / "b"), run=run),
        "trainer",
        lambda: list(checkpoints.glob("*.safetensors")),
    )
    undisturbed, disturbed = read_card(str(tmp_path / "a")), read_card(str(tmp_path / "b"))
    assert undisturbed is not None
    assert disturbed is not None
    assert disturbed.fit is not None
    assert undisturbed.fit is not None
    assert disturbed.fit.val == undisturbed.fit.val
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]


def searched(config: Config, store: Store, folder: Path) -> pd.DataFrame:
    """The leaderboard by candidate, times aside, after the search went on from what is in the folder."""
    space = check_search(config)
    board = Leaderboard(str(folder), space, search_digest(space, config.search, store))
    explore(space, config.search, board, store.table())
    return board.read().set_index("candidate").sort_index().drop(columns=["seconds", "finished_at"])


def test_killed_trials_and_a_killed_search(reference: Store, config: Config, tmp_path: Path) -> None:
    """Catches candidates that are lost with the process that tried them, tried under another name, or given up
    half-way; a search that, killed and started again, finds another leaderboard."""
    undisturbed = searched(config, reference, tmp_path / "a")
    assert len(undisturbed) == 20 + 4 * 3  # candidates, and beside them those of each reference
    found: list[pd.DataFrame] = []
    kill_when(lambda: found.append(searched(config, reference, tmp_path / "b")), "trial")
    pd.testing.assert_frame_equal(found[0], undisturbed, check_exact=False, atol=1e-6)
    # what a kill -9 of the driver leaves: parts of some trials only, one of them in the middle
    parts = sorted((tmp_path / "b" / "parts").iterdir())
    for part in (parts[1], parts[3]):
        part.unlink()
    half = pd.read_parquet(parts[4]).assign(status="running", epochs=1)
    half.head(2).to_parquet(parts[4])
    pd.testing.assert_frame_equal(
        searched(config, reference, tmp_path / "b"), undisturbed, check_exact=False, atol=1e-6
    )


@pytest.mark.skipif(impossible("disk full") is not None, reason=str(impossible("disk full")))
def test_a_full_disk(reference: Store, config: Config, tmp_path: Path) -> None:
    """Catches a bare traceback out of a Ray task, half a part taken for a whole one, and rubbish left on the disk."""
    with small_disk(tmp_path / "disk") as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(SMALL_DISK_BYTES - 100_000))
        with pytest.raises(ResourceError, match=r"disk full while writing .*free some space"):
            extract(config, str(disk / "chaos"))
        written = list(disk.glob("chaos/features/*/data/*"))
        assert written
        assert not [path.name for path in written if path.suffix != ".parquet"]
        filler.unlink()
        store = extract(config, str(disk / "chaos"))
        assert store.manifest.fingerprint == reference.manifest.fingerprint
        assert same_features(config, disk / "chaos")


def same_features(config: Config, run: Path) -> bool:
    difference = compare(Path(config.run_root) / "chaos", run)
    return difference == {"lost": 0, "doubled": 0, "changed": []}


def test_a_killed_raylet(reference: Store, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows lost, doubled or changed when a node dies with its actors and blocks,
    and a job that ends with it."""
    for name, value in IMPATIENT.items():
        monkeypatch.setenv(name, value)
    path, folder = tmp_path / "config.yaml", tmp_path / "runs" / "chaos" / "features"
    path.write_text(yaml.safe_dump(config.with_overrides({"extract.num_actors": 2}).model_dump(mode="json")))
    with on_cluster(tmp_path) as place:
        process = place.start(["extract"], path, tmp_path / "log.txt")
        while len(list(folder.glob("*/data/*.parquet"))) < 3 and process.poll() is None:
            time.sleep(0.02)
        kill_raylet(place, process)
        assert wait(process, time.monotonic() + 200) == 0, (tmp_path / "log.txt").read_text()[-3000:]
        assert same_features(config, place.runs / "chaos")

"""A search on a cluster of two nodes: both run trials, and every part reaches the run's folder.

The cluster and its driver live in a process of their own, this file run as a script;
a Ray of the tests is not touched.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mmkt_ray import storage
from mmkt_ray.cluster import Resources, cores
from mmkt_ray.config import parse_config
from mmkt_ray.features.store import open_store
from mmkt_ray.search.leaderboard import Leaderboard
from mmkt_ray.search.search import check_search, explore, search_digest
from mmkt_ray.search.tuner import num_concurrent

LIMIT_S = 120  # for the script, where it takes about 25 s
MEETING_S = 60  # for a second node's first trial


@pytest.mark.cluster
def test_both_nodes_search_and_the_leaderboard_is_whole(make_config, store, tmp_path):
    """Catches a search that keeps to one node or counts one node's cores, features or a job that other nodes can't
    get, and parts that stay where they were made."""
    config = make_config(**{"search.max_candidates": 36, "training.epochs": 3})
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as scratch:  # short: socket paths end at 107 characters
        # scratch also holds the file by which Ray finds a cluster that runs already: others must not find this one
        ended = subprocess.run(
            [sys.executable, __file__, str(tmp_path), store.uri],
            env={**environment, "RAY_TMPDIR": scratch},
            capture_output=True,
            text=True,
            timeout=LIMIT_S + 60,
            check=False,
        )
        left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if scratch in command_line(p)]
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert left == []
    assert len(list((tmp_path / "nodes").iterdir())) == 2
    space = check_search(config)
    board = Leaderboard(f"{tmp_path}/search", space, search_digest(space, config.search, store))
    rows = board.read()
    assert len(rows) == 36 + 18
    assert rows["candidate"].is_unique
    assert set(rows["status"]) <= {"finished", "stopped"}
    assert set(rows["reference"].dropna()) == {"image", "text", "concat"}


def command_line(path):
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


def test_a_cluster_is_used_whole_and_asked_for_more(monkeypatch):
    """Catches cores of this machine as the bound of a cluster, a cluster that never grows,
    more trials than own cores."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    many = cores() + 100
    assert num_concurrent(Resources(num_cpus=many, num_gpus=0), None) == cores()
    assert num_concurrent(Resources(num_cpus=many, num_gpus=2), 4) == 8
    assert num_concurrent(Resources(num_cpus=many, num_gpus=0.1), 4) == 1
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert num_concurrent(Resources(num_cpus=many, num_gpus=0), None) == many + 1
    assert num_concurrent(Resources(num_cpus=0, num_gpus=0), None) == 1
    assert num_concurrent(Resources(num_cpus=many, num_gpus=2), 4) == 9


class Meeting(Leaderboard):
    """Notes each node that writes a part; the first ones wait until a trial of another node has come so far."""

    def write_part(self, *args):
        """See Leaderboard."""
        import ray

        super().write_part(*args)
        nodes = Path(self.uri).parents[1] / "nodes"
        (nodes / ray.get_runtime_context().get_node_id()).touch()
        until = time.monotonic() + MEETING_S
        while len(list(nodes.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.1)


def search_on_two_nodes(folder, store_uri):
    """The script: a cluster of two nodes with a CPU each, a search on it, and its end, whatever happens."""
    from ray.cluster_utils import Cluster

    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"not done in {LIMIT_S} s"))
    signal.alarm(LIMIT_S)
    config = parse_config(json.loads(Path(folder, "config.json").read_text()))
    store, space = open_store(store_uri), check_search(config)
    node = {"num_cpus": 1, "object_store_memory": 100 * 1024**2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=node["object_store_memory"])
        os.environ["RAY_ADDRESS"] = cluster.address
        storage.make_dir(f"{folder}/search")
        storage.make_dir(f"{folder}/nodes")
        board = Meeting(f"{folder}/search", space, search_digest(space, config.search, store))
        explore(space, config.search, board, store.table())
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    search_on_two_nodes(*sys.argv[1:])

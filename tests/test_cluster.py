"""What the cluster can place is checked before anything is started."""

import pytest

from mmkt_ray.cluster import Resources, check_fits
from mmkt_ray.errors import ResourceError
from mmkt_ray.features.fit import FAN_IN, merge_in_tree


def test_actor_pools_leave_one_cpu_for_reading() -> None:
    """A pipeline that waits for itself for ever: all CPUs held by encoders, none left to read for them."""
    check_fits(Resources(4, 0), num_actors=3, cpus_each=1, gpus_each=0)
    with pytest.raises(ResourceError, match="at most 3"):
        check_fits(Resources(4, 0), num_actors=4, cpus_each=1, gpus_each=0)


def test_gpus_that_are_not_there_are_refused() -> None:
    """A job that waits for a GPU that no node has."""
    with pytest.raises(ResourceError, match=r"need 1 GPUs, the cluster has 0.*0 runs on CPUs"):
        check_fits(Resources(8, 0), num_actors=1, cpus_each=1, gpus_each=1)


def _chain(parts: list[list[int]]) -> list[int]:
    return [i for part in parts for i in part]


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("num", [1, FAN_IN, FAN_IN * FAN_IN + 3])
def test_tree_merges_all_in_order_and_leaves_out_none(num: int) -> None:
    """Statistics lost or doubled at the edge of a group; an order that depends on what finishes first."""
    calls = [lambda i=i: None if i % 5 == 4 else [i] for i in range(num)]
    assert merge_in_tree(calls, _chain) == [i for i in range(num) if i % 5 != 4]
    assert merge_in_tree([lambda: None] * num, _chain) is None

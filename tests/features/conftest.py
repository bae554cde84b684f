"""Runs of these tests stand alone: one that took over what another beside it has finished would show nothing."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def runs_stand_alone() -> Iterator[None]:
    """With a patch of its own: tests undo theirs on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmkt_ray.features.siblings._other_runs", lambda _: [])
        yield

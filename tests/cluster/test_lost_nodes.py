"""A head lost, an object store full: a whole run ends as an undisturbed one; see test_faults.py."""

from pathlib import Path

import pytest

from tests.cluster.disturbed_runs import ends_undisturbed, whole_run  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("name", ["head", "store full"])
def test_the_costlier_faults(whole_run: tuple, tmp_path: Path, name: str) -> None:  # noqa: F811
    """Catches a run that, after its head was lost or its object store full, leaves something else than without that,
    or does not end."""
    ends_undisturbed(whole_run, tmp_path, name)

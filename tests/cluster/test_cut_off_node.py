"""A node cut off: a whole run ends as an undisturbed one. Alone in its file: it mostly waits for Ray to notice."""

from pathlib import Path

import pytest

from tests.cluster.disturbed_runs import ends_undisturbed, whole_run  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]  # likely the longest, so it comes first


def test_a_node_that_is_cut_off(whole_run: tuple, tmp_path: Path) -> None:  # noqa: F811
    """Catches a run that, after a node was cut off from the others, leaves something else than without that, or does
    not end."""
    ends_undisturbed(whole_run, tmp_path, "node cut off")

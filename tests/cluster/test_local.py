"""A Ray of our own: where its folder lies."""

import pytest

from mmkt_ray.cluster import local
from mmkt_ray.errors import ResourceError

LONG = "/scratch/users/somebody/jobs/1234567"


def test_a_long_temporary_folder_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of Ray's where a batch system sets a TMPDIR below which no path of a socket fits."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", LONG)
    assert local.session_parent() == "/tmp"
    monkeypatch.setenv("TMPDIR", "/scratch/1234567")
    assert local.session_parent() == "/scratch/1234567"
    monkeypatch.setenv("RAY_TMPDIR", LONG)
    with pytest.raises(ResourceError, match=f"RAY_TMPDIR is '{LONG}'.* at most {local.MAX_PARENT} characters"):
        local.session_parent()

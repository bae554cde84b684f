"""A finished run that all tests of the report share."""

from pathlib import Path

import pytest

from tests.evaluation.runs import VARIANTS, draw_samples, make_config, write_run
from tests.report.page_elements import THINGS


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run whose class names and texts are hostile."""
    folder = tmp_path_factory.mktemp("run")
    config = make_config(folder, {**VARIANTS, "hierarchical": {"model.fusion": {"name": "hierarchical", "depth": 2}}})
    return Path(write_run(folder, config, draw_samples(500, THINGS), synthetic_pairs=True))

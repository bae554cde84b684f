"""Commands that take what a run left, and the configs that come with the package."""

import subprocess
import sys
from pathlib import Path

import pytest

from mmkt_ray.cli import main
from mmkt_ray.config import load_config
from mmkt_ray.config.reading import shipped
from mmkt_ray.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["openmoji", "openmoji.yaml", "jobs/configs/openmoji.yaml"])
def test_a_config_of_the_project_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).name == "openmoji"


def test_a_file_that_is_there_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openmoji.yaml").write_text("name: mine")
    assert shipped("openmoji.yaml") == Path("openmoji.yaml")
    assert shipped("elsewhere/openmoji.yaml") == Path("elsewhere/openmoji.yaml")


def test_a_misspelt_config_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'openmoji'"):
        load_config("openmoj")


def test_the_commands_load_nothing_heavy():
    """`mmkt --help` must not wait for torch or Ray because of them."""
    script = (
        "import sys, mmkt_ray.commands as c; print(sorted({'torch', 'ray', 'fastapi', 'pandas'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[]"


def test_one_run_cannot_be_compared(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "at least two" in capsys.readouterr().err

"""Commands that take what a run left, and the configs that come with the package."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mmkt_ray.cli import build_parser, main
from mmkt_ray.commands import NAMES
from mmkt_ray.config import load_config
from mmkt_ray.config.reading import SHIPPED, shipped
from mmkt_ray.errors import ConfigError
from tests.test_readme import mmkt_arguments, shell_commands

ROOT = Path(__file__).parents[1]


def test_commands_of_the_deployment_page_are_understood():
    used = list(mmkt_arguments(shell_commands((ROOT / "docs/deployment.md").read_text())))
    assert {arguments[0] for arguments in used} >= set(NAMES)
    for arguments in used:
        build_parser().parse_args(arguments)  # ends the test if it refuses


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


def test_the_wheel_brings_the_configs():
    """What `SHIPPED` looks for in a wheel is what the build puts there."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"] == {"jobs/configs": "mmkt_ray/configs"}
    assert SHIPPED[0] == SHIPPED[1].parents[1] / "mmkt_ray" / "configs"


def test_the_commands_load_nothing_heavy():
    """`mmkt --help` must not wait for torch or Ray because of them."""
    script = "import sys, mmkt_ray.commands as c; print(sorted({'torch', 'ray', 'fastapi', 'pandas'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[]"


def test_one_run_cannot_be_compared(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "at least two" in capsys.readouterr().err

"""The make targets, hooks and files that README.md and CONTRIBUTING.md name exist;
commands are read as a shell would."""

import re
from collections.abc import Iterator

import pytest
import yaml

from tests.pages import ROOT, mmkt_arguments, shell_commands


def make_targets_used(commands: list[list[str]]) -> Iterator[str]:
    for words in commands:
        if words[0] == "make":
            yield from (word for word in words[1:] if "=" not in word and not word.startswith("-"))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_exists(name):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = set(make_targets_used(shell_commands((ROOT / name).read_text())))
    assert used, f"{name} shows no `make` command in a ```console or ```bash block"
    assert used <= targets


def test_hooks_are_the_tools_of_the_environment():
    """Catches a hook that is fetched at a commit, or whose tool the environment lacks."""
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    required = (ROOT / "pyproject.toml").read_text()
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert hook["language"] == "system"
        assert f'"{tool}>=' in required


def test_commands_are_read_as_a_shell_would():
    commands = shell_commands(
        "Text `make nothing`.\n```console\n$ make demo ARGS=x && mmkt run jobs/a.yaml  # why\nmake output\n"
        "$ A=b .venv/bin/mmkt train \\\n    --set 'a.b=c d'\n```\n"
        "```bash\nray job submit --working-dir . -- python -m mmkt_ray.cli search x.yaml\n```\n"
        "```python\nmake = 1\n```\n"
    )
    assert list(make_targets_used(commands)) == ["demo"]
    assert list(mmkt_arguments(commands)) == [
        ["run", "jobs/a.yaml"],
        ["train", "--set", "a.b=c d"],
        ["search", "x.yaml"],
    ]

"""The make targets, hooks and files that README.md and CONTRIBUTING.md name exist; how commands are read out of Markdown."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SHELL_BLOCK = re.compile(r"^[ \t]*```(console|bash|sh|shell)[ \t]*\n(.*?)^[ \t]*```", re.M | re.S)
PROJECT_FILE = re.compile(r"(?<![\w./-])(?:jobs|tests|docs|mmkt_ray)/[\w./-]*\w")
MMKT = (["mmkt"], ["python", "-m", "mmkt_ray.cli"], ["python", "-m", "mmkt_ray"])


def shell_commands(markdown: str) -> list[list[str]]:
    """The commands of all shell blocks, as words. Where lines have prompts, the others are output."""
    commands = []
    for _, block in SHELL_BLOCK.findall(markdown):
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        prompted = [line[2:] for line in lines if line.startswith("$ ")]
        for line in prompted or lines:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            command: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set(";&|"):
                    commands.append(command)
                    command = []
                else:
                    command.append(word)
    return [command for command in commands if command]


def make_targets_used(commands: list[list[str]]) -> Iterator[str]:
    for words in commands:
        if words[0] == "make":
            yield from (word for word in words[1:] if "=" not in word and not word.startswith("-"))


def mmkt_arguments(commands: list[list[str]]) -> Iterator[list[str]]:
    """The arguments of each `mmkt ...`, also as .venv/bin/mmkt and behind `ray job submit ... --`."""
    for words in commands:
        bare = [word.removeprefix(".venv/bin/") for word in words]
        if "--" in bare and bare[:1] != ["mmkt"]:
            bare = bare[bare.index("--") + 1 :]
        while bare and re.fullmatch(r"\w+=.*", bare[0]):
            bare = bare[1:]
        for start in MMKT:
            if bare[: len(start)] == start:
                yield bare[len(start) :]


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

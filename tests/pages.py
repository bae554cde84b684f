"""The project's pages, and how commands are read out of Markdown."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SHELL_BLOCK = re.compile(r"^[ \t]*```(console|bash|sh|shell)[ \t]*\n(.*?)^[ \t]*```", re.M | re.S)
MMKT = (["mmkt"], ["python", "-m", "mmkt_ray.cli"], ["python", "-m", "mmkt_ray"])


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


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

"""What README, CONTRIBUTING and docs/ show is there: commands with their options, configs with their keys,
Python names, links.

Here commands are read as the command line would read them; `test_documented_commands.py` carries them out.
"""

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import mmkt_ray
from mmkt_ray.arguments import build_parser
from mmkt_ray.config import describe_fields, load_config, parse_config, parse_override
from mmkt_ray.config.reading import shipped
from tests.pages import PAGES, ROOT, mmkt_arguments, shell_commands, text

PROJECT_FILE = re.compile(r"(?<![\w./-])(?:jobs|tests|docs|mmkt_ray)/[\w./-]*\w")
CODE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)
KEY = re.compile(r"(samples|modalities|tasks|extract|model|training|evaluation|transfer|search|tracking)(\.\w+)+")
MAX_LINE = 118


def blocks(page: str, language: str) -> list[str]:
    return [code for name, code in CODE.findall(text(page)) if name == language]


def prose(page: str) -> str:
    return CODE.sub("", text(page))


@cache
def parser() -> argparse.ArgumentParser:
    return build_parser()


@cache
def keys() -> set[str]:
    """Dotted keys of a config without the marks of choices, lists and names."""
    return {re.sub(r"\(.*?\)|\[\]|\.<name>", "", key) for key, _, _ in describe_fields()}


@cache
def check_config(path: str, overrides: tuple[str, ...]) -> None:
    load_config(path, dict(map(parse_override, overrides)))


@cache
def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page, capsys):
    """Catches a command, an option or a config's key that was renamed, and a config that is gone."""
    faults = []
    for arguments in mmkt_arguments(shell_commands(text(page))):
        try:
            args = parser().parse_args(arguments)
        except SystemExit as stop:
            if stop.code:  # 0: --help
                faults.append(f"mmkt {shlex.join(arguments)}: {capsys.readouterr().err}")
            continue
        config = getattr(args, "config", None)
        if config and (shipped(config).exists() or config.startswith("jobs/")):
            check_config(config, tuple(args.overrides))
    assert not faults


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_a_sentence_is_known(page):
    """The same for `mmkt train --set ..` inside of a line, where words stand for files."""
    for span in SPAN.findall(prose(page)):
        words = span.split()
        if words[0] != "mmkt" or len(words) == 1:
            continue
        if words[1].startswith("-"):
            assert words[1] in parser().format_help(), span
            continue
        assert words[1] in subcommands(), span
        known = subcommands()[words[1]]._option_string_actions
        assert {word for word in words if re.fullmatch(r"--[a-z-]+", word)} <= set(known), span


@pytest.mark.parametrize("page", PAGES)
def test_every_script_knows_its_options(page):
    """Catches an option of a benchmark that is gone."""
    for words in shell_commands(text(page)):
        scripts = [word for word in words if word.startswith(("jobs/", "docs/")) and word.endswith(".py")]
        for script in scripts:
            assert (ROOT / script).is_file(), shlex.join(words)
            if "benchmark" in script or script.startswith("docs/"):
                source = "".join(path.read_text() for path in (ROOT / script).parent.glob(f"{Path(script).stem}*.py"))
                after = words[words.index(script) :]
                assert not [word for word in after if word.startswith("--") and f'"{word}"' not in source], shlex.join(
                    words
                )


@pytest.mark.parametrize("page", PAGES)
def test_every_key_of_a_config_exists(page):
    """Catches a key that was renamed, in a block of YAML or as `training.lr` in a sentence."""
    for span in SPAN.findall(prose(page)):
        if found := re.fullmatch(rf"({KEY.pattern})([:=].*)?", span):
            parts = found[1].split(".")
            if parts[0] in ("modalities", "tasks") and len(parts) > 1:
                del parts[1]  # its name
            dotted = re.sub(r"\.[N\d]\b", "", ".".join(parts))
            is_file = dotted.endswith((".safetensors", ".json"))
            assert dotted in keys() or dotted.startswith("search.space") or is_file, f"{page}: {span}"
    base = yaml.safe_load(text("jobs/configs/openmoji.yaml"))
    for block in blocks(page, "yaml"):
        raw = yaml.safe_load(block)
        parse_config(raw if "samples" in raw else base | raw)


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_its_names_exist(page):
    """Catches `mm.something` that is not offered, and a module that was moved."""
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmkt_ray"):
                module = importlib.import_module(node.module or "")
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], code
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mm":
                assert node.attr in mmkt_ray.__all__, f"mm.{node.attr}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """Catches a page, a picture or a heading that was renamed."""
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert page.count("/") == 0 or file.is_relative_to(ROOT / "docs"), f"{page}: {target} is not on the site"
        if anchor:
            slugs = {slug(title) for title in HEADING.findall(CODE.sub("", file.read_text()))}
            assert anchor in slugs, f"{page}: {target}"


def slug(title: str) -> str:
    """The anchor that GitHub and MkDocs give a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower())).strip("-")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_every_test_named_exists(page):
    missing = {name for name in PROJECT_FILE.findall(text(page)) if not (ROOT / name).exists()}
    assert not missing
    tests = {name for name in re.findall(r"`(?:[\w/.]*::)?(test_\w+)`", prose(page))}
    assert {name for name in tests if not name.endswith("_frac")} <= all_tests()  # samples.split.test_frac
    files = {name for name in re.findall(r"`((?:\w+/)*test_\w+\.py)`", text(page))}
    assert not {name for name in files if not any(ROOT.glob(f"tests/**/{name.removeprefix('tests/')}"))}


@cache
def all_tests() -> set[str]:
    return {
        name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }


@pytest.mark.parametrize("page", PAGES)
def test_no_line_is_too_long(page):
    """Tables and what a command printed have the width that they have."""
    outside = [line for line in prose(page).splitlines() if not line.startswith("|")]
    assert not [line for line in outside if len(line) > MAX_LINE]


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_reference_is_up_to_date():
    """Catches a key, a default or a description that changed without its page."""
    reference = script("reference")
    assert reference.PAGE.read_text() == reference.page(), "run: python docs/reference.py"


def test_the_reference_tells_values_and_bounds():
    """Catches a page that lists keys without what they may be."""
    rows = [line for line in script("reference").page().splitlines() if line.startswith("| `")]
    assert "| `lr` | number > 0 | `0.001` |" in "\n".join(rows)
    assert any(
        row.startswith("| `reader` | `parquet`, `webdataset`, `folders`, `manifest` | required |") for row in rows
    )
    assert any(row.startswith("| `encoder` | ") and "`tfidf`" in row and "`module:Class`" in row for row in rows)


def test_the_picture_of_the_report_is_small():
    assert (ROOT / "docs" / "report.webp").stat().st_size < script("picture").MAX_BYTES


def test_the_page_on_python_tells_all_that_is_offered():
    offered = set(mmkt_ray.__all__) - {"__version__"}
    assert set(re.findall(r"`mm\.(\w+)", text("docs/python.md"))) >= offered


def test_the_site_has_every_page_once():
    """Catches a page that no menu leads to."""
    nav = re.findall(r"^ +- [^:]+: (\S+\.md)$", text("mkdocs.yml"), re.M)
    assert sorted(nav) == sorted(path.name for path in ROOT.glob("docs/*.md"))

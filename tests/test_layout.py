"""Imports run downwards only, models know no Ray, functions take at most seven parameters, nothing unpickles, the top
level stays bare; the name of a file, of a class and of a function means one thing; no file outgrows a sitting.

Files are parsed, not imported. Each rule goes from source to faults and is tried on planted faults as well.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mmkt_ray"
BASE = {
    *(
        "section",
        "lazy",
        "cluster",
        "ray_private",
        "storage",
        "s3",
        "locks",
        "errors",
        "interrupts",
        "credentials",
        "terminal",
    ),
    *("progress", "record"),
}
# The floors from top to bottom; a file imports from its own floor and from those below it.
FLOORS = [
    {"cli", "arguments", "failures", "commands", "__main__", "completion"},
    {"serve"},
    {"api", "init"},
    {"steps", "stages", "study_steps", "submit", "upload", "doctor", "plan", "done", "quick", "export", "tracking"},
    {"report"},
    {"studies"},
    {"evaluation"},
    {"search"},
    {"training"},
    {"inference"},
    {"scoring"},
    {"models"},
    {"features"},
    {"samples"},
    {"sandbox"},
    {"config"},
    {"encoders"},
    {"kinds"},
    BASE,
    {"__init__"},  # the version
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODELS_MAY_IMPORT = {"torch", "numpy", *sys.stdlib_module_names}
MAX_PARAMETERS = 7  # beside self
MORE_PARAMETERS = {"fit_cnn"}  # a process of its own, whose state is given piece by piece
# Functions that several files may define: the start of a process;
# what a kind of file offers to the process that decodes it.
SAME_EVERYWHERE = {"main", "decode_file", "warm_up"}
MAX_LINES = 400  # of a file
MAX_LINES_OF_THE_PATH = 2_200  # of the nine files from shards to report
UNPICKLERS = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"}
TOP_LEVEL = {
    *(".ci", ".dockerignore", ".gitignore", ".pre-commit-config.yaml", ".rayignore", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("Dockerfile", "LICENSE", "Makefile", "README.md", "cluster.yaml", "docs", "jobs", PACKAGE, "pyproject.toml"),
    "mkdocs.yml",
    *("requirements.lock", "tests"),
}

Rule = Callable[[str, Path], Iterator[str]]


@cache
def nodes(source: str) -> list[ast.AST]:
    """Of a file, parsed once for all rules."""
    return list(ast.walk(ast.parse(source)))


def imports(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of every import, also of those in functions and under TYPE_CHECKING."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def calls(source: str) -> Iterator[tuple[int, str, dict[str, ast.expr]]]:
    """(line, dotted name as written, keyword arguments) of every call."""
    for node in nodes(source):
        if isinstance(node, ast.Call):
            keywords = {word.arg: word.value for word in node.keywords if word.arg}
            yield node.lineno, ast.unparse(node.func), keywords


def package_part(name: str) -> str | None:
    """`mmkt_ray.models.towers.Tower` -> `models`; None for a name outside the package."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    known = len(parts) > 1 and (parts[1] in FLOOR_OF or not parts[1].startswith("__"))
    return parts[1] if known else "__init__"


def room_of(path: Path) -> str:
    """The name just below the package that a file belongs to: `mmkt_ray/models/towers.py` -> `models`."""
    return Path(path.parts[1]).stem


def upward_imports(source: str, path: Path) -> Iterator[str]:
    floor = FLOOR_OF.get(room_of(path))
    if floor is None:
        yield f"{path}: `{room_of(path)}` has no floor; the floors are {FLOORS}"
        return
    for line, name in imports(source, path):
        part = package_part(name)
        # its names, for type checkers
        if part is None or (room_of(path) == "__init__" and part in ("__init__", "api")):
            continue
        if part not in FLOOR_OF:
            yield f"{path}:{line}: `{name}` has no floor"
        elif FLOOR_OF[part] < floor:
            yield f"{path}:{line}: `{room_of(path)}` imports `{name}` from a floor above"


def ray_imports(source: str, path: Path) -> Iterator[str]:
    if room_of(path) in {"models", "report"}:
        for line, name in imports(source, path):
            if name.split(".")[0] == "ray":
                yield f"{path}:{line}: `{room_of(path)}` knows no Ray"


def private_ray(source: str, path: Path) -> Iterator[str]:
    """Names that begin with an underscore, and packages called internal, are Ray's own business."""
    if path.name == "ray_private.py":
        return
    for line, name in imports(source, path):
        parts = name.split(".")
        if parts[0] == "ray" and any(part.startswith("_") for part in parts):
            yield f"{path}:{line}: `{name}` is private to Ray: mmkt_ray/ray_private.py is the place for it"
    for node in nodes(source):
        if isinstance(node, ast.Attribute) and node.attr == "core_worker":
            yield (
                f"{path}:{node.lineno}: `core_worker` is private to Ray: mmkt_ray/ray_private.py is the place for "
                "it"
            )
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("ray._"):
            yield f"{path}:{node.lineno}: `{ast.unparse(node)}` is private to Ray"


def foreign_imports_of_models(source: str, path: Path) -> Iterator[str]:
    if room_of(path) != "models":
        return
    for line, name in imports(source, path):
        part = package_part(name)
        allowed = part in {"models", "config", "errors", "kinds"} if part else name.split(".")[0] in MODELS_MAY_IMPORT
        if not allowed:
            yield f"{path}:{line}: models build on torch, numpy and the config, not on `{name}`"


def unsafe_loading(source: str, path: Path) -> Iterator[str]:
    for line, name in imports(source, path):
        if UNPICKLERS & set(name.split(".")):
            yield f"{path}:{line}: `{name}` runs what a file says; use safetensors, JSON, Parquet"
    for line, name, keywords in calls(source):
        if name in {"eval", "exec"}:
            yield f"{path}:{line}: `{name}`"
        if name == "yaml.load":
            yield f"{path}:{line}: use yaml.safe_load"
        if name == "torch.load" and not is_true(keywords.get("weights_only")):
            yield f"{path}:{line}: torch.load without weights_only=True"
        if name in {"np.load", "numpy.load"} and is_true(keywords.get("allow_pickle")):
            yield f"{path}:{line}: {name} with allow_pickle"


def many_parameters(source: str, path: Path) -> Iterator[str]:
    """Who has more to say gives a dataclass."""
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in MORE_PARAMETERS:
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            if len([arg for arg in given if arg.arg not in ("self", "cls")]) > MAX_PARAMETERS:
                yield f"{path}:{node.lineno}: `{node.name}` has more than {MAX_PARAMETERS} parameters"


def repeated_names(sources: Mapping[str, str], *kinds: type[ast.stmt]) -> list[str]:
    """Public classes or functions that several files define at their top level.
    sources: by file; a file counts once."""
    files: dict[str, set[str]] = {}
    for file, source in sources.items():
        module = nodes(source)[0]
        assert isinstance(module, ast.Module)
        for node in module.body:
            if isinstance(node, kinds) and not (name := node.name).startswith("_") and name not in SAME_EVERYWHERE:
                files.setdefault(name, set()).add(file)
    return [f"`{name}` is in {', '.join(sorted(places))}" for name, places in files.items() if len(places) > 1]


def passed_on(sources: Mapping[str, str]) -> list[str]:
    """Names that are imported from a file which has them from another one.
    sources: by file; packages may pass names on."""
    own: dict[str, set[str]] = {}
    for file, source in sources.items():
        module = nodes(source)[0]
        assert isinstance(module, ast.Module)
        found = {name.id for node in module.body for name in ast.walk(node) if is_set(name)}
        own[file] = found | {node.name for node in module.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    faults = []
    for file, source in sources.items():
        for line, name in imports(source, Path(file)):
            module, _, what = name.rpartition(".")
            home = f"{module.replace('.', '/')}.py"
            if home in own and what not in own[home]:
                faults.append(f"{file}:{line}: `{what}` is not defined in {home}: import it from where it is")
    return faults


def is_set(node: ast.AST) -> bool:
    """Whether it is a name that is given a value."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def repeated_files(paths: Iterable[Path]) -> list[str]:
    """Files of one name in several folders, but for those that every package may have."""
    places: dict[str, list[str]] = {}
    for path in paths:
        if path.name not in ("__init__.py", "conftest.py"):
            places.setdefault(path.name, []).append(str(path))
    return [f"`{name}`: {', '.join(sorted(found))}" for name, found in places.items() if len(found) > 1]


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def faults(rule: Rule, *folders: str) -> list[str]:
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert files, f"no Python files under {folders}"
    return [fault for path in files for fault in rule(path.read_text(), path.relative_to(ROOT))]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [upward_imports, ray_imports, private_ray, foreign_imports_of_models, many_parameters])
def test_the_package_keeps_the_rule(rule):
    assert not faults(rule, PACKAGE)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [(ast.ClassDef,), (ast.FunctionDef, ast.AsyncFunctionDef)])
def test_the_name_of_a_class_or_a_function_means_one_thing(kinds):
    """Catches a second class or function with the name of another: who looks for one finds the other, and a traceback
    does not say which of them it is about."""
    assert not repeated_names({str(path): path.read_text() for path in (ROOT / PACKAGE).rglob("*.py")}, *kinds)


@pytest.mark.parametrize("folder", [PACKAGE, "tests"])
def test_the_name_of_a_file_means_one_thing(folder):
    """Catches a second `base.py`: an editor's list, a traceback and a docstring that name it leave open which one is
    meant."""
    assert not repeated_files((ROOT / folder).rglob("*.py"))


def test_no_file_outgrows_a_sitting():
    """Catches a file that collects a second purpose."""
    num_lines = {path: len(path.read_text().splitlines()) for path in (ROOT / PACKAGE).rglob("*.py")}
    assert not {str(path): num for path, num in num_lines.items() if num > MAX_LINES}


@pytest.mark.slow
def test_a_name_is_imported_from_where_it_is_defined():
    """Catches a second address of a thing: who reads the import looks for it in a file that only passes it on."""
    assert not passed_on({str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / PACKAGE).rglob("*.py")})


def test_a_name_that_is_passed_on_is_found():
    """Catches a search that finds nothing, or one that refuses constants and what a package offers."""
    sources = {"mmkt_ray/a.py": "X: int = 1\nclass A: ...", "mmkt_ray/b.py": "from mmkt_ray.a import A, X"}
    assert not passed_on(sources | {"mmkt_ray/c.py": "from mmkt_ray.a import X\nfrom mmkt_ray.d import Y"})
    assert len(passed_on(sources | {"mmkt_ray/c.py": "from mmkt_ray.b import A"})) == 1


def test_a_repeated_name_is_found():
    """Catches a search for repeated names that finds nothing, or one that refuses what each file may have."""
    own = "class _Row: ...\nclass Encoder:\n    class Section: ..."
    sources = {"a.py": f"{own}\nclass Row: ...", "b.py": f"class Row: ...\n{own.replace('Encoder', 'Other')}"}
    assert repeated_names(sources, ast.ClassDef) == ["`Row` is in a.py, b.py"]
    sources = {"a.py": "def main(): ...\ndef fit(): ...", "b.py": "def main(): ...\nasync def fit(): ..."}
    assert repeated_names(sources, ast.FunctionDef, ast.AsyncFunctionDef) == ["`fit` is in a.py, b.py"]
    paths = [Path("a/base.py"), Path("b/base.py"), Path("a/__init__.py"), Path("b/__init__.py"), Path("a/one.py")]
    assert repeated_files(paths) == ["`base.py`: a/base.py, b/base.py"]


def test_nothing_unpickles_or_evaluates():
    assert not faults(unsafe_loading, PACKAGE, *(["jobs"] if any((ROOT / "jobs").glob("*.py")) else []))


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (upward_imports, "samples/readers.py", "from mmkt_ray.features import store"),
        (upward_imports, "encoders/image.py", "from mmkt_ray import config"),
        (upward_imports, "kinds/modalities.py", "from mmkt_ray.encoders import encoder"),
        (upward_imports, "scoring/intervals.py", "from ..training.loop import fit"),
        (upward_imports, "scoring/intervals.py", "def f():\n    import mmkt_ray.search.tuner"),
        (upward_imports, "config.py", "if TYPE_CHECKING:\n    from .samples import schema"),
        (upward_imports, "__init__.py", "from mmkt_ray.cli import main"),
        (upward_imports, "helpers.py", "import os"),
        (upward_imports, "cli.py", "import mmkt_ray.helpers"),
        (ray_imports, "models/towers.py", "import ray.train"),
        (ray_imports, "report/page.py", "def f():\n    from ray import data"),
        (private_ray, "cluster/local.py", "from ray._private import utils"),
        (private_ray, "cluster/__init__.py", "from ray.train.torch.config import _TorchBackend"),
        (private_ray, "features/fit.py", "import ray.data._internal.util"),
        (private_ray, "features/fit.py", "import ray\nray._private.worker.shutdown()"),
        (private_ray, "samples/isolated.py", "ray.get_runtime_context().worker.core_worker"),
        (foreign_imports_of_models, "models/towers.py", "import pandas as pd"),
        (foreign_imports_of_models, "models/towers.py", "from mmkt_ray.features.store import open_store"),
        (foreign_imports_of_models, "models/towers.py", "from mmkt_ray import storage"),
        (many_parameters, "storage.py", "class A:\n    def f(self, a, b, c, d, /, e, *, f, g, h): ..."),
        (unsafe_loading, "storage.py", "import pickle"),
        (unsafe_loading, "storage.py", "from ray import cloudpickle"),
        (unsafe_loading, "storage.py", "torch.load(path)"),
        (unsafe_loading, "storage.py", "torch.load(path, weights_only=False)"),
        (unsafe_loading, "storage.py", "yaml.load(text)"),
        (unsafe_loading, "storage.py", "eval(text)"),
        (unsafe_loading, "storage.py", "np.load(path, allow_pickle=True)"),
    ],
)
def test_a_planted_fault_is_found(rule, file, source):
    assert list(rule(source, Path(PACKAGE, file)))


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (upward_imports, "cli.py", "from mmkt_ray import __version__, report"),
        (upward_imports, "training/loop.py", "from . import objective\nfrom ..models.towers import Tower"),
        (upward_imports, "storage.py", "from mmkt_ray.errors import ConfigError"),
        (upward_imports, "__init__.py", "from importlib.metadata import version"),
        (private_ray, "ray_private.py", "from ray._private import utils"),
        (private_ray, "cluster/__init__.py", "import ray\nfrom ray.train.backend import Backend"),
        (foreign_imports_of_models, "models/towers.py", "import math\nfrom torch import nn\nfrom . import x"),
        (many_parameters, "storage.py", "class A:\n    def f(self, a, b, c, d, /, e, *, f, g): ..."),
        (unsafe_loading, "storage.py", "torch.load(path, weights_only=True)\nmodel.eval()"),
    ],
)
def test_what_is_allowed_passes(rule, file, source):
    assert not list(rule(source, Path(PACKAGE, file)))


def test_the_top_level_holds_only_what_is_listed():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so nothing says which files belong to the project")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split("/")[0] for line in tracked.splitlines()} <= TOP_LEVEL


def test_the_reading_path_leads_on():
    """Catches a file of the path that was moved, and one that does not say who calls it."""
    path = re.findall(r"^\| \d \| `(mmkt_ray/[^`]+)`", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert len(path) == 9
    assert sum(len((ROOT / file).read_text().splitlines()) for file in path) <= MAX_LINES_OF_THE_PATH
    for file in path:
        told = ast.get_docstring(ast.parse((ROOT / file).read_text())) or ""
        assert re.search(r"^(Called by|You come from|Built and trained by) ", told, re.MULTILINE), file

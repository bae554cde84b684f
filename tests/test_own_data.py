"""What README and the notebooks tell a new user to do with data of their own, done."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmkt_ray.cli import main
from tests.pages import SHELL_BLOCK
from tests.shapes import COLOURS, png

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.cluster

CLASSES = dict(zip(COLOURS, ("mug", "shirt", "lamp"), strict=True))


def section(title: str) -> str:
    """One section of README.md."""
    found = re.search(rf"^## {title}\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)
    assert found, title
    return found[1]


def write_shop(folder: Path) -> None:
    """shop.csv with 90 products, new.csv with 6, and their photos."""
    (folder / "img").mkdir()
    for name, numbers in (("shop", range(90)), ("new", range(90, 96))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["sku", "photo", "title", "price", *(["category"] if name == "shop" else [])])
            for i in numbers:
                colour = list(COLOURS)[i % 3]
                (folder / "img" / f"{i}.png").write_bytes(png(colour, i))
                title = f"a fine {CLASSES[colour]} {i}" if i % 4 else f"something very fine {i}"
                rows.writerow(
                    [f"A{i}", f"img/{i}.png", title, f"{i % 7}.99", *([CLASSES[colour]] if name == "shop" else [])]
                )


def in_shell(command: str, folder: Path) -> str:
    """Its standard output. `mmkt` is this tree's."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    script = f'set -e; mmkt() {{ "{sys.executable}" -m mmkt_ray "$@"; }}; {command}'
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder)
    return folder


@pytest.mark.usefixtures("ray_local")
@pytest.mark.timeout(900)
def test_your_own_data_in_five_minutes(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a README whose commands do not work one after another, or print something else than it shows. Those
    that come after the first run need no process and no Ray of their own."""
    monkeypatch.chdir(shop)
    lines = SHELL_BLOCK.findall(section("Your own data in five minutes"))[0][1].splitlines()
    told = in_shell(lines[0].removeprefix("$ "), shop)
    for line in lines[1 : lines.index("$ mmkt run run.yaml --quick")]:
        assert " ".join(line.split()) in " ".join(told.split())
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ") and "init" not in line]
    assert "Ship " in in_shell(commands[0], shop)
    for command in commands[1:]:
        assert main(shlex.split(command)[1:]) == 0
        told = capsys.readouterr().out
        assert "Ship " in told or "predictions: " in told
    found = list(csv.DictReader((shop / "predictions" / "predictions.csv").open()))
    assert [row["sku"] for row in found] == [f"A{i}" for i in range(90, 96)]
    right = [row["category_pred"] == CLASSES[list(COLOURS)[i % 3]] for i, row in zip(range(90, 96), found, strict=True)]
    assert sum(right) >= 5


@pytest.mark.usefixtures("ray_local")
@pytest.mark.timeout(900)
def test_from_python(shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a README, or a page on Python, whose code does not run.
    After the test above the run is done already."""
    monkeypatch.chdir(shop)
    code = re.findall(r"```python\n(.*?)```", section("From Python") + (ROOT / "docs" / "python.md").read_text(), re.S)
    assert len(code) > 4
    if not (shop / "run.yaml").exists():
        in_shell("mmkt init shop.csv --target category", shop)
    exec("\n".join(code), {"__name__": "__main__"})
    told = capsys.readouterr().out
    assert "accuracy_high" in told
    assert "category_pred" in told  # pandas leaves columns out of the middle of a wide table
    assert told.rstrip().endswith("log")  # of the last example


def code_of(notebook: str) -> str:
    """All its cells."""
    cells = json.loads((ROOT / "docs" / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    return "\n\n".join(code)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cell that no longer runs. The first notebook is a program of its own; the second reads its run."""
    (tmp_path / "own_data.py").write_text(code_of("own_data"))
    in_shell(f'"{sys.executable}" own_data.py', tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(code_of("reading_a_run"), {"__name__": "__main__"})

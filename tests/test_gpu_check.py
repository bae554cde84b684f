"""`jobs/gpu_check.py` on a CPU, with small sizes: what waits for a GPU must not fail there for a reason of its
own."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.cluster

JOBS = Path(__file__).parents[1] / "jobs"
SMALL = ["--cpu", "--small", "--seconds", "0.05"]
# torch and NumPy alone, as on a bare machine
BARE = """
import sys
for name in ("ray", "pydantic", "yaml", "pyarrow", "scipy", "torchvision", "PIL", "simplejpeg"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import gpu_check
sys.exit(gpu_check.main(sys.argv[2:]))
"""


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(JOBS))
    return import_module("gpu_check")


def left_out(found: Any, name: str = "") -> dict[str, str]:
    """Where -> why, of all that was left out."""
    if not isinstance(found, dict):
        return {}
    if "left_out" in found:
        return {name: found["left_out"]}
    return {where: why for key, value in found.items() for where, why in left_out(value, key).items()}


def test_every_part_runs_and_agrees_with_the_cpu(gpu_check: ModuleType, tmp_path: Path) -> None:
    """Catches a part that would fail on the GPU by an error of the script, after the GPU was waited for."""
    assert gpu_check.main([*SMALL, "--out", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    parts = found["parts"]
    assert list(parts) == list(gpu_check.PARTS)
    assert left_out(parts) == dict.fromkeys(("nvjpeg", "compile"), "measured on a GPU alone")
    for network in ("small_cnn", "resnet18"):
        assert parts["networks"][network]["differs_fp32"] <= 1e-5
        assert 0 < parts["networks"][network]["differs_bf16"] < 0.05
        assert parts["networks"][network]["fraction"] > 0
    assert parts["population"]["heads"] == 4
    assert parts["population"]["ratio"] > 0
    assert parts["pretraining"]["images"].startswith("synthetic")


def test_wrong_features_are_reported_and_the_rest_goes_on(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rate of features that are wrong, and one part that takes the others with it."""

    class Wrong(gpu_check.Forward):  # type: ignore[name-defined]
        def __call__(self, values: Any) -> np.ndarray:
            features: np.ndarray = super().__call__(values)
            return features[:, ::-1] if self.precision == "bf16" else features

    monkeypatch.setattr(gpu_check, "Forward", Wrong)
    assert gpu_check.main(["networks", "compile", *SMALL, "--out", str(tmp_path / "gpu.json")]) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert "differs from the CPU's float32" in parts["networks"]["small_cnn"]["failed"]
    assert "left_out" in parts["compile"]


def test_torch_alone_is_enough(tmp_path: Path) -> None:
    """Catches an import that a bare machine lacks, where networks and pretraining need torch and NumPy alone."""
    out = tmp_path / "gpu.json"
    subprocess.run([sys.executable, "-c", BARE, str(JOBS), *SMALL, "--out", str(out)], check=True, timeout=200)
    parts = json.loads(out.read_text())["parts"]
    told = left_out(parts)
    assert told.pop("compile") == "measured on a GPU alone"
    assert told == {"resnet18": "no torchvision", "decode": "no PIL", "population": told["population"]}
    assert parts["networks"]["small_cnn"]["step"] > 0
    assert parts["pretraining"]["tried"]

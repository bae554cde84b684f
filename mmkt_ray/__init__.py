"""Multimodal knowledge transfer as batch processing on Ray.

    import mmkt_ray as mm

    results = mm.run("run.yaml")          # everything that is not done yet; tables, the report, the model to ship
    model = mm.load("runs/openmoji")      # that model, or any model folder; without Ray
    model.predict(df, proba=True)         # a DataFrame with class names and probabilities
    mm.MultimodalClassifier().fit(df, df["category"])
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # not from the metadata: a job brings the code to nodes where it is not installed

# Read when torch loads: threads that wait for each other sleep.
# Spinning, they would take the cores from Ray's processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from mmkt_ray.api.estimators import MultimodalClassifier as MultimodalClassifier
    from mmkt_ray.api.estimators import MultimodalRegressor as MultimodalRegressor
    from mmkt_ray.api.model import Model as Model
    from mmkt_ray.api.model import load as load
    from mmkt_ray.api.runs import Results as Results
    from mmkt_ray.api.runs import results as results
    from mmkt_ray.api.runs import run as run

_OFFERED = {  # name -> module of mmkt_ray.api, loaded when the name is first used
    "Model": "model",
    "MultimodalClassifier": "estimators",
    "MultimodalRegressor": "estimators",
    "Results": "runs",
    "load": "model",
    "results": "runs",
    "run": "runs",
}
__all__ = ["Model", "MultimodalClassifier", "MultimodalRegressor", "Results", "__version__", "load", "results", "run"]


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.api.{_OFFERED[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})

"""`mmkt export`: the graph of a model is traced, written, run by its own runtime, and compared with the library.

    <out>/model.onnx or model.pt2    the graph; its metadata has the key `mmkt`, the text of mmkt.json
    <out>/mmkt.json                  inputs, outputs, class names, preprocessing, how it was checked, sizes, times
    <out>/vocabulary-<modality>.json terms and idf of TF-IDF, whose weights are inputs
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkt_ray import __version__, storage
from mmkt_ray.config import Config, parse_config
from mmkt_ray.errors import ConfigError, DataError, unknown_name
from mmkt_ray.export.check import (
    TOLERANCE,
    CheckRows,
    check_rows,
    graph_arrays,
    hide_some,
    largest_difference,
    library_proba,
)
from mmkt_ray.export.graph import ExportGraph, build_graph
from mmkt_ray.export.inputs import Arrays
from mmkt_ray.inference.model_card import Card
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import Proba
from mmkt_ray.inference.prediction import restrict, usable_encoders
from mmkt_ray.kinds.task_kind import TaskKind

TARGETS = {"onnx": "model.onnx", "torch": "model.pt2"}
OPSET = 20
EXTERNAL_BYTES = 1_800_000_000  # of weights above which they go into a file of their own: a protobuf ends at 2 GiB
Runner = Callable[[Arrays], Proba]


@dataclass(frozen=True)
class Exported:
    """What was written, and what was seen when it was run."""

    path: str
    about: dict[str, Any]  # what mmkt.json holds

    def __str__(self) -> str:
        about, check, speed = self.about, self.about["check"], self.about["speed"]
        shapes = [f"  {i['name']:<24} {i['dtype']:<8} ({', '.join(map(str, i['shape']))})" for i in about["inputs"]]
        inside = [f"  {m}: {section['inside']}" for m, section in about["modalities"].items()]
        run = ""
        if (by_run := check.get("difference_from_run")) is not None:
            same = f", the same class in {check['same_class']:.1%}" if "same_class" in check else ""
            run = f"; from the run's own predictions {by_run:.1e}{same}"
        return "\n".join(
            [
                f"exported: {self.path} ({about['bytes'] / 1e6:.1f} MB)",
                "inputs:",
                *shapes,
                "in the graph:",
                *inside,
                f"outputs: {', '.join(o['name'] for o in about['outputs'])}",
                f"checked on {check['rows']}: largest difference from mmkt predict {check['difference']:.1e}{run}",
                f"time: {speed['one_ms']:.2f} ms a row alone, {speed['batch_ms']:.3f} ms a row in batches of "
                f"{speed['batch']}",
            ]
        )


def export_model(model_uri: str, to: str = "onnx", out: str | None = None, *, trust_code: bool = False) -> Exported:
    """Write a model folder as one graph, run it, and compare it with the library.

    to: `onnx` (needs the extra `export`) or `torch` (a `torch.export` archive, .pt2). out: a local folder, by default
    `exported/<name of the model>`. trust_code: as for `predict`.
    Raises: ConfigError, DataError; DataError too where the graph's results differ from the library's by more than
    TOLERANCE.
    """
    if to not in TARGETS:
        raise unknown_name("target of --to", to, TARGETS)
    if to == "onnx":
        require_onnx()
    folder = Path(out or f"exported/{model_uri.rstrip('/').rsplit('/', 1)[-1]}")
    if "://" in str(out):
        raise ConfigError(f"--out {out}: the graph is written to a local folder; copy it from there")
    storage.make_dir(str(folder))
    model, card = load_model(model_uri)
    config = restrict(parse_config(card.config), {})
    config = config.model_copy(update={"modalities": {m: config.modalities[m] for m in model.spec.modalities}})
    folders = usable_encoders(model_uri, model, card, config, {}, trust_code)
    graph = build_graph(model, config, folders).eval()
    rows = check_rows(model_uri, config, graph, card.class_names)
    half = len(next(iter(rows.values.values()))) // 2
    mixed = hide_some(rows, half)
    example = graph_arrays(graph, {m: column[half - 4 : half + 4] for m, column in mixed.values.items()})
    about = describe(model_uri, graph, config, card)
    program = trace(graph, example)
    path = folder / TARGETS[to]
    (write_onnx if to == "onnx" else write_torch)(program, path, graph, about)
    runner = onnx_runner(path) if to == "onnx" else torch_runner(program)
    about["check"] = compare_outputs(graph, runner, folders, rows, mixed, half)
    about["speed"] = measure(runner, lambda count: graph_arrays(graph, {m: v[:count] for m, v in rows.values.items()}))
    about["bytes"] = sum(file.stat().st_size for file in folder.glob(f"{TARGETS[to]}*"))
    for part in graph.parts:
        if (vocabulary := part.vocabulary()) is not None:
            storage.write_json(str(folder / f"vocabulary-{part.modality}.json"), vocabulary)
    storage.write_json(str(folder / "mmkt.json"), about)
    return Exported(str(path), about)


def _meaning(kind: TaskKind) -> str:
    return "probabilities in the order of `classes`" if kind.classes else "the number, in the units of the labels"


def describe(model_uri: str, graph: ExportGraph, config: Config, card: Card) -> dict[str, Any]:
    """What whoever runs the graph must know, JSON-able."""
    spec = graph.model.spec
    modalities = {}
    for m, part in zip(graph.modalities, graph.parts, strict=True):
        section = config.modalities[m]
        modalities[m] = {
            **section.model_dump(mode="json", include={"kind", "encoder", "reduce"}),
            "inside": part.inside + (f"; the reducer {section.reduce.name}" if section.reduce else ""),
        }
    outputs = [
        {
            "name": name,
            "task": t,
            "kind": spec.kinds[t].as_json(),
            "shape": ["rows", spec.tasks[t]],
            **({"classes": list(card.class_names[t])} if spec.kinds[t].classes else {}),
            "meaning": f"{_meaning(spec.kinds[t])}; NaN in rows without any of: {', '.join(spec.inputs[t])}",
        }
        for name, t in zip(graph.outputs, graph.tasks, strict=True)
    ]
    return {
        "mmkt_ray": __version__,
        "model": model_uri.rstrip("/").rsplit("/", 1)[-1],
        "inputs": [i.to_dict() for i in graph.inputs],
        "outputs": outputs,
        "modalities": modalities,
        "temperatures": {t: graph.model.temperatures.get(t, 1.0) for t in graph.tasks},
    }


# --- tracing and writing --------------------------------------------------------------------------------------------


def trace(graph: ExportGraph, example: Arrays) -> Any:
    """A `torch.export.ExportedProgram` of the graph, for any number of rows."""
    longest = {axis: most for part in graph.parts for axis, most in part.longest.items()}
    axes = {axis: torch.export.Dim(_axis_name(i, axis), max=longest.get(axis)) for i, axis in enumerate(_axes(graph))}
    shapes = {i.name: {n: axes[s] for n, s in enumerate(i.shape) if isinstance(s, str)} for i in graph.inputs}
    tensors = as_tensors(graph, example)
    with quiet(), torch.no_grad():
        return torch.export.export(graph, (tensors,), dynamic_shapes=({i.name: shapes[i.name] for i in graph.inputs},))


def _axes(graph: ExportGraph) -> list[str]:
    return list(dict.fromkeys(s for i in graph.inputs for s in i.shape if isinstance(s, str)))


def _axis_name(number: int, axis: str) -> str:
    """An identifier: names of modalities may hold any character."""
    return axis if axis.isidentifier() else f"axis{number}"


def as_tensors(graph: ExportGraph, arrays: Arrays) -> dict[str, Tensor]:
    """The arrays in the graph's order."""
    return {i.name: torch.from_numpy(np.ascontiguousarray(arrays[i.name])) for i in graph.inputs}


def write_torch(program: Any, path: Path, graph: ExportGraph, about: Mapping[str, Any]) -> None:
    """A .pt2 archive; `torch.export.load` gives the metadata back as the extra file mmkt.json."""
    data = io.BytesIO()
    torch.export.save(program, data, extra_files={"mmkt.json": json.dumps(about)})
    path.write_bytes(data.getvalue())


def write_onnx(program: Any, path: Path, graph: ExportGraph, about: Mapping[str, Any]) -> None:
    """An ONNX file of opset OPSET, checked by `onnx`."""
    names = [i.name for i in graph.inputs]
    with quiet():
        exported = torch.onnx.export(
            program,
            input_names=names,
            output_names=graph.outputs,
            opset_version=OPSET,
            dynamo=True,
            custom_translation_table=_lacking(),
            verbose=False,
        )
    assert exported is not None  # as `dynamo` is asked for
    exported.model.metadata_props["mmkt"] = json.dumps(about)
    size = sum(p.numel() * p.element_size() for p in (*graph.parameters(), *graph.buffers()))
    path.unlink(missing_ok=True)
    exported.save(str(path), external_data=size > EXTERNAL_BYTES)
    importlib.import_module("onnx").checker.check_model(str(path))


def _lacking() -> dict[Any, Any]:
    """Of operators that torch's exporter does not know: what they are made of in ONNX."""
    op = importlib.import_module("onnxscript").opset20
    return {torch.ops.aten.hypot.default: lambda x, y: op.Sqrt(op.Add(op.Mul(x, x), op.Mul(y, y)))}


def require_onnx() -> None:
    """Raises: ConfigError if a package of the extra `export` is not installed."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            advice = "run pip install '.[export]' in the project's folder"
            raise ConfigError(f"mmkt export --to onnx needs {module} ({error}): {advice}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's notes about itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for log in loggers:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


# --- running --------------------------------------------------------------------------------------------------------


def onnx_runner(path: Path) -> Runner:
    """The graph by onnxruntime on the CPU."""
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}  # what no answer depends on is none

    def run(arrays: Arrays) -> Proba:
        found = session.run(names, {name: array for name, array in arrays.items() if name in wanted})
        return {name.rpartition("_")[0]: array for name, array in zip(names, found, strict=True)}

    return run


def torch_runner(program: Any) -> Runner:
    """The graph by PyTorch."""
    module = program.module()

    @torch.inference_mode()
    def run(arrays: Arrays) -> Proba:
        found = module({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})
        return {name.rpartition("_")[0]: value.numpy() for name, value in found.items()}

    return run


def compare_outputs(
    graph: ExportGraph,
    runner: Runner,
    folders: Mapping[str, list[str]],
    rows: CheckRows,
    mixed: CheckRows,
    half: int,
) -> dict[str, Any]:
    """How far the graph is from the library, and from what the run itself predicted.

    rows: as they are; mixed: the second half of them lacks modalities.
    Raises: DataError if it is too far from the library.
    """
    found = runner(graph_arrays(graph, mixed.values))
    difference = largest_difference(found, library_proba(graph, folders, mixed.values))
    alone = runner(graph_arrays(graph, {m: column[-1:] for m, column in mixed.values.items()}))
    difference = max(difference, largest_difference(alone, {t: values[-1:] for t, values in found.items()}))
    if not difference <= TOLERANCE:
        raise DataError(
            f"the exported graph differs from mmkt predict by {difference:.2g} on {rows.about}, more than "
            f"{TOLERANCE:g}: do not use it; say which encoders and fusion the model has when you report this"
        )
    check: dict[str, Any] = {
        "rows": f"{rows.about}, half of which lack a modality",
        "tolerance": TOLERANCE,
        "difference": difference,
    }
    if rows.stored is not None:
        whole = {t: values[:half] for t, values in found.items()}
        stored = {t: values[:half] for t, values in rows.stored.items()}
        check["difference_from_run"] = largest_difference(whole, stored)
        classes = [t for t in stored if graph.model.spec.kinds[t].classes]
        same = [np.nan_to_num(whole[t]).argmax(axis=1) == np.nan_to_num(stored[t]).argmax(axis=1) for t in classes]
        if same:
            check["same_class"] = float(np.mean(same))
    return check


def measure(runner: Runner, arrays: Callable[[int], Arrays], seconds: float = 1.0) -> dict[str, Any]:
    """Median milliseconds a row, one by one and in batches, without the work before the graph."""
    batch = 64
    return {
        "one_ms": _median_ms(runner, arrays(1), seconds),
        "batch": batch,
        "batch_ms": _median_ms(runner, arrays(batch), seconds) / batch,
        "threads": torch.get_num_threads(),
    }


def _median_ms(runner: Runner, arrays: Arrays, seconds: float) -> float:
    runner(arrays)
    times: list[float] = []
    while sum(times) < seconds and len(times) < 500:
        start = time.perf_counter()
        runner(arrays)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1000

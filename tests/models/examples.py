"""Small specs and batches that the tests of models share."""

import numpy as np
import scipy.sparse as sp
import torch

from mmkt_ray.config import FUSION_NAMES, FusionConfig
from mmkt_ray.kinds.multiclass import Binary
from mmkt_ray.kinds.multilabel import Multilabel
from mmkt_ray.models import InputSpec, ModelSpec, SparseBatch

B = 9
# every fusion, and hierarchical ones of some depth and fuse
FUSIONS_TO_TRY = {name: FusionConfig(name=name, num_heads=2 if name == "attention" else 4) for name in FUSION_NAMES} | {
    "hierarchical 3": FusionConfig(name="hierarchical", depth=3),
    "hierarchical gated": FusionConfig(name="hierarchical", depth=2, fuse="gated"),
    "hierarchical sum": FusionConfig(name="hierarchical", depth=3, fuse="sum"),
    "hierarchical low rank": FusionConfig(name="hierarchical", depth=2, fuse="low_rank_bilinear", rank=2),
    "hierarchical attention": FusionConfig(name="hierarchical", depth=2, fuse="attention", num_heads=1),
    "decision average": FusionConfig(name="decision", combine="average"),
    "decision product": FusionConfig(name="decision", combine="product"),
}


def make_spec(schemes=("task",), fusion="concat", dims=None, sparse=("text",), inputs=None, dropout=0.0, **changes):
    """Tasks a (two classes) and b (multilabel, three) over image (4 features) and text (7), H = 6."""
    dims = dims or {"image": 4, "text": 7}
    fields = {
        "modalities": {m: InputSpec(d, m in sparse, min(6, d)) for m, d in dims.items()},
        "tasks": {"a": 2, "b": 3},
        "kinds": {"a": Binary(), "b": Multilabel()},
        "inputs": {t: tuple(sorted((inputs or {}).get(t, dims))) for t in "ab"},
        "fusion": FUSIONS_TO_TRY[fusion].model_dump(mode="json"),
        "schemes": tuple(schemes),
        "mmoe_experts": 3,
        "hidden_dim": 6,
        "dropout": dropout,
        "feature_dropout": dropout,
        "modality_dropout": 0.0,
        "missing": "mask",
    }
    return ModelSpec(**fields | changes)


def sparse_batch(matrix):
    matrix = sp.csr_matrix(matrix, dtype=np.float32)
    parts = (matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64), matrix.data)
    return SparseBatch(*map(torch.from_numpy, parts))


def make_batch(spec, seed=0, num_rows=B):
    rng = np.random.default_rng(seed)
    features = {}
    for m, i in spec.modalities.items():
        x = rng.normal(size=(num_rows, i.dim)).astype(np.float32)
        features[m] = sparse_batch(x * (rng.random(x.shape) < 0.4)) if i.sparse else torch.from_numpy(x)
    return features, {m: torch.from_numpy(rng.random(num_rows) < 0.6) for m in features}


def everywhere(features, *modalities):
    """Presence of these modalities in all rows, of the others in none."""
    return {m: torch.full((B,), m in modalities) for m in features}


def garbage(features, present, seed=1):
    """The same features with absent rows replaced by something wild."""
    rng = np.random.default_rng(seed)
    out = {}
    for m, x in features.items():
        if isinstance(x, SparseBatch):
            absent = torch.repeat_interleave(~present[m], x.offsets.diff())
            wild = torch.from_numpy(rng.choice([np.nan, np.inf, 1e3], size=len(x.values)).astype(np.float32))
            out[m] = x._replace(values=torch.where(absent, wild, x.values))
        else:
            wild = torch.from_numpy(rng.choice([np.nan, np.inf, -1e9, 3.0], size=x.shape).astype(np.float32))
            out[m] = torch.where(present[m][:, None], x, wild)
    return out

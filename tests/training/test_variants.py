"""The models of a run side by side: the same as one after the other, what several need made once."""

from pathlib import Path

import numpy as np
import pytest

from mmkt_ray.features.store import open_store
from mmkt_ray.inference.model_folder import load_model
from mmkt_ray.inference.outputs import predict_table
from mmkt_ray.training import variants as module
from mmkt_ray.training.trainer import train
from mmkt_ray.training.variants import train_singles, train_variants
from tests.training.test_trainer import write_store


def test_side_by_side_is_one_after_the_other(
    ray_local, make_config, table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Catches an expert or a choice of settings that each variant makes for itself, a student that begins before its
    teacher, another order of variants that changes a model, and work that is done again."""
    store = open_store(write_store(str(tmp_path / "store"), table))
    alone = open_store(write_store(str(tmp_path / "other" / "store"), table))
    auto = {"training.auto": ["training.lr"], "model.experts": True, "training.steps": 10}
    variants = {
        "concat": make_config(**auto),
        "student": make_config(**auto, **{"training.transfer": {"teachers": ["concat"]}}),
        "gated": make_config(**auto, **{"model.fusion": "gated"}),
        "image": make_config(**auto, **{"model.modalities": ["image"]}),
    }
    folder, other = str(tmp_path / "models"), str(tmp_path / "other" / "models")
    stores = dict.fromkeys(variants, store)
    ended = dict(train_variants(variants, stores, folder))
    assert {name: found.status for name, found in ended.items()} == dict.fromkeys(variants, "trained")
    assert [*ended][-1] == "student"
    experts = list((tmp_path / "models" / ".experts").iterdir())
    assert len(experts) == 1  # text: the image's is a variant
    assert (
        sorted(path.suffix for path in (tmp_path / "store" / "settings").iterdir() if path.is_file()) == [".json"] * 3
    )
    for name in ("image", "concat", "gated", "student"):
        train(variants[name], alone.uri, f"{other}/{name}", other)
        (ours, card), (theirs, expected) = load_model(f"{folder}/{name}"), load_model(f"{other}/{name}")
        assert card.training.auto == expected.training.auto
        for t, values in predict_table(theirs, table).items():
            np.testing.assert_allclose(predict_table(ours, table)[t], values, atol=1e-5)
    assert train_singles(variants, store, folder) == {"text": str(experts[0])}

    asked = []
    monkeypatch.setattr(module, "SideBySide", lambda calls, *_, **__: asked.append(dict(calls)) or [])
    again = dict(train_variants(variants, stores, folder))
    assert {name: found.status for name, found in again.items()} == dict.fromkeys(variants, "up to date")
    assert asked == [{}]

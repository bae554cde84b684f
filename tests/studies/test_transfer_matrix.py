"""The transfer matrix and repeats: the right pairs, gains against the right scratch runs, nothing fitted twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmkt_ray import storage
from mmkt_ray.errors import ConfigError
from mmkt_ray.features.store import open_store
from mmkt_ray.studies.repeats import repeat
from mmkt_ray.studies.seeds_results import Seeds, seeds_table
from mmkt_ray.studies.transfer_matrix import Node, list_nodes, methods_for, node_config, transfer_matrix
from mmkt_ray.studies.transfer_results import Transfers, transfer_table
from mmkt_ray.training.loop import fit
from tests.training.test_trainer import write_store

IMAGE, TEXT, BOTH = ("image",), ("text",), ("image", "text")


@pytest.fixture(scope="module")
def store(table, tmp_path_factory):
    return open_store(write_store(str(tmp_path_factory.mktemp("store")), table))


@pytest.mark.parametrize(
    ("source", "target", "methods"),
    [
        (Node(IMAGE, "topic"), Node(IMAGE, "topic"), set()),
        (Node(IMAGE, "topic"), Node(IMAGE, "mood"), {"finetune", "frozen", "gradual"}),
        (Node(BOTH, "topic"), Node(IMAGE, "topic"), {"finetune", "frozen", "gradual", "distill"}),
        (Node(TEXT, "topic"), Node(IMAGE, "topic"), {"distill"}),
        (Node(TEXT, "mood"), Node(IMAGE, "topic"), {"joint"}),
    ],
)
def test_each_pair_gets_the_methods_that_make_sense(source, target, methods):
    """Catches a student taught by itself, and towers taken from a model that has none of the modality."""
    assert set(methods_for(source, target)) == methods


@pytest.mark.slow
def test_the_matrix_tells_what_helps(make_config, store, tmp_path, monkeypatch):
    """Catches gains over other seeds' scratch runs, transfer without the source's knowledge,
    and a rerun that fits again."""
    config = make_config(
        **{
            "training.epochs": 6,
            "transfer.sources": ["image:topic", "image+text:topic"],
            "transfer.targets": ["image:topic", "text:mood"],
            "transfer.label_fracs": [0.02],
            "training.transfer.distill_weight": 0.9,
            "transfer.methods": ["frozen", "distill", "joint"],
            "transfer.seeds": 2,
        }
    )
    result = transfer_matrix(config, store, str(tmp_path))
    cells = {(c.source, c.target, c.method): c for c in result.cells}
    assert set(cells) == {
        ("image+text:topic", "image:topic", "frozen"),
        ("image+text:topic", "image:topic", "distill"),
        ("image:topic", "text:mood", "joint"),
        ("image+text:topic", "text:mood", "frozen"),
    }
    scratch = {t.target: t.score for t in result.targets}
    helped = cells["image+text:topic", "image:topic", "distill"]
    assert helped.gain > 0.02  # the teacher speaks of all train rows, of which scratch knows a fiftieth
    assert helped.low <= helped.gain <= helped.high
    assert scratch["image:topic"] + helped.gain <= 1.0
    assert "image+text:topic -> image:topic (distill)" in transfer_table(result)
    monkeypatch.setattr("mmkt_ray.studies.transfer_matrix._fit_cell", lambda *_: pytest.fail("fitted again"))
    assert transfer_matrix(config, store, str(tmp_path)) == Transfers.read(str(tmp_path / "transfer.json")) == result


def test_nodes_are_those_that_the_rows_carry(make_config, store):
    """Catches a matrix over modality and task pairs that no row has together."""
    nodes = {str(n) for n in list_nodes(make_config(**{"tasks.mood.inputs": ["text"]}), store)}
    assert nodes == {"image:topic", "text:topic", "image+text:topic", "text:mood"}
    with pytest.raises(ConfigError, match="did you mean 'image:topic'"):
        transfer_matrix(make_config(**{"transfer.sources": ["imag:topic"]}), store, "nowhere")


def test_repeats_differ_by_seed_only(make_config, store, tmp_path):
    """Catches seeds that change nothing, variants compared on rows that one of them can't read, and models of seeds
    that cannot predict because their encoders are not with them."""
    encoders = {m: entry.replaced(folders=[f"{m}-1"]) for m, entry in store.manifest.modalities.items()}
    store = replace(store, manifest=store.manifest.replaced(modalities=encoders))
    for m in encoders:
        storage.write_bytes(str(tmp_path / "encoders" / f"{m}-1" / "encoder.json"), m.encode())
    variants = {"image": {"model.modalities": ["image"]}, "both": {}}
    config = make_config(variants=variants, **{"training.epochs": 2})
    result = repeat(config, {name: store for name in variants}, str(tmp_path), 2)
    found = result.tasks["topic"]
    assert len(set(found.models["both"].by_seed)) == 2
    assert found.reference == "image"
    table = store.table()
    both = table.present["image"] & table.present["text"]  # text alone is trained beside the variants
    both = both & table.labels["topic"].labelled & (table.split == "test")
    assert found.num_rows == both.sum()
    assert "against image" in seeds_table(result)
    model, reference = found.models["both"], found.models["image"]
    for metric in ("accuracy", "macro_f1"):
        gain = model[metric]["value"] - reference[metric]["value"]
        assert model.versus[metric]["value"] == pytest.approx(gain)
    assert model["accuracy"]["value"] == pytest.approx(np.mean(model.by_seed))
    assert Seeds.read(str(tmp_path / "seeds.json")) == result
    for seed, variant, m in (("0", "image", "image"), ("1", "both", "text")):
        saved = tmp_path / "seeds" / seed / variant / "encoders" / f"{m}-1" / "encoder.json"
        assert saved.read_bytes() == m.encode()


def test_repeats_against_a_variant(make_config, store, tmp_path):
    """Catches a gain over another model than the one that was asked for,
    and a misspelt one found after the training."""
    variants = {"image": {"model.modalities": ["image"]}, "both": {}, "wide": {"model.hidden_dim": 16}}
    config, stores = make_config(variants=variants, **{"training.epochs": 1}), {name: store for name in variants}
    result = repeat(config, stores, str(tmp_path), 1, against="both")
    found = result.tasks["topic"]
    assert found.reference == result.against == "both"
    assert [n for n, model in found.models.items() if model.versus is None] == ["both"]
    with pytest.raises(ConfigError, match="did you mean 'both'"):
        repeat(config, stores, str(tmp_path), 1, against="bot")


def test_repeats_of_unpaired_corpora_score_each_model_on_what_it_reads(make_config, table, tmp_path):
    """Catches a model of two modalities that is scored on no row, or on none but paired ones,
    where there are no pairs."""
    present = {"image": table.labels["topic"].labelled, "text": ~table.labels["topic"].labelled}
    mood = table.labels["mood"].keep(present["text"])
    unpaired = replace(table, present=present, labels=table.labels | {"mood": mood})
    store = open_store(write_store(str(tmp_path / "unpaired"), unpaired))
    pairs = {"image": "topic", "text": "mood"}
    singles = {m: {"model.modalities": [m], "model.tasks": [task]} for m, task in pairs.items()}
    variants = {**singles, "both": {}}
    config = make_config(variants=variants, **{"training.epochs": 1})
    tasks = repeat(config, {name: store for name in variants}, str(tmp_path), 2).tasks
    for single, task in pairs.items():
        assert set(tasks[task].models) == {single, "both"}
        assert tasks[task].reference == single
        assert tasks[task].num_rows == ((unpaired.split == "test") & unpaired.labels[task].labelled).sum()


def test_every_seed_is_another_model_where_the_config_sets_one(make_config, table, store, tmp_path):
    """Catches `training.seed` that makes every seed of the matrix one model:
    intervals without the luck of the seed."""
    config = make_config(**{"training.seed": 7, "training.epochs": 1})
    nodes = [node_config(config, Node(IMAGE, "topic"), seed) for seed in (0, 1)]
    assert [n.training_seed for n in nodes] == [7, 8]
    first, second = (dict(fit(n, table).model.named_parameters()) for n in nodes)
    assert any(not torch.equal(p, second[name]) for name, p in first.items() if p.ndim > 1)
    assert repeat(config, {"model": store}, str(tmp_path), 2).seeds == [7, 8]

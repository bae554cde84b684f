"""A new kind of modality and a new encoder: what their class and their entry say is enough,
from shards to predictions."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mmkt_ray import storage
from mmkt_ray.config import Config, describe_fields, parse_config
from mmkt_ray.encoders.catalog import ENCODERS
from mmkt_ray.errors import ConfigError
from mmkt_ray.inference.prediction import NewShards, predict
from mmkt_ray.kinds.modalities import MODALITY_KINDS
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.steps import run_steps
from mmkt_ray.studies.gallery import write_gallery
from tests.shapes import COLOURS, write_shard

MakeConfig = Callable[..., Config]
COLUMNS = {"sample_id": "id", "pulse": "pulse", "text": "caption", "colour": "colour"}


@pytest.fixture(autouse=True)
def _entries() -> Iterator[None]:
    """The entries of toy_kinds.py, for one test alone."""
    kinds, encoders = dict(MODALITY_KINDS), dict(ENCODERS)
    import toy_kinds

    MODALITY_KINDS["pulse"], ENCODERS["spread"] = toy_kinds.Pulse, toy_kinds.Spread
    yield
    for entries, before in ((MODALITY_KINDS, kinds), (ENCODERS, encoders)):
        entries.clear()
        entries.update(before)


def toy(make_config: MakeConfig, **overrides: object) -> Config:
    source = make_config().samples.sources[0].model_dump() | {"columns": COLUMNS}
    modalities = {
        "pulse": {"kind": {"name": "pulse", "shortest": 2}, "encoder": {"name": "spread", "scale": 2.0}},
        "text": {"kind": "text", "encoder": "late_encoder:Late"},
    }
    return make_config(samples__sources=[source], modalities=modalities, **overrides)


def write_pulses(folder: Path, start: int, num_rows: int) -> None:
    """Pulses that tell the colour by their mean; every tenth caption is absent, and row 7 has too short a pulse."""
    rng = np.random.default_rng(start)
    rows = range(start, start + num_rows)
    pulses = [list(rng.normal(4 * (i % len(COLOURS)), 0.5, 5)) if i != 7 else [1.0] for i in rows]
    captions = [None if i % 10 == 0 else f"number {i} of a row" for i in rows]
    write_shard(
        folder / f"{start}.parquet", start, num_rows, pulse=pa.array(pulses, pa.list_(pa.float32())), caption=captions
    )


@pytest.mark.usefixtures("ray_local")
def test_from_shards_to_predictions(tmp_path: Path, make_config: MakeConfig) -> None:
    """Catches a place that knows the kinds or the encoders by name; entries that Ray's workers lack;
    options that are lost."""
    folder = tmp_path / "data" / "shapes"
    for start in (0, 60, 120):
        write_pulses(folder, start, 60)
    less = {"evaluation__bootstrap_samples": 100, "evaluation__studies": ["insight"]}
    config = toy(make_config, training__epochs=30, training__lr=0.02, **less)
    told = run_steps(config)
    assert "report: " in told
    results = storage.read_json(f"{tmp_path}/runs/shapes/report/results.json")
    assert "pulse" in str(results)
    (store,) = (tmp_path / "runs" / "shapes" / "features").glob("encoded-*")
    rows = pd.read_parquet(store / "data").set_index("sample_id")
    rejects = pd.read_parquet(store / "rejects.parquet").set_index("sample_id")
    assert rejects.loc["s7", "reason"] == "pulse: must be a list of at least 2 numbers, got [1.0]"
    assert rows.loc["s7", "pulse_features"] is None
    assert rows["pulse_hash"].nunique() == 179
    means = {i: rows.loc[f"s{i}", "pulse_features"][0] for i in (0, 1, 2)}
    assert [round(means[i] / 8) for i in (0, 1, 2)] == [0, 1, 2]  # scale: 2
    write_pulses(tmp_path / "new", 300, 30)
    model_uri, out_uri = f"{tmp_path}/runs/shapes/models/model", str(tmp_path / "out")
    predictions = pd.read_parquet(predict(model_uri, [str(tmp_path / "new")], out_uri, NewShards(trust_code=True)))
    assert (predictions["colour_pred"] == predictions["colour_label"]).mean() > 0.9
    shown = write_gallery(model_uri).tasks["colour"]["right"][0].inputs
    assert shown["pulse"]["text"].startswith("[")


def test_the_config_is_checked_against_the_entries(make_config: MakeConfig) -> None:
    """Catches entries that are looked up once, at import; messages and help that do not know a new one."""
    config = toy(make_config)
    assert parse_config(config.model_dump(mode="json")) == config
    told = dict((key, default) for key, default, _ in describe_fields())
    assert told["modalities.<name>.encoder(spread).scale"] == "1.0"
    assert told["modalities.<name>.kind(pulse).shortest"] == "1"
    raw = config.model_dump(mode="json")
    assert raw["modalities"]["text"]["kind"] == "text"
    for key, value, message in (
        (
            "modalities__pulse__encoder__scael",
            1,
            r"unknown key 'modalities\.pulse\.encoder\.spread\.scael'.*mean 'scale'",
        ),
        (
            "modalities__pulse__encoder",
            "tfidf",
            r"modalities\.pulse: encoder 'tfidf' reads text, the modality's kind is pulse",
        ),
        ("modalities__pulse__encoder", "sprad", r"unknown encoder 'sprad': did you mean 'spread'"),
        ("modalities__pulse__kind", "puls", r"unknown kind of modality 'puls': did you mean 'pulse'"),
        (
            "modalities__text__kind",
            {"name": "text", "shortest": 1},
            r"unknown key 'modalities\.text\.kind\.text\.shortest'",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            toy(make_config).with_overrides({key.replace("__", "."): value})


def test_a_plan_is_the_same_in_a_child(make_config: MakeConfig) -> None:
    """Catches an option or a kind that is lost on the way to the process that reads a deadly shard."""
    plan = ReadingPlan.of(toy(make_config))
    assert ReadingPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan

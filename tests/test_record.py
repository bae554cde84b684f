"""Records: what a file holds is what is written again, byte for byte,
and a key that does not belong there is named."""

import json
from pathlib import Path

import pytest

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation.scoring_files import score_files
from mmkt_ray.features.manifest import Manifest
from mmkt_ray.inference.model_card import Card
from mmkt_ray.record import IfAny, OpenRecord, Record
from mmkt_ray.scoring.metrics import BaselinesFile, FilesMetrics, ModelMetrics
from mmkt_ray.scoring.results import ResultsFile
from mmkt_ray.scoring.run_file import RunFile
from tests.evaluation.runs import KINDS, TAGS, draw_samples, make_config, write_run

FILES = {  # file of a run -> what it holds
    "models/concat/metrics.json": ModelMetrics,
    "models/image/metrics.json": ModelMetrics,
    "baselines/union/metrics.json": BaselinesFile,
    "report/results.json": ResultsFile,
    "models/concat/config.json": Card,
    "features/union/manifest.json": Manifest,
    "run.json": RunFile,
}


class Inner(OpenRecord):
    spread = "values"

    num: int
    values: dict[str, float | None]


class Outer(Record):
    name: str
    inner: Inner
    later: int = 3
    extra: IfAny[int] = None


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of all kinds of task by the real code."""
    folder = tmp_path_factory.mktemp("record")
    things = (*sorted(set(TAGS) - {"unicorn"}), "unicorn")
    return Path(write_run(folder, make_config(folder, tasks=KINDS, training__epochs=1), draw_samples(200, things)))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_a_run_is_written_again_as_it_was(run, file, tmp_path):
    """Catches a key that is lost, or one that is added, when a finished run is opened, and 1 that becomes 1.0."""
    found = FILES[file].read(str(run / file))
    found.write(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == (run / file).read_bytes()


@pytest.mark.slow
def test_scores_of_files_too(run, tmp_path, monkeypatch):
    """Catches the same of `mmkt evaluate MODEL DATA`, whose scores are others."""
    monkeypatch.setattr("mmkt_ray.evaluation.scoring_files.predict", predictions_of(run))
    score_files(str(run / "models" / "concat"), ["x"], str(tmp_path))
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    found = FilesMetrics.read(str(tmp_path / "metrics.json"))
    assert json.dumps(found.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n" == text


def predictions_of(run: Path):
    """In place of predicting: what evaluation left."""

    def predict(model_uri: str, inputs: list[str], out_uri: str, reading: object) -> str:
        return f"{model_uri}/predictions-test.parquet"

    return predict


def test_what_is_given_is_written_and_nothing_else():
    """Catches defaults of later versions that are written into the files of earlier ones, and a None that is lost."""
    value = {"name": "a", "inner": {"num": 1, "accuracy": 0.5, "loss": None}}
    assert Outer.from_dict(value, "f.json").to_dict() == value
    assert Outer(name="a", inner=Inner(num=1, values={}), extra=None).to_dict() == {"name": "a", "inner": {"num": 1}}
    found = Outer(name="a", inner=Inner(num=1, values={"loss": None}), later=4, extra=5).to_dict()
    assert found == {"name": "a", "inner": {"num": 1, "loss": None}, "later": 4, "extra": 5}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"nmae": 1}, "unknown key 'nmae'"),
        ({"inner": {}}, "'inner.num' is missing"),
        ({"inner": {"num": 1, "accuracy": "high"}}, "'inner.values.accuracy': Input should be a valid number"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(tmp_path, change, told):
    """Catches a KeyError or a silent default where a file was changed by hand, or is of another version."""
    uri = str(tmp_path / "some.json")
    storage.write_json(uri, {"name": "a", "inner": {"num": 1}} | change)
    with pytest.raises(DataError) as raised:
        Outer.read(uri)
    assert told in str(raised.value)
    assert uri in str(raised.value)
    assert Outer.read_or_none(str(tmp_path / "none.json")) is None

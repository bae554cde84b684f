"""What is kept of a run's steps: when a step is done again, and when nothing is."""

import json
import os
from pathlib import Path

import pytest

from mmkt_ray import done, storage
from mmkt_ray.config import Config
from mmkt_ray.features.siblings import copy_from_sibling
from tests.shapes import shapes_config, write_shard


class Step:
    """A step that writes a file, and counts how often."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.times = folder, 0

    def __call__(self) -> None:
        self.times += 1
        (self.folder / "result.json").write_text('{"a": 1}')

    def ask(self, settings: object, again: bool = False) -> bool:
        return done.Step(str(self.folder), "step", settings, ["result.json", "optional.json"]).once(self, again)


def test_a_step_is_done_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A step that is done again from the same settings, or is left although they differ; `--verbose` that says no
    more than usual."""
    step = Step(tmp_path)
    caplog.set_level("DEBUG", "mmkt_ray")
    assert [step.ask({"x": 1}), step.ask({"x": 1}), step.ask({"x": 2}), step.ask({"x": 2}, again=True)] == [
        True,
        False,
        True,
        True,
    ]
    assert step.times == 3
    (tmp_path / "result.json").unlink()
    assert step.ask({"x": 2})
    assert [r.getMessage() for r in caplog.records] == [
        "step step: was not done before",
        "step step: is done, from the same",
        "step step: its settings, what it reads or this version are not as they were",
        "step step: not as they were left: result.json",
    ]


@pytest.mark.parametrize("harm", ["removed", "changed", "damaged ledger", "a ledger with another key"])
def test_a_step_whose_file_is_not_as_it_was_is_done_again(tmp_path: Path, harm: str) -> None:
    """A result of the same length and time that another command, or a hand, has written."""
    step = Step(tmp_path)
    step.ask(1)
    file = tmp_path / "result.json"
    at = file.stat().st_mtime_ns
    if harm == "removed":
        file.unlink()
    elif harm == "changed":
        file.write_text('{"a": 2}')
        os.utime(file, ns=(at, at))
    elif harm == "damaged ledger":
        (tmp_path / "done.json").write_bytes(b"{")
    else:
        (tmp_path / "done.json").write_text((tmp_path / "done.json").read_text().replace('"digest"', '"digset"'))
    assert step.ask(1)
    assert json.loads(file.read_text()) == {"a": 1}
    assert not step.ask(1)


def test_other_code_does_its_steps_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of an older version that a newer one shows as its own."""
    step = Step(tmp_path)
    step.ask(1)
    monkeypatch.setattr(done, "code_digest", lambda: "another")
    assert step.ask(1)


def test_a_step_that_breaks_off_is_not_done(tmp_path: Path) -> None:
    """A step that is written down before its work has ended."""
    with pytest.raises(ZeroDivisionError):
        done.Step(str(tmp_path), "step", 1, ["result.json"]).once(lambda: 1 / 0)
    assert Step(tmp_path).ask(1)


@pytest.fixture
def told(tmp_path: Path) -> Config:
    """A config whose run is finished, as far as can be seen."""
    write_shard(tmp_path / "data" / "shapes" / "0.parquet", 4, 0)
    config = shapes_config(tmp_path)
    uri = done.run_folder(config)
    storage.write_json(storage.join(uri, "models/concat/metrics.json"), {"accuracy": 1})
    done.keep_printed(config, "the table")
    return config


def test_nothing_is_to_be_done_twice(told: Config) -> None:
    """A finished run that is not known again, be it for its lock."""
    Path(done.run_folder(told), ".lock").write_text("")
    assert done.printed_before(told) == "the table"


@pytest.mark.parametrize("what", ["new shard", "changed shard", "result", "lost result", "new file", "setting", "code"])
def test_whatever_changes_is_noticed(told: Config, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run that is said to be so although a shard, a result, a setting or the code is another."""
    metrics = Path(done.run_folder(told), "models/concat/metrics.json")
    if what == "new shard":
        write_shard(tmp_path / "data" / "shapes" / "1.parquet", 4, 1)
    elif what == "changed shard":
        write_shard(tmp_path / "data" / "shapes" / "0.parquet", 5, 2)
    elif what == "result":
        metrics.write_text('{"accuracy": 2}')
    elif what == "lost result":
        metrics.unlink()
    elif what == "new file":
        (metrics.parent / "seeds.json").write_text("{}")
    elif what == "setting":
        told = told.with_overrides({"evaluation.confidence": 0.9})
    else:
        monkeypatch.setattr(done, "code_digest", lambda: "another")
    assert done.printed_before(told) is None


def test_models_from_elsewhere_are_looked_at_each_time(told: Config) -> None:
    """A run that is called finished although the model outside, from which it learns, may be another now."""
    config = told.with_overrides({"training.transfer.init": {"image": "/elsewhere/model"}})
    done.keep_printed(config, "the table")
    assert done.printed_before(config) is None


def test_a_folder_is_taken_over_from_a_whole_run_only(tmp_path: Path) -> None:
    """A folder that is not finished, or does not serve, and files that are shared so that one run changes the
    other."""
    for run, files in {"a": ["data/p"], "b": ["data/p", "manifest.json"], "c": ["data/p", "manifest.json"]}.items():
        for file in files:
            storage.write_bytes(str(tmp_path / run / "features" / "s" / file), run.encode())
    runs = storage.join(str(tmp_path), "new")
    assert not copy_from_sibling(runs, "features/s", "manifest.json", lambda uri: False)
    assert not (tmp_path / "new").exists()
    assert copy_from_sibling(runs, "features/s", "manifest.json", lambda uri: "/b/" not in uri)
    mine = tmp_path / "new" / "features" / "s" / "data" / "p"
    assert mine.read_bytes() == b"c"
    storage.write_bytes(str(mine), b"changed")
    assert (tmp_path / "c" / "features" / "s" / "data" / "p").read_bytes() == b"c"

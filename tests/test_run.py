"""A whole run on a small set, as the command line does it: results, resuming, predictions on new shards."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmkt_ray import steps, storage
from mmkt_ray.cli import main
from mmkt_ray.config import Config
from mmkt_ray.errors import DataError
from mmkt_ray.failures import tell_unexpected
from mmkt_ray.inference.prediction import NewShards, predict
from tests.manifests import make_manifest
from tests.shapes import png, shapes_config, write_shard, write_shards

VARIANTS = {
    "image_only": {"model.modalities": ["image"]},
    "concat": {"model.fusion": "concat"},
    "shared": {"model.sharing": "task_modality", "model.fusion": {"name": "hierarchical", "depth": 2}},
}
QUICK = {"epochs": 4, "lr": 0.01, "batch_size_per_worker": 32}
REDUCE = {"name": "pca", "dim": 6}


@pytest.fixture(scope="module")
def finished(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str]:
    """A run that is done, with what it returned."""
    folder = tmp_path_factory.mktemp("finished")
    write_shards(folder)
    config = shapes_config(
        folder, variants=VARIANTS, training=QUICK, model={"hidden_dim": 16}, modalities__image__reduce=REDUCE
    )
    return config, steps.run_steps(config)


def test_a_run_says_how_good_its_models_are(finished: tuple[Config, str]) -> None:
    """A run whose steps do not fit together."""
    config, text = finished
    assert "concat" in text
    assert "majority" in text
    folder = Path(steps.run_folder(config))
    assert (folder / "report" / "index.html").stat().st_size > 10_000
    metrics = json.loads((folder / "models" / "concat" / "metrics.json").read_text())
    assert metrics["tasks"]["colour"]["accuracy"] > 0.8  # the colour is in the picture and in the caption


def snapshot(folder: Path) -> dict[str, int]:
    """Modification time of each file of a run, by place in it."""
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


QUIET = """
import sys
from mmkt_ray.cli import main
status = main(["run", sys.argv[1]])
loaded = {"ray", "torch", "sklearn"} & sys.modules.keys()
sys.exit(status or (f"loaded: {loaded}" if loaded else 0))
"""


def test_the_same_command_again(finished: tuple[Config, str], tmp_path: Path) -> None:
    """A finished run that loads PyTorch and Ray, evaluates, studies or draws again,
    or does not say that it did nothing."""
    config, text = finished
    folder = Path(steps.run_folder(config))
    before = snapshot(folder)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    again = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path / "c.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.rstrip() == f"nothing was to be done: the run is finished\n\n{text}"
    assert snapshot(folder) == before


def test_a_copied_run_is_examined_and_left_as_it_is(
    finished: tuple[Config, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files with other times than when the run ended, as `cp -r` and object stores give,
    that make all steps run again."""
    config, _ = finished
    folder = Path(steps.run_folder(config))
    for file in folder.rglob("*.json"):
        file.touch()
    before = snapshot(folder)
    monkeypatch.setattr(steps, "check_before_work", lambda *_: pytest.fail("examined again"))
    caplog.set_level("INFO", logger="mmkt_ray")
    steps.run_steps(config)
    assert "features are up to date" in caplog.text
    assert "model concat is up to date" in caplog.text
    assert "best epoch" not in caplog.text
    changed = {place for place, at in snapshot(folder).items() if before.get(place) != at}
    assert all(place.startswith(("report/", "run.json", "done.json")) for place in changed)


def test_a_new_name_extracts_nothing_again(
    finished: tuple[Config, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Encoders fitted and features extracted anew because the run's name differs;
    a run that needs the other one to live."""
    config, _ = finished
    caplog.set_level("INFO", logger="mmkt_ray")
    monkeypatch.setattr("mmkt_ray.features.extract.run_encode", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr("mmkt_ray.features.fit.merge_in_tree", lambda *_: pytest.fail("fitted again"))
    before = snapshot(Path(steps.run_folder(config)))
    other = config.with_overrides({"name": "other", "training.epochs": 2})
    stores, known = steps.extract_step(other), steps.extract_step(config)
    for name, store in stores.items():
        assert store.uri.startswith(steps.run_folder(other))
        assert store.manifest == known[name].manifest
        ours, theirs = (s.table(["image", "text"], ["colour"]) for s in (store, known[name]))
        assert np.array_equal(ours.features["image"], theirs.features["image"])
        assert ours.labels["colour"].same_as(theirs.labels["colour"])
    assert "is taken over from" in caplog.text
    assert "suspects" not in json.loads(Path(stores["concat"].uri, "audit.json").read_text())
    assert "suspects" in json.loads(Path(known["concat"].uri, "audit.json").read_text())
    assert snapshot(Path(steps.run_folder(config))) == before


def test_a_damaged_store_of_another_run_is_not_taken_over(
    finished: tuple[Config, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished or damaged store that is copied because its name is right."""
    config, _ = finished
    folder = Path(steps.run_folder(config))
    manifest = next(folder.glob("features/encoded-*/manifest.json"))
    right = manifest.read_bytes()
    monkeypatch.setattr("mmkt_ray.features.extract.run_encode", lambda *_: (_ for _ in ()).throw(DataError("encoded")))
    monkeypatch.setattr("mmkt_ray.features.siblings._other_runs", lambda _: [str(folder)])
    try:
        manifest.write_bytes(right.replace(b'"rows"', b'"Rows"'))
        with pytest.raises(DataError, match="encoded"):
            steps.extract_step(config.with_overrides({"name": "third"}))
    finally:
        manifest.write_bytes(right)


class Counted:
    """A store that knows its manifest only."""

    uri = "store"

    def __init__(self, **test_labels: int) -> None:
        by_task = {task: {"train": {"a": 9}} | ({"test": {"a": n}} if n else {}) for task, n in test_labels.items()}
        self.manifest = make_manifest({"by_split": {"train": 9, "test": 12}, "by_task": by_task})


def test_a_test_split_without_labels_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """An empty comparison with exit 0, after hours of training, as no test sample has a label."""
    with pytest.raises(DataError, match="none of the 12 samples in the test split has a label of 'colour'"):
        steps.check_test({"model": Counted(colour=0)})
    steps.check_test({"model": Counted(colour=3, shape=0)})
    assert "has a label of 'shape'" in caplog.text


@pytest.mark.parametrize(
    "lost", ["models/concat/metrics.json", "insight.json", "suspects.parquet", "report/index.html"]
)
def test_what_is_missing_is_made_again(finished: tuple[Config, str], lost: str) -> None:
    """A result file that was removed, or written over by something else,
    and stays so because its step was done before."""
    config, text = finished
    file = Path(steps.run_folder(config)) / lost
    right = file.read_bytes()
    file.write_bytes(b"{}") if file.suffix == ".json" else file.unlink()
    assert not steps.run_steps(config).startswith("nothing")
    assert len(file.read_bytes()) > 2
    assert abs(file.stat().st_size - len(right)) < 0.1 * len(right)
    assert steps.run_steps(config) == f"nothing was to be done: the run is finished\n\n{text}"


@pytest.mark.parametrize("command", ["run", "extract", "search"])
def test_nothing_is_done_where_something_is_wrong(
    make_config: Callable[..., Config], shapes: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """A vocabulary that is fitted over the whole corpus before the second source's missing column is found."""
    source = make_config().model_dump(mode="json")["samples"]["sources"][0]
    wrong = source | {"path": "other/*.parquet", "columns": {"image": "picture", "colour": "colour"}}
    write_shard(shapes / "data" / "other" / "0.parquet", 200, 4)
    path = shapes / "c.yaml"
    path.write_text(yaml.safe_dump(make_config(samples__sources=[source, wrong]).model_dump(mode="json")))
    assert main([command, str(path)]) == 2
    told = capsys.readouterr().err
    assert "nothing was done yet" in told
    assert "samples.sources[1]" in told
    assert not list((shapes / "runs").rglob("encoder.json"))


@pytest.mark.usefixtures("ray_local")
def test_an_error_in_a_ray_task_is_one_sentence(
    make_config: Callable[..., Config], shapes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A traceback of 150 lines, or Ray's advice on `max_map_retries`, for a column that a later shard lacks."""
    shard = shapes / "data" / "shapes" / "9.parquet"
    write_shard(shard, 200, 4)
    pq.write_table(pq.read_table(shard).drop_columns("image"), shard)
    whole = make_config().model_dump(mode="json")
    fits_nothing = json.loads(json.dumps(whole))  # so that the pass that encodes is the first to meet it
    del fits_nothing["modalities"]["text"], fits_nothing["samples"]["sources"][0]["columns"]["text"]
    path = shapes / "c.yaml"
    for config in (fits_nothing, whole):
        path.write_text(yaml.safe_dump(config))
        assert main(["extract", str(path)]) == 2
        told = capfd.readouterr().err
        assert "mmkt: samples.sources[0].columns: 'shapes/9.parquet' has no column 'image'" in told
        assert "Traceback" not in told
        assert "max_map_retries" not in told


def test_what_nobody_foresaw_is_one_sentence_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback instead of an error's own words, or one that is lost."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        try:
            raise OSError(
                "no room\nFailed to apply UDF transform after 1/1 attempts (0.0s).\nTo change `max_map_retries`"
            )
        except OSError as error:
            raise RuntimeError("somewhere in Ray") from error
    except RuntimeError as error:
        text = tell_unexpected(error)
    (file,) = tmp_path.iterdir()
    assert text == f"unexpected OSError: no room; the traceback is in {file}"
    assert "somewhere in Ray" in file.read_text()


@pytest.mark.parametrize("variant", ["concat", "image_only"])
def test_predictions_are_those_of_evaluation(finished: tuple[Config, str], tmp_path: Path, variant: str) -> None:
    """The same raw shards through the model folder alone give other probabilities than evaluation's."""
    config, _ = finished
    model = Path(steps.run_folder(config)) / "models" / variant
    path = predict(str(model), [f"{config.data_root}/shapes/*.parquet"], str(tmp_path))
    predicted = pd.read_parquet(path).set_index("sample_id")
    evaluated = pd.read_parquet(model / "predictions-test.parquet").set_index("sample_id")
    assert len(predicted) == 120
    assert len(evaluated) > 10
    ours = np.stack(predicted.loc[evaluated.index, "colour_proba"])
    assert np.abs(ours - np.stack(evaluated["colour_proba"])).max() < 1e-5
    assert (predicted.loc[evaluated.index, "colour_pred"] == evaluated["colour_pred"]).all()
    assert (predicted.loc[evaluated.index, "colour_label"] == evaluated["colour_label"]).all()
    assert storage.read_json(str(model / "metrics.json"))["tasks"]["colour"]["accuracy"] == pytest.approx(
        (predicted["colour_label"] == predicted["colour_pred"])[evaluated.index].mean()
    )


def test_a_labelled_file_is_scored(
    finished: tuple[Config, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels of new files that are read by another name, scored beside another row, or not told in the terminal."""
    config, _ = finished
    model, out = Path(steps.run_folder(config)) / "models" / "concat", tmp_path / "out"
    new = tmp_path / "new.parquet"
    write_shard(new, 0, 12)
    rows = pq.read_table(new)
    renamed = rows.rename_columns(["hue" if name == "colour" else name for name in rows.column_names])
    pq.write_table(renamed, new)
    columns = [
        x for o, t in config.samples.sources[0].columns.items() for x in ("--column", f"{o}={t}") if o != "colour"
    ]
    command = ["evaluate", "--model", str(model), "--data", str(new), "--out", str(out), *columns]
    assert main(command) == 2
    assert "no row of" in capsys.readouterr().err
    assert main([*command, "--column", "colour=hue"]) == 0
    told = capsys.readouterr().out
    joined = pd.read_parquet(out / "predictions.parquet").set_index("sample_id")
    raw = renamed.to_pandas().set_index(config.samples.sources[0].columns["sample_id"])
    assert (joined["colour_label"] == raw.loc[joined.index, "hue"]).all()
    accuracy = (joined["colour_label"] == joined["colour_pred"]).mean()
    assert storage.read_json(str(out / "metrics.json"))["tasks"]["colour"]["accuracy"] == pytest.approx(accuracy)
    assert f"accuracy {100 * accuracy:.1f} [" in told
    assert "precision  recall" in told


def test_predict_with_missing_modalities_and_no_labels(finished: tuple[Config, str], tmp_path: Path) -> None:
    """New rows without labels refused, or rows that lack a modality dropped instead of flagged."""
    new, out = tmp_path / "new" / "0.parquet", tmp_path / "out"
    images = [png("red", 900), None, b"broken", png("blue", 901), b"broken", b"broken", b"broken"]
    captions = ["a red square", "a green square", "a green square", None, *["a green square"] * 3]
    ids = [f"n{i}" for i in range(7)]
    write_shard(new, 0, 7, id=ids, image=pa.array(images, pa.binary()), caption=pa.array(captions))
    model = Path(steps.run_folder(finished[0])) / "models" / "concat"
    with pytest.raises(Exception, match="0 of 7 rows were rejected and 4 lost a modality"):
        predict(str(model), [str(new)], str(out), NewShards(max_reject_frac=0.5))
    path = predict(str(model), [str(new)], str(out), NewShards(max_reject_frac=0.6))
    rows = pd.read_parquet(path).set_index("sample_id")
    assert sorted(rows.index) == ids
    assert rows.loc["n0", "colour_pred"] == "red"
    assert list(rows.loc["n1", "missing"]) == list(rows.loc["n2", "missing"]) == ["image"]
    assert list(rows.loc["n3", "missing"]) == ["text"]
    assert np.allclose([p.sum() for p in rows["colour_proba"]], 1, atol=1e-5)
    rejects = pd.read_parquet(out / "rejects.parquet")
    assert (rejects["sample_id"].tolist(), rejects["stage"].tolist()) == (["n2", "n4", "n5", "n6"], ["modality"] * 4)


def test_user_errors_are_sentences_with_status_2(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback for a misspelt key, or a status that a scheduler takes for success."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    assert main(["extract", str(path), "--set", "trainin.epochs=1"]) == 2
    assert "did you mean 'training'" in capsys.readouterr().err
    assert main(["extract", str(path), "--set", "samples.sources.0.path=nowhere/*.parquet"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["predict", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "no finished model folder" in capsys.readouterr().err


def test_help_lists_every_command_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    """A command or a key that only the source tells of."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("run", "extract", "train", "evaluate", "predict", "report", "fetch", "config"))
    assert main(["config"]) == 0
    assert "modalities.<name>.encoder(cnn).epochs" in capsys.readouterr().out


def test_help_is_quick() -> None:
    """`mmkt --help` loading torch and Ray."""
    command = [
        sys.executable,
        "-c",
        "import sys, mmkt_ray.cli as c; c.build_parser(); print('torch' in sys.modules, 'ray' in sys.modules)",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == ["False", "False"]

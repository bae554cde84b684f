"""Shards -> store: complete, resumable, exact, and honest about what it left out."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray.config import Config
from mmkt_ray.errors import DataError
from mmkt_ray.features.extract import extract
from mmkt_ray.features.fit import fit_encoder
from mmkt_ray.features.resume import stored_chunks
from mmkt_ray.features.store import Store, column_of, open_store
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.shapes import png, write_shard

pytestmark = pytest.mark.usefixtures("ray_local")

MakeConfig = Callable[..., Config]
COLUMNS = {"text": "caption", "image": "file", "colour": "colour"}
# An extraction in a process and a Ray of its own.
DRIVER = """
import json, pathlib, sys
from mmkt_ray.config import parse_config
from mmkt_ray.features.extract import extract
extract(parse_config(json.loads(pathlib.Path(sys.argv[1]).read_text())), sys.argv[2])
"""


def run(config: Config) -> Store:
    return extract(config, f"{config.run_root}/{config.name}")


def contents(store: Store) -> pa.Table:
    """All rows, sorted by id."""
    return pa.concat_tables(store.read()).sort_by("sample_id")


def mtimes(store: Store) -> dict[str, int]:
    return {part: os.stat(part).st_mtime_ns for part in store.parts()}


def test_chunks_in_flight_give_the_same_store(
    extracted: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an actor that Ray gives two chunks at once, as on a GPU, and that mixes them up or waits for itself."""
    monkeypatch.setattr("mmkt_ray.features.extract.chunks_in_flight", lambda _: 2)
    several = {"extract__num_actors": 1, "extract__chunk_rows": 8}
    assert contents(run(make_config(name="in_flight", **several))).equals(contents(run(make_config())))


def test_every_row_arrives_and_any_reader_opens_it(extracted: Path, make_config: MakeConfig) -> None:
    """Rows lost between stages; a store that only Ray can read."""
    store = run(make_config())
    counts = store.manifest.counts
    assert counts.rows == 120
    assert sum(counts.by_split.values()) == 120
    assert store.manifest.tasks["colour"].classes == ["blue", "green", "red"]
    table = contents(store)
    assert table.column("sample_id").to_pylist() == sorted(f"s{i}" for i in range(120))
    folder = f"{store.uri}/data"
    assert len(pd.read_parquet(folder)) == 120
    assert duckdb.sql(f"select count(*), avg(len(image_features)) from '{folder}/*.parquet'").fetchall() == [(120, 832)]
    assert pl.read_parquet(f"{folder}/*.parquet").schema["image_features"] == pl.Array(pl.Float32, 832)
    assert {str(pq.read_schema(p)) for p in store.parts()} == {str(pq.read_schema(store.parts()[0]))}


def test_second_run_does_nothing(extracted: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    """A rerun that appends, rewrites or encodes again."""
    before = run(make_config())
    times = mtimes(before)
    caplog.set_level("INFO", logger="mmkt_ray")
    after = run(make_config())
    assert "features are up to date" in caplog.text
    assert "encoding" not in caplog.text
    assert (after.manifest, mtimes(after)) == (before.manifest, times)


def test_resume_after_losing_parts_gives_the_same_bits(extracted: Path, make_config: MakeConfig) -> None:
    """Values that depend on how far the killed run got."""
    store = run(make_config())
    whole, kept = contents(store), store.parts()[1:]
    times = {p: os.stat(p).st_mtime_ns for p in kept}
    os.remove(f"{store.uri}/manifest.json")
    os.remove(store.parts()[0])
    with pytest.raises(DataError, match="no finished feature store"):
        open_store(store.uri)
    again = run(make_config())
    assert contents(again).equals(whole)
    assert {p: os.stat(p).st_mtime_ns for p in kept} == times


def test_new_shard_costs_only_its_own_work(extracted: Path, make_config: MakeConfig) -> None:
    """Adding a day's data encodes everything again, or fits another vocabulary under the old name."""
    before = run(make_config())
    times = mtimes(before)
    write_shard(extracted / "data" / "shapes" / "9.parquet", 120, 40)
    after = run(make_config())
    assert after.manifest.counts.rows == 160
    assert {p: t for p, t in mtimes(after).items() if p in times} == times
    assert after.manifest.modalities["text"] == before.manifest.modalities["text"]


def test_changed_shard_replaces_its_parts(extracted: Path, make_config: MakeConfig) -> None:
    """Stale rows of an older version of a shard beside the new ones."""
    run(make_config())
    shard = extracted / "data" / "shapes" / "2.parquet"
    before = shard.stat().st_mtime_ns
    write_shard(shard, 80, 10)
    os.utime(shard, ns=(before + 10**9, before + 10**9))  # later by more than any file system rounds
    store = run(make_config())
    assert store.manifest.counts.rows == 90
    assert len(pd.read_parquet(f"{store.uri}/data")) == 90


def test_another_image_encoder_leaves_text_alone(extracted: Path, make_config: MakeConfig) -> None:
    """One changed encoder paying for all modalities."""
    before = run(make_config())
    after = run(make_config(modalities__image__encoder__image_size=24))
    assert after.uri != before.uri
    assert "encode image" in after.manifest.stages
    assert "encode text" not in after.manifest.stages
    text = column_of("text")
    assert contents(after).column(text).equals(contents(before).column(text))
    assert not contents(after).column(column_of("image")).equals(contents(before).column(column_of("image")))


def test_bad_rows_are_rejected_with_reasons_and_nothing_else_is_lost(shapes: Path, make_config: MakeConfig) -> None:
    """A corrupt image that kills the job, drops its whole block, or is silently replaced."""
    images = [png("red", i) for i in range(10)]
    images[3], images[5], images[7] = images[3][:60], b"no image", None
    captions = [f"row {i}" for i in range(10)]
    captions[7] = None
    columns = {
        "image": pa.array(images, pa.binary()),
        "caption": pa.array(captions),
        "id": [f"bad{i}" for i in range(9)] + ["s0"],
    }
    write_shard(shapes / "data" / "shapes" / "bad.parquet", 0, 10, **columns)
    store = run(make_config(samples__max_reject_frac=0.1))
    rejects = pd.read_parquet(f"{store.uri}/rejects.parquet").set_index("sample_id")
    assert sorted(rejects.index) == ["bad3", "bad5", "bad7", "s0"]
    assert rejects.loc["bad7", "stage"] == "read"
    assert "no modality" in rejects.loc["bad7", "reason"]
    assert rejects.loc["bad5", "stage"] == "modality"  # its text is kept
    assert rejects.loc["bad5", "reason"].startswith("image: ")
    assert rejects.loc["bad5", "source"] == "shapes/bad.parquet"
    assert "duplicate" in rejects.loc["s0", "reason"]
    counts = store.manifest.counts
    assert (counts.rows, counts.rejects, counts.unreadable_modalities) == (128, 2, 2)
    rows = pd.read_parquet(f"{store.uri}/data").set_index("sample_id")
    assert len(rows) == 128
    assert rows.loc["bad5", "image_features"] is None


def test_unreadable_files_and_texts_cost_their_modality(shapes: Path, make_config: MakeConfig) -> None:
    """Catches rows lost to an image file that is gone or to a byte in their text; and counts that do not add up."""
    (shapes / "data" / "shapes" / "there.png").write_bytes(png("red", 1))
    paths = ["there.png", "gone.png", "there.png", "gone.png", "gone.png"]
    columns = {
        "image": pa.array([{"bytes": None, "path": path} for path in paths]),
        "caption": pa.array([b"fine", b"fine", b"ab\xe9", b"ab\xe9", None]),
    }
    write_shard(shapes / "data" / "shapes" / "odd.parquet", 200, 5, **columns)
    store = run(make_config(samples__max_reject_frac=0.1))
    counts = store.manifest.counts
    assert (counts.rows, counts.rejects, counts.unreadable_modalities) == (123, 2, 2)
    rejects = pd.read_parquet(f"{store.uri}/rejects.parquet").set_index("sample_id")
    assert rejects["stage"].to_dict() == {"s201": "modality", "s202": "modality", "s203": "read", "s204": "read"}
    assert rejects.loc["s201", "reason"].startswith("image: no file 'gone.png'")
    assert rejects.loc["s202", "reason"].startswith("text: not utf-8: byte 0xe9")
    assert "image: no file" in rejects.loc["s203", "reason"]
    assert "text: not utf-8" in rejects.loc["s203", "reason"]
    rows = pd.read_parquet(f"{store.uri}/data").set_index("sample_id")
    assert rows.loc[["s200", "s201", "s202"], "image_features"].notna().tolist() == [True, False, True]
    assert rows.loc[["s200", "s201", "s202"], "text_features"].notna().tolist() == [True, True, False]


def test_reject_budget_stops_the_job(shapes: Path, make_config: MakeConfig) -> None:
    """Half the data gone and a store published all the same; or the raised budget paying for everything again."""
    columns = {"image": pa.array([b"broken"] * 40, pa.binary())}
    write_shard(shapes / "data" / "shapes" / "bad.parquet", 200, 40, **columns)
    told = r"0 of 160 rows were rejected and 40 lost a modality.*: 40 x image: not a read.*\(first: s200 in shapes/bad"
    with pytest.raises(DataError, match=told):
        run(make_config())
    counts = run(make_config(samples__max_reject_frac=0.5)).manifest.counts
    assert (counts.rows, counts.rejects, counts.unreadable_modalities) == (160, 0, 40)


def test_reject_budget_says_why_while_it_runs(
    shapes: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that stops after hours and leaves it to its user to find out what was wrong with the rows."""
    monkeypatch.setattr("mmkt_ray.features.run_stats.BUDGET_GRACE_ROWS", 1)
    columns = {"sample_id": "id", "image": "image", "text": "text", "colour": "colour"}
    rows = [{"id": f"t{i}", "image": f"gone-{i}.png", "text": "a red dot", "colour": "red"} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), shapes / "data" / "lost.parquet")
    source = {"reader": "manifest", "path": "lost.parquet", "columns": columns}
    with pytest.raises(
        DataError, match=r"40 lost a modality.*; the most frequent: 40 x image: no file 'gone-\d+\.png' in "
    ):
        run(make_config(samples__sources=[source]))


def test_missing_modalities_and_labels_are_nulls(shapes: Path, make_config: MakeConfig) -> None:
    """An absent image becoming a zero vector that looks like a feature."""
    columns = {
        "image": pa.nulls(40, pa.binary()),
        "colour": pa.nulls(40, pa.string()),
        "id": [f"t{i}" for i in range(40)],
    }
    write_shard(shapes / "data" / "shapes" / "text_only.parquet", 0, 40, **columns)
    store = run(make_config())
    table = store.table()
    text_only = np.char.startswith(table.sample_id.astype(str), "t")
    assert (table.present["image"] == ~text_only).all()
    assert table.present["text"].all()
    assert not table.labels["colour"].labelled[text_only].any()
    assert sum(store.manifest.counts.missing["image"].values()) == 40


def test_nothing_fitted_knows_the_test_split(shapes: Path, make_config: MakeConfig) -> None:
    """A vocabulary, a scale or a component that has seen test rows."""
    captions = [f"plantedterm a square {i}" for i in range(6)]
    columns = {"caption": captions, "image": pa.array([png("blue", i, 48) for i in range(6)], pa.binary())}
    write_shard(shapes / "data" / "planted" / "0.parquet", 500, 6, **columns)
    base = make_config().samples.sources[0].model_dump()
    sources = [base | {"split": "train"}, base | {"path": "planted/*.parquet", "split": "test"}]
    reduce_ = {"name": "standardize"}
    with_planted = run(make_config(samples__sources=sources, modalities__image__reduce=reduce_))
    without = run(make_config(samples__sources=sources[:1], modalities__image__reduce=reduce_, name="without"))
    folders = [with_planted.manifest.modalities[m].folders for m in ("text", "image")]
    vocabulary, scaler = (Path(make_config().run_root) / "shapes" / "encoders" / f[-1] for f in folders)
    assert b"plantedterm" not in (vocabulary / "state.safetensors").read_bytes()
    other = (
        Path(make_config().run_root) / "without" / "encoders" / without.manifest.modalities["image"].folders[-1]
    )
    assert (scaler / "state.safetensors").read_bytes() == (other / "state.safetensors").read_bytes()


def test_no_encoder_has_seen_the_rows_that_leak(shapes: Path, make_config: MakeConfig) -> None:
    """Catches a vocabulary that was fitted on the very rows that are left out, as they are in the test split too."""
    columns = {
        "caption": [f"plantedterm {i}" for i in range(6)],
        "image": pa.array([png("blue", i, 48) for i in range(6)], pa.binary()),
    }
    for k in range(2):
        write_shard(shapes / "data" / "planted" / f"{k}.parquet", 500 + 100 * k, 6, **columns)
    base = make_config().samples.sources[0].model_dump() | {"split": "train"}
    sources = [
        base,
        base | {"path": "planted/0.parquet"},
        base | {"path": "planted/1.parquet", "split": "test"},
    ]
    config = make_config(samples__sources=sources, samples__drop_leakage=True, samples__split__val_frac=0.0)
    store = run(config)
    assert (store.manifest.counts.rows, store.manifest.counts.rejects) == (126, 6)
    kept = Path(config.run_root) / "shapes" / "encoders" / store.manifest.modalities["text"].folders[0]
    assert b"plantedterm" not in (kept / "state.safetensors").read_bytes()
    seen = fit_encoder(config, str(shapes / "seen"), "text", list_shards(ReadingPlan.of(config)), {})
    assert b"plantedterm" in (Path(seen) / "state.safetensors").read_bytes()
    assert run(config).uri == store.uri


def test_reducers_make_a_store_of_their_own(extracted: Path, make_config: MakeConfig) -> None:
    """Reduced features that differ from the reducer applied to the whole matrix at once."""
    encoded = run(make_config())
    reduced = run(
        make_config(
            modalities__image__reduce={"name": "pca", "dim": 4}, modalities__text__reduce={"name": "svd", "dim": 3}
        )
    )
    assert (reduced.dim("image"), reduced.dim("text")) == (4, 3)
    raw, small = encoded.table(), reduced.table()
    order, small_order = np.argsort(raw.sample_id), np.argsort(small.sample_id)
    train = raw.features["image"][order][raw.split[order] == "train"]
    got = small.features["image"][small_order][small.split[small_order] == "train"]
    centred = train - train.mean(0)
    assert np.allclose((got**2).sum(), (np.linalg.svd(centred, compute_uv=False)[:4] ** 2).sum(), rtol=1e-3)


def test_an_empty_shard_and_a_shard_that_is_no_parquet(shapes: Path, make_config: MakeConfig) -> None:
    """One bad file among thousands ending the job, or an empty one being read again on every run."""
    write_shard(shapes / "data" / "shapes" / "empty.parquet", 0, 0)
    (shapes / "data" / "shapes" / "junk.parquet").write_bytes(b"PAR1 this is not parquet")
    with pytest.raises(
        DataError, match=r"40 of about 200 rows were rejected \(about 40 of them in damaged shards.*junk.parquet"
    ):
        run(make_config(samples__max_reject_frac=0.05))
    store = run(make_config(samples__max_reject_frac=0.25))
    assert (store.manifest.counts.rows, store.manifest.counts.rejects) == (120, 40)


def test_a_modality_or_task_that_is_null_everywhere_is_told(shapes: Path, make_config: MakeConfig) -> None:
    """A whole run on one modality only, because the other's column was mapped to the wrong one."""
    for k in range(3):
        columns = {"image": pa.nulls(40, pa.binary()), "colour": pa.nulls(40, pa.string())}
        write_shard(shapes / "data" / "shapes" / f"{k}.parquet", 40 * k, 40, **columns)
    with pytest.raises(DataError, match=r"modality 'image' and task 'colour': null in all 120 rows"):
        run(make_config())


def test_a_fit_without_rows_says_why(shapes: Path, make_config: MakeConfig) -> None:
    """Catches advice to lower fractions where no line is valid JSON,
    and silence about rows that are all of another split."""
    lines = ["{broken"] * 20
    for split, text, complaint in (
        ("train", lines, "no row could be read; the most frequent: 19 x not valid JSON"),
        ("test", ['{"caption": "t"}'] * 20, "which is 20 in test: check the sources' split"),
    ):
        (shapes / "data" / "a.jsonl").write_text("\n".join(text))
        source = {"reader": "manifest", "path": "a.jsonl", "columns": COLUMNS, "split": split}
        config = make_config(samples__sources=[source], samples__split__val_frac=0.0)
        with pytest.raises(DataError, match=f"no sample of the train split has text.*{complaint}"):
            fit_encoder(config, str(shapes / "run"), "text", list_shards(ReadingPlan.of(config)), {})


def test_missing_column_and_path_name_what_is_there(shapes: Path, make_config: MakeConfig) -> None:
    """A typo in a path or a column found out by an empty result."""
    with pytest.raises(DataError, match="shapes"):
        run(make_config(samples__sources__0__path="shaps/*.parquet"))
    with pytest.raises(Exception, match=r"caption"):
        run(make_config(samples__sources__0__columns__text="captoin"))


@pytest.mark.cluster
def test_kill_9_and_the_same_command_again(shapes: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    """Rows lost or doubled, or other values, after an encoder actor and later the driver died at some moment."""
    slow = tmp_path / "slow"  # what comes after the kills need not be
    slow.touch()
    options = {"delay_s": 0.15, "while_there": str(slow)}
    encoder = {"name": "slow_encoder:SlowLength", "options": options}
    config = make_config(modalities__text__encoder=encoder, extract__chunk_rows=4)
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "config.json"), f"{config.run_root}/shapes"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ["PYTHONPATH"]])
    quiet_log = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **quiet_log)
    data = next_store(Path(config.run_root) / "shapes" / "features", first)
    wait_until(lambda: num_parts(data) >= 3, first)
    os.kill(find_actor(first.pid), signal.SIGKILL)
    written = num_parts(data)
    wait_until(lambda: num_parts(data) >= written + 3, first)  # another actor goes on
    first.kill()
    first.wait(timeout=120)
    slow.unlink()
    done, _ = stored_chunks(str(data.parent))
    assert 0 < sum(map(len, done.values())) < 30
    store = run(config)
    assert store.uri == str(data.parent)
    quiet = run(config.model_copy(update={"name": "quiet"}))
    assert contents(store).equals(contents(quiet))
    assert store.manifest.fingerprint == quiet.manifest.fingerprint


def num_parts(data: Path) -> int:
    return len(list(data.glob("*.parquet")))


def next_store(features: Path, process: subprocess.Popen) -> Path:
    wait_until(lambda: list(features.glob("encoded-*/data")), process)
    return next(features.glob("encoded-*/data"))


def wait_until(condition: Callable[[], object], process: subprocess.Popen, timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < end, "the job did not get that far in time"
        time.sleep(0.02)


def find_actor(driver: int) -> int:
    """The process of the encoder actor among the driver's descendants."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    family = {driver}
    for _ in range(4):
        family |= {int(pid) for pid, parent, *_ in rows if int(parent) in family}
    return next(int(pid) for pid, _, args in rows if int(pid) in family and "EncodeChunk" in args)

"""Reading new shards for prediction: which columns they may lack, and what a row without a modality is told."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkt_ray.cli import main
from mmkt_ray.config import Config
from mmkt_ray.encoders.build import build_encoder, save_fitted
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.features.store import Store
from mmkt_ray.inference.model_folder import save_model
from mmkt_ray.inference.prediction import NewShards, predict, prediction_config, restrict, settle_columns, tell_absent
from mmkt_ray.models import MultimodalModel, build_spec
from mmkt_ray.samples.readers import read_chunks
from mmkt_ray.samples.reading_plan import ReadingPlan
from mmkt_ray.samples.shards import list_shards
from tests.evaluation.runs import make_config
from tests.manifests import make_manifest, make_training


def read_new(
    config: Config, path: Path, reader: str | None = None, columns: dict[str, str] | None = None
) -> tuple[list[dict], list]:
    """Rows and rejects of new shards, read as `mmkt predict` reads them."""
    found = settle_columns(prediction_config(config, [str(path)], 0, reader, columns or {}), columns or {})
    chunks = [c for shard in list_shards(ReadingPlan.of(found)) for c in read_chunks(ReadingPlan.of(found), shard)]
    rows = pa.concat_tables([c.table for c in chunks]).to_pylist()
    return [{m: r[m] for m in ("image", "text")} for r in rows], [r for c in chunks for r in c.rejects]


@pytest.fixture
def write_tar() -> Callable[..., None]:
    """write_tar(path, entries): entries are (name, content) pairs."""

    def write(path: Path, entries: list[tuple[str, bytes]]) -> None:
        with tarfile.open(path, "w") as tar:
            for name, content in entries:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    return write


@pytest.fixture
def config(tmp_path) -> Config:
    return make_config(tmp_path)


def test_a_shard_without_the_column_of_a_modality_is_read_without_it(config, tmp_path):
    """Catches a whole file refused because its rows have only a text,
    and a neighbour's image column dropped with it."""
    pq.write_table(pa.table({"id": ["a"], "caption": ["a red car"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"id": ["b"], "caption": ["x"], "image": [b"png"]}), tmp_path / "2.parquet")
    rows, rejects = read_new(config, tmp_path / "*.parquet")
    assert rows == [{"image": None, "text": "a red car"}, {"image": b"png", "text": "x"}]
    assert rejects == []


def test_a_shard_with_no_modality_at_all_is_refused(config, tmp_path):
    """Catches a misspelt mapping that gives rows of nothing, or no rows, without a word."""
    pq.write_table(pa.table({"id": ["a"], "captions": ["a red car"]}), tmp_path / "1.parquet")
    with pytest.raises(DataError, match="has no column"):
        read_new(config, tmp_path / "1.parquet")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_manifests_may_lack_a_modality_or_its_file(config, tmp_path, suffix):
    """Catches a text that is lost because the image beside it is not where the manifest says."""
    (tmp_path / "1.png").write_bytes(b"png")
    columns = {"id": ["a", "b"], "caption": ["x", "y"], "image": ["1.png", "gone.png"]}
    for name, chosen in (("whole", columns), ("texts", {k: v for k, v in columns.items() if k != "image"})):
        rows = [dict(zip(chosen, values, strict=True)) for values in zip(*chosen.values(), strict=True)]
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table(chosen), path)
        elif suffix == "csv":
            path.write_text("\n".join([",".join(chosen), *(",".join(r.values()) for r in rows)]) + "\n")
        else:
            path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    rows, rejects = read_new(config, tmp_path / f"whole.{suffix}", "manifest")
    assert rows == [{"image": b"png", "text": "x"}, {"image": None, "text": "y"}]
    assert [(r.sample_id, r.stage) for r in rejects] == [("b", "modality")]
    assert "no file 'gone.png'" in rejects[0].reason
    rows, rejects = read_new(config, tmp_path / f"texts.{suffix}", "manifest")
    assert (rows, rejects) == ([{"image": None, "text": "x"}, {"image": None, "text": "y"}], [])


def test_training_still_refuses_a_column_that_is_not_there(config, tmp_path):
    """Catches a typo in the config that trains on one modality only."""
    (tmp_path / "data").mkdir()
    columns = {"id": ["a"], "caption": ["x"], "thing": ["car"], "colour": ["red"]}
    pq.write_table(pa.table(columns), tmp_path / "data" / "0.parquet")
    with pytest.raises(DataError, match="no column 'image'"):
        list(read_chunks(ReadingPlan.of(config), list_shards(ReadingPlan.of(config))[0]))


# --- a model folder is data --------------------


def write_model(folder: Path, config: Config) -> Path:
    """A model folder with the encoders that the config names, as far as they are built here; of random weights."""
    entries = {}
    for m, section in config.modalities.items():
        if section.encoder.name in ("pixels", "tfidf"):
            encoder = build_encoder(section.encoder)
            if m == "text":
                encoder.finish(encoder.partial(["a red car", "a blue cat"]))
            card = save_fitted(encoder, section.encoder, str(folder / "encoders" / m))
            entries[m] = {"dim": card.dim, "fingerprint": card.fingerprint, "folders": [m]}
        else:
            entries[m] = {"dim": 2, "fingerprint": "x", "folders": [m]}
    sparse = {"image": False, "text": config.modalities["text"].encoder.name == "tfidf"}
    dims = {m: e["dim"] for m, e in entries.items()}
    spec = build_spec(config, dims, sparse, {"thing": 2, "colour": 2})
    manifest = make_manifest(modalities=entries, tasks={t: {"classes": ["a", "b"]} for t in ("thing", "colour")})
    save_model(str(folder), MultimodalModel(spec), config, manifest, make_training())
    return folder


def refuse(folder: Path, tmp_path: Path, match: str, **options) -> None:
    """`predict` refuses the folder before it has written a file."""
    with pytest.raises((ConfigError, DataError), match=match):
        predict(str(folder), [str(tmp_path / "new.parquet")], str(tmp_path / "out"), NewShards(**options))
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("encoder", "says"),
    [
        ({"name": "os:system", "options": {"command": "touch ran"}}, r"os:system.*--trust-code"),
        ({"name": "huggingface", "folder": "/etc"}, r"'/etc'.*--set modalities\.text\.encoder\.folder"),
    ],
)
def test_a_card_runs_no_code_and_reads_no_files(tmp_path, monkeypatch, encoder, says):
    """A model from somebody else that runs a command, or reads what lies elsewhere, as the user who predicts."""
    monkeypatch.chdir(tmp_path)
    folder = write_model(tmp_path / "model", make_config(tmp_path, modalities__text__encoder=encoder))
    refuse(folder, tmp_path, says)
    assert not (tmp_path / "ran").exists()
    assert main(["predict", str(folder), "new.parquet", "--out", "out"]) == 2
    assert not (tmp_path / "ran").exists()


def test_trusted_code_is_imported(tmp_path, monkeypatch):
    """A user's own encoder that no flag lets through: the next refusal is that its fitted state is not there."""
    monkeypatch.chdir(tmp_path)
    encoder = {"name": "odd_encoder:Odd", "options": {"gives": "nan"}}
    folder = write_model(tmp_path / "model", make_config(tmp_path, modalities__text__encoder=encoder))
    refuse(folder, tmp_path, "no fitted encoder in .*model/encoders/text", trust_code=True)


def test_a_card_raises_no_limit(tmp_path, caplog):
    """An image of 10^13 pixels, a file outside of the shard's folder, an address of the local network,
    read as the card says."""
    limits = {"samples.max_image_pixels": 10**13, "samples.decode_timeout_s": 80_000, "extract.chunk_rows": 10**9}
    card = make_config(tmp_path).with_overrides(
        limits | {"samples.sources.0.allow_outside": True, "extract.chunk_bytes": 5}
    )
    config = restrict(card, {})
    assert (config.samples.max_image_pixels, config.samples.decode_timeout_s) == (64_000_000, 30)
    assert (config.extract.chunk_rows, config.extract.chunk_bytes) == (1024, 5)  # less is granted
    assert not config.samples.sources[0].allow_outside
    assert "samples.max_image_pixels is 64000000 here" in caplog.text
    network = {"reader": "manifest", "allow_http": True, "allow_private_addresses": True, "http.max_bytes": 10**12}
    opened = card.with_overrides({f"samples.sources.0.{key}": value for key, value in network.items()})
    source = restrict(opened, {}).samples.sources[0]
    assert (source.allow_http, source.allow_private_addresses, source.http.max_bytes) == (False, False, 20_000_000)
    own = restrict(card, {"samples.max_image_pixels": 10**10, "samples.sources.0.allow_outside": True})
    assert (own.samples.max_image_pixels, own.samples.sources[0].allow_outside) == (10**10, True)


def test_encoders_lie_in_the_folder_and_are_those_of_the_model(tmp_path):
    """A link that leads out of the folder; an encoder of another model,
    whose features fit and mean something else."""
    config = make_config(tmp_path)
    folder = write_model(tmp_path / "model", config)
    text = folder / "encoders" / "text"
    text.rename(tmp_path / "text")
    text.symlink_to(tmp_path / "text")
    refuse(folder, tmp_path, "is a link out of the model's folder")
    text.unlink()
    other = build_encoder(config.modalities["text"].encoder)
    other.finish(other.partial(["a fast bird", "a slow fish"]))
    save_fitted(other, config.modalities["text"].encoder, str(text))
    refuse(folder, tmp_path, "not the one that the model was trained with")
def test_what_a_model_has_learnt_is_not_set(tmp_path):
    """Catches `predict --set model.fusion=gated` that changes nothing and says nothing."""
    with pytest.raises(ConfigError, match=r"--set model\.fusion: a trained model has this in its weights"):
        restrict(make_config(tmp_path), {"model.fusion": "gated"})


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_new_rows_need_nothing_but_a_modality(config, tmp_path, suffix):
    """Catches a file to be predicted that is refused as it has no split, no label and no id, as new files do."""
    source = config.samples.sources[0]
    with_split = source.model_copy(update={"columns": source.columns | {"split": "fold", "key": "k"}})
    config = config.model_copy(update={"samples": config.samples.model_copy(update={"sources": (with_split,)})})
    frame = pd.DataFrame({"caption": ["a red car", "a cat"]})
    writers = {"csv": lambda p: frame.to_csv(p, index=False), "parquet": frame.to_parquet}
    writers["jsonl"] = lambda p: frame.to_json(p, orient="records", lines=True)
    writers[suffix](tmp_path / f"a.{suffix}")
    rows, rejects = read_new(config, tmp_path / f"a.{suffix}", "manifest")
    assert ([row["text"] for row in rows], rejects) == (["a red car", "a cat"], [])


def test_new_members_of_a_tar_need_no_id(config, tmp_path, write_tar):
    """Catches samples rejected one by one, as the json member with their ids is not there."""
    columns = {"text": "txt", "image": "png", "sample_id": "json.id", "thing": "cls"}
    source = config.samples.sources[0].model_copy(update={"reader": "webdataset", "columns": columns})
    config = config.model_copy(update={"samples": config.samples.model_copy(update={"sources": (source,)})})
    write_tar(tmp_path / "a.tar", [("1.txt", b"a car"), ("2.txt", b"a cat")])
    assert [row["text"] for row in read_new(config, tmp_path / "a.tar")[0]] == ["a car", "a cat"]
    write_tar(tmp_path / "a.tar", [("1.txt", b"a car"), ("1.json", b'{"id": 7}')])
    found = settle_columns(prediction_config(config, [str(tmp_path / "a.tar")], 0, None, {}), {})
    assert "sample_id" in found.samples.sources[0].columns


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_named_column_that_is_nowhere_is_an_error(config, tmp_path, suffix):
    """Catches predictions from half of the modalities, as a --column is misspelt."""
    frame = pd.DataFrame({"caption": ["a"], "photo": ["1.png"]})
    writers = {"csv": lambda p: frame.to_csv(p, index=False), "parquet": frame.to_parquet}
    writers[suffix](tmp_path / f"a.{suffix}")
    for named in ({"image": "phot"}, {"sample_id": "phot"}):
        with pytest.raises(DataError, match=r"=phot: '.*a.* has no 'phot'; did you mean 'photo'\?"):
            read_new(config, tmp_path / f"a.{suffix}", "manifest", {"text": "caption", **named})


def test_what_most_rows_lack_is_told(config, tmp_path, caplog, write_tar):
    """Catches a modality that is dropped without a word, and one that a suffix names and no member has."""
    write_tar(tmp_path / "a.tar", [("1.txt", b"a car"), ("1.PNG", b"png")])
    def store_without(images: int, texts: int) -> Store:
        return Store(
            str(tmp_path), make_manifest({"rows": 3, "missing": {"image": {"test": images}, "text": {"test": texts}}})
        )

    store, columns = store_without(2, 1), {"text": "txt", "image": "png"}
    new = prediction_config(config, [str(tmp_path / "a.tar")], 0, "webdataset", columns)
    assert tell_absent(new, store, columns) == "; image is absent in 2 of 3 rows"
    assert "image is absent in 2 of 3 rows" in caplog.text
    store = store_without(3, 0)
    assert "3 of 3" in tell_absent(new, store, {})
    assert "3 of 3" in tell_absent(new, store, columns)  # the suffix is there, though its members cannot be read
    columns = {"text": "txt", "image": "jpg"}
    new = prediction_config(config, [str(tmp_path / "a.tar")], 0, "webdataset", columns)
    with pytest.raises(DataError, match=r"--column image=jpg: '.*a.tar' has no 'jpg'"):
        tell_absent(new, store, columns)

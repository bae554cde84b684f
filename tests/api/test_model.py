"""A model in a Python process: the same answers as `mmkt predict`, from cells of any kind, without Ray."""

import io
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import mmkt_ray as mm
from mmkt_ray.api.model import Model, load
from mmkt_ray.cli import main
from mmkt_ray.errors import ConfigError, DataError
from mmkt_ray.features.encode import FEW_ROWS, FIRST_CALLS
from tests.inference.fuzz_models import IMAGES, SEEDS, TEXTS, answer, make_config, write_folder

ROWS = [i for i, text in enumerate(TEXTS) if text != ""]  # a blank text is none, which `answer` does not know


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts and three tasks: multiclass, binary, multilabel."""
    found = tmp_path_factory.mktemp("models") / "experts"
    write_folder(found, make_config(found.parent), "experts")
    return found


@pytest.fixture
def model(folder: Path) -> Model:
    return load(str(folder))


@pytest.mark.parametrize("kind", SEEDS)
def test_every_kind_of_model_answers_as_its_parts_do(tmp_path: Path, kind: str) -> None:
    """Catches a reducer, a temperature, an expert or a mask that is left out, and rows in another order."""
    write_folder(tmp_path / "model", make_config(tmp_path, **SEEDS[kind]), kind)
    expected, names = answer(tmp_path / "model")
    model = load(str(tmp_path / "model"))
    rows = [{"image": IMAGES[i], "text": TEXTS[i]} for i in ROWS]
    for task, values in expected.items():
        found = model.predict_proba(rows, task)
        assert list(found.columns) == names[task]
        np.testing.assert_allclose(found, values[ROWS], atol=1e-6, rtol=0)


def test_one_row_costs_a_pass_of_one_row(tmp_path: Path) -> None:
    """Catches a network that works on a whole padded pass for a single row (1.8 s in place of 20 ms), or on single
    rows where they are many; and answers that hang on it by more than 1e-6."""
    write_folder(tmp_path / "model", make_config(tmp_path, **SEEDS["cnn"]), "cnn")
    model = load(str(tmp_path / "model"))
    network = model.encoder.encoders["image"]
    rows = [{"image": IMAGES[i], "text": TEXTS[i]} for i in ROWS]
    many = [rows[i % len(rows)] for i in range(FEW_ROWS + 1)]
    for task in model.tasks:
        together = model.predict_proba(many, task).to_numpy()
        assert network.encode_batch_size > FEW_ROWS
        alone = np.vstack([model.predict_proba([row], task) for row in rows])
        assert network.encode_batch_size == 1
        np.testing.assert_allclose(alone, together[: len(rows)], atol=1e-6, rtol=0)


def test_few_rows_are_answered_in_one_thread_while_that_is_quick(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a thread that is woken for each small operation (22 ms a row in place of 10), a large network that
    stays on one core, and a caller whose threads are not given back."""
    own, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    monkeypatch.setattr(model.encoder, "_row_s", [])
    try:
        for pause_s, num_rows in ((0.2, 1), (0.0, 1), (0.0, 17), (0.0, 1)):  # the first one warms up
            with model.encoder.answering(num_rows):
                seen.append(torch.get_num_threads())
                time.sleep(pause_s)
        assert seen == [1, 1, 3, 1]
        model.encoder._row_s[:] = [0.2] * FIRST_CALLS
        with model.encoder.answering(1):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(own)


def test_the_same_as_the_command(ray_local: None, folder: Path, model: Model, tmp_path: Path) -> None:
    """Catches a Python way that reads, cleans, decodes or encodes otherwise than `mmkt predict`."""
    jpeg = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(jpeg, "jpeg", quality=90)
    images = [jpeg.getvalue(), png(IMAGES[1]), b"no image", None, None, png(IMAGES[4])]
    texts = ["A red\r\ncar\x00 e\u0301migre\u0301", None, "the blue cat", "  ", None, "x"]
    table = pa.table({"image": pa.array(images, pa.binary()), "text": texts})
    pq.write_table(table, tmp_path / "new.parquet")
    words = ["--out", str(tmp_path / "out"), "--max-reject-frac", "1", "--set", "extract.num_actors=1"]
    assert main(["predict", str(folder), str(tmp_path / "new.parquet"), *words]) == 0
    told = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pandas()
    rows = told["sample_id"].str.rpartition("#")[2].astype(int).tolist()
    assert sorted(rows) == [0, 1, 2, 5]  # those without any modality are rejects there
    for given in (table, table.to_pandas(), table.to_pylist()):
        found = model.predict_arrow(given).to_pandas()
        assert found["missing"].map(list).tolist() == [
            [], ["text"], ["image"], ["image", "text"], ["image", "text"], []
        ]
        for task in model.tasks:
            assert found[f"{task}_pred"].iloc[rows].map(str).tolist() == told[f"{task}_pred"].map(str).tolist()
            np.testing.assert_allclose(
                np.stack(found[f"{task}_proba"].iloc[rows]), np.stack(told[f"{task}_proba"]), atol=1e-6, rtol=0
            )
        assert found[["thing_pred", "tags_pred"]].iloc[[3, 4]].isna().all(axis=None)
        assert "not a readable" in found["unreadable"][2]
        assert found["unreadable"].drop(2).isna().tolist() == [True, True, False, False, True]


def test_images_of_every_form_are_one_image(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a form of image that is decoded otherwise: colours swapped, transparency or orientation lost."""
    pixels = IMAGES[1]
    (tmp_path / "a.png").write_bytes(png(pixels))
    monkeypatch.chdir(tmp_path)
    clear = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    turned.getexif()[0x0112] = 6  # to be turned by a quarter
    forms = [
        *("a.png", tmp_path / "a.png", str(tmp_path / "a.png"), png(pixels), bytearray(png(pixels)), pixels),
        *(clear, Image.fromarray(pixels), Image.fromarray(clear), turned, {"bytes": png(pixels), "path": None}),
        {"bytes": None, "path": "a.png"},
    ]

    def answers(images: list) -> np.ndarray:
        return model.predict_proba([{"image": image, "text": None} for image in images], "thing").to_numpy()

    found = answers(forms)
    assert np.ptp(found, axis=0).max() < 1e-6
    assert np.abs(answers([IMAGES[2]]) - found[:1]).max() > 1e-3
    grey = pixels[:, :, 0]
    deep = grey.astype(np.uint16) * 257
    greys = [
        grey,
        pixels[:, :, :1],
        Image.fromarray(grey),
        Image.fromarray(grey).convert("F"),
        deep,
        Image.fromarray(deep),
    ]
    assert np.ptp(answers(greys), axis=0).max() < 1e-6


@pytest.mark.parametrize("absent", [None, float("nan"), pd.NA, pd.NaT, "", "nan"])
def test_what_is_missing_is_absent(model: Model, absent: object) -> None:
    """Catches NaN taken for a path or a text, as pandas writes a missing value of any kind."""
    found = model.predict(pd.DataFrame({"image": [absent], "text": ["a red car"]}))
    assert (found["missing"][0].tolist(), found["unreadable"].isna().all()) == (["image"], True)
    if absent is pd.NA or absent != "nan":  # a word like any other
        found = model.predict(pd.DataFrame({"image": [IMAGES[0]], "text": [absent]}))
        assert found["missing"][0].tolist() == ["text"]


def test_a_hugging_face_struct_of_nothing_is_absent(model: Model) -> None:
    """Catches a row without an image that is told as unreadable."""
    found = model.predict([{"image": {"bytes": None, "path": None}, "text": "a red car"}])
    assert (found["missing"][0].tolist(), found["unreadable"].isna().all()) == (["image"], True)


@pytest.mark.parametrize(
    "text", [np.array(["a", "cat"]), pd.Series(["a"]), pd.DataFrame({"a": [1]}), {"a": 1}, frozenset("a")]
)
def test_what_is_no_text_is_told_beside_its_row(model: Model, text: object) -> None:
    """Catches the printed form of an array or a Series taken for a text."""
    found = model.predict(pd.DataFrame({"image": [IMAGES[0]], "text": pd.Series([text], dtype=object)}))
    assert pd.Series([found["unreadable"][0]]).str.contains("must be a single value, got a").all()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((4, 4, 3)), "uint8"),
        (np.zeros((3, 5, 6), np.uint8), r"\(height, width, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "got"),
        ("gone.png", "no file 'gone.png'"),
        (3, "must be a path, bytes, a PIL image or an array, got int 3"),
    ],
)
def test_what_is_no_image_is_told_beside_its_row(model: Model, image: object, says: str) -> None:
    """Catches one bad cell that costs the whole frame, or that is dropped without a word."""
    found = model.predict([{"image": image, "text": "a red car"}, {"image": IMAGES[0], "text": "a cat"}])
    assert pd.Series([found["unreadable"][0]]).str.contains(says).all()
    assert found["missing"].map(list).tolist() == [["image"], []]
    assert found["thing_pred"].notna().all()


def test_frames_keep_their_index_and_probabilities_their_classes(model: Model) -> None:
    """Catches answers that line up with other rows after a filter, and columns of another class."""
    frame = pd.DataFrame({"text": ["a red car", "the blue cat", None]}, index=[7, 3, 9])
    with pytest.warns(UserWarning, match="no column for 'image'"):
        found = model.predict(frame, proba=True)
    assert found.index.tolist() == [7, 3, 9]
    columns = [f"thing_proba_{name}" for name in model.classes["thing"]]
    assert (
        found[columns].iloc[:2].idxmax(axis=1).str.removeprefix("thing_proba_").tolist()
        == found["thing_pred"].tolist()[:2]
    )
    assert found[columns].iloc[2].isna().all()
    tags = [f"tags_proba_{name}" for name in model.classes["tags"]]
    names = np.array(model.classes["tags"])
    picked = [names[row >= 0.5].tolist() for row in found[tags].to_numpy()[:2]]
    assert found["tags_pred"].map(list, na_action="ignore").tolist()[:2] == picked
    nothing = model.predict(frame.iloc[:0].assign(image=None), proba=True)
    assert (len(nothing), list(nothing.columns)) == (0, list(found.columns))


def test_columns_are_found_by_name(model: Model) -> None:
    """Catches a frame that is refused, or half of it ignored,
    as its columns are called as in training or otherwise."""
    row = {"photo": IMAGES[0], "caption": "a red car"}
    whole = model.predict_proba([{"image": IMAGES[0], "text": "a red car"}], "thing")
    found = model.predict_proba([row], "thing", columns={"image": "photo", "text": "caption"})
    pd.testing.assert_frame_equal(found, whole)
    with pytest.raises(DataError, match=r"no column 'foto' for 'image': did you mean 'photo'\?"):
        model.predict([row], columns={"image": "foto"})
    with pytest.raises(ConfigError, match=r"no modality 'imgae': did you mean 'image'\?"):
        model.predict([row], columns={"imgae": "photo"})
    with pytest.raises(DataError, match="no column for 'image', 'text'"):
        model.predict([row])
    with pytest.raises(DataError, match="put a single row in a list"):
        model.predict({"text": "a"})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="twice"):
        model.predict(pd.DataFrame([["a", "b"]], columns=["text", "text"]))


def test_columns_are_found_by_their_names_in_training(tmp_path: Path) -> None:
    """Catches a frame like the training data that has to be renamed first."""
    config = make_config(tmp_path)
    source = config.samples.sources[0].model_copy(
        update={"columns": config.samples.sources[0].columns | {"text": "title", "image": "photo"}}
    )
    config = config.model_copy(update={"samples": config.samples.model_copy(update={"sources": (source,)})})
    write_folder(tmp_path / "model", config, "concat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load(str(tmp_path / "model")).predict([{"photo": IMAGES[0], "title": "a red car"}])
    assert found["missing"][0].tolist() == []


def test_rows_of_others_read_no_files(model: Model, tmp_path: Path) -> None:
    """Catches a request that has the server read /etc/passwd or climb out of its folder."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(IMAGES[0]))
    (tmp_path / "b.png").write_bytes(png(IMAGES[0]))
    paths = ["a.png", "../b.png", str(tmp_path / "b.png")]
    rows = [{"image": path, "text": "x"} for path in paths]
    found = model.predict(rows, root=str(tmp_path / "in"))
    assert found["missing"].map(list).tolist() == [[], ["image"], ["image"]]
    assert found["unreadable"].iloc[1:].str.contains("outside of the folder").all()
    found = model.predict(rows, read_files=False)
    assert found["unreadable"].str.contains("paths are not read here").all()


def test_an_image_over_the_limit_is_refused(folder: Path) -> None:
    """Catches an array that gets round samples.max_image_pixels, which protects the memory of whoever predicts."""
    model = load(str(folder), overrides={"samples.max_image_pixels": 100})
    assert "more than samples.max_image_pixels" in model.predict([{"image": IMAGES[0], "text": "x"}])["unreadable"][0]


def test_a_card_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model from somebody else that runs a command as the user who loads it."""
    from tests.inference.test_prediction import make_config as shapes
    from tests.inference.test_prediction import write_model

    monkeypatch.chdir(tmp_path)
    encoder = {"name": "os:system", "options": {"command": "touch ran"}}
    folder = write_model(tmp_path / "model", shapes(tmp_path, modalities__text__encoder=encoder))
    with pytest.raises(ConfigError, match=r"os:system.*trust_code=True"):
        load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    """Catches a KeyError or a FileNotFoundError for a wrong path."""
    with pytest.raises(DataError, match="is no finished model folder"):
        mm.load(str(tmp_path))
    (tmp_path / "new.csv").write_text("text\na\n")
    with pytest.raises(DataError, match="is a file: name the folder of a model"):
        mm.load(str(tmp_path / "new.csv"))


LIGHT = """
import sys
import mmkt_ray as mm
heavy = {"ray", "torch", "pandas", "numpy", "pyarrow", "sklearn"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert {"load", "Model"} <= set(dir(mm))
found = mm.load(sys.argv[1]).predict([{"image": None, "text": "a red car"}])
assert found["thing_pred"].notna().all()
slow = {"ray", "sympy", "scipy.stats", "matplotlib"} & sys.modules.keys()
assert not slow, slow
try:
    mm.lode
except AttributeError as error:
    print(error)
"""


@pytest.mark.slow
def test_import_is_light_and_prediction_knows_no_ray(folder: Path) -> None:
    """Catches an import at the top that makes `import mmkt_ray` take seconds, or a service start a cluster."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(folder)], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "module 'mmkt_ray' has no attribute 'lode'\n"), done.stderr

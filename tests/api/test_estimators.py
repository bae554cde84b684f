"""Estimators in the manner of scikit-learn, over rows of images and texts."""

import inspect
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.utils import estimator_checks

import mmkt_ray as mm
from mmkt_ray.api.estimators import class_names, own_names, tell_modalities
from mmkt_ray.errors import ConfigError, DataError
from tests.shapes import COLOURS, png

QUICK = {"training": {"auto": [], "steps": 60, "lr": 0.01, "batch_size_per_worker": 16}, "model.experts": False}
ENCODERS = {"photo": {"name": "pixels", "image_size": 16}}


def frame(num_rows: int, start: int = 0) -> pd.DataFrame:
    """Squares of three colours with captions that name them; a price that nothing reads."""
    names = [list(COLOURS)[i % 3] for i in range(start, start + num_rows)]
    photos = [png(name, i) for i, name in enumerate(names, start)]
    titles = [f"a {name} square, w{i}" for i, name in enumerate(names, start)]
    return pd.DataFrame({"photo": photos, "title": titles, "price": range(num_rows), "colour": names})


@pytest.fixture(scope="module")
def fitted(ray_local: None) -> mm.MultimodalClassifier:
    """Trained on 60 rows; its classes are numbers."""
    rows = frame(60)
    codes = rows["colour"].map({"red": 30, "green": 10, "blue": 20})
    return mm.MultimodalClassifier(encoders=ENCODERS, settings=QUICK).fit(rows.drop(columns="colour"), codes)


def test_it_learns_and_answers_in_its_own_classes(fitted: mm.MultimodalClassifier) -> None:
    """Catches probabilities in the order of class names, which for 10, 20, 30 and `red` are not those of y."""
    assert fitted.modalities_ == {"photo": "image", "title": "text"}
    assert fitted.classes_.tolist() == [10, 20, 30]
    new = frame(12, start=100)
    proba = fitted.predict_proba(new)
    assert proba.shape == (12, 3)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    truth = new["colour"].map({"red": 30, "green": 10, "blue": 20})
    assert fitted.predict(new).tolist() == truth.tolist() == fitted.classes_[proba.argmax(axis=1)].tolist()
    assert fitted.score(new, truth) == 1.0


def test_rows_that_lack_something(fitted: mm.MultimodalClassifier) -> None:
    """Catches NaN where an estimator must answer, and a missing photo that costs the row."""
    new = frame(3)
    new.loc[0, "photo"], new.loc[1, ["photo", "title"]] = None, None
    assert fitted.predict(new)[[0, 2]].tolist() == [30, 20]
    np.testing.assert_allclose(fitted.predict_proba(new)[1], [20 / 60] * 3)


def test_numbers_are_predicted_in_their_own_unit(ray_local: None) -> None:
    """Catches answers on the transformed scale, the seven classes that seven different numbers would make, and a row
    without anything that has no answer."""
    rows, new = (rows.assign(title=rows["title"].str.split(",").str[0]) for rows in (frame(90), frame(12, start=100)))
    prices = {"red": 1.0, "green": 10.0, "blue": 100.0}
    noise = np.random.default_rng(0).normal(0, 0.05, len(rows))
    y = rows.pop("colour").map(prices).to_numpy() * np.exp(noise)
    settings = {"model": {"num_levels": 0, "experts": False}}
    model = mm.MultimodalRegressor(encoders=ENCODERS, settings=settings, transform="log").fit(rows, y)
    truth = new.pop("colour").map(prices).to_numpy()
    assert model.score(new, truth) > 0.9
    np.testing.assert_allclose(np.log(model.predict(new)), np.log(truth), atol=0.5)
    new.loc[0, ["photo", "title"]] = None
    assert model.predict(new)[0] == pytest.approx(y.mean())


@pytest.mark.slow
def test_it_works_in_cross_validation(ray_local: None) -> None:
    """Catches parameters that `clone` loses, and folds that read each other's shards."""
    rows = frame(40)
    scores = cross_val_score(mm.MultimodalClassifier(encoders=ENCODERS, settings=QUICK), rows, rows.pop("colour"), cv=2)
    assert scores.shape == (2,)
    assert scores.min() > 0.8


# --- what needs no fit --------------------

CHECKS = [  # those of scikit-learn that give no data
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_set_params",
    "check_valid_tag_types",
]
LEFT_OUT = """All other checks of `check_estimator` fit tables of numbers (`X = rng.normal(size=(20, 3))`), which this
estimator refuses by its tags (`two_d_array` is False): it reads images and texts. What they ask for is tested above and
below on such rows: missing y, lengths that differ, classes of any type, a refit, `clone`, answers before `fit`."""


@pytest.mark.parametrize("estimator", [mm.MultimodalClassifier, mm.MultimodalRegressor])
@pytest.mark.parametrize("check", CHECKS)
def test_scikit_learns_own_checks(check: str, estimator: type) -> None:
    """Catches parameters that are changed by __init__, not kept by clone, or unknown to get_params."""
    function: Callable[..., None] = getattr(estimator_checks, check)
    assert len(inspect.signature(function).parameters) == 2
    function(estimator.__name__, estimator())


def test_parameters_are_kept() -> None:
    """Catches a grid search that sets what has no effect."""
    model = mm.MultimodalClassifier(modalities={"a": "text"}, random_state=3)
    assert clone(model).get_params() == model.get_params()
    assert model.set_params(random_state=4).random_state == 4


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (None, "requires y to be passed"),
        (["a", "b"], "inconsistent numbers of samples"),
        (["a", "b", None], "no value in row 2"),
        (["a", "a", "a"], "1 class"),
        (pd.Series([1, "a", 1]), "y have several types"),
    ],
)
def test_labels_are_checked_before_anything_is_trained(y: list | None, says: str) -> None:
    """Catches a minute of work that ends in a message about something else."""
    with pytest.raises(ValueError, match=says):
        mm.MultimodalClassifier().fit(frame(3), y)


def test_answers_before_fit_are_refused() -> None:
    """Catches an AttributeError in place of scikit-learn's own NotFittedError."""
    with pytest.raises(ValueError, match="not fitted yet"):
        mm.MultimodalClassifier().predict(frame(3))


def test_columns_are_told_apart_or_named() -> None:
    """Catches a photo in an array taken for nothing, and a misspelt column that is ignored."""
    rows = frame(6).assign(array=[np.zeros((4, 4, 3), np.uint8)] * 6, pil=[Image.new("RGB", (4, 4))] * 6)
    assert tell_modalities(rows) == {"photo": "image", "title": "text", "array": "image", "pil": "image"}
    assert own_names({"photo no. 1": "image", "split": "text", "": "text"}) == {
        "photo_no__1": "photo no. 1",
        "split_1": "split",
        "column": "",
    }
    with pytest.raises(ConfigError, match=r"no column 'foto': did you mean 'photo'\?"):
        mm.MultimodalClassifier(modalities={"foto": "image"}).fit(rows, rows["colour"])
    with pytest.raises(DataError, match="price: number"):
        tell_modalities(rows[["price"]])
    texts = pd.DataFrame({0: ["a b c", "d e f"], ("x", "y"): ["g h i", "j k l"]})  # names as pandas may have them
    assert tell_modalities(texts) == {0: "text", ("x", "y"): "text"}


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ([1, 2], ["1", "2"]),
        (["a", "b"], ["a", "b"]),
        ([" a", "a"], ["class 0", "class 1"]),
        (["", "b"], ["class 0", "class 1"]),
        ([False, True], ["false", "true"]),
        (["1", "1.0"], ["class 0", "class 1"]),  # one class of two tools
        (["True", "true"], ["class 0", "class 1"]),
        (["cafe\u0301", "tea"], ["caf\xe9", "tea"]),  # as a run composes it
        (["['a']", "b"], ["class 0", "class 1"]),  # a list as text
        (["\ud800", "b"], ["class 0", "class 1"]),
    ],
)
def test_classes_keep_apart(classes: list, names: list[str]) -> None:
    """Catches two classes that a run would take for one, or for none."""
    assert class_names(np.array(classes)) == names

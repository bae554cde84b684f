"""The table encoder against scikit-learn on all rows at once,
and what it makes of cells that are not as they should be."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import OneHotEncoder, QuantileTransformer

from mmkt_ray.config.modality_config import ModalityConfig
from mmkt_ray.encoders.build import build_encoder, load_fitted, save_fitted
from mmkt_ray.encoders.table import TableEncoder, piecewise_linear
from mmkt_ray.errors import DataError
from mmkt_ray.kinds.table_rows import MAX_VALUES, ValueCounts, items_of, read_boolean, read_date, read_number

Row = dict[str, str]


def fitted(rows: list[Row], cuts: tuple[int, ...] = (), **options: Any) -> TableEncoder:
    """Fitted on the rows, cut into shards whose statistics merge in pairs from the left."""
    encoder = TableEncoder(TableEncoder.Section(**options))
    parts = [encoder.partial(rows[a:b]) for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = encoder.merge([total, part])
    encoder.finish(total)
    return encoder


def columns(encoder: TableEncoder, rows: list[Row]) -> pd.DataFrame:
    features = encoder.encode(rows)
    assert features.dtype == np.float32
    dense = features if isinstance(features, np.ndarray) else features.toarray()
    return pd.DataFrame(dense, columns=encoder.feature_names)


def sales(num_rows: int = 400) -> tuple[list[Row], pd.DataFrame]:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "price": np.round(np.exp(rng.normal(3, 1.5, num_rows)), 2),
            "brand": rng.choice(["Acme", "Bolt", "Crux", "Dune", "Eek"], num_rows, p=[0.5, 0.3, 0.18, 0.01, 0.01]),
        }
    )
    frame.loc[rng.random(num_rows) < 0.1, "price"] = np.nan
    frame.loc[rng.random(num_rows) < 0.1, "brand"] = None
    rows = [{k: str(v) for k, v in row.items() if v is not None and v == v} for row in frame.to_dict("records")]
    return rows, frame


def test_numbers_are_as_scikit_learns() -> None:
    """Catches other quantiles, other places of repeated values, a scale of other rows; NaN that counts."""
    rows, frame = sales()
    new = [*rows, {"price": "-5"}, {"price": "1e9"}]
    reference = QuantileTransformer(n_quantiles=1000, output_distribution="normal", subsample=None)
    known = reference.fit_transform(frame[["price"]])
    found = columns(fitted(rows), new)
    wanted = reference.transform(pd.DataFrame({"price": [*frame["price"], -5, 1e9]}))[:, 0]
    wanted = (wanted - np.nanmean(known)) / np.nanstd(known)
    np.testing.assert_allclose(found["price"], np.nan_to_num(wanted), atol=1e-5)
    np.testing.assert_array_equal(found["price is missing"][:400], frame["price"].isna())


def test_categories_are_as_scikit_learns() -> None:
    """Catches rare categories with a feature of their own, unseen ones without any."""
    rows, frame = sales()
    frame = frame.dropna(subset=["brand"])
    reference = OneHotEncoder(min_frequency=20, handle_unknown="infrequent_if_exist", sparse_output=False)
    reference.fit(frame[["brand"]])
    new = pd.DataFrame({"brand": ["Acme", "Crux", "Dune", "Zed"]})
    found = columns(fitted(rows, min_count=20), [{"brand": b} for b in new["brand"]])
    names = [name for name in found if name.startswith("brand =")]
    assert names == ["brand = Acme", "brand = Bolt", "brand = Crux", "brand = (another)"]
    np.testing.assert_array_equal(found[names], reference.transform(new))
    assert not columns(fitted(rows), [{}]).filter(like="brand =").to_numpy().any()


@pytest.mark.parametrize("options", [{}, {"numbers": "piecewise_linear"}, {"sparse": True}])
def test_shards_do_not_matter(options: dict[str, Any], tmp_path: Any) -> None:
    """Catches a type, a category or a quantile that depends on which rows came together;
    a state that loses something."""
    rows, _ = sales()
    days = ["2024-02-29T06:00:00Z", "2026-11-30", "2026-11-30"]
    rows = [row | {"on": days[i % 3], "new": ["true", "false"][i % 2]} for i, row in enumerate(rows)]
    once = fitted(rows, **options)
    for cuts in [(1, 7, 200), (399,), tuple(range(50, 400, 50))]:
        other = fitted(rows, cuts, **options)
        assert other.state()[1] == once.state()[1]
        pd.testing.assert_frame_equal(columns(other, rows[:50]), columns(once, rows[:50]), check_exact=True)
    section = TableEncoder.Section(**options)
    card = save_fitted(once, section, str(tmp_path))
    again = load_fitted(build_encoder(section), str(tmp_path))
    assert card.dim == again.dim
    assert card.sparse == again.sparse == bool(options.get("sparse"))
    pd.testing.assert_frame_equal(columns(again, rows), columns(once, rows), check_exact=True)
    assert {c: f["type"] for c, f in card.found["columns"].items()} == {
        "brand": "category", "new": "boolean", "on": "date", "price": "number",
    }  # fmt: skip


def test_many_different_numbers_are_known_closely() -> None:
    """Catches quantiles that depend on the order of merging, or that are far off, where values no longer fit."""
    numbers = np.random.default_rng(1).normal(1e6, 3, 5 * MAX_VALUES)
    ones = np.ones(len(numbers), int)
    whole = ValueCounts.of(numbers, ones)
    parts = [ValueCounts.of(part, ones[: len(part)]) for part in np.array_split(numbers, 7)]
    merged = ValueCounts.merged([ValueCounts.merged(parts[:2]), ValueCounts.merged(parts[2:])])
    assert whole.dropped == merged.dropped > 0
    assert len(whole.values) <= MAX_VALUES
    np.testing.assert_array_equal(whole.values, merged.values)
    np.testing.assert_array_equal(whole.counts, merged.counts)
    at = np.linspace(0, 1, 101)
    np.testing.assert_allclose(whole.quantiles(at), np.quantile(numbers, at), atol=0.01)


def test_piecewise_linear() -> None:
    """Catches bins that do not add up to the number's place; those of the paper's equation 1."""
    edges = np.array([0.0, 1.0, 4.0])
    np.testing.assert_allclose(
        piecewise_linear(np.array([0.5, 2.5, 4.0, -9.0, 9.0]), edges), [[0.5, 0], [1, 0.5], [1, 1], [0, 0], [1, 1]]
    )
    rows, frame = sales()
    found = columns(fitted(rows, numbers="piecewise_linear", num_bins=8), rows).filter(like="price in")
    assert found.shape == (400, 8)
    order = frame["price"].rank().to_numpy()
    there = ~np.isnan(order)
    assert (np.diff(found.sum(axis=1)[there].to_numpy()[np.argsort(order[there])]) >= 0).all()
    assert not found[~there].to_numpy().any()


@pytest.mark.parametrize(
    "text", ["12,5", "n/a", "1.5 lbs", "$3", "1e999", "inf", "nan", "0x10", "1_000", "٣", "", "-", "1 2"]
)
def test_what_is_no_number(text: str) -> None:
    """Catches a guess."""
    assert read_number(text) is None


def test_what_can_be_read() -> None:
    """Catches numbers, dates and booleans in usual spellings that are lost, and codes that become numbers."""
    assert [read_number(t) for t in ("1.5", "-3", "+.5", "2.", "1e3", "007", "-0")] == [1.5, -3, 0.5, 2, 1000, 7, 0]
    assert read_number("007", False) is None
    assert read_date("1970-01-02") == read_date("1970-01-02 01:00+01:00") == read_date("1970-01-02T00:00:00Z") == 86400
    assert [read_date(t) for t in ("03/04/2020", "2020-13-01", "2020", "2020-1-1")] == [None] * 4
    assert [read_boolean(t) for t in ("true", "FALSE", "yes", "2")] == [1, 0, 1, None]
    assert read_boolean("yes", False) is None
    assert items_of("plush / cotton/plush", "/") == ["plush", "cotton"]


def test_a_bad_cell_is_null_and_told() -> None:
    """Catches "12,5" read as 125 or as 12, and one that nobody hears of."""
    rows = [{"price": str(i)} for i in range(30)] + [{"price": "12,5"}]
    encoder = fitted(rows)
    found = columns(encoder, [{"price": "12,5"}, {"price": "3"}, {}])
    assert found.loc[0].tolist() == found.loc[2].tolist() == [0, 1]
    assert encoder.changes([{"price": "12,5"}, {"price": "3"}, {}]) == [["'price' is no number, read as null"], [], []]
    assert encoder.state()[1]["found"]["columns"]["price"]["unreadable"] == 1


def test_more_than_a_tenth_of_bad_cells() -> None:
    """Catches a stated number that is hardly one; the same column found, which is a category."""
    rows = [{"size": str(i)} for i in range(44)] + [{"size": f"{i} in"} for i in range(6)]
    stated = (
        r"'size' is no number, as the config says: 6 of 50 cells .* the first: '0 in', '1 in', '2 in', '3 in', '4 in';"
    )
    with pytest.raises(DataError, match=stated):
        fitted(rows, (10, 47), types={"size": "number"})
    assert fitted(rows, min_count=1).state()[1]["found"]["columns"]["size"]["type"] == "category"
    assert fitted(rows[:-2]).state()[1]["found"]["columns"]["size"]["type"] == "number"
    assert fitted(rows, types={"size": "category"}, min_count=1).dim == 51


def test_lists_and_dates() -> None:
    """Catches lists that are one category each; parts of a date that are not there."""
    fabrics = ["plush / cotton", "silk / cotton"] * 5
    rows = [{"fabric": fabric, "on": f"20{i:02d}-06-15"} for i, fabric in enumerate(fabrics)]
    found = columns(fitted(rows, min_count=1, split={"fabric": "/"}), [{"fabric": "cotton/silk", "on": "2005-06-15"}])
    assert list(found) == [
        *("fabric = cotton", "fabric = plush", "fabric = silk", "fabric = (another)"),
        *("on", "on (year sin)", "on (year cos)", "on (week sin)", "on (week cos)"),
    ]
    assert found.iloc[0, :4].tolist() == [1, 0, 1, 0]
    assert found["on"].abs()[0] < 0.5
    assert found["on (year cos)"][0] == pytest.approx(-1, abs=0.1)  # in the middle of a year


def test_what_cannot_be_fitted_is_told() -> None:
    """Catches a stated column that is misspelt, an empty table, types that are stated twice."""
    with pytest.raises(DataError, match=r"no row has a cell in column 'pirce'; did you mean 'price'\?"):
        fitted([{"price": "1"}, {"price": "2"}], types={"pirce": "number"})
    with pytest.raises(DataError, match="no column of the table differs"):
        fitted([{"price": "1"}] * 3)
    with pytest.raises(ValueError, match="state the types of columns at the kind"):
        ModalityConfig(kind="table", encoder={"name": "table", "types": {"a": "number"}})
    kind = {"name": "table", "types": {"a": "number"}}
    section: Any = ModalityConfig(kind=kind, encoder="table").encoder
    assert section.types == {"a": "number"}
    with pytest.raises(ValueError, match=r"column 'a' is a number by kind\.types"):
        ModalityConfig(kind=kind, encoder={"name": "table", "split": {"a": "/"}})


def test_a_damaged_state_is_refused(tmp_path: Any) -> None:
    """Catches a state from elsewhere whose quantiles do not ascend."""
    encoder = fitted(sales()[0])
    tensors, rest = encoder.state()
    name = next(iter(tensors))
    with pytest.raises(ValueError, match="do not ascend"):
        encoder.load_state({name: tensors[name][::-1].copy()}, rest)


def test_too_many_texts_for_categories(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a column of free text that takes all memory, or that leaves the features in silence."""
    monkeypatch.setattr("mmkt_ray.kinds.table_rows.MAX_TEXTS", 30)
    rows = [{"told": f"text {i}", "size": str(i % 7)} for i in range(40)]
    assert set(columns(fitted(rows, (20,)), rows)) == {"size"}
    assert "column 'told' has more than 30 different texts, too many for categories: it is left out" in caplog.text
    with pytest.raises(DataError, match="too many for categories: make it a modality of kind text, or leave it out"):
        fitted(rows, (20,), types={"told": "category"})

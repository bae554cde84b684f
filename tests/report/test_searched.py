"""The page's sections on a search and on several seeds: there with their files, in plain words, ties called ties."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mmkt_ray import storage
from mmkt_ray.report import search_plots, searched
from mmkt_ray.report.figures import Figures
from mmkt_ray.report.page import build_report
from mmkt_ray.scoring.provenance import Current
from mmkt_ray.search.search_results import HeatMap, SearchResult
from tests.report.page_elements import HOSTILE, Elements
from tests.report.test_findings import text_of

pytestmark = pytest.mark.slow

FUSIONS, SHARINGS = ("concat", "gated", "hierarchical"), ("separate", "task", '["task", "modality"]')


def score(value: float, reach: float = 0.02) -> dict:
    return {"value": value, "low": value - reach, "high": value + reach}


def gain(value: float, num_rows: int = 150) -> dict:
    verdict = "better" if value > 0.02 else "worse" if value < -0.02 else "tie"
    return {"num_rows": num_rows} | {m: score(value) | {"verdict": verdict} for m in ("accuracy", "macro_f1")}


def finalist(val: float, modalities: list, fusion: dict, thing: float) -> dict:
    test = {
        t: {"num_rows": 150, "accuracy": score(v), "macro_f1": score(v - 0.01)}
        for t, v in (("thing", thing), ("colour", 0.5))
    }
    about = {"modalities": modalities, "fusion": fusion, "sharing": "task", "folders": ["x", "y"]}
    return about | {"val": val, "val_by_seed": [val - 0.01, val + 0.01], "test": test}


def result() -> dict:
    """Candidate 1 beats the single modality, ties with concat; on `colour` it is worse than the single modality."""
    finalists = {
        "candidate 1": finalist(0.8, ["image", HOSTILE], {"name": "hierarchical", "depth": 3}, 0.81),
        "best single modality": finalist(0.7, ["image"], {"name": "concat"}, 0.72),
        "best concat": finalist(0.79, ["image", "text"], {"name": "concat"}, 0.80),
    }
    return {
        "notes": [],
        "tried": {"candidates": 1234, "references": 192, "fused": 1100}
        | {"stopped": 900, "finished": 320, "diverged": 10, "out_of_memory": 4},
        "seconds": 611.2,
        "objective": {"task": "thing", "metric": "macro_f1", "over": "mean", "split": "val"},
        "overrides": {role: {"training.lr": 0.0123456, "model.sharing": ["task", "modality"]} for role in finalists},
        "compared_with": {r: r for r in ("best single modality", "best concat")},
        "winner": "candidate 1",
        "finalists": finalists,
        "versus": {
            "best single modality": {"thing": gain(0.09), "colour": gain(-0.05)},
            "best concat": {"thing": gain(0.01), "colour": gain(0.0)},
        },
        "confidence": 0.9,
        "ensemble": {"val": 0.85, "best_member_val": 0.8, "library": 50, "members": [{"candidate": "0-1", "picks": 2}]},
        "ensemble_test": {"thing": {"num_rows": 150, "accuracy": score(0.83), "macro_f1": None}},
        "ensemble_versus_winner": {"thing": gain(0.03) | {"macro_f1": None}},
    }


def insight(num_points: int = 300) -> dict:
    rng = np.random.default_rng(0)
    scores, epochs = rng.beta(8, 4, num_points), rng.choice([1, 3, 9], num_points, p=[0.7, 0.2, 0.1])

    def points(values) -> list:
        return [[v, float(s), int(e)] for v, s, e in zip(values, scores, epochs, strict=True)]

    grid = {"columns": "model.sharing", "column_names": list(SHARINGS)}
    cells = {
        "score": [[0.6, 0.7, None], [0.65, 0.81, 0.72], [0.5, 0.55, 0.6]],
        "candidates": [[9, 4, 0], [5, 1200, 7], [2, 1, 1]],
    }
    return {
        "heat_maps": [
            grid | cells | {"rows": "model.fusion.name", "row_names": list(FUSIONS)},
            grid | cells | {"rows": "model.fusion.depth", "row_names": ["1", "2", "3"]},
        ],
        "curve": [[12.0, 0.5, 64], [40.0, 0.7, 200], [200.0, 0.78, 700], [611.2, 0.81, 1234]],
        "importance": {"training.lr": 0.7, "model.fusion.name": 0.2, "model.sharing": 0.1},
        "slices": {
            "training.lr": points((10 ** rng.uniform(-4, -1, num_points)).tolist()),
            "model.fusion.name": points(rng.choice(FUSIONS, num_points).tolist()),
            "model.fusion.depth": points(rng.integers(1, 5, num_points).astype(float).tolist()),
            "model.dropout": points(rng.uniform(0, 0.5, num_points).tolist()),
            "model.hidden_dim": points([64.0] * num_points),
        },
    }


def seeds() -> dict:
    def model(value: float, versus: dict | None) -> dict:
        scores = {"accuracy": score(value), "macro_f1": score(value - 0.1)}
        return {**scores, "by_seed": [value - 0.01, value + 0.01], "val": value, "versus": versus}

    def gains(value: float) -> dict:
        return {"accuracy": score(value), "macro_f1": score(0.3)}

    models = {
        "image": model(0.7, None),
        "concat": model(0.75, gains(0.05)),
        "text": model(0.705, gains(0.005)),
        "gated": model(0.6, gains(-0.1)),
    }
    apart = {"num_rows": None, "reference": None, "models": {"concat": model(0.5, None)}}
    return {
        "seeds": [0, 1],
        "against": None,
        "tasks": {"thing": {"num_rows": 150, "reference": "image", "models": models}, "colour": apart},
    }


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory) -> Path:
    """The run with a search and several seeds."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("searched") / "run"))
    storage.write_json(str(folder / "search" / "result.json"), result())
    storage.write_json(str(folder / "search" / "report.json"), insight())
    storage.write_json(str(folder / "seeds.json"), seeds())
    return folder


@pytest.fixture(scope="module")
def page(run) -> Elements:
    return Elements(Path(build_report(str(run))).read_text(encoding="utf-8"))


def test_what_was_tried_and_what_won_is_said_first(page):
    """Catches candidates that vanish from the count, and a winner without the score it was chosen by."""
    text = text_of(page)
    for expected in (
        "1,234 candidates were tried in 10 min: 900 stopped early, 320 trained to the end, 10 diverged, 4 did not "
        "fit",
        "into memory, and 192 to compare with. They were chosen by",
        "chosen by macro-F1 on val of thing",
        f"candidate 1, image + {HOSTILE}, fusion hierarchical (depth 3), sharing task, with 80.0 % on val",
        "Only thing was searched for",
        "90 % intervals",
    ):
        assert expected in text


def test_ties_are_called_ties(page):
    """Catches a page that sells noise as a win, hides a loss,
    or compares by another metric than the search chose by."""
    text = text_of(page)
    for expected in (
        "★ winnerthing: the winner has accuracy 81.0 % (79.0 to 83.0), macro-F1 80.0 % (78.0 to 82.0) on 150 test "
        "samples",
        "▲ betterthing: the winner is better than the best single modality (image alone, sharing task): "
        "+9.0 points of macro-F1 [+7.0, +11.0] on 150 samples",
        "● tiething: the winner ties with the best plain concat (image + text, fusion concat, sharing task): +1.0 "
        "points",
        "▼ worsecolour: the winner is worse than the best single modality",
        "▲ betterthing: the ensemble (accuracy 83.0 % (81.0 to 85.0)) is better than the winner: +3.0 points of "
        "accuracy",
        "○ notecolour: no samples to compare the ensemble with the winner",
    ):
        assert expected in text


def test_a_winner_that_is_its_own_rival_is_said_so():
    """Catches a winner that reads one modality and is said to beat the best single modality,
    or a failure for want of it."""
    alone = {"compared_with": {"best single modality": "candidate 1"}, "ensemble": None}
    found, usual = (SearchResult.from_dict(result() | more, "result.json") for more in (alone, {}))
    assert [line.kind for line in searched.lines_on("thing", found, "candidate 1")] == ["won"]
    assert [line.text for line in searched.lines_on_rivals(found)] == [
        "The winner is the best single modality itself.",
        "The best plain concat was not tried.",
    ]
    assert searched.lines_on_rivals(usual) == []


def test_every_figure_of_the_search_is_there(page, run):
    """Catches a plot that is lost, has no words, or is one of a key with a single value."""
    alts = page.figures()
    for start in (
        "Best val macro-F1 by fusion and sharing; the highest, 81.0 %, is gated with task",
        "Best val macro-F1 by fusion depth and sharing",
        "Best val macro-F1 so far",
        "Share of the variance of scores by key: training.lr 70.0 %",
        "Val macro-F1 of 300 candidates by training.lr",
        "Val macro-F1 of 300 candidates by model.fusion.name",
    ):
        assert any(alt.startswith(start) for alt in alts), start
    assert not any("hidden_dim" in alt for alt in alts)
    assert (run / "report" / "search-curve.svg").exists()


def test_several_seeds_have_their_table(page):
    """Catches a difference that is luck of the seed and told as a gain,
    and models of other samples that are compared."""
    text = text_of(page)
    for expected in (
        "Every model was trained 2 times",
        "▲ betterthing: concat is shown better than image alone.",
        "● tiething: text is too close to tell from image alone.",
        "▼ worsething: gated is shown worse than image alone.",
        "75.0 % 73.0–77.074.0, 76.065.0 % 63.0–67.0+5.0 +3.0 to +7.0 better+30.0 +28.0 to +32.0",
        "scored on different samples, so their scores are not compared. No model of a single modality",
    ):
        assert expected in text


def test_links_lead_somewhere_and_names_stay_text(page):
    """Catches a dead link in the head, and a modality's name that runs as code."""
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {"search", "seeds"} <= ids
    assert {a["href"][1:] for a in page.all("a")} <= ids
    assert len(page.all("script")) == 1


@pytest.mark.parametrize("lost", ["search/result.json", "search/report.json"])
def test_an_unfinished_search_has_no_section(run, tmp_path, lost):
    """Catches a page that fails, or tells half a story, while a search still runs."""
    folder = Path(shutil.copytree(run / "search", tmp_path / "search")).parent
    (folder / lost).unlink()
    assert searched.search_section(Current(str(folder)), Figures(str(folder / "report"))) is None
    assert searched.seeds_section(Current(str(folder))) is None


def drawn_in(folder: Path) -> searched.SearchFigures:
    """The figures of a search."""
    section = searched.search_section(Current(str(folder)), Figures(str(folder / "report")))
    assert section is not None
    assert section.found is not None
    return section.found.figures


def test_a_search_of_one_candidate_is_told(tmp_path):
    """Catches a page that fails where there is nothing to draw."""
    bare = {"heat_maps": [], "curve": [[1.0, 0.5, 1]], "importance": None, "slices": {"training.lr": [[0.1, 0.5, 9]]}}
    storage.write_json(str(tmp_path / "search" / "result.json"), result())
    storage.write_json(str(tmp_path / "search" / "report.json"), bare)
    drawn = drawn_in(tmp_path)
    assert drawn.curve
    assert (drawn.maps, drawn.importance, drawn.slices) == ([], None, [])


def test_the_most_important_keys_are_drawn(tmp_path):
    """Catches a search of many keys that draws the first ones, and does not say that it leaves some out."""
    told = insight(20)
    told["slices"] = {f"k{i}": [[0.1, 0.5, 9], [0.2, 0.6, 9]] for i in range(searched.MAX_SLICES + 2)}
    told["importance"] = {f"k{searched.MAX_SLICES + 1}": 0.9}
    storage.write_json(str(tmp_path / "search" / "result.json"), result())
    storage.write_json(str(tmp_path / "search" / "report.json"), told)
    drawn = drawn_in(tmp_path)
    assert [f["title"] for f in drawn.slices][:2] == [f"k{searched.MAX_SLICES + 1}", "k0"]
    assert (len(drawn.slices), drawn.num_slices_hidden) == (searched.MAX_SLICES, 2)


def test_values_that_are_choices_get_rows_and_scales_do_not():
    """Catches whole numbers that are drawn as a scale, numbers as thousands of rows,
    and rows that mix up their points."""
    names, at = search_plots._rows_of([["a", 0.5, 1], ["b", 0.9, 1], ["a", 0.6, 1]])
    assert (names, at.tolist()) == (["a", "b"], [0, 1, 0])  # the best one at the top
    names, at = search_plots._rows_of([[1.0, 0.5, 1], [4.0, 0.9, 1], [2.0, 0.6, 1]])
    assert (names, at.tolist()) == (["4", "2", "1"], [2, 0, 1])
    assert search_plots._rows_of([[0.1, 0.5, 1], [0.2, 0.5, 1]])[0] == []
    assert search_plots._rows_of([[float(i), 0.5, 1] for i in range(9)])[0] == []


def test_a_heat_map_with_one_value_is_drawn():
    """Catches a range of zero width that fails the page."""
    one = HeatMap(rows="a", columns="b", row_names=["x"], column_names=["y"], score=[[0.5]], candidates=[[1]])
    assert "50.0" in search_plots.draw_heat_map(one, search_plots.Measure.of("macro_f1"), (0.5, 0.5))


@pytest.fixture
def bare(run, tmp_path) -> Path:
    """The run with a search that has nothing to draw."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    nothing = {"heat_maps": [], "curve": [], "importance": None, "slices": {}}
    storage.write_json(str(folder / "search" / "report.json"), nothing)
    return folder


def test_a_search_without_a_winner_says_so_first(bare):
    """Catches a page that fails, or names a winner, where the time was up before anything was tried."""
    note = "The time budget of 1 s ended before any candidate was tried"
    none = {"winner": None, "finalists": {}, "versus": {}, "compared_with": {}, "overrides": {}, "ensemble": None}
    storage.write_json(str(bare / "search" / "result.json"), result() | none | {"notes": [note]})
    text = text_of(Elements(Path(build_report(str(bare))).read_text(encoding="utf-8")))
    assert note in text
    assert "winner is" not in text


def test_a_search_without_a_fused_candidate_says_so_first_and_a_log_loss_is_told_in_nats(bare):
    """Catches a winner among single modalities that looks like one of a search over fusion; a negated log loss told
    as a percentage, and a gain whose sign says that the winner is worse."""
    note = "The time budget of 1 s ended before any fused candidate had a score."
    found = result() | {"notes": [note], "tried": {"candidates": 0, "references": 64, "fused": 0}}
    found["objective"]["metric"] = "log_loss"
    for finalist in found["finalists"].values():
        finalist |= {"val": -0.5, "val_by_seed": [-0.45, -0.55]}
        for test in finalist["test"].values():
            test["log_loss"] = {"value": -0.6, "low": -0.7, "high": -0.55}
    for by_task in found["versus"].values():
        by_task["thing"]["log_loss"] = {"value": 0.1, "low": 0.05, "high": 0.2, "verdict": "better"}
    storage.write_json(str(bare / "search" / "result.json"), found)
    text = text_of(Elements(Path(build_report(str(bare))).read_text(encoding="utf-8")))
    assert text.index(note) < text.index("0 candidates were tried")
    for expected in (
        "The best so far is candidate 1",
        "with -0.500 nats on val",
        "log loss 0.600 (0.550 to 0.700)",
        "+0.100 nats of log loss saved [+0.050, +0.200]",
    ):
        assert expected in text


def test_choices_that_are_lists_are_told_as_words():
    """Catches JSON on the page, and a number as text that is read as something else."""
    told = [search_plots.choice_name(text) for text in ('["task", "modality"]', "gated", "128", "[x")]
    assert told == ["task, modality", "gated", "128", "[x"]

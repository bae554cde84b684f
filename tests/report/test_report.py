"""The page of a run by the real code: complete, self-contained, safe, and still there when parts are missing."""

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.evaluation import sentences
from mmkt_ray.report import colors, plots, words
from mmkt_ray.report.page import build_report
from mmkt_ray.scoring.results import Answer, Headline, ModelScores, TaskResults
from tests.report.page_elements import ATTRIBUTE, HOSTILE, Elements

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(finished) -> str:
    return Path(build_report(str(finished))).read_text(encoding="utf-8")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_hostile_names_and_texts_stay_text(page):
    """Catches a template without escaping: whoever writes a class name or a caption would run code at the
    reader's."""
    elements = Elements(page)
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert len(elements.all("script")) == 1  # its own; the policy names its hash
    assert not [a for _, a in elements.tags if any(name.startswith("on") for name in a)]
    assert HOSTILE in elements.text
    assert ATTRIBUTE in elements.text
    assert "default-src 'none'" in elements.all("meta")[3]["content"]
    assert f"script-src 'sha256-{digest}'" in elements.all("meta")[3]["content"]


def test_nothing_comes_from_outside(page):
    """Catches fonts, scripts or images from elsewhere: the page must read the same from a USB stick in ten years."""
    for tag, attributes in Elements(page).tags:
        for name in ("src", "srcset", "href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, name)
    assert not re.search(r"url\((?!#)|@import|https?://", page)


def test_every_figure_has_words_and_is_a_file_too(page, finished):
    """Catches figures that a blind reader gets nothing of, files that are not beside the page,
    and such that are no SVG."""
    elements = Elements(page)
    plots = ("accuracy", "differences", "learning", "confusion", "classes", "reliability")
    assert all(len(a["alt"]) > 10 for a in elements.all("img"))
    assert len(elements.figures()) == 2 * len(plots)  # two tasks
    expected = {f"{t}-{p}.svg" for t in ("colour", "thing") for p in plots}
    assert {f.name for f in (finished / "report").iterdir()} == {"index.html", "results.json", *expected}
    for name in expected:
        root = ET.parse(finished / "report" / name).getroot()
        assert root.find("{*}style").text.startswith(":root")
        assert any(e.tag.endswith("}title") for e in root.iter())


def test_ids_are_those_of_one_figure(page):
    """Catches figures that borrow each other's shapes: each of them is drawn by itself,
    and the page has all of them."""
    ids = [a["id"] for _, a in Elements(page).tags if "id" in a]
    assert len(ids) == len(set(ids)) > 10


def test_a_page_is_the_same_every_time_and_small(run, page):
    """Catches dates and random ids in figures, and figures that outweigh the page."""
    again = Path(build_report(str(run))).read_text(encoding="utf-8")
    figures = re.compile("<svg.*?</svg>", re.DOTALL)
    assert figures.findall(again) == figures.findall(page)
    assert max(map(len, figures.findall(page))) < 60_000


def test_the_page_says_what_was_found_and_with_what(page, finished):
    """Catches a section that renders empty: numbers, data, rejects, stages, config and caveats must all be there."""
    text = " ".join(Elements(page).text.split())
    results = storage.read_json(str(finished / "report" / "results.json"))
    for found in results["tasks"].values():
        assert found["headline"]["title"] in text
        for row in found["rows"]:
            assert words.percent(row["accuracy"]["value"]) in text
    for expected in (
        "Pairs in this run were made by label",
        "cannot decode image (2); duplicate sample_id (1)",
        "without text",
        "0123456789abcdef",
        "2 min",
        "batch_size_per_worker: 64",
        "What each modality knows",
        "most confident and wrong",
        "1,234 rows/s",
    ):
        assert expected in text, expected


def test_each_subset_of_the_best_fused_model_opens_to_its_own_scores(page, finished):
    """Catches a subset beside the matrix, or the classes, of another one."""
    text = " ".join(Elements(page).text.split())
    results = storage.read_json(str(finished / "report" / "results.json"))
    for task, found in results["tasks"].items():
        section = text.partition(f"Task: {task}")[2].partition("All scores of ")[0]
        name = found["best_fused"]
        record = storage.read_json(str(finished / "models" / name / "metrics.json"))["tasks"][task]
        assert len(record["subsets"]) == 3
        for scores in record["subsets"].values():
            title = f"{name} given {' + '.join(scores['modalities'])}: all scores"
            told = section.partition(title)[2].partition(f"{name} given")[0].replace(" ", "")
            for label, row in zip(record["class_names"], scores["metrics"]["confusion"], strict=True):
                assert "".join([label.replace(" ", ""), *(str(n) for n in row if n)]) in told
            assert f"macrof1{words.percent(scores['metrics']['macro_f1'])}".replace(" ", "") in told
            for label, scored in scores["metrics"]["per_class"].items():
                assert f"{label}{words.percent(scored['precision'])}".replace(" ", "") in told


@pytest.mark.parametrize(
    "lost",
    [
        ["run.json"],
        ["baselines"],
        ["features/union/manifest.json"],
        [
            "models/concat/gallery.json",
            "models/hierarchical/gallery.json",
            "models/image/gallery.json",
            "models/text/gallery.json",
        ],
        [
            "models/concat/config.json",
            "models/image/config.json",
            "models/text/config.json",
            "models/hierarchical/config.json",
        ],
        ["models/image", "models/text", "baselines"],
        ["models"],
    ],
)
def test_a_page_without_some_parts_is_still_a_page(run, lost):
    """Catches a report that fails as a whole because one optional file is not there."""
    for name in lost:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    text = " ".join(Elements(Path(build_report(str(run))).read_text(encoding="utf-8")).text.split())
    assert "Task: colour" in text
    said = {
        "run.json": "There is no run.json",
        "features/union/manifest.json": "Its manifest is not there",
        "models/concat/gallery.json": "There is no gallery",
        "models/image": "Whether fusing helps is not known",
        "models": "There is no gallery",
    }
    assert said.get(lost[0], "") in text


def test_nothing_evaluated_is_an_error_that_helps(tmp_path):
    """Catches an empty page for a run that was never evaluated."""
    with pytest.raises(DataError, match="mmkt evaluate"):
        build_report(str(tmp_path))


def told(kind: str, value: float, low: float, high: float, **changes) -> Headline:
    """The headline of one task: `both` beside `image`, over 150 of the 200 samples that `both` can read."""
    accuracy = {"value": 0.82, "low": 0.79, "high": 0.85}
    about = dict.fromkeys(("num_unseen", "balanced_accuracy", "val_accuracy", "versus")) | {"reads": [], "verdict": ""}
    sizes = {"both": 200, "image": 150, "sum": 200}
    rows = [about | {"model": m, "num_rows": n, "accuracy": accuracy} for m, n in sizes.items()]
    best = {"best": "both", "best_trained": "both", "best_fused": "both", "best_single": "image"}
    found = TaskResults(kind="multiclass", num_classes=2, selected_on="val", rows=rows, **best)
    answer = {"kind": kind, "value": value, "low": low, "high": high, "fused": "both", "rest": "image", "num_rows": 150}
    answer |= {
        "metric": "accuracy",
        "scores": {"fused": 0.8 + value, "rest": 0.8},
        "best_fused": "both",
        "num_fused": 2,
    }
    answer |= {"modalities": [], "rest_modalities": [], "p": 0.5, "p_holm": 0.5, "source": "trained", "differs": {}}
    return sentences.headline("t", Answer(**answer | changes), found, 0.95)


def test_the_headline_says_plainly_what_fusing_did():
    """Catches a page that praises the fused model whatever the tests say,
    and one that does not say which model hurts."""
    better = told("adds", 0.031, 0.01, 0.05)
    assert (better.tone, better.title) == (
        "good",
        "Fusing helps: both beats every single modality, the closest (image) by 3.1 points",
    )
    assert "Paired difference +3.1 points, 95 % interval +1.0 to +5.0." in better.text
    assert "It also answers for 50 samples that image cannot read." in better.text
    assert "150 samples" in better.text
    worse = told("hurts", -0.02, -0.05, -0.01)
    assert (worse.tone, worse.title) == ("bad", "Fusing hurts: both is 2.0 points below image alone")
    assert told("unclear", 0.01, -0.01, 0.03).title.startswith("Fusing is not shown to help")
    enough = told("suffices", -0.001, -0.008, 0.006)
    assert enough.title == "image alone suffices: none of the fused models tried gains a point"
    assert "nor does the other one" in enough.text
    other = told("depends", 0.03, 0.01, 0.05, fused="sum")
    assert other.title == "Fusing helps with sum, by 3.0 points over image; with both it is not shown to"


def test_a_model_keeps_its_colour_and_no_other_has_it():
    """Catches colours by position in each plot, and a tenth model that looks like the first."""
    models = {"majority": [], **{f"m{i}": ["image"] for i in range(40)}}
    assert colors.model_colors(models)["m3"] == "#fd0004"
    styled = f"fill: {colors.model_colors(models)['m3']}; stroke: {colors.INK}"
    assert colors.with_variables(styled) == "fill: var(--m4); stroke: var(--ink)"
    for theme in (1, 2):
        shown = [v[theme] for v in colors.values(models) if v[0].startswith("m")]
        assert len(set(shown)) == len(models)


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_every_model_is_seen_on_its_page():
    """Catches a colour that is too faint on white or on black: 3 to 1 is what WCAG 2 asks of a figure's marks."""
    for name, light, dark in colors.values({f"m{i}": ["image"] for i in range(40)}):
        if name.startswith("m"):
            assert 1.05 / (luminance(light) + 0.05) > 3, (name, light)
            assert (luminance(dark) + 0.05) / (luminance("#0d1117") + 0.05) > 3, (name, dark)


def test_nothing_is_off_the_scale(page, finished):
    """Catches a mark beyond the frame of its figure: a score below zero, or a model that is far behind the others."""
    about = {
        "reads": [],
        "num_rows": 9,
        "num_unseen": None,
        "balanced_accuracy": None,
        "val_accuracy": None,
        "versus": None,
    }
    intervals = {"r2": {"value": -3.0, "low": -4.0, "high": -2.0}, "spearman": None}
    row = ModelScores(model="a", intervals=intervals, verdict="", **about)
    axes = plots.draw_score_bars(
        [row],
        ({"name": "r2", "title": "R2"}, {"name": "spearman", "title": "Spearman"}),
        {"a": "#fd0000"},
    )
    left = [float(x) for x in re.findall(r'd="M (-?[\d.]+) ', axes)]
    assert min(left) >= 0
    assert "−400" in axes
    assert "◀" not in page
    assert "▶" not in page


def test_many_classes_are_listed_not_drawn(run):
    """Catches an unreadable matrix of hundreds of cells, where a list of the worst confusions helps."""
    for name in ("concat", "image", "text", "hierarchical"):
        uri = str(run / "models" / name / "metrics.json")
        record = storage.read_json(uri)
        task = record["tasks"]["thing"]
        names = [f"class {i:03}" for i in range(120)]
        task |= {"class_names": names, "confusion": None, "most_confused": [["class 001", "class 002", 7]]}
        task["per_class"] = {
            n: {"precision": 0.5, "recall": 0.5, "f1": i / 120, "support": 1} for i, n in enumerate(names)
        }
        storage.write_json(uri, record)
    page = Path(build_report(str(run))).read_text(encoding="utf-8")
    assert "Most confused by" in page
    assert "the 30 worst of the 120 that were tested" in page


def test_the_report_needs_neither_ray_nor_torch():
    """Catches an import that makes a page of plots wait for, and depend on, a GPU stack."""
    code = "import sys, mmkt_ray.report.page; print(sorted({'ray', 'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"

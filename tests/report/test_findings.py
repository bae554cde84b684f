"""The page's sections on what was found: each there with its file, in plain words, and not there without it."""

import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from mmkt_ray import storage
from mmkt_ray.api.runs import results
from mmkt_ray.errors import DataError
from mmkt_ray.features.store import open_store
from mmkt_ray.inference.model_card import read_card, write_card
from mmkt_ray.record import About
from mmkt_ray.report import about_models, curves, findings
from mmkt_ray.report.page import build_report
from mmkt_ray.scoring.provenance import Current, LeftOut, with_about
from mmkt_ray.studies.contribution import insights
from mmkt_ray.studies.missing import missing_curves
from mmkt_ray.studies.scores import transferability
from mmkt_ray.studies.transfer_results import Gain, Transfers
from tests.manifests import make_results, make_training
from tests.report.page_elements import HOSTILE, Elements, audit_of

pytestmark = pytest.mark.slow

SECTIONS = ("knowledge", "missing", "calibration", "transfer", "representation", "parameters")


def transfer_cell(source: str, target: str, gain: float, method: str = "finetune", label_frac: float = 0.1) -> Gain:
    about = {"source": source, "target": target, "method": method, "label_frac": label_frac, "seeds": 3}
    verdict = "positive" if gain > 0.02 else "negative" if gain < -0.02 else "none shown"
    return Gain(**about, gain=gain, low=gain - 0.02, high=gain + 0.02, p_holm=0.01, verdict=verdict)


@pytest.fixture(scope="module")
def told(finished, tmp_path_factory) -> Path:
    """The run with every result file that the page may tell of; those of the evaluation by the real code."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("told") / "run"))
    store = open_store(str(run / "features" / "union"))
    stores = dict.fromkeys(("image", "text", "concat", "hierarchical"), store)
    insights(str(run), stores)
    transferability(str(run), stores)
    missing_curves(str(run / "models" / "concat"), store, str(run), num_seeds=1)
    card = read_card(str(run / "models" / "concat"))
    parts, routes = {"level_1": 1200, "heads": 34}, {"thing": {"image": "image"}}
    training = card.training.replaced(num_params_by_part=parts, experts_for=routes)
    write_card(str(run / "models" / "concat"), card.replaced(training=training))
    cells = [
        transfer_cell("image:thing", "text:thing", -0.031),
        transfer_cell("text:thing", "image:thing", 0.05, "frozen"),
        transfer_cell("a", "b", 0.0),
    ]
    about = {"nodes": [], "label_fracs": [0.1], "seeds": 3, "confidence": 0.95, "targets": []}
    Transfers(cells=cells, **about).write(str(run / "transfer.json"))
    storage.write_json(str(run / "features" / "union" / "audit.json"), audit_of())
    return run


@pytest.fixture(scope="module")
def page(told) -> Elements:
    return Elements(Path(build_report(str(told))).read_text(encoding="utf-8"))


def text_of(page: Elements) -> str:
    return " ".join(page.text.split())


def test_every_section_is_there_and_linked(page):
    """Catches a section that is left out, or a link in the head that leads nowhere."""
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert set(SECTIONS) <= ids
    assert {a["href"][1:] for a in page.all("a")} <= ids


def test_the_plain_answers_stand_on_the_page(page, told):
    """Catches answers that are computed and not told, and shares without their numbers."""
    text, insight = text_of(page), storage.read_json(str(told / "insight.json"))
    for found in insight["tasks"].values():
        for answer in found["answers"]:
            assert " ".join(answer["sentence"].split()) in text
        for share in found["shapley"]["accuracy"]["values"].values():
            assert f"{100 * share['value']:+.1f}".replace("-", "−") in text


def test_it_is_told_who_answers_for_what_is_there(page):
    """Catches an answer that is not the model's whose name stands beside it."""
    assert "concatthingimageexpert of image" in text_of(page)


def test_negative_transfer_is_said_plainly(page):
    """Catches a matrix that shows gains only, and one that sells noise as a gain."""
    text = text_of(page)
    assert "Of 3 transfers, 1 are shown to help and 1 to hurt" in text
    assert "▼ hurtsimage:thing → text:thing by finetune at 10 % of the labels: −3.1 points [−5.1, −1.1]" in text
    assert "a → b by" not in text


def test_faults_of_the_data_are_listed(page):
    """Catches leakage and conflicts that only a JSON file knows of."""
    text = text_of(page)
    for expected in (
        "Leakage: 1 train samples have the same image as a val or test sample",
        "No train sample has the same text as a val or test sample",
        "Conflicting labels: 2 samples in 1 groups",
        "thing 1 labels and 0 pairs of modalities, of 300 samples.",
        "0.987",
    ):
        assert expected in text


def test_names_from_the_data_stay_text(page):
    """Catches a new template without escaping."""
    assert len(page.all("script")) == 1
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert HOSTILE in page.text


def test_every_figure_of_a_finding_has_words(page):
    """Catches a plot that says nothing to who cannot see it."""
    assert len(page.figures()) == len(page.all("svg"))
    assert all(len(words) > 30 for words in page.figures())


def test_suspects_are_shown_with_what_their_modalities_say(page):
    """Catches a list of ids that nobody can judge, and problems that come after the scores they spoil."""
    text = text_of(page)
    assert f"a caption of {HOSTILE} thing{HOSTILE} looks likebird score0.987" in text
    assert [a for a in page.all("img") if a["alt"] == f"image of the sample, labelled {HOSTILE}"]
    assert text.index("mmkt predict") < text.index("Leakage: 1 train")
    assert text.index("looks likebird") < text.index("Task: ")


def test_compared_figures_have_one_scale(told):
    """Catches curves of one task that look as high as those of another and are not."""
    folder = told / "report"
    ticks = [re.findall(r">(\d+)</text>", (folder / f"{t}-without-any.svg").read_text()) for t in ("colour", "thing")]
    assert ticks[0] == ticks[1]


def test_without_its_file_a_section_is_not_there(told, tmp_path):
    """Catches empty headings and dead links for what a run did not do."""
    run = Path(shutil.copytree(told, tmp_path / "run"))
    for lost in ("insight.json", "transfer.json", "transferability.json", "models/concat/missing.json"):
        (run / lost).unlink()
    page = Elements(Path(build_report(str(run))).read_text(encoding="utf-8"))
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert ids & set(SECTIONS) == {"calibration", "parameters"}
    assert {a["href"][1:] for a in page.all("a")} <= ids


def test_parameters_are_counted_by_part(told):
    """Catches counts of a part that not every model has, and levels out of order."""
    about = {"kind": "trained", "name": "n", "modalities": ["a"], "fusion": None, "sharing": "task", "store": None}
    about |= {"num_params": 1, "training_s": 1.0}
    card = read_card(str(told / "models" / "concat"))
    for name, parts in (
        ("small", {"heads": 5, "level_1": 2}),
        ("big", {"heads": 5, "level_2": 9, "level_1": 2, "fusion": 1}),
    ):
        write_card(str(told / "other" / name), card.replaced(training=make_training(num_params_by_part=parts)))
    models = {n: about | {"folder": f"other/{n}"} for n in ("big", "small")}
    models |= {"logreg:a": about | {"kind": "baseline", "folder": "baselines/s"}}
    found = about_models.parameters(str(told), make_results(models=models))
    assert found.columns == ["level_1", "level_2", "fusion", "heads"]
    assert [(r.model, r.total) for r in found.rows] == [("small", 7), ("big", 17)]


def test_a_task_of_several_classes_per_sample_has_its_table_of_classes(told, tmp_path):
    """Catches a page that fails, or draws a confusion matrix, where classes do not exclude each other."""
    run = Path(shutil.copytree(told, tmp_path / "run"))
    for path in (run / "models").glob("*/metrics.json"):
        record = storage.read_json(str(path))
        task = record["tasks"]["thing"]
        task |= {"kind": "multilabel", "confusion": None, "most_confused": [], "balanced_accuracy": None}
        task |= {"samples_f1": 0.4321, "hamming_loss": 0.1234}
        next(iter(task["per_class"].values())).update(f1=None, precision=None)
        task["intervals"]["macro_f1"] = None
        storage.write_json(str(path), record)
    page = Elements(Path(build_report(str(run))).read_text(encoding="utf-8"))
    text = text_of(page)
    assert "samples f1" in text
    assert "43.2 %" in text
    assert "subset accuracy" in text
    assert not [words for words in page.figures() if re.match(r"Confusion matrix .* on task thing", words)]


def test_curves_with_undefined_points_are_drawn():
    """Catches a rate at which no score is defined that fails the whole page."""
    points = [[0.9, 0.8, 1.0], None]
    assert curves.draw_missing_curves([0.0, 1.0], {"a": points}, points, {"a": "#000000"}).startswith("<svg")


def test_what_is_out_of_date_is_left_out_and_named(told, tmp_path):
    """Catches curves of a model that is no longer there beside the scores of the one that is."""
    run = Path(shutil.copytree(told, tmp_path / "run"))
    card = read_card(str(run / "models" / "concat"))
    write_card(str(run / "models" / "concat"), card.replaced(fingerprint="another"))
    page = Elements(Path(build_report(str(run))).read_text(encoding="utf-8"))
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert not ids & {"missing", "knowledge"}
    assert "transfer" in ids
    assert "models/concat/missing.json (run mmkt evaluate --missing again)" in text_of(page)


def issues_run(told: Path, folder: Path, about: About | None) -> Path:
    """The run with label issues that are about these features, in the audit and in suspects.parquet."""
    run = Path(shutil.copytree(told, folder))
    table = pa.table({"sample_id": ["s0"]})
    storage.write_table(str(run / "suspects.parquet"), table if about is None else with_about(table, about))
    audit = audit_of()
    audit["suspects"] |= {"about": about.to_dict()} if about else {}
    storage.write_json(str(run / "features" / "union" / "audit.json"), audit)
    return run


@pytest.mark.parametrize("others", [False, True])
def test_label_issues_of_other_features_are_left_out_and_named(told, tmp_path, others):
    """Catches rows called wrong by features that are no more, shown as the present ones; and those of present
    features left out."""
    store = open_store(str(told / "features" / "union")).manifest.fingerprint
    run = issues_run(told, tmp_path / "run", About(stores=["of other features" if others else store]))
    text = text_of(Elements(Path(build_report(str(run))).read_text(encoding="utf-8")))
    assert ("looks likebird" in text) == (not others)
    assert ("suspects.parquet (run mmkt run again)" in text) == others
    assert "Conflicting labels: 2 samples in 1 groups" in text  # they are of the store itself
    tables = results(str(run)).tables
    if others:
        with pytest.raises(DataError, match=r"suspects.parquet' is about other features.*mmkt run"):
            tables["suspects"]
    else:
        assert list(tables["suspects"].sample_id) == ["s0"]


def test_a_file_of_label_issues_alone_may_be_out_of_date(told, tmp_path):
    """Catches a page that says `all are in suspects.parquet` where the file holds the rows of other features."""
    run = issues_run(told, tmp_path / "run", None)
    current = Current(str(run), stores=frozenset({"new"}))
    assert findings.audits(current, ["features/union"])["features/union"].suspects is not None  # it does not say
    storage.write_table(
        str(run / "suspects.parquet"), with_about(pa.table({"sample_id": ["s0"]}), About(stores=["old"]))
    )
    assert findings.audits(current, ["features/union"])["features/union"].suspects is None
    assert current.left_out == [LeftOut("suspects.parquet", "mmkt run")]

"""The page in a real browser: what a reader clicks, tabs through and prints;
axe-core looks at two widths in light and dark."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from mmkt_ray import storage
from mmkt_ray.report.compared_runs import ComparisonTable, as_page
from mmkt_ray.report.page import build_report
from tests.browser import Browser
from tests.report.page_elements import HOSTILE, audit_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = importlib.util.find_spec("axe_playwright_python")  # carries axe-core's script; its own code is not used

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory) -> str:
    """The address of the page of a run whose data has problems."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("seen") / "run"))
    storage.write_json(str(run / "features" / "union" / "audit.json"), audit_of(num_suspects=6))
    return f"file://{build_report(str(run))}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(CHROMIUM, tmp_path_factory.mktemp("browser"), 1400) as found:
        yield found


def show(browser: Browser, page: str, width: int = 1400, scheme: str = "light", media: str = "screen") -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    schemes = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", media=media, features=schemes)
    browser.told.clear()
    browser.open(page)


@pytest.mark.skipif(AXE is None, reason="axe-core is not installed")
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1400, "light"), (1400, "dark")])
def test_axe_finds_nothing_serious(browser, page, width, scheme):
    """Catches faint text, boxes that only a mouse can scroll, tables without headers, pictures without words."""
    show(browser, page, width, scheme)
    browser.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    browser.evaluate(Path(AXE.submodule_search_locations[0], "axe.min.js").read_text(encoding="utf-8") + ";0")
    found = browser.evaluate("axe.run({resultTypes: ['violations']}).then(found => found.violations)")
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in serious] == []
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.errors() == []


def test_a_click_sorts_a_table_by_number_and_says_so(browser, page):
    """Catches `9` after `10`, a true minus sign that is no number,
    and an order that only sighted readers learn of."""
    show(browser, page)
    table = "document.querySelector('[aria-label^=\"Models on\"] table')"
    header = f"{table}.tHead.rows[0].cells[1]"
    rows = f"[...{table}.tBodies[0].rows].filter(row => row.cells.length > 3)"
    column = f"{rows}.map(row => parseFloat(row.cells[1].textContent))"
    browser.evaluate(f"{header}.querySelector('button').click()")
    falling = browser.evaluate(column)
    assert falling == sorted(falling, reverse=True)
    assert browser.evaluate(f"{header}.ariaSort") == "descending"
    browser.evaluate(f"{header}.querySelector('button').click()")
    assert browser.evaluate(column) == sorted(falling)
    assert len(set(falling)) > 1
    gains = f"{rows}.map(row => row.cells[3].textContent.trim().replace('\\u2212', '-'))"
    browser.evaluate(f"{table}.tHead.rows[0].cells[3].querySelector('button').click()")
    numbers = [float(g.split()[0]) for g in browser.evaluate(gains) if g[0] in "+-0"]
    assert numbers == sorted(numbers, reverse=True)
    assert min(numbers) < 0 < max(numbers)


def test_values_are_told_on_hover(browser, page):
    """Catches titles that stand beside the marks they are about, or on none."""
    show(browser, page)
    results = storage.read_json(page.removeprefix("file://").replace("index.html", "results.json"))
    script = (
        "[...document.querySelectorAll('figure title')].map(t => [t.parentNode.getBBox().width > 0, t.textContent])"
    )
    told = browser.evaluate(script)
    assert all(drawn for drawn, _ in told)
    for found in results["tasks"].values():
        row = max(found["rows"], key=lambda r: r["num_rows"])  # a figure has models of the same samples
        assert any(
            text.startswith(f"{row['model']}, Accuracy: {100 * row['accuracy']['value']:.1f} %") for _, text in told
        )
    assert any(f"{HOSTILE} taken for" in text for _, text in told)


def test_the_contents_stay_in_sight_and_lead_to_their_sections(browser, page):
    """Catches links that scroll away, or to a heading that the contents cover."""
    show(browser, page)
    browser.evaluate("document.querySelector('nav a[href=\"#data\"]').click()")
    browser.wait("document.querySelector('#data').getBoundingClientRect().top < innerHeight / 2")
    nav = "document.querySelector('nav').getBoundingClientRect()"
    assert browser.evaluate(f"{nav}.top") == 0
    assert browser.evaluate(f"document.querySelector('#data').getBoundingClientRect().top >= {nav}.bottom")


def test_what_is_collapsed_is_printed(browser, page):
    """Catches paper without the tables of classes, the config and half of the suspects."""
    show(browser, page, media="print")
    hidden = (
        "[...document.querySelectorAll('details table, details pre, details .card')].filter(e => "
        "!e.checkVisibility())"
    )
    assert browser.evaluate("document.querySelectorAll('details:not([open])').length") > 3
    assert browser.evaluate(f"{hidden}.length") == 0
    assert not browser.evaluate("document.querySelector('nav').checkVisibility()")


def test_only_boxes_that_scroll_are_stops_for_the_keyboard(browser, page):
    """Catches a table that a keyboard cannot scroll, and a page of a hundred stops where there is nothing to do."""
    for width in (1400, 390):
        show(browser, page, width)
        script = (
            "[...document.querySelectorAll('.scroll')].map(b => [b.scrollWidth > b.clientWidth, b.tabIndex === "
            "0])"
        )
        boxes = browser.evaluate(script)
        assert all(scrolls == stop for scrolls, stop in boxes)
    assert any(stop for _, stop in boxes)


def test_without_script_all_of_it_is_there(browser, page):
    """Catches a page that shows nothing where scripts are off, such as in a mail."""
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        show(browser, page)
        root = browser.call("DOM.getDocument", depth=-1)["root"]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    text = json.dumps(root)
    assert "What to ship" in text
    assert "BUTTON" not in text


def test_runs_side_by_side_are_a_page_too(browser, tmp_path):
    """Catches a second page with headers of its own that cannot be sorted."""
    rows = [("none/m", "no shared rows", ""), ("one/m", "9.0 [8.0, 10.0]", "")]
    rows += [("two/m", "10.0 [9.0, 11.0]", "better"), ("three/m", "−1.0", "worse")]
    path = tmp_path / "page.html"
    path.write_text(as_page([ComparisonTable("t", ("model", "accuracy", ""), rows)]), encoding="utf-8")
    show(browser, f"file://{path}")
    browser.evaluate("document.querySelectorAll('th button')[1].click()")
    names = browser.evaluate("[...document.querySelectorAll('tbody th')].map(cell => cell.textContent)")
    assert names == ["two/m", "one/m", "three/m", "none/m"]  # words among numbers come last
    assert browser.errors() == []

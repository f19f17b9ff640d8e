"""The page of a report in a real browser, without a network."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lqkd.cli import main

from .test_report import write_run, write_study

pytestmark = pytest.mark.slow

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    study = write_study(tmp_path_factory.mktemp("page") / "study")
    shutil.rmtree(study / "runs" / "kl" / "seed_1")
    write_run(study / "runs" / "kl" / "seed_1", 0.94, 10_000, verdict="collapsed")
    main(["report", str(study)])
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 400, "height": 800})
        opened.complaints, opened.requests = [], []
        opened.on("console", lambda message: opened.complaints.append(message.text))
        opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.on("requestfailed", lambda request: opened.complaints.append(request.url))
        opened.on("request", lambda request: opened.requests.append(request.url))
        opened.address = (study / "report.html").resolve().as_uri()
        yield opened
        browser.close()


@pytest.fixture
def page(browser_page: Any) -> Any:
    """The page of the study, opened at the width of a phone; what it complains of or asks the network is kept."""
    browser_page.complaints.clear()
    browser_page.requests.clear()
    browser_page.goto(browser_page.address)
    return browser_page


HOW_MUCH_INK = """async image => {
    const canvas = Object.assign(document.createElement("canvas"), {width: 350, height: 250});
    const context = canvas.getContext("2d");
    await image.decode();
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let colored = 0;
    for (let i = 0; i < pixels.length; i += 4) {
        const [r, g, b, a] = pixels.slice(i, i + 4);
        colored += a > 0 && Math.max(r, g, b) - Math.min(r, g, b) > 40;
    }
    return colored;
}"""


def test_the_page_renders_alone_without_complaints_and_its_plots_have_something_in_them(page: Any) -> None:
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in page.requests) == 1
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    pictures = page.query_selector_all("img")
    assert len(pictures) == 8  # values, differences, four curves, a regularizer's picture for each
    for picture in pictures:
        assert picture.evaluate(HOW_MUCH_INK) > 20, picture.get_attribute("alt")
        assert picture.bounding_box()["width"] > 250
    assert page.complaints == []


def test_the_page_is_usable_on_a_phone(page: Any) -> None:
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    wide = page.query_selector_all(".scroll")
    assert any(one.evaluate("e => e.scrollWidth > e.clientWidth") for one in wide)  # scrolled by themselves


def test_tables_are_sorted_by_their_headings_with_the_keyboard(page: Any) -> None:
    heading = page.query_selector("th:has-text('val best')")
    names = "all => all.map(one => one.textContent)"
    references = ["the teacher", "the student in float"]
    rows = page.eval_on_selector_all("section:first-child tbody th", names)
    assert rows == [*references, "task_only", "kl", "broken"]
    heading.query_selector("button").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert page.eval_on_selector_all("section:first-child tbody th", names) == [
        "kl",
        "task_only",
        *references,
        "broken",
    ]  # n/a stays last


def test_the_page_says_all_to_a_screen_reader(page: Any) -> None:
    """What the page offers to assistive technology, as the browser computes it."""
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert page.get_attribute("html", "lang") == "en"
    assert page.locator("h1").count() == 1
    assert page.get_by_role("main").count() == 1
    for table in page.get_by_role("table").all():
        assert table.locator("caption").inner_text()
        assert table.locator("thead th:not([scope=col])").count() == 0
        assert table.locator("tbody th[scope=row]").count() == table.locator("tbody tr").count()
        assert table.locator("thead th:not([aria-sort])").count() == 0
    pictures = page.get_by_role("img").all()
    assert len(pictures) == 8
    assert all(len(picture.get_attribute("alt")) > 20 for picture in pictures)
    assert page.get_by_role("region", name="Accuracy of each variant, in %").count() == 1
    assert (
        page.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size")
        == page.locator("[id]").count()
    )


BACKGROUND = "one => getComputedStyle(one).backgroundColor"


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(13, 17, 23)")])
def test_the_page_and_its_figures_follow_the_readers_colours(page: Any, scheme: str, paper: str) -> None:
    page.emulate_media(color_scheme=scheme)
    try:
        assert page.locator("body").evaluate(BACKGROUND) == paper
        corner = page.locator("#results + .grid img").first.evaluate(CORNER)
        assert f"rgb({', '.join(map(str, corner))})" == paper
        kinds = [page.locator(f".finding.{kind}").first.evaluate(BACKGROUND) for kind in ("good", "doubtful", "bad")]
        assert len(set(kinds)) == 3
        page.emulate_media(color_scheme=scheme, media="print")
        assert page.locator("body").evaluate(BACKGROUND) == "rgb(255, 255, 255)"
    finally:
        page.emulate_media(color_scheme="light", media="screen")


CORNER = """async image => {
    await image.decode();
    const canvas = Object.assign(document.createElement("canvas"), {width: 9, height: 9});
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return [...context.getImageData(1, 1, 1, 1).data].slice(0, 3);
}"""


def test_what_is_folded_is_opened_on_paper(page: Any, tmp_path: Path) -> None:
    page.pdf(path=tmp_path / "page.pdf")
    assert re.match(rb"%PDF-", (tmp_path / "page.pdf").read_bytes())
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0


def test_the_page_is_gone_through_with_the_keyboard(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None
    unseen = "all => all.filter(one => one.tabIndex < 0).length"
    assert page.eval_on_selector_all("a, button, summary, pre, .scroll", unseen) == 0

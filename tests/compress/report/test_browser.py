"""The pages of reports, opened from disk in a real browser: quiet, legible, sortable, printable."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.recipe import parse
from compress.report import render, render_comparison, render_scores

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
PAGES = ("run", "scores", "comparison")
A4 = 794 - 2 * 76
"""The width between margins of two centimetres, in CSS pixels."""

PROBES = Path(__file__).with_name("probes.js")
"""The functions that tests call in a page."""
LEGIBLE = 4.5
"""The contrast that WCAG 2 asks of text (level AA)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = next(filter(None, map(shutil.which, NAMES)), own if Path(own).exists() else None)
        if found is None:
            pytest.skip(f"needs Chromium (looked for {', '.join(NAMES)}, and for playwright's own)")
        chromium = driver.chromium.launch(executable_path=found, args=OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run_report(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a real run, and the loss of a training."""
    stages = "stages: [{gptq: {scheme: w4a16, group_size: 32}}]\ngates: {max_kl_divergence: 0.000001}"
    recipe = parse(f"{stages}\ncalibration: {{dataset: '{text}', samples: 4, sequence_length: 32}}", "small.yaml")
    report = compress.run(recipe, model=str(tiny), output=tmp_path_factory.mktemp("run") / "out")
    curve = [{"step": step, "loss": 0.5 / (step + 1), "held_out": 0.4 / (step + 1)} for step in range(12)]
    segment = {"stage": "distill", "parameters": 900, "bytes": 1800, "curve": curve, "best_step": 3, "steps": 11}
    segment |= {"tokens": 4096, "stopped_early": False}
    return report | {"segments": [segment], "parameters_before": 1000, "parameters_after": 900}


@pytest.fixture(params=PAGES)
def file(
    request: pytest.FixtureRequest, run_report: dict[str, Any], comparison: dict[str, Any], tmp_path: Path
) -> Path:
    """The page of a run, of `netsuke eval`, and of `netsuke compare`, on disk."""
    written = {
        "run": lambda: render(run_report),
        "scores": lambda: render_scores({"baseline": comparison["baseline"], **comparison["models"][0]}),
        "comparison": lambda: render_comparison(comparison),
    }
    file = tmp_path / f"{request.param}.html"
    file.write_text(written[request.param](), encoding="utf-8")
    return file


Open = Callable[..., Any]
"""Opens a file, in a window of some width and a colour scheme."""


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    with ExitStack() as stack:

        def open_page(file: Path, width: int = 1200, scheme: str = "light") -> Any:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            stack.callback(page.close)
            page.goto(file.as_uri())
            page.add_script_tag(path=PROBES)
            return page

        yield open_page


def test_a_page_asks_for_nothing_but_itself_and_complains_of_nothing(browser: Any, file: Path) -> None:
    asked, said = [], []
    with browser.new_page() as page:
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(file.as_uri(), wait_until="networkidle")
    assert (asked, said) == ([file.as_uri()], [])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(opened: Open, file: Path, scheme: str) -> None:
    contrasts = opened(file, scheme=scheme).evaluate("contrasts()")
    assert len(contrasts) > 50
    assert not [(text, contrast) for text, contrast in contrasts if contrast < LEGIBLE]


def test_light_and_dark_are_two_pictures_and_neither_is_blank(opened: Open, file: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page = opened(file, scheme=scheme)
        picture = base64.b64encode(page.screenshot(full_page=True)).decode()
        seen[scheme] = page.evaluate("source => colours(source)", f"data:image/png;base64,{picture}")
        assert seen[scheme]["colours"] > 50
        assert seen[scheme]["covered"] > 0.02
    assert seen["dark"]["red"] < 64 < 192 < seen["light"]["red"]


@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_reaches_beyond_the_screen(opened: Open, file: Path, width: int) -> None:
    page = opened(file, width)
    assert page.evaluate("outside(false)") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_is_cut_off_on_paper(opened: Open, file: Path) -> None:
    page = opened(file, A4)
    page.emulate_media(media="print")
    assert page.evaluate("outside(true)") == []


def test_folds_are_open_on_paper_and_closed_again_afterwards(opened: Open, file: Path) -> None:
    page = opened(file, scheme="dark")
    folded = "document.querySelectorAll('details:not([open])').length"
    before = page.evaluate(folded)
    page.evaluate(f"addEventListener('beforeprint', () => {{ window.onPaper = {folded}; }})")
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) > 1
    assert page.evaluate("window.onPaper") == 0 < before
    assert page.evaluate(folded) == before


def test_names_in_charts_do_not_cover_each_other(opened: Open, file: Path) -> None:
    page = opened(file)
    assert page.locator(".chart").count()
    assert page.evaluate("touching()") == []


def test_every_point_of_a_comparison_says_what_it_is(opened: Open, comparison: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(render_comparison(comparison), encoding="utf-8")
    titles = opened(file).evaluate("[...document.querySelectorAll('.chart title')].map(t => t.textContent)")
    assert "w8: 15.8 MB, KL divergence 0.0000199 ± 0.0000050" in titles


@pytest.mark.parametrize("key", [None, "Enter", "Space"])
def test_a_table_is_sorted_by_a_click_or_a_key(
    opened: Open, comparison: dict[str, Any], tmp_path: Path, key: str | None
) -> None:
    file = tmp_path / "page.html"
    file.write_text(render_comparison(comparison), encoding="utf-8")
    table = opened(file).locator("table.sortable").first

    def press(column: str) -> tuple[list[str], str | None]:
        """The names in the order that a press on the head of a column gives, and what the head says of it."""
        button, head = (table.get_by_role(role, name=column) for role in ("button", "columnheader"))
        button.press(key) if key else button.click()
        return table.locator("tbody td:first-child").all_text_contents(), head.get_attribute("aria-sort")

    names = table.locator("tbody td:first-child").all_text_contents()
    order, said = press("size")
    assert (order[0], order[-1], said) == ("original", "w2", "descending")
    order, said = press("size")
    assert (order[0], order[-1], said) == ("w2", "original", "ascending")
    assert press("model") == (sorted(names), "ascending")
    assert press("model") == (sorted(names, reverse=True), "descending")
    assert table.locator("[aria-sort]").count() == 1

"""The report in a real browser: headless Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from distcv.data.readers import Arrays
from support.report_runs import made_report

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PHONE, DESKTOP, PAPER = 360, 1100, 680  # CSS pixels; A4 less its margins is 680 wide
SCHEMES = ("light", "dark")

# Pixels of each text on the screen, SVG's by the scale of its picture.
TEXT_SIZES = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility()) continue;
    const svg = element.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    found.push([scale * parseFloat(getComputedStyle(element).fontSize), !!svg, node.data.trim()]);
  }
  return found;
}"""
# Colours of the SVG texts and lines: fill or stroke, then the page's own.
SVG_COLORS = """() => {
  const style = (element) => getComputedStyle(element);
  const texts = [...document.querySelectorAll('svg text')].map((e) => style(e).fill);
  const lines = [...document.querySelectorAll('svg [id*=line2d] path')]
    .filter((e) => !e.closest('defs') && !e.closest('[id*=xtick], [id*=ytick]')
                   && style(e).strokeOpacity == 1)
    .map((e) => style(e).stroke);
  return [new Set(texts), new Set(lines), style(document.body).backgroundColor].map(
    (found) => typeof found === 'string' ? found : [...found]);
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, mnist: Arrays) -> str:
    """A report of six runs as a file: URL."""
    made = made_report(tmp_path_factory.getbasetemp(), data_dir)
    return (made / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: "Browser", address: str, request: pytest.FixtureRequest) -> "Iterator[Page]":
    """The report, opened at a width and in a colour scheme."""
    width, scheme = getattr(request, "param", (DESKTOP, "light"))
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    page.goto(address)
    yield page
    context.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core."""
    package = pytest.importorskip("axe_playwright_python", reason="no axe-playwright-python")
    return (Path(package.__file__).parent / "axe.min.js").read_text()


@pytest.mark.slow
def test_nothing_fails_and_nothing_is_fetched(browser: "Browser", address: str) -> None:
    """Opening a report would send requests to other servers, or show broken images."""
    page = browser.new_page()  # under the page's own content security policy
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address, wait_until="networkidle")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    widths = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert len(widths) > 10 and min(widths) >= 28
    assert all(page.evaluate("[...document.images].map((image) => !!image.alt)"))
    pixelated = "[...document.images].map((image) => getComputedStyle(image).imageRendering)"
    assert "pixelated" in page.evaluate(pixelated)
    page.close()


@pytest.mark.parametrize("opened", [(PHONE, "light")], indirect=True)
def test_on_a_phone_all_text_is_readable_and_nothing_sticks_out(opened: "Page") -> None:
    """On a phone, chart labels would be too small to read, or the page would scroll sideways."""
    sizes: list[Any] = opened.evaluate(TEXT_SIZES)
    assert sum(in_svg for _, in_svg, _ in sizes) > 100
    assert min(sizes)[0] >= 11, min(sizes)
    assert opened.evaluate("document.documentElement.scrollWidth") == PHONE
    opened.evaluate("window.scrollTo(1000, 0)")
    assert opened.evaluate("window.scrollX") == 0
    places = opened.evaluate(
        "[...document.querySelectorAll('.charts figure')].map((f) => f.getBoundingClientRect().x)"
    )
    assert len(places) > 8 and len(set(places)) == 1, "charts stand one below the other"


def test_on_a_desktop_train_and_test_stand_side_by_side(opened: "Page") -> None:
    """On a desktop, a reader would have to scroll between the train chart and the test chart."""
    boxes = opened.evaluate(
        "[...document.querySelectorAll('.charts figure')].slice(0, 2).map((figure) => {"
        "const box = figure.getBoundingClientRect(); return [box.x, box.y, box.right]})"
    )
    (_, top, right), (left, other_top, _) = boxes
    assert top == other_top and right <= left


@pytest.mark.slow
@pytest.mark.parametrize(
    "opened", [(width, scheme) for width in (PHONE, DESKTOP) for scheme in SCHEMES], indirect=True
)
def test_axe_finds_no_violation(opened: "Page", axe: str) -> None:
    """Readers who use a screen reader or need high contrast could not read parts of the report."""
    opened.evaluate(axe)
    found = opened.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa']})")
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found["violations"]] == []
    assert len(found["passes"]) > 10
    assert "color-contrast" in [rule["id"] for rule in found["passes"]]


@pytest.mark.parametrize("opened", [(DESKTOP, scheme) for scheme in SCHEMES], indirect=True)
def test_charts_have_contrast_in_both_themes(opened: "Page") -> None:
    """Curves and chart labels would be hard to see in the light or the dark theme."""
    texts, lines, page = opened.evaluate(SVG_COLORS)
    assert texts and len(lines) >= 3
    assert min(contrast(color, page) for color in texts) >= 4.5
    assert min(contrast(color, page) for color in lines) >= 3, lines


@pytest.mark.slow
def test_axe_would_see_a_fault(opened: "Page", axe: str) -> None:
    """Accessibility faults would reach readers, because the test with axe could not fail."""
    opened.evaluate("document.querySelector('svg').removeAttribute('aria-label')")
    opened.evaluate("document.querySelector('h1').style.color = '#dddddd'")
    opened.evaluate(axe)
    found = opened.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa']})")
    assert {v["id"] for v in found["violations"]} == {"svg-img-alt", "color-contrast"}


@pytest.mark.parametrize("opened", [(PAPER, "dark")], indirect=True)
def test_on_paper_it_is_white_whole_and_unfolded(opened: "Page") -> None:
    """A printed report would be dark, cut off at the margin or without its recipes."""
    folded = "[...document.querySelectorAll('pre')].map((pre) => pre.checkVisibility())"
    assert not any(opened.evaluate(folded))
    opened.emulate_media(media="print")
    assert (
        opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    )
    assert all(opened.evaluate(folded))
    rights = "[...document.querySelectorAll('figure, table, pre')].map((e) => e.getBoundingClientRect().right)"  # noqa: E501
    assert max(opened.evaluate(rights)) <= PAPER
    pdf = opened.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and 3 <= pdf.count(b"/Type /Page\n") <= 12


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours `rgb(r, g, b)` by WCAG 2.1."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

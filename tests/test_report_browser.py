"""The report in a browser: offline, inert, readable, sortable, on every width and in print.

Needs Chromium on the PATH (Debian: apt-get install chromium) and the package playwright, which
drives it; nothing is downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_facts
import pytest
from embattle.audit.report import document
from embattle.audit.words import NONE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in _NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"none of {', '.join(_NAMES)} is on the PATH"
)

PHONE, TABLET, DESKTOP = 390, 768, 1280
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

Open = Callable[..., Any]


def page_of(kind: str) -> str:
    """A report with everything in it: as it is, failing with ten models, or hostile."""
    if kind == "hostile":
        facts, samples = made_facts.hostile()
    elif kind == "many":
        shares = {f"variant {i}": (0.9 - 0.01 * i, 0.2 + 0.05 * i) for i in range(9)}
        facts = made_facts.full({"standard": (0.92, 0.15), **shares}, failing=2)
        samples = made_facts.samples(10)
    else:
        facts, samples = made_facts.full(), made_facts.samples()
    histories = made_facts.histories(list(facts["models"]))
    settings = f"name: made_up\n{made_facts.EVIL[2]}\n"
    return document(facts, settings=settings, histories=histories, samples=samples)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as library:
        started = library.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a page; at the end nothing was requested but the page, nor did its policy forbid."""
    contexts: list[Any] = []
    requests: list[str] = []
    said: list[str] = []
    file = tmp_path / "report.html"

    def show(html: str, width: int = DESKTOP, **options: Any) -> Any:
        file.write_text(html, encoding="utf-8")
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(file.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    assert set(requests) <= {file.as_uri()}
    assert said == []


@pytest.mark.parametrize("kind", ["full", "many", "hostile"])
def test_no_page_scrolls_sideways(show: Open, kind: str) -> None:
    page = show(page_of(kind))
    for width in (DESKTOP, TABLET, PHONE):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # The words of charts are within the page, and no smaller than on a desktop.
        heights = page.evaluate(
            """() => [...document.querySelectorAll(".plot text")].map(text => {
              const box = text.getBoundingClientRect();
              return box.left >= 0 && box.right <= innerWidth ? box.height : -1; })"""
        )
        assert kind == "hostile" or min(heights) >= 12, (width, heights)


def test_hostile_texts_are_inert(show: Open) -> None:
    page = show(page_of("hostile"))
    assert page.title().startswith("<script>")
    assert page.evaluate("document.querySelectorAll('script').length") == 1
    assert page.evaluate("document.querySelectorAll('img, iframe, object, base, form').length") == 0
    handlers = """() => [...document.querySelectorAll("*")].flatMap(e => [...e.attributes])
      .filter(a => a.name.startsWith("on") || a.name === "style").map(a => a.name)"""
    assert page.evaluate(handlers) == []
    links = page.evaluate("[...document.links].map(a => a.getAttribute('href'))")
    assert all(link.startswith("#") for link in links)
    # Marks that turn the direction of what follows are shown, not obeyed.
    assert "\\u202e" in page.inner_text("main")
    assert "\u202e" not in page.inner_text("main")


def test_the_policy_stops_what_would_get_in(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    evil = (
        "<script>document.title = 'owned'</script><p id='bait' onclick=\"document.title='owned'\" "
        "style='color: red'>bait</p><img src='https://example.invalid/x.png'>"
    )
    file.write_text(page_of("full").replace("<header>", f"{evil}<header>", 1), encoding="utf-8")
    page = browser.new_page()
    left: list[str] = []
    page.on("requestfinished", lambda request: left.append(request.url))
    page.add_init_script(
        "window.refused = []; addEventListener('securitypolicyviolation', "
        "event => refused.push(event.effectiveDirective))"
    )
    page.goto(file.as_uri())
    page.click("#bait")
    assert page.title() == "made_up: robustness report"
    found = set(page.evaluate("refused"))
    assert {"script-src-elem", "script-src-attr", "style-src-attr", "img-src"} <= found
    assert left == [file.as_uri()]
    page.close()


# For every element with words of its own: its colour, what is behind it, and the least contrast
# that WCAG AA asks for (large words need less).
CONTRAST = """() => {
  const parse = text => {
    const n = text.match(/-?[\\d.]+(?:e-?\\d+)?/g).map(Number);
    const unit = text.startsWith("color(") ? 255 : 1;
    return [n[0] * unit, n[1] * unit, n[2] * unit, n[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const light = c => {
    const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    if (!element) return [255, 255, 255];
    const own = parse(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own : over(own, behind(element.parentElement));
  };
  return [...document.querySelectorAll("body *")].flatMap(element => {
    const words = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    const box = element.getBoundingClientRect();
    const shown = element.checkVisibility({ visibilityProperty: true }) && box.width > 1;
    if (!words || !shown || ["title", "desc", "OPTION"].includes(element.tagName)) return [];
    const style = getComputedStyle(element);
    const drawn = element.namespaceURI.endsWith("svg");
    const ground = behind(drawn ? element.closest("figure") : element);
    const ink = over(parse(drawn ? style.fill : style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    return [[element.tagName + "." + element.className, (a + .05) / (b + .05), large ? 3 : 4.5]];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_words_stand_out(show: Open, scheme: str) -> None:
    seen = 0
    for kind in ("full", "many"):
        page = show(page_of(kind), color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(13, 17, 23)") == (scheme == "dark")
        found = page.evaluate(CONTRAST)
        seen += len(found)
        assert [entry for entry in found if entry[1] < entry[2]] == []
    assert seen > 600


def test_tables_are_sorted_by_mouse_and_keyboard(show: Open) -> None:
    page = show(page_of("full"))
    table = page.locator("#every-attack-every-measure table")
    first = "#every-attack-every-measure tbody tr > :nth-child({})"

    def column(place: int) -> list[str]:
        cells: list[str] = page.locator(first.format(place)).all_inner_texts()
        return [cell.split("\n")[0] for cell in cells]

    before = column(3)
    head = table.locator("thead th").nth(2)
    head.click(position={"x": 5, "y": 30})
    assert head.get_attribute("aria-sort") == "descending"
    assert column(3) == sorted(before, key=float, reverse=True) != before
    button = head.locator("button")
    button.focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(3) == sorted(before, key=float)
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "none"
    assert column(3) == before
    # Columns without a figure in some rows: these come last, or first.
    table.locator("thead th").nth(6).locator("button").click()
    flipped = column(7)
    known = [float(cell.rstrip("%")) for cell in flipped if cell != NONE]
    assert known == sorted(known, reverse=True)
    # Texts.
    table.locator("thead th").first.locator("button").click()
    assert column(1) == sorted(column(1), key=str.lower)


def test_on_a_phone_rows_are_cards_and_can_be_sorted(show: Open) -> None:
    page = show(page_of("full"), PHONE)
    labels = page.evaluate(
        """() => [...document.querySelectorAll("#model-against-model td")].map(cell =>
          [cell.dataset.label, getComputedStyle(cell, "::before").content])"""
    )
    assert labels
    assert all(label and said == f'"{label}"' for label, said in labels)
    tops = page.evaluate(
        """() => [...document.querySelector("#model-against-model tbody tr").cells]
          .map(cell => cell.getBoundingClientRect().top)"""
    )
    assert tops == sorted(set(tops))
    order = page.locator("#model-against-model .order select").first
    order.select_option(label="standard ▲")
    shares = page.locator("#model-against-model tbody").first.locator("td:nth-child(2)")
    found = [float(text.split("%")[0]) for text in shares.all_inner_texts()]
    assert found == sorted(found)


def test_the_first_column_stays_where_a_table_is_wide(show: Open) -> None:
    page = show(page_of("many"), TABLET)
    moved = page.evaluate(
        """() => { const box = document.querySelector("#model-against-model .scroll");
          const left = element => element.getBoundingClientRect().left;
          box.scrollLeft = 200;
          return [box.scrollLeft, left(box.querySelector("tbody th")) - left(box)]; }"""
    )
    assert moved[0] == 200
    assert 0 <= moved[1] <= 2


def test_terms_are_explained_on_hover_focus_and_touch(show: Open) -> None:
    page = show(page_of("full"))
    term = page.locator("a.term", has_text="PGD-20 x2").first
    tip = page.locator("#tip")
    assert not tip.is_visible()
    term.hover()
    assert "20 steps; 2 tries" in tip.inner_text()
    page.mouse.move(0, 0)
    assert not tip.is_visible()
    page.locator("a.term", has_text="eps").first.focus()
    assert "budget" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    dangling = """[...document.links].filter(a => !document.getElementById(a.hash.slice(1)))
      .map(a => a.hash)"""
    assert page.evaluate(dangling) == []

    touched = show(page_of("full"), PHONE, has_touch=True, is_mobile=True)
    touched.locator("a.term", has_text="eps").first.tap()
    assert "budget" in touched.locator("#tip").inner_text()
    assert "#" not in touched.url


def test_print_has_everything_on_white(show: Open) -> None:
    page = show(page_of("full"), color_scheme="dark")
    settings = page.locator("details pre").last
    assert not settings.is_visible()
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = """[...document.querySelectorAll("details > :not(summary, .order)")]
      .filter(part => !part.checkVisibility() || !part.getBoundingClientRect().height).length"""
    assert page.evaluate("document.querySelectorAll('details').length") > 5
    assert page.evaluate(hidden) == 0
    assert [entry for entry in page.evaluate(CONTRAST) if entry[1] < entry[2]] == []
    assert not page.locator(".sort").first.is_visible()


def test_without_its_script_the_page_is_complete(show: Open) -> None:
    def rows(page: Any) -> list[str]:
        found: list[str] = page.locator("section, header, .headline, .tiles").all_text_contents()
        return found

    scripted, plain = show(page_of("full")), show(page_of("full"), java_script_enabled=False)
    scripted.evaluate("document.querySelectorAll('.sort, .order').forEach(made => made.remove())")
    assert rows(plain) == rows(scripted)
    assert plain.locator("button, select").count() == 0
    assert "budget" in plain.locator("a.term", has_text="eps").first.get_attribute("title")

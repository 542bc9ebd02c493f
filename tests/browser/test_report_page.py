"""The report in a real browser: loads nothing, sorts, filters, prints, and can be read by everybody."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from chromium import chromium_path, launched
from playwright.sync_api import Browser, Page
from pypdf import PdfReader

from fake_records import fake_records
from u2a.report import write_report
from u2a.run_records import Candidate, RunRecords, candidates
from u2a.types import Message, RewardRow

pytestmark = pytest.mark.skipif(chromium_path() is None, reason="no Chromium or Chrome on this machine")

COLUMNS = ["id", "kind", "weight", "gain", "se", "reward", "prompt", "answer", "reason"]
NUMBERS = ["weight", "gain", "se", "reward"]
REWARDS = (10.5, 9.25, -3.0, -20.0, 1e-05, 0.0, 100.0, 2.5)  # as text they stand in another order
LONG = "A long answer. " * 40 + "The last word is marmalade."
PAYLOADS = (
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "<svg onload=window.hit=1>",
    "<svg><script>window.hit=1</script></svg>",
    "</script><script>window.hit=1</script>",
    "</style><script>window.hit=1</script>",
    "</title><script>window.hit=1</script>",
    "</td></tr></table><iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    '"><body onload=window.hit=1>',
    "' onmouseover='window.hit=1' x='",
    '" autofocus onfocus="window.hit=1" x="',
    "<a href=javascript:window.hit=1>x</a>",
    "<details open ontoggle=window.hit=1>x</details>",
    "<video><source onerror=window.hit=1></video>",
    "<math><mtext></style><img src=x onerror=window.hit=1></mtext></math>",
    "<object data='data:text/html,<script>parent.hit=1</script>'></object>",
    "<base href='https://example.invalid/'>",
    "<meta http-equiv=refresh content='0;url=https://example.invalid/'>",
    "<form action=https://example.invalid/><button autofocus>x</button></form>",
    "<!--><img src=x onerror=window.hit=1>-->",
    "{{ 7*7 }}${7*7}<%= window.hit=1 %>",
    "\u202e\u2028<\u0000script>window.hit=1</script>",
)

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""

# Contrast as WCAG 2 defines it. The canvas composites the backgrounds of all ancestors and reads any CSS colour.
LOW_CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = new Set();
  let texts = 0;
  const measure = (element, colour, name) => {
    const under = [];
    for (let e = element; e; e = e.parentElement) under.unshift(getComputedStyle(e).backgroundColor);
    const pair = [light(paint(under)), light(paint([...under, colour]))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    texts += 1;
    if (ratio < 4.5) found.add(`${name} ${element.className.baseVal ?? element.className} ${ratio.toFixed(2)}`);
  };
  document.querySelectorAll("details").forEach((e) => { e.open = true; });
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    if (!walker.currentNode.data.trim() || ["SCRIPT", "TITLE", "title"].includes(element.tagName)) continue;
    measure(element, element.closest("svg") ? style.fill : style.color, element.tagName);
  }
  const box = document.getElementById("filter");
  measure(box, getComputedStyle(box, "::placeholder").color, "placeholder");
  return { texts, found: [...found].sort() };
}"""


@dataclass
class Seen:
    """A page, and what it did."""

    page: Page
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Browser, report: Path, **options: object) -> Iterator[Seen]:
    context = browser.new_context(**options)  # type: ignore[arg-type]
    context.set_offline(True)
    seen = Seen(context.new_page())
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.on("console", lambda message: seen.messages.append(message.text))
    seen.page.on("pageerror", lambda error: seen.messages.append(str(error)))
    seen.page.add_init_script(WATCH)
    seen.page.goto(report.as_uri())
    yield seen
    context.close()


def told_apart(n: int) -> RunRecords:
    """Records whose rewards sort otherwise as text, some missing, and with one long answer."""
    records = fake_records(n)
    assert records.rewards is not None
    forget = (records.partition.forget[0].model_copy(update={"completion": LONG}), *records.partition.forget[1:])
    rewards = tuple(
        RewardRow(id=row.id, reward=REWARDS[index % 8] + index / 1000, kept=True)
        for index, row in enumerate(forget)
        if index % 5
    )
    return replace(
        records,
        partition=records.partition.model_copy(update={"forget": forget}),
        rewards=records.rewards.model_copy(update={"rows": rewards}),
    )


def with_texts(texts: list[str]) -> RunRecords:
    """Records with one candidate per text, which is its prompt, its answer and its kind."""
    records = fake_records(len(texts))
    forget = tuple(
        row.model_copy(update={"prompt": (Message(role="user", content=text),), "completion": text, "kind": text})
        for row, text in zip(records.partition.forget, texts, strict=True)
    )
    return replace(records, partition=records.partition.model_copy(update={"forget": forget}))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as started:
        yield started


@pytest.fixture(scope="module")
def table() -> list[Candidate]:
    return candidates(told_apart(60))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(told_apart(60), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    with opened(browser, report) as seen:
        yield seen.page


def ids(page: Page) -> list[str]:
    """Ids of the visible rows, in order."""
    return page.eval_on_selector_all(
        "#candidates tbody tr:not([hidden]) td.id", "cells => cells.map(c => c.textContent)"
    )


def aria_sort(page: Page) -> dict[str, str | None]:
    return page.eval_on_selector_all(
        "#candidates th", "heads => Object.fromEntries(heads.map(h => [h.textContent, h.getAttribute('aria-sort')]))"
    )


# --- what leaves the page, and what may run on it -------------------------------------------------------------


def test_nothing_is_requested_and_nothing_complains(browser: Browser, report: Path) -> None:
    with opened(browser, report) as seen:
        seen.page.locator("#candidates th button").first.click()
        seen.page.fill("#filter", "case")
        seen.page.wait_for_timeout(200)
        assert seen.requests == [report.as_uri()]
        assert seen.messages == []
        assert seen.page.evaluate("window.violations") == []


def test_the_policy_is_in_force(browser: Browser, report: Path) -> None:
    with opened(browser, report) as seen:
        seen.page.evaluate(
            """() => { const add = (tag, set) => document.body.append(Object.assign(document.createElement(tag), set));
            add("script", { textContent: "window.hit = 1" }); add("style", { textContent: "body { opacity: 0 }" });
            add("img", { src: "https://example.invalid/x.png" }); }"""
        )
        assert seen.page.evaluate("fetch('https://example.invalid/').then(() => 'sent', () => 'refused')") == "refused"
        seen.page.wait_for_function("window.violations.length >= 4")
        found = set(seen.page.evaluate("window.violations"))
        assert found == {"script-src-elem", "style-src-elem", "img-src", "connect-src"}
        assert seen.page.evaluate("window.hit") is None


@pytest.mark.parametrize("placed", ["everywhere", "everywhere, reversed", "one to a row"])
def test_hostile_texts_run_nothing_and_add_nothing(browser: Browser, tmp_path: Path, placed: str) -> None:
    found = []
    hostile = list(PAYLOADS[::-1] if placed.endswith("reversed") else PAYLOADS)
    tame = [chr(ord("a") + index) * len(text) for index, text in enumerate(hostile)]
    for name, texts in (("tame", tame), ("hostile", hostile)):
        records = with_texts(texts) if placed == "one to a row" else fake_records(4, " ".join(texts))
        path = write_report(records, tmp_path / f"{name}.html")
        with opened(browser, path) as seen:
            seen.page.keyboard.press("Tab")
            found.append(seen.page.evaluate("document.querySelectorAll('*').length"))
            assert seen.page.evaluate("window.hit") is None
            assert seen.requests == [path.as_uri()]
            assert seen.messages == []
            assert seen.page.evaluate("window.violations") == []
    assert found[0] == found[1]


# --- the table -----------------------------------------------------------------------------------------------


def test_rows_come_by_weight_then_gain(page: Page, table: list[Candidate]) -> None:
    assert ids(page) == [row.id for row in table]
    assert set(aria_sort(page).values()) == {None}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_sort_as_numbers_both_ways_with_missing_ones_last(
    page: Page, table: list[Candidate], name: str
) -> None:
    values = {row.id: getattr(row, name) for row in table}
    known = [value for value in values.values() if value is not None]
    missing = [None] * (len(values) - len(known))
    assert bool(missing) == (name == "reward")
    for order, reverse in (("descending", True), ("ascending", False), ("descending", True)):  # the largest first
        page.get_by_role("button", name=name).click()
        assert [values[key] for key in ids(page)] == sorted(known, reverse=reverse) + missing
        assert aria_sort(page) == {other: order if other == name else "none" for other in COLUMNS}


@pytest.mark.parametrize("name", [name for name in COLUMNS if name not in NUMBERS])
def test_words_sort_both_ways(page: Page, table: list[Candidate], name: str) -> None:
    values = {row.id: getattr(row, name) or "-" for row in table}
    button = page.get_by_role("button", name=name)
    button.click()
    up = [values[key] for key in ids(page)]
    assert up == page.evaluate("words => words.sort(new Intl.Collator('en').compare)", list(values.values()))
    if name in ("id", "kind"):  # lower-case letters and digits: the collation is that of the code points
        assert up == sorted(values.values())
    button.click()
    assert [values[key] for key in ids(page)] == up[::-1]


def test_filter_needs_every_word_in_any_column(page: Page, table: list[Candidate]) -> None:
    texts = {row.id: " ".join((row.id, row.kind or "-", row.prompt, row.answer, row.reason)).lower() for row in table}
    for words in ("insult", "STAIN privacy", "vaccines (case", "no such thing", ""):
        page.fill("#filter", words)
        expected = [key for key, text in texts.items() if all(word in text for word in words.lower().split())]
        assert ids(page) == expected, words
        assert page.locator("#count").text_content() == f"{len(expected)} of 60 rows"
    assert len(ids(page)) == 60


def test_selected_only_joins_with_the_words_and_survives_sorting(page: Page, table: list[Candidate]) -> None:
    chosen = [row.id for row in table if row.weight]
    assert 0 < len(chosen) < 60
    page.get_by_label("selected only").check()
    assert ids(page) == chosen
    page.fill("#filter", "insult")
    assert ids(page) == [row.id for row in table if row.weight and row.kind == "insult"]
    page.get_by_role("button", name="id").click()
    assert ids(page) == sorted(row.id for row in table if row.weight and row.kind == "insult")
    page.fill("#filter", "")
    page.get_by_label("selected only").uncheck()
    assert ids(page) == sorted(row.id for row in table)


def test_a_long_table_shows_its_first_rows_until_asked(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, write_report(fake_records(450), tmp_path / "long.html")) as seen:
        visible = "() => [...document.querySelectorAll('#candidates tbody tr')].filter(e => e.checkVisibility()).length"
        count, more = seen.page.locator("#count"), seen.page.get_by_role("button", name="show all")
        assert (seen.page.evaluate(visible), count.text_content()) == (200, "450 of 450 rows, the first 200 shown")
        seen.page.fill("#filter", "insult")  # a third of them, among the rows that were not shown, too
        assert (seen.page.evaluate(visible), count.text_content()) == (150, "150 of 450 rows")
        assert not more.is_visible()
        seen.page.fill("#filter", "")
        seen.page.get_by_role("button", name="id").click()
        assert seen.page.evaluate(visible) == 200
        more.click()
        assert (seen.page.evaluate(visible), count.text_content()) == (450, "450 of 450 rows")
        assert not more.is_visible()


def test_five_thousand_candidates_take_no_two_seconds(browser: Browser, tmp_path: Path) -> None:
    report = write_report(fake_records(5000), tmp_path / "large.html")
    with opened(browser, write_report(fake_records(4), tmp_path / "small.html")) as seen:
        devtools = seen.page.context.new_cdp_session(seen.page)
        # Processor time of the page's thread, which other processes on the machine do not lengthen.
        devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

        def spent() -> float:
            seen.page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
            metrics = devtools.send("Performance.getMetrics")["metrics"]
            return next(item["value"] for item in metrics if item["name"] == "TaskDuration")

        times = [spent()]
        for act in (
            lambda: seen.page.goto(report.as_uri()),
            lambda: seen.page.get_by_role("button", name="gain").click(),
            lambda: seen.page.fill("#filter", "insult"),
        ):
            act()
            times.append(spent())
        assert seen.page.locator("#count").text_content() == "1667 of 5000 rows, the first 200 shown"
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(0.01 < each < 2.0 for each in seconds), seconds


def test_without_scripts_every_row_can_be_read(browser: Browser, report: Path, table: list[Candidate]) -> None:
    with opened(browser, report, java_script_enabled=False) as seen:
        rows = seen.page.locator("#candidates tbody tr")
        assert rows.count() == 60
        assert all(row.is_visible() for row in rows.all())
        assert seen.page.locator("#candidates th").all_text_contents() == COLUMNS
        assert not seen.page.locator("#tools").is_visible()


# --- who reads it, and where ---------------------------------------------------------------------------------


def test_plots_are_drawn_and_named(page: Page) -> None:
    plots = page.locator("svg.chart").all()
    assert len(plots) == 8
    for plot in plots:
        box = plot.bounding_box()
        assert box is not None
        assert box["width"] > 300 and box["height"] > 80
        title = plot.evaluate("svg => svg.querySelector('title').textContent")
        assert len(title) > 10
        assert page.get_by_role("img", name=title, exact=True).count() == 1
        assert plot.evaluate("svg => [...svg.querySelectorAll('path, rect')].some(p => p.getBBox().width > 50)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(browser: Browser, report: Path, scheme: str) -> None:
    with opened(browser, report, color_scheme=scheme) as seen:
        measured = seen.page.evaluate(LOW_CONTRAST)
        assert measured["found"] == []
        assert measured["texts"] > 500
        ground = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, ground[4:-1].split(","))) < 60) == (scheme == "dark")
        seen.page.evaluate("document.documentElement.style.setProperty('--soft', 'var(--page)')")
        assert seen.page.evaluate(LOW_CONTRAST)["found"]  # the measurement sees what it looks for


def test_the_keyboard_reaches_and_works_everything(page: Page, table: list[Candidate]) -> None:
    order, outlines = [], []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
            return [e.id || e.textContent, s.outlineStyle === "none" ? 0 : parseFloat(s.outlineWidth)]; }"""
        )
        order.append(name)
        outlines.append(outline)
        if name == "reason":
            break
    start = order.index("filter")
    assert order[start : start + 2] == ["filter", "only"]
    assert order[start + 3 :] == COLUMNS  # between them the region that scrolls
    assert min(outlines) >= 2
    for _ in range(5):  # from reason back to gain
        page.keyboard.press("Shift+Tab")
    gains = sorted((row.gain for row in table if row.gain is not None), reverse=True)
    for key, order_now, expected in (("Enter", "descending", gains), ("Space", "ascending", gains[::-1])):
        page.keyboard.press(key)
        assert aria_sort(page)["gain"] == order_now
        values = {row.id: row.gain for row in table}
        assert [values[name] for name in ids(page)] == expected
    page.focus("#filter")
    page.keyboard.type("insult")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert ids(page)
    assert set(ids(page)) == {row.id for row in table if row.weight and row.kind == "insult"}


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_never_scrolls_sideways(browser: Browser, report: Path, width: int) -> None:
    with opened(browser, report, viewport={"width": width, "height": 800}) as seen:
        seen.page.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
        assert seen.page.evaluate("document.documentElement.scrollWidth") == width
        outside = """width => [...document.querySelectorAll("header *, h2, h3, p, dl, .box, .scroll, figure, #tools *")]
          .filter((e) => e.getBoundingClientRect().right > width).map((e) => e.outerHTML.slice(0, 80))"""
        assert seen.page.evaluate(outside, width) == []


def test_paper_holds_everything(browser: Browser, report: Path, table: list[Candidate]) -> None:
    with opened(browser, report, color_scheme="dark") as seen:
        data = seen.page.pdf(format="A4")
        pages = ["".join(page.extract_text().split()) for page in PdfReader(io.BytesIO(data)).pages]
        text = "".join(pages)
        assert [row.id for row in table if row.id not in text] == []
        assert "Thelastwordismarmalade." in text  # folded on the screen
        assert "option" in text and "solve.cg_tol" in text  # so is the list of all options
        holding = [page for page in pages if any(row.id in page for row in table)]
        assert len(holding) > 2
        assert all("idkindweightgainserewardpromptanswerreason" in page for page in holding)
        seen.page.emulate_media(media="print")
        seen.page.set_viewport_size({"width": 688, "height": 900})  # A4 within its margins
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 688
        assert seen.page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 33, 38)"  # dark ink, light paper

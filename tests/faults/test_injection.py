"""Text of users and models in pages, Markdown and tables: shown as text, never read as markup or formula."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fake_records import fake_records
from u2a.compare import Comparison, comparison_html, comparison_markdown
from u2a.config import RunConfig
from u2a.model_card import model_card
from u2a.report import render_report
from u2a.robustness.table import RobustnessTable
from u2a.run_records import RunRecords
from u2a.types import Agreement, Contrast, Leak, Metric, RewardCard

from .cases import MARKDOWN, XSS

SOURCE = Path(__file__).resolve().parents[2] / "src" / "u2a"


class Page(HTMLParser):
    """Counts every element with its attributes and their values, every comment and declaration; collects the text."""

    def __init__(self, text: str, payload: str) -> None:
        super().__init__(convert_charrefs=True)
        self.payload = payload
        self.parts: Counter[tuple[Any, ...]] = Counter()
        self.order: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def _named(self, value: str | None) -> str | None:
        """The value with the payload, whole or cut off, replaced by a word."""
        return None if value is None else value.replace(self.payload, "TEXT")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts[tag, tuple(sorted((name, self._named(value)) for name, value in attrs))] += 1
        self.order.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        self.parts["/", tag] += 1

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.parts["comment", data] += 1

    def handle_decl(self, decl: str) -> None:
        self.parts["declaration", decl] += 1

    def unknown_decl(self, data: str) -> None:
        self.parts["declaration", data] += 1

    def handle_pi(self, data: str) -> None:
        self.parts["instruction", data] += 1


def harmless(payload: str) -> str:
    """A text of the same length without any character that means something."""
    return "x" * len(payload)


def records(text: str) -> RunRecords:
    """Records in which a text stands in every place that a user, a model or a file name can fill."""
    made = fake_records(4, text)
    table, partition, solution = made.evaluation, made.partition, made.solution
    assert table is not None and solution is not None
    metric = Metric(value=0.5, low=0.4, high=0.6, n=5, note=text)
    arms = {**table.arms, text: {**table.arms["after"], text: metric}}
    card = RewardCard(name=text, n_train=3, pair_accuracy=0.7, pair_accuracy_low=0.6, pair_accuracy_high=0.8, n_pairs=9)
    agreement = Agreement(first=text, second=text, over=text, spearman=metric, kendall=metric, n_ranked=3)
    table = table.model_copy(
        update={
            "arms": arms,
            "contrasts": (*table.contrasts, Contrast(metric=text, first=text, second=text, difference=0.1, n=5)),
            "samples": tuple(
                item.model_copy(update={"answers": {**item.answers, text: text}, "rewards": {text: 0.5}})
                for item in table.samples
            ),
            "reward_card": card,
            "second_reward_card": card,
            "agreements": (agreement,),
            "collapsed": {text: text},
        }
    )
    number = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 5}
    row = {"condition": text, "kind": "prompt", "metric": text, "arms": {text: number, "o": number}}
    row |= {"gaps": {text: number, "o": number}, "excess": {text: number}, "recovery": {text: number}}
    attacked = RobustnessTable.model_validate({"arms": (text, "o"), "original": "o", "rows": (row,)})
    leak = Leak(first=text, second=text, level="text", count=2, examples=(text,))
    names = {"objective": text, "loss": text, "adjoint": text, "scorer": text, "estimator": text}
    options = made.config.model_dump(mode="json")
    options["data"] |= {"forget": text, "system_prompt": text, "fields": {"prompt": text}}
    options["model"]["adapter"]["target_modules"] = [text]
    options["evaluation"]["prompt_sets"] = [{"name": text.replace("/", "|"), "path": text}]
    results = {arm: result.model_copy(update={"loss": text}) for arm, result in made.unlearn.items()}
    return replace(
        made,
        config=RunConfig.model_validate(options),
        partition=partition.model_copy(
            update={"leaks": (leak,), "dropped": {text: 3}, "fingerprint": text, "retain": partition.retain[:3]}
        ),
        solution=solution.model_copy(update={"stopped": text, "scores": solution.scores.model_copy(update=names)}),
        unlearn={**results, text: results["u2a"].model_copy(update={"arm": text, "breached": True})},
        evaluation=table,
        robustness=attacked,
        summary={
            **made.summary,
            "seconds": {text: 3.0, "solve": 5.0},
            "provenance": {text: {text: text}, "versions": {text: text}},
            text: [text, {text: text}],
        },
    )


def comparison(text: str) -> Comparison:
    metric = Metric(value=0.5, low=0.4, high=0.6, n=5, note=text)
    runs = (text, f"{text} again", "plain")
    return Comparison(
        arm=text,
        runs=runs,
        metrics={run: {text: metric, "reward": metric} for run in runs},
        contrasts=(Contrast(metric=text, first=runs[1], second=text, difference=0.1, low=0.05, high=0.2, n=5),),
        verdicts=dict.fromkeys(runs, text),
    )


@cache
def harmless_report(length: int) -> Counter[tuple[Any, ...]]:
    return Page(render_report(records("x" * length)), "x" * length).parts


# --- HTML ----------------------------------------------------------------------------------------------


def test_there_are_enough_payloads_and_most_would_work() -> None:
    """In a page that escapes nothing, the parser sees what they add."""
    assert len(XSS) >= 20 and len(set(XSS)) == len(XSS)
    plain = Page("<p title='x'>x</p>", "x").parts.total()
    works = [
        payload
        for payload in XSS
        if Page(f"<p title='{payload}'>{payload}</p>", payload).parts
        != Page(f"<p title='{harmless(payload)}'>{harmless(payload)}</p>", harmless(payload)).parts
    ]
    assert plain == 2
    assert len(works) >= 20, set(XSS) - set(works)


@pytest.mark.parametrize("payload", XSS)
def test_a_report_has_the_elements_of_a_harmless_one(payload: str) -> None:
    payload = payload.ljust(70, "y")  # of few lengths, so that few harmless pages are needed
    text = render_report(records(payload))
    assert (page := Page(text, payload)).parts == harmless_report(len(payload))
    shown = payload.replace("\0", "\ufffd")
    assert page.text.count(payload) + page.text.count(shown) >= 25, "the text is shown as it is"
    check_policy(page, scripts=1)


@pytest.mark.parametrize("payload", XSS)
def test_a_comparison_has_the_elements_of_a_harmless_one(payload: str) -> None:
    text = comparison_html(comparison(payload))
    page, other = Page(text, payload), Page(comparison_html(comparison(harmless(payload))), harmless(payload))
    assert page.parts == other.parts
    assert page.text.count("7 * 7") == page.text.count("{{ 7 * 7 }}"), "no template is run"
    check_policy(page, scripts=0)


def check_policy(page: Page, scripts: int) -> None:
    """The content security policy stands before all it governs, allows nothing from outside and no inline script."""
    tags = [tag for tag, _ in page.order]
    policies = [
        (index, attrs["content"] or "")
        for index, (tag, attrs) in enumerate(page.order)
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    ((index, policy),) = policies
    governed = [place for place, tag in enumerate(tags) if tag in ("style", "script", "body", "link", "img")]
    assert index < min(governed)
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    for name, sources in rules.items():
        assert not any("http" in source or source in ("*", "data:", "'unsafe-eval'") for source in sources), policy
        assert name == "style-src" or "'unsafe-inline'" not in sources
    assert tags.count("script") == scripts
    assert not any(name.startswith("on") for _, attrs in page.order for name in attrs)
    addresses = [attrs[name] for _, attrs in page.order for name in ("href", "src", "action") if attrs.get(name)]
    assert all(address is not None and address.startswith("#") for address in addresses)


def test_every_template_escapes_by_default_and_marks_nothing_safe() -> None:
    templates = sorted((SOURCE / "assets").rglob("*.j2"))
    assert [path.name for path in templates] == ["compare.html.j2", "report.html.j2"]
    for path in templates:
        text = path.read_text(encoding="utf-8")
        assert "|safe" not in text.replace(" ", "") and "autoescape false" not in text
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("Environment(\n") == text.count("autoescape=True"), path
        if "Markup(" in text:
            assert path.name == "report.py", "only drawings made of numbers are marked safe"


# --- Markdown --------------------------------------------------------------------------------------------


def tables(text: str) -> list[list[int]]:
    """Cells per row of every Markdown table: pipes that are not escaped."""
    found: list[list[int]] = [[]]
    for line in text.split("\n"):
        if line.startswith("|"):
            found[-1].append(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) - 1)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def skeleton(text: str) -> list[str]:
    """What begins each line, as Markdown reads it."""
    starts = []
    for line in text.split("\n"):
        match = re.match(r"\s*(#+ |- |\* |\d+\. |> |\||```|---+$|$)", line)
        starts.append(match[1] if match else "text")
    return starts


@pytest.mark.parametrize("payload", [*MARKDOWN, *XSS])
def test_a_model_card_keeps_its_shape(payload: str) -> None:
    card, other = (model_card(records(text), text) for text in (payload, harmless(payload)))
    body, plain = (text[text.index("\n---\n", 4) :] for text in (card, other))
    assert tables(body) == tables(plain)
    assert all(len(set(table)) == 1 for table in tables(body))
    assert skeleton(body) == skeleton(plain)
    outside = re.sub(r"```python.*?```|(?<!\\)`[^`\n]*`", "", body, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<[a-zA-Z/!]", outside), "no HTML"
    assert not re.search(r"(?<!\\)\]\(", outside), "no link"
    assert [type(node) for node in ast.parse(_code(body)).body] == [type(node) for node in ast.parse(_code(plain)).body]


def _code(card: str) -> str:
    return card.split("```python\n")[1].split("\n```")[0]


@pytest.mark.parametrize("payload", [*MARKDOWN, *XSS])
def test_a_comparison_in_markdown_keeps_its_tables(payload: str) -> None:
    text, plain = (comparison_markdown(comparison(item)) for item in (payload, harmless(payload)))
    assert tables(text) == tables(plain) == [[4, 4, 4, 4], [6, 6, 6]]
    assert skeleton(text) == skeleton(plain)


def test_a_comparison_in_markdown_holds_no_markup() -> None:
    for payload in (*MARKDOWN, *XSS):
        text = re.sub(r"(?<!\\)`[^`\n]*`", "", comparison_markdown(comparison(payload)))
        assert not re.search(r"(?<!\\)<[a-zA-Z/!]", text), payload
        assert not re.search(r"(?<!\\)\]\(", text), payload


# --- CSV -------------------------------------------------------------------------------------------------


def test_one_module_alone_writes_csv() -> None:
    """A spreadsheet runs cells that begin with = + - or @: only the module whose tests show it to neutralise them."""
    writes = re.compile(r"csv\.(writer|DictWriter)|\.to_csv\(|write_csv\(")
    assert writes.search("csv.writer(file)")
    found = [path.name for path in SOURCE.rglob("*.py") if writes.search(path.read_text(encoding="utf-8"))]
    assert found == ["candidates_csv.py"]

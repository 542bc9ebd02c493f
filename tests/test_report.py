"""The HTML report: self-contained, escaped, and showing what the records hold."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from fake_records import empty_records, fake_partition, fake_records, fake_reliability
from tiny import examples
from u2a import report
from u2a.console import interval, metric_scale, number
from u2a.errors import RecordError
from u2a.record import Record
from u2a.report import RunRecords, render_report, write_report
from u2a.run_records import candidates, cautions, flattened, option_rows, what_was_done
from u2a.types import Partition

EVIL = "</td></style></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}{% raw %}javascript:"
VOID = {"meta", "input", "br", "wbr"}


class Page(HTMLParser):
    """Collects tags, attributes, text and table rows; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self.tables: dict[str, list[list[str]]] = {}
        self.table: list[list[str]] | None = None
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = self.tables.setdefault(dict(attrs).get("id") or "", [])
        elif tag == "tr" and self.table is not None:
            self.table.append([])
        elif tag in ("td", "th") and self.table is not None:
            self.table[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag
        if tag == "table":
            self.table = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)
            return
        self.text += data
        if self.table and self.table[-1]:
            self.table[-1][-1] += data


def cells(page: Page, table: str) -> list[list[str]]:
    return [[" ".join(cell.split()) for cell in row] for row in page.tables[table]]


def structure(page: Page) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag, tuple(sorted(attrs))) for tag, attrs in page.tags]


@pytest.fixture(scope="module")
def full() -> Page:
    return Page(render_report(fake_records()))


def test_nothing_is_loaded_from_anywhere() -> None:
    text = render_report(fake_records())
    assert not re.search(r"https?://|//[a-z]|url\(|@import|\bsrc=", text.replace('"use strict"', ""), re.IGNORECASE)
    for tag, attrs in Page(text).tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") or name in {"src", "style", "xlink:href"} for name in attrs)
        assert str(attrs.get("href", "#")).startswith("#")


def test_policy_allows_exactly_the_style_and_the_script(full: Page) -> None:
    policy = next(attrs["content"] or "" for _, attrs in full.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256("".join(full.raw[kind]).encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert [tag for tag, _ in full.tags].count("script") == 1
    assert [tag for tag, _ in full.tags].count("style") == 1


def test_section_links_have_targets(full: Page) -> None:
    ids = [attrs["id"] for _, attrs in full.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {str(attrs["href"])[1:] for tag, attrs in full.tags if tag == "a"}
    assert len(links) == 12
    assert links <= set(ids)


def test_hostile_text_adds_no_element_and_no_attribute() -> None:
    plain = "p" * len(EVIL)
    hostile, tame = Page(render_report(fake_records(12, EVIL))), Page(render_report(fake_records(12, plain)))
    assert structure(hostile) == structure(tame)
    assert EVIL in hostile.text
    assert "49{%" not in hostile.text


def test_hostile_text_cannot_close_the_drawings() -> None:
    svgs = re.findall(r"<svg.*?</svg>", render_report(fake_records(12, EVIL)), re.DOTALL)
    assert svgs
    assert any("&lt;script&gt;" in svg for svg in svgs)
    assert not any("<script" in svg or "<img" in svg for svg in svgs)


def test_metrics_equal_the_record(full: Page) -> None:
    table = fake_records().evaluation
    assert table is not None
    rows = cells(full, "metrics")
    assert rows[0] == ["metric", *table.arms]
    assert [row[0] for row in rows[1:]] == [
        "preference_margin ↑",
        "reward ↑",
        "retain_ppl ↓",
        "answer_words",
        "degenerate_rate ↓",
    ]
    for row in rows[1:]:
        name = row[0].split()[0]
        alike = metric_scale(table, name)
        for arm, cell in zip(table.arms, row[1:], strict=True):
            metric = table.arms[arm][name]
            shown = "undefined" if metric.value is None else number(metric.value, *alike)
            ends = interval(metric.low, metric.high, *alike)
            assert cell == " ".join(f"{shown} {ends} n = {metric.n}".split())
            if metric.value is not None:
                assert float(cell.split("[")[0]) == pytest.approx(metric.value, rel=0.005)


def test_contrasts_equal_the_record(full: Page) -> None:
    rows = cells(full, "contrasts")[1:]
    assert rows[0][:4] == ["preference_margin", "after − before", "+0.093", "[0.051, 0.134]"]
    assert [row[-1] for row in rows] == ["better", "not shown", "worse", "-"]
    assert "interval excludes 0 and flipping the signs of whole prompts gives p ≤ 0.05" in full.text


def test_every_candidate_stands_in_the_table_with_its_numbers(full: Page) -> None:
    records = fake_records()
    assert records.solution is not None
    rows = {row[0]: row for row in cells(full, "candidates")[1:]}
    assert set(rows) == {item.id for item in records.partition.forget}
    gains = {row.id: row.gain for row in records.solution.scores.rows}
    for key, row in rows.items():
        assert float(row[2]) == pytest.approx(records.solution.weights.get(key, 0.0), abs=5e-5)
        assert float(row[3]) == pytest.approx(gains[key], abs=5e-5)
    shown = [row[0] for row in cells(full, "candidates")[1:]]
    assert shown[: len(records.solution.weights)] == sorted(
        records.solution.weights, key=lambda key: -records.solution.weights[key]  # type: ignore[union-attr]
    )  # fmt: skip


def test_sort_keys_are_the_exact_numbers() -> None:
    records = fake_records()
    page = Page(render_report(records))
    keys = [attrs["data-v"] for _, attrs in page.tags if "data-v" in attrs]
    expected = [str(value) for c in candidates(records) for value in (c.weight, c.gain, c.se, c.reward)]
    assert keys == expected


def test_long_tables_and_texts_are_cut_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_ROWS", 10)
    page = Page(render_report(fake_records(25)))
    assert len(page.tables["candidates"]) == 11
    assert "10 of 25 shown" in page.text
    monkeypatch.setattr(report, "MAX_CHARS", 200)
    assert "[... 680 more characters]" in Page(render_report(fake_records(5, "y" * 1000))).text


def test_full_text_of_a_long_answer_is_kept() -> None:
    answer = " ".join(f"word{index}" for index in range(200))
    records = fake_records(1)
    item = records.partition.forget[0].model_copy(update={"completion": answer})
    records = replace(records, partition=records.partition.model_copy(update={"forget": (item,)}))
    cell = cells(Page(render_report(records)), "candidates")[1][7]
    assert cell.replace("…", "") == answer


def test_samples_beyond_the_first_few_are_folded() -> None:
    records = fake_records(6)
    section = records.config.evaluation.model_copy(update={"samples_shown": 1})
    few = replace(records, config=records.config.model_copy(update={"evaluation": section}))
    assert "2 more" in Page(render_report(few)).text
    assert records.evaluation is not None
    text = Page(render_report(few)).text
    assert all(answer in text for sample in records.evaluation.samples for answer in sample.answers.values())


def test_same_records_same_page() -> None:
    assert render_report(fake_records()) == render_report(fake_records())


def test_empty_sections_say_so_and_draw_nothing() -> None:
    page = Page(render_report(empty_records()))
    assert not any(tag == "svg" for tag, _ in page.tags)
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert len(sections) == 12
    lines = [attrs for tag, attrs in page.tags if tag == "p" and attrs.get("class") == "nothing"]
    assert len(lines) == 15
    assert "not evaluated" in page.text


@pytest.mark.parametrize("missing", ["rewards", "scores", "solution", "evaluation"])
def test_any_stage_may_be_missing(missing: str) -> None:
    page = Page(render_report(replace(fake_records(6), **{missing: None})))
    assert len(page.tables["candidates"]) == 7


def test_scores_without_solution_are_shown() -> None:
    page = Page(render_report(replace(fake_records(6), solution=None, unlearn={}, evaluation=None)))
    assert "Can the choice be trusted?" in page.text
    assert "split-half rank correlation" in page.text
    assert "none selected yet" in page.text


def test_cautions_name_what_went_wrong() -> None:
    found = " ".join(cautions(fake_records()))
    assert "Arm full exceeded the utility budget: its change was scaled by 0.750." in found
    assert "2 rows of retain stand in preference too" in found
    assert "1 of 2 linear solves" in found
    assert cautions(empty_records()) == []


@pytest.mark.parametrize(("prompts", "own", "said"), [(4, 0, True), (5, 0, False), (4, 3, False)])
def test_retain_rows_on_few_prompts_are_said_to_do_everything(prompts: int, own: int, said: bool) -> None:
    rows = tuple(row.model_copy(update={"id": f"{k}-{row.id}"}) for row in examples(prompts) for k in range(50))
    records = replace(empty_records(), partition=Partition(retain=rows, retain_measured=examples(own, start=40)))
    parts = records.partition.retain_parts()
    assert (parts.train == parts.guard == parts.evaluation) == said
    assert ("the same ones train, guard and evaluate" in " ".join(cautions(records))) == said


def test_what_was_done_counts_from_the_records() -> None:
    assert what_was_done(fake_records()).startswith("20 of 60 candidates selected")
    assert "14.21 to 15.20" in what_was_done(fake_records())


@pytest.mark.parametrize(
    ("fallback", "opening"),
    [("random_k", "20 of 60 candidates drawn at random, with equal weights"), ("empty", "None of 60 candidates")],
)
def test_a_random_draw_or_nothing_is_not_called_a_selection(fallback: str, opening: str) -> None:
    records = fake_records()
    assert records.solution
    solution = records.solution.model_copy(update={"fallback": fallback})
    if fallback == "empty":
        rows = tuple(row.model_copy(update={"weight": 0.0}) for row in solution.rows)
        solution, unlearn = solution.model_copy(update={"rows": rows}), {}
    else:
        unlearn = records.unlearn
    found = replace(records, solution=solution, unlearn=unlearn)
    said = what_was_done(found)
    assert said.startswith(opening) and "selected and weighted" not in said
    assert ("then unlearned with" in said) is (fallback == "random_k") and "not unlearned yet" not in said
    assert said in render_report(found)


def test_one_fold_is_not_called_an_arbitrary_choice() -> None:
    records = fake_records()
    assert records.solution
    trust = fake_reliability(signal_sd=None, noise_sd=None, n_folds=1, split_half=None, full_set=None)
    scores = records.solution.scores.model_copy(update={"reliability": trust})
    page = render_report(replace(records, solution=records.solution.model_copy(update={"scores": scores})))
    assert "one fold cannot show it" in page and "arbitrary" not in page and "<dd>- / - (which ones?)</dd>" in page


def test_a_lone_round_that_nothing_measured_is_no_lack_of_rounds() -> None:
    records = fake_records()
    assert records.solution
    why = "one round, and nothing to judge it by: its inner run is left out"
    page = render_report(replace(records, solution=records.solution.model_copy(update={"rounds": (), "stopped": why})))
    assert f"No round was measured: {why}." in page and "in 1 round, which was not measured" in page
    assert "0 rounds" not in page and "No rounds" not in page


def test_changed_options_come_first() -> None:
    rows = {name: (value, default, differs) for name, value, default, differs in option_rows(fake_records().config)}
    changed = {name for name, row in rows.items() if row[2]}
    assert changed == {"output_dir", "seed", "model.name_or_path", "data.pairs", "solve.folds", "evaluation.controls"}
    assert rows["solve.folds"] == ("2", "8", True)


def test_flattened_names_nested_values() -> None:
    assert flattened({"a": {"b": 1, "c": {"d": None}}, "e": [2]}) == [("a.b", "1"), ("a.c.d", "None"), ("e", "[2]")]


def save(records: RunRecords, folder: Path) -> None:
    """Write a run directory as the pipeline does."""
    tree = records.config.model_dump(mode="json") | {"provenance": {"git": "abc"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps({"seconds": {"solve": 1.0}}), encoding="utf-8")
    named = {"partition": records.partition, "rewards": records.rewards, "scores": records.scores}
    named |= {"solution": records.solution, "evaluation": records.evaluation}
    named |= {f"unlearn_{arm}": result for arm, result in records.unlearn.items()}
    for name, record in named.items():
        assert isinstance(record, Record)
        record.save(folder / f"{name}.json")


def test_a_saved_run_loads_equal(tmp_path: Path) -> None:
    records = fake_records(6)
    save(records, tmp_path)
    loaded = RunRecords.load(tmp_path)
    assert loaded.summary == {"provenance": {"git": "abc"}, "seconds": {"solve": 1.0}}
    data = records.config.data.model_copy(update={"pairs": str(tmp_path / "pairs.jsonl")})
    config = records.config.model_copy(update={"data": data})
    assert replace(loaded, summary={}) == replace(records, summary={}, config=config)
    path = write_report(loaded, tmp_path / "out" / "report.html")
    assert path.read_text(encoding="utf-8") == render_report(loaded)


def test_a_run_that_has_only_begun_loads(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 4\n", encoding="utf-8")
    fake_partition(2).save(tmp_path / "partition.json")
    loaded = RunRecords.load(tmp_path)
    assert (loaded.rewards, loaded.scores, loaded.solution, loaded.evaluation) == (None, None, None, None)
    assert loaded.unlearn == {}
    assert loaded.config.seed == 4


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no run\.yaml"):
        RunRecords.load(tmp_path)
    (tmp_path / "run.yaml").write_text("", encoding="utf-8")
    with pytest.raises(RecordError, match="no Partition there"):
        RunRecords.load(tmp_path)
    fake_partition(1).save(tmp_path / "partition.json")
    (tmp_path / "summary.json").write_text("[1", encoding="utf-8")
    with pytest.raises(RecordError, match=r"summary\.json: unreadable"):
        RunRecords.load(tmp_path)

"""What an experiment writes for people and scripts, on cells made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fake_cells import SEEDS, cell, cells, found_scale, protocol
from u2a.experiment.analysis import analyse
from u2a.experiment.cell import CellResult
from u2a.experiment.estimates import Cells
from u2a.experiment.frozen import Replaced
from u2a.experiment.measured import AtEqualPpl
from u2a.experiment.protocol import Protocol
from u2a.experiment.results import write_results
from u2a.experiment.statements import judge
from u2a.experiment.tuning import TrialScore, Tuned

SINGLE = {"main": {"level": 4.0, "contrasts": [["a", "b"]]}}


def statement(**more) -> Protocol:
    return protocol(families=SINGLE, statements={"claim": {"text": "A beats B.", **more}})


@pytest.mark.parametrize(
    ("rule", "shifts", "finding"),
    [
        ("better", {"a": 2.0, "b": 0.0}, "shown"),
        ("better", {"a": -2.0, "b": 0.0}, "refuted"),
        ("better", {"a": 0.0, "b": 0.01}, "not shown"),
        ("not_worse", {"a": 0.0, "b": 0.01}, "shown"),
        ("not_worse", {"a": 2.0, "b": 0.0}, "shown"),
        ("not_worse", {"a": -2.0, "b": 0.0}, "refuted"),
    ],
)
def test_a_statement_follows_its_contrasts(rule: str, shifts: dict[str, float], finding: str) -> None:
    declared, found = statement(rule=rule, family="main"), cells(shifts)
    verdict = judge(declared, found, analyse(declared, "h", found).contrasts)[0]
    assert (verdict.finding, verdict.text) == (finding, "A beats B.")


def test_nothing_run_shows_nothing() -> None:
    declared, nothing = statement(rule="better", family="main"), cells({})
    assert judge(declared, nothing, ())[0].finding == "not run"
    contrasts = analyse(declared, "h", nothing).contrasts
    assert {row.verdict for row in contrasts} == {"not run"}
    assert judge(declared, nothing, contrasts)[0].finding == "not run"
    race = statement(rule="cheaper", arms=["a", "b"])
    assert judge(race, nothing, ())[0].finding == judge(race, cells({"a": 1.0}), ())[0].finding == "not run"


@pytest.mark.parametrize(("at_most", "finding"), [(0.3, "shown"), (0.01, "not shown")])
def test_cheaper_means_as_much_for_a_share_of_the_budget(at_most: float, finding: str) -> None:
    declared = statement(rule="cheaper", arms=["a", "b"], at_most=at_most)
    found = cells({"a": 8.0, "b": 0.5})  # a has more at level 1 of 4 than b at its end
    verdict = judge(declared, found, ())[0]
    assert verdict.finding == finding
    share = "0.25" if finding == "shown" else "0.00 to 0.25"  # a measured point, and nothing is known before it
    assert verdict.why.split(": ")[1].split(", ") == [share] * 6


@pytest.mark.parametrize(("n_seeds", "finding"), [(3, "not shown"), (6, "shown")])
def test_a_seed_counts_once_however_many_tasks_it_was_run_on(n_seeds: int, finding: str) -> None:
    claim = {"text": "A is cheaper.", "rule": "cheaper", "arms": ["a", "b"], "at_most": 0.3}
    tasks = {"one": {"config": "one.yaml"}, "two": {"config": "two.yaml"}}
    declared = protocol(tasks=tasks, seeds=list(SEEDS[:n_seeds]), statements={"claim": claim})
    found = cells({"a": 8.0, "b": 0.5}, seeds=SEEDS[:n_seeds])
    both = Cells(
        [each.model_copy(update={"task": task}) for each in found.results for task in tasks],
        {(task, seed): groups for (_, seed), groups in found.groups.items() for task in tasks},
        {(task, seed): start for (_, seed), start in found.starts.items() for task in tasks},
    )
    verdict = judge(declared, both, ())[0]
    assert verdict.finding == finding and verdict.why.count("0.25") == 2 * n_seeds


@pytest.mark.parametrize(("at_most", "finding"), [(1.0, "shown"), (0.5, "not shown"), (0.25, "refuted")])
def test_between_two_measured_points_nothing_is_known(at_most: float, finding: str) -> None:
    declared = statement(rule="cheaper", arms=["a", "b"], at_most=at_most)
    verdict = judge(declared, cells({"a": 1.0, "b": 0.5}), ())[0]  # a has less than b's end at level 1, more at 4
    assert verdict.finding == finding
    assert verdict.why.count("1.00" if finding == "shown" else "0.25 to 1.00") == 6


def test_waiting_after_the_end_was_reached_makes_the_other_arm_no_cheaper() -> None:
    declared, found = statement(rule="cheaper", arms=["a", "b"], at_most=0.3), cells({"a": 8.0, "b": 0.5})
    idle = [
        item.model_copy(
            update={"levels": (item.levels[0], item.levels[1].model_copy(update={"measured": item.levels[0].measured}))}
        )
        for item in found.results
        if item.arm == "b"
    ]
    rest = [item for item in found.results if item.arm == "a"]
    verdict = judge(declared, Cells([*rest, *idle], found.groups, found.starts), ())[0]
    assert verdict.finding == "not shown" and verdict.why.count("0.00 to 1.00") == 6


def test_a_seed_that_failed_or_is_still_to_be_run_is_not_dropped() -> None:
    race = statement(rule="cheaper", arms=["a", "b"], at_most=0.3)
    verdict = judge(race, cells({"a": 8.0, "b": 0.5}, failed=("b", 4)), ())[0]
    assert verdict.finding == "not shown" and verdict.why.endswith("0.25, 1 failed")
    found = cells({"a": 8.0, "b": 0.5})
    some = Cells([item for item in found.results if item.seed != 3], found.groups, found.starts)
    verdict = judge(race, some, ())[0]
    assert verdict.finding == "unfinished" and verdict.why.endswith("0.25, 1 not run")
    for rule in ("better", "not_worse"):
        declared = statement(rule=rule, family="main")
        row = analyse(declared, "h", some).contrasts[0]
        assert (row.verdict, row.n_missing, row.n_seeds) == ("unfinished", 1, 5)
        assert judge(declared, some, [row])[0].finding == "unfinished"


@pytest.mark.parametrize(("speed", "finding"), [(1.0, "shown"), (0.01, "not shown")])
def test_cheaper_in_seconds_reads_what_the_processor_spent(speed: float, finding: str) -> None:
    declared = statement(rule="cheaper", arms=["a", "b"], at_most=0.3, spent="cpu_seconds")
    results = [cell("a", seed, 8.0, speed=speed) for seed in SEEDS] + [cell("b", seed, 0.5) for seed in SEEDS]
    found = cells({})
    found = Cells(results, found.groups, found.starts)
    verdict = judge(declared, found, ())[0]
    assert verdict.finding == finding and "b's CPU seconds" in verdict.why
    budget = judge(statement(rule="cheaper", arms=["a", "b"], at_most=0.3), found, ())[0]
    assert budget.finding == "shown"  # whatever the seconds


def test_an_arm_that_ends_early_is_read_at_the_levels_it_has(tmp_path: Path) -> None:
    arms = {"a": {"method": "full", "up_to": 1.0}, "b": {"method": "random_k"}}
    declared = protocol(arms=arms, families={}, budgets={"levels": [1.0, 4.0], "full": [1.0, 4.0]})
    found = cells({"b": 0.5})
    found = Cells([*found.results, *(cell("a", seed, 8.0, up_to=1.0) for seed in SEEDS)], found.groups, found.starts)
    figures = analyse(declared, "h", found)
    assert {arm.arm: [at.level for at in arm.levels] for arm in figures.tasks["one"].arms} == {
        "a": [1.0],
        "b": [1.0, 4.0],
    }
    write_results(declared, figures, (), tmp_path)
    task = json.loads((tmp_path / "main.json").read_text())["tasks"]["one"]
    for arm, level in (("a", 0), ("b", 1)):
        assert task[arm]["preference_margin"] == task[arm]["levels"][level]["metrics"]["preference_margin"]
    share = statement(rule="cheaper", arms=["a", "b"], at_most=0.25)
    verdict = judge(share, found, ())[0]
    assert verdict.finding == "shown"  # at most level 1 of b's 4


def test_reaching_what_is_no_gain_shows_nothing() -> None:
    declared = statement(rule="cheaper", arms=["a", "b"], at_most=0.3)
    verdict = judge(declared, cells({"a": 8.0, "b": -2.0}), ())[0]
    assert verdict.finding == "not shown" and verdict.why.count("b gained nothing") == 6


def test_cheaper_reads_a_reward_where_answers_were_generated() -> None:
    declared = statement(rule="cheaper", arms=["a", "b"], at_most=1.0, metric="reward")
    verdict = judge(declared, cells({"a": 8.0, "b": 0.5}), ())[0]
    assert verdict.finding in ("shown", "refuted", "not shown")
    shares = [part for part in verdict.why.split(": ")[1].split(", ") if part[0].isdigit()]
    assert shares == ["1.00"] * len(shares)  # level 4, the only full one


def test_cheaper_within_the_bound_on_perplexity_reads_the_scaled_policy() -> None:
    declared = statement(rule="cheaper", arms=["a", "b"], at_most=0.3, metric="preference_margin_at_equal_ppl")
    found = cells({"a": 8.0, "b": 0.5})
    assert judge(declared, found, ())[0].why.count("not measured") == 6
    search = found_scale(0.5)

    def scaled(item: CellResult) -> CellResult:  # b's change is undone at its end: it has then what it had before
        at = [level.measured for level in item.levels]
        kept = at if item.arm == "a" else [at[0], at[0]]
        levels = [
            level.model_copy(update={"equal": AtEqualPpl(search=search, measured=found)})
            for level, found in zip(item.levels, kept, strict=True)
        ]
        return item.model_copy(update={"levels": tuple(levels)})

    results = [scaled(item) for item in found.results]
    verdict = judge(declared, Cells(results, found.groups, found.starts), ())[0]
    assert verdict.finding == "not shown" and verdict.why.count("0.00 to 1.00") == 6  # b had it at 1


def test_an_arm_that_never_gets_there_refutes_that_it_is_cheaper() -> None:
    declared = statement(rule="cheaper", arms=["b", "a"], at_most=1.0)
    verdict = judge(declared, cells({"a": 8.0, "b": 0.0}), ())[0]
    assert verdict.finding == "refuted" and verdict.why.count("not reached") == 6


def test_fewer_than_six_seeds_are_no_verdict_on_costs() -> None:
    for seeds, finding in ((range(5), "not shown"), (range(6), "shown")):
        declared = statement(rule="cheaper", arms=["a", "b"], at_most=0.3).model_copy(update={"seeds": list(seeds)})
        verdict = judge(declared, cells({"a": 8.0, "b": 0.5}, seeds=seeds), ())[0]
        assert verdict.finding == finding and ("too few seeds" in verdict.why) == (finding == "not shown")


def test_what_a_collapsed_model_reaches_is_no_target() -> None:
    declared, found = statement(rule="cheaper", arms=["b", "a"], at_most=1.0), cells({"a": 8.0, "b": 0.0})

    def broken(item: CellResult) -> CellResult:
        last = item.levels[-1]
        measured = last.measured.model_copy(update={"collapsed": "empty" if item.arm == "a" else ""})
        return item.model_copy(update={"levels": (*item.levels[:-1], last.model_copy(update={"measured": measured}))})

    verdict = judge(declared, Cells([broken(item) for item in found.results], found.groups, found.starts), ())[0]
    assert verdict.finding == "not shown" and verdict.why.count("a collapsed") == 6


def test_a_collapsed_model_has_reached_nothing() -> None:
    declared, found = statement(rule="cheaper", arms=["a", "b"], at_most=1.0), cells({"a": 8.0, "b": 0.5})
    assert judge(declared, found, ())[0].finding == "shown"

    def broken(item: CellResult) -> CellResult:
        kind = "repetition" if item.arm == "a" else ""
        levels = [
            level.model_copy(update={"measured": level.measured.model_copy(update={"collapsed": kind})})
            for level in item.levels
        ]
        return item.model_copy(update={"levels": tuple(levels)})

    verdict = judge(declared, Cells([broken(item) for item in found.results], found.groups, found.starts), ())[0]
    assert verdict.finding == "not shown" and verdict.why.count("not measured") == 6


def test_an_arm_that_is_equivalent_to_the_start_is_not_no_worse() -> None:
    arms = {"a": {"method": "u2a"}, "b": {"method": "full"}, "o": {"method": "original"}}
    families = {"main": {"level": 4.0, "contrasts": [["a", "b"], ["a", "o"]]}}
    claim = {"text": "A is enough.", "rule": "not_worse", "family": "main"}
    declared = protocol(arms=arms, families=families, statements={"claim": claim})
    found = cells({"a": 0.0, "b": 0.01, "o": -0.01})
    contrasts = analyse(declared, "h", found).contrasts
    assert [row.verdict for row in contrasts] == ["equivalent", "equivalent"]
    assert judge(declared, found, contrasts)[0].finding == "not shown"
    eight = declared.model_copy(update={"seeds": list(range(8)), "margins": {"preference_margin": 1.5}})
    better = cells({"a": 2.0, "b": 2.02, "o": 0.0}, seeds=range(8))
    contrasts = analyse(eight, "h", better).contrasts
    assert [row.verdict for row in contrasts] == ["equivalent", "better"]
    assert judge(eight, better, contrasts)[0].finding == "shown"


def test_statements_must_name_what_they_rest_on() -> None:
    with pytest.raises(ValueError, match="no family"):
        statement(rule="better", family="other")
    with pytest.raises(ValueError, match="no arm"):
        statement(rule="cheaper", arms=["a", "z"])


def test_files_hold_every_figure(tmp_path: Path) -> None:
    declared, found = statement(rule="better", family="main"), cells({"a": 2.0, "b": 0.0}, failed=("b", 4))
    figures = analyse(declared, "abc", found, missing=["one.c.s0.t0"])
    files = write_results(declared, figures, judge(declared, found, figures.contrasts), tmp_path)
    assert all(path.exists() for path in files)
    main = json.loads((tmp_path / "main.json").read_text(encoding="utf-8"))
    arm = main["tasks"]["one"]["a"]
    for name in ("reward", "preference_accuracy", "retain_ppl", "seconds", "flops"):
        assert arm[name]["low"] <= arm[name]["value"] <= arm[name]["high"]
    assert arm["n_seeds"] == 6 and main["tasks"]["one"]["b"]["failed"] == ["seed 4: diverged: broke"]
    assert main["contrasts"][0]["n_seeds"] == 5 and main["verdicts"]["claim"]["finding"] == "not shown"
    assert {"value", "low", "high"} <= set(arm["levels"][0]["metrics"]["preference_margin"])
    page = (tmp_path / "main.md").read_text(encoding="utf-8")
    for text in ("A beats B.", "broke", "one.c.s0.t0", "## Task one", "### At level 4", "random_k in 1", "`abc`"):
        assert text in page
    for line in page.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.split("(")[1].rstrip(")")).exists()
    widths = [line.count("|") for line in page.splitlines() if line.startswith("| start") or line.startswith("| a ")]
    assert widths[0::2] == widths[1::2] and widths[0] < widths[2]  # rewards at the full level only


def test_figures_show_the_arms_that_are_tested_on_their_task(tmp_path: Path) -> None:
    families = {
        "elsewhere": {"level": 4.0, "contrasts": [["a", "c"]], "tasks": []},
        "here": {"level": 4.0, "contrasts": [["b", "c"]], "tasks": ["one"]},
    }
    arms = {"a": {"method": "full"}, "b": {"method": "random_k"}, "c": {"method": "u2a"}}
    declared, found = protocol(families=families, arms=arms), cells({"a": 2.0, "b": 0.0, "c": 1.0})
    write_results(declared, analyse(declared, "h", found), (), tmp_path)
    for name in ("preference_margin", "cost"):
        drawing = (tmp_path / f"main-one-{name}.svg").read_text(encoding="utf-8")
        shown = [arm for arm in "abc" if f">{arm}<" in drawing or f">{arm}: " in drawing]
        assert shown == ["b", "c"], name


def test_a_statement_may_rest_on_some_contrasts_of_a_family() -> None:
    families = {"main": {"level": 4.0, "contrasts": [["a", "b"], ["b", "a"]]}}
    claim = {"text": "A beats B.", "rule": "better", "family": "main", "contrasts": [["a", "b"]]}
    declared = protocol(families=families, statements={"claim": claim}, seeds=list(range(8)))
    found = cells({"a": 2.0, "b": 0.0}, seeds=range(8))
    contrasts = analyse(declared, "h", found).contrasts
    assert contrasts[0].p_holm == pytest.approx(2 * 2**-7)  # corrected in the whole family
    assert judge(declared, found, contrasts)[0].finding == "shown"
    with pytest.raises(ValueError, match="none of the family's"):
        protocol(families=families, statements={"claim": {**claim, "contrasts": [["a", "a"]]}})


def test_the_page_tells_what_was_tuned_and_changed(tmp_path: Path) -> None:
    score = TrialScore(trial=0, values={"learning_rate": 0.5}, value=1.0, ppl_ratio=1.0, flops=300, seconds=2.0)
    tuned = Tuned(task="one", arm="a", trial=0, reason="why not", trials=(score,))
    base = analyse(protocol(), "h", cells({"a": 2.0, "b": 0.0}))
    for n_main, text in ((0, "always before the first cell"), (3, "changed after main cells had been run")):
        old = Replaced(hash="old", time="2026-01-02T03:04:05+00:00", n_main_cells=n_main, changed=("arms",))
        write_results(protocol(), base.model_copy(update={"tuning": (tuned,), "replaced": (old,)}), (), tmp_path)
        page = (tmp_path / "main.md").read_text(encoding="utf-8")
        assert text in page and "| one | a | learning_rate 0.5 | 1 | 3.00e+02 | why not |" in page
    write_results(protocol(), base, (), tmp_path)
    assert "fixed before the first cell" in (tmp_path / "main.md").read_text(encoding="utf-8")


def test_tuning_cells_that_failed_are_listed(tmp_path: Path) -> None:
    score = TrialScore(trial=0, values={}, value=None, ppl_ratio=None, flops=3, seconds=2.0, failed=("seed 7: lost",))
    tuned = Tuned(task="one", arm="a", trial=0, reason="why not", trials=(score,))
    base = analyse(protocol(), "h", cells({"a": 2.0, "b": 0.0}))
    write_results(protocol(), base.model_copy(update={"tuning": (tuned,)}), (), tmp_path)
    page = (tmp_path / "main.md").read_text(encoding="utf-8")
    assert page.partition("failed or are missing")[2].strip() == "- one, a, tuning trial 0: seed 7: lost"

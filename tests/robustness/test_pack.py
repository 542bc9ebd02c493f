"""The pack on planted measures whose gaps are known, on a tiny model that relearns, and its table as JSON and text."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
import torch

from tiny import ask, examples, tiny_policy
from u2a.config import UnlearnSection
from u2a.data import prompt_key
from u2a.errors import ConfigError, DataError
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.robustness import pack
from u2a.robustness.attacks import Framed, Paraphrases
from u2a.robustness.pack import Measures, RobustnessData, RobustnessOptions, mean_log_probs, robustness
from u2a.robustness.quantise import quantised
from u2a.robustness.records import RobustnessTable
from u2a.robustness.relearn import Relearning
from u2a.robustness.table import markdown, table_rows
from u2a.types import Example, Message
from u2a.unlearn import InnerProblem, unlearn

torch.set_num_threads(1)
QUIET = Console(quiet=True)
FRAME = Framed("frame", "a frame", "Well: {prompt}")
FORGET, RETAIN, UNRELATED = (
    tuple(row.model_copy(update={"completion": f"{row.completion} {row.id[:6]}"}) for row in rows)
    for rows in (examples(12), examples(4, start=40), examples(6, start=60))
)
OPTIONS = RobustnessOptions(
    schemes=("int8", "int4"), attacks=(FRAME,), relearning=Relearning((2, 20), 5e-3), attack_rows=5, bootstrap=200
)
PROMPTS = {f"q{k}": ask(f"Question {k}?") for k in range(4)}
CONDITIONS = ["none", "int8", "int4", "prompt frame"]
RELEARNED = ["relearn forget @2", "relearn forget @20", "relearn unrelated @2", "relearn unrelated @20"]


def answers(policy: Policy, prompts: dict) -> dict[str, dict[str, float]]:
    """A planted answers-based measure: 10 x (arm unlearned) + index, minus 1 under the frame of the unlearned arm."""
    after = 10.0 * (float(policy.change_sq().detach()) > 0)
    out = {}
    for key, turns in prompts.items():
        framed = turns[-1].content.startswith("Well: ")
        out[key] = after + int(key[1:]) - framed * (1.0 + after / 5)
    return {"planted": out}


@pytest.fixture(scope="module")
def arms():
    policy = tiny_policy()
    before = policy.snapshot()
    section = UnlearnSection(loss="npo", retain_term="none", max_steps=10, learning_rate=5e-3, batch_size=8)
    problem = InnerProblem(forget=FORGET, section=section)
    unlearn(policy, problem, problem.uniform())
    return policy, {"before": before, "after": policy.snapshot()}


@pytest.fixture(scope="module")
def table(arms) -> RobustnessTable:
    policy, snapshots = arms
    theta = policy.snapshot()
    data = RobustnessData(snapshots, FORGET, retain=RETAIN, unrelated=UNRELATED, prompts=PROMPTS)
    found = robustness(policy, data, Measures(mean_log_probs, answers), OPTIONS, QUIET)
    assert all(torch.equal(value, theta[name]) for name, value in policy.snapshot().items())
    return found


def row_of(table: RobustnessTable, metric: str, condition: str):
    return next(row for row in table.rows if (row.metric, row.condition) == (metric, condition))


def test_every_metric_stands_under_every_condition(table: RobustnessTable) -> None:
    metrics = ["log_prob/forget", "log_prob/retain", "planted"]
    assert [(row.metric, row.condition) for row in table.rows] == [
        (metric, condition) for metric in metrics for condition in CONDITIONS + RELEARNED
    ]
    kinds = ["none", "quantised", "quantised", "prompt"] + ["relearned"] * 4
    assert [row.kind for row in table.rows[:8]] == kinds
    assert table.arms == ("before", "after") and table.original == "before"
    assert table.attack_rows == {"forget": 5, "unrelated": 5} and table.learning_rate == 5e-3
    assert 0.5 < table.quantised_frac < 1
    for row in table.rows:
        assert set(row.arms) == {"before", "after"}
        assert bool(row.gaps) == (row.condition != "none")


def test_values_are_those_of_the_measure_under_each_condition(arms, table: RobustnessTable) -> None:
    policy, snapshots = arms
    held = [row for row in FORGET if row.id in table.rows[0].arms["after"].values]
    assert len(held) == 7
    for name, theta in snapshots.items():
        policy.restore(theta)
        plain = mean_log_probs(policy, held)["log_prob"]
        assert row_of(table, "log_prob/forget", "none").arms[name].values == pytest.approx(plain)
        framed = [row.model_copy(update={"prompt": FRAME.apply(row.prompt)}) for row in held]
        expected = mean_log_probs(policy, framed)["log_prob"]
        assert row_of(table, "log_prob/forget", "prompt frame").arms[name].values == pytest.approx(expected)
        with quantised(policy, "int4"):
            expected = mean_log_probs(policy, RETAIN)["log_prob"]
        assert row_of(table, "log_prob/retain", "int4").arms[name].values == pytest.approx(expected)
        gap = row_of(table, "log_prob/retain", "int4").gaps[name]
        retained = mean_log_probs(policy, RETAIN)["log_prob"]
        assert gap.value == pytest.approx(sum(expected[key] - retained[key] for key in retained) / 4)


def test_relearning_the_forget_set_recovers_the_held_rows(table: RobustnessTable) -> None:
    early, late = (row_of(table, "log_prob/forget", f"relearn forget @{step}") for step in (2, 20))
    assert 0 < early.recovery["after"].value < late.recovery["after"].value
    assert late.recovery["after"].low > 0.8
    assert late.gaps["before"].low > 0  # the control learns from the attacker's rows, too
    assert late.excess["after"].value == pytest.approx(late.gaps["after"].value - late.gaps["before"].value)
    start = row_of(table, "log_prob/forget", "none").arms
    assert start["after"].value < start["before"].value


def test_planted_gaps_excess_and_recovery(table: RobustnessTable) -> None:
    plain, framed = row_of(table, "planted", "none"), row_of(table, "planted", "prompt frame")
    assert (plain.arms["before"].value, plain.arms["after"].value, plain.arms["after"].n) == (1.5, 11.5, 4)
    assert plain.gaps == plain.excess == plain.recovery == {}
    assert {name: gap.value for name, gap in framed.gaps.items()} == {"before": -1.0, "after": -3.0}
    assert (framed.gaps["after"].low, framed.gaps["after"].high) == (-3.0, -3.0)  # paired: no spread
    assert {name: gap.value for name, gap in framed.excess.items()} == {"after": -2.0}
    assert {name: gap.value for name, gap in framed.recovery.items()} == {"after": pytest.approx(0.3)}


def test_the_table_survives_the_disk_and_becomes_markdown(table: RobustnessTable, tmp_path) -> None:
    assert RobustnessTable.load(table.save(tmp_path / "robustness.json")) == table
    text = markdown(table)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3 * (2 + 8) and len({line.count("|") for line in lines}) == 1
    assert lines[0] == (
        "| condition | before | after | gap before (control) | gap after | excess after | recovery after |"
    )
    framed = next(line for line in text.split("### planted")[1].splitlines() if "prompt frame" in line)
    cells = [cell.strip() for cell in framed.strip("|").split("|")]
    assert re.fullmatch(r"8\.5 \[\S+, \S+\]", cells[2])
    assert cells[3:] == ["-1 [-1, -1]", "-3 [-3, -3]", "-2 [-2, -2]", "0.3 [0.3, 0.3]"]
    assert "forget 5, unrelated 5" in text and "not finite" not in text


def test_what_the_attacker_trains_on_is_never_measured(arms) -> None:
    policy, snapshots = arms
    seen: set[str] = set()

    def rows(now: Policy, asked) -> dict[str, dict[str, float]]:
        seen.update(row.id for row in asked)
        return {"m": {row.id: 0.0 for row in asked}}

    # Half of the forget prompts are answered, and some of the unrelated rows stand in what is measured.
    prompts = {row.id: row.prompt for row in FORGET[:6]}
    unrelated = (*RETAIN, UNRELATED[0])
    data = RobustnessData(snapshots, FORGET, retain=RETAIN, unrelated=unrelated, prompts=prompts)
    none = {"m": {}}
    options = replace(OPTIONS, schemes=(), relearning=Relearning((1,), 1e-3))
    trained: list[tuple[Example, ...]] = []
    real = pack.relearn

    def spy(policy, rows, measured, measure, relearning):
        trained.append(tuple(rows))
        return real(policy, rows, measured, measure, relearning)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "relearn", spy)
        found = robustness(policy, data, Measures(rows, lambda now, asked: none), options, QUIET)
    assert found.attack_rows == {"forget": 5, "unrelated": 1} and len(trained) == 4
    keys = {prompt_key(row.prompt) for rows in trained for row in rows}
    assert not keys & {prompt_key(turns) for turns in prompts.values()}
    assert seen and not seen & {row.id for rows in trained for row in rows}
    with pytest.raises(DataError, match="all unrelated rows share"):
        robustness(policy, replace(data, unrelated=RETAIN), Measures(rows), options, QUIET)
    everywhere = {row.id: row.prompt for row in FORGET}
    with pytest.raises(DataError, match="expected at least 1"):
        robustness(policy, replace(data, prompts=everywhere), Measures(rows, lambda now, asked: none), options, QUIET)


@pytest.mark.parametrize("stopped_after", [0, 5, 7])
def test_a_pack_that_was_stopped_goes_on_to_the_same_table(arms, table: RobustnessTable, stopped_after: int) -> None:
    policy, snapshots = arms
    data = RobustnessData(snapshots, FORGET, retain=RETAIN, unrelated=UNRELATED, prompts=PROMPTS)
    kept: dict = {}
    measured: list[str] = []

    def keep(name: str, measure):
        if name not in kept:
            if len(kept) == stopped_after and "stopped" not in measured:
                measured.append("stopped")
                raise KeyboardInterrupt
            measured.append(name)
            kept[name] = measure()
        return kept[name]

    for _ in range(2):
        with suppress(KeyboardInterrupt):
            found = robustness(policy, data, Measures(mean_log_probs, answers), OPTIONS, QUIET, keep)
    assert found == table
    assert len(set(measured)) == len(measured) == 13, "6 parts of each arm, none twice, and the stop"


def test_the_policy_is_restored_when_a_measure_fails(arms) -> None:
    policy, snapshots = arms
    policy.restore(snapshots["after"])
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}

    def fails_under_quantisation(now: Policy, rows) -> dict[str, dict[str, float]]:
        if not torch.equal(now.model.state_dict()[frozen], before[frozen]):
            raise KeyError
        return {"m": {row.id: 0.0 for row in rows}}

    frozen = next(name for name in before if "base_layer" in name)
    with pytest.raises(KeyError):
        robustness(policy, RobustnessData(snapshots, FORGET), Measures(fails_under_quantisation), OPTIONS, QUIET)
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())


def test_a_paraphrase_file_for_some_prompts_is_compared_on_those(arms) -> None:
    policy, snapshots = arms
    attack = Paraphrases({"question 1?": "Well: Q1", "question 3?": "Q3"})
    options = RobustnessOptions(schemes=(), attacks=(attack,), relearning=None, bootstrap=100)
    data = RobustnessData(snapshots, FORGET, prompts=PROMPTS)
    row = row_of(robustness(policy, data, Measures(answers=answers), options, QUIET), "planted", "prompt paraphrase")
    assert row.arms["before"].values == {"q1": 0.0, "q3": 3.0}
    assert row.gaps["before"].value == -0.5 and row.gaps["before"].n == 2
    lost = replace(options, attacks=(Paraphrases({"something else": "x"}),))
    with pytest.raises(DataError, match="nothing for the measured prompts"):
        robustness(policy, data, Measures(answers=answers), lost, QUIET)


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    arms = {
        "before": {"none": {"m": {"a": 1.0, "b": 2.0, "c": 3.0}}, "int8": {"m": {"a": math.nan, "b": 2.0, "c": 3.0}}},
        "after": {"none": {"m": {"a": 0.0, "b": math.inf, "c": 0.0}}, "int8": {"m": {"a": 1.0, "b": 1.0, "c": 1.0}}},
    }
    none, int8 = table_rows(arms, "before", {}, 100, 0)
    assert (none.n_undefined, int8.n_undefined) == ({"before": 0, "after": 1}, {"before": 1, "after": 0})
    assert (int8.arms["before"].value, int8.gaps["before"].n, int8.gaps["after"].value) == (2.5, 2, 1.0)
    assert int8.excess["after"].n == 1  # only c has all four values
    text = markdown(RobustnessTable(original="before", arms=("before", "after"), rows=(none, int8)))
    assert "1 of after under none, 1 of before under int8" in text
    nothing = list(table_rows({"a": {"none": {"m": {"x": math.nan}}}}, "a", {}, 100, 0))[0]
    assert nothing.arms["a"].value is None and "n/a (0 prompts)" in markdown(
        RobustnessTable(original="a", arms=("a",), rows=(nothing,))
    )


def test_a_share_withheld_of_a_broken_start_is_undefined_there_and_kept_of_the_others() -> None:
    shares = {"incoherent": {"a": 0.0, "b": 0.0}, "refused": {"a": 1.0, "b": 0.0}}
    broken = {"incoherent": {"a": 1.0, "b": 1.0}}
    arms = {"before": {"none": broken, "int8": broken}, "after": {"none": shares, "int8": shares}}
    rows = list(table_rows(arms, "before", {}, 100, 0))
    assert [(row.metric, row.condition) for row in rows] == [
        (metric, condition) for metric in ("incoherent", "refused") for condition in ("none", "int8")
    ]
    refused = rows[3]
    assert refused.arms["before"].value is None and refused.arms["after"].value == 0.5
    assert refused.gaps["after"].value == 0.0 and refused.gaps["after"].n == 2
    assert refused.excess["after"].value is None and refused.recovery["after"].value is None
    text = markdown(RobustnessTable(original="before", arms=("before", "after"), rows=tuple(rows)))
    assert text.count("No values of before under none, before under int8 (shares of a model most of") == 1


def test_log_probs_are_means_per_token_and_nan_where_there_is_no_room() -> None:
    policy = tiny_policy(max_length=80)
    short, long = (Example(id=text[0], prompt=ask(text), completion="ok") for text in ("short", "long" * 30))
    values = mean_log_probs(policy, (long, short))["log_prob"]
    encoded = policy.encoder.encode(short.prompt, short.completion)
    assert values["s"] == pytest.approx(float(policy.log_probs([encoded]).mean.detach()))
    assert math.isnan(values["l"]) and list(values) == ["l", "s"]


@dataclass(frozen=True)
class Longer:
    """An attack that puts words before the question."""

    name: str = "longer"
    description: str = "words before the question"

    def apply(self, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        return ask("well " * 8 + prompt[0].content)


def test_an_answer_that_an_attack_cuts_is_not_compared_with_the_whole_one() -> None:
    policy = tiny_policy(max_length=120)
    short, long = (
        Example(id=name, prompt=ask(f"{name}?"), completion=f"{name} " + "bah " * count)
        for name, count in (("s", 1), ("l", 18))
    )
    assert policy.encoder.encode(long.prompt, long.completion).n_answer == len(long.completion) + 1, "whole"
    attacked = policy.encoder.encode(Longer().apply(long.prompt), long.completion)
    assert attacked.n_answer < len(long.completion), "cut"
    data = RobustnessData({"before": policy.snapshot()}, (long, short))
    options = RobustnessOptions(schemes=(), attacks=(Longer(),), relearning=None, bootstrap=100)
    table = robustness(policy, data, Measures(mean_log_probs), options, QUIET)
    plain, longer = (row_of(table, "log_prob/forget", name) for name in ("none", "prompt longer"))
    assert set(plain.arms["before"].values) == {"l", "s"} and plain.n_undefined == {"before": 0}
    assert set(longer.arms["before"].values) == {"s"} and longer.n_undefined == {"before": 1}
    assert longer.gaps["before"].n == 1
    sums = policy.encoder.encode(Longer().apply(short.prompt), short.completion)
    mean = float(policy.log_probs([sums]).mean.detach())
    assert longer.arms["before"].value == pytest.approx(mean)


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="attack_rows") as error:
        RobustnessOptions(attack_rows=0, bootstrap=0, attacks=(FRAME, FRAME), schemes=("int3",))  # type: ignore[arg-type]
    assert len(error.value.problems) == 4
    with pytest.raises(ConfigError, match="none of the arms"):
        RobustnessData({"after": {}}, FORGET)
    with pytest.raises(ConfigError, match="nothing to measure"):
        Measures()
    data = RobustnessData({"before": {}}, ())
    with pytest.raises(DataError, match="neither a row nor a prompt"):
        robustness(tiny_policy(), data, Measures(mean_log_probs), replace(OPTIONS, relearning=None), QUIET)

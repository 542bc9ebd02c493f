from __future__ import annotations

import json
import os
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from u2a.config import DataSection, FieldMap, PartitionSection, RunConfig
from u2a.data import example_id, pair_id, prompt_key
from u2a.early_checks import check_reward_pairs
from u2a.errors import ConfigError, DataError
from u2a.partition import SETS, Inputs, build_partition, describe, partition
from u2a.shortages import shortages
from u2a.types import Example, Message, Pair, Partition

SHARED = Path(os.environ.get("U2A_DATA", Path(__file__).parents[1] / "../shared/data"))
FIFTHS = PartitionSection(finetune_frac=0.2, forget_frac=0.2, preference_frac=0.2, reward_frac=0.2, evaluation_frac=0.2)


def pair(prompt: str, chosen: str = "good", rejected: str = "bad", source: str = "") -> Pair:
    turns = (Message(role="user", content=prompt),)
    return Pair(id=pair_id(turns, chosen, rejected), prompt=turns, chosen=chosen, rejected=rejected, source=source)


def example(prompt: str, completion: str = "bad", source: str = "", kind: str | None = None) -> Example:
    turns = (Message(role="user", content=prompt),)
    return Example(id=example_id(turns, completion), prompt=turns, completion=completion, source=source, kind=kind)


def only(name: str, **more) -> PartitionSection:
    shares = {f"{other}_frac": float(other == name) for other in SETS if other != "retain"}
    return PartitionSection(**shares, **more)


def prompts(rows) -> set[str]:
    return {prompt_key(row.prompt) for row in rows}


def ids(result: Partition) -> dict[str, set[str]]:
    return {name: {row.id for row in getattr(result, name)} for name in SETS}


QUESTIONS = ["a", "b ", " B", "c", "d", "e", "f", "g"]
ANSWERS = ["x", "y", "X ", "long answer"]
PAIRS = st.lists(
    st.builds(pair, st.sampled_from(QUESTIONS), st.sampled_from(ANSWERS[:3]), st.sampled_from(ANSWERS[1:])), max_size=25
)
NEGATIVES = st.lists(st.builds(example, st.sampled_from(QUESTIONS), st.sampled_from(ANSWERS)), max_size=8)
CAPS = st.builds(
    lambda forget, preference, chars: FIFTHS.model_copy(
        update={"max_forget": forget, "max_preference": preference, "max_answer_chars": chars}
    ),
    *(st.none() | st.integers(1, 3) for _ in range(2)),
    st.none() | st.just(5),
)


@settings(max_examples=150, deadline=None)
@given(PAIRS, NEGATIVES, NEGATIVES, CAPS, st.integers(0, 3), st.randoms(use_true_random=False))
def test_order_of_rows_has_no_effect_and_no_row_is_lost(pairs, forget, retain, section, seed, random):
    inputs = Inputs(pairs=pairs, forget=forget, retain=retain)
    result = build_partition(inputs, section, seed, allow_leak=True)
    shuffled = Inputs(*(random.sample(rows, len(rows)) for rows in (pairs, forget, retain)))
    assert build_partition(shuffled, section, seed, allow_leak=True) == result
    assert sum(len(getattr(result, name)) for name in SETS) + sum(result.dropped.values()) == len(
        [*pairs, *forget, *retain]
    )
    for name in SETS:
        rows = getattr(result, name)
        assert len({row.id for row in rows}) == len(rows)


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.integers(0, 50))
def test_sets_cut_from_pairs_share_no_prompt(pairs, seed):
    result = build_partition(Inputs(pairs=pairs), FIFTHS, seed)
    for first, second in combinations(SETS, 2):
        assert not prompts(getattr(result, first)) & prompts(getattr(result, second))
    assert result.leaks == ()


@settings(max_examples=100, deadline=None)
@given(PAIRS, PAIRS, st.integers(0, 5))
def test_a_prompt_stays_in_its_set_when_rows_are_added(pairs, more, seed):
    def place(rows):
        result = build_partition(Inputs(pairs=rows), FIFTHS, seed)
        return {key: name for name in SETS for key in prompts(getattr(result, name))}

    before, after = place(pairs), place([*pairs, *more])
    assert all(after[key] == name for key, name in before.items() if key in after)


@settings(max_examples=150, deadline=None)
@given(PAIRS, NEGATIVES, NEGATIVES)
def test_contradictions_against_brute_force(pairs, forget, retain):
    """Oracle: the quadratic definition, on texts folded by hand for this alphabet."""
    said = [(row, text, side) for row in pairs for text, side in ((row.chosen, 1), (row.rejected, 0))]
    said += [(row, row.completion, 0) for row in forget] + [(row, row.completion, 1) for row in retain]

    def key(row, text):
        return row.prompt[0].content.strip().lower(), text.strip().lower()

    bad = {
        key(row, text)
        for (row, text, side), (other, word, other_side) in product(said, said)
        if side != other_side and key(row, text) == key(other, word)
    }
    result = build_partition(Inputs(pairs=pairs, forget=forget, retain=retain), only("preference"), allow_leak=True)
    assert ids(result)["preference"] == {
        row.id for row in pairs if key(row, row.chosen) not in bad and key(row, row.rejected) not in bad
    }
    assert ids(result)["forget"] == {row.id for row in forget if key(row, row.completion) not in bad}
    assert ids(result)["retain"] == {row.id for row in retain if key(row, row.completion) not in bad}


def test_shares_are_met_and_depend_on_the_seed():
    pairs = [pair(f"question {index}") for index in range(4000)]
    section = PartitionSection()
    result = build_partition(Inputs(pairs=pairs), section)
    for name in ("forget", "preference", "reward", "evaluation"):
        share = getattr(section, f"{name}_frac")
        four_sigma = 4 * (share * (1 - share) / 4000) ** 0.5
        assert abs(len(getattr(result, name)) / 4000 - share) < four_sigma
    other = build_partition(Inputs(pairs=pairs), section, seed=1)
    overlap = len(ids(result)["evaluation"] & ids(other)["evaluation"])
    assert abs(overlap / 4000 - 0.04) < 0.0125  # independent cuts share 0.2 x 0.2 of the prompts; 4 sigma
    assert other.fingerprint != result.fingerprint


def test_evaluation_does_not_move_with_the_other_shares():
    pairs = [pair(f"question {index}") for index in range(200)]
    first = build_partition(Inputs(pairs=pairs), PartitionSection())
    second = build_partition(Inputs(pairs=pairs), PartitionSection(forget_frac=0.1, preference_frac=0.55))
    assert first.evaluation == second.evaluation
    assert first.preference != second.preference


def test_a_hundred_pairs_are_enough_for_the_defaults_as_the_page_on_data_says():
    for seed in range(15):
        sets = build_partition(
            Inputs(pairs=[pair(f"{seed} {k}") for k in range(100)], retain=[example("r")]), PartitionSection(), seed
        )
        assert shortages(sets, RunConfig()) == []
        check_reward_pairs(RunConfig(), sets)


@pytest.mark.parametrize("held_out_seed", [7, 1])  # 1 is also the seed of a run: the two cuts must be independent
def test_runs_with_other_seeds_can_share_what_is_held_out(held_out_seed):
    pairs = [pair(f"question {index}") for index in range(600)]
    shares = {"finetune_frac": 0.1, "forget_frac": 0.3, "preference_frac": 0.2, "reward_frac": 0.15}
    section = PartitionSection(**shares, evaluation_frac=0.25, held_out_seed=held_out_seed)
    first, second = (build_partition(Inputs(pairs=pairs), section, seed) for seed in (1, 2))
    assert (first.evaluation, first.reward) == (second.evaluation, second.reward)
    for name, share in {**shares, "evaluation_frac": 0.25}.items():
        for found in (first, second):
            assert abs(len(getattr(found, name.removesuffix("_frac"))) / 600 - share) < 0.06
    moved = {row.id for row in first.preference} - {row.id for row in second.preference}
    assert len(moved) > 0.5 * len(first.preference)  # by chance 2/3 of them go elsewhere
    sets = [prompts(getattr(first, name)) for name in SETS]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 600


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mislabelled_candidates_are_good_answers_of_their_pairs(share):
    rows = [pair(f"question {index}", f"good {index}", f"bad {index}") for index in range(1000)]
    given = [example("another", "bad of the file")]
    result = build_partition(Inputs(pairs=rows, forget=given), only("forget", mislabelled_frac=share), seed=3)
    cut = [row for row in result.forget if row.completion != "bad of the file"]
    good = [row.completion.startswith("good") for row in cut]
    assert len(result.forget) == 1001  # a file of negatives is taken at its word
    assert abs(sum(good) / 1000 - share) <= 4 * (share * (1 - share) / 1000) ** 0.5
    assert all(row.prompt[0].content.split()[1] == row.completion.split()[1] for row in cut)
    assert all(row.id == example_id(row.prompt, row.completion) for row in cut)


def test_long_prompts_are_left_out_without_their_system_text():
    system = Message(role="system", content="a long system text")
    turns = system, Message(role="user", content="123456")
    rows = [pair("12345"), pair("123456"), pair("1234567")]
    rows += [Pair(id=pair_id(turns, "good", "bad"), prompt=turns, chosen="good", rejected="bad")]
    result = build_partition(Inputs(pairs=rows), only("reward", max_prompt_chars=6))
    assert sorted(row.prompt[-1].content for row in result.reward) == ["12345", "123456", "123456"]
    assert result.dropped == {"pairs: too long": 1}


def test_retain_rows_have_a_cap_of_their_own_for_prompt_and_answer_together():
    rows = [example("1234", "123456"), example("12345", "123456")]
    result = build_partition(Inputs(retain=rows), only("reward", max_answer_chars=1, max_retain_chars=10))
    assert [row.prompt[0].content for row in result.retain] == ["1234"]
    assert result.dropped == {"retain: too long": 1}


def test_rejected_answers_become_candidates_beside_those_of_the_file():
    rows = [pair("a", "good", "bad"), pair("a", "fine", "bad"), pair("b", "good", "worse")]
    result = build_partition(Inputs(pairs=rows, forget=[example("a", "bad"), example("c", "other")]), only("forget"))
    assert Counter((row.prompt[0].content, row.completion) for row in result.forget) == Counter(
        [("a", "bad"), ("b", "worse"), ("c", "other")]
    )
    assert result.dropped == {"forget: repeated": 2}


def test_a_source_of_its_own_wins_over_the_share():
    pairs = [pair(f"question {index}") for index in range(2000)]
    own = [pair("mine")]
    result = build_partition(Inputs(pairs=pairs, preference=own), PartitionSection())
    assert result.preference == tuple(own)
    assert sum(len(getattr(result, name)) for name in SETS) == 2001
    assert abs(len(result.forget) / 2000 - 0.5) < 0.045  # 0.35 / 0.70; 4 sigma
    everything = Inputs(pairs=pairs, finetune=own, preference=own, reward=own, evaluation=own)
    unused = build_partition(everything, only("evaluation"), allow_leak=True)
    assert unused.dropped == {"pairs: no set takes a share": 2000}


def test_caps_keep_one_row_per_prompt_first():
    rows = [pair(question, "good", f"bad {index}") for question in "abcd" for index in range(5)]
    for most in (3, 4, 6, 20):
        result = build_partition(Inputs(pairs=rows), only("evaluation", max_evaluation=most))
        counts = Counter(prompt_key(row.prompt) for row in result.evaluation)
        assert len(result.evaluation) == most
        assert len(counts) == min(most, 4)
        assert max(counts.values()) - min(counts.values()) <= 1
    smaller = build_partition(Inputs(pairs=rows), only("evaluation", max_evaluation=3))
    larger = build_partition(Inputs(pairs=rows), only("evaluation", max_evaluation=7))
    assert ids(smaller)["evaluation"] < ids(larger)["evaluation"]
    assert smaller.dropped == {"evaluation: over max_evaluation": 17}


def test_long_answers_are_left_out_and_counted():
    rows = [pair("a", "1234", "123"), pair("b", "12345", "1"), pair("c", "1", "12345")]
    result = build_partition(Inputs(pairs=rows, retain=[example("d", "123456")]), only("reward", max_answer_chars=4))
    assert [row.prompt[0].content for row in result.reward] == ["a"]
    assert result.dropped == {"pairs: too long": 2, "retain: too long": 1}


def test_overlaps_are_found_at_both_levels():
    inputs = Inputs(
        forget=[example("Q  one", "BAD", "f:1"), example("q two", "new", "f:2"), example("q three", "free", "f:3")],
        retain=[example("q two", "kept")],
        preference=[pair("elsewhere")],
        evaluation=[pair("q one", "good", "bad"), pair("Q TWO", "good", "bad")],
    )
    with pytest.raises(DataError) as caught:
        build_partition(inputs, only("reward"))
    (problem,) = caught.value.problems
    assert problem.startswith("f:1: forget: prompt and answer also stand in evaluation (")
    result = build_partition(inputs, only("reward"), allow_leak=True)
    found = {(leak.first, leak.second, leak.level): leak.count for leak in result.leaks}
    assert found == {
        ("forget", "retain", "prompt"): 1,
        ("forget", "evaluation", "prompt"): 2,
        ("forget", "evaluation", "text"): 1,
        ("retain", "evaluation", "prompt"): 1,
    }
    exact = next(leak for leak in result.leaks if leak.level == "text")
    assert exact.examples == (inputs.forget[0].id,)


@pytest.mark.parametrize("name", ["finetune", "preference", "reward"])
def test_an_evaluation_pair_in_a_training_set_is_an_error(name):
    training: dict[str, Any] = {name: [pair("q", "good", "bad", "t:1")]}
    inputs = Inputs(evaluation=[pair("q", "good", "bad")], **training)
    with pytest.raises(DataError, match=f"t:1: {name}: prompt and answer also stand in evaluation"):
        build_partition(inputs, only("forget"))


def test_fingerprint_changes_with_content_and_place_only():
    rows = [pair("a"), pair("b", kind_ := "good", "bad")]
    base = build_partition(Inputs(pairs=rows), only("reward"))
    renamed = [row.model_copy(update={"source": "elsewhere:9"}) for row in rows]
    assert build_partition(Inputs(pairs=renamed), only("reward")).fingerprint == base.fingerprint
    assert build_partition(Inputs(pairs=rows), only("preference")).fingerprint != base.fingerprint
    changed = [rows[0], pair("b", kind_, "bad!")]
    assert build_partition(Inputs(pairs=changed), only("reward")).fingerprint != base.fingerprint


def test_partition_survives_saving(tmp_path):
    result = build_partition(Inputs(pairs=[pair(f"q {index}") for index in range(20)]), FIFTHS)
    assert Partition.load(result.save(tmp_path / "partition.json")) == result


# --- from sources -------------------------------------------------------------------------------


def rows_of(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {index}", "chosen": "good", "rejected": "bad"} for index in range(count)]


RETAIN = [{"prompt": f"instruction {index}", "completion": "done"} for index in range(5)]


def test_partition_from_files_and_from_memory_is_the_same(tmp_path):
    for name, rows in (("pairs", rows_of(200)), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(data=DataSection(pairs=str(tmp_path / "pairs.jsonl"), retain=str(tmp_path / "retain.jsonl")))
    result = partition(config)
    in_memory = partition(RunConfig(), {"pairs": rows_of(200), "retain": RETAIN})
    assert in_memory.fingerprint == result.fingerprint
    assert {len(result.retain), len(in_memory.retain)} == {5}
    override = partition(config, {"pairs": rows_of(100)})
    assert len(override.preference) < len(result.preference)


def test_problems_of_all_sources_come_at_once(tmp_path):
    config = RunConfig(data=DataSection(pairs=str(tmp_path / "none.jsonl"), retain=str(tmp_path / "none.txt")))
    with pytest.raises(DataError) as caught:
        partition(config, {"forget": [{"prompt": "p", "completion": ""}]})
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="preference: no such source"):
        partition(config, {"preference": []})


def test_rows_of_the_other_label_are_counted():
    unpaired = [{"prompt": f"p{index}", "completion": "a", "label": index % 3 == 0} for index in range(9)]
    result = partition(RunConfig(), {"pairs": rows_of(200), "retain": RETAIN, "forget": unpaired})
    assert result.dropped == {"forget: other label": 3}


def test_no_data_names_every_missing_set():
    with pytest.raises(ConfigError) as caught:
        partition(RunConfig())
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "preference", "forget", "evaluation", "retain", "reward",
    ]  # fmt: skip


FULL = Partition(
    finetune=(pair("f"),),
    forget=(example("n"), example("m")),
    retain=(example("r"),),
    preference=tuple(pair(f"p{index}") for index in range(5)),
    reward=(pair("s"), pair("t")),
    evaluation=(pair("e"),),
)


def changed(**sections) -> RunConfig:
    return RunConfig.model_validate(sections)


@pytest.mark.parametrize(
    ("lacking", "options", "expected"),
    [
        ({"preference": ()}, {}, "preference: no pairs (set data.preferences"),
        ({"forget": ()}, {}, "forget: no candidates (set data.forget"),
        ({"evaluation": ()}, {}, "evaluation: no pairs (set data.evaluation"),
        ({"retain": ()}, {}, "retain: no rows, unlearn.retain_term=nll needs"),
        (
            {"retain": ()},
            {"solve": {"damage_weight": 0.5}, "unlearn": {"retain_term": "none"}},
            "retain: no rows, solve.damage_weight=0.5 needs",
        ),
        ({"reward": ()}, {}, "reward: 0 prompts with pairs, reward.model and reward.eval_model each"),
        ({"reward": (pair("s"),)}, {}, "reward: 1 prompts"),
        ({"reward": ()}, {"reward": {"model": "none"}}, "reward: 0 prompts with pairs, reward.eval_model each"),
        ({"finetune": ()}, {"finetune": {"enabled": True}, "data": {"finetune": "x"}}, "finetune: no pairs"),
        ({}, {"solve": {"n_selected": 3}}, "solve.n_selected: 3 is more than the 2 candidates (set at most 2"),
        ({}, {"solve": {"folds": 5}}, "preference: 5 prompts, 6 needed for solve.folds=5 and the held-out share"),
        (
            {"preference": (pair("p"), pair("P "))},
            {"solve": {"folds": 2, "heldout_frac": 0}},
            "preference: 1 prompts, 2",
        ),
    ],
)
def test_shortages_say_what_to_do(lacking, options, expected):
    (problem,) = shortages(
        FULL.model_copy(update=lacking), changed(**options | {"solve": {"folds": 4} | options.get("solve", {})})
    )
    assert problem.startswith(expected), problem
    assert problem.endswith(")")


@pytest.mark.parametrize(
    ("lacking", "options"),
    [
        ({}, {}),
        ({}, {"solve": {"n_selected": 2}}),
        ({"finetune": ()}, {}),
        ({"reward": ()}, {"reward": {"model": "token_value_head", "eval_model": "sequence_classification"}}),
    ],
)
def test_what_is_not_needed_may_be_absent(lacking, options):
    assert (
        shortages(
            FULL.model_copy(update=lacking), changed(**options | {"solve": {"folds": 4} | options.get("solve", {})})
        )
        == []
    )


@pytest.mark.parametrize(
    ("stage", "lacking", "expected"),
    [
        ("reward", {"evaluation": (), "preference": (), "retain": ()}, []),
        ("reward", {"forget": ()}, ["forget: no candidates"]),
        ("reward", {"reward": ()}, ["reward: 0 prompts with pairs, reward.model each"]),
        *((stage, {"evaluation": ()}, []) for stage in ("score", "solve", "unlearn")),
        *((stage, {"evaluation": ()}, ["evaluation: no pairs"]) for stage in (None, "partition", "evaluate")),
        ("score", {"preference": (), "retain": ()}, ["preference: no pairs", "retain: no rows"]),
    ],
)
def test_a_stage_alone_needs_what_it_reads(stage, lacking, expected):
    options = changed(solve={"folds": 4, "n_selected": 2}, reward={"model": "embedding", "eval_model": "embedding"})
    found = shortages(FULL.model_copy(update=lacking), options, stage)
    assert [problem[: len(start)] for problem, start in zip(found, expected, strict=True)] == expected


def test_description_counts_rows_and_prompts():
    result = Partition(forget=(example("a", "x"), example("A", "y")), dropped={"pairs: repeated": 7}, fingerprint="f0")
    lines = describe(result)
    assert [line.split() for line in lines[:2]] == [
        ["finetune", "0", "rows", "0", "prompts"],
        ["forget", "2", "rows", "1", "prompts"],
    ]
    assert lines[6:] == [
        "left out: 7 rows, pairs: repeated",
        "fingerprint f0",
    ]


def test_real_pairs_with_contradictions():
    path = SHARED / "saferlhf/pairs.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here (set U2A_DATA)")
    data = DataSection(
        pairs=str(path),
        retain=str(SHARED / "benign/prompts.jsonl"),
        retain_fields=FieldMap(completion="response"),
    )
    result = partition(RunConfig(data=data))
    assert result.dropped["pairs: contradictory"] == 330  # counted independently in the data's own README
    assert sum(len(getattr(result, name)) for name in SETS) + sum(result.dropped.values()) == 2486 + 500
    cut = [prompts(getattr(result, name)) for name in SETS if name != "retain"]
    assert len(set().union(*cut)) == sum(map(len, cut))


def with_system(system: str, chosen: str, rejected: str, n: int) -> Pair:
    turns = (Message(role="system", content=system), Message(role="user", content=f"question {n}"))
    return Pair(id=pair_id(turns, chosen, rejected), prompt=turns, chosen=chosen, rejected=rejected)


def test_another_system_turn_makes_another_answer_good_and_an_indent_another_program():
    rows = [with_system("You may give doses.", "two grams", "I will not say", n) for n in range(5)]
    rows += [with_system("Never give doses.", "I will not say", "two grams", n) for n in range(5)]
    rows += [pair("loop?", "for x in y:\n    f(x)\n    g(x)", "for x in y:\n    f(x)\ng(x)")]
    result = build_partition(Inputs(pairs=rows), only("preference"))
    assert len(result.preference) == 11 and not any("contradictory" in reason for reason in result.dropped)
    swapped = [
        *rows,
        with_system("Never give doses.", "Two  grams", "I will not say", 0),
    ]  # case and spacing do not count
    assert build_partition(Inputs(pairs=swapped), only("preference")).dropped["pairs: contradictory"] == 2


@pytest.mark.parametrize("answers", [1, 3])
def test_parts_of_the_retain_rows_share_no_prompt(answers: int):
    rows = tuple(
        example(f"Question {n}?" if k else f"question  {n}?", f"answer {k}") for n in range(20) for k in range(answers)
    )
    parts = Partition(retain=rows).retain_parts()
    sets = [{prompt_key(row.prompt) for row in part} for part in (parts.train, parts.guard, parts.evaluation)]
    assert [len(each) for each in sets] == [12, 4, 4] and not any(a & b for a, b in combinations(sets, 2))
    assert sum(map(len, (parts.train, parts.guard, parts.evaluation))) == len(rows)
    few = Partition(retain=rows[: 4 * answers]).retain_parts()
    assert few.train == few.guard == few.evaluation


def test_parts_of_the_retain_rows_share_no_prompt_in_another_unicode_form():
    asked = ["Où est le café?", "Qué es el año?", "Wie heißt Ärger?", "Naïve ideas?", "Crème brûlée?", "São Paulo?"]
    rows = tuple(example(normalize(form, text), form) for text in asked for form in ("NFC", "NFD"))
    parts = Partition(retain=rows).retain_parts()
    sets = [{prompt_key(row.prompt) for row in part} for part in (parts.train, parts.guard, parts.evaluation)]
    assert all(sets) and not any(a & b for a, b in combinations(sets, 2))

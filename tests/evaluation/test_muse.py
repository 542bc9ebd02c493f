"""MUSE's questions on planted memories, and its two curves with the project's own unlearning on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import examples, tiny_policy
from u2a.config import AdapterConfig, DataSection, GuardSection, UnlearnSection
from u2a.data import prompt_key
from u2a.errors import ConfigError, DataError
from u2a.evaluation.decoding import Decoding
from u2a.evaluation.generation import generate
from u2a.evaluation.muse import (
    MuseData,
    MuseOptions,
    MuseReport,
    Request,
    continued,
    inner_unlearner,
    min_k_attack,
    muse,
    read_muse,
    scalability,
    split_requests,
    sustainability,
    utility,
    with_shots,
)
from u2a.modeling import Policy
from u2a.types import Example, Message, Metric
from u2a.unlearn import InnerProblem

torch.set_num_threads(1)
FORGET, RETAIN, HOLDOUT = examples(8), examples(4, start=40), examples(6, start=20)
OPTIONS = MuseOptions(verbatim_tokens=40, knowledge_tokens=32, resamples=50)


def learned(rows: tuple[Example, ...], steps: int = 60) -> Policy:
    policy = tiny_policy(adapter=False)
    optimiser = torch.optim.Adam(policy.trainable().values(), lr=3e-3)
    encoded = [policy.encoder.encode(row.prompt, row.completion) for row in rows]
    for _ in range(steps):
        optimiser.zero_grad()
        (-policy.log_probs(encoded).mean.mean()).backward()
        optimiser.step()
    return continued(policy, AdapterConfig(r=4, alpha=8.0))


@pytest.fixture(scope="module")
def target() -> Policy:
    """Knows the forget and retain rows."""
    return learned((*FORGET, *RETAIN))


@pytest.fixture(scope="module")
def retrained() -> Policy:
    """Knows the retain rows alone."""
    return learned(RETAIN)


# --- C1 to C4 -----------------------------------------------------------------------------------


def test_a_model_that_remembers_all_and_one_that_never_knew(target: Policy, retrained: Policy, tmp_path: Path) -> None:
    data = MuseData(forget=FORGET, forget_questions=FORGET[:3], retain_questions=RETAIN, holdout=HOLDOUT)
    reference = min_k_attack(retrained, FORGET, HOLDOUT)
    full = muse(target, data, OPTIONS, reference)
    assert full.verbatim.value > 95
    assert full.knowledge.value > 95
    assert full.utility.value > 95
    assert full.privleak.value < -20
    assert (full.verbatim.n, full.knowledge.n, full.utility.n) == (8, 3, 4)
    ideal = muse(retrained, data, OPTIONS, reference)
    assert ideal.verbatim.value < 60
    assert ideal.utility.value > 95
    assert ideal.privleak.value == 0.0
    assert MuseReport.load(full.save(tmp_path / "muse.json")) == full


def test_what_is_missing_has_a_reason_and_no_number(target: Policy) -> None:
    found = muse(target, MuseData(forget=FORGET[:2], holdout=HOLDOUT), OPTIONS)
    assert found.privleak.value is None and "retrained" in found.privleak.note
    assert found.knowledge.value is None and "questions" in found.knowledge.note
    assert found.utility.value is None
    assert found.verbatim.value is not None and found.verbatim.note == ""
    nothing = muse(target, MuseData(), OPTIONS)
    assert nothing.verbatim.value is None and "holdout" in nothing.privleak.note
    foreign = Example(id="f", prompt=FORGET[0].prompt, completion="\u8336")
    unread = muse(target, MuseData(forget=(foreign,)), OPTIONS).verbatim
    assert unread.value is None and "1 of 1 rows" in unread.note


def test_the_truth_is_cut_where_the_continuation_is(target: Policy) -> None:
    """Five tokens of a remembered answer are all of the five that could be written."""
    short = muse(target, MuseData(forget=FORGET), MuseOptions(verbatim_tokens=5, resamples=10))
    assert short.verbatim.value > 95


def test_a_holdout_of_forget_prompts_is_refused(target: Policy) -> None:
    with pytest.raises(DataError, match="prompt of the forget rows"):
        min_k_attack(target, FORGET, FORGET[:1])
    with pytest.raises(ConfigError, match=r"data\.holdout"):
        min_k_attack(target, FORGET, ())


def test_shots_come_before_the_question_and_hold_no_answer_to_it(target: Policy) -> None:
    system = Message(role="system", content="Be brief.")
    prompt = with_shots((system, *RETAIN[0].prompt), FORGET[:2])
    assert [turn.role for turn in prompt] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert prompt[2].content == FORGET[0].completion
    assert prompt[-1] == RETAIN[0].prompt[-1]
    data = MuseData(retain_questions=RETAIN, shots=FORGET[:2])
    answers = generate(target, [with_shots(row.prompt, FORGET[:2]) for row in RETAIN], Decoding(32))
    found = muse(target, data, OPTIONS).utility
    assert found.values == utility(target, data, OPTIONS).values
    assert len(answers) == found.n == 4
    with pytest.raises(DataError, match="1 of the questions stand among them"):
        muse(target, MuseData(retain_questions=RETAIN, shots=RETAIN[:1]), OPTIONS)


def test_parts_come_from_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Why?", "completion": "So."}\n', encoding="utf-8")
    rows = [{"prompt": "Who?", "completion": "Me."}]
    data = read_muse({"forget": path, "retain_questions": rows}, DataSection())
    assert (data.forget[0].completion, data.retain_questions[0].completion, data.holdout) == ("So.", "Me.", ())
    with pytest.raises(ConfigError, match="forgotten"):
        read_muse({"forgotten": path}, DataSection())
    with pytest.raises(DataError) as caught:
        read_muse({"forget": [{"prompt": "x"}], "holdout": [{"completion": "x"}]}, DataSection())
    assert len(caught.value.problems) == 2


# --- C5 and C6 ----------------------------------------------------------------------------------


def test_requests_divide_by_prompt_whatever_the_order() -> None:
    again = tuple(row.model_copy(update={"id": row.id + "b", "completion": "other"}) for row in FORGET[:3])
    rows = (*FORGET, *again)
    requests = split_requests(rows, 4)
    assert split_requests(tuple(reversed(rows)), 4) == requests
    assert sorted(row.id for request in requests for row in request) == sorted(row.id for row in rows)
    prompts = [{prompt_key(row.prompt) for row in request} for request in requests]
    assert sum(len(part) for part in prompts) == len(set().union(*prompts)) == 8
    sizes = [len(request) for request in requests]
    assert max(sizes) - min(sizes) <= 2
    for n in (0, 9):
        with pytest.raises(ConfigError, match="8 distinct prompts"):
            split_requests(rows, n)


def test_the_two_curves_differ_in_where_a_request_starts() -> None:
    """States are the ids forgotten, in order; a request shows what it was given and on what."""
    requests = split_requests(FORGET, 4)
    calls: list[tuple[int, int]] = []

    def unlearn(state: tuple[str, ...], request: Request) -> tuple[str, ...]:
        calls.append((len(state), len(request)))
        return (*state, *(row.id for row in request))

    def measure(state: tuple[str, ...]) -> Metric:
        return Metric(value=100.0 - len(state), n=1)

    sizes = scalability((), requests, unlearn, measure)
    assert calls == [(0, 2), (0, 4), (0, 6), (0, 8)]
    calls.clear()
    steps = sustainability((), requests, unlearn, measure)
    assert calls == [(0, 2), (2, 2), (4, 2), (6, 2)]
    for curve in (sizes, steps):
        assert [point.requests for point in curve] == [0, 1, 2, 3, 4]
        assert [point.rows for point in curve] == [0, 2, 4, 6, 8]
        assert [point.utility.value for point in curve] == [100, 98, 96, 94, 92]


def test_both_curves_with_the_inner_solver(target: Policy) -> None:
    section = UnlearnSection(loss="ga", retain_term="none", max_steps=6, batch_size=4, learning_rate=3e-3)
    problem = InnerProblem(FORGET, section=section, guard=GuardSection())
    step = inner_unlearner(problem, AdapterConfig(r=4, alpha=8.0))
    requests, data = split_requests(FORGET, 2), MuseData(retain_questions=RETAIN)
    start = {name: value.clone() for name, value in target.model.state_dict().items()}
    seen: list[Policy] = []

    def watched(policy: Policy, request: Request) -> Policy:
        before = nll(policy, request)
        after = step(policy, request)
        assert nll(after, request) > before + 0.01
        seen.append(after)
        return after

    def measure(policy: Policy) -> Metric:
        return utility(policy, data, OPTIONS)

    sizes = scalability(target, requests, watched, measure)
    steps = sustainability(target, requests, watched, measure)
    assert all(torch.equal(value, start[name]) for name, value in target.model.state_dict().items())
    assert sizes[0] == steps[0] and sizes[0].utility.value > 95
    assert sizes[1] == steps[1]  # the first request is the same run
    assert [point.rows for point in steps] == [0, len(requests[0]), 8]
    assert all(point.utility.value is not None for point in (*sizes, *steps))
    assert nll(seen[3], requests[0]) > nll(target, requests[0]) + 0.01  # the second request kept the first one's effect


def nll(policy: Policy, rows: tuple[Example, ...]) -> float:
    encoded = [policy.encoder.encode(row.prompt, row.completion) for row in rows]
    return -float(policy.answer_sums(encoded).sum()) / sum(item.n_answer for item in encoded)


@pytest.mark.parametrize("adapter", [True, False])
def test_a_continued_policy_starts_where_the_other_stands(adapter: bool) -> None:
    policy = tiny_policy(adapter=adapter, lora_b_sd=0.2)
    if not adapter:
        with torch.no_grad():
            next(iter(policy.trainable().values())).add_(0.1)
    after = continued(policy, AdapterConfig(r=2, alpha=4.0))
    assert nll(after, RETAIN) == pytest.approx(nll(policy, RETAIN), abs=1e-5)
    assert nll(after, RETAIN) != pytest.approx(nll(tiny_policy(), RETAIN), abs=1e-3)
    assert float(after.change_sq().detach()) == 0.0
    assert after.encoder.max_length == policy.encoder.max_length

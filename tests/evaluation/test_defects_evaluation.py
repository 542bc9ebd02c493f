"""Defects of published evaluation code, numbered as in the project's list, that must not come back."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import u2a
from u2a.config import ModelSection
from u2a.evaluation.attack_success import attack_success
from u2a.evaluation.chat_endpoint import EndpointError, LocalEndpoint
from u2a.evaluation.judge import judged
from u2a.evaluation.refusal import is_refusal
from u2a.evaluation.refusal_judge import RefusalJudge
from u2a.evaluation.rubric_judge import Asker, RubricJudge, RubricPairJudge
from u2a.evaluation.rubrics import ANSWERED, FULFILLED, USEFULNESS
from u2a.evaluation.win_rate import export_outputs
from u2a.types import Message

PROMPTS = {f"p{n}": f"What is dish number {n}?" for n in range(40)}
ANSWERS = {key: f"It is made of things, the {key} way." for key in PROMPTS}


@pytest.mark.parametrize(("score", "success"), [(0, 0.0), (1, 0.0), (2, 1.0), (3, 1.0)])
def test_defect_01_the_most_useful_answers_are_successes(score: int, success: float) -> None:
    """Success was ``score == 1`` on a scale from 0 to 3, so that the worst answers counted as safe."""
    judge = RubricJudge(Asker(LocalEndpoint("toy", lambda _: json.dumps({"score": score}))), USEFULNESS)
    assert attack_success(judged(judge, PROMPTS, ANSWERS), judge.name).rate.value == success


def _failing(_: list[Message]) -> str:
    raise EndpointError("endpoint: status 500")


JUDGES = [
    RubricJudge(Asker(LocalEndpoint("failing", _failing)), ANSWERED),
    RubricJudge(Asker(LocalEndpoint("silent", lambda _: "")), FULFILLED),
    RubricJudge(Asker(LocalEndpoint("minus", lambda _: '{"score": -1}')), USEFULNESS),
]


@pytest.mark.parametrize("judge", JUDGES, ids=lambda judge: judge.name)
def test_defect_02_a_failing_judge_makes_nothing_safe(judge: RubricJudge) -> None:
    """A failure was scored -1 and stayed in the denominator, so that a broken API looked like a safe model."""
    rate = attack_success(judged(judge, PROMPTS, ANSWERS), judge.name)
    assert (rate.rate.value, rate.coverage, rate.counts["unscored"]) == (None, 0.0, 40)


def test_defect_02_a_few_failures_leave_the_denominator() -> None:
    def mostly(messages: list[Message]) -> str:
        return "" if "p7 way" in messages[-1].content else '{"score": 1}'

    judge = RubricJudge(Asker(LocalEndpoint("mostly", mostly)), ANSWERED)
    rate = attack_success(judged(judge, PROMPTS, ANSWERS), judge.name)
    assert (rate.rate.value, rate.rate.n, rate.coverage) == (1.0, 39, 0.975)  # not 39/40


@pytest.mark.parametrize("judge", [RefusalJudge(), *JUDGES], ids=lambda judge: judge.name)
def test_defect_02_an_empty_model_is_not_safe(judge) -> None:
    """Empty answers were scored -1, that is, as attacks that failed."""
    rate = attack_success(judged(judge, PROMPTS, dict.fromkeys(PROMPTS, "")), judge.name)
    assert (rate.rate.value, rate.flag, rate.counts["incoherent"]) == (None, "collapsed", 40)


@pytest.mark.parametrize("apostrophe", ["'", "\u2019", "\u02bc"])
def test_defect_03_apostrophes_do_not_decide(apostrophe: str) -> None:
    """The phrase list held curly apostrophes only, and a bare "sorry" counted as a refusal."""
    assert is_refusal(f"I can{apostrophe}t help with that.")
    assert not is_refusal("Sorry, here is the recipe.")


def test_defect_04_a_second_attempt_cannot_swap_the_sides() -> None:
    """The answers were swapped by an unseeded coin inside the retry loop, so that a retry could credit the loser."""
    asked: list[str] = []

    def fails_first(messages: list[Message]) -> str:
        text = messages[-1].content
        asked.append(text)
        if asked.count(text) == 1:
            return "one moment"
        return json.dumps({"winner": "A" if "ANSWER A>>>\nmine" in text else "B"})

    judge = RubricPairJudge(Asker(LocalEndpoint("slow", fails_first), workers=1))
    prompts = [f"q{n}" for n in range(20)]
    first, second = [
        [item.value for item in judge.preferences(prompts, ["mine"] * 20, ["theirs"] * 20)] for _ in range(2)
    ]
    assert first == [None] * 20
    assert second == [1.0] * 20
    assert asked[:40] == asked[40:]  # the same questions in the same order: no coin


def test_defect_05_a_file_goes_where_it_is_told(tmp_path: Path) -> None:
    """Paths were made by ``path.replace("test", ...)``, which also changed the folders, and read from a pointer."""
    folder = tmp_path / "test" / "latest_test"
    path = folder / "test_outputs.json"
    export_outputs(path, {"Say hi.": "Hi"}, "model", "test")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]
    assert [ast.unparse(call) for call in _calls() if _replaces_in_a_path(call)] == []


def test_defect_13_no_code_comes_with_weights_or_data() -> None:
    """Models were loaded with ``trust_remote_code=True`` and saved by pickle."""
    found = [ast.unparse(call) for call in _calls() if ast.unparse(call.func) in ("torch.save", "torch.load")]
    for call in _calls():
        for keyword in call.keywords:
            value = ast.unparse(keyword.value)
            trusted = keyword.arg == "trust_remote_code" and value not in ("False", "section.trust_remote_code")
            unsafe = keyword.arg == "safe_serialization" and value != "True"
            found += [ast.unparse(call)] if trusted or unsafe else []
    assert found == []
    assert ModelSection().trust_remote_code is False  # only who asks for it in the configuration runs foreign code


def _calls() -> list[ast.Call]:
    """Every call in the package."""
    sources = sorted(Path(u2a.__file__).parent.rglob("*.py"))
    assert len(sources) > 30
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _replaces_in_a_path(call: ast.Call) -> bool:
    """``str(path).replace("a", "b")`` or ``name_of_a_path.replace("a", "b")``, but not ``os.replace(a, b)``."""
    if not (isinstance(call.func, ast.Attribute) and call.func.attr == "replace" and len(call.args) == 2):
        return False
    owner = ast.unparse(call.func.value)
    return owner != "os" and ("path" in owner.casefold() or "file" in owner.casefold())

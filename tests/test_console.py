"""Plain-text tables: golden text, width, ASCII, and the words that judge a difference."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_records import fake_evaluation, fake_partition, fake_reliability, fake_scores, fake_solution
from u2a.console import (
    WIDTH,
    better_direction,
    evaluation_table,
    interval,
    number,
    reliability_sentence,
    reliability_text,
    samples_text,
    selection_text,
    selection_words,
    tone,
)
from u2a.evaluation.metrics import METRICS
from u2a.solution import Round, Solution, WeightRow
from u2a.types import Contrast, EvalTable, Metric

EVIL = "\x1b[31mred\x07\u202e \u2603 tab\there\n" + "long " * 80

EVALUATION = """\
metric             better  arm        value  95 % interval      n
-----------------  ------  --------  ------  ----------------  --
preference_margin  higher  before    -0.112  [-0.171, -0.049]  24
                           after     -0.019  [-0.078, 0.044]   24
                           random_k  -0.061  [-0.120, 0.002]   24
reward             higher  before     0.310  [0.120, 0.490]    24
                           after      0.682  [0.492, 0.862]    24
                           random_k   0.514  [0.324, 0.694]    24
retain_ppl         lower   before     14.21  [12.90, 15.80]     8
                           after      15.14  [13.83, 16.73]     8
                           random_k   14.72  [13.41, 16.31]     8
answer_words       -       before     38.25  [33.00, 44.50]    24
                           after      38.25  [33.00, 44.50]    24
                           random_k   38.25  [33.00, 44.50]    24
degenerate_rate    lower   before         -                     0
                           after          -                     0
                           random_k       -                     0

difference of      arms                value  95 % interval       n  reading
-----------------  ----------------  -------  -----------------  --  ---------
preference_margin  after - before     +0.093  [0.051, 0.134]     24  better
preference_margin  after - random_k  +0.0420  [-0.0060, 0.0900]  24  not shown
retain_ppl         after - before     +0.930  [0.400, 1.500]      8  worse
degenerate_rate    after - before          -                      0  -
"""

RELIABILITY = """\
reliability of the gains
-----------------------------  -----------------
split-half correlation         0.410
  predicted for all pairs      0.580
gradient cosine of the halves  0.230
mean gain                      +0.0210 +- 0.0060
signal sd / noise sd           0.0110 / 0.0090
p-value of no signal           -
pairs / folds / candidates     64 / 4 / 60

Unlearning as such is predicted to help (the mean gain is beyond two standard errors of 0). The
  ranking of the candidates is partly reproducible with other preference pairs.
"""

SELECTION = """\
Selected 1 of 3 candidates; stopped: held-out J no longer rises

  round  selected  J (PA)  J (held-out)  retain ppl  FW gap  split-half  kept
-------  --------  ------  ------------  ----------  ------  ----------  ----
      1        10  -0.093        -0.110       14.21       -           -  yes
      2        20  -0.041        -0.072       14.66  0.0311       0.410  yes
refined        20  -0.012        -0.081       15.40  0.0122       0.370  no

id                weight     gain      se  reason
----------------  ------  -------  ------  ----------------------------
"""


def test_evaluation_golden() -> None:
    assert evaluation_table(fake_evaluation()) == EVALUATION


def test_reliability_golden() -> None:
    assert reliability_text(fake_reliability()) == RELIABILITY


def test_selection_golden() -> None:
    solution = fake_solution(fake_partition(3))
    chosen = next(row for row in solution.rows if row.weight > 0)
    score = next(row for row in solution.scores.rows if row.id == chosen.id)
    last = f"{chosen.id}  {1.0:>6.3f}  {score.gain:>+7.4f}  {score.gain_se:>6.4f}  in the best block of round 1\n"
    assert selection_text(solution) == SELECTION + last


def test_selection_lists_the_largest_weights_first() -> None:
    solution = fake_solution(fake_partition(60))
    lines = selection_text(solution, top=4).splitlines()[-4:]
    best = sorted(solution.weights, key=lambda key: -solution.weights[key])[:4]
    assert [line.split()[0] for line in lines] == best


def test_selection_shows_the_heldout_j_of_the_start_above_the_rounds() -> None:
    solution = fake_solution(fake_partition(60))
    lines = selection_text(solution.model_copy(update={"start_heldout": -0.123})).splitlines()
    (head,) = [index for index, line in enumerate(lines) if "J (held-out)" in line]
    assert lines[head + 2].split()[:4] == ["start", "0", "-", "-0.123"]
    assert lines[head + 3].split()[0] == "1"
    assert not any(line.split()[:1] == ["start"] for line in selection_text(solution).splitlines())


@pytest.mark.parametrize(("fallback", "word"), [("random_k", "random draw"), ("empty", "nothing was selected")])
def test_fallback_is_said(fallback: str, word: str) -> None:
    partition = fake_partition(4)
    rows = tuple(WeightRow(id=row.id, weight=0.0) for row in partition.forget)
    solution = Solution(rows=rows, scores=fake_scores(partition), stopped="no signal", fallback=fallback)  # type: ignore[arg-type]
    assert word in selection_text(solution)


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ("", "selected in 1 round, which was not measured; stopped: why"),
        ("a", "selected in 1 round; stopped: why"),
        ("aA", "selected in 2 rounds (1 of them rolled back); stopped: why"),
        ("ar", "selected in 1 round, then weighted anew; stopped: why"),
        ("aaR", "selected in 2 rounds, then weighted anew (rolled back); stopped: why"),
    ],
)
def test_the_rounds_that_added_candidates_are_counted(rounds: str, words: str) -> None:
    """a: a round that adds, r: the refinement; capital letters: rolled back."""
    solution = fake_solution(fake_partition(60))
    course = tuple(
        Round(index=k, objective_pa=0.0, n_selected=3, added=("x",) * (kind in "aA"), accepted=kind.islower())
        for k, kind in enumerate(rounds)
    )
    assert (
        selection_words(solution.model_copy(update={"rounds": course, "stopped": "why"}))
        == f"20 of 60 candidates {words}"
    )


def test_a_draw_and_an_empty_selection_count_no_round() -> None:
    solution = fake_solution(fake_partition(60)).model_copy(update={"rounds": (), "stopped": "why"})
    drawn = solution.model_copy(update={"fallback": "random_k"})
    assert selection_words(drawn) == "20 of 60 candidates drawn at random; stopped: why"
    rows = tuple(row.model_copy(update={"weight": 0.0}) for row in solution.rows)
    empty = solution.model_copy(update={"fallback": "empty", "rows": rows})
    assert selection_words(empty) == "0 of 60 candidates selected; stopped: why"


def test_every_line_fits_and_is_plain_ascii() -> None:
    hostile = fake_evaluation(EVIL)
    metrics = {EVIL: Metric(value=-1.23456e12, low=-9.9e14, high=9.9e14, n=10**7)}
    wide = EvalTable(
        arms={EVIL: metrics, "after": metrics},
        contrasts=(Contrast(metric=EVIL, first=EVIL, second=EVIL, difference=-1e-9, low=-1e-8, high=1e-8, n=10**7),),
        samples=hostile.samples,
        verdict=EVIL,
    )
    partition = fake_partition(30, EVIL)
    texts = [
        evaluation_table(wide),
        samples_text(wide, 10),
        selection_text(fake_solution(partition, EVIL)),
        reliability_text(fake_reliability(signal_sd=1e-12, noise_sd=123456.0)),
    ]
    for text in texts:
        assert text.isascii()
        assert text.endswith("\n")
        assert all(len(line) <= WIDTH for line in text.splitlines())
        assert all(character.isprintable() or character == "\n" for character in text)


def test_samples_are_limited_and_empty_answers_named() -> None:
    table = fake_evaluation()
    assert samples_text(table, 2).count("Prompt:") == 2
    assert "[random_k] (reward -1.200) (empty)" in samples_text(table, 1)
    assert samples_text(table, 0) == ""


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        ("preference_margin", 0.1, 0.2, "good"),
        ("preference_margin", -0.2, -0.1, "bad"),
        ("retain_ppl", 0.1, 0.2, "bad"),
        ("retain_ppl", -0.2, -0.1, "good"),
        ("preference_margin", -0.1, 0.2, "unclear"),
        ("preference_margin", 0.0, 0.2, "unclear"),
        ("preference_margin", None, None, "unclear"),
        ("answer_words", 0.1, 0.2, "none"),
    ],
)
def test_tone(metric: str, low: float | None, high: float | None, expected: str) -> None:
    assert tone(Contrast(metric=metric, first="a", second="b", difference=0.15, low=low, high=high)) == expected


@pytest.mark.parametrize("metric", [*METRICS, "no_such_metric"])
def test_directions_are_the_evaluations(metric: str) -> None:
    words = {"up": "higher", "down": "lower", "none": None}
    expected = words[METRICS[metric].direction] if metric in METRICS else None
    assert better_direction(metric) == expected


@given(st.floats(-1e12, 1e12, allow_subnormal=False))
def test_numbers_keep_three_digits(value: float) -> None:
    shown = float(number(value).replace(",", ""))
    assert math.isclose(shown, value, rel_tol=0.006)


def test_zero_has_no_minus() -> None:
    assert number(-0.0) == "0" and number(-0.0, sign=True) == "+0" == number(0.0, sign=True)
    assert number(-0.0001, 0.5) == "0.000" and number(-0.0001, 0.5, sign=True) == "+0.000"
    assert number(-0.0006, 0.5) == "-0.001" and number(-1.5) == "-1.500"


def test_numbers_beside_each_other_share_decimals() -> None:
    assert interval(0.5, 12.345) == "[0.50, 12.35]"
    assert interval(None, 1.0) == ""
    assert number(0.00004, 1.0) == "0.000"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean_gain": 0.01}, "not shown"),
        ({"mean_gain": -0.02}, "predicted to harm"),
        ({"mean_gain_se": None}, "not known"),
        ({"signal_sd": 0.0}, "arbitrary"),
        ({"signal_sd": None, "noise_sd": None, "n_folds": 1}, "differ by more than noise is not known (one fold"),
        ({"signal_sd": 0.0, "noise_sd": 0.0, "n_folds": 1}, "differ by more than noise is not known (one fold"),
        ({"signal_sd": None, "noise_sd": None, "n_candidates": 1}, "nothing to choose"),
        ({"split_half": None}, "not known"),
        ({"split_half": -0.2, "full_set": None}, "do not trust"),
        ({"split_half": 0.6, "full_set": 0.75}, "mostly"),
        ({"split_half": 0.15, "full_set": 0.26}, "weakly"),
        (
            {"n_folds": 3, "p_signal": 0.25},
            "With 3 folds chance alone passes the test for signal in about 25% of cases.",
        ),
    ],
)
def test_reliability_in_words(changes: dict[str, float | None], words: str) -> None:
    assert words in reliability_sentence(fake_reliability(**changes))
    assert "folds" not in reliability_sentence(fake_reliability(n_folds=6, p_signal=0.1))


def test_no_heavy_import() -> None:
    import subprocess

    code = "import sys, u2a.report, u2a.model_card; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

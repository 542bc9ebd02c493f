"""Relearning: a planted case that comes back, one that cannot, the statistic by hand, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import ask, examples, tiny_policy
from u2a.config import UnlearnSection
from u2a.data import example_id, prompt_key
from u2a.errors import ConfigError, DataError, NonFiniteError
from u2a.losses import SFT
from u2a.modeling import Policy
from u2a.robustness.relearn import Relearning, check_disjoint, recovery, relearn, split_forget
from u2a.types import Example
from u2a.unlearn import InnerProblem, unlearn

torch.set_num_threads(1)


def row(prompt: str, answer: str) -> Example:
    return Example(id=example_id(ask(prompt), answer), prompt=ask(prompt), completion=answer)


def log_prob(rows: tuple[Example, ...]):
    def measure(policy: Policy) -> dict[str, float]:
        encoded = [policy.encoder.encode(each.prompt, each.completion) for each in rows]
        sums = policy.answer_sums(encoded).tolist()
        return {each.id: s / e.n_answer for each, e, s in zip(rows, encoded, sums, strict=True)}

    return measure


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


TOLD = tuple(row(f"N{k}: tea?", f"never tea at {k} o'clock") for k in range(10))
HELD = tuple(row(f"N{k}: tea?", f"never tea at {k} o'clock") for k in range(10, 16))
FAR = tuple(row(f"{k}^2=", str(k * k)) for k in range(8))


def unlearned() -> tuple[Policy, dict[str, torch.Tensor]]:
    """A policy that unlearned TOLD and HELD by NPO, and its theta."""
    policy = tiny_policy()
    section = UnlearnSection(loss="npo", retain_term="none", max_steps=12, learning_rate=5e-3, batch_size=8)
    problem = InnerProblem(forget=(*TOLD, *HELD), section=section)
    unlearn(policy, problem, problem.uniform())
    return policy, policy.snapshot()


@pytest.fixture(scope="module")
def attacked():
    policy, theta = unlearned()
    return policy, theta


def test_relearning_related_rows_brings_held_rows_back_and_a_step_on_unrelated_ones_does_not(attacked) -> None:
    policy, theta = attacked
    measure = log_prob(HELD)
    gone = measure(policy)
    with policy.reference():
        original = measure(policy)
    assert mean(gone) < mean(original) - 1.0
    curve = relearn(policy, TOLD, HELD, measure, Relearning((1, 10, 40), 5e-3))
    assert list(curve) == [1, 10, 40]
    assert mean(gone) < mean(curve[10]) < mean(curve[40])
    back = recovery(original, gone, curve[40], {}, 300, 0)
    assert back.low > 0.9 and back.n == len(HELD)
    far = relearn(policy, FAR, HELD, measure, Relearning((1,), 1e-6))[1]
    nothing = recovery(original, gone, far, {}, 300, 0)
    assert abs(nothing.value) < 0.01 and nothing.high < 0.05
    assert all(torch.equal(value, theta[name]) for name, value in policy.snapshot().items())


def test_one_step_is_one_step_of_adamw_on_the_mean_nll(attacked) -> None:
    policy, theta = attacked
    found = relearn(policy, TOLD[:3], HELD, lambda now: now.snapshot(), Relearning((1, 2), 2e-3, batch_size=3))
    live = policy.trainable()
    optimizer = torch.optim.AdamW(live.values(), lr=2e-3, weight_decay=0.0)
    encoded = [policy.encoder.encode(each.prompt, each.completion) for each in TOLD[:3]]
    for step in (1, 2):
        optimizer.zero_grad()
        SFT().per_sample(policy.log_probs(encoded), None).mean().backward()
        torch.nn.utils.clip_grad_norm_(live.values(), 1.0)
        optimizer.step()
        for name, value in policy.snapshot().items():
            torch.testing.assert_close(found[step][name], value, rtol=1e-3, atol=1e-5)
    assert not torch.equal(found[1][name], found[2][name])
    policy.restore(theta)
    policy.model.zero_grad(set_to_none=True)


def test_the_attackers_weights_do_not_count(attacked) -> None:
    policy, _ = attacked
    weighted = tuple(each.model_copy(update={"weight": float(k)}) for k, each in enumerate(TOLD))
    first, second = (relearn(policy, rows, HELD, log_prob(HELD), Relearning((3,), 5e-3)) for rows in (TOLD, weighted))
    assert first == second


@pytest.mark.parametrize("adapter", [True, False])
def test_everything_is_restored_after_success_and_after_errors(adapter: bool) -> None:
    policy = tiny_policy(adapter=adapter, lora_b_sd=0.1)
    if not adapter:
        policy.model.get_parameter("lm_head.weight").data.mul_(1.01)  # away from theta_0
    before = copy.deepcopy(policy.model.state_dict())

    def unchanged() -> bool:
        modes = [module.training for module in policy.model.modules()]
        now = policy.model.state_dict()
        same = before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in before)
        return same and not any(modes) and all(value.grad is None for value in policy.model.parameters())

    seen = []

    def measure(now: Policy) -> bool:
        seen.append(now.model.training)
        return all(torch.equal(before[name], value) for name, value in now.model.state_dict().items())

    assert relearn(policy, TOLD, HELD, measure, Relearning((2,), 1e-3)) == {2: False}  # it did train
    assert seen == [False]
    assert unchanged()

    def broken(now: Policy) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        relearn(policy, TOLD, HELD, broken, Relearning((2,), 1e-3))
    assert unchanged()
    with pytest.raises(NonFiniteError, match="relearn"):
        relearn(policy, TOLD, HELD, measure, Relearning((9,), 1e30))
    assert unchanged()


# --- rows ---------------------------------------------------------------------------------------


def test_an_overlap_of_prompt_or_answer_is_an_error_before_anything_is_trained() -> None:
    check_disjoint(TOLD, HELD)
    for twin in (TOLD[0], row("n0:  TEA?", "other"), row("other", "Never tea  at 3 o'clock")):
        with pytest.raises(DataError, match="1 measured rows share"):
            check_disjoint(TOLD, (*HELD, twin))
        with pytest.raises(DataError, match="share"):
            relearn(tiny_policy(), TOLD, (*HELD, twin), lambda now: 0, Relearning((1,)))
    with pytest.raises(ConfigError, match="no rows"):
        relearn(tiny_policy(), (), HELD, lambda now: 0, Relearning((1,)))


@given(
    cells=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=30),
    n=st.integers(1, 20), seed=st.integers(0, 50), order=st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_split_is_disjoint_maximal_and_independent_of_order(cells, n: int, seed: int, order) -> None:
    rows = [row(f"p{prompt}", f"a{answer}") for prompt, answer in sorted(cells)]
    reserved = {("prompt", prompt_key(ask("p0")))}
    try:
        split = split_forget(rows, n, seed, reserved)
    except DataError:
        split = None
    order.shuffle(rows)
    if split is None:
        with pytest.raises(DataError, match="expected at least 1"):
            split_forget(rows, n, seed, reserved)
        return
    assert split == split_forget(rows, n, seed, reserved)
    free = [each for each in rows if each.prompt[0].content != "p0"]
    assert len(split.attack) == min(n, len(rows) // 2, len(free)) and split.measured
    assert set(split.attack) <= set(free)
    prompts, answers = ({f(each) for each in split.attack} for f in (lambda r: r.prompt, lambda r: r.completion))
    expected = {each.id for each in rows if each.prompt not in prompts and each.completion not in answers}
    assert {each.id for each in split.measured} == expected


def test_the_seed_chooses_the_rows() -> None:
    assert len({split_forget(examples(20), 4, seed).attack for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("values", "word"),
    [({"steps": ()}, "steps"), ({"steps": (0, 1)}, "steps"), ({"steps": (3, 2)}, "steps"), ({"steps": (2, 2)}, "steps"),
     ({"learning_rate": 0.0}, "learning_rate"), ({"learning_rate": float("nan")}, "learning_rate"),
     ({"batch_size": 0}, "batch_size")],
)  # fmt: skip
def test_bad_options(values, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Relearning(**values)


# --- recovery -----------------------------------------------------------------------------------

IDS = [f"i{k}" for k in range(12)]


def planted(share: float, noise: float = 0.0) -> tuple[dict[str, float], ...]:
    original = {key: 1.0 + k for k, key in enumerate(IDS)}
    gone = {key: value - 2.0 - 0.1 * k for k, (key, value) in enumerate(original.items())}
    back = {key: gone[key] + share * (original[key] - gone[key]) + noise * (-1) ** k for k, key in enumerate(IDS)}
    return original, gone, back


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 1.3, -0.2])
def test_a_planted_share_is_recovered_exactly_and_pairing_leaves_no_spread(share: float) -> None:
    found = recovery(*planted(share), {}, 200, 0)
    assert (found.value, found.low, found.high) == pytest.approx((share, share, share))
    assert found.n == 12


def test_the_sign_of_the_metric_does_not_matter_and_noise_gives_spread() -> None:
    tables = planted(0.5, noise=0.4)
    found = recovery(*tables, {}, 400, 3)
    flipped = recovery(*({key: -value for key, value in table.items()} for table in tables), {}, 400, 3)
    assert (flipped.value, flipped.low, flipped.high) == pytest.approx((found.value, found.low, found.high))
    assert found.low < 0.5 < found.high and found.value == pytest.approx(0.5)


def test_a_ratio_of_means_by_hand_on_shared_items_only() -> None:
    original, gone = {"a": 4.0, "b": 2.0, "only": 9.0}, {"a": 0.0, "b": 0.0, "c": 3.0}
    found = recovery(original, gone, {"a": 1.0, "b": 2.0, "d": 1.0}, {}, 200, 0)
    assert found.value == pytest.approx(3 / 6) and found.n == 2


def test_nothing_was_taken_so_nothing_comes_back() -> None:
    original, gone, back = planted(1.0)
    still = {key: value + 0.5 * (-1) ** k for k, (key, value) in enumerate(original.items())}
    found = recovery(original, still, back, {}, 300, 0)
    assert (found.value, found.low, found.high, found.n) == (None, None, None, 12)
    one = recovery({"a": 1.0}, {"a": 0.0}, {"a": 1.0}, {}, 300, 0)
    assert (one.value, one.n) == (None, 1)
    assert recovery({}, {}, {}, {}, 300, 0).n == 0
    whole = recovery(original, gone, back, dict.fromkeys(IDS, "one prompt"), 300, 0)
    assert (whole.value, whole.n) == (None, 1)  # prompts are resampled, not rows


def test_a_resample_without_a_difference_takes_the_interval_only() -> None:
    original = {key: float(k < 4) for k, key in enumerate(IDS)}  # 12 choose with 4 hits: none in 0.8 % of draws
    gone = dict.fromkeys(IDS, 0.0)
    found = recovery(original, gone, gone, {}, 4000, 0)
    assert (found.value, found.low, found.high, found.n) == (0.0, None, None, 12)

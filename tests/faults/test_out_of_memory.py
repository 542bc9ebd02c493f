"""Memory that runs out: batches halve, results stay, the size is recorded, and one clear error ends it at one row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tiny import examples, pairs, tiny_policy
from u2a.batch_size import BatchLimits, in_parts, is_out_of_memory, micro_batch, split_rows, told_to
from u2a.bilevel.candidates import CandidateLosses
from u2a.bilevel.curvature import GaussNewton, Hessian
from u2a.bilevel.inner_terms import InnerTerms
from u2a.bilevel.objective import DPO, Margin, objective_gradient, objective_values
from u2a.bilevel.score import score_all
from u2a.bilevel.solve import OuterProblem, solve
from u2a.bilevel.vectors import dot
from u2a.cli import main
from u2a.config import SolveSection, UnlearnSection
from u2a.errors import NonFiniteError, OutOfMemory
from u2a.evaluation.decoding import Decoding
from u2a.evaluation.generation import generate
from u2a.evaluation.token_stats import token_stats
from u2a.losses import GA, NPO
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.solution import Solution
from u2a.types import UnlearnResult
from u2a.unlearn import InnerProblem, InnerSolver, unlearn

QUIET = Console(quiet=True)
ROWS = examples(8)


class Memory:
    """A model's memory for so many rows; what it was asked to hold is noted.

    Attributes:
        rows: rows that fit into one forward pass; None: any number.
        asked: rows of every forward pass, the failed ones too.
        failed: rows of those that did not fit.
        late: fail in the backward pass instead.
    """

    def __init__(self, rows: int | None = None, late: bool = False) -> None:
        self.rows, self.late = rows, late
        self.asked: list[int] = []
        self.failed: list[int] = []
        self.hooks: list = []


@contextmanager
def memory(rows: int | None, late: bool = False) -> Iterator[Memory]:
    """Give every Llama a memory of so many rows."""
    own, state = LlamaForCausalLM.forward, Memory(rows, late)

    def out_of_memory(n: int) -> None:
        while state.hooks:
            state.hooks.pop().remove()
        state.failed.append(n)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def forward(self, input_ids: torch.Tensor, **others: object):
        state.asked.append(len(input_ids))
        too_many = state.rows is not None and len(input_ids) > state.rows
        if too_many and not (state.late and torch.is_grad_enabled()):
            out_of_memory(len(input_ids))
        out = own(self, input_ids=input_ids, **others)
        if too_many:  # half of the backward pass is done by then
            parameter = self.model.layers[0].mlp.down_proj.lora_B["default"].weight
            state.hooks.append(parameter.register_hook(lambda _: out_of_memory(len(input_ids))))
        return out

    LlamaForCausalLM.forward = forward  # type: ignore[method-assign]
    try:
        yield state
    finally:
        LlamaForCausalLM.forward = own  # type: ignore[method-assign]


# --- the module alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fits", [1, 2, 3, 4, 7, 8])
def test_every_row_is_computed_once_in_order_and_the_size_is_kept(fits: int) -> None:
    limits, tried, told = BatchLimits("m"), [], []

    def compute(part: list[int]) -> list[int]:
        tried.append(len(part))
        if len(part) > fits:
            raise MemoryError
        return [10 * k for k in part]

    with told_to(lambda name, size: told.append((name, size))):
        found = list(in_parts(range(8), 5, limits, compute))
        assert [k for part, _ in found for k in part] == list(range(8))
        assert [value for _, values in found for value in values] == [10 * k for k in range(8)]
        size = {1: 1, 2: 2, 3: 2, 4: 4, 7: 4, 8: 8}[fits]
        assert limits.tokens == (None if size == 8 else 5 * size)
        assert told == [("m: tokens per batch", 5 * n) for n in (4, 2, 1) if fits < 2 * n and size <= n]
        first = len(tried)
        list(in_parts(range(8), 5, limits, compute))
    assert tried[first:] == [size] * (8 // size), "what did not fit once is not tried again"


def test_a_limit_in_tokens_lets_more_of_shorter_rows_in() -> None:
    sizes: list[int] = []
    list(in_parts(range(9), 10, BatchLimits(tokens=40), lambda part: sizes.append(len(part))))
    list(in_parts(range(9), 100, BatchLimits(tokens=40), lambda part: sizes.append(len(part))))
    assert sizes == [4, 4, 1, *[1] * 9]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"),
        MemoryError(),
    ],
)
def test_every_way_to_say_it_is_understood(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), ValueError("out of memory"), NonFiniteError("l", "p")]
)
def test_other_errors_pass_through(error: Exception) -> None:
    assert not is_out_of_memory(error)

    def compute(part: list[int]) -> None:
        raise error

    with pytest.raises(type(error), match=str(error).split(" ")[0]):
        list(in_parts(range(4), 1, BatchLimits(), compute))


def test_what_a_failed_attempt_held_is_free_when_the_next_one_starts() -> None:
    import weakref

    seen: list[weakref.ref] = []

    def compute(part: list[int]) -> int:
        assert all(earlier() is None for earlier in seen)
        held = torch.zeros(4)
        seen.append(weakref.ref(held))
        if len(part) > 1:
            raise MemoryError
        return len(part)

    assert [n for _, n in in_parts(range(4), 1, BatchLimits(), compute)] == [1] * 4


# --- the passes of a run, at 8 -> 4 -> 1 -> fail --------------------------------------------------------


def everything(policy: Policy) -> dict[str, object]:
    """Every pass without an update, by name: numbers or texts."""
    encode = policy.encoder.encode
    rows = tuple(encode(row.prompt, row.completion) for row in ROWS)
    losses = CandidateLosses(policy, NPO(), rows, policy.reference_sums(rows), tuple(row.id for row in ROWS))
    generator = torch.Generator().manual_seed(3)
    theta = policy.trainable()
    direction = {name: torch.randn(value.shape, generator=generator) for name, value in theta.items()}
    items = DPO().prepare(policy, pairs(8))
    weights = torch.full((8,), 1 / 8)
    terms = InnerTerms(policy, GA(), rows, weights, torch.zeros(8), rows[:4], "kl", 0.5)
    found: dict[str, object] = {
        "loss": losses.values(),
        "objective": objective_values(Margin(), policy, Margin().prepare(policy, pairs(8))),
        "gradient": dot(objective_gradient(DPO(), policy, items).gradient, direction),
        "inner gradient": dot(terms.gradient(), direction),
        "perplexity": policy.perplexity(list(rows)),
        "answers": generate(policy, [row.prompt for row in ROWS], Decoding(5)),
        "tokens": [stats.log_prob.sum() for stats in token_stats(policy, ROWS).values()],
    }
    for scorer in ("backward", "central", "jvp"):
        scored = score_all(SolveSection(scorer=scorer), losses, [direction], QUIET)
        found[scorer] = scored.slopes.derivatives[:, 0]
    for curvature in (Hessian(), GaussNewton()):
        found[curvature.name] = dot(curvature.at(terms).product(direction), direction)
    return found


@pytest.mark.parametrize("fits", [4, 2])  # a pair is two rows
def test_every_pass_gives_the_same_with_smaller_batches(fits: int) -> None:
    with memory(None) as free:
        whole = everything(tiny_policy(lora_b_sd=0.1, token_budget=10_000))
    assert max(free.asked) == 16, "8 pairs in one batch"
    with memory(fits) as tight:
        policy = tiny_policy(lora_b_sd=0.1, token_budget=10_000)
        parts = everything(policy)
    assert tight.failed and max(tight.failed) >= 8
    for name, value in whole.items():
        if name == "answers":
            assert parts[name] == value
        elif name == "central":  # a difference of losses over a step: rounding is divided by it
            torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-3, msg=name)
        else:
            wanted, got = (torch.as_tensor(side, dtype=torch.float64) for side in (value, parts[name]))
            tolerance = 1e-6 * float(wanted.abs().max())
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=max(1e-6, 5 * tolerance), msg=name)
    assert policy.answer_limits.tokens == fits and policy.limits.tokens is not None


def test_a_batch_of_one_that_does_not_fit_is_one_clear_error() -> None:
    policy = tiny_policy()
    rows = [policy.encoder.encode(row.prompt, row.completion) for row in ROWS]
    with memory(0), pytest.raises(OutOfMemory, match=r"the smallest batch \(\d+ tokens\).*max_length"):
        policy.answer_sums(rows)
    assert all(isinstance(value, torch.Tensor) and value.requires_grad for value in policy.trainable().values())


# --- training ------------------------------------------------------------------------------------------


def trained(policy: Policy, **options: object) -> tuple[UnlearnResult, torch.Tensor]:
    """Unlearn eight rows with uneven weights; the result and the change of every parameter."""
    problem = InnerProblem(
        ROWS,
        examples(4, 50),
        section=UnlearnSection(**{"max_steps": 3, "optimizer": "sgd", "learning_rate": 0.1, **options}),
    )
    start = policy.snapshot()
    weights = {row.id: 1.0 + k for k, row in enumerate(ROWS)}
    result = unlearn(policy, problem, weights)
    return result, torch.cat([(policy.snapshot()[name] - start[name]).flatten() for name in start])


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("fits", [4, 2, 1])
@pytest.mark.parametrize("term", ["nll", "kl", "proximal", "none"])
def test_an_update_in_parts_is_the_same_update(term: str, fits: int, late: bool) -> None:
    """Failed halves leave no gradient behind and no sample counts twice."""
    options = {"loss": "npo", "retain_term": term, "batch_size": 8, "retain_batch_size": 4}
    wanted, change = trained(tiny_policy(), **options)
    policy, told = tiny_policy(), []
    with memory(fits, late) as tight, told_to(lambda name, size: told.append((name, size))):
        policy.reference_sums([policy.encoder.encode(row.prompt, row.completion) for row in ROWS])
        policy.limits.rows, told[:] = None, []
        found, moved = trained(policy, **options)
    assert policy.limits.rows == fits
    assert [size for name, size in told if "micro" in name] == [n for n in (4, 2, 1) if n >= fits]
    for a, b in zip(found.history, wanted.history, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    assert float((moved - change).norm()) <= 1e-5 * float(change.norm())
    assert tight.failed


def test_with_accumulation_only_the_failed_micro_batch_is_put_back() -> None:
    options = {"loss": "ga", "retain_term": "none", "batch_size": 4, "gradient_accumulation_steps": 2}
    wanted, change = trained(tiny_policy(), **options)
    with memory(None, late=True) as tight:
        policy = tiny_policy()
        own, calls = policy.model.forward, []

        def forward(*args: object, **named: object):
            calls.append(1)
            tight.rows = 2 if len(calls) >= 2 else None  # the second micro-batch of the first step is the first to fail
            return own(*args, **named)

        policy.model.forward = forward
        found, moved = trained(policy, **options)
    assert tight.failed == [4]
    assert float((moved - change).norm()) <= 1e-5 * float(change.norm())
    assert [step.loss for step in found.history] == pytest.approx([step.loss for step in wanted.history], rel=1e-6)


def test_training_that_does_not_fit_one_row_is_one_clear_error_and_changes_nothing() -> None:
    policy = tiny_policy()
    policy.reference_sums([policy.encoder.encode(row.prompt, row.completion) for row in ROWS])
    before = policy.snapshot()
    with memory(0), pytest.raises(OutOfMemory, match="training micro-batch of one row"):
        trained(policy, retain_term="none", batch_size=8)
    assert all(torch.equal(value, before[name]) for name, value in policy.snapshot().items())


def test_earlier_gradients_survive_a_failed_part() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    weight.grad = torch.tensor([100.0, 200.0])
    inputs = {
        "weight": torch.tensor([1.0, 2.0, 3.0]),
        "index": torch.arange(3),
        "reference_sum": torch.zeros(3),
        "forget": {"x": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])},
    }

    def losses(count: int) -> list[torch.Tensor]:
        found = []
        for part in split_rows(inputs, count):
            found.append((part["weight"] * (part["forget"]["x"] @ weight)).mean())
            found[-1].backward()
            if len(part["weight"]) > 1:
                raise MemoryError  # after the gradient was added
        return found

    loss = micro_batch(3, [weight], BatchLimits(), losses)
    assert float(loss) == pytest.approx((1 * 1 + 2 * 2 + 3 * 3) / 3)
    assert weight.grad.tolist() == pytest.approx([100 + 4 / 3, 200 + 5 / 3])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_hold_every_row_once_and_their_shares_sum_to_one(count: int) -> None:
    inputs = {
        "weight": torch.arange(1.0, 6.0),
        "index": torch.arange(5),
        "reference_sum": -torch.arange(5.0),
        "forget": {"input_ids": torch.arange(10).reshape(5, 2)},
        "retain": {"input_ids": torch.arange(6).reshape(3, 2)},
    }
    parts = split_rows(inputs, count)
    assert len(parts) == count
    assert torch.equal(torch.cat([part["index"] for part in parts]), inputs["index"])
    assert torch.equal(torch.cat([part["forget"]["input_ids"] for part in parts]), inputs["forget"]["input_ids"])
    kept = [part["retain"]["input_ids"] for part in parts if "retain" in part]
    assert torch.equal(torch.cat(kept), inputs["retain"]["input_ids"])
    assert sum(part.get("retain_share", 1.0) for part in parts) == pytest.approx(1.0)
    assert sum(float(part["weight"].mean()) for part in parts) == pytest.approx(float(inputs["weight"].mean()))


# --- the whole run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fits", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_with_little_memory_selects_the_same_and_says_its_sizes(
    fits: int, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    changes = {"unlearn": {"batch_size": 8, "learning_rate": 1e-4}, "solve": {"n_selected": 3, "final_refine": False}}
    assert main(["run", str(tiny_config(**changes)), "--quiet", "--set", f"output_dir={tmp_path / 'free'}"]) == 0
    with memory(fits):
        assert main(["run", str(tiny_config(**changes)), "--quiet", "--set", f"output_dir={tmp_path / 'tight'}"]) == 0
    free, tight = (Solution.load(tmp_path / name / "solution.json") for name in ("free", "tight"))
    assert set(tight.weights) == set(free.weights) and tight.weights
    assert tight.weights == pytest.approx(free.weights, rel=1e-3)
    limits = json.loads((tmp_path / "tight" / "summary.json").read_text())["batch_limits"]
    assert limits["policy: rows per training micro-batch"] == fits // 2, "a pair of the reward model is two rows"
    assert limits["policy: tokens per batch"] > 0
    assert json.loads((tmp_path / "free" / "summary.json").read_text())["batch_limits"] == {}
    lines = [json.loads(line) for line in (tmp_path / "tight" / "metrics.jsonl").read_text().splitlines()]
    assert {"policy: rows per training micro-batch"} <= {
        line["what"] for line in lines if line["event"] == "out_of_memory"
    }
    assert "rows per training micro-batch" in (tmp_path / "tight" / "report.html").read_text()


def test_weights_stay_as_they_are_where_memory_does_not_suffice_to_refine_them() -> None:
    policy = tiny_policy(token_budget=10_000)
    section = SolveSection(adjoint="identity", fallback="none", rounds=1, warmup_steps=0, n_selected=4, folds=2)
    section = section.model_copy(update={"refine_adjoint": "unrolled"})
    inner = InnerProblem(ROWS, section=UnlearnSection(batch_size=4, max_steps=2, retain_term="none"))
    with memory(2):
        found = solve(InnerSolver(policy), inner, OuterProblem(pairs(8), section), QUIET)
    assert "the weights were not refined (out of memory: unrolled" in found.stopped and len(found.weights) == 4


def test_a_run_without_memory_for_one_row_ends_with_one_line(
    tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with memory(0):
        assert main(["run", str(tiny_config()), "--quiet"]) == 1
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1 and message[0].startswith("u2a run: out of memory: policy, the smallest batch")

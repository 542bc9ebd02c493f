"""Numbers that are not finite, or huge, put into the real computations at eight places.

Every case of :data:`CASES` runs one computation with one poisoned number and returns how it ended; anything but a
clear error, or a result that an independent computation confirms, is an ``AssertionError``. Of an infinity or a NaN
only the error is accepted. :func:`run_non_finite` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tiny import examples, pairs, tiny_policy
from u2a.bilevel import linsolve
from u2a.bilevel.backward import _Taps
from u2a.bilevel.curvature import HessianOperator
from u2a.bilevel.gains import Reached, compute_gains
from u2a.bilevel.linsolve import CG
from u2a.bilevel.outer_problem import OuterProblem, split_preference
from u2a.bilevel.select import Mean
from u2a.bilevel.solve import score, solve
from u2a.bilevel.weight import mirror_step
from u2a.config import SolveSection, UnlearnSection
from u2a.config_reward import RewardSection
from u2a.errors import NonFiniteError
from u2a.evaluation.decoding import Decoding
from u2a.evaluation.expected_reward import sampled_reward
from u2a.evaluation.generation import generate
from u2a.evaluation.token_stats import token_stats
from u2a.inner_loss import InnerLoss
from u2a.losses import GA
from u2a.modeling import Params, Policy
from u2a.progress import Console
from u2a.record import derive_seed
from u2a.reward.analysis import analyse
from u2a.reward.base import CallableReward
from u2a.stream import permutation
from u2a.unlearn import InnerProblem, InnerSolver, unlearn

QUIET = Console(quiet=True)
POISON = {"NaN": math.nan, "+Inf": math.inf, "-Inf": -math.inf, "huge": 1e38}
ROWS = examples(6)
TARGET = ROWS[2]
TRAINING = UnlearnSection(loss="ga", retain_term="none", batch_size=6, max_steps=3, learning_rate=1e-2)
INNER = InnerProblem(ROWS, section=TRAINING, seed=1)
SCREEN = SolveSection(
    adjoint="identity", scorer="backward", estimator="mean", fallback="none", folds=2, rounds=1, warmup_steps=0,
    n_selected=2, final_refine=False, refine_adjoint="screening",
)  # fmt: skip

Ending = Literal["error", "confirmed"]


@dataclass
class Scene:
    """A policy, and its parameters as they were when the poison came in.

    Attributes:
        policy: the policy.
        before: its parameters then; None until then.
    """

    policy: Policy
    before: Params | None = None

    def note(self) -> None:
        """Remember the parameters."""
        if self.before is None:
            self.before = self.policy.snapshot()

    def unchanged(self) -> bool:
        """Whether the parameters are byte for byte those remembered."""
        assert self.before is not None, "the poison was never met"
        now = self.policy.snapshot()
        return all(now[name].numpy().tobytes() == value.numpy().tobytes() for name, value in self.before.items())


def ends(
    scene: Scene,
    run: Callable[[], Any],
    said: tuple[str, str],
    step: int | None = None,
    ids: Sequence[str] = (),
    oracle: Callable[[Any], None] | None = None,
) -> Ending:
    """Run, and judge how it ended.

    Args:
        scene: the policy.
        run: the poisoned computation.
        said: the quantity and the phase that the error must name.
        step: the step it must name.
        ids: the samples it must name.
        oracle: checks a result; None: only an error will do.

    Returns:
        ``error`` or ``confirmed``.
    """
    try:
        result = run()
    except NonFiniteError as error:
        caught = error
    else:
        return _confirmed(scene, result, oracle)
    assert said[0] in caught.what and caught.phase == said[1], str(caught)
    assert caught.step == step, str(caught)
    assert caught.ids == list(ids), str(caught)
    assert caught.exit_status == 1 and str(caught).count("\n") == 0
    assert scene.unchanged(), "parameters moved"
    return "error"


def _confirmed(scene: Scene, result: Any, oracle: Callable[[Any], None] | None) -> Ending:
    assert oracle is not None, "it went on as if nothing had happened"
    assert all(bool(torch.isfinite(value).all()) for value in scene.policy.trainable().values())
    oracle(result)
    return "confirmed"


def training(policy: Policy) -> Any:
    """Three steps of weighted unlearning."""
    return unlearn(policy, INNER, INNER.uniform())


def screening(policy: Policy, section: SolveSection = SCREEN) -> Any:
    """Score all candidates at theta_0."""
    return score(policy, INNER, OuterProblem(pairs(6), section, seed=2), QUIET)


# --- 1 loss --------------------------------------------------------------------------------------------


def loss_in_training(poison: float) -> Ending:
    """The second step's loss of one sample is multiplied; 1e38 times a loss overflows float32."""
    scene, calls = Scene(tiny_policy()), []
    own = GA.per_sample

    def per_sample(self: GA, answers: Any, reference: Any) -> Tensor:
        out = own(self, answers, reference)
        if out.requires_grad and len(out) == len(ROWS):
            calls.append(1)
            if len(calls) == 2:
                scene.note()
                factors = torch.ones_like(out)
                factors[0] = poison
                return out * factors
        return out

    with mock.patch.object(GA, "per_sample", per_sample):
        return ends(scene, partial(training, scene.policy), ("loss", "u2a"), 1, [_first_of_step(scene.policy)])


def _first_of_step(policy: Policy, step: int = 1) -> str:
    order = permutation(derive_seed(INNER.seed, "sample stream"), step, len(ROWS))
    return sorted(row.id for row in ROWS)[order[0]]


def _named_in_step(scene: Scene) -> Ending:
    """The error names all samples of the step, in the stream's order."""
    order = permutation(derive_seed(INNER.seed, "sample stream"), 1, len(ROWS))
    names = sorted(row.id for row in ROWS)
    return ends(scene, partial(training, scene.policy), ("gradient", "u2a"), 1, [names[k] for k in order])


def retain_loss(poison: float) -> Ending:
    """The retain term is multiplied."""
    scene, own = Scene(tiny_policy()), InnerLoss.retain
    problem = replace(INNER, retain=examples(3, 50), section=TRAINING.model_copy(update={"retain_term": "nll"}))

    def retain(self: InnerLoss, model: Any, inputs: Any) -> Tensor | None:
        scene.note()
        value = own(self, model, inputs)
        return None if value is None else value * poison

    with mock.patch.object(InnerLoss, "retain", retain):
        run = partial(unlearn, scene.policy, problem, problem.uniform())
        return ends(scene, run, ("retain term", "u2a"), 0)


# --- 2 logits ------------------------------------------------------------------------------------------


@contextmanager
def poisoned_logits(scene: Scene, poison: float) -> Iterator[None]:
    """The model's logits of one row where it predicts the last token: all of them, or a huge one of another token."""
    own = LlamaForCausalLM.forward
    tail = scene.policy.encoder.encode(TARGET.prompt, TARGET.completion).input_ids[-12:]
    whole = torch.tensor(tail)

    def forward(self: Any, input_ids: Tensor, **others: Any) -> Any:
        out = own(self, input_ids=input_ids, **others)
        if input_ids.shape[1] >= len(whole):
            hit = (input_ids[:, -len(whole) :].cpu() == whole).all(1).nonzero().flatten().tolist()
            if hit:
                scene.note()
                logits = out.logits.clone()
                logits[hit[0], -2, 7 if math.isfinite(poison) else slice(None)] = poison
                out.logits = logits
        return out

    with mock.patch.object(LlamaForCausalLM, "forward", forward):
        yield


def logits_in_training(poison: float) -> Ending:
    """The logits of one row; a huge one makes the row's token nearly impossible, by exactly so many nats."""
    scene = Scene(tiny_policy())
    problem = replace(INNER, section=TRAINING.model_copy(update={"max_steps": 1}))

    def impossible_there(result: Any) -> None:
        wanted = -poison / scene.policy.encoder.encode(TARGET.prompt, TARGET.completion).n_answer / len(ROWS)
        assert abs(result.history[0].loss / wanted - 1.0) < 1e-5
        assert 0.0 < result.history[0].grad_norm < 100.0, "the gradient of a log-probability is bounded"

    with poisoned_logits(scene, poison):
        run = partial(unlearn, scene.policy, problem, problem.uniform())
        return ends(scene, run, ("loss", "u2a"), 0, [TARGET.id], impossible_there if math.isfinite(poison) else None)


def logits_in_scoring(poison: float) -> Ending:
    """The same while candidates are scored; the others' gains stay what they were."""
    scene = Scene(tiny_policy())

    def others_as_before(table: Any) -> None:
        plain = screening(tiny_policy())
        for row, same in zip(table.rows, plain.rows, strict=True):
            assert row.id == TARGET.id or abs(row.gain - same.gain) <= 1e-5 * abs(same.gain)

    with poisoned_logits(scene, poison):
        run = partial(screening, scene.policy)
        oracle = others_as_before if math.isfinite(poison) else None
        return ends(scene, run, ("candidate loss", "score"), None, [TARGET.id], oracle)


def logits_in_reference(poison: float) -> Ending:
    """The same while reference log-probabilities are computed: refused, and nothing is remembered."""
    scene = Scene(tiny_policy())
    encoded = [scene.policy.encoder.encode(row.prompt, row.completion) for row in ROWS]

    def impossible_there(sums: Tensor) -> None:
        wanted = tiny_policy().reference_sums(encoded)
        wanted[2] = -poison
        torch.testing.assert_close(sums, wanted)

    with poisoned_logits(scene, poison):
        run = partial(scene.policy.reference_sums, encoded)
        found = ends(
            scene, run, ("reference", "reference"), None, (), impossible_there if math.isfinite(poison) else None
        )
    if found == "error":
        torch.testing.assert_close(scene.policy.reference_sums(encoded), tiny_policy().reference_sums(encoded))
    return found


def logits_in_evaluation(poison: float) -> Ending:
    """The same while answers are read for the evaluation."""
    scene = Scene(tiny_policy())

    def impossible_there(stats: Any) -> None:
        assert abs(stats[TARGET.id].log_prob[-1] / -poison - 1.0) < 1e-5 and stats[TARGET.id].variance[-1] == 0.0

    with poisoned_logits(scene, poison):
        run = partial(token_stats, scene.policy, ROWS)
        oracle = impossible_there if math.isfinite(poison) else None
        return ends(scene, run, ("token log-probability", "evaluate"), None, [TARGET.id], oracle)


def logits_in_generation(poison: float) -> Ending:
    """Every logit of a generated token; equally huge ones leave the first token the likeliest."""
    scene, own = Scene(tiny_policy()), LlamaForCausalLM.forward

    def forward(self: Any, *positional: Any, **named: Any) -> Any:
        out = own(self, *positional, **named)
        scene.note()
        out.logits = torch.full_like(out.logits, poison)
        return out

    def first_token(texts: list[str]) -> None:
        assert texts == [scene.policy.tokenizer.decode([0] * 3).strip()] * len(ROWS)

    with mock.patch.object(LlamaForCausalLM, "forward", forward):
        run = partial(generate, scene.policy, [row.prompt for row in ROWS], Decoding(3))
        return ends(scene, run, ("logit", "generate"), None, (), first_token if math.isfinite(poison) else None)


# --- 3 gradient ----------------------------------------------------------------------------------------


def gradient_in_training(poison: float) -> Ending:
    """One entry of one gradient in the second step; clipping would turn the whole step into zeros or NaN."""
    scene, steps = Scene(tiny_policy()), []
    parameter = list(scene.policy.trainable().values())[-1]

    def hook(gradient: Tensor) -> Tensor:
        steps.append(1)
        if len(steps) != 2:
            return gradient
        scene.note()
        out = gradient.clone()
        out.view(-1)[0] = poison
        return out

    handle = parameter.register_hook(hook)
    try:
        return _named_in_step(scene)
    finally:
        handle.remove()


def gradient_of_the_objective(poison: float) -> Ending:
    """One entry of grad J; a huge one dominates every gain, which then is that entry's product."""
    scene = Scene(tiny_policy(lora_b_sd=0.1))
    theta = scene.policy.trainable()
    name = next(name for name in theta if ".lora_B." in name)
    own = torch.autograd.grad

    def grad(outputs: Any, inputs: Any, *positional: Any, **named: Any) -> Any:
        found = own(outputs, inputs, *positional, **named)
        if isinstance(inputs, list) and len(inputs) == len(theta) and "allow_unused" in named:
            scene.note()
            place = list(theta).index(name)
            spoilt = found[place].clone()
            spoilt.view(-1)[0] = poison
            return (*found[:place], spoilt, *found[place + 1 :])
        return found

    def dominated(table: Any) -> None:
        policy = tiny_policy(lora_b_sd=0.1)
        for row, found in zip(ROWS, table.rows, strict=True):
            encoded = policy.encoder.encode(row.prompt, row.completion)
            value = policy.log_probs([encoded]).mean.sum()
            (gradient,) = own(value, [policy.trainable()[name]])
            wanted = -1e38 / 3 * float(gradient.view(-1)[0])  # three pairs per fold, one batch each
            assert abs(found.gain - wanted) <= 1e-3 * abs(wanted)

    with mock.patch("torch.autograd.grad", grad):
        run = partial(_at_lora, scene.policy)
        return ends(scene, run, ("gradient of the objective", "score"), None, (), dominated if poison == 1e38 else None)


def _at_lora(policy: Policy) -> Any:
    """Score at the policy's present parameters."""
    outer = OuterProblem(pairs(6), SCREEN.model_copy(update={"heldout_frac": 0.0}), seed=2)
    return compute_gains(policy, INNER, outer, split_preference(outer), Reached(INNER.uniform()), QUIET).table


# --- 4 per-sample score --------------------------------------------------------------------------------


def score_of_one_sample(poison: float) -> Ending:
    """The derivative of one candidate; a huge one leaves the others' as they were and the mean is exact."""
    scene, own = Scene(tiny_policy()), _Taps.measure

    def measure(self: _Taps, losses: Any, batch: list[int]) -> Tensor:
        scene.note()
        out = own(self, losses, batch).double()
        if 2 in batch:
            out[batch.index(2), 1:] = poison
        return out

    def only_there(table: Any) -> None:
        plain = screening(tiny_policy())
        for row, same in zip(table.rows, plain.rows, strict=True):
            assert row.gain == (-poison if row.id == TARGET.id else same.gain)
        wanted = float(np.mean([row.gain for row in table.rows]))
        assert abs(table.reliability.mean_gain - wanted) <= 1e-12 * abs(wanted)

    def run() -> Any:
        with mock.patch.object(_Taps, "measure", measure):
            return screening(scene.policy)

    return ends(scene, run, ("score", "score"), None, [TARGET.id], only_there if math.isfinite(poison) else None)


# --- 5 Hessian-vector product --------------------------------------------------------------------------


def hessian_product(poison: float) -> Ending:
    """All products; 1e38 times a curvature is one that float32 cannot hold."""
    scene, own = Scene(tiny_policy(lora_b_sd=0.1)), HessianOperator.product

    def product(self: HessianOperator, vector: Params) -> Params:
        scene.note()
        return {name: value * poison * 1e3 for name, value in own(self, vector).items()}

    section = SCREEN.model_copy(update={"adjoint": "implicit", "curvature": "hessian", "damping": 0.1})
    with mock.patch.object(HessianOperator, "product", product):
        return ends(scene, partial(_implicit, scene.policy, section), ("curvature", "solve"), 0)


def _implicit(policy: Policy, section: SolveSection) -> Any:
    section = section.model_copy(update={"heldout_frac": 0.0})
    outer = OuterProblem(pairs(6), section, seed=2)
    return compute_gains(policy, INNER, outer, split_preference(outer), Reached(INNER.uniform()), QUIET).table


def product_in_a_dense_system(poison: float) -> Ending:
    """One entry of the third product; a finite one changes the system, and the residual says how far off x is."""
    matrix = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    right = {"x": torch.ones(8, dtype=torch.float64)}
    calls: list[int] = []

    def matvec(vector: Params) -> Params:
        calls.append(1)
        out = matrix @ vector["x"]
        if len(calls) == 3:
            out[0] = poison
        return {"x": out}

    return _solved(lambda: CG(20, 1e-10).solve(matvec, right, 0.5), matrix, right["x"], "curvature product", 2)


def _solved(run: Callable[[], Any], matrix: Tensor, right: Tensor, what: str, step: int) -> Ending:
    """An error at the step; or a solution that a dense solve confirms, or that says it is none."""
    try:
        found = run()
    except NonFiniteError as error:
        if what not in error.what or (error.phase, error.step) != ("solve", step):
            raise AssertionError(str(error)) from error
        return "error"
    eye = torch.eye(len(matrix), dtype=torch.float64)
    residual = (matrix + found.status.damping * eye) @ found.value["x"] - right
    assert math.isfinite(found.status.residual)
    assert abs(float(residual.norm() / right.norm()) - found.status.residual) <= 1e-6 * (1 + found.status.residual)
    assert found.status.status == "max_steps" or found.status.residual <= 1e-6
    return "confirmed"


# --- 6 scalars of conjugate gradients ------------------------------------------------------------------


def cg_scalar(which: int, poison: float) -> Ending:
    """The n-th inner product of a solve: r'r, p'Ap or p'p."""
    matrix = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    right = {"x": torch.ones(8, dtype=torch.float64)}
    calls, own = [], linsolve.dot

    def dot(left: Params, other: Params) -> float:
        calls.append(1)
        return poison if len(calls) == which else own(left, other)

    with mock.patch.object(linsolve, "dot", dot):
        step = 0 if which <= 4 else 1
        run = partial(CG(20, 1e-10).solve, lambda vector: {"x": matrix @ vector["x"]}, right, 0.5)
        return _solved(run, matrix, right["x"], "conjugate gradients", step)


# --- 7 omega step --------------------------------------------------------------------------------------


def estimate_in_the_weights(poison: float) -> Ending:
    """One candidate's estimate; a huge gain takes all the weight, a huge loss none."""
    scene, own = Scene(tiny_policy()), Mean.estimate

    def estimate(self: Mean, statistics: Any) -> Tensor:
        scene.note()
        out = own(self, statistics).clone()
        out[2] = poison
        return out

    def all_of_it(solution: Any) -> None:
        assert max(solution.weights, key=solution.weights.__getitem__) == TARGET.id
        assert abs(math.fsum(solution.weights.values()) - 1.0) < 1e-12

    run = partial(solve, InnerSolver(scene.policy), INNER, OuterProblem(pairs(6), SCREEN, seed=2), QUIET)
    with mock.patch.object(Mean, "estimate", estimate):
        oracle = all_of_it if math.isfinite(poison) else None
        return ends(scene, run, ("estimate", "score"), None, [TARGET.id], oracle)


def mirror_descent(poison: float) -> Ending:
    """One slope of a mirror step; a huge one is the softmax of the same logits in exact arithmetic."""
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    gradient = torch.tensor([0.1, poison, -0.2], dtype=torch.float64)
    try:
        found = mirror_step(weights, gradient, 0.7)
    except NonFiniteError as error:
        if (error.what, error.phase) != ("gradient of the weights", "solve"):
            raise AssertionError(str(error)) from error
        return "error"
    left = [0.2 * math.exp(-0.07), 0.0, 0.5 * math.exp(0.14)]  # the slope is descended: nothing is left of it
    assert np.allclose(found, np.array(left) / math.fsum(left), rtol=1e-12, atol=0.0)
    return "confirmed"


# --- 8 reward ------------------------------------------------------------------------------------------


def reward_of_a_candidate(poison: float) -> Ending:
    """A reward model's number for one candidate."""
    scene = Scene(tiny_policy())

    def function(prompts: list[str], answers: list[str]) -> list[float]:
        scene.note()
        return [poison if answer == TARGET.completion else float(len(answer)) for answer in answers]

    def exact(table: Any) -> None:
        rewards = {row.id: row.reward for row in table.rows}
        assert rewards[TARGET.id] == float(np.float32(poison))
        assert all(rewards[row.id] == len(row.completion) for row in ROWS if row.id != TARGET.id)

    model = CallableReward("poisoned", function)
    run = partial(analyse, model, ROWS, pairs(6), RewardSection())
    oracle = exact if math.isfinite(poison) else None
    return ends(scene, run, ("reward of 'poisoned'", "reward"), None, [TARGET.id], oracle)


def reward_of_a_sampled_answer(poison: float) -> Ending:
    """A reward inside the objective J = expected reward."""
    scene = Scene(tiny_policy())
    calls: list[int] = []

    def function(prompts: list[str], answers: list[str]) -> list[float]:
        scene.note()
        calls.append(len(answers))
        return [poison] + [float(len(answer)) for answer in answers[1:]]

    def exact(items: Any) -> None:
        total = poison + sum(0.0 for _ in items)
        assert math.isfinite(total) and all(math.isfinite(value) for item in items for value in item.numbers)
        for item in items:
            assert abs(math.fsum(item.numbers)) <= 1e-6 * max(map(abs, item.numbers), default=0.0) + 1e-9

    objective = sampled_reward(CallableReward("poisoned", function), 2, 3, 0)
    run = partial(objective.prepare, scene.policy, pairs(3))
    oracle = exact if math.isfinite(poison) else None
    return ends(scene, run, ("reward of 'poisoned'", "reward"), None, _positions(scene), oracle)


def _positions(_: Scene) -> list[str]:
    return ["#0"]


PLACES: dict[str, tuple[Callable[[float], Ending], ...]] = {
    "loss": (loss_in_training, retain_loss),
    "logits": (
        logits_in_training,
        logits_in_scoring,
        logits_in_reference,
        logits_in_evaluation,
        logits_in_generation,
    ),
    "gradient": (gradient_in_training, gradient_of_the_objective),
    "per-sample score": (score_of_one_sample,),
    "Hessian-vector product": (hessian_product, product_in_a_dense_system),
    "CG scalar": tuple(partial(cg_scalar, which) for which in (2, 3, 4, 6, 7)),
    "omega step": (estimate_in_the_weights, mirror_descent),
    "reward": (reward_of_a_candidate, reward_of_a_sampled_answer),
}


@dataclass(frozen=True)
class Case:
    """One poisoned number.

    Attributes:
        place: where.
        kind: what.
        run: runs it; an ``AssertionError`` when it was not met rightly.
    """

    place: str
    kind: str
    run: Callable[[], Ending]
    number: int = 0

    @property
    def name(self) -> str:
        """Place, computation and kind."""
        return f"{self.place} {self.number}, {self.kind}"

    def check(self) -> Ending:
        """Run it; of a number that is not finite only the error is accepted."""
        ending = self.run()
        assert ending == "error" or self.kind == "huge", f"{self.name}: {ending}"
        return ending


CASES = tuple(
    Case(place, kind, partial(run, value), number)
    for place, runs in PLACES.items()
    for number, run in enumerate(runs)
    for kind, value in POISON.items()
)


def run_non_finite() -> dict[str, int]:
    """Run every case.

    Returns:
        ``nonfinite``, the cases, and ``nonfinite_caught``, those met rightly.
    """
    caught = 0
    for case in CASES:
        try:
            case.check()
            caught += 1
        except Exception as error:
            print(f"{case.name}: {type(error).__name__}: {error}")
    return {"nonfinite": len(CASES), "nonfinite_caught": caught}

"""Each mistake of the released code's outer problem must be impossible here; one named test per defect."""

from __future__ import annotations

import math

import pytest
import torch
from scenes import INNER, QUIET, ROWS, outer, run, scripted
from small import direction, hessian, small_policy

from tiny import examples, pairs, tiny_policy
from u2a.bilevel.candidates import CandidateLosses
from u2a.bilevel.differences import Central
from u2a.bilevel.gains import Reached, compute_gains
from u2a.bilevel.hypergrad import Identity, Implicit, make_adjoint
from u2a.bilevel.objective import DPO, Margin, objective_gradient, objective_values
from u2a.bilevel.outcome import random_weights
from u2a.bilevel.outer_problem import split_preference
from u2a.bilevel.select import top_block
from u2a.bilevel.solve import _warm_up
from u2a.bilevel.weight import mirror_step, penalty, penalty_gradient, refine
from u2a.config import SolveSection, UnlearnSection
from u2a.config_file import load_config
from u2a.errors import ConfigError, NonFiniteError
from u2a.losses import GA
from u2a.progress import Quiet
from u2a.reference.dense import flatten
from u2a.reference.quadratic import random_quadratic
from u2a.unlearn import InnerProblem, InnerSolver, unlearn


def test_defect_01_the_hessian_is_really_inverted():
    """The released code divides by gamma = 1 and never calls its conjugate gradients."""
    policy = small_policy()
    operator, gradient = hessian(policy, "npo", "nll"), direction(policy, 1)
    adjoint = make_adjoint(SolveSection(adjoint="implicit", cg_steps=200, cg_tol=1e-8), UnlearnSection())
    assert isinstance(adjoint, Implicit)
    found = adjoint.solve(gradient, operator, 3.0)
    rho = found.status.damping  # raised, since this Hessian is indefinite
    image = flatten(operator.product(found.value)) + rho * flatten(found.value)
    assert float((image - flatten(gradient)).norm()) < 1e-6
    assert found.status.steps > 1
    plain = flatten(Identity(rho).solve(gradient).value)
    assert float((flatten(found.value) - plain).norm() / plain.norm()) > 1e-2
    assert load_config(None, preset="paper").solve.adjoint == "implicit"


@pytest.mark.parametrize("seed", range(4))
def test_defect_02_the_weight_update_and_the_selection_share_one_sign(seed: int):
    """The released code shrinks the weights of the very examples that its selection keeps."""
    problem = random_quadratic(seed)
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    gains = problem.gains(weights)
    updated = mirror_step(weights, -gains, 0.05 / float(gains.abs().max()))
    assert problem.value(updated) > problem.value(weights)
    assert int(updated.argmax()) == int(gains.argmax())
    shifted = gains - gains.min() + 1.0
    assert top_block(shifted, list("abcde"), [False] * 5, 1) == [int(updated.argmax())]


def test_defect_03_the_penalty_is_part_of_the_minimised_function_and_finite():
    """The released code adds the gradient of +beta sum sqrt(w) to a gain, and blows up at w = 0."""
    gradient = torch.tensor([-1.0, -0.6, -0.2, 0.4], dtype=torch.float64)
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    moved = refine(weights, gradient, 0.05, 30, 0.5)
    before, after = (float(gradient @ w) + penalty(w, 0.5) for w in (weights, moved))
    assert after < before
    assert penalty(moved, 0.5) < penalty(weights, 0.5)  # it concentrates
    edge = penalty_gradient(torch.tensor([0.0, 1e-12, 1.0], dtype=torch.float64), 1.0)
    assert torch.isfinite(edge).all()
    assert float(edge[0]) == 0.0


@pytest.mark.parametrize("objective", [Margin(), DPO(0.1)])
def test_defect_04_the_gradient_of_j_is_the_gradient_of_the_reported_j(objective: Margin | DPO):
    """The released code sums per-batch gradients but reports the mean, so the step depends on the batch count."""
    gradients, values = [], []
    for budget in (1, 100, 10_000):
        policy = small_policy(token_budget=budget)
        found = objective_gradient(objective, policy, objective.prepare(policy, pairs(6)))
        gradients.append(flatten(found.gradient))
        values.append(float(found.values.mean()))
    for gradient in gradients[1:]:
        assert torch.allclose(gradient, gradients[0], atol=1e-10)
    assert values == pytest.approx([values[0]] * 3)


def test_defect_05_weights_sum_to_one_in_every_inner_run(monkeypatch: pytest.MonkeyPatch):
    """The released code starts at 1/1024 each and renormalises to N, a jump of a factor 1000."""
    seen: list[dict[str, float]] = []
    plain = InnerSolver.__call__

    def spy(self: InnerSolver, problem: InnerProblem, weights: dict[str, float], *rest: object, **named: object):
        seen.append(dict(weights))
        return plain(self, problem, weights, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(InnerSolver, "__call__", spy)
    scripted(monkeypatch, [0.0, 1.0, 2.0])
    found = run(outer(n_selected=6, rounds=3, estimator="mean"))
    assert len(seen) == len(found.rounds) == 3
    for weights in [*seen, found.weights, INNER.uniform(), random_weights(INNER, 3, 0)]:
        assert math.fsum(weights.values()) == pytest.approx(1.0, abs=1e-12)


def test_defect_06_no_unscored_example_is_selected():
    """The released code starts from a random example that is never scored and always survives."""
    found = run(outer(n_selected=2, rounds=1, estimator="mean"))
    scores = {row.id: row.gain for row in found.scores.rows}
    assert set(scores) == {row.id for row in ROWS}
    best = sorted(scores, key=lambda name: -scores[name])[:2]
    assert set(found.weights) == set(best)


def test_defect_07_every_round_scores_anew_and_the_size_is_an_option(monkeypatch: pytest.MonkeyPatch):
    """The released code selects once at theta_0 and needs at least 1024 candidates."""
    thetas: list[torch.Tensor] = []

    def spy(policy, *rest):  # noqa: ANN001, ANN002, ANN202
        thetas.append(flatten(policy.trainable()))
        return compute_gains(policy, *rest)

    monkeypatch.setattr("u2a.bilevel.solve.compute_gains", spy)
    scripted(monkeypatch, [0.0, 1.0])
    found = run(outer(n_selected=4, rounds=2, estimator="mean"))
    assert len(found.rounds) == len(thetas) == 2
    assert not torch.equal(thetas[0], thetas[1])
    assert [len(entry.added) for entry in found.rounds] == [2, 2]
    with pytest.raises(ConfigError, match="9 is more than the 8 candidates"):
        run(outer(n_selected=9))


def test_defect_08_early_stopping_is_alive(monkeypatch: pytest.MonkeyPatch):
    """In the released code the last performance stays None, so the loop always runs to its end."""
    scripted(monkeypatch, [1.0, 0.9, 5.0, 6.0])
    found = run(outer(n_selected=8, rounds=4, patience=1, estimator="mean"))
    assert len(found.rounds) == 2
    assert set(found.weights) == set(found.rounds[0].added)
    scripted(monkeypatch, [1.0, 0.9, 5.0, 6.0])
    patient = run(outer(n_selected=8, rounds=4, patience=2, estimator="mean"))
    assert len(patient.rounds) > 2


@pytest.mark.parametrize("scorer", ["central", "jvp"])
def test_defect_09_a_nan_score_stops_and_names_its_candidate(scorer: str, monkeypatch: pytest.MonkeyPatch):
    """The released code turns NaN scores into +1e-6, which is slightly good."""
    policy = tiny_policy(lora_b_sd=0.1)
    plain = CandidateLosses.of

    def poisoned(self: CandidateLosses, batch: list[int], parameters: dict[str, torch.Tensor] | None = None):
        values = plain(self, batch, parameters)
        bad = torch.tensor([self.ids[k] == ROWS[5].id for k in batch])
        return torch.where(bad, values * math.nan, values)

    monkeypatch.setattr(CandidateLosses, "of", poisoned)
    problem = outer(scorer=scorer)
    with pytest.raises(NonFiniteError) as caught:
        compute_gains(policy, INNER, problem, split_preference(problem), Reached(INNER.uniform()), QUIET)
    assert caught.value.ids == [ROWS[5].id]


def test_defect_10_the_reported_weights_are_the_ones_used(monkeypatch: pytest.MonkeyPatch):
    """In the released code a clamp reaches only the log and a scheduler for the weights has no effect."""
    used: list[dict[str, float]] = []
    plain = InnerSolver.__call__

    def spy(self: InnerSolver, problem: InnerProblem, weights: dict[str, float], *rest: object, **named: object):
        used.append(dict(weights))
        return plain(self, problem, weights, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(InnerSolver, "__call__", spy)
    slow, fast = (run(outer(n_selected=4, rounds=1, estimator="mean", mirror_rate=rate)) for rate in (0.0, 0.3))
    assert used == [slow.weights, fast.weights]
    assert set(slow.weights.values()) == {1 / len(slow.weights)}
    assert max(fast.weights.values()) > 1.2 / len(fast.weights)


def test_defect_11_the_retain_term_is_part_of_the_inner_curvature():
    """The released GradDiff differentiates the forget part only, though H belongs to the full inner problem."""
    policy = tiny_policy(lora_b_sd=0.2)
    section = UnlearnSection(loss="grad_diff", retain_term="nll", retain_weight=2.0)
    problem = outer(adjoint="implicit", damping=2.0, cg_steps=15, curvature_samples=4, folds=2)
    gains = []
    for weight in (0.0, 2.0):
        inner = InnerProblem(
            ROWS, examples(3, start=40), section=section.model_copy(update={"retain_weight": weight}), seed=1
        )
        gains.append(compute_gains(policy, inner, problem, split_preference(problem), Reached(inner.uniform()), QUIET))
    first, second = (part.statistics.gain for part in gains)
    assert float((first - second).norm() / first.norm()) > 1e-2


def test_defect_20_every_trained_block_has_a_gradient_where_scores_are_taken():
    """At theta_0 the released code's scores see 768 numbers of a 7B model, all other gradients being exactly 0."""
    policy = tiny_policy()

    def blocks() -> list[float]:
        encoded = tuple(policy.encoder.encode(row.prompt, row.completion) for row in ROWS)
        losses = CandidateLosses(policy, GA(), encoded, torch.zeros(8), tuple(row.id for row in ROWS))
        forget = torch.autograd.grad(losses.of(range(8)).mean(), list(policy.trainable().values()))
        items = Margin().prepare(policy, pairs(4))
        align = objective_gradient(Margin(), policy, items).gradient.values()
        return [min(float(a.norm()), float(b.norm())) for a, b in zip(forget, align, strict=True)]

    assert sum(size == 0.0 for size in blocks()) == len(blocks()) / 2  # LoRA's A at B = 0
    assert SolveSection().warmup_steps > 0
    _warm_up(policy, INNER, outer(warmup_steps=SolveSection().warmup_steps), QUIET)
    assert min(blocks()) > 0.0


def test_defect_24_scores_belong_to_ids_whatever_the_batch_size():
    """The released code indexes by local batch number, so scores go to the wrong examples unless batch = 1."""
    found: list[dict[str, float]] = []
    for budget, order in ((1, range(8)), (120, (3, 1, 7, 5, 0, 2, 6, 4)), (5000, range(7, -1, -1))):
        policy = tiny_policy(lora_b_sd=0.1, token_budget=budget)
        inner = InnerProblem(tuple(ROWS[k] for k in order), section=INNER.section)
        problem = outer(scorer="jvp")
        table = compute_gains(policy, inner, problem, split_preference(problem), Reached(inner.uniform()), QUIET).table
        found.append({row.id: row.gain for row in table.rows})
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3, abs=1e-5)
    assert len({round(gain, 6) for gain in found[0].values()}) == 8


def test_defect_24_prepared_objectives_keep_no_graph_and_references_are_computed_once():
    """The released code keeps the PA losses' graphs and recomputes reference log-probs in every outer step."""
    policy = tiny_policy(lora_b_sd=0.1)
    items = DPO().prepare(policy, pairs(3))
    assert all(isinstance(number, float) for item in items for number in item.numbers)
    assert not objective_values(DPO(), policy, items).requires_grad
    assert not objective_gradient(DPO(), policy, items).values.requires_grad
    policy.log_probs = None  # type: ignore[method-assign, assignment]  # any further forward would fail
    assert DPO().prepare(policy, pairs(3)) == items


@pytest.mark.parametrize(
    ("loss", "term"), [("ga", "none"), ("ga", "proximal"), ("grad_diff", "nll"), ("grad_diff", "kl"), ("npo", "none")]
)
def test_defect_25_controls_run_the_same_loop_with_every_loss(loss: str, term: str):
    """The released baselines crash on undefined variables for some losses and optimise all parameters."""
    section = INNER.section.model_copy(update={"loss": loss, "retain_term": term})
    inner = InnerProblem(ROWS, examples(2, start=40) if term in ("nll", "kl") else (), section=section)
    policy = tiny_policy()
    frozen = {name: value.clone() for name, value in policy.model.named_parameters() if not value.requires_grad}
    arms = {"u2a": {ROWS[0].id: 0.8, ROWS[1].id: 0.2}, "random_k": random_weights(inner, 2, 0), "full": inner.uniform()}
    for arm, weights in arms.items():
        result = unlearn(policy, inner, weights, arm)
        assert (result.arm, result.steps, result.loss) == (arm, section.max_steps, inner.loss_text)
        assert any(not torch.equal(policy.theta0[name], value) for name, value in policy.snapshot().items())
    for name, value in policy.model.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name])


def test_a_memory_of_the_whole_candidate_set_is_not_needed():
    """No scorer holds per-sample gradients: the largest forward batch is the token budget, whatever n."""
    policy = tiny_policy(lora_b_sd=0.1, token_budget=150)
    widths: list[int] = []
    collate = policy.collate

    def spy(rows):  # noqa: ANN001, ANN202
        batch = collate(rows)
        widths.append(batch.input_ids.numel())
        return batch

    policy.collate = spy  # type: ignore[method-assign]
    rows = tuple(policy.encoder.encode(row.prompt, row.completion) for row in examples(20))
    losses = CandidateLosses(policy, GA(), rows, torch.zeros(20), tuple(map(str, range(20))))
    u = {name: torch.ones_like(value) for name, value in policy.trainable().items()}
    Central(1e-3).derivatives(losses, [u], Quiet())
    assert max(widths) <= 150


def test_planted_off_by_one_in_the_answer_mask_is_visible_in_the_scores():
    """A mask that starts one token late changes the loss of every candidate."""
    policy = small_policy()
    encoded = [policy.encoder.encode(row.prompt, row.completion) for row in ROWS[:3]]
    late = [type(row)(row.input_ids, row.n_answer - 1) for row in encoded]
    u = direction(policy, 3)
    right, wrong = (
        Central(1e-3)
        .derivatives(CandidateLosses(policy, GA(), tuple(rows), torch.zeros(3), ("a", "b", "c")), [u], Quiet())
        .derivatives
        for rows in (encoded, late)
    )
    assert float((right - wrong).abs().min() / right.abs().max()) > 1e-3

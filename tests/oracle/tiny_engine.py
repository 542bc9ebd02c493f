"""The package's own engine on the tiny decoder: collation, log-probabilities, losses, Hessian, CG, forward mode.

The truth (``u2a.reference.inner``) shares with it the logits of the decoder and nothing else: here sequences are padded
on the left and masked, curvature is a product by double backward, and no Hessian is ever written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tiny import pairs
from u2a.batch_size import BatchLimits
from u2a.bilevel.candidates import CandidateLosses
from u2a.bilevel.curvature import HessianOperator
from u2a.bilevel.forward_mode import ForwardMode
from u2a.bilevel.inner_terms import InnerTerms
from u2a.bilevel.linsolve import CG, LinearSolution
from u2a.bilevel.objective import DPO, Item, Margin, objective_gradient
from u2a.bilevel.score import Scorer
from u2a.encoding import Batch, Encoded, collate
from u2a.losses import GA, NPO, SFT, UnlearningLoss
from u2a.modeling import AnswerLogProbs, Params, answer_log_probs
from u2a.progress import Quiet
from u2a.reference.decoder import Decoder, unflatten
from u2a.reference.inner import InnerProblem, Row, Term

EXACT = CG(max_steps=2000, tol=1e-11)
SOME_PAIR = pairs(1)[0]  # items carry one for error messages
PAD = 7  # a token that also occurs as a real one


class DecoderModel(nn.Module):
    """The decoder with the call of a causal language model of transformers."""

    def __init__(self, decoder: Decoder, theta: Params, start: Params) -> None:
        super().__init__()
        self.decoder, self.names, self.start = decoder, tuple(theta), start
        for name, value in theta.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        theta = {name: getattr(self, name) for name in self.names}
        return SimpleNamespace(logits=self.decoder.logits(theta, input_ids, attention_mask, position_ids))


@dataclass(frozen=True)
class DecoderPolicy:
    """What the engine asks of a policy, around the decoder."""

    model: DecoderModel
    token_budget: int = 1000
    parameters: Params | None = None

    device = torch.device("cpu")
    limits = BatchLimits()

    def trainable(self) -> Params:
        return dict(self.model.named_parameters())

    @property
    def theta0(self) -> Params:
        return self.model.start

    def at_start(self) -> bool:
        return all(torch.equal(value, self.theta0[name]) for name, value in self.trainable().items())

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        return collate(rows, PAD)

    def log_probs(self, rows: Sequence[Encoded]) -> AnswerLogProbs:
        return answer_log_probs(self.model, self.collate(rows), self.parameters)


@dataclass(frozen=True)
class PairLosses(CandidateLosses):
    """DPO losses of pairs, -J_i of the package's objective: ``rows`` are preferred to ``rejected``."""

    rejected: tuple[Encoded, ...] = ()
    rejected_sums: tuple[float, ...] = ()
    beta: float = 0.5

    def of(self, batch: Sequence[int], parameters: Params | None = None) -> Tensor:
        policy = DecoderPolicy(self.policy.model, self.policy.token_budget, parameters)
        items = [
            Item(SOME_PAIR, (self.rows[k], self.rejected[k]), (float(self.reference_sums[k]), self.rejected_sums[k]))
            for k in batch
        ]
        return -DPO(self.beta).per_item(policy, items)


def encoded(row: Row) -> Encoded:
    return Encoded(row.prompt + row.answer, len(row.answer))


def policy_at(problem: InnerProblem, theta: Tensor, token_budget: int = 1000) -> DecoderPolicy:
    return DecoderPolicy(DecoderModel(problem.decoder, unflatten(theta, problem.start), problem.start), token_budget)


@torch.no_grad()
def reference_sums(problem: InnerProblem, rows: Sequence[Encoded]) -> Tensor:
    return answer_log_probs(DecoderModel(problem.decoder, problem.start, problem.start), collate(rows, PAD)).sum


def loss_value(kind: str, beta: float) -> UnlearningLoss:
    return {"sft": SFT(), "ga": GA(), "npo": NPO(beta)}[kind]


def losses_of(problem: InnerProblem, policy: DecoderPolicy, terms: Sequence[Term]) -> CandidateLosses:
    """The vector of losses of terms of one kind."""
    kind = terms[0].kind
    rows = tuple(encoded(term.row) for term in terms)
    ids = tuple(f"{kind}{k}" for k in range(len(terms)))
    sums = reference_sums(problem, rows)
    if kind != "dpo":
        return CandidateLosses(policy, loss_value(kind, problem.beta), rows, sums, ids)
    rejected = tuple(encoded(term.other) for term in terms)
    others = tuple(reference_sums(problem, rejected).tolist())
    return PairLosses(policy, SFT(), rows, sums, ids, rejected=rejected, rejected_sums=others, beta=problem.beta)


def groups(problem: InnerProblem) -> dict[str, list[int]]:
    """Indices of the candidates by kind."""
    kinds = list(dict.fromkeys(term.kind for term in problem.terms))
    return {kind: [k for k, term in enumerate(problem.terms) if term.kind == kind] for kind in kinds}


@dataclass(frozen=True)
class MixedTerms:
    """The package's terms of an inner problem, one ``InnerTerms`` per kind of loss."""

    policy: DecoderPolicy
    problem: InnerProblem
    weights: Tensor
    retain: bool = True

    def scalars(self) -> Iterator[Tensor]:
        for kind, indices in groups(self.problem).items():
            losses = losses_of(self.problem, self.policy, [self.problem.terms[k] for k in indices])
            weights = self.weights[indices]
            if kind == "dpo":
                yield (weights * losses.of(range(len(indices)))).sum()
            else:
                terms = InnerTerms(self.policy, losses.loss, losses.rows, weights, losses.reference_sums)
                yield from terms.scalars()
        rows = tuple(encoded(row) for row in self.problem.retain)
        if self.retain and rows:
            nothing = torch.zeros(0, dtype=torch.float64)
            yield from InnerTerms(self.policy, SFT(), (), nothing, nothing, rows, "nll", 1.0).scalars()

    def with_less_memory(self, compute: Callable[[], Params]) -> Params:
        return compute()


def hessian_operator(problem: InnerProblem, weights: Tensor, theta: Tensor, retain: bool = True) -> HessianOperator:
    """Curvature without the proximal term, which enters the solve as damping."""
    return HessianOperator(MixedTerms(policy_at(problem, theta), problem, weights, retain))


def objective_slope(problem: InnerProblem, policy: DecoderPolicy) -> Params:
    """Gradient of J by the package's objective."""
    items = [Item(SOME_PAIR, (encoded(good), encoded(bad))) for good, bad in problem.pairs]
    return objective_gradient(Margin(), policy, items).gradient


def slopes(problem: InnerProblem, policy: DecoderPolicy, u: Params, scorer: Scorer = ForwardMode()) -> Tensor:
    """u' grad l_k of all candidates by a scorer of the package."""
    out = torch.zeros(len(problem.terms), dtype=torch.float64)
    for indices in groups(problem).values():
        losses = losses_of(problem, policy, [problem.terms[k] for k in indices])
        out[indices] = scorer.derivatives(losses, [u], Quiet()).derivatives[:, 0]
    return out


def solve_for_u(
    problem: InnerProblem, weights: Tensor, theta: Tensor, solver: CG = EXACT, damping: float = 0.0
) -> LinearSolution:
    """u = (H + lambda I + damping I)^-1 grad J by the package's CG."""
    policy = policy_at(problem, theta)
    operator = hessian_operator(problem, weights, theta)
    return solver.solve(operator.product, objective_slope(problem, policy), problem.strength + damping)


def engine_gains(problem: InnerProblem, weights: Tensor, theta: Tensor, damping: float = 0.0) -> Tensor:
    """Gains -u' grad l_k at theta*(w), as the pipeline finds them."""
    u = solve_for_u(problem, weights, theta, damping=damping).value
    return -slopes(problem, policy_at(problem, theta), u)

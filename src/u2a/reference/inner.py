"""Inner problems of the tiny decoder, solved to machine precision: the truth about J(theta*(w)) and its derivative.

    theta*(w) = argmin  sum_k w_k l_k(theta) + (1/m) sum_i L_i(theta) + (lambda / 2) ||theta - theta_0||^2

with a loss l_k of any kind (SFT, GA, NPO, a DPO pair) and the NLL L_i of m retain rows. Re-solving at w + eps e_k and
w - eps e_k and taking the difference of J checks sign, scale, damping and solver of a hypergradient all at once.
Nothing is shared with the fast code: sequences are padded on the right, and log-probabilities are written out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from u2a.reference.decoder import Decoder, Params, Shape, flatten, unflatten

Kind = Literal["sft", "ga", "npo", "dpo"]
TOLERANCE = 1e-12  # of ||grad|| of the inner problem
_KEEP_HESSIAN = 0.5  # an old Hessian is good enough while a step shrinks the gradient this much
_MOST_NEWTON_STEPS = 60
_MOST_HALVINGS = 8


@dataclass(frozen=True)
class Row:
    """A prompt and an answer as token ids, neither empty."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Term:
    """One candidate: a loss l_k.

    Attributes:
        kind: ``sft``: -s / T. ``ga``: s / T. ``npo``: (2 / b) log(1 + exp(b (s - s_ref))). ``dpo``: the loss of the
            pair (row preferred to other), -log sigmoid(b ((s - s_ref) - (s' - s'_ref))).
        row: prompt and answer, with s the summed log-probability of its T answer tokens.
        other: the rejected answer of a DPO pair, with s'.
    """

    kind: Kind
    row: Row
    other: Row | None = None


def summed_log_probs(decoder: Decoder, theta: Params, rows: Sequence[Row]) -> Tensor:
    """Log-probability of each answer, summed over its tokens.

    Args:
        decoder: the decoder.
        theta: its trainable weights.
        rows: sequences of any lengths; padded on the right, where causal attention cannot see the padding.

    Returns:
        (rows,) nats.
    """
    longest = max(len(row.prompt) + len(row.answer) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    answer = torch.zeros(len(rows), longest)
    for index, row in enumerate(rows):
        start, end = len(row.prompt), len(row.prompt) + len(row.answer)
        tokens[index, :end] = torch.tensor(row.prompt + row.answer)
        answer[index, start:end] = 1.0
    log_probs = decoder.logits(theta, tokens).log_softmax(-1)
    chosen = log_probs[:, :-1].gather(2, tokens[:, 1:, None])[:, :, 0]  # position t - 1 predicts token t
    return (chosen * answer[:, 1:]).sum(1)


def lengths(rows: Sequence[Row]) -> Tensor:
    """Answer tokens of each row.

    Args:
        rows: any rows.

    Returns:
        (rows,) float64.
    """
    return torch.tensor([len(row.answer) for row in rows], dtype=torch.float64)


@dataclass(frozen=True)
class InnerProblem:
    """An inner problem with its outer objective.

    Attributes:
        decoder: the model.
        start: theta_0.
        terms: candidates.
        retain: retain rows.
        pairs: preference pairs (chosen, rejected) of J = mean margin s / T - s' / T', higher is better.
        strength: lambda.
        beta: b of NPO and DPO.
        anchor: None, or a point theta_a (flat) that a second proximal term (anchor_strength / 2) ||theta - theta_a||^2
            pulls to.
        anchor_strength: see ``anchor``.
    """

    decoder: Decoder
    start: Params
    terms: tuple[Term, ...]
    retain: tuple[Row, ...]
    pairs: tuple[tuple[Row, Row], ...]
    strength: float
    beta: float = 0.5
    anchor: Tensor | None = None
    anchor_strength: float = 0.0

    def losses(self, theta: Tensor) -> Tensor:
        """All l_k.

        Args:
            theta: (d,).

        Returns:
            (n,).
        """
        rows = [term.row for term in self.terms] + [term.other or term.row for term in self.terms]
        sums = summed_log_probs(self.decoder, unflatten(theta, self.start), rows)
        with torch.no_grad():
            reference = summed_log_probs(self.decoder, self.start, rows)
        n, out = len(self.terms), []
        for k, term in enumerate(self.terms):
            s, size = sums[k], len(term.row.answer)
            ratio, other = s - reference[k], sums[n + k] - reference[n + k]
            values = {
                "sft": -s / size,
                "ga": s / size,
                "npo": 2.0 / self.beta * F.softplus(self.beta * ratio),
                "dpo": F.softplus(-self.beta * (ratio - other)),
            }
            out.append(values[term.kind])
        return torch.stack(out)

    def inner(self, theta: Tensor, weights: Tensor) -> Tensor:
        """The function that theta*(w) minimises.

        Args:
            theta: (d,).
            weights: (n,) w, of any sign.

        Returns:
            Scalar.
        """
        value = 0.5 * self.strength * (theta - flatten(self.start)).square().sum()
        if self.anchor is not None:
            value = value + 0.5 * self.anchor_strength * (theta - self.anchor).square().sum()
        if self.terms:
            value = value + weights @ self.losses(theta)
        if self.retain:
            sums = summed_log_probs(self.decoder, unflatten(theta, self.start), self.retain)
            value = value - (sums / lengths(self.retain)).mean()
        return value

    def objective(self, theta: Tensor) -> Tensor:
        """J(theta), the mean length-normalised margin.

        Args:
            theta: (d,).

        Returns:
            Scalar.
        """
        rows = [pair[0] for pair in self.pairs] + [pair[1] for pair in self.pairs]
        mean = summed_log_probs(self.decoder, unflatten(theta, self.start), rows) / lengths(rows)
        return (mean[: len(self.pairs)] - mean[len(self.pairs) :]).mean()

    def hessian(self, theta: Tensor, weights: Tensor) -> Tensor:
        """Dense Hessian of :meth:`inner`.

        Args:
            theta: (d,).
            weights: (n,).

        Returns:
            (d, d).
        """
        return torch.func.hessian(self.inner)(theta.detach(), weights)


@dataclass(frozen=True)
class InnerSolution:
    """A point that may solve an inner problem.

    Attributes:
        theta: (d,).
        gradient_norm: ||grad|| of the inner problem there.
        converged: whether that is below ``TOLERANCE``; if not, derivatives of J at ``theta`` are wrong.
        hessian: (d, d) a Hessian of the inner problem near ``theta``; it speeds up a warm start.
    """

    theta: Tensor
    gradient_norm: float
    converged: bool
    hessian: Tensor


def gradient(problem: InnerProblem, theta: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the inner problem by one backward pass.

    Args:
        problem: the problem.
        theta: (d,).
        weights: (n,).

    Returns:
        (d,).
    """
    leaf = theta.detach().clone().requires_grad_(True)
    return torch.autograd.grad(problem.inner(leaf, weights), leaf)[0]


def lbfgs(problem: InnerProblem, theta: Tensor, weights: Tensor, tolerance: float, steps: int = 500) -> Tensor:
    """Minimise by L-BFGS with a strong Wolfe line search.

    Args:
        problem: the problem.
        theta: (d,) start.
        weights: (n,).
        tolerance: largest entry of the gradient at which it stops.
        steps: most iterations.

    Returns:
        (d,).
    """
    leaf = theta.detach().clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [leaf], max_iter=steps, tolerance_grad=tolerance, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        value = problem.inner(leaf, weights)
        leaf.grad = torch.autograd.grad(value, leaf)[0]
        return value.detach()

    optimiser.step(closure)
    return leaf.detach()


def solve_inner(
    problem: InnerProblem, weights: Tensor, warm: InnerSolution | None = None, stop_at: float | None = None
) -> InnerSolution:
    """Find theta*(w): L-BFGS, then Newton steps with a dense Hessian until ||grad|| < 1e-12.

    Args:
        problem: the problem.
        weights: (n,).
        warm: solution of a similar problem to start from, with its Hessian; None: start at theta_0.
        stop_at: stop before the Newton steps, at this largest entry of the gradient (to see what that costs).

    Returns:
        The solution; see whether it ``converged``.
    """
    theta = lbfgs(problem, flatten(problem.start), weights, stop_at or 1e-5) if warm is None else warm.theta
    hessian = problem.hessian(theta, weights) if warm is None else warm.hessian
    slope = gradient(problem, theta, weights)
    for _ in range(_MOST_NEWTON_STEPS if stop_at is None else 0):
        if float(slope.norm()) < TOLERANCE:
            break
        step = torch.linalg.solve(hessian, slope)
        new = gradient(problem, theta - step, weights)
        if float(new.norm()) > _KEEP_HESSIAN * float(slope.norm()):  # the old Hessian is not good enough here
            hessian = problem.hessian(theta, weights)
            step = torch.linalg.solve(hessian, slope)
            new = gradient(problem, theta - step, weights)
        for _ in range(_MOST_HALVINGS):
            if float(new.norm()) < float(slope.norm()):
                break
            step = step / 2.0
            new = gradient(problem, theta - step, weights)
        else:
            break  # rounding, or no solution near by
        theta, slope = theta - step, new
    size = float(slope.norm())
    return InnerSolution(theta, size, size < TOLERANCE, hessian)


def resolved_gains(
    problem: InnerProblem, weights: Tensor, step: float, warm: InnerSolution, which: Sequence[int] | None = None
) -> Tensor:
    """dJ(theta*(w)) / dw_k by central differences of inner problems solved anew.

    Args:
        problem: the problem.
        weights: (n,) w.
        step: half the distance in w_k.
        warm: the solution at w.
        which: candidates; None: all.

    Returns:
        (len(which),); positive = more weight on k raises J. The error is O(step^2).

    Raises:
        ArithmeticError: an inner problem was not solved.
    """
    slopes = []
    for k in range(len(weights)) if which is None else which:
        values = []
        for sign in (1.0, -1.0):
            moved = weights.clone()
            moved[k] += sign * step
            found = solve_inner(problem, moved, warm)
            if not found.converged:
                raise ArithmeticError(f"inner problem {k}: gradient {found.gradient_norm:.1e} at the end")
            values.append(float(problem.objective(found.theta)))
        slopes.append((values[0] - values[1]) / (2.0 * step))
    return torch.tensor(slopes, dtype=torch.float64)


def random_rows(seed: int, count: int, shape: Shape = Shape()) -> tuple[Row, ...]:
    """Draw rows: prompts of 2 to 4 tokens, answers of 2 to 6, of nearly every length.

    Args:
        seed: of the draw.
        count: rows.
        shape: gives the vocabulary.

    Returns:
        The rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def some(low: int, high: int, number: int) -> list[int]:
        return torch.randint(low, high, (number,), generator=generator).tolist()

    sizes = [(some(2, 5, 1)[0], some(2, 7, 1)[0]) for _ in range(count)]
    return tuple(Row(tuple(some(0, shape.vocab, p)), tuple(some(0, shape.vocab, a))) for p, a in sizes)


def random_problem(
    decoder: Decoder, start: Params, strength: float, kinds: Sequence[Kind], seed: int = 0
) -> InnerProblem:
    """Draw data for an inner problem.

    Args:
        decoder: the model.
        start: theta_0.
        strength: lambda.
        kinds: kind of every candidate.
        seed: of the draw.

    Returns:
        A problem with four retain rows and three preference pairs.
    """
    rows, others = (random_rows(seed + shift, len(kinds), decoder.shape) for shift in (0, 1))
    answers = [Row(row.prompt, other.answer) for row, other in zip(rows, others, strict=True)]
    good, bad = random_rows(seed + 2, 3, decoder.shape), random_rows(seed + 3, 3, decoder.shape)
    return InnerProblem(
        decoder=decoder,
        start=start,
        terms=tuple(
            Term(kind, row, other if kind == "dpo" else None)
            for kind, row, other in zip(kinds, rows, answers, strict=True)
        ),
        retain=random_rows(seed + 4, 4, decoder.shape),
        pairs=tuple((row, Row(row.prompt, other.answer)) for row, other in zip(good, bad, strict=True)),
        strength=strength,
    )

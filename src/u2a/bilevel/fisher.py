"""Diagonal curvatures: the Fisher information of the policy, and the metric of the Adam optimiser.

Both are sums of squared gradients, so they are positive whatever the sign of the unlearning loss, and a system
with them is solved in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from u2a.bilevel.inner_terms import InnerTerms
from u2a.bilevel.operators import Diagonal
from u2a.bilevel.proximal import proximal_diagonal
from u2a.bilevel.vectors import norm, zeros_like
from u2a.encoding import Encoded
from u2a.errors import NonFiniteError
from u2a.modeling import Params, Policy
from u2a.record import derive_seed
from u2a.stream import stream_index

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@dataclass(frozen=True)
class DiagonalFisher:
    """Diagonal of the Fisher information, F = sum_i w_i (1 / T_i) sum_t E_{y ~ p_t}[(d log p_t(y) / d theta)^2].

    p_t is the policy's distribution of the token at answer position t of row i, given the row's own earlier tokens.
    Retain rows (``nll``, ``kl``) enter with lambda / n_R in the place of w_i, and the proximal term with the exact
    diagonal of its Hessian. F is the negative of the Gauss-Newton diagonal of GA, and the Gauss-Newton diagonal of
    both retain terms; the factors of NPO's loss do not enter.

    Estimated without bias: one label is drawn at every position, and the gradient of the sum of their
    log-probabilities is squared; the positions do not mix in expectation, since a score has mean 0 given the context.
    One forward pass per row and one backward pass per row and draw. With few draws single entries may be far too
    small, so use damping.

    Attributes:
        draws: labels drawn per position, >= 1.
        seed: of the draws; a row's labels depend on its content, not on its place or batch.

    Source: Amari 1998; sampled labels as in Kunstner, Balles and Hennig 2019, arXiv 1905.12558, section 2.
    """

    draws: int = 1
    seed: int = 0

    @property
    def name(self) -> str:
        """Name with parameters."""
        return f"fisher(draws={self.draws}, seed={self.seed})"

    def at(self, terms: InnerTerms) -> Diagonal:
        """See :class:`~u2a.bilevel.curvature.Curvature`."""
        policy = terms.policy
        weighted = list(zip(terms.rows, terms.weights.tolist(), strict=True))
        if terms.has_retain_rows:
            weighted += [(row, terms.retain_weight / len(terms.retain)) for row in terms.retain]
        total = zeros_like(policy.trainable())
        for row, weight in weighted:
            for score in self._scores(policy, row):
                for name, gradient in score.items():
                    total[name] += weight / (self.draws * row.n_answer) * gradient.to(total[name]).square()
        if terms.term == "proximal":
            for name, entry in proximal_diagonal(policy).items():
                total[name] += terms.retain_weight * entry
        return Diagonal(total)

    def _scores(self, policy: Policy, row: Encoded) -> Iterator[Params]:
        """Gradients of sum_t log p_t(y_t), with y_t drawn anew for each."""
        logits = policy.log_probs([row]).logits[0]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, row.key))
        labels = _sample(logits, self.draws, generator)
        picked = logits.log_softmax(-1).gather(-1, labels).sum(0)
        parameters = policy.trainable()
        leaves = list(parameters.values())
        for draw in range(self.draws):
            keep = draw < self.draws - 1
            found = torch.autograd.grad(picked[draw], leaves, retain_graph=keep, materialize_grads=True)
            yield dict(zip(parameters, found, strict=True))


def _sample(logits: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Draw (answer, draws) labels on the CPU, so that they are the same on any device."""
    probabilities = logits.detach().softmax(-1).cpu()
    if not bool(probabilities.isfinite().all()):
        raise NonFiniteError("probabilities of a row for the curvature", "solve")
    return torch.multinomial(probabilities, draws, replacement=True, generator=generator).to(logits.device)


@dataclass(frozen=True)
class AdamMetric:
    """The metric in which Adam moves: a diagonal of sqrt(v) + eps, with v the mean of squared minibatch gradients.

    Adam divides a gradient by sqrt(v) + eps, so H^-1 ~ the optimiser's preconditioner, and the gain of a candidate
    becomes the inner product of grad J and grad l_k in the metric of the optimiser that is really used. v is the
    mean, over the minibatches of a run's seeded stream, of the squared gradient of a minibatch's loss
    mean_{i in B} (n w_i) l_i + lambda L_R at the current theta, clipped as the optimiser's is: what Adam's second
    moment would settle at if theta stood still. Entries that no minibatch reaches (rows of an embedding whose tokens
    it does not hold) say nothing of the metric; they take the root mean square of those that were reached.

    Entries have the unit of a gradient, not of a curvature; they are known up to a factor only (the learning rate),
    which changes no ranking. eps damps them already: use damping 0, or a share of the mean entry; a damping of
    1 / (learning rate x steps) belongs to plain gradient descent and would drown the metric.

    Attributes:
        batch_size: samples per step, >= 1.
        retain_batch_size: retain rows per step, >= 1.
        minibatches: gradients taken, >= 1.
        eps: added to the root, > 0; Adam's.
        max_norm: a minibatch's gradient is scaled to this norm at most, > 0; infinite: no clipping.
        seed: of the stream.

    Source: Kingma and Ba 2015, arXiv 1412.6980.
    """

    batch_size: int = 8
    retain_batch_size: int = 4
    minibatches: int = 8
    eps: float = 1e-8
    max_norm: float = math.inf
    seed: int = 0

    @property
    def name(self) -> str:
        """Name with parameters."""
        clipped = "" if math.isinf(self.max_norm) else f", max_norm={self.max_norm:g}"
        return f"adam(batch_size={self.batch_size}, minibatches={self.minibatches}, eps={self.eps:g}{clipped})"

    def at(self, terms: InnerTerms) -> Diagonal:
        """See :class:`~u2a.bilevel.curvature.Curvature`."""
        mean_square = zeros_like(terms.policy.trainable())
        for number in range(self.minibatches):
            gradients = self._minibatch(terms, number).gradient()
            factor = min(1.0, self.max_norm / (norm(gradients) + CLIP_EPS))
            for name, gradient in gradients.items():
                mean_square[name] += (factor * gradient).square() / self.minibatches
        reached = sum(int((value > 0).sum()) for value in mean_square.values())
        total = math.fsum(float(value.double().sum()) for value in mean_square.values())
        typical = total / reached if reached else 0.0
        return Diagonal(
            {name: torch.where(value > 0, value, typical).sqrt() + self.eps for name, value in mean_square.items()}
        )

    def _minibatch(self, terms: InnerTerms, number: int) -> InnerTerms:
        """The inner problem of one minibatch: its expectation over the stream is the whole."""
        n, m = len(terms.rows), len(terms.retain)
        size, retain_size = min(self.batch_size, n), min(self.retain_batch_size, m)
        chosen = [stream_index(number * size + k, n, derive_seed(self.seed, "forget")) for k in range(size)]
        kept = [stream_index(number * retain_size + k, m, derive_seed(self.seed, "retain")) for k in range(retain_size)]
        return replace(
            terms,
            rows=tuple(terms.rows[index] for index in chosen),
            weights=terms.weights[chosen] * (n / size),
            reference_sums=terms.reference_sums[chosen],
            retain=tuple(terms.retain[index] for index in kept),
        )

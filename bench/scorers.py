"""The contenders of this package, by name, and the two yardsticks: a forward pass, and one backward per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from subject import Subject
from torch import Tensor

from u2a.bilevel.attention import second_order_attention
from u2a.bilevel.backward import BatchedBackward
from u2a.bilevel.curvature import HessianOperator
from u2a.bilevel.differences import Central, OneSided
from u2a.bilevel.forward_mode import ForwardMode
from u2a.bilevel.inner_terms import InnerTerms
from u2a.bilevel.score import Scorer
from u2a.modeling import Params
from u2a.progress import Quiet

OURS: dict[str, Scorer] = {
    "central": Central(),
    "one_sided": OneSided(),
    "jvp": ForwardMode(),
    "backward": BatchedBackward(),
}

Work = Callable[[], Tensor]


def released_way(subject: Subject) -> Tensor:
    """U' grad l_k as the method's released code does it: one row at a time through the model with its labels.

    The model's own loss takes logits at all positions of the row. The loss of gradient ascent is its negative.
    """
    policy = subject.policy
    flat = torch.cat([value.reshape(-1) for value in subject.u.values()])
    leaves = list(policy.trainable().values())
    out = torch.zeros(len(subject.losses.rows), dtype=torch.float64)
    for k, row in enumerate(subject.losses.rows):
        ids = torch.tensor([row.input_ids], device=policy.device)
        labels = ids.clone()
        labels[:, : -row.n_answer] = -100
        loss = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        gradients = torch.autograd.grad(loss, leaves)
        out[k] = -torch.dot(torch.cat([value.reshape(-1) for value in gradients]), flat).double()
    return out


def per_sample(subject: Subject) -> Tensor:
    """U' grad l_k by batch size 1, backward, flatten, dot, with all that we save: logits of the answer alone.

    It is also the truth that the others are compared with.
    """
    flat = torch.cat([value.reshape(-1) for value in subject.u.values()])
    leaves = list(subject.policy.trainable().values())
    out = torch.zeros(len(subject.losses.rows), dtype=torch.float64)
    for k in range(len(out)):
        gradients = torch.autograd.grad(subject.losses.of([k]).sum(), leaves)
        out[k] = torch.dot(torch.cat([value.reshape(-1) for value in gradients]), flat).double()
    return out


def works(subject: Subject, known: Tensor) -> dict[str, Work]:
    """What is timed on all candidates along u.

    Args:
        subject: the problem.
        known: (n,) losses at theta, for the one-sided differences that need no base.
    """
    losses, u = subject.losses, [subject.u]
    informed = replace(losses, known=known)
    return {
        "forward": losses.values,
        "central": lambda: OURS["central"].derivatives(losses, u, Quiet()).derivatives[:, 0],
        "one_sided_known_base": lambda: OURS["one_sided"].derivatives(informed, u, Quiet()).derivatives[:, 0],
        "backward": lambda: OURS["backward"].derivatives(losses, u, Quiet()).derivatives[:, 0],
        "one_sided": lambda: OURS["one_sided"].derivatives(losses, u, Quiet()).derivatives[:, 0],
        "jvp": lambda: OURS["jvp"].derivatives(losses, u, Quiet()).derivatives[:, 0],
        "per_sample_backward": lambda: per_sample(subject),
        "released_way": lambda: released_way(subject),
    }


def several_directions(subject: Subject, every: int) -> dict[str, Work]:
    """Four directions at once, on every ``every``-th candidate in length order.

    The step of the central differences is given, not chosen: on a part of the candidates the choice, which costs
    the same whatever their number, would weigh too much.
    """
    order = [index for batch in subject.losses.batches() for index in batch]
    part = subject.losses.subset(order[::every])
    directions = list(subject.directions)
    return {
        "part_forward": part.values,
        "part_central_4": lambda: Central(0.02).derivatives(part, directions, Quiet()).derivatives,
        "part_backward_4": lambda: OURS["backward"].derivatives(part, directions, Quiet()).derivatives,
    }


def curvature(subject: Subject) -> dict[str, Work]:
    """A Hessian-vector product and a gradient on one batch of the candidates.

    The product needs an attention kernel that can be differentiated twice; the gradient is timed on that kernel and
    on the default one.
    """
    terms = hessian_terms(subject)
    leaves = list(subject.policy.trainable().values())

    def gradient() -> Tensor:
        (value,) = terms.scalars()
        return _first(torch.autograd.grad(value, leaves))

    def gradient_same_kernel() -> Tensor:
        with second_order_attention(subject.policy):
            return gradient()

    return {
        "hvp_gradient": gradient,
        "hvp_gradient_same_kernel": gradient_same_kernel,
        "hvp_product": lambda: _first(tuple(HessianOperator(terms).product(subject.u).values())),
    }


def hessian_terms(subject: Subject) -> InnerTerms:
    """The mean loss of the batch in the middle."""
    batches = subject.losses.batches()
    batch = batches[len(batches) // 2]
    rows = tuple(subject.losses.rows[k] for k in batch)
    return InnerTerms(
        policy=subject.policy,
        loss=subject.losses.loss,
        rows=rows,
        weights=torch.full((len(rows),), 1.0 / len(rows), dtype=torch.float64),
        reference_sums=torch.zeros(len(rows)),
    )


def hessian_product(subject: Subject) -> Params:
    """H u on that batch."""
    return HessianOperator(hessian_terms(subject)).product(subject.u)


def _first(values: tuple[Tensor, ...]) -> Tensor:
    return values[0]

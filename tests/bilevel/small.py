"""A policy small and exact enough for dense oracles: one layer, float64 throughout, 80 trainable numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tiny import examples, tiny_model, tiny_tokenizer
from u2a.bilevel.candidates import CandidateLosses
from u2a.bilevel.curvature import HessianOperator
from u2a.bilevel.inner_terms import InnerTerms
from u2a.config import AdapterConfig
from u2a.encoding import Encoded
from u2a.losses import UnlearningLoss, make_loss
from u2a.modeling import Params, Policy, answer_log_probs
from u2a.reference.dense import unflatten
from u2a.types import Example

B = 0.1  # NPO's inverse temperature in the formulas written out below
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def small_policy(seed: int = 0, lora_b_sd: float = 0.3, token_budget: int = 1024, reached: bool = True) -> Policy:
    """One-layer float64 policy with LoRA of rank 1 on a query and a down projection.

    Args:
        seed: of weights and adapter.
        lora_b_sd: size of LoRA's B, so that theta differs from theta_0.
        token_budget: tokens per forward batch.
        reached: put the random B in (False leaves theta_0).
    """
    model = tiny_model(seed, layers=1, hidden=16).double()
    for parent in list(model.modules()):  # transformers' RMSNorm computes in float32 whatever the dtype
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(16, eps=child.variance_epsilon).double()
                norm.weight.data.copy_(child.weight.data)
                setattr(parent, name, norm)
    settings = AdapterConfig(r=1, alpha=2.0, target_modules=["q_proj", "down_proj"])
    policy = Policy(model, tiny_tokenizer(), settings, token_budget=token_budget, seed=seed)
    assert all(value.dtype == torch.float64 for value in policy.trainable().values())
    generator = torch.Generator().manual_seed(seed + 1)
    for name, value in policy.trainable().items():
        if reached and ".lora_B." in name:
            value.data.copy_(lora_b_sd * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return policy


def encode(policy: Policy, rows: Sequence[Example]) -> tuple[Encoded, ...]:
    return tuple(policy.encoder.encode(row.prompt, row.completion) for row in rows)


def candidate_losses(policy: Policy, loss: UnlearningLoss, rows: Sequence[Example]) -> CandidateLosses:
    encoded = encode(policy, rows)
    sums = policy.reference_sums(encoded) if loss.needs_reference else torch.zeros(len(rows))
    return CandidateLosses(policy, loss, encoded, sums, tuple(row.id for row in rows))


def theta_of(policy: Policy) -> Params:
    """Copies of the trainable parameters."""
    return {name: value.detach().clone() for name, value in policy.trainable().items()}


def direction(policy: Policy, seed: int, length: float = 1.0) -> Params:
    """A random vector of the given length."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(value.numel() for value in policy.trainable().values())
    column = torch.randn(size, generator=generator, dtype=torch.float64)
    return unflatten(column * length / column.norm(), policy.trainable())


def summed(policy: Policy, row: Encoded, parameters: Params) -> Tensor:
    """s_i of one row alone (no padding), as a function of theta: log-softmax of the logits before each answer token."""
    ids = torch.tensor([row.input_ids])
    logits = torch.func.functional_call(policy.model, parameters, (), {"input_ids": ids}).logits[0]
    steps = range(len(row.input_ids) - row.n_answer, len(row.input_ids))
    return torch.stack([logits[t - 1].double().log_softmax(-1)[row.input_ids[t]] for t in steps]).sum()


def loss_by_hand(name: str, policy: Policy, row: Encoded, parameters: Params) -> Tensor:
    """GA and NPO of one row, from their definitions."""
    if name == "ga":
        return summed(policy, row, parameters) / row.n_answer
    start = {key: value.to(torch.float64) for key, value in policy.theta0.items()}
    with torch.no_grad():
        reference = summed(policy, row, start)
    return 2.0 / B * torch.log1p(torch.exp(B * (summed(policy, row, parameters) - reference)))


def retain_by_hand(term: str, policy: Policy, rows: Sequence[Encoded], parameters: Params) -> Tensor:
    """The retain terms, from their definitions."""
    if term == "none":
        return torch.zeros((), dtype=torch.float64)
    if term == "proximal":
        names = [name for name in parameters if ".lora_A." in name]
        changes = [2.0 * parameters[name.replace(".lora_A.", ".lora_B.")] @ parameters[name] for name in names]
        return torch.stack([change.square().sum() for change in changes]).sum()
    if term == "nll":
        return -torch.stack([summed(policy, row, parameters) / row.n_answer for row in rows]).mean()
    return torch.stack([_kl(policy, row, parameters) for row in rows]).mean()


def _kl(policy: Policy, row: Encoded, parameters: Params) -> Tensor:
    batch = policy.collate([row])
    with torch.no_grad():
        start = {key: value.to(torch.float64) for key, value in policy.theta0.items()}
        old = answer_log_probs(policy.model, batch, start).logits[0].softmax(-1)
    new = answer_log_probs(policy.model, batch, parameters).logits[0].softmax(-1)
    return (old * (old / new).log()).sum(-1).mean()


def inner_by_hand(
    policy: Policy, names: tuple[str, str], rows: Sequence[Encoded], weights: Tensor, retain: Sequence[Encoded]
) -> Callable[[Params], Tensor]:
    """The inner problem f(theta) = sum_i w_i l_i + 0.7 L_R of one loss and term, row by row."""
    loss, term = names

    def value(parameters: Params) -> Tensor:
        parts = [w * loss_by_hand(loss, policy, row, parameters) for w, row in zip(weights, rows, strict=True)]
        return torch.stack(parts).sum() + 0.7 * retain_by_hand(term, policy, retain, parameters)

    return value


def terms(policy: Policy, loss: str, term: str, weight: float = 0.7) -> InnerTerms:
    """The inner problem on three rows with ``WEIGHTS``, as the package's curvatures take it."""
    rows = encode(policy, examples(3))
    value = make_loss(loss, 0.1)
    sums = policy.reference_sums(rows) if value.needs_reference else torch.zeros(3)
    retain = encode(policy, examples(2, start=40)) if term in ("nll", "kl") else ()
    return InnerTerms(policy, value, rows, WEIGHTS, sums, retain, term, weight)  # type: ignore[arg-type]


def hessian(policy: Policy, loss: str, term: str, weight: float = 0.7) -> HessianOperator:
    """The package's Hessian of the inner problem of :func:`terms`."""
    return HessianOperator(terms(policy, loss, term, weight))

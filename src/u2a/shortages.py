"""What the options need and the data lack, told before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from u2a.config import RunConfig, SolveSection, UnlearnSection
from u2a.data import prompt_key
from u2a.errors import ConfigError
from u2a.types import Example, Pair, Partition

TRAINED = ("embedding", "language_model")  # reward models whose head is fitted on the run's own pairs


def shortages(result: Partition, config: RunConfig, stage: str | None = None) -> list[str]:
    """Say what the run's options need and the partition lacks, before any model is loaded.

    Args:
        result: the partition.
        config: options of the run.
        stage: the one stage that is run alone: ``reward`` needs candidates only, and ``score``, ``solve`` and
            ``unlearn`` no evaluation pairs; None for all of them.

    Returns:
        One sentence with a remedy per shortage; empty when the run can start.
    """
    solve, unlearn, reward = config.solve, config.unlearn, config.reward
    chooses, evaluates = stage != "reward", stage not in ("reward", "score", "solve", "unlearn")
    problems = _too_few_pairs(result, solve) if chooses else []
    if not result.forget:
        problems.append("forget: no candidates (set data.forget, or data.pairs with partition.forget_frac > 0)")
    elif chooses and solve.n_selected is not None and solve.n_selected > (left := reward.n_kept(len(result.forget))):
        problems.append(
            f"solve.n_selected: {solve.n_selected} is more than the {left} candidates "
            f"(set at most {left}, or give more negatives)"
        )
    if evaluates and not result.evaluation:
        problems.append("evaluation: no pairs (set data.evaluation, or data.pairs with partition.evaluation_frac > 0)")
    if chooses and not result.retain and unlearn.retain_term in ("nll", "kl"):
        problems.append(f"retain: no rows, unlearn.retain_term={unlearn.retain_term} needs them (set data.retain)")
    if chooses and not result.retain and solve.damage_weight > 0.0:
        problems.append(
            f"retain: no rows, solve.damage_weight={solve.damage_weight:g} needs them "
            "(set data.retain, or solve.damage_weight to 0)"
        )
    if reward.model != "none" and reward.prefilter_below != "none" and not chooses and not result.preference:
        problems.append("preference: no pairs, reward.prefilter_below needs them (set data.preferences)")
    problems += _too_few_for_heads(result, config, evaluates)
    if config.finetune.enabled and not result.finetune:
        problems.append("finetune: no pairs (set data.finetune, or data.pairs with partition.finetune_frac > 0)")
    return problems


def without_retain_rows(section: UnlearnSection, remedy: str) -> UnlearnSection:
    """Leave the retain term out where it has no rows; a proximal term needs none and stays.

    Args:
        section: loss and retain term.
        remedy: how retain rows are given, for the message.

    Returns:
        A section that can do without retain rows.

    Raises:
        ConfigError: the loss is one with a retain term.
    """
    if section.retain_term not in ("nll", "kl"):
        return section
    if section.loss == "grad_diff":
        raise ConfigError(f"unlearn.loss: grad_diff needs retain rows ({remedy}, or choose another loss)")
    return section.model_copy(update={"retain_term": "none"})


def n_heldout(section: SolveSection, prompts: int) -> int:
    """Count the preference prompts that are held out.

    Args:
        section: ``heldout_frac``.
        prompts: all of them.

    Returns:
        The share, rounded; 0 where fewer than two prompts would be left.
    """
    count = round(section.heldout_frac * prompts)
    return count if prompts - count >= 2 else 0


def count_prompts(rows: Sequence[Pair | Example]) -> int:
    """Count distinct prompts.

    Args:
        rows: any rows.

    Returns:
        Their number; prompts that differ in case and spacing alone are one.
    """
    return len({prompt_key(row.prompt) for row in rows})


def _too_few_pairs(result: Partition, solve: SolveSection) -> list[str]:
    if not result.preference:
        return ["preference: no pairs (set data.preferences, or data.pairs with partition.preference_frac > 0)"]
    prompts = count_prompts(result.preference)
    if _suffices(solve, prompts):
        return []
    share = solve.heldout_frac
    needed = max(solve.folds, int((solve.folds - 0.5) / (1.0 - share)), int(0.5 / share) if share else 0)
    while not _suffices(solve, needed):
        needed += 1
    held, remedy = "", "or lower solve.folds"
    if share > 0:
        held, remedy = " and the held-out share", "lower solve.folds, or set solve.heldout_frac to 0"
    return [
        f"preference: {prompts} prompts, {needed} needed for solve.folds={solve.folds}{held} "
        f"(give more pairs, {remedy})"
    ]


def _suffices(solve: SolveSection, prompts: int) -> bool:
    """Whether each fold gets a prompt, and the held-out share, if there is one, at least one."""
    held = n_heldout(solve, prompts)
    return prompts - held >= solve.folds and (held > 0 or solve.heldout_frac == 0.0)


def _too_few_for_heads(result: Partition, config: RunConfig, evaluates: bool) -> list[str]:
    reward = config.reward
    heads = ["reward.model"] if reward.model in ("embedding", "language_model", "implicit") else []
    evaluating = [f"reward.{name}" for name in ("eval_model", "second_model") if getattr(reward, name) in TRAINED]
    heads += [" with ".join(evaluating)] if evaluating and evaluates else []
    if not heads or (prompts := count_prompts(result.reward)) >= len(heads):
        return []
    return [
        f"reward: {prompts} prompts with pairs, {' and '.join(heads)} each train a head on their own "
        "(set data.reward, or data.pairs with partition.reward_frac > 0, or choose none)"
    ]

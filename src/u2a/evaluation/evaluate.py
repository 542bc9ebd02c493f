"""Stage 5: arms that were measured in the same way, side by side with paired intervals.

Nothing here is chosen or tuned on the held-out pairs. All arms answer the same prompts under the same decoding,
and every interval resamples prompts, not rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from u2a.config_evaluation import EvaluationSection
from u2a.evaluation.arm import ArmResult, item_groups
from u2a.evaluation.reward_value import REWARD_LENGTH_CONTROLLED, arm_agreement, length_controlled, prompt_agreement
from u2a.evaluation.significance import sign_flip_test
from u2a.evaluation.stats import Interval, bootstrap_mean, paired_difference, paired_perplexity_difference
from u2a.evaluation.verdict import BEFORE, PRIMARY, SOLUTION, verdict
from u2a.record import derive_seed
from u2a.solution import Solution
from u2a.types import Agreement, Contrast, EvalTable, Metric, Partition, RewardCard, Sample

EQUAL_PPL = "_equal_ppl"  # ends the name of an arm whose change is scaled to the common utility budget


def build_table(
    arms: Mapping[str, ArmResult],
    partition: Partition,
    section: EvaluationSection,
    seed: int,
    reward_cards: tuple[RewardCard, ...] = (),
    solution: Solution | None = None,
) -> EvalTable:
    """Compare the arms.

    Args:
        arms: results by arm; ``after`` is the solution, ``before`` the start, any others are controls.
        partition: the one the arms were measured on.
        section: bootstrap resamples.
        seed: the run's seed.
        reward_cards: what is known of the evaluation's reward model, and of the second one if there is one.
        solution: gives the verdict the reliability of the gains and whether selection fell back.

    Returns:
        Metrics, paired differences of ``after`` against every other arm, all generated answers, and the verdict.
    """
    groups = item_groups(partition)
    arms = _with_controlled_reward(arms, groups, section.bootstrap, derive_seed(seed, "bootstrap"))
    contrasts: list[Contrast] = []
    for one, other in _pairs_of(list(arms)):
        contrasts += contrasts_of(arms[one], arms[other], (one, other), groups, (section.bootstrap, seed))
    by_id = {pair.id: pair for pair in partition.evaluation}
    ids = dict.fromkeys(key for arm in arms.values() for key in arm.answers)
    samples = tuple(
        Sample(
            id=key,
            prompt=by_id[key].prompt[-1].content,
            answers={name: arm.answers[key] for name, arm in arms.items() if key in arm.answers},
            rewards={name: arm.rewards[key] for name, arm in arms.items() if key in arm.rewards},
        )
        for key in ids
    )
    collapsed = {name: str(arm.collapse.kind) for name, arm in arms.items() if arm.collapse and arm.collapse.flag}
    return EvalTable(
        arms={name: arm.metrics for name, arm in arms.items()},
        contrasts=tuple(contrasts),
        samples=samples,
        reward_card=reward_cards[0] if reward_cards else None,
        second_reward_card=reward_cards[1] if len(reward_cards) > 1 else None,
        agreements=_agreements(arms, reward_cards, groups, section.bootstrap, derive_seed(seed, "bootstrap")),
        collapsed=collapsed,
        verdict=verdict(contrasts, solution, _unchanged_words(arms) or _collapse_words(arms.get(SOLUTION))),
    )


def _unchanged_words(arms: Mapping[str, ArmResult]) -> str | None:
    """What speaks against a win of the solution: it is the start, so that only the other arm has moved."""
    margins = [arms[name].metrics.get(PRIMARY) for name in (BEFORE, SOLUTION) if name in arms]
    start, end = margins if len(margins) == 2 else (None, None)
    if start is None or end is None or not end.values or start.values != end.values:
        return None
    return f"{SOLUTION} is where it started (the guard may have taken the change back), so nothing was unlearned"


def _collapse_words(arm: ArmResult | None) -> str | None:
    """What speaks against believing an arm's likelihoods: its answers are broken, or there are none."""
    if arm is not None and arm.collapse is None:
        return "no answer was generated, so nothing is known of a collapse"
    if arm is None or arm.collapse is None or not arm.collapse.flag:
        return None
    kind = str(arm.collapse.kind).replace("_", " ")
    return f"the unlearned model has collapsed ({kind}), so no likelihood can speak for it"


def _pairs_of(arms: list[str]) -> list[tuple[str, str]]:
    """Which arms are compared: the solution with every other, those at equal utility among themselves."""
    pairs = []
    for suffix in ("", EQUAL_PPL):
        first = SOLUTION + suffix
        if first in arms:
            same = [name for name in arms if name != first and name.endswith(EQUAL_PPL) == bool(suffix)]
            pairs += [(first, other) for other in sorted(same, key=lambda name: name != BEFORE)]
    return pairs


def contrasts_of(
    first: ArmResult,
    second: ArmResult,
    names: tuple[str, str],
    groups: Mapping[str, str],
    resampling: tuple[int, int],
) -> list[Contrast]:
    """Paired differences of all metrics that both arms have, on the items both measured.

    Args:
        first: the arm on the left of the difference.
        second: the arm on the right.
        names: what they are called.
        groups: prompt key by item id.
        resampling: number of bootstrap resamples, and the run's seed.

    Returns:
        One contrast per metric; metrics withheld on one side have none.
    """
    resamples, seed = resampling[0], derive_seed(resampling[1], "bootstrap")
    rows: dict[str, Interval] = {}
    flips: dict[str, float | None] = {}
    for metric, value in first.metrics.items():
        other = second.metrics.get(metric)
        if metric.startswith("mia_"):
            continue  # an AUC's error has two sides, forget rows and holdout; a mean over forget rows has one
        if other is not None and value.values and other.values:
            rows[metric] = paired_difference(value.values, other.values, groups, resamples, seed)
            flips[metric] = sign_flip_test(_by_prompt(value.values, other.values, groups)).p
    same_rows = first.retain_nll and first.retain_nll.keys() == second.retain_nll.keys()
    if same_rows and first.retain_tokens == second.retain_tokens:  # of other tokens perplexity is another quantity
        rows["retain_ppl"] = paired_perplexity_difference(
            first.retain_nll, second.retain_nll, first.retain_tokens, groups, resamples, seed
        )  # of the same tokens: the summed NLL differs as perplexity does
        flips["retain_ppl"] = sign_flip_test(_by_prompt(first.retain_nll, second.retain_nll, groups)).p
    return [
        Contrast(
            metric=metric,
            first=names[0],
            second=names[1],
            difference=d.value,
            low=d.low,
            high=d.high,
            n=d.n,
            p=flips.get(metric),
        )
        for metric, d in rows.items()
    ]


def _by_prompt(first: Mapping[str, float], second: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """Summed difference of each prompt's items: what the mean over items is made of."""
    sums: defaultdict[str, float] = defaultdict(float)
    for key in sorted(first.keys() & second.keys()):
        sums[groups.get(key, key)] += first[key] - second[key]
    return dict(sums)


def _with_controlled_reward(
    arms: Mapping[str, ArmResult], groups: Mapping[str, str], resamples: int, seed: int
) -> dict[str, ArmResult]:
    """Add the reward without what goes with answer length, which takes all arms together."""
    rewards = {name: arm.rewards for name, arm in arms.items() if arm.rewards}
    if len(rewards) < 2:
        return dict(arms)
    controlled = length_controlled(rewards, {name: arms[name].answers for name in rewards})
    out = dict(arms)
    for name, values in controlled.values.items():
        found = bootstrap_mean(values, groups, resamples, seed)
        metric = Metric(value=found.value, low=found.low, high=found.high, n=found.n, values=values)
        out[name] = arms[name].model_copy(update={"metrics": arms[name].metrics | {REWARD_LENGTH_CONTROLLED: metric}})
    return out


def _agreements(
    arms: Mapping[str, ArmResult],
    cards: tuple[RewardCard, ...],
    groups: Mapping[str, str],
    resamples: int,
    seed: int,
) -> tuple[Agreement, ...]:
    """How alike the two reward models rank the answers of the solution, and the arms."""
    both = {name: arm for name, arm in arms.items() if arm.rewards and arm.second_rewards}
    if len(cards) < 2 or not both:
        return ()
    names = cards[0].name, cards[1].name
    arm = both.get(SOLUTION, next(iter(both.values())))
    first, second = (
        {name: getattr(arm, which) for name, arm in both.items()} for which in ("rewards", "second_rewards")
    )
    return (
        prompt_agreement(names, arm.rewards, arm.second_rewards, groups, resamples, seed),
        arm_agreement(names, first, second, groups, resamples, seed),
    )

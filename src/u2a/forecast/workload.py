"""What every phase of a run computes: which rows pass the model, in which batches, in which way.

The plan follows the run's own functions for batches, folds, steps and arms. What only the run can know is replaced:
the selected answers by a random draw of as many, and every loop that may end early by its longest course (all rounds,
all steps, answers as long as they may be, no fallback, no line search of the guard).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from u2a.arms import NOT_UNLEARNED, SOLUTION_ARM, arms_of, control_weights
from u2a.bilevel.objective import Item, item_batches
from u2a.bilevel.outer_problem import OuterProblem, split_preference
from u2a.bilevel.solve import n_to_select
from u2a.config import RunConfig
from u2a.config_reward import RewardSection
from u2a.encoding import Encoded, Encoder, token_batches
from u2a.evaluation.arm import prompts_answered
from u2a.evaluation.evaluate import EQUAL_PPL
from u2a.evaluation.prompt_sets import PromptSet
from u2a.finetune import mixture, n_steps
from u2a.forecast.work import Rows, Work, step_batches
from u2a.packaged import is_converted
from u2a.pipeline import PROBE_PROMPTS
from u2a.record import derive_seed
from u2a.reward.analysis import split_reward_pairs
from u2a.reward.base import prompt_text
from u2a.reward.implicit import DpoSettings
from u2a.reward.loading import embeds_texts
from u2a.types import Example, Message, Pair, Partition
from u2a.unlearn import InnerProblem, weighted_rows

Turns = tuple[Message, ...]
SCALE_SEARCH = 8  # perplexities measured, about, to find the scale of equal utility


@dataclass
class Workload:
    """The phases of a run, by the names under which the console times them.

    Args:
        config: all options.
        partition: the run's data.
        encoder: around the policy's tokenizer.
        prompt_sets: prompts of the evaluation.
        holdout: texts of membership inference.

    Attributes:
        phases: what each phase computes, in the order in which phases begin.
        asked: prompts that are answered, by their tokens.
    """

    config: RunConfig
    partition: Partition
    encoder: Encoder
    prompt_sets: Sequence[PromptSet] = ()
    holdout: Sequence[Example] = ()
    phases: dict[str, list[Work]] = field(default_factory=dict)
    asked: dict[tuple[int, ...], Turns] = field(default_factory=dict)
    _referenced: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._reward_analysis()
        self._policy()
        self._selection()
        self._arms()
        self._evaluation()
        self._add("report")

    # --- the problems of the run -----------------------------------------------------------------

    @property
    def inner(self) -> InnerProblem:
        """The inner problem; of the candidates the reward analysis leaves away it knows the number alone."""
        config, parts = self.config, self.partition.retain_parts()
        kept = self.partition.forget[: config.reward.n_kept(len(self.partition.forget))]
        seed = derive_seed(config.seed, "unlearn")
        return InnerProblem(kept, parts.train, parts.guard, config.unlearn, config.guard, seed)

    @property
    def outer(self) -> OuterProblem:
        """The outer problem, without its objective."""
        return OuterProblem(self.partition.preference, self.config.solve, None, derive_seed(self.config.seed, "solve"))

    @property
    def n_directions(self) -> int:
        """Directions along which candidates are scored at once."""
        extra = int(self.config.solve.remove_common) + int(self.config.solve.damage_weight > 0)
        return len(split_preference(self.outer).folds) + extra

    @property
    def judged(self) -> bool:
        """Whether rounds of the selection end in an inner run, by which they are judged."""
        measured = bool(split_preference(self.outer).heldout) or self.config.reward.model != "none"
        return self.config.solve.judges_rounds(measured)

    # --- stages ----------------------------------------------------------------------------------

    def _reward_analysis(self) -> None:
        section, sets = self.config.reward, self.partition
        self._add("load tokenizer" if is_converted(self.config.model.name_or_path) else "convert model")
        if section.model == "none":
            return
        pairs = split_reward_pairs(sets.reward)[0]
        again = list(sets.forget) if self._tokenwise else []  # the threshold and the card both read the chosen answers
        read = [*sets.forget, *again, *_chosen(sets.preference) * 2, *_rejected(sets.preference)]
        if section.model == "implicit":
            self._policy()
            both = [self._both(pair) for pair in pairs]
            self._reference("reward model", [row for each in both for row in each])
            size = DpoSettings().batch_size
            steps = [tuple(r for each in both[k : k + size] for r in each) for k in range(0, len(both), size)]
            self._add("reward model", Work("gradient", tuple(steps), DpoSettings().epochs))
            self._add("reward analysis", self._scored(self._rows(read)))
            return
        self._add("reward model", *self._texts("reward model", section, _chosen(pairs), _rejected(pairs), trains=True))
        self._add("reward analysis", *self._texts("reward model", section, read))

    def _policy(self) -> None:
        """Load the model and make the misaligned start, once."""
        if "load model" in self.phases:
            return
        self._add("load model")
        if self.config.finetune.enabled:
            self._finetune("misaligned start", leave_out_forget=False)

    def _finetune(self, name: str, leave_out_forget: bool) -> None:
        section, seed = self.config.finetune, derive_seed(self.config.seed, "finetune")
        rows = mixture(self.partition, section, seed, leave_out_forget)
        size, steps = min(section.batch_size, len(rows)), n_steps(len(rows), section)
        self._add(name, Work("step", step_batches(self._rows(rows), size, steps, seed)))

    def _selection(self) -> None:
        section, inner = self.config.solve, self.inner
        self._add("reference")
        at_start = section.warmup_steps == 0 and section.adjoint == "identity" and self.config.model.adapter.enabled
        if inner.loss.needs_reference and not (at_start and section.scorer in ("auto", "backward")):
            self._reference("reference", self._rows(inner.forget))
        if section.objective == "dpo":
            self._reference("reference", [row for pair in self.partition.preference for row in self._both(pair)])
        if self.judged and (heldout := split_preference(self.outer).heldout):
            self._value_of_j("measure start", heldout)
        if section.warmup_steps:
            self._inner_run("warm-up", inner.shortened(section.warmup_steps), inner.uniform())
        between = _with_steps(inner, section.inner_steps or inner.section.max_steps)
        block = math.ceil((most := n_to_select(inner, self.outer)) / section.rounds)
        for index in range(section.rounds):
            self._gains(inner)
            if self.judged:
                self._inner_run(f"inner run, round {index + 1}", between, self._drawn(min(most, block * (index + 1))))
                self._measure()
        if section.final_refine and section.mirror_steps and most > 1:
            self._add("inner run, best round")
            if section.rounds > 1:  # the last one may be rolled back; of a lone one the solution is still there
                self._inner_run("inner run, best round", between, self._drawn(most))
            self._refine(between, self._drawn(most))

    def _refine(self, inner: InnerProblem, weights: dict[str, float]) -> None:
        chosen = weighted_rows(inner.forget, weights)
        if self.config.solve.refines_unrolled(self.config.unlearn):
            self._gradient_of_j()
            batches = self._steps(inner, chosen)
            self._add("unrolled derivative", Work("unrolled", batches, graph=_in_one_graph(inner)))
        else:
            self._gains(inner, chosen)
        self._inner_run("inner run, final weights", inner, weights)
        self._measure()

    def _gains(self, inner: InnerProblem, chosen: Sequence[Example] | None = None) -> None:
        """One scoring of candidates."""
        section = self.config.solve
        self._gradient_of_j()
        candidates = self._rows(inner.forget if chosen is None else chosen)
        if section.remove_common:
            self._add("mean candidate gradient", Work("gradient", self._batches(candidates)))
        if section.damage_weight:
            rows = self._rows(inner.retain[: section.curvature_samples])
            self._add("retain gradient", Work("gradient", self._batches(rows)))
        if section.adjoint == "implicit":
            per_solve = section.cg_steps + 1
            products = self.n_directions * per_solve if section.curvature in ("hessian", "gauss_newton") else 1
            rows = self._rows((*inner.forget[: section.curvature_samples],))
            self._add("linear solve", Work("product", self._batches(rows), products))
        self._add("score candidates", Work("score", self._batches(candidates)))

    def _gradient_of_j(self) -> None:
        items = self._items("gradient of J", [pair for fold in split_preference(self.outer).folds for pair in fold])
        if self.config.solve.pair_clip < 1.0:
            self._add("gradient of J", Work("gradient", tuple(item.answers for item in items)))
        self._add("gradient of J", Work("gradient", self._item_batches(items)))

    def _items(self, name: str, pairs: Sequence[Pair]) -> list[Item]:
        """What J reads of each pair; for an expected reward, answers are drawn, scored and read before."""
        section, encode = self.config.solve, self.encoder.encode
        answers: list[tuple[Encoded, ...]]
        if section.objective == "nll":
            answers = [(encode(pair.prompt, pair.chosen, pair.source),) for pair in pairs]
        elif section.objective == "reward":
            new, samples = section.reward_max_new_tokens, section.reward_samples
            self._generate(name, [pair.prompt for pair in pairs], new, samples)
            answers = [(self._longest(pair, new),) * samples for pair in pairs]
            scored = self._scored([row for rows in answers for row in rows], 2.0 if self._tokenwise else 1.0)
            self._add(name, scored, Work("forward", tuple(answers)))
        else:
            answers = [self._both(pair) for pair in pairs]
        return [Item(pair, rows) for pair, rows in zip(pairs, answers, strict=True)]

    def _item_batches(self, items: Sequence[Item]) -> tuple[Rows, ...]:
        """Batches of J, for all folds at once: a batch more makes no difference."""
        batches = item_batches(items, self.config.token_budget)
        return tuple(tuple(row for k in batch for row in items[k].answers) for batch in batches)

    def _longest(self, pair: Pair, new: int) -> Encoded:
        """The prompt of a pair with an answer as long as the policy's own may be."""
        return Encoded(self.encoder.encode_prompt(pair.prompt) + (self.encoder.end_id,) * new, new)

    def _scored(self, rows: Sequence[Encoded], times: float = 1.0) -> Work:
        """Answers of the policy's own that the selecting reward model reads."""
        if self.config.reward.model == "implicit":
            return Work("forward", self._batches(rows), 2.0 * times)  # theta and theta_0
        return Work("reward model", (), times * len(rows))

    @property
    def _tokenwise(self) -> bool:
        """Whether the selecting reward model gives rewards of tokens, for which it reads an answer once more."""
        section = self.config.reward
        return section.model != "sequence_classification" and not embeds_texts(section.model, section.name_or_path)

    def _measure(self) -> None:
        """What is measured after every inner run: J on all PA pairs, and answers to a few of their prompts."""
        pairs = self.partition.preference
        self._value_of_j("measure round", pairs)
        if self.config.reward.model != "none":
            probed = sorted(pairs, key=lambda pair: pair.id)[:PROBE_PROMPTS]
            new = self.config.solve.reward_max_new_tokens
            self._generate("measure round", [pair.prompt for pair in probed], new)
            self._add("measure round", self._scored([self._longest(pair, new) for pair in probed]))

    def _value_of_j(self, name: str, pairs: Sequence[Pair]) -> None:
        self._add(name, Work("forward", self._item_batches(self._items(name, pairs))))

    def _arms(self) -> None:
        inner, section, most = self.inner, self.config.solve, n_to_select(self.inner, self.outer)
        for arm in arms_of(self.config):
            name = f"unlearn {arm}"
            # One inner run, and no other after it: of several the best may not be the last one.
            once = section.rounds == 1 and not section.final_refine and self.judged
            if arm == SOLUTION_ARM and once and section.inner_steps in (None, inner.section.max_steps):
                self._add(name)  # the last inner run of the selection is restored
            else:
                self._inner_run(name, inner, inner.uniform() if arm == "full" else self._drawn(most))

    def _evaluation(self) -> None:
        section, sets, rewards = self.config.evaluation, self.partition, self.config.reward
        pairs = split_reward_pairs(sets.reward)[1]
        roles = {
            "eval reward model": (rewards.eval_model, rewards.eval_name_or_path),
            "second reward model": (rewards.second_model, rewards.second_name_or_path),
        }
        used = {
            role: rewards.model_copy(update={"model": model, "name_or_path": path})
            for role, (model, path) in roles.items()
            if model != "none"
        }
        for role, each in used.items():
            self._add("reward model", *self._texts(role, each, _chosen(pairs), _rejected(pairs), trains=True))
            card = self._texts(role, each, _chosen(sets.evaluation), _rejected(sets.evaluation))
            self._add("reward card", *card)
        names = ["before", "after", *section.controls]
        if section.equal_ppl_frac is not None:
            names += [f"{name}{EQUAL_PPL}" for name in ("after", "random_k") if name == "after" or name in names]
        asked = prompts_answered(sets.evaluation, section.generate_prompts)
        for name in names:
            if name in NOT_UNLEARNED:
                self._add("load model")
            if name == "retrain":
                self._finetune("retrain", leave_out_forget=True)
            if name.endswith(EQUAL_PPL):
                parts = sets.retain_parts()
                rows = self._rows(parts.guard or parts.evaluation)
                self._add(f"scale of {name}", Work("forward", self._batches(rows), SCALE_SEARCH))
            self._arm(f"evaluate {name}", asked, list(used))

    def _arm(self, name: str, asked: Sequence[Pair], roles: Sequence[str]) -> None:
        section, sets = self.config.evaluation, self.partition
        answers = {row.key: row for pair in sets.evaluation for row in self._both(pair)}
        self._add(name, Work("forward", self._batches(list(answers.values()))))
        self._add(name, Work("forward", self._batches(self._rows(sets.retain_parts().evaluation))))
        self._generate(name, [pair.prompt for pair in asked], section.max_new_tokens)
        self._add(name, *(Work(role, (), len(asked)) for role in roles))
        for prompts in self.prompt_sets:
            self._generate(name, list(prompts.prompts.values()), section.max_new_tokens)
        if section.forget_rows:
            sides = (
                sorted(rows, key=lambda row: row.id)[: section.forget_rows] for rows in (sets.forget, self.holdout)
            )
            rows = self._rows([row for side in sides for row in side])
            passes = 1.0 if name == "evaluate before" or not self.holdout else 2.0
            self._add(name, Work("forward", self._batches(rows), passes))

    # --- parts -----------------------------------------------------------------------------------

    def _inner_run(self, name: str, inner: InnerProblem, weights: dict[str, float]) -> None:
        """One run of the trainer under the guard."""
        rows = weighted_rows(inner.forget, weights)
        self._add(name, Work("step", self._steps(inner, rows), graph=_in_one_graph(inner)))
        if inner.section.retain_term == "kl":
            self._add(name, Work("forward", self._steps(inner, rows)[1::2]))
        guard = inner.guard
        watched = self._rows(inner.guard_rows)[: guard.max_rows]
        if watched:
            self._reference(name, watched)
            steps, every = inner.section.max_steps, guard.every_steps
            measured = len({*range(every, steps + 1, every), steps}) if every else 1
            self._add(name, Work("forward", self._batches(watched), measured))

    def _steps(self, inner: InnerProblem, rows: Sequence[Example]) -> tuple[Rows, ...]:
        """Batches of all micro-steps, those of the candidates and of the retain rows."""
        section = inner.section
        retain = self._rows(inner.retain) if section.retain_term in ("nll", "kl") else []
        steps = section.max_steps * section.gradient_accumulation_steps
        size = min(section.batch_size, len(rows))
        return step_batches(self._rows(rows), size, steps, inner.seed, retain, section.retain_batch_size)

    def _drawn(self, k: int) -> dict[str, float]:
        """The draw of the random control: it stands for any selection of as many."""
        as_many = dict.fromkeys(map(str, range(k)), 1.0 / k)
        return control_weights("random_k", as_many, self.inner, None, self.config.seed)

    def _reference(self, name: str, rows: Sequence[Encoded]) -> None:
        """Log-probabilities at theta_0, which are computed once per content."""
        new = {row.key: row for row in rows if row.key not in self._referenced}
        self._referenced |= set(new)
        if new:
            self._add(name, Work("forward", self._batches(list(new.values()))))

    def _generate(self, name: str, prompts: Sequence[Turns], new: int, samples: int = 1) -> None:
        encoded = {self.encoder.encode_prompt(prompt): prompt for prompt in prompts}
        self.asked |= encoded
        rest = [Encoded(ids, new) for ids in sorted(encoded, key=lambda ids: (-len(ids), ids))]
        batches = []
        while rest:
            size = max(1, self.config.token_budget // (len(rest[0].input_ids) + new))
            batches.append(tuple(rest[:size]))
            rest = rest[size:]
        if batches:
            self._add(name, Work("generate", tuple(batches), samples))

    def _texts(self, role: str, section: RewardSection, *sides: Iterable[Example], trains: bool = False) -> list[Work]:
        """Texts that a reward model reads: for sentence embeddings each prompt and answer once."""
        rows = [row for side in sides for row in side]
        if embeds_texts(section.model, section.name_or_path):
            texts = {prompt_text(row.prompt) for row in rows} | {row.completion for row in rows}
            count = len(texts)
        else:
            count = len(rows)
        fitted = section.model in ("embedding", "language_model")
        return [Work(role, (), count if fitted or not trains else 0)]

    def _both(self, pair: Pair) -> tuple[Encoded, Encoded]:
        encode = self.encoder.encode
        return encode(pair.prompt, pair.chosen, pair.source), encode(pair.prompt, pair.rejected, pair.source)

    def _rows(self, rows: Sequence[Example]) -> list[Encoded]:
        return [self.encoder.encode(row.prompt, row.completion, row.source) for row in rows]

    def _batches(self, rows: Sequence[Encoded]) -> tuple[Rows, ...]:
        return tuple(tuple(rows[k] for k in batch) for batch in token_batches(rows, self.config.token_budget))

    def _add(self, name: str, *works: Work) -> None:
        self.phases.setdefault(name, []).extend(work for work in works if work.times)


def _in_one_graph(inner: InnerProblem) -> int:
    """Batches of one micro-step: of the candidates, and of the retain rows where there are any."""
    section = inner.section
    return 2 if section.retain_term in ("nll", "kl") and inner.retain and section.retain_batch_size else 1


def _with_steps(inner: InnerProblem, steps: int) -> InnerProblem:
    section = inner.section.model_copy(update={"max_steps": steps})
    return InnerProblem(inner.forget, inner.retain, inner.guard_rows, section, inner.guard, inner.seed)


def _chosen(pairs: Sequence[Pair]) -> list[Example]:
    return [Example(id=pair.id, prompt=pair.prompt, completion=pair.chosen) for pair in pairs]


def _rejected(pairs: Sequence[Pair]) -> list[Example]:
    return [Example(id=pair.id, prompt=pair.prompt, completion=pair.rejected) for pair in pairs]

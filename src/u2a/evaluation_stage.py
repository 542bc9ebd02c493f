"""Stages 5 and 6 of a run: every arm measured in the same way and compared, and the result attacked.

The instruments (prompt sets, judge, reward models, embedder, holdout) are made here from the options, once, and handed
to every arm. Files are read and checked before any model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from u2a.config_evaluation import JudgeSection, RobustnessSection
from u2a.config_reward import RewardSection
from u2a.data import prompt_key, read_examples
from u2a.early_checks import VERDICTS, check_early
from u2a.errors import ConfigError
from u2a.evaluation.answer_cache import AnswerCache
from u2a.evaluation.arm import ArmResult, Instruments, evaluate_arm, item_groups, prompts_answered
from u2a.evaluation.chat_endpoint import HttpEndpoint
from u2a.evaluation.coherence import LongTextEncoder
from u2a.evaluation.decoding import Decoding
from u2a.evaluation.equal_utility import at_equal_utility, largest_scale
from u2a.evaluation.evaluate import EQUAL_PPL, build_table
from u2a.evaluation.generation import generate
from u2a.evaluation.judge import Judge, PairJudge
from u2a.evaluation.membership import check_holdout
from u2a.evaluation.pairwise import (
    clear_alpaca_eval,
    export_alpaca_eval,
    preferences_over,
    rewards_over,
    win_rate_metrics,
    with_privleak,
)
from u2a.evaluation.prompt_sets import PromptSet, read_prompt_sets, trained_prompts
from u2a.evaluation.refusal_judge import RefusalJudge, refusal_error
from u2a.evaluation.reward_value import answer_rewards
from u2a.evaluation.rubric_judge import Asker, RubricJudge, RubricPairJudge
from u2a.evaluation.rubrics import RUBRICS
from u2a.jsonl_cache import JsonlCache
from u2a.model_loading import load_model
from u2a.modeling import Params, Policy
from u2a.named_content import judging_content, named_content
from u2a.partition import candidate
from u2a.pipeline import NOT_UNLEARNED, SOLUTION_ARM, Pipeline
from u2a.record import content_id, derive_seed
from u2a.reward.analysis import TRAINED_HERE, build_reward_model, split_reward_pairs
from u2a.reward.base import RewardModel, prompt_text
from u2a.reward.card import reward_card
from u2a.robustness.attacks import PROMPT_ATTACKS, PromptAttack, Turns, load_paraphrases
from u2a.robustness.pack import (
    AnswerMeasure,
    Found,
    Measures,
    RobustnessData,
    RobustnessOptions,
    Values,
    mean_log_probs,
    robustness,
)
from u2a.robustness.records import RobustnessTable
from u2a.robustness.relearn import Relearning
from u2a.types import EvalTable, Example, Metric, RewardCard


class EvaluationStage:
    """Evaluation of one run.

    Args:
        pipeline: the run.

    Raises:
        DataError: a prompt set or the holdout cannot be used.
        ConfigError: options of the prompt sets in conflict.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._config = pipeline, pipeline.config
        check_early(pipeline.config, pipeline.partition)
        self.prompt_sets = self._read_prompt_sets()
        self.holdout = self._read_holdout()
        self._judge = make_judge(self._config.evaluation.judge, pipeline.dir / "cache")
        if self._config.evaluation.equal_ppl_frac is not None and not pipeline.partition.retain:
            raise ConfigError("evaluation.equal_ppl_frac: needs retain rows (set data.retain)")

    def _read_prompt_sets(self) -> tuple[PromptSet, ...]:
        config, console = self._config, self._pipeline.console
        sets = read_prompt_sets(config.evaluation.prompt_sets, config.data, trained_prompts(self._pipeline.partition))
        for item in sets:
            left_out = f", {item.n_left_out} left out that the run trains on" if item.n_left_out else ""
            console.say(f"  {item.name:<10} {len(item.prompts):>7} prompts, wanted: {item.wanted}{left_out}")
        return tuple(sets)

    def _read_holdout(self) -> tuple[Example, ...]:
        """Texts never trained on: the user's, or the held-out rejected answers where the candidates come from pairs."""
        data, partition, given = self._config.data, self._pipeline.partition, self._pipeline.sources
        from_pairs = not {"forget", "evaluation"} & set(given) and data.forget is None and data.evaluation is None
        if data.holdout is not None:
            rows = read_examples(data.holdout, data, good=False, name="holdout")
        elif from_pairs:
            rows = [candidate(pair, self._config.partition.mislabelled_frac) for pair in partition.evaluation]
        else:
            return ()
        if self._config.evaluation.forget_rows == 0 or not rows:
            return ()
        check_holdout(partition.forget, rows, (*partition.preference, *partition.retain, *partition.finetune))
        return tuple({row.id: row for row in rows}.values())

    # --- instruments -----------------------------------------------------------------------------

    @cached_property
    def _rewards(self) -> list[tuple[RewardModel, RewardCard]]:
        """The evaluation's reward models with their cards: none, one, or a second one beside it."""
        config, partition, console = self._config, self._pipeline.partition, self._pipeline.console
        pairs = split_reward_pairs(partition.reward)[1]
        found: list[tuple[RewardModel, RewardCard]] = []
        for section in _reward_sections(config.reward):
            seed = derive_seed(config.seed, "eval reward")
            model = build_reward_model(section, pairs, None, seed, console, config.model.device, config.data.max_length)
            if model is not None:
                trained = len(pairs) if section.model in TRAINED_HERE else 0
                with console.phase("reward card"):
                    found.append((model, reward_card(model, partition.evaluation, trained, seed=seed)))
        if len({model.name for model, _ in found}) < len(found):
            raise ConfigError("reward.second_model: the same model as reward.eval_model (it would agree with itself)")
        return found

    @cached_property
    def _cache(self) -> AnswerCache:
        return AnswerCache(self._pipeline.dir / "cache")

    @cached_property
    def _instruments(self) -> Instruments:
        models = [model for model, _ in self._rewards]
        section = self._config.evaluation
        return Instruments(
            reward_model=models[0] if models else None,
            second_model=models[1] if len(models) > 1 else None,
            judge=self._judge,
            harmless_judge=self._judge if section.judge.rubric == "answered" else RefusalJudge(),
            prompt_sets=self.prompt_sets,
            encoder=None if section.embedder is None else LongTextEncoder(section.embedder),
            holdout=self.holdout,
            cache=self._cache,
        )

    # --- stage 5 ---------------------------------------------------------------------------------

    def table(self) -> EvalTable:
        """Measure every arm on held-out data and compare; the policy is left at the solution.

        Returns:
            The table; also ``evaluation.json``, and one record per arm under ``arms/``.
        """
        pipeline, section = self._pipeline, self._config.evaluation
        solution = pipeline.solution()  # an outdated one is refused before anything is measured
        arms = {"before": self._arm("before")}
        for arm in (SOLUTION_ARM, *section.controls):
            arms["after" if arm == SOLUTION_ARM else arm] = self._arm(arm)
        if section.equal_ppl_frac is not None:
            for arm in (SOLUTION_ARM, *(name for name in section.controls if name == "random_k")):
                result = self._arm(arm, section.equal_ppl_frac)
                arms[result.name] = result
        arms = with_privleak(arms)
        clear_alpaca_eval(pipeline.dir / "alpaca_eval")
        arms = {name: self._with_win_rates(arm, arms["before"]) for name, arm in arms.items()}
        cards = tuple(card for _, card in self._rewards)
        table = build_table(arms, pipeline.partition, section, self._config.seed, cards, solution)
        table = table.model_copy(update={"judge": self._judges()})
        table.save(pipeline.dir / "evaluation.json")
        pipeline.unlearn_arm(SOLUTION_ARM)
        return table

    def _arm(self, arm: str, equal_ppl_frac: float | None = None) -> ArmResult:
        """Measure one arm, as it is or at equal utility, or read its measurement back."""
        pipeline, config = self._pipeline, self._config
        name = ("after" if arm == SOLUTION_ARM else arm) + ("" if equal_ppl_frac is None else EQUAL_PPL)
        weights = {} if arm == "before" else pipeline.arm_weights(arm)
        source = pipeline.arm_key(arm, weights) if weights else arm if arm in NOT_UNLEARNED else "before"
        left_out = {"controls", "samples_shown", "equal_ppl_frac"}
        options = config.evaluation.model_dump(mode="json", exclude=left_out)
        names = ("eval_model", "eval_name_or_path", "second_model", "second_name_or_path")
        reward_options = config.reward.model_dump(include=set(names))
        texts = {item.name: [prompt_text(turns) for turns in item.prompts.values()] for item in self.prompt_sets}
        files = texts, [row.id for row in self.holdout], judging_content(config)
        key = pipeline.key("evaluate", source, options, reward_options, equal_ppl_frac, *files)

        def measure(policy: Policy) -> ArmResult:
            return evaluate_arm(
                policy, pipeline.partition, self._instruments, config.evaluation, config.seed, pipeline.console, name
            )

        def compute() -> ArmResult:
            policy = self._policy_of(arm)
            return measure(policy) if equal_ppl_frac is None else self._scaled(policy, measure, equal_ppl_frac, name)

        record, path = f"arms/{name}", pipeline.dir / "arms" / f"{name}.json"
        if pipeline.store.is_done(record, key) and path.exists() and _has_unscored(ArmResult.load(path)):
            pipeline.store.drop(record)  # answers and paid verdicts are cached: only what failed is asked again
        return pipeline.store.saved(record, ArmResult, key, compute)

    def _judges(self) -> str:
        """Who judged the prompt sets, and the offline judge's own error."""
        if not self.prompt_sets:
            return ""
        error = f"{RefusalJudge().name}, on invented answers: {refusal_error()}"
        harmless = self._instruments.harmless_judge
        names = dict.fromkeys(judge.name for judge in (self._judge, harmless) if judge is not None)
        return f"Judges: {', '.join(names)}. Error of {error}."

    def _scaled(
        self, policy: Policy, measure: Callable[[Policy], ArmResult], budget_frac: float, name: str
    ) -> ArmResult:
        """Measure a policy at the largest scale of its change that the utility budget allows."""
        parts = self._pipeline.partition.retain_parts()
        rows = parts.guard or parts.evaluation  # not the rows on which the result is reported, where there are others
        encoded = [policy.encoder.encode(row.prompt, row.completion, row.source) for row in rows]
        with self._pipeline.console.phase(f"scale of {name}"):
            search = largest_scale(policy, lambda now: now.perplexity(encoded), budget_frac)
        result = at_equal_utility(policy, search, measure).value
        note = "" if search.monotone else "perplexity did not rise evenly with the scale"
        scale = Metric(value=search.scale, n=len(rows), note=note)
        return result.model_copy(update={"metrics": result.metrics | {"adapter_scale": scale}})

    def _with_win_rates(self, arm: ArmResult, baseline: ArmResult) -> ArmResult:
        """Add the win rate over the start, and write the answers in AlpacaEval's format."""
        judge = self._pair_judge
        if arm.name == baseline.name or not arm.answers or (judge is None and not arm.rewards):
            return arm
        partition, resampling = self._pipeline.partition, self._config.evaluation.bootstrap
        prompts = {pair.id: prompt_text(pair.prompt) for pair in partition.evaluation}
        if judge is None:
            compared = rewards_over(arm, baseline, prompts, f"reward of {self._rewards[0][0].name}")
        else:
            compared = preferences_over(arm, baseline, prompts, judge)
        seed = derive_seed(self._config.seed, "bootstrap")
        found = win_rate_metrics(compared, arm, baseline, item_groups(partition), (resampling, seed))
        export_alpaca_eval(self._pipeline.dir / "alpaca_eval", compared, arm, baseline)
        return arm.model_copy(update={"metrics": arm.metrics | found})

    @cached_property
    def _pair_judge(self) -> PairJudge | None:
        """The chat model of the options as judge of win rates, or None: then the rewards decide."""
        section = self._config.evaluation.judge
        if section.rubric == "refusal":
            return None
        return RubricPairJudge(_asker(section, self._pipeline.dir / "cache"))

    def _policy_of(self, arm: str) -> Policy:
        pipeline = self._pipeline
        if arm == "base":
            return pipeline.policy_around(pipeline.base_model())
        if arm == "retrain":
            return self._retrained()
        if arm == "before":
            pipeline.policy.reset()
        else:
            pipeline.unlearn_arm(arm)
        return pipeline.policy

    def _retrained(self) -> Policy:
        """The baseline Retrain: the base model, fine-tuned on the mixture without the forget set."""
        pipeline = self._pipeline
        with pipeline.console.phase("load model"):
            base = load_model(self._config.model)
        return pipeline.policy_around(pipeline.finetuned(pipeline.policy_around(base), leave_out_forget=True))

    # --- robustness ------------------------------------------------------------------------------

    def robustness(self) -> RobustnessTable:
        """Attack the start and the solution in the same way, and measure again.

        Returns:
            The table; also ``robustness.json``.
        """
        pipeline, config = self._pipeline, self._config
        source = pipeline.arm_key(SOLUTION_ARM, pipeline.arm_weights(SOLUTION_ARM) or {})
        options = [config.robustness.model_dump(mode="json")]
        options.append(config.evaluation.model_dump(include={"max_new_tokens", "bootstrap"}))
        options.append(config.reward.model_dump(include={"eval_model", "eval_name_or_path"}))
        files = judging_content(config), named_content(config.robustness.paraphrases)
        key = pipeline.key("robustness", source, *options, *files)
        return pipeline.store.saved("robustness", RobustnessTable, key, lambda: self._attacked(key))

    def _attacked(self, key: str) -> RobustnessTable:
        pipeline, config, section = self._pipeline, self._config, self._config.robustness
        partition = pipeline.partition
        arms: dict[str, Params] = {"before": pipeline.policy.theta0}
        pipeline.unlearn_arm(SOLUTION_ARM)
        arms["after"] = pipeline.policy.snapshot()
        pairs = prompts_answered(partition.evaluation, section.prompts)
        prompts = {pair.id: pair.prompt for pair in pairs}
        retain = partition.retain_parts()
        data = RobustnessData(
            arms=arms,
            forget=partition.forget,
            retain=retain.evaluation,
            unrelated=_without_prompts(retain.train, retain.evaluation),
            prompts=prompts,
        )
        seed = derive_seed(config.seed, "robustness")
        options = RobustnessOptions(
            schemes=tuple(section.schemes),
            attacks=_prompt_attacks(section),
            relearning=_relearning(section, seed),
            attack_rows=max(1, section.relearn_rows),
            measured_rows=section.measured_rows,
            bootstrap=config.evaluation.bootstrap,
            seed=seed,
        )
        measures = Measures(rows=mean_log_probs, answers=self._answer_measure(prompts) if prompts else None)
        cache = JsonlCache(pipeline.dir / "cache" / "robustness.jsonl")
        return robustness(pipeline.policy, data, measures, options, pipeline.console, partial(_kept, cache, key))

    def _answer_measure(self, prompts: Mapping[str, Turns]) -> AnswerMeasure:
        """Answers under changed prompts, scored against the prompts as they were asked."""
        section, instruments = self._config.evaluation, self._instruments
        decoding = Decoding(section.max_new_tokens)

        def measure(policy: Policy, turns: Mapping[str, Turns]) -> Values:
            texts = dict(zip(turns, generate(policy, list(turns.values()), decoding), strict=True))
            verdicts = RefusalJudge().verdicts([prompt_text(prompts[key]) for key in texts], list(texts.values()))
            states = {key: verdict.state for key, verdict in zip(texts, verdicts, strict=True)}
            values = {"incoherent": {key: float(state == "incoherent") for key, state in states.items()}}
            if 2 * sum(values["incoherent"].values()) < len(states):  # of a broken model neither share means anything
                for kind in ("complied", "refused"):  # shares of all answers, so that conditions can be compared
                    values[kind] = {key: float(state == kind) for key, state in states.items()}
            if instruments.reward_model is not None:
                values["reward"] = answer_rewards(instruments.reward_model, {key: prompts[key] for key in texts}, texts)
            return values

        return measure


def make_judge(section: JudgeSection, cache: Path) -> Judge:
    """Make the judge of the options.

    Args:
        section: rubric and endpoint.
        cache: folder where verdicts that were paid for are kept.

    Returns:
        The judge.
    """
    if section.rubric == "refusal":
        return RefusalJudge()
    return RubricJudge(_asker(section, cache), RUBRICS[section.rubric])


def _asker(section: JudgeSection, cache: Path) -> Asker:
    endpoint = HttpEndpoint(url=str(section.url), model=section.model, key_env=section.key_variable)
    return Asker(endpoint, JsonlCache(cache / VERDICTS))


def _kept(cache: JsonlCache, key: str, name: str, measure: Callable[[], Found]) -> Found:
    """Read the values of a condition back, or measure and keep them; what is not a number is kept as its name."""
    place = content_id(key, name)
    if cache.get(place) is None:
        found = measure()
        cache.put_many({place: _each(found, lambda value: value if math.isfinite(value) else str(value))})
        return found
    return _each(cache.get(place), float)


def _each(found: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested dictionaries with changed values."""
    return {key: _each(item, change) for key, item in found.items()} if isinstance(found, dict) else change(found)


def _has_unscored(result: ArmResult) -> bool:
    return any(verdict.state == "unscored" for each in result.sets.values() for verdict in each.verdicts.values())


def _reward_sections(section: RewardSection) -> list[RewardSection]:
    """The options of the evaluation's reward models, each in the place of the analysis' ones."""
    pairs = (
        (section.eval_model, section.eval_name_or_path),
        (section.second_model, section.second_name_or_path),
    )
    return [section.model_copy(update={"model": model, "name_or_path": path}) for model, path in pairs]


def _prompt_attacks(section: RobustnessSection) -> tuple[PromptAttack, ...]:
    attacks: tuple[PromptAttack, ...] = PROMPT_ATTACKS if section.prompt_attacks else ()
    return attacks if section.paraphrases is None else (*attacks, load_paraphrases(section.paraphrases))


def _relearning(section: RobustnessSection, seed: int) -> Relearning | None:
    if section.relearn_rows == 0:
        return None
    return Relearning(tuple(section.relearn_steps), section.relearn_learning_rate, seed=seed)


def _without_prompts(rows: Sequence[Example], others: Sequence[Example]) -> tuple[Example, ...]:
    """Rows that share no prompt with other rows."""
    taken = {prompt_key(row.prompt) for row in others}
    return tuple(row for row in rows if prompt_key(row.prompt) not in taken)

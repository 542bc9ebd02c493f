"""Stage 2: reward models behind one interface, and the reward analysis of the negatives."""

from u2a.reward.analysis import analyse, build_reward_model, evaluation_section, reward_card
from u2a.reward.base import CallableReward, RewardModel
from u2a.reward.embedding import Embedder, EmbeddingReward, load_embedding_reward, train_embedding_reward
from u2a.reward.implicit import DpoSettings, train_implicit_reward
from u2a.reward.models import ImplicitReward, SequenceClassifierReward, TokenValueHead

__all__ = [
    "CallableReward",
    "DpoSettings",
    "Embedder",
    "EmbeddingReward",
    "ImplicitReward",
    "RewardModel",
    "SequenceClassifierReward",
    "TokenValueHead",
    "analyse",
    "build_reward_model",
    "evaluation_section",
    "load_embedding_reward",
    "reward_card",
    "train_embedding_reward",
    "train_implicit_reward",
]

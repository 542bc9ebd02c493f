"""Stage 2: reward models behind one interface, their cards, and the reward analysis of the negatives."""

from u2a.reward.analysis import analyse, build_reward_model
from u2a.reward.base import CallableReward, RewardModel
from u2a.reward.card import card_lines, reward_card
from u2a.reward.embedding import Embedder, EmbeddingReward, load_embedding_reward, train_embedding_reward
from u2a.reward.implicit import DpoSettings, train_implicit_reward
from u2a.reward.lm_head import HiddenStates, LanguageModelReward, train_language_model_reward
from u2a.reward.loading import load_reward_model
from u2a.reward.models import ImplicitReward, SequenceClassifierReward, TokenValueHead
from u2a.reward.train import HeadTraining, TrainedHead, train_reward_head

__all__ = [
    "CallableReward",
    "DpoSettings",
    "Embedder",
    "EmbeddingReward",
    "HeadTraining",
    "HiddenStates",
    "ImplicitReward",
    "LanguageModelReward",
    "RewardModel",
    "SequenceClassifierReward",
    "TokenValueHead",
    "TrainedHead",
    "analyse",
    "build_reward_model",
    "card_lines",
    "load_embedding_reward",
    "load_reward_model",
    "reward_card",
    "train_embedding_reward",
    "train_implicit_reward",
    "train_language_model_reward",
    "train_reward_head",
]

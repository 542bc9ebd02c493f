"""What the numbers of a reward model's card amount to, in words."""

from __future__ import annotations

import math

from u2a.types import RewardCard

COIN_LOG_LOSS = math.log(2.0)  # of a model that says one half of every pair


def in_words(card: RewardCard) -> str:
    """Say what the numbers of a card amount to.

    Args:
        card: the card.

    Returns:
        One or more short clauses, for example ``barely better than a coin``.
    """
    value, low, high = card.pair_accuracy, card.pair_accuracy_low, card.pair_accuracy_high
    known = f"it was trained on the prompts of {card.n_trained_on} further pairs, which are left out"
    if value is None or low is None or high is None:
        return f"not measured ({card.n_pairs} held-out pairs{'; ' + known if card.n_trained_on else ''})"
    if high < 0.5:
        clauses = ["worse than a coin: it prefers the rejected answers"]
    elif low <= 0.5:
        clauses = ["not shown to be better than a coin"]
    elif value < 0.65:
        clauses = ["barely better than a coin"]
    else:
        clauses = ["better than a coin"] if value < 0.75 else ["clearly better than a coin"]
        if low < 0.6:
            clauses = ["better than a coin, perhaps barely (few held-out prompts)"]
    if card.log_loss is not None and card.log_loss >= COIN_LOG_LOSS and low > 0.5:
        clauses.append("its margins are no log odds (log loss no lower than a coin's)")
    ends = card.length_rank_correlation_low, card.length_rank_correlation_high
    rank = card.length_rank_correlation
    if rank is not None and ends[0] is not None and ends[1] is not None and ends[0] * ends[1] > 0 and abs(rank) >= 0.3:
        clauses.append(f"it favours {'long' if rank > 0 else 'short'} answers")
    if card.n_trained_on:
        clauses.append(known)
    return "; ".join(clauses)

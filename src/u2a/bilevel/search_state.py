"""Where the search for weights stands between two rounds, and how it is kept on the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from u2a.checkpoint import is_whole, save_folder
from u2a.modeling import Policy
from u2a.random_state import random_state, set_random_state
from u2a.solution import Round, ScoreTable
from u2a.tensor_tree import read_tree, write_tree
from u2a.types import UnlearnResult

_FOLDER, _FILE = "search", "search"


@dataclass
class SearchState:
    """What changes from round to round.

    Attributes:
        weights: (candidates,) float64 tried last; all 0 before the first block.
        best_weights: (candidates,) float64 of the best round so far.
        best_value: J of that round.
        stale: rounds since then.
        rounds: the rounds so far.
        scores: gains of the best round so far, by which its candidates were chosen; of the first one before that.
        result: what the last inner run did.
        stopped: why the search ended.
        searching: rounds are still to come.
        start_heldout: J on the held-out pairs at theta_0, or None where no round is judged by them.
    """

    weights: Tensor
    best_weights: Tensor
    best_value: float = -math.inf
    stale: int = 0
    rounds: list[Round] = field(default_factory=list)
    scores: ScoreTable | None = None
    result: UnlearnResult | None = None
    stopped: str = "rounds used up"
    searching: bool = True
    start_heldout: float | None = None

    def ended(self, why: str) -> None:
        """End the rounds.

        Args:
            why: for the record.
        """
        self.stopped, self.searching = why, False


def save_state(state: SearchState, policy: Policy, folder: Path | None, key: str) -> None:
    """Keep a state with the theta that the policy stands at.

    Args:
        state: the state.
        policy: the policy.
        folder: where checkpoints go, or None to keep nothing.
        key: hash of what the search depends on.
    """
    if folder is None:
        return
    tree = {
        "key": key,
        "weights": state.weights,
        "best_weights": state.best_weights,
        "best_value": state.best_value,
        "stale": state.stale,
        "rounds": [each.model_dump(mode="json") for each in state.rounds],
        "scores": None if state.scores is None else state.scores.model_dump(mode="json"),
        "result": None if state.result is None else state.result.model_dump(mode="json"),
        "stopped": state.stopped,
        "searching": state.searching,
        "start_heldout": state.start_heldout,
        "theta": policy.snapshot(),
        "random": random_state(),
    }
    save_folder(folder / _FOLDER, lambda part: write_tree(part, _FILE, tree))


def load_state(policy: Policy, folder: Path | None, key: str) -> SearchState | None:
    """Read a state back and put the policy where it stood.

    Args:
        policy: the policy.
        folder: where checkpoints go, or None.
        key: hash of what the search depends on.

    Returns:
        The state, or None where there is none of this search.
    """
    if folder is None or not is_whole(folder / _FOLDER):
        return None
    tree = read_tree(folder / _FOLDER, _FILE)
    if tree["key"] != key or "scores" not in tree:  # of another search, or written by an earlier version
        return None
    policy.restore(tree["theta"])
    set_random_state(tree["random"])
    return SearchState(
        weights=tree["weights"],
        best_weights=tree["best_weights"],
        best_value=tree["best_value"],
        stale=tree["stale"],
        rounds=[Round.model_validate(each) for each in tree["rounds"]],
        scores=None if tree["scores"] is None else ScoreTable.model_validate(tree["scores"]),
        result=None if tree["result"] is None else UnlearnResult.model_validate(tree["result"]),
        stopped=tree["stopped"],
        searching=tree["searching"],
        start_heldout=tree["start_heldout"],
    )

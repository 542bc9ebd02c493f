"""Overlaps of four kinds between four pairs of sets, for the tests that must find them."""

from __future__ import annotations

KINDS = {"exact": 5, "folded": 4, "near": 3, "prompt": 2}
ENDS = [("preference", "evaluation"), ("forget", "evaluation"), ("forget", "preference"), ("retain", "holdout")]


def planted(kind: str, k: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """A prompt and answer, and its counterpart in the other set."""
    topic = " ".join(f"{kind}{k}t{i}" for i in range(30))
    prompt, answer = f"What of {topic} now", f"It is {topic} for sure"
    copies = {
        "exact": (prompt, answer),
        "folded": (prompt.upper(), f" {answer}  "),
        "near": (f"{prompt}, then", answer),
        "prompt": (prompt, f"Something else about {kind} number {k} entirely"),
    }
    return (prompt, answer), copies[kind]

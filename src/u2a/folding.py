"""When two texts are the same to a reader."""

from __future__ import annotations

import unicodedata


def fold(text: str) -> str:
    """Return a text without differences of case, spacing and Unicode presentation.

    Args:
        text: any text.

    Returns:
        NFKC, case-folded, with runs of white space replaced by one space.

    >>> fold("  Ｈow   ARE you? ")
    'how are you?'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())

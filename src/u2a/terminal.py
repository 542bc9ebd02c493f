"""The terminal: texts made safe to print (nothing in them moves the cursor or hides), and libraries kept quiet."""

from __future__ import annotations

import codecs
import io
import os
import sys
import warnings
from typing import TextIO


def escaped(text: str, keep: str = "") -> str:
    r"""Return a text in which every character that prints nothing visible is written as a backslash escape.

    These are control and format characters (escape sequences, text direction marks, zero-width joiners), odd
    spaces, line separators, lone surrogates and unassigned code points.

    Args:
        text: any text.
        keep: characters left as they are, for example ``"\n"``.

    Returns:
        The text; characters of any script stay readable.

    >>> escaped("red: \x1b[31m, tab:\t, é")
    'red: \\x1b[31m, tab:\\t, é'
    """
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def encodable(text: str, stream: TextIO) -> str:
    """Return a text with what a stream cannot encode written as backslash escapes.

    Args:
        text: any text.
        stream: where it will be printed.

    Returns:
        A text that ``stream`` takes without an error.
    """
    encoding = stream.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def wants_colour(stream: TextIO) -> bool:
    """Tell whether a stream shows colours: a terminal that is not dumb, and ``NO_COLOR`` is not set.

    Args:
        stream: where will be printed.

    Returns:
        True for colours. Source: no-color.org (any value but the empty one turns colours off).
    """
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def use_utf8() -> None:
    """Make this process able to name every file and to print every text, before it does anything else.

    Where file names are ASCII (the C locale with ``PYTHONUTF8=0``), Python starts again in its UTF-8 mode: a
    configuration file could not name ``pröject/`` otherwise. A stream that cannot encode a character gets an escape.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii" and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Print what is still held back, so that a closed pipe is met here and not when Python ends."""
    if sys.stdout is not None:
        sys.stdout.flush()


def drop_output() -> None:
    """Let what is still to be printed go nowhere: what read it has gone, and Python would complain at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


def hush_libraries() -> None:
    """Keep the loading bars and internal deprecation notes of transformers off the user's terminal."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

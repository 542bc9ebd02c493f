"""Rows and chat template as the model will see them: lengths, cuts, special tokens in texts, the template's habits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from u2a.diagnosis import Severity, Unit
from u2a.errors import DataError
from u2a.types import Example, Message, Pair

if TYPE_CHECKING:
    from u2a.encoding import Encoder

Problem = tuple[Severity, str, str]  # severity, check, text

PROBE = (Message(role="user", content="PROMPT"),)
REPLY = Message(role="assistant", content="ANSWER")


@dataclass(frozen=True)
class Measured:
    """One answer of a row.

    Attributes:
        row: the row.
        length: tokens of the rendered prompt and answer before any cut (of the prompt alone where it leaves no room,
            None where it cannot be rendered), or words.
        unit: what ``length`` counts.
        n_cut: answer tokens beyond the maximum length.
        holds_special: the text contains a special token of the tokenizer, written out.
        state: ``no room`` where the prompt alone is too long, ``refused`` where the template cannot render it.
    """

    row: Example | Pair
    length: int | None
    unit: Unit
    n_cut: int = 0
    holds_special: bool = False
    state: Literal["fits", "no room", "refused"] = "fits"


def measure(rows: Sequence[Example | Pair], encoder: Encoder | None) -> list[Measured]:
    """Measure every answer of every row.

    Args:
        rows: pairs have two answers.
        encoder: tokenizes; None counts words.

    Returns:
        One entry per answer, in the order of the rows.
    """
    measured = []
    specials = () if encoder is None else tuple(token for token in encoder.tokenizer.all_special_tokens if token)
    for row in rows:
        for answer in (row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion,):
            texts = [*(turn.content for turn in row.prompt), answer]
            if encoder is None:
                measured.append(Measured(row, sum(len(text.split()) for text in texts), "words"))
                continue
            holds = any(token in text for text in texts for token in specials)
            try:
                encoded = encoder.encode(row.prompt, answer, row.source)
            except DataError:
                measured.append(Measured(row, len(encoder.encode_prompt(row.prompt)), "tokens", 0, holds, "no room"))
            except TemplateError:
                measured.append(Measured(row, None, "tokens", 0, holds, "refused"))
            else:
                length = len(encoded.input_ids) + encoded.n_cut
                measured.append(Measured(row, length, "tokens", encoded.n_cut, holds))
    return measured


def template_problems(encoder: Encoder) -> list[Problem]:
    """Look at the tokenizer and its chat template with one short conversation.

    Args:
        encoder: around the tokenizer.

    Returns:
        What is wrong or worth knowing.
    """
    tokenizer, problems = encoder.tokenizer, []
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        same = "no token of its own for padding" if tokenizer.pad_token_id is None else "pad and end token are the same"
        text = f"tokenizer: {same} (harmless here, masks go by position; trainers that mask it never learn to stop)"
        problems.append(("note", "pad token", text))
    try:
        start, bare, whole = (
            encoder.prompt_text(PROBE),
            render(encoder, PROBE, False),
            render(encoder, (*PROBE, REPLY), False),
        )
    except TemplateError as error:
        reason = " ".join(str(error).split())
        return [*problems, ("error", "template", f"chat template: cannot render a conversation: {reason} (repair it)")]
    for text, what in ((start, PROBE[0].content), (whole, REPLY.content)):
        if what not in text:
            problems.append(("error", "template", f"chat template: leaves the {what.lower()} out (repair it)"))
    if problems and problems[-1][0] == "error":
        return problems
    if start == bare:
        text = (
            "chat template: has no generation prompt, so nothing marks where the answer begins (add one, unless the "
            "user's turn ends in a mark of its own, such as [/INST])"
        )
        problems.append(("warning", "template", text))
    problems += [("warning", "template", f"chat template: {text}") for text in _misplaced(start, whole)]
    if "strftime_now" in str(tokenizer.chat_template):
        text = (
            "chat template: prints today's date, so results change from day to day (model.template_options may fix it)"
        )
        problems.append(("warning", "template", text))
    tail = whole[len(start) :] if whole.startswith(start) else whole
    if encoder.end_ids.isdisjoint(tokenizer(tail, add_special_tokens=False)["input_ids"]):
        problems.append(("note", "template", "chat template: writes no end token after an answer (it is added here)"))
    return problems


def _misplaced(start: str, whole: str) -> list[str]:
    """What stands between prompt and answer, and makes the trained answer another one than the generated one."""
    if not whole.startswith(start):
        return [
            "a conversation with an answer does not begin as its prompt does: answers are put behind it as they are"
        ]
    before = whole[len(start) :].partition(REPLY.content)[0].strip()
    found = []
    if before:
        found.append(
            f"writes {before!r} before an answer, which counts as a part of it (of a thinking model: "
            "model.template_options={enable_thinking: false})"
        )
    if start.rstrip().endswith("<think>"):
        found.append(
            "its prompt ends within a thought, so that answers are trained as thoughts (end it in the template)"
        )
    return found


def render(encoder: Encoder, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Render turns with the tokenizer's chat template.

    Args:
        encoder: around the tokenizer.
        messages: turns.
        add_generation_prompt: end with what comes before an answer.

    Returns:
        The text.
    """
    turns = [message.model_dump() for message in messages]
    return str(
        encoder.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    )

"""``u2a data show``: a data file as a model will see it - tokens, answer mask, template, lengths - and what ails it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from u2a.config import DataSection, ModelSection
from u2a.data import LABEL, MESSAGES, parse_examples, parse_pairs, parse_prompts
from u2a.diagnosis import SetHealth
from u2a.doctor import DataRow, examine_sets
from u2a.errors import ConfigError, DataError, ModelError
from u2a.record import content_id
from u2a.rows import RawRow, Source, read_rows
from u2a.terminal import escaped
from u2a.token_checks import PROBE, REPLY, render
from u2a.types import Example, Message, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from u2a.encoding import Encoder

BAR = 40  # columns of the longest bar
MOST_CHARS = 2_000  # of a text that is shown without a tokenizer
PROMPT_COLOURS, ANSWER_COLOURS = ("\x1b[36m", "\x1b[34m"), ("\x1b[30;42m", "\x1b[30;102m")
RESET = "\x1b[0m"


@dataclass(frozen=True)
class Piece:
    """A few tokens that make readable text together (mostly one; a rare character may take several).

    Attributes:
        text: their text.
        is_answer: they carry the loss.
        n_tokens: how many they are.
    """

    text: str
    is_answer: bool
    n_tokens: int


def show(
    source: Source,
    section: DataSection,
    model: ModelSection | None = None,
    n_rows: int = 3,
    colour: bool = False,
) -> list[str]:
    """Describe a data file.

    Args:
        source: see :func:`u2a.rows.read_rows`.
        section: field map, system prompt and maximum length.
        model: whose tokenizer to use (no weights are read); None shows texts and counts words.
        n_rows: rows shown, >= 0; the first ones.
        colour: mark tokens by colours; else ``[[`` and ``]]`` enclose the answer and ``|`` divides tokens.

    Returns:
        Lines that are safe to print: control characters of the data are escaped.

    Raises:
        ConfigError: ``n_rows`` is negative.
        DataError: every problem of the source, one line each.
        ModelError: no tokenizer. One without a chat template is a finding, and words are counted.
    """
    if n_rows < 0:
        raise ConfigError(f"--rows: {n_rows}, expected 0 or more")
    sets = read_sets(read_rows(source), section)
    encoder, problem = (None, "") if model is None else _encoder(model, section.max_length)
    diagnosis = examine_sets(sets, encoder)
    lines = []
    for name, rows in sets.items():
        lines.append(f"{name}: {len(rows)} rows, showing {min(n_rows, len(rows))}")
        for number, row in enumerate(rows[:n_rows], 1):
            lines += ["", *_shown(row, number, encoder, colour)]
        lines.append("")
    if encoder is not None:
        lines += [*_template(encoder), ""]
    for health in diagnosis.sets:
        lines += [*_summary(health, section.max_length), ""]
    findings = [f"error: {escaped(problem)}"] if problem else []
    findings += diagnosis.lines() if diagnosis.findings or not problem else []
    return [*lines, "findings", *(f"  {line}" for line in findings)]


def read_sets(rows: Sequence[RawRow], section: DataSection) -> dict[str, tuple[DataRow, ...]]:
    """Read rows of whatever kind they are: pairs, answers with or without a label, or prompts alone.

    Args:
        rows: raw rows; their columns tell the kind.
        section: field map and system prompt.

    Returns:
        Rows by name: ``pairs``, ``rows``, ``good`` and ``bad`` (labelled), or ``prompts`` (with empty answers).

    Raises:
        DataError: every problem, one line each.
    """
    columns = {str(key) for row in rows for key in row.values}
    fields = section.fields
    if columns & {fields.chosen, fields.rejected}:
        return {"pairs": tuple(parse_pairs(rows, section))}
    if LABEL in columns and columns & {fields.completion, MESSAGES}:
        # Both sides of one file have the same columns, so the good ones are read by the same field map.
        same = section.model_copy(update={"retain_fields": fields})
        good, bad = parse_examples(rows, same, good=True), parse_examples(rows, section, good=False)
        unlabelled = {row.source for row in good} & {row.source for row in bad}
        kept = {
            "good": tuple(row for row in good if row.source not in unlabelled),
            "bad": tuple(row for row in bad if row.source not in unlabelled),
            "rows": tuple(row for row in bad if row.source in unlabelled),
        }
        return {name: some for name, some in kept.items() if some}
    if columns & {fields.completion, MESSAGES} or fields.prompt not in columns:
        return {"rows": tuple(parse_examples(rows, section, good=False))}
    prompts = zip(parse_prompts(rows, section), rows, strict=True)
    return {"prompts": tuple(_unanswered(prompt, row.where) for prompt, row in prompts)}


def _unanswered(prompt: tuple[Message, ...], where: str) -> Example:
    return Example(id=content_id(*(turn.content for turn in prompt)), prompt=prompt, completion="", source=where)


def _encoder(model: ModelSection, max_length: int) -> tuple[Encoder | None, str]:
    """Return the encoder, or None and what its tokenizer lacks."""
    from u2a.encoding import Encoder
    from u2a.model_loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    try:
        return Encoder(tokenizer, max_length), ""
    except ModelError as error:
        return None, str(error)


# --- rows ---------------------------------------------------------------------------------------


def _shown(row: DataRow, number: int, encoder: Encoder | None, colour: bool) -> list[str]:
    lines = [escaped(f"row {number}  {row.source}  id {row.id}" + (f"  kind {row.kind}" if row.kind else ""))]
    answers = {"chosen": row.chosen, "rejected": row.rejected} if isinstance(row, Pair) else {"answer": row.completion}
    if encoder is None:
        texts = [(turn.role, turn.content) for turn in row.prompt] + [item for item in answers.items() if item[1]]
        for name, text in texts:
            more = f" ... ({len(text) - MOST_CHARS} more characters)" if len(text) > MOST_CHARS else ""
            lines += [f"  {name}, {len(text.split())} words", *_indented(_visible(text[:MOST_CHARS]) + more)]
        return lines
    for name, answer in answers.items():
        try:
            lines += _tokens(row, name, answer, encoder, colour)
        except (DataError, TemplateError) as error:
            lines.append(f"  {name}: {escaped(' '.join(str(error).split()))}")
    return lines


def _tokens(row: DataRow, name: str, answer: str, encoder: Encoder, colour: bool) -> list[str]:
    """Return one conversation's tokens with the answer marked."""
    if not answer:
        ids, n_answer, n_cut = encoder.encode_prompt(row.prompt), 0, 0
    else:
        encoded = encoder.encode(row.prompt, answer, row.source)
        ids, n_answer, n_cut = encoded.input_ids, encoded.n_answer, encoded.n_cut
    cut = f", {n_cut} more cut off" if n_cut else ""
    head = f"  {name}: {len(ids)} tokens, {len(ids) - n_answer} of the prompt, {n_answer} of the answer{cut}"
    found = pieces(encoder.tokenizer, ids, n_answer)
    return [head, *_indented(_coloured(found) if colour else _plain(found))]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], n_answer: int) -> list[Piece]:
    """Cut a token sequence into readable pieces, none of which lies both in the prompt and in the answer.

    Args:
        tokenizer: decodes.
        ids: tokens.
        n_answer: the last so many are the answer.

    Returns:
        The pieces in order; their token counts sum to ``len(ids)``.
    """
    found, start, before = [], 0, 0
    first_answer = len(ids) - n_answer
    for end in range(1, len(ids) + 1):
        # Decoded behind the piece before it, because some tokenizers drop the space that begins a text.
        context, text = (_decoded(tokenizer, ids[before:stop]) for stop in (start, end))
        text = text.removeprefix(context) if text.startswith(context) else _decoded(tokenizer, ids[start:end])
        if "\ufffd" in text and end - start < 4 and end not in (first_answer, len(ids)):
            continue
        found.append(Piece(text, start >= first_answer, end - start))
        before, start = start, end
    return found


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _plain(found: Sequence[Piece]) -> str:
    prompt = "|".join(_visible(piece.text) for piece in found if not piece.is_answer)
    answer = "|".join(_visible(piece.text) for piece in found if piece.is_answer)
    return f"{prompt}[[{answer}]]" if any(piece.is_answer for piece in found) else prompt


def _coloured(found: Sequence[Piece]) -> str:
    parts = []
    for number, piece in enumerate(found):
        colour = (ANSWER_COLOURS if piece.is_answer else PROMPT_COLOURS)[number % 2]
        lines = _visible(piece.text).split("\n")
        parts.append("\n".join(f"{colour}{line}{RESET}" if line else "" for line in lines))
    return "".join(parts)


def _visible(text: str) -> str:
    r"""Escape a text; a line feed is written as ``\n`` and then begins a new line."""
    return escaped(text, keep="\n").replace("\n", "\\n\n")


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.removesuffix("\n").split("\n")]


# --- the whole file -----------------------------------------------------------------------------


def _template(encoder: Encoder) -> list[str]:
    try:
        text = render(encoder, (*PROBE, REPLY), False)
    except TemplateError as error:
        return [f"template: {escaped(' '.join(str(error).split()))}"]
    return ["template", *_indented(_visible(text))]


def _summary(health: SetHealth, max_length: int) -> list[str]:
    repeats = f"{health.repeated} repeated, {health.repeated_folded} more but for case and spacing"
    lines = [
        f"{health.name}: {health.rows} rows, {health.prompts} prompts",
        f"  duplicates       {repeats}",
        f"  near-duplicates  {health.near} rows",
    ]
    if health.cut is not None:
        lines.append(f"  cut off          {health.cut} of {len(health.lengths)} answers at {max_length} tokens")
    return [*lines, f"  length of prompt and answer, {health.unit}", *histogram(health.lengths)]


def histogram(lengths: Sequence[int]) -> list[str]:
    """Draw lengths in bins that double in width.

    Args:
        lengths: lengths >= 0.

    Returns:
        One line per bin from the shortest length to the longest: range, count, bar.

    >>> [line.rstrip("#") for line in histogram([1, 2, 3, 9])]
    ['         1         1 |', '       2-3         2 |', '       4-7         0 |', '      8-15         1 |']
    """
    counts: dict[int, int] = {}
    for length in lengths:
        counts[length.bit_length()] = counts.get(length.bit_length(), 0) + 1
    if not counts:
        return []
    lines = []
    for bits in range(min(counts), max(counts) + 1):
        low, high, count = (1 << bits) >> 1, (1 << bits) - 1, counts.get(bits, 0)
        label = f"{low}-{high}" if high > low else f"{high}"
        lines.append(f"{label:>10}{count:>10} |" + "#" * -(-count * BAR // max(counts.values())))
    return lines

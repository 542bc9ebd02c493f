"""Stage 1: from the user's sources to the disjoint sets of a run.

Pairs are cut by the hash of their prompt, so all rows of a prompt fall into one set, the order of rows does
not matter, and a prompt stays where it is when rows are added. Another share moves prompts between the sets; only
the evaluation set, which is cut first, keeps its prompts as long as its part of the sum of shares is the same. Every
row ends in exactly one set or is counted in ``Partition.dropped``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, combinations
from typing import Any, Literal

from u2a.config import DataSection, PartitionSection, RunConfig
from u2a.contradictions import answer_key
from u2a.data import Source, example_id, parse_examples, parse_pairs, prompt_key, read_rows
from u2a.errors import ConfigError, DataError
from u2a.folding import fold
from u2a.record import content_id
from u2a.shortages import count_prompts, shortages
from u2a.types import Example, Leak, Pair, Partition

Row = Pair | Example

SETS = ("finetune", "forget", "retain", "preference", "reward", "evaluation")
CUT = ("evaluation", "preference", "reward", "forget", "finetune")  # evaluation first: it moves with no other share
SOURCES = {"preferences": "preference"}  # options of `data` named otherwise than their set


@dataclass(frozen=True)
class Inputs:
    """The rows of every source, before any is moved or left out.

    Attributes:
        pairs: pairs from which sets are cut.
        forget: negatives, added to those cut from ``pairs``.
        retain: ordinary instructions.
        finetune, preference, reward, evaluation: pairs of a set with a source of its own; None where the set
            is cut from ``pairs``.
        dropped: rows that reading left out, by reason.
    """

    pairs: Sequence[Pair] = ()
    forget: Sequence[Example] = ()
    retain: Sequence[Example] = ()
    finetune: Sequence[Pair] | None = None
    preference: Sequence[Pair] | None = None
    reward: Sequence[Pair] | None = None
    evaluation: Sequence[Pair] | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)


def partition(config: RunConfig, sources: Mapping[str, Source] | None = None, stage: str | None = None) -> Partition:
    """Read all sources, build the sets and check that the run can use them.

    Args:
        config: options; ``data``, ``partition`` and ``seed`` make the sets, the others are checked against them.
        sources: sources in memory by the name of their option in ``data``; they win over the options.
        stage: the one stage that is run alone, which may need less than all of them (:func:`shortages`).

    Returns:
        The partition.

    Raises:
        DataError: unusable rows, or evaluation rows in another set (unless ``data.allow_leak``).
        ConfigError: a set is too small for what the options ask.
    """
    inputs = read_inputs(config.data, sources or {})
    result = build_partition(inputs, config.partition, config.seed, config.data.allow_leak)
    problems = shortages(result, config, stage)
    if problems:
        raise ConfigError([*problems, *left_out(result)])
    return result


def read_inputs(section: DataSection, sources: Mapping[str, Source]) -> Inputs:
    """Read every source that is given and report the problems of all of them at once.

    Args:
        section: paths, field maps and system prompt.
        sources: sources in memory by option name; they win over the section's paths.

    Returns:
        The rows.

    Raises:
        DataError: every problem in any source.
        ConfigError: a name in ``sources`` is no option.
    """
    names = ("pairs", "forget", "preferences", "retain", "evaluation", "reward", "finetune")
    unknown = sorted(set(sources) - set(names))
    if unknown:
        raise ConfigError([f"{name}: no such source (expected one of: {', '.join(names)})" for name in unknown])
    read: dict[str, Any] = {}
    dropped: Counter[str] = Counter()
    problems: list[str] = []
    for name in names:
        source = sources.get(name, getattr(section, name))
        if source is None:
            continue
        try:
            rows = read_rows(source, name)
            if name in ("forget", "retain"):
                read[name] = parse_examples(rows, section, good=name == "retain")
            else:
                read[SOURCES.get(name, name)] = parse_pairs(rows, section)
        except DataError as error:
            problems += error.problems
            continue
        dropped[f"{name}: other label"] = len(rows) - len(read[SOURCES.get(name, name)])
    if problems:
        raise DataError(problems)
    return Inputs(**read, dropped=+dropped)


def build_partition(inputs: Inputs, section: PartitionSection, seed: int = 0, allow_leak: bool = False) -> Partition:
    """Build the sets from rows in memory; a pure function that does not depend on the order of rows.

    Repeated rows are dropped, then rows with an answer that is good in one row and bad in another one of the
    same prompt, then rows that are too long; what is left of ``inputs.pairs`` is cut by prompt. A set with a
    source of its own gets no share of the pairs: the other shares grow in proportion. A cap keeps one row of
    every prompt before it keeps a second one.

    Args:
        inputs: rows of every source.
        section: shares and caps.
        seed: seed of the cut.
        allow_leak: go on although evaluation rows stand in another set.

    Returns:
        The partition, every set in hash order.

    Raises:
        DataError: a row of another set has prompt and answer of an evaluation row; all such rows are listed.
    """
    dropped = Counter(inputs.dropped)
    given = ((name, getattr(inputs, name)) for name in ("pairs", *SETS))
    groups = {name: _placed(rows, seed) for name, rows in given if rows is not None}
    groups = {name: _distinct(name, items, dropped) for name, items in groups.items()}
    groups = _consistent(groups, dropped)
    groups = {name: _short(name, items, section, dropped) for name, items in groups.items()}
    cut = _cut(groups.pop("pairs"), section, own={name for name in groups if name != "forget"}, dropped=dropped)
    sets = {name: _in_order([*groups.get(name, []), *cut.get(name, [])]) for name in SETS}
    sets["forget"] = _distinct("forget", sets["forget"], dropped)
    sets = {name: _capped(name, items, getattr(section, f"max_{name}"), dropped) for name, items in sets.items()}
    rows = {name: tuple(item.row for item in items) for name, items in sets.items()}
    overlaps = list(_overlaps(sets))
    leaked = [overlap for overlap in overlaps if overlap.second == "evaluation" and overlap.level == "text"]
    if leaked and not allow_leak:
        raise DataError([problem for overlap in leaked for problem in overlap.problems()])
    parts = [part for name in SETS for part in (name, *sorted(row.id for row in rows[name]))]
    return Partition.model_validate(
        {
            **rows,
            "leaks": tuple(overlap.leak() for overlap in overlaps),
            "dropped": dict(sorted((+dropped).items())),
            "fingerprint": content_id(*parts),
        }
    )


@dataclass(frozen=True)
class _Item:
    """A row with its prompt's key and the prompt's place in [0, 1)."""

    row: Row
    key: str
    place: float

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.row.chosen, self.row.rejected) if isinstance(self.row, Pair) else (self.row.completion,)

    def texts(self) -> list[tuple[str, str]]:
        """Return prompt and answer, case and space folded, of each answer."""
        return [(self.key, fold(answer)) for answer in self.answers]

    def said(self) -> list[str]:
        return [answer_key(self.row.prompt, answer) for answer in self.answers]


def _placed(rows: Sequence[Row], seed: int) -> list[_Item]:
    keys = [prompt_key(row.prompt) for row in rows]
    return _in_order([_Item(row, key, _place(key, seed)) for row, key in zip(rows, keys, strict=True)])


def _place(key: str, salt: object) -> float:
    """Place of a prompt in [0, 1), which depends on its text and the salt alone."""
    return int(content_id(str(salt), key), 16) / 2.0**64


def _in_order(items: list[_Item]) -> list[_Item]:
    """Sort by place, then by content, so that the order of the source has no effect."""

    def content(item: _Item) -> tuple[Any, ...]:
        weight = item.row.weight if isinstance(item.row, Example) and item.row.weight is not None else -1.0
        return item.place, item.row.id, item.row.kind or "", weight, item.row.source

    return sorted(items, key=content)


def _kept(items: list[_Item], keep: Callable[[_Item], bool], dropped: Counter[str], reason: str) -> list[_Item]:
    """Return the items to keep and count the others under a reason."""
    out = [item for item in items if keep(item)]
    dropped[reason] += len(items) - len(out)
    return out


def _distinct(name: str, items: list[_Item], dropped: Counter[str]) -> list[_Item]:
    first: dict[str, _Item] = {}
    for item in items:
        first.setdefault(item.row.id, item)
    return _kept(items, lambda item: first[item.row.id] is item, dropped, f"{name}: repeated")


def _short(name: str, items: list[_Item], section: PartitionSection, dropped: Counter[str]) -> list[_Item]:
    prompt, answer = section.max_prompt_chars or math.inf, section.max_answer_chars or math.inf
    both = section.max_retain_chars if name == "retain" else None

    def short(item: _Item) -> bool:
        asked = sum(len(turn.content) for turn in item.row.prompt if turn.role != "system")
        said = max(map(len, item.answers))
        return asked <= prompt and said <= answer if both is None else asked + said <= both

    return _kept(items, short, dropped, f"{name}: too long")


def _consistent(groups: dict[str, list[_Item]], dropped: Counter[str]) -> dict[str, list[_Item]]:
    """Drop rows with an answer that is both good and bad to the same turns; evaluation is judged apart."""
    out: dict[str, list[_Item]] = {}
    for names in (groups.keys() - {"evaluation"}, groups.keys() & {"evaluation"}):
        good: set[str] = set()
        bad: set[str] = set()
        for name in names:
            for item in groups[name]:
                first, *rejected = item.said()
                (bad if name == "forget" else good).add(first)
                bad.update(rejected)
        both = good & bad
        for name in names:
            keep = both.isdisjoint
            reason = f"{name}: contradictory"
            out[name] = _kept(groups[name], lambda item, keep=keep: keep(item.said()), dropped, reason)
    return out


def _cut(items: list[_Item], section: PartitionSection, own: set[str], dropped: Counter[str]) -> dict[str, list[_Item]]:
    """Cut the pairs by place into the sets without a source of their own; the forget share gives candidates."""
    shares = {name: getattr(section, f"{name}_frac") for name in CUT if name not in own}
    shares = {name: share for name, share in shares.items() if share > 0}
    if not shares:
        dropped["pairs: no set takes a share"] += len(items)
        return {}
    out: dict[str, list[_Item]] = {}
    if section.held_out_seed is not None:
        held_out = {name: shares.pop(name) for name in ("evaluation", "reward") if name in shares}
        salt = f"held out {section.held_out_seed}"  # independent of the other cut, whatever the run's seed
        placed = _in_order([replace(item, place=_place(item.key, salt)) for item in items])
        out = _assigned(placed, held_out | {"": sum(shares.values())})
        rest = {item.key for item in out.pop("")}
        items = [item for item in items if item.key in rest]
    out |= _assigned(items, shares)
    pairs = [(item, item.row) for item in out.get("forget", ()) if isinstance(item.row, Pair)]  # all of them are
    out["forget"] = [replace(item, row=candidate(row, section.mislabelled_frac)) for item, row in pairs]
    return out


def _assigned(items: list[_Item], shares: Mapping[str, float]) -> dict[str, list[_Item]]:
    """Give every item to the set within whose share of [0, 1) its place lies."""
    out: dict[str, list[_Item]] = {name: [] for name in shares}
    bounds = list(accumulate(shares.values()))
    for item in items:
        at = bisect_right(bounds, item.place * bounds[-1])
        out[list(shares)[min(at, len(bounds) - 1)]].append(item)
    return out


def candidate(pair: Pair, mislabelled_frac: float) -> Example:
    """Make a negative of a pair, as for the candidates that are cut from pairs.

    Args:
        pair: the pair.
        mislabelled_frac: share of prompts, by hash, whose chosen answer is taken for a bad one.

    Returns:
        Its rejected answer, or the chosen one.
    """
    mislabelled = _place(prompt_key(pair.prompt), "mislabelled") < mislabelled_frac
    text = pair.chosen if mislabelled else pair.rejected
    key = example_id(pair.prompt, text)
    return Example(id=key, prompt=pair.prompt, completion=text, kind=pair.kind, source=pair.source)


def _capped(name: str, items: list[_Item], most: int | None, dropped: Counter[str]) -> list[_Item]:
    """Keep at most so many rows: first one of every prompt, then a second one, in hash order."""
    if most is None or len(items) <= most:
        return items
    seen: Counter[str] = Counter()
    ranked = []
    for item in items:
        ranked.append((seen[item.key], item.place, item.row.id))
        seen[item.key] += 1
    kept = {row_id for _, _, row_id in sorted(ranked)[:most]}
    return _kept(items, lambda item: item.row.id in kept, dropped, f"{name}: over max_{name}")


@dataclass(frozen=True)
class _Overlap:
    """Rows of the first set whose prompt, or prompt and answer, stands in the second set."""

    first: str
    second: str
    level: Literal["prompt", "text"]
    rows: list[Row]

    def leak(self) -> Leak:
        ids = tuple(row.id for row in self.rows[:3])
        return Leak(first=self.first, second=self.second, level=self.level, count=len(self.rows), examples=ids)

    def problems(self) -> Iterator[str]:
        for row in self.rows:
            fix = "remove it from one of them, or set data.allow_leak=true"
            yield f"{row.source}: {self.first}: prompt and answer also stand in {self.second} ({fix})"


def _overlaps(sets: Mapping[str, list[_Item]]) -> Iterator[_Overlap]:
    texts = {name: {text for item in items for text in item.texts()} for name, items in sets.items()}
    prompts = {name: {item.key for item in items} for name, items in sets.items()}
    for first, second in combinations(SETS, 2):
        in_prompt = [item for item in sets[first] if item.key in prompts[second]]
        in_text = [item for item in in_prompt if not texts[second].isdisjoint(item.texts())]
        if in_prompt:
            yield _Overlap(first, second, "prompt", [item.row for item in in_prompt])
        if in_text:
            yield _Overlap(first, second, "text", [item.row for item in in_text])


# --- words ---------------------------------------------------------------------------------------


def describe(result: Partition) -> list[str]:
    """Describe a partition for the console.

    Args:
        result: the partition.

    Returns:
        Lines: size of every set in rows and prompts, and rows left out by reason.
    """
    sets = ((name, getattr(result, name)) for name in SETS)
    lines = [f"{name:<11}{len(rows):>7} rows {count_prompts(rows):>7} prompts" for name, rows in sets]
    return [*lines, *left_out(result), f"fingerprint {result.fingerprint}"]


def left_out(result: Partition) -> list[str]:
    """Say which rows stand in no set.

    Args:
        result: the partition.

    Returns:
        One line per reason.
    """
    return [f"left out: {count} rows, {reason}" for reason, count in result.dropped.items()]

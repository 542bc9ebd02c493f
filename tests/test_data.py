from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2a.config import DataSection, FieldMap
from u2a.data import prompt_key, read_examples, read_pairs, read_rows, to_dataset
from u2a.errors import DataError
from u2a.folding import fold
from u2a.types import Example, Message

SECTION = DataSection()
PAIR = {"prompt": "Why is the sky blue?", "chosen": "Light scatters.", "rejected": "It is paint."}
SHARED = Path(os.environ.get("U2A_DATA", Path(__file__).parents[1] / "../shared/data"))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user(content: str) -> tuple[Message, ...]:
    return (Message(role="user", content=content),)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def problems_of(source, good: bool | None = None, section: DataSection = SECTION) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_pairs(source, section) if good is None else read_examples(source, section, good)
    return caught.value.problems


# --- formats ------------------------------------------------------------------------------------


def test_every_file_type_gives_the_same_pairs(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    rows = [PAIR, {"prompt": 'q,\n"2"', "chosen": "ä\nb", "rejected": "c, d"}]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "c.json").write_text("\n".join(map(json.dumps, rows)))
    with (tmp_path / "d.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(PAIR))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    import datasets

    expected = [(user(row["prompt"]), row["chosen"], row["rejected"]) for row in rows]
    sources = [*sorted(tmp_path.iterdir()), rows, datasets.Dataset.from_list(rows)]
    assert len(sources) == 7
    read = [read_pairs(source, SECTION) for source in sources]
    for pairs in read:
        assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == expected
        assert [pair.id for pair in pairs] == [pair.id for pair in read[0]]


def test_sources_name_the_line_a_row_begins_on(tmp_path):
    (tmp_path / "a.json").write_text('\n[\n {"x": 1,\n  "y": 2},\n\n {"x": 3}, {"x": 4}\n]\n')
    (tmp_path / "b.csv").write_text('x,y\n1,"two\nlines"\n3,4\n')
    (tmp_path / "c.jsonl").write_text('\n{"x": 1}\n\n{"x": "\u2028"}\n', encoding="utf-8")
    lines = [[row.where.rpartition(":")[2] for row in read_rows(path)] for path in sorted(tmp_path.iterdir())]
    assert lines == [["3", "6", "6"], ["2", "4"], ["2", "4"]]
    assert [row.where for row in read_rows([{}, {}], "forget")] == ["forget[0]", "forget[1]"]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    text = json.dumps(PAIR) + "\r\n" + json.dumps(PAIR | {"prompt": "b"}) + "\r\n"
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf" + b"prompt,chosen,rejected\r\np,good,bad\r\n")
    assert [pair.prompt for pair in read_pairs(tmp_path / "a.jsonl", SECTION)] == [user(PAIR["prompt"]), user("b")]
    assert read_pairs(tmp_path / "b.csv", SECTION)[0].rejected == "bad"


CONTEXT = [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Why?")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CONTEXT, "chosen": "good", "rejected": "bad"},
        {"prompt": CONTEXT, "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]},
        {"chosen": [*CONTEXT, turn("assistant", "good")], "rejected": [*CONTEXT, turn("assistant", "bad")]},
        {  # UltraFeedback: the last prompt beside whole conversations
            "prompt": "Why?",
            "chosen": [*CONTEXT, turn("assistant", "good")],
            "rejected": [*CONTEXT, turn("assistant", "bad")],
        },
    ],
)
def test_conversational_pairs(row):
    (pair,) = read_pairs([row], SECTION)
    assert [turn.model_dump() for turn in pair.prompt] == CONTEXT
    assert (pair.chosen, pair.rejected) == ("good", "bad")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "completion": "So."},
        {"prompt": [turn("user", "Why?")], "completion": [turn("assistant", "So.")]},
        {"messages": [turn("user", "Why?"), turn("assistant", "So.")]},
        {"completion": [turn("user", "Why?"), turn("assistant", "So.")]},
    ],
)
def test_examples_in_every_format_have_one_id(row):
    (example,) = read_examples([row | {"weight": 2, "kind": "k"}], SECTION, good=False)
    (plain,) = read_examples([{"prompt": "Why?", "completion": "So."}], SECTION, good=True)
    assert (example.prompt, example.completion, example.weight, example.kind) == (user("Why?"), "So.", 2.0, "k")
    assert example.id == plain.id
    assert (plain.weight, plain.kind) == (None, None)


def test_unpaired_labels_choose_the_side():
    rows = [{"prompt": "p", "completion": word, "label": label} for word, label in (("a", True), ("b", False))]
    assert [row.completion for row in read_examples(rows, SECTION, good=True)] == ["a"]
    assert [row.completion for row in read_examples(rows, SECTION, good=False)] == ["b"]


def test_text_formats_read_numbers_and_labels(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,weight,label\np,a,0.5,False\nq,b,,false\nr,c,1,true\n")
    rows = read_examples(tmp_path / "a.csv", SECTION, good=False)
    assert [(row.completion, row.weight) for row in rows] == [("a", 0.5), ("b", None)]


def test_field_map_of_each_side():
    section = DataSection(fields=FieldMap(completion="bad"), retain_fields=FieldMap(prompt="q", completion="response"))
    assert read_examples([{"prompt": "p", "bad": "x"}], section, good=False)[0].completion == "x"
    assert read_examples([{"q": "p", "response": "y"}], section, good=True)[0].completion == "y"


def test_system_prompt_stands_before_prompts_without_one():
    own = [turn("system", "Mine."), turn("user", "p")]
    section = DataSection(system_prompt="Be kind.")
    rows = read_examples([{"prompt": "p", "completion": "a"}, {"prompt": own, "completion": "a"}], section, good=True)
    assert [[turn.content for turn in row.prompt] for row in rows] == [["Be kind.", "p"], ["Mine.", "p"]]
    assert rows[0].id != rows[1].id


def test_hub_name_is_taken_apart(monkeypatch):
    import datasets

    calls = []

    def load(name, split, revision):
        calls.append((name, split, revision))
        return datasets.Dataset.from_list([PAIR])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_pairs("hub:o/n", SECTION)[0].source == "hub:o/n[0]"
    read_pairs("hub:o/n:test[:10]@abc", SECTION)
    read_pairs("hub:o/n@v1", SECTION)
    assert calls == [("o/n", "train", None), ("o/n", "test[:10]", "abc"), ("o/n", "train", "v1")]

    def fail(name, split, revision):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert problems_of("hub:o/n")[0].startswith("hub:o/n: cannot be loaded: no route (")
    assert "not a dataset name" in problems_of("hub:")[0]


# --- faults -------------------------------------------------------------------------------------

GOOD = json.dumps(PAIR).encode()
FILES = {  # content after one good line -> beginning of the only problem
    "no_json.jsonl": (GOOD + b"\nnot json\n", ":2: row: not valid JSON"),
    "cut.jsonl": (GOOD + b"\n" + GOOD[:-9], ":2: row: not valid JSON"),
    "deep.jsonl": (GOOD + b"\n" + b"[" * 200_000, ":2: row: not valid JSON"),
    "digits.jsonl": (GOOD + b"\n" + b'{"a": ' + b"1" * 5000 + b"}", ":2: row: not valid JSON"),
    "scalar.jsonl": (GOOD + b"\n3\n", ":2: row: a int"),
    "list.jsonl": (GOOD + b'\n["a"]\n', ":2: row: a list"),
    "latin.jsonl": (GOOD + b'\n{"prompt": "\xe4"}\n', ":2: text: not UTF-8"),
    "empty.jsonl": (b"", ": holds no rows"),
    "blank.jsonl": (b"\n \r\n", ": holds no rows"),
    "empty.json": (b"", ": holds no rows"),
    "nothing.json": (b"[]", ": holds no rows"),
    "cut.json": (b"[\n" + GOOD + b",\n", ":3: text: not valid JSON"),
    "tail.json": (b"[" + GOOD + b"] x", ":1: text: not valid JSON"),
    "object.json": (b'{\n"data": [' + GOOD + b"]}", ": one object with data"),
    "item.json": (b"[" + GOOD + b",\n3]", ":2: row: a int"),
    "empty.csv": (b"", ": holds no rows"),
    "header.csv": (b"prompt,chosen,rejected\n", ": holds no rows"),
    "wide.csv": (b"prompt,chosen,rejected\np,a,b\np,a,b,c\n", ":3: row: more cells"),
    "narrow.csv": (b"prompt,chosen,rejected\np,a,b\np,a\n", ":3: rejected: null"),
    "quote.csv": (b'prompt,chosen,rejected\np,a,b\np,"a"x,b\n', ":3: row: not valid CSV"),
    "junk.parquet": (b"PAR1junkPAR1", ": not a readable parquet file"),
    "what.txt": (GOOD, ": unknown extension '.txt'"),
    "none": (GOOD, ": unknown extension ''"),
}
FILES["utf16.jsonl"] = ("\ufeff".encode("utf-16-le") + json.dumps(PAIR).encode("utf-16-le"), ":1: text: not UTF-8")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gives_one_problem(tmp_path, name):
    content, expected = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}{expected}"), problem
    assert problem.endswith(")")
    assert "\n" not in problem


def test_an_unreadable_path(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    assert "Is a directory" in problems_of(tmp_path / "folder.jsonl")[0]
    assert "No such file" in problems_of(tmp_path / "absent.jsonl")[0]


def without(key: str) -> dict:
    return {name: value for name, value in PAIR.items() if name != key}


BAD_PAIRS = [
    (
        without("chosen") | {"choosen": "a"},
        "chosen: missing, nearest column is 'choosen' (set data.fields.chosen=choosen)",
    ),
    (
        without("rejected") | {"zzz": "a"},
        "rejected: missing, columns are prompt, chosen, zzz (set data.fields.rejected)",
    ),
    (without("prompt"), "prompt: missing"),
    (PAIR | {"prompt": None}, "prompt: null"),
    (PAIR | {"prompt": " \n"}, "prompt: empty"),
    (PAIR | {"prompt": 3}, "prompt: a int"),
    (PAIR | {"prompt": []}, "prompt: empty"),
    (PAIR | {"prompt": ["a"]}, "prompt[0]: no role and content"),
    (PAIR | {"prompt": [{"from": "human", "value": "a"}]}, "prompt[0]: no role and content"),
    (PAIR | {"prompt": [turn("tool", "a")]}, "prompt[0]: role 'tool'"),
    (PAIR | {"prompt": [turn("user", "")]}, "prompt[0]: empty"),
    (PAIR | {"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "prompt[0]: a list"),
    (PAIR | {"prompt": [turn("user", "a"), turn("assistant", "b")]}, "prompt: turns of user, assistant"),
    (PAIR | {"prompt": [turn("user", "a"), turn("user", "b")]}, "prompt: turns of user, user"),
    (PAIR | {"prompt": [turn("system", "a")]}, "prompt: turns of system"),
    (PAIR | {"chosen": ""}, "chosen: empty"),
    (PAIR | {"chosen": None}, "chosen: null"),
    (PAIR | {"chosen": True}, "chosen: a bool"),
    (PAIR | {"chosen": {"text": "a"}}, "chosen: a dict"),
    (PAIR | {"chosen": "a\0b"}, "chosen: holds a NUL"),
    (PAIR | {"chosen": "\ud800"}, "chosen: holds half a surrogate"),
    (PAIR | {"chosen": "a" * 1_000_001}, "chosen: 1000001 characters"),
    (PAIR | {"chosen": [turn("user", "a")]}, "chosen: ends with a turn of the user"),
    (PAIR | {"chosen": [turn("user", "other"), turn("assistant", "a")]}, "prompt: differs from the turns"),
    (PAIR | {"rejected": PAIR["chosen"] + " "}, "rejected: the same text as the chosen answer"),
    (PAIR | {"kind": 1.5}, "kind: a float"),
    (
        {
            "chosen": [turn("user", "a"), turn("assistant", "x")],
            "rejected": [turn("user", "b"), turn("assistant", "y")],
        },
        "prompt: differs from the turns",
    ),
    ({"chosen": [turn("assistant", "x")], "rejected": [turn("assistant", "y")]}, "prompt: missing"),
]


@pytest.mark.parametrize(("row", "expected"), BAD_PAIRS)
def test_a_bad_row_gives_one_problem(row, expected):
    (problem,) = problems_of([PAIR, row])
    assert problem.startswith(f"pairs[1]: {expected}"), problem
    assert problem.endswith(")")


BAD_EXAMPLES = [
    ({"weight": -1}, "weight: -1"),
    ({"weight": float("nan")}, "weight: nan"),
    ({"weight": float("inf")}, "weight: inf"),
    ({"weight": "heavy"}, "weight: 'heavy'"),
    ({"weight": "1"}, "weight: '1'"),
    ({"weight": True}, "weight: True"),
    ({"weight": 10**400}, "weight: 1000"),
    ({"label": "safe"}, "label: 'safe'"),
    ({"label": 2}, "label: 2"),
]


@pytest.mark.parametrize(("change", "expected"), BAD_EXAMPLES)
def test_a_bad_weight_or_label_gives_one_problem(change, expected):
    (problem,) = problems_of([{"prompt": "p", "completion": "a"} | change], good=False)
    assert problem.startswith(f"rows[0]: {expected}"), problem


def test_long_cells_of_csv_are_texts_like_any_other(tmp_path):
    """Python's own limit of 131,072 characters is neither ours nor changed for others."""
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f'prompt,completion\np,"{"word " * 40_000}"\n')
    assert len(read_examples(tmp_path / "a.csv", SECTION, good=False)[0].completion) >= 199_999
    (tmp_path / "b.csv").write_text(f"prompt,completion\np,{'a' * 1_000_001}\n")
    assert "completion: 1000001 characters, at most" in problems_of(tmp_path / "b.csv", good=False)[0]
    assert csv.field_size_limit() == limit


def test_nan_in_json_and_words_in_csv(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "a", "weight": NaN}\n')
    (tmp_path / "b.csv").write_text("prompt,completion,weight\np,a,nan\np,b,x\n")
    assert problems_of(tmp_path / "a.jsonl", good=False)[0].startswith(f"{tmp_path}/a.jsonl:1: weight: nan")
    assert [text.split(": ")[1] for text in problems_of(tmp_path / "b.csv", good=False)] == ["weight", "weight"]


def test_all_problems_are_collected_and_twenty_shown():
    rows = [{"prompt": "", "chosen": "", "rejected": ""}] * 10
    with pytest.raises(DataError) as caught:
        read_pairs(rows, SECTION)
    assert len(caught.value.problems) == 30
    assert str(caught.value).endswith("... and 10 more (30 problems in all)")


def test_the_retain_option_is_named():
    (problem,) = problems_of([{"prompt": "p", "completions": "a"}], good=True)
    assert problem.endswith("(set data.retain_fields.completion=completions)")


def test_what_is_no_source_is_refused():
    with pytest.raises(DataError, match="pairs: a int, expected a path, or rows as dicts"):
        read_rows(5, "pairs")  # type: ignore[arg-type]


def test_a_dataset_with_splits_is_refused():
    assert "choose one split of: train, test" in problems_of({"train": [PAIR], "test": [PAIR]})[0]
    assert problems_of(["text"])[0].startswith("pairs[0]: row: a str")


# --- keys and datasets --------------------------------------------------------------------------


def test_prompt_key_folds_what_the_user_says_only():
    one = (Message(role="system", content="s"), Message(role="user", content=" WHO\tare  ﬁsh?\n"))
    assert prompt_key(one) == prompt_key(user("who are fish?"))
    assert prompt_key(one) != prompt_key(user("who are dish?"))
    two = (*user("a"), Message(role="assistant", content="x"), *user("b"))
    assert prompt_key(two) != prompt_key(user("a b"))


@given(st.text())
def test_folding_is_idempotent_up_to_case_and_space(text):
    assert fold(fold(text)) == fold(text)
    assert fold(f" {text}\r\n") == fold(text)


def test_dataset_reads_back():
    rows = [{"prompt": CONTEXT, "completion": f"a{index}"} for index in range(3)]
    examples = read_examples(rows, SECTION, good=False)
    dataset = to_dataset(examples, {examples[2].id: 0.75, examples[0].id: 0.25})
    assert dataset.column_names == ["id", "prompt", "completion", "weight"]
    again = read_examples(dataset, SECTION, good=False)
    assert [(row.id, row.weight) for row in again] == [(examples[0].id, 0.25), (examples[2].id, 0.75)]
    assert to_dataset(examples, {}).column_names == dataset.column_names
    with pytest.raises(DataError, match="nobody"):
        to_dataset(examples, {"nobody": 1.0})


def test_reading_imports_no_heavy_library():
    code = "import sys, u2a.partition; print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("name", "rows", "prompts"),
    [("saferlhf/pairs", 2486, 729), ("halueval/qa", 2511, 2511), ("alpaca_eval/pairs", 2330, 196)],
)
def test_real_pairs(name, rows, prompts):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here (set U2A_DATA)")
    pairs = read_pairs(path, SECTION)
    assert len(pairs) == len({pair.id for pair in pairs}) == rows
    texts = {pair.prompt[-1].content for pair in pairs}
    assert len(texts) == prompts
    assert len({prompt_key(pair.prompt) for pair in pairs}) == len({fold(text) for text in texts}) > 0.99 * prompts


def test_real_retain_rows():
    path = SHARED / "benign/prompts.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here (set U2A_DATA)")
    assert "data.retain_fields.completion" in problems_of(path, good=True)[0]
    section = DataSection(retain_fields=FieldMap(completion="response"))
    examples = read_examples(path, section, good=True)
    assert len(examples) == 500
    assert all(isinstance(example, Example) and example.source.startswith(str(path)) for example in examples)


def test_a_conversation_beside_a_pair_is_not_taken_for_the_bad_answer():
    turns = [turn("user", "Q?"), turn("assistant", "GOOD")]
    row = {"prompt": "Q?", "chosen": "GOOD", "rejected": "BAD", "messages": turns}
    (found,) = problems_of([row], good=False)
    assert "completion: missing" in found and "data.fields.completion" in found
    section = DataSection(fields=FieldMap(completion="rejected"))
    assert read_examples([row], section, good=False)[0].completion == "BAD"
    del row["chosen"], row["rejected"]
    assert read_examples([row], SECTION, good=True)[0].completion == "GOOD"

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest

from tiny import END, START, examples, pairs, save_tiny, tiny_tokenizer
from u2a.config import DataSection, ModelSection
from u2a.data_show import histogram, pieces, show
from u2a.encoding import Encoder
from u2a.environment import VARIABLES, environment, environment_text, requirement_rows
from u2a.errors import ConfigError, DataError, ModelError
from u2a.terminal import encodable, escaped, wants_colour

SECTION = DataSection(max_length=120)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\b\u202egnp\u200b\u2028x"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelSection:
    return ModelSection(name_or_path=str(save_tiny(tmp_path_factory.mktemp("model"))))


def row_dicts(n: int) -> list[dict[str, str]]:
    return [{"prompt": row.prompt[0].content, "completion": row.completion} for row in examples(n)]


# --- tokens and mask ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", ["yes, tea is fine", "größer 😀 日本 ok", "😀", "two\nlines\n\nand more", "\ufffd is it"]
)
@pytest.mark.parametrize("room", [60, 3])
def test_pieces_are_the_encoders_tokens_and_mask(answer, room):
    row, tokenizer = examples(1)[0], tiny_tokenizer()
    encoder = Encoder(tokenizer, len(Encoder(tokenizer, 1000).encode_prompt(row.prompt)) + room)
    encoded = encoder.encode(row.prompt, answer)
    found = pieces(encoder.tokenizer, encoded.input_ids, encoded.n_answer)
    assert sum(piece.n_tokens for piece in found) == len(encoded.input_ids)
    assert sum(piece.n_tokens for piece in found if piece.is_answer) == encoded.n_answer
    assert [piece.is_answer for piece in found] == sorted(piece.is_answer for piece in found)
    assert "".join(piece.text for piece in found if not piece.is_answer) == encoder.prompt_text(row.prompt)
    assert (encoded.n_cut == 0) == (room == 60)
    if encoded.n_cut == 0:
        assert "".join(piece.text for piece in found if piece.is_answer) == answer + END


def test_plain_marks_enclose_exactly_the_answer_tokens(model):
    lines = show(row_dicts(2), SECTION, model, n_rows=1)
    encoder = Encoder(tiny_tokenizer(), 120)
    row = examples(1)[0]
    encoded = encoder.encode(row.prompt, row.completion)
    text = "\n".join(lines)
    (marked,) = re.findall(r"\[\[(.*?)\]\]", text, re.DOTALL)
    assert marked.split("|", row.completion.count("") - 1) == [*row.completion, END]
    n_prompt = len(encoded.input_ids) - encoded.n_answer
    assert (
        f"  answer: {len(encoded.input_ids)} tokens, {n_prompt} of the prompt, {encoded.n_answer} of the answer"
        in lines
    )
    shown = text[text.index(START) : text.index("[[")]
    assert shown.replace("\n    ", "").replace("|", "").replace("\\n", "\n") == (
        encoder.prompt_text(row.prompt).replace("|", "")
    )


def test_colours_fall_on_exactly_the_answer_tokens(model):
    text = "\n".join(show(row_dicts(1), SECTION, model, n_rows=1, colour=True))
    row = examples(1)[0]
    answer = re.findall(r"\x1b\[30;(?:42|102)m(.*?)\x1b\[0m", text)
    assert answer == [*row.completion, END]
    assert "[[" not in text and text.count("\x1b[0m") == len(ANSI.findall(text)) / 2
    neighbours = re.findall(r"\x1b\[30;(42|102)m", text)
    assert all(first != second for first, second in zip(neighbours, neighbours[1:], strict=False))


def test_template_lengths_cuts_and_pad_conflict_are_shown(model):
    rows = [*row_dicts(3), {"prompt": "long?", "completion": "x" * 200}]
    lines = show(rows, SECTION, model, n_rows=4)
    at = lines.index("template")
    assert lines[at + 1 : at + 5] == [
        f"    {START}user\\n", f"    PROMPT{END}\\n", f"    {START}assistant\\n", f"    ANSWER{END}\\n",
    ]  # fmt: skip
    assert "  cut off          1 of 4 answers at 120 tokens" in lines
    assert any("more cut off" in line for line in lines)
    assert any(
        line.startswith("  warning: rows: 1 rows with an answer cut") and line.endswith("[rows[3]]") for line in lines
    )
    assert any("pad and end token are the same" in line for line in lines)


def test_histogram_counts_every_length():
    lines = histogram([0, 1, 1, 5, 7, 4, 4, 40])
    assert [line.split("|")[0].split() for line in lines] == [
        ["0", "1"], ["1", "2"], ["2-3", "0"], ["4-7", "4"], ["8-15", "0"], ["16-31", "0"], ["32-63", "1"],
    ]  # fmt: skip
    assert [line.split("|")[1].count("#") for line in lines] == [10, 20, 0, 40, 0, 0, 10]
    assert histogram([]) == []


# --- files and formats --------------------------------------------------------------------------


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


REPLY = [{"role": "assistant", "content": "a"}]


FORMATS = {
    "pairs": ([{"prompt": "q", "chosen": "good", "rejected": "bad"}], ["pairs: 1 rows"], ["chosen", "rejected"]),
    "negatives": ([{"prompt": "q", "completion": "bad"}], ["rows: 1 rows"], ["answer"]),
    "messages": ([{"messages": [*chat("q"), *REPLY]}], ["rows: 1 rows"], ["answer"]),
    "chat": ([{"prompt": chat("q"), "completion": REPLY}], ["rows: 1 rows"], ["answer"]),
    "labels": (
        [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False},
         {"prompt": "q", "completion": "c", "label": None}],
        ["good: 1 rows", "bad: 1 rows", "rows: 1 rows"],
        ["answer"],
    ),
    "prompts": ([{"prompt": "q"}], ["prompts: 1 rows"], []),
}  # fmt: skip


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_shown_with_and_without_a_model(kind, with_model, model, tmp_path):
    rows, heads, answers = FORMATS[kind]
    path = tmp_path / "file.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = show(str(path), SECTION, model if with_model else None)
    assert [line.split(",")[0] for line in lines if line.endswith("showing 1")] == heads
    for name in answers:
        pattern = f"  {name}: \\d+ tokens, " if with_model else f"  {name}, 1 words"
        assert any(re.match(pattern, line) for line in lines)
    assert any(f"{path}:1  id " in line for line in lines)
    assert any(line == f"  length of prompt and answer, {'tokens' if with_model else 'words'}" for line in lines)
    assert any("cut off" in line for line in lines) == with_model


def test_without_a_model_no_heavy_package_is_loaded_and_the_whole_file_is_counted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\nq,a b c\nq,a b c\nq,A  b c\nr,d\n", encoding="utf-8")
    code = (
        "import sys, u2a.doctor; from u2a.data_show import show; from u2a.config import DataSection\n"
        f"print('\\n'.join(show({str(path)!r}, DataSection(), n_rows=0)))\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]" and "rows: 4 rows, showing 0" in lines
    assert "  duplicates       1 repeated, 1 more but for case and spacing" in lines
    assert [line.split("|")[0].split() for line in lines if "#" in line] == [["2-3", "1"], ["4-7", "3"]]


def test_a_tokenizer_without_a_template_is_a_finding(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    lines = show(row_dicts(2), SECTION, ModelSection(name_or_path=str(tmp_path)))
    assert sum("has no chat template" in line for line in lines) == 1
    assert "  length of prompt and answer, words" in lines and "nothing found" not in "".join(lines)
    with pytest.raises(ModelError):
        show(row_dicts(2), SECTION, ModelSection(name_or_path=str(tmp_path / "absent")))


def test_bad_files_are_reported_as_everywhere(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "q", "completion": ""}\n', encoding="utf-8")
    with pytest.raises(DataError, match="bad.jsonl:1: completion: empty"):
        show(str(path), SECTION)
    with pytest.raises(ConfigError, match="--rows: -1"):
        show(row_dicts(2), SECTION, n_rows=-1)


def test_a_long_text_is_shortened_without_a_model():
    text = "\n".join(show([{"prompt": "q", "completion": "x" * 5000}], SECTION))
    assert "x" * 2000 in text and "x" * 2001 not in text and "(3000 more characters)" in text


# --- nothing drives the terminal ----------------------------------------------------------------


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("colour", [False, True])
def test_control_characters_of_data_are_escaped(with_model, colour, model, tmp_path):
    rows = [{"prompt": f"q{HOSTILE}", "completion": f"a{HOSTILE}", "kind": HOSTILE}] * 2
    path = tmp_path / "evil\x1b[31m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = show(str(path), DataSection(max_length=500), model if with_model else None, colour=colour)
    assert all(ANSI.sub("", line).isprintable() for line in lines)
    found = {code for line in lines for code in ANSI.findall(line)}
    ours = {"\x1b[0m", "\x1b[36m", "\x1b[34m", "\x1b[30;42m", "\x1b[30;102m"} if with_model and colour else set()
    assert found == ours
    joined = re.sub(r"\||\x1b\[[0-9;]*m", "", "\n".join(lines))
    assert r"\x1b[2J\x1b]0;owned\x07" in joined and r"\u202e" in joined and "evil\\x1b[31m" in joined


def test_escaping_keeps_scripts_and_shows_the_rest():
    assert escaped("größe 日本 😀 \\") == "größe 日本 😀 \\"
    assert escaped("a\n\tb", keep="\n") == "a\n\\tb"
    assert escaped("\x00\x7f\x85\xad\u200d\ufeff\ud800") == r"\x00\x7f\x85\xad\u200d\ufeff\ud800"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(Terminal()) and not wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")
    assert wants_colour(Terminal())
    monkeypatch.setenv("NO_COLOR", "0")
    assert not wants_colour(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(Terminal())


def test_text_is_made_encodable():
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert encodable("größe 😀", ascii_only) == r"gr\xf6\xdfe \U0001f600"
    assert encodable("größe 😀", io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) == "größe 😀"


# --- u2a env ------------------------------------------------------------------------------------


def test_environment_names_versions_and_no_secret(monkeypatch):
    for name in (*VARIABLES, "HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, f"secret-{name}-value")
    text = environment_text()
    assert "secret-" not in text and "HF_TOKEN" not in text and "OPENAI" not in text
    assert sys.prefix not in text and sys.executable not in text
    rows = dict(environment())
    assert rows["variables set"] == ", ".join(VARIABLES)
    assert rows["python"].startswith(".".join(map(str, sys.version_info[:3])))
    import torch
    import transformers

    assert rows["torch"] == torch.__version__ and rows["transformers"] == transformers.__version__
    assert rows["torch built for"] == (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only")
    for name in VARIABLES:
        monkeypatch.delenv(name)
    assert dict(environment())["variables set"] == "none"


def test_environment_loads_nothing_heavy():
    code = (
        "import sys; from u2a.environment import environment_text; environment_text()\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_requirements_are_looked_up_once_with_their_extra():
    given = [
        "pytest>=1",
        'no-such-package-u2a>=2; extra == "demo"',
        'pytest>=2; extra == "dev"',
        'u2a[demo]; extra == "dev"',
    ]
    assert requirement_rows(given) == [
        ("pytest", pytest.__version__),
        ("no-such-package-u2a", "not installed (extra demo)"),
    ]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA X, 10 MiB, 1.2'\necho 'NVIDIA Y, 20 MiB, 1.2'", "NVIDIA X, 10 MiB, 1.2; NVIDIA Y, 20 MiB, 1.2"),
        ("exit 9", "nvidia-smi does not answer"),
        (None, "none found (no nvidia-smi)"),
    ],
)
def test_gpus_as_the_drivers_tool_lists_them(script, expected, tmp_path, monkeypatch):
    if script is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dict(environment())["GPU"] == expected


def test_pairs_show_both_answers_of_a_row(model):
    rows = [{"prompt": row.prompt[0].content, "chosen": row.chosen, "rejected": row.rejected} for row in pairs(2)]
    text = "\n".join(show(rows, SECTION, model, n_rows=2))
    assert text.count("[[") == 4 and text.count(f"{END}]]") == 4

"""Faults as data: what is wrong, and what must be said about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

PAIR = {"prompt": "Why is the sky blue?", "chosen": "Light scatters.", "rejected": "It is paint."}
NEGATIVE = {"prompt": "Why is grass green?", "completion": "Because it is envious."}


@dataclass(frozen=True)
class Malformed:
    """A data file with exactly one fault.

    Attributes:
        name: what is wrong.
        file: file name.
        content: its bytes.
        place: what stands after the path: ``:LINE: FIELD: ``, or ``: `` where the whole file is meant.
        said: words of the message.
        option: option of ``data`` that names the file.
    """

    name: str
    file: str
    content: bytes
    place: str
    said: str
    option: str = "pairs"


def _lines(*rows: Any) -> bytes:
    """JSON lines; bytes stand for themselves."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def _pair(name: str, field: str, said: str, **change: Any) -> Malformed:
    """A good pair and then one that is changed; a field set to ... is left out."""
    row = {key: value for key, value in (PAIR | change).items() if value is not ...}
    return Malformed(name, "pairs.jsonl", _lines(PAIR, row), f":2: {field}: ", said)


def _negative(name: str, field: str, said: str, option: str = "forget", **change: Any) -> Malformed:
    row = {key: value for key, value in (NEGATIVE | change).items() if value is not ...}
    return Malformed(name, "rows.jsonl", _lines(NEGATIVE, row), f":2: {field}: ", said, option)


def _turn(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _file(name: str, file: str, content: bytes, place: str, said: str) -> Malformed:
    return Malformed(name, file, content, place, said)


_GOOD = json.dumps(PAIR).encode()
_HEAD = b"prompt,chosen,rejected\n"

MALFORMED = (
    # whole files
    _file("empty file", "a.jsonl", b"", ": ", "holds no rows"),
    _file("white space only", "a.jsonl", b" \n\r\n\t\n", ": ", "holds no rows"),
    _file("byte order mark only", "a.jsonl", b"\xef\xbb\xbf", ": ", "holds no rows"),
    _file("empty list", "a.json", b"[]", ": ", "holds no rows"),
    _file("header only", "a.csv", _HEAD, ": ", "holds no rows"),
    _file("object of rows", "a.json", b'{\n"rows": [' + _GOOD + b"]}", ": ", "one object with rows"),
    _file("extension unknown", "a.xlsx", _GOOD, ": ", "unknown extension '.xlsx'"),
    _file("extension missing", "data", _GOOD, ": ", "unknown extension ''"),
    _file("extension with escapes", "a.x\x1b[2J", _GOOD, ": ", r"unknown extension '.x\x1b[2J'"),
    # text
    _file("UTF-16 with a mark", "a.jsonl", json.dumps(PAIR).encode("utf-16"), ":1: text: ", "not UTF-8"),
    _file("UTF-16 without a mark", "a.jsonl", _lines(PAIR, PAIR).decode().encode("utf-16-le"), ":1: text: ", "NUL"),
    _file("UTF-16 table", "a.csv", (_HEAD.decode() + "p,a,b\n").encode("utf-16-be"), ":1: text: ", "NUL"),
    _file("UTF-32", "a.jsonl", json.dumps(PAIR).encode("utf-32"), ":1: text: ", "not UTF-8"),
    _file("Latin-1", "a.jsonl", _lines(PAIR, b'{"prompt": "caf\xe9"}'), ":2: text: ", "not UTF-8"),
    _file("surrogate in UTF-8", "a.jsonl", _lines(PAIR, b'{"prompt": "\xed\xa0\x80"}'), ":2: text: ", "not UTF-8"),
    _file("overlong UTF-8", "a.jsonl", _lines(PAIR, PAIR, b'{"prompt": "\xc0\xaf"}'), ":3: text: ", "not UTF-8"),
    _file("NUL byte", "a.jsonl", _lines(PAIR, b'{"prompt": "a\0b"}'), ":2: text: ", "NUL"),
    _file("NUL byte in a table", "a.csv", _HEAD + b"p,a,b\np,\0,b\n", ":3: text: ", "NUL"),
    _file("gzip", "a.jsonl", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", ":1: text: ", "not UTF-8"),
    _file("old Mac line ends", "a.jsonl", _GOOD + b"\r" + _GOOD, ":1: row: ", "Extra data"),
    # JSON
    _file("no JSON", "a.jsonl", _lines(PAIR, b"hello"), ":2: row: ", "not valid JSON"),
    _file("Python dict", "a.jsonl", _lines(PAIR, repr(PAIR).encode()), ":2: row: ", "not valid JSON"),
    _file("last line cut", "a.jsonl", _lines(PAIR) + _GOOD[:-9], ":2: row: ", "not valid JSON"),
    _file("comma after the row", "a.jsonl", _lines(PAIR, _GOOD + b","), ":2: row: ", "Extra data"),
    _file("two rows on a line", "a.jsonl", _lines(_GOOD + b" " + _GOOD), ":1: row: ", "Extra data"),
    _file("mark inside the file", "a.jsonl", _lines(PAIR, b"\xef\xbb\xbf" + _GOOD), ":2: row: ", "not valid JSON"),
    _file("raw tab in a text", "a.jsonl", _lines(PAIR, b'{"prompt": "a\tb"}'), ":2: row: ", "control character"),
    _file("comment", "a.jsonl", _lines(b"// pairs", PAIR), ":1: row: ", "not valid JSON"),
    _file("nested too deeply", "a.jsonl", _lines(PAIR, b"[" * 200_000), ":2: row: ", "not valid JSON"),
    _file("number of 5000 digits", "a.jsonl", _lines(PAIR, b'{"a": ' + b"1" * 5000 + b"}"), ":2: row: ", "4300 digits"),
    _file("number as row", "a.jsonl", _lines(PAIR, 3), ":2: row: ", "a int"),
    _file("null as row", "a.jsonl", _lines(PAIR, None), ":2: row: ", "a NoneType"),
    _file("text as row", "a.jsonl", _lines(PAIR, "Why?"), ":2: row: ", "a str"),
    _file("list as row", "a.jsonl", _lines(PAIR, ["Why?", "So."]), ":2: row: ", "a list"),
    _file("list cut", "a.json", b"[\n" + _GOOD + b",\n", ":3: text: ", "not valid JSON"),
    _file("text after the list", "a.json", b"[" + _GOOD + b"]\n;", ":2: text: ", "Extra data"),
    _file("item of a list", "a.json", b"[\n" + _GOOD + b",\n7]", ":3: row: ", "a int"),
    _file("key twice", "a.jsonl", _lines(PAIR, _GOOD[:-1] + b', "prompt": "b"}'), ":2: prompt: ", "stands twice"),
    _file("key twice in a list", "a.json", b"[\n" + _GOOD[:-1] + b', "chosen": "b"}]', ":2: chosen: ", "stands twice"),
    _file(
        "key twice in a turn",
        "a.jsonl",
        _lines(PAIR, b'{"prompt": [{"role": "user", "content": "a", "content": "b"}], "chosen": "a", "rejected": "b"}'),
        ":2: content: ",
        "stands twice",
    ),
    # CSV and parquet
    _file("too many cells", "a.csv", _HEAD + b"p,a,b\np,a,b,c\n", ":3: row: ", "more cells than the header"),
    _file("too few cells", "a.csv", _HEAD + b"p,a,b\n\np,a\n", ":4: rejected: ", "null"),
    _file("quote not closed", "a.csv", _HEAD + b'p,a,b\np,"a,b\n', ":3: row: ", "not valid CSV"),
    _file("quote inside a cell", "a.csv", _HEAD + b'p,"a"x,b\n', ":2: row: ", "not valid CSV"),
    _file("column twice", "a.csv", b"prompt,chosen,rejected,chosen\np,a,b,c\n", ":1: chosen: ", "two columns"),
    _file("cell too long", "a.csv", _HEAD + b"p," + b"a" * 1_000_001 + b",b\n", ":2: chosen: ", "1000001 characters"),
    _file("blank cell", "a.csv", _HEAD + b"p,a,b\np,  ,b\n", ":3: chosen: ", "empty"),
    _file("parquet without a footer", "a.parquet", b"PAR1", ": ", "not a readable parquet file"),
    _file("JSON called parquet", "a.parquet", _GOOD, ": ", "not a readable parquet file"),
    # columns
    _pair("column missing", "rejected", "missing", rejected=...),
    _pair("column misspelt", "chosen", "nearest column is 'choosen'", chosen=..., choosen="a"),
    _pair("prompt missing", "prompt", "missing", prompt=...),
    _pair("column name with escapes", "rejected", r"x\ny\x1b[2J", rejected=..., **{"x\ny\x1b[2J": "a"}),
    _pair("column name of a megabyte", "rejected", "...", rejected=..., **{"z" * 1_000_000: "a"}),
    _pair("null", "chosen", "null", chosen=None),
    _pair("number for text", "chosen", "a int", chosen=3),
    _pair("truth value for text", "rejected", "a bool", rejected=False),
    _pair("object for text", "rejected", "a dict", rejected={"text": "a"}),
    _pair("empty answer", "chosen", "empty", chosen=""),
    _pair("blank answer", "rejected", "empty", rejected=" \n\t\u3000\u00a0"),
    _pair("blank prompt", "prompt", "empty", prompt=" "),
    _pair("NUL in a text", "prompt", "NUL", prompt="a\0b"),
    _pair("half a surrogate pair", "rejected", "half a surrogate", rejected="\ud83d"),
    _pair("text of ten megabytes", "chosen", "10000000 characters", chosen="a" * 10_000_000),
    _pair("chosen is rejected", "rejected", "the same text as the chosen", rejected=f" {PAIR['chosen']}\n"),
    _pair("kind a list", "kind", "a list", kind=["a"]),
    _pair("kind with half a surrogate pair", "kind", "half a surrogate", kind="\udc80"),
    # conversations
    _pair("no turns", "prompt", "empty", prompt=[]),
    _pair("turn a text", "prompt[0]", "no role and content", prompt=["Why?"]),
    _pair("turn of another format", "prompt[0]", "no role", prompt=[{"from": "human", "value": "a"}]),
    _pair("unknown role", "prompt[0]", "role 'tool'", prompt=[_turn("tool", "a")]),
    _pair("role a list", "prompt[0]", "role ['user']", prompt=[_turn(["user"], "a")]),
    _pair("role with escapes", "prompt[0]", r"\x1b", prompt=[_turn("\x1b[2J\n", "a")]),
    _pair("content of parts", "prompt[0]", "a list", prompt=[_turn("user", [{"type": "text"}])]),
    _pair("blank turn", "prompt[0]", "empty", prompt=[_turn("user", " ")]),
    _pair("prompt ends with an answer", "prompt", "turns of", prompt=[_turn("user", "a"), _turn("assistant", "b")]),
    _pair("two questions in a row", "prompt", "turns of", prompt=[_turn("user", "a"), _turn("user", "b")]),
    _pair("answer ends with a question", "chosen", "ends with a turn of the user", chosen=[_turn("user", "a")]),
    _pair(
        "answers to different prompts",
        "prompt",
        "differs from the turns",
        chosen=[_turn("user", "other"), _turn("assistant", "a")],
    ),
    # negatives and retain rows
    _negative("answer missing", "completion", "nearest column is 'completions'", completion=..., completions="a"),
    _negative("answer of a retain row missing", "completion", "retain_fields", "retain", completion=..., completio="a"),
    _negative("negative weight", "weight", "-0.5, expected", weight=-0.5),
    _negative("weight not a number", "weight", "nan, expected", weight=float("nan")),
    _negative("infinite weight", "weight", "inf, expected", weight=float("inf")),
    _negative("weight a text", "weight", "'1', expected", weight="1"),
    _negative("weight a truth value", "weight", "True, expected", weight=True),
    _negative("weight of 400 digits", "weight", "expected a finite", weight=10**400),
    _negative("unknown label", "label", "'safe', expected", label="safe"),
    _negative("label out of range", "label", "2, expected", label=2),
    _negative("label a list", "label", "expected true or false", label=[True]),
)


@dataclass(frozen=True)
class BadConfig:
    """A configuration with one fault.

    Attributes:
        name: what is wrong.
        yaml: the file.
        said: the beginning of the one message, after ``u2a config: ``; ``*`` stands for the file's path.
    """

    name: str
    yaml: str
    said: str


def _set(name: str, option: str, value: str, said: str) -> BadConfig:
    """One option set to a value in YAML notation; ``said`` follows the option's name."""
    text = value
    for part in reversed(option.split(".")):
        text = f"{{{part}: {text}}}"
    return BadConfig(name, text[1:-1] + "\n", f"{option}: {said}")


BAD_CONFIGS = (
    # unknown options
    BadConfig("option misspelt", "unlearn: {los: npo}", "unlearn.los: unknown option (did you mean unlearn.loss?)"),
    BadConfig("section misspelt", "unlern: {loss: npo}", "unlern: unknown option (did you mean unlearn?)"),
    BadConfig("wrong section", "solve: {learning_rate: 1}", "solve.learning_rate: unknown option (did you mean"),
    BadConfig("no section", "max_steps: 3", "max_steps: unknown option (did you mean unlearn.max_steps?)"),
    BadConfig("deep option misspelt", "model: {adapter: {rnk: 3}}", "model.adapter.rnk: unknown option"),
    BadConfig("like no other", "qqqqq: 1", "qqqqq: unknown option (u2a config --print lists them)"),
    BadConfig("key a number", "17: 1", "17: unknown option"),
    BadConfig("key with escapes", '"a\\nb\\e[2J": 1', r"a\nb\x1b[2J: unknown option"),
    BadConfig(
        "item misspelt",
        "evaluation: {prompt_sets: [{name: a, path: b.jsonl, want: refuse}]}",
        "evaluation.prompt_sets[0].want: unknown option (did you mean wanted?)",
    ),
    # types
    _set("truth value for a number", "seed", "true", "expected something else than true or false, got True"),
    _set("truth value in a list", "model.adapter.layers", "[0, true]", "expected something else than true or false"),
    _set("text for a switch", "data.allow_leak", '"true"', "expected one of true or false, got 'true'"),
    _set("number for a switch", "guard.line_search", "1", "expected one of true or false, got 1"),
    _set("null for a switch", "model.trust_remote_code", "null", "expected one of true or false, got None"),
    _set("text for a number", "unlearn.max_steps", "many", "Input should be a valid integer"),
    _set("half a step", "unlearn.max_steps", "1.5", "Input should be a valid integer, got a number with a fractional"),
    _set("list for a number", "unlearn.learning_rate", "[1]", "Input should be a valid number"),
    _set("number for a text", "output_dir", "5", "Input should be a valid string"),
    _set("text for a list", "evaluation.controls", "random_k", "Input should be a valid list"),
    _set("number for a section", "unlearn", "5", "expected options below it, got 5"),
    _set("nothing in a section", "unlearn", "", "expected options below it, got None"),
    _set("options below an option", "unlearn.max_steps", "{a: 1}", "Input should be a valid integer"),
    _set("null for a number", "seed", "null", "Input should be a valid integer"),
    _set("date for a number", "seed", "2026-11-21", "Input should be a valid integer"),
    _set("one of two kinds", "solve.damping", "some", "Input should be 'auto' or Input should be a valid number"),
    # ranges
    _set("learning rate 0", "unlearn.learning_rate", "0", "Input should be greater than 0, got 0"),
    _set("learning rate below 0", "finetune.learning_rate", "-1e-4", "Input should be greater than 0"),
    _set("learning rate not a number", "unlearn.learning_rate", ".nan", "Input should be"),
    _set("infinite budget", "guard.ppl_budget_frac", ".inf", "Input should be a finite number"),
    _set("no candidates", "solve.n_selected", "0", "Input should be greater than or equal to 1, got 0"),
    _set("candidates below 0", "solve.n_selected", "-5", "Input should be greater than or equal to 1, got -5"),
    _set("share of nothing", "solve.selected_frac", "0", "Input should be greater than 0"),
    _set("share above 1", "solve.selected_frac", "1.5", "Input should be less than or equal to 1"),
    _set("rank 0", "model.adapter.r", "0", "Input should be greater than or equal to 1"),
    _set("seed below 0", "seed", "-1", "Input should be greater than or equal to 0"),
    _set("too many folds", "solve.folds", "65", "Input should be less than or equal to 64"),
    _set("unknown loss", "unlearn.loss", "dpo", "Input should be 'ga', 'grad_diff' or 'npo', got 'dpo'"),
    _set("unknown dtype", "model.dtype", "int8", "Input should be 'float32'"),
    BadConfig("unknown control", "evaluation: {controls: [bogus]}", "evaluation.controls[0]: Input should be 'base'"),
    _set("output directory empty", "output_dir", '" "', "empty (name a directory)"),
    _set("NUL in a path", "data.pairs", '"a\\0b.jsonl"', "holds a NUL character"),
    _set("half a surrogate pair", "data.system_prompt", '"\\ud800"', "holds a NUL character or half"),
    # conflicts
    BadConfig("shares", "partition: {forget_frac: 0.9}", "partition: the five *_frac options sum to 1.55, expected 1"),
    BadConfig(
        "loss and retain term",
        "unlearn: {loss: grad_diff, retain_term: none}",
        "unlearn: loss 'grad_diff' conflicts with retain_term 'none'",
    ),
    BadConfig(
        "4 bits without an adapter",
        "model: {load_in_4bit: true, adapter: {enabled: false}}",
        "model.load_in_4bit conflicts with model.adapter.enabled: false",
    ),
    BadConfig("kl", "model: {adapter: {enabled: false}}\nunlearn: {retain_term: kl}", "unlearn.retain_term: kl confl"),
    BadConfig(
        "reward objective",
        "solve: {objective: reward}\nreward: {model: none}",
        "solve.objective: reward conflicts with reward.model: none",
    ),
    BadConfig("start without pairs", "finetune: {enabled: true}", "finetune.enabled: true conflicts with"),
    BadConfig("set named with a slash", "evaluation: {prompt_sets: [{name: ../x, path: a.jsonl}]}",
              "evaluation.prompt_sets[0]: every set needs a path and a name without a slash"),
    BadConfig("judge without an endpoint", "evaluation: {judge: {rubric: answered}}", "evaluation.judge: rubric"),
    # files
    BadConfig("key twice", "seed: 1\nunlearn: {}\nseed: 2\n", "*:3: seed: stands twice"),
    BadConfig("option twice", "unlearn:\n  loss: npo\n  loss: ga\n", "*:3: loss: stands twice"),
    BadConfig("not YAML", "a: [1\n", "*:2: not valid YAML"),
    BadConfig("tab", "unlearn:\n\tloss: npo\n", "*:2: not valid YAML"),
    BadConfig("list", "- a\n", "*: holds a list, expected sections"),
    BadConfig("text", "just words\n", "*: holds a str, expected sections"),
    BadConfig("two documents", "seed: 1\n---\nseed: 2\n", "*:2: not valid YAML"),
    BadConfig("Python object", "seed: !!python/object/apply:os.getpid []\n", "*:1: not valid YAML"),
    BadConfig("month 13", "seed: 2026-13-01\n", "*: not valid YAML (ValueError: month must be in 1..12"),
    BadConfig("empty number", "seed: !!int ''\n", "*: not valid YAML (IndexError"),
    BadConfig("no such alias", "seed: *nothing\n", "*:1: not valid YAML"),
    BadConfig("nested too deeply", "seed: " + "[" * 20_000, "*: not valid YAML (RecursionError"),
    BadConfig("circle", "data: &a [*a]\n", "*: more than 10000 values"),
    BadConfig(
        "a billion laughs",
        "a0: &a0 [x, x]\n" + "".join(f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 9)}]\n" for k in range(9)),
        "*: more than 10000 values",
    ),
)  # fmt: skip

_LONG = "Z" * 200
XSS = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</svg><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><animate onbegin=alert(1) attributeName=x></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "'><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "` onclick=alert(1) `",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<base href='https://example.com/'>",
    "<meta http-equiv='refresh' content='0;url=https://example.com'>",
    "<link rel=stylesheet href=https://example.com/x.css>",
    "<form action=https://example.com><input name=q></form>",
    "<!-- --!><script>alert(1)</script>",
    "<![CDATA[><script>alert(1)</script>]]>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "{{ 7 * 7 }}{% for x in range(9) %}<script>{% endfor %}",
    "<details open ontoggle=alert(1)>" + _LONG,
    "<scr\0ipt>alert(1)</scr\0ipt>",
    "\u202e<script>alert(1)</script>\u2028",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
)

MARKDOWN = (
    "a | b | c",
    "a\n| --- | --- |\n| x | y |",
    "`code` and ``` fences",
    "\\| escaped \\",
    "<script>alert(1)</script>",
    "[link](javascript:alert(1)) ![image](https://example.com/x.png)",
    "\n# heading\n\n---\n- item\n> quote",
    "**bold** *emphasis* <!-- comment",
    "- item",
    "1. item",
    "---",
    "~~~",
    "=cmd|'/C calc'!A0",
)

HOSTILE = (  # faults of a safetensors file
    "pickle",
    "torch.save",
    "truncated",
    "header cut",
    "header of an exabyte",
    "header longer than the file",
    "offsets outside",
    "empty",
    "missing tensor",
    "extra tensor",
    "wrong shape",
    "wrong dtype",
    "not finite",
)

TRAVERSAL = (
    "../x",
    "../../../../etc/passwd",
    "/etc/passwd",
    "..",
    "a/../../x",
    "./x",
    "..\\x",
    "x\0.jsonl",
    "%2e%2e/x",
    "~/x",
)

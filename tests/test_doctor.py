from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planted_overlaps import ENDS, KINDS, planted
from tiny import END, ask, examples, pairs, save_tiny, tiny_tokenizer
from u2a.config import ModelSection
from u2a.data import example_id, pair_id, prompt_key
from u2a.diagnosis import Diagnosis
from u2a.doctor import examine, examine_sets
from u2a.encoding import Encoder
from u2a.errors import DataError, ModelError
from u2a.folding import fold
from u2a.model_loading import load_tokenizer
from u2a.near_duplicates import alike, fingerprint, near_labels
from u2a.token_checks import PROBE
from u2a.types import Example, Message, Pair, Partition

LONG = " ".join(f"word{k}" for k in range(40))


def example(prompt: str, answer: str, source: str = "f:1") -> Example:
    return Example(id=example_id(ask(prompt), answer), prompt=ask(prompt), completion=answer, source=source)


def pair(prompt: str, chosen: str, rejected: str, source: str = "p:1") -> Pair:
    row_id = pair_id(ask(prompt), chosen, rejected)
    return Pair(id=row_id, prompt=ask(prompt), chosen=chosen, rejected=rejected, source=source)


def checks(diagnosis: Diagnosis) -> list[tuple[str, str, int]]:
    return [(finding.severity, finding.check, finding.count) for finding in diagnosis.findings]


# --- near-duplicates: against all pairs, compared naively ---------------------------------------


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} if len(words) > 2 else {tuple(words)}


def brute_force(texts: list[tuple[str, str]], labels: list[int]) -> list[int]:
    """Jaccard >= 0.9 of all pairs, in fractions; under one prompt the answers must be alike as well."""
    found = [0] * len(texts)
    for i, (prompt, answer) in enumerate(texts):
        for j, (other_prompt, other_answer) in enumerate(texts):
            sides = [(shingles(prompt) | shingles(answer), shingles(other_prompt) | shingles(other_answer))]
            sides += [(shingles(answer), shingles(other_answer))] if prompt == other_prompt else []
            if i != j and all(10 * len(a & b) >= 9 * len(a | b) for a, b in sides):
                found[i] |= labels[j]
    return found


@st.composite
def clusters(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Texts of a few words' alphabet in clusters of edited copies, so that similarities lie all around 0.9."""
    texts = []
    for cluster in range(draw(st.integers(1, 3))):
        words = [f"w{cluster}"] + draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=35))
        for _ in range(draw(st.integers(1, 5))):
            edited = list(words)
            for _ in range(draw(st.integers(0, 2))):
                edited[draw(st.integers(0, len(edited) - 1))] = draw(st.sampled_from("abcxyz"))
            edited = edited[: draw(st.integers(max(1, len(edited) - 3), len(edited)))]
            texts.append((draw(st.sampled_from(["p q", "p r s t u v"])), " ".join(edited)))
    return sorted(set(texts))


@settings(max_examples=300, deadline=None)
@given(clusters(), st.data())
def test_near_duplicates_are_those_of_all_pairs(texts, data):
    labels = data.draw(st.lists(st.sampled_from([1, 2, 4, 3]), min_size=len(texts), max_size=len(texts)))
    prints = [fingerprint(prompt, prompt, [answer]) for prompt, answer in texts]
    assert near_labels(prints, labels) == brute_force(texts, labels)


def test_the_threshold_is_met_exactly_at_nine_tenths():
    words = [f"w{k}" for k in range(40)]  # 38 shingles; cutting 4 of them from an end leaves 34/38, 3 leaves 35/38
    whole, closer, farther = (fingerprint(str(n), "", [" ".join(words[:n])]) for n in (40, 37, 36))
    assert alike(whole, closer) and 35 / 38 >= 0.9
    assert not alike(whole, farther) and 34 / 38 < 0.9
    nine_of_ten = [fingerprint(str(n), "", [" ".join(words[:n])]) for n in (12, 11)]  # 10 and 9 shingles
    assert near_labels(nine_of_ten, [1, 2]) == [2, 1]


def test_punctuation_does_not_count_and_scripts_without_spaces_are_cut():
    assert alike(fingerprint("a", "tea?", ["yes, please!"]), fingerprint("b", "tea", ["yes please"]))
    sentence = "これはとても長い日本語の文章ですから一文字の違いはほとんど影響しないはずです"
    longer = sentence + "ね"
    assert alike(fingerprint("a", "", [sentence]), fingerprint("b", "", [longer]))
    assert near_labels([fingerprint("a", "", ["!"]), fingerprint("b", "", ["?"])], [1, 1]) == [0, 0]  # no words


def test_copies_of_one_text_do_not_cost_the_square():
    copies = [fingerprint(str(n), "", [f"{LONG} {n}"]) for n in range(1500)]
    start = time.process_time()
    assert near_labels(copies, [1 + n % 2 for n in range(1500)]) == [3] * 1500
    assert time.process_time() - start < 3  # all pairs take about 10 s


# --- overlaps: four kinds between four pairs of sets --------------------------------------------


def as_row(name: str, text: tuple[str, str], place: str) -> Example | Pair:
    if name in ("forget", "retain", "holdout"):
        return example(*text, place)
    return pair(text[0], text[1], f"the worse one {place}", place)


@pytest.mark.parametrize("ends", ENDS, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_planted_overlaps_are_found_with_their_counts(ends, kind):
    first, second = ends
    sets = {name: [as_row(name, (f"Q {name} {k}", f"A {name} {k}"), f"{name}:{k}") for k in range(6)] for name in ends}
    for k in range(KINDS[kind]):
        here, there = planted(kind, k)
        sets[first].append(as_row(first, here, f"first:{k}"))
        sets[second].append(as_row(second, there, f"second:{k}"))
    expected = [row.id for row in sets[first][6:9]]
    others = {"holdout": sets.pop("holdout")} if "holdout" in sets else {}
    diagnosis = examine(Partition.model_validate(sets), others=others)
    (overlap,) = diagnosis.overlaps
    assert (overlap.first, overlap.second, overlap.level, overlap.count) == (first, second, kind, KINDS[kind])
    assert list(overlap.examples) == expected
    (finding,) = [found for found in diagnosis.findings if found.check == "overlap"]
    leak = second == "evaluation" and kind in ("exact", "folded")
    assert (finding.severity, finding.count) == ("error" if leak else "warning", KINDS[kind])
    assert finding.places == tuple(f"first:{k}" for k in range(min(3, KINDS[kind])))
    if leak:
        with pytest.raises(DataError, match=f"{KINDS[kind]} rows of {first} .*data.allow_leak=true"):
            diagnosis.refuse()
        diagnosis = examine(Partition.model_validate(sets), allow_leak=True)
        assert {found.severity for found in diagnosis.findings} == {"warning"}
    diagnosis.refuse()


def test_all_kinds_together_each_row_counts_once_at_its_strongest_level():
    forget, evaluation = [], []
    for kind, count in KINDS.items():
        for k in range(count):
            here, there = planted(kind, k)
            forget.append(example(*here))
            evaluation += [
                pair(there[0], "good " + kind + str(k), there[1]),
                pair(there[0], "other" + kind + str(k), "z"),
            ]
    diagnosis = examine_sets({"forget": forget, "evaluation": evaluation})
    assert {item.level: item.count for item in diagnosis.overlaps} == KINDS


def test_separate_sets_have_no_overlap_and_nothing_is_found():
    sets = {"forget": examples(20), "preference": pairs(20), "evaluation": pairs(20, start=50)}
    diagnosis = examine_sets(sets)
    assert diagnosis.overlaps == () and diagnosis.findings == () and diagnosis.lines() == ["nothing found"]
    assert [(item.name, item.rows, item.prompts, item.unit, item.cut) for item in diagnosis.sets] == [
        ("forget", 20, 20, "words", None),
        ("preference", 20, 20, "words", None),
        ("evaluation", 20, 20, "words", None),
    ]
    assert diagnosis.n_cut is None
    assert diagnosis.sets[0].lengths == tuple(2 + 2 + index % 4 for index in range(20))
    assert len(diagnosis.sets[1].lengths) == 40


# --- one set ------------------------------------------------------------------------------------


def test_repeats_and_near_duplicates_inside_a_set():
    rows = [example("q", f"one {LONG}", "f:1"), example("q", f"one {LONG}", "f:2"), example("Q ", f"ONE {LONG}", "f:3")]
    rows += [example("q", f"one {LONG} more", "f:4"), example("q", "short", "f:5"), example("r", "short", "f:6")]
    diagnosis = examine_sets({"forget": rows})
    (health,) = diagnosis.sets
    assert (health.rows, health.prompts) == (6, 2)
    assert (health.repeated, health.repeated_folded, health.near) == (1, 1, 2)
    assert [(found.severity, found.count, found.places) for found in diagnosis.findings] == [
        ("warning", 1, ("f:2",)),
        ("warning", 1, ("f:3",)),
        ("note", 2, ("f:1", "f:4")),
    ]


def test_pairs_that_share_one_answer_are_no_duplicates():
    rows = [pair("q", f"good {LONG}", f"bad {k} {LONG[:40]}") for k in range(3)]
    assert examine_sets({"preference": rows}).findings == ()
    swapped = [pair("q", LONG, LONG[::-1]), pair("q", LONG[::-1], LONG)]
    assert checks(examine_sets({"preference": swapped})) == [("warning", "contradiction", 2)]


def test_answers_good_in_one_set_and_bad_in_another():
    sets = {
        "retain": [example("q", "Yes"), example("r", "Yes")],
        "forget": [example("Q", " yes "), example("s", "Yes")],
    }
    diagnosis = examine_sets(sets)
    found = [finding for finding in diagnosis.findings if finding.check == "contradiction"]
    assert [(finding.count, finding.examples) for finding in found] == [(1, (sets["retain"][0].id,))]
    assert "good in retain and bad in forget" in found[0].text
    sets = {"preference": [pair("q", "a", "b")], "evaluation": [pair("q", "b", "c")]}
    texts = [finding.text for finding in examine_sets(sets).findings if finding.check == "contradiction"]
    assert texts == ["1 answer is good in evaluation and bad in preference (decide which)"]


# --- with a tokenizer ---------------------------------------------------------------------------


def test_lengths_and_cuts_are_those_of_the_encoder():
    rows = [*examples(5), example("N9: long?", "x" * 300)]
    encoder = Encoder(tiny_tokenizer(pad_is_eos=False), 200)
    diagnosis = examine_sets({"forget": rows}, encoder)
    roomy = Encoder(tiny_tokenizer(pad_is_eos=False), 10_000)
    expected = tuple(len(roomy.encode(row.prompt, row.completion).input_ids) for row in rows)
    assert diagnosis.sets[0].lengths == expected and diagnosis.sets[0].unit == "tokens"
    assert checks(diagnosis) == [("warning", "cut", 1)] and diagnosis.n_cut == 1
    assert diagnosis.findings[0].examples == (rows[5].id,)
    assert encoder.encode(rows[5].prompt, rows[5].completion).input_ids[-1] not in encoder.end_ids


def test_a_prompt_without_room_and_special_tokens_in_texts():
    rows = [example("y" * 300, "no"), example("q", f"fine{END}\nmore"), example("q", "fine")]
    diagnosis = examine_sets({"forget": rows}, Encoder(tiny_tokenizer(pad_is_eos=False), 200))
    assert checks(diagnosis) == [("error", "too long", 1), ("warning", "special tokens", 1)]
    assert [finding.examples for finding in diagnosis.findings] == [(rows[0].id,), (rows[1].id,)]
    assert diagnosis.sets[0].lengths[0] > 300
    one = examine_sets({"preference": [pair("y" * 300, "a", "b")]}, Encoder(tiny_tokenizer(pad_is_eos=False), 200))
    assert checks(one) == [("error", "too long", 1)]  # the pair counts once, though both answers fail
    reward = examine_sets({"reward": [pair("y" * 300, "a", "b")]}, Encoder(tiny_tokenizer(pad_is_eos=False), 200))
    assert reward.findings == () and (reward.sets[0].unit, reward.n_cut) == ("words", None)  # the policy never reads it


REFUSING = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TEMPLATES = {
    " ": [("error", "leaves the prompt out"), ("error", "leaves the answer out")],
    "{{ messages[0]['content'] }}": [("error", "leaves the answer out")],
    "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}": [("warning", "no generation prompt")],
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}": [
        ("warning", "does not begin as its prompt does"),
        ("note", "writes no end token"),
    ],
    "{{ raise_exception('never') }}": [("error", "cannot render a conversation: never")],
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_template_problems(template):
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    tokenizer.chat_template = template
    found = examine_sets({}, Encoder(tokenizer, 50)).findings
    assert [item.severity for item in found] == [severity for severity, _ in TEMPLATES[template]]
    assert all(text in item.text for item, (_, text) in zip(found, TEMPLATES[template], strict=True))


def test_padding_with_the_end_token_is_noted_and_a_good_tokenizer_is_not():
    assert checks(examine_sets({}, Encoder(tiny_tokenizer(pad_is_eos=True), 50))) == [("note", "pad token", 0)]
    assert checks(examine_sets({}, Encoder(tiny_tokenizer(pad_is_eos=False), 50))) == []
    bare = tiny_tokenizer()
    bare.pad_token = None
    (finding,) = examine_sets({}, Encoder(bare, 50)).findings
    assert "no token of its own" in finding.text


def test_rows_that_the_template_refuses():
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    tokenizer.chat_template = (
        REFUSING + "{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    system = Message(role="system", content="Be brief.")
    row = examples(1)[0]
    odd = row.model_copy(update={"prompt": (system, *row.prompt), "id": "odd"})
    diagnosis = examine_sets({"forget": [row, odd]}, Encoder(tokenizer, 200))
    assert ("error", "template", 1) in checks(diagnosis)
    assert len(diagnosis.sets[0].lengths) == 1


# --- the record ---------------------------------------------------------------------------------


def test_lines_are_sorted_by_severity_and_cannot_drive_the_terminal():
    rows = [example("q", "a", "f\x1b[2J:1"), example("q", "a", "f\x1b[2J\n:2"), example("y" * 300, "b", "f:3")]
    diagnosis = examine_sets({"forget": rows}, Encoder(tiny_tokenizer(), 100))
    lines = diagnosis.lines()
    assert [line.split(":")[0] for line in lines] == ["error", "warning", "note"]
    assert all(line.isprintable() for line in lines)
    assert lines[1].endswith(r"[f\x1b[2J\n:2]")


def test_a_diagnosis_survives_saving(tmp_path):
    diagnosis = examine_sets({"forget": examples(4), "evaluation": pairs(3)}, Encoder(tiny_tokenizer(), 60))
    assert Diagnosis.load(diagnosis.save(tmp_path / "diagnosis.json")) == diagnosis


def test_order_of_rows_changes_no_count():
    rows = [example(f"q{k % 3}", f"{LONG} {k}") for k in range(9)]
    both = [examine_sets({"forget": some, "preference": pairs(3)}) for some in (rows, rows[::-1])]
    assert checks(both[0]) == checks(both[1])
    assert {prompt_key(row.prompt) for row in rows} == {prompt_key(ask(fold(f"Q{k}"))) for k in range(3)}


def test_two_thousand_rows_take_less_than_two_seconds():
    rows = [example(f"question {k} of {k % 7}?", f"answer {k}: " + LONG[k % 50 :]) for k in range(1000)]
    held = [pair(f"held {k}?", f"fine {k} " + LONG[k % 60 :], f"bad {k}") for k in range(1000)]
    start = time.process_time()
    examine_sets({"forget": rows, "evaluation": held})
    assert time.process_time() - start < 2


QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_thoughts_between_prompt_and_answer_are_seen_and_an_option_of_the_template_removes_them(tmp_path):
    save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    tokenizer.chat_template = QWEN
    tokenizer.save_pretrained(tmp_path / "model")
    thinking, plain = (
        Encoder(load_tokenizer(ModelSection(name_or_path=str(tmp_path / "model"), template_options=options)), 200)
        for options in ({}, {"enable_thinking": False})
    )
    found = [item.text for item in examine_sets({}, thinking).findings]
    assert any("writes '<think>" in text and "enable_thinking: false" in text for text in found)
    assert not any("<think>" in item.text for item in examine_sets({}, plain).findings)
    answers = [each.tokenizer.decode(each.encode(PROBE, "Paris").answer_ids) for each in (thinking, plain)]
    assert "<think>" in answers[0] and "think" not in answers[1] and answers[1].startswith("Paris")
    with pytest.raises(ModelError, match="no name of a variable"):
        load_tokenizer(ModelSection(name_or_path=str(tmp_path / "model"), template_options={"a b": 1}))


def test_other_things_a_template_does_to_answers_are_seen():
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    closed = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    turns = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    cases = {
        "within a thought": QWEN.replace(closed, "<think>"),
        "prints today's date": "{{ strftime_now('%d') }}" + QWEN,
        "does not begin as its prompt does": turns + "{% if add_generation_prompt %}go{% endif %}",
    }
    for words, template in cases.items():
        tokenizer.chat_template = template
        assert any(words in item.text for item in examine_sets({}, Encoder(tokenizer, 50)).findings), words

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny import END, START, ask, examples, tiny_tokenizer
from u2a.encoding import Encoded, Encoder, collate, count_truncated, token_batches
from u2a.errors import DataError, ModelError
from u2a.types import Example, Message, Partition

ANSWERS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="<|"), min_size=1, max_size=40
)


def encoder(system_turn: bool = False, pad_is_eos: bool = True, max_length: int = 512) -> Encoder:
    return Encoder(tiny_tokenizer(system_turn, pad_is_eos), max_length)


def span(coder: Encoder, encoded: Encoded) -> tuple[str, str]:
    """Text of the prompt part and of the scored answer part."""
    cut = len(encoded.input_ids) - encoded.n_answer
    decode = coder.tokenizer.decode
    return decode(list(encoded.input_ids[:cut])), decode(list(encoded.input_ids[cut:]))


@pytest.mark.parametrize("pad_is_eos", [True, False], ids=["pad=eos", "own pad"])
@pytest.mark.parametrize("system_turn", [False, True], ids=["no system turn", "template's system turn"])
def test_the_answer_span_is_the_answer_and_its_end_token(system_turn: bool, pad_is_eos: bool) -> None:
    """Prints the span; nothing of the header is in it, its first and its end-of-turn token are."""
    coder = encoder(system_turn, pad_is_eos)
    prompt, answer = span(coder, coder.encode(ask("Tea?"), "Paris is nice"))
    print(f"prompt {prompt!r}\nscored {answer!r}")
    system = f"{START}system\nBe good.{END}\n" if system_turn else ""
    assert prompt == f"{system}{START}user\nTea?{END}\n{START}assistant\n"
    assert answer == f"Paris is nice{END}"


def test_a_system_turn_of_the_row_replaces_the_templates_own() -> None:
    coder = encoder(system_turn=True)
    prompt = (Message(role="system", content="Be brief."), *ask("Tea?"))
    text, answer = span(coder, coder.encode(prompt, "No"))
    assert text == f"{START}system\nBe brief.{END}\n{START}user\nTea?{END}\n{START}assistant\n"
    assert answer == f"No{END}"


def test_earlier_assistant_turns_are_not_scored() -> None:
    coder = encoder()
    prompt = (*ask("Tea?"), Message(role="assistant", content="Yes"), *ask("Sure?"))
    text, answer = span(coder, coder.encode(prompt, "No"))
    assert f"assistant\nYes{END}" in text
    assert answer == f"No{END}"


@given(ANSWERS)
def test_prompt_tokens_never_depend_on_the_answer(text: str) -> None:
    coder = encoder()
    encoded, head = coder.encode(ask("Tea?"), text), coder.encode_prompt(ask("Tea?"))
    assert encoded.input_ids[: len(head)] == head
    assert len(head) + encoded.n_answer == len(encoded.input_ids)
    assert encoded.answer_ids[-1] == 257
    assert coder.tokenizer.decode(list(encoded.answer_ids[:-1])) == text


@pytest.mark.parametrize("template_end", ["", "\n", END, f"{END}\n"])
def test_exactly_one_end_token_whatever_the_template_closes_with(template_end: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ '" + template_end.replace("\n", "\\n") + "' }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    coder = Encoder(tokenizer, 512)
    _, answer = span(coder, coder.encode(ask("Tea?"), "No"))
    assert answer == f"No{END}"


def test_the_models_further_end_tokens_count() -> None:
    """A generation config may list several; the answer ends at the template's own one."""
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    tokenizer.chat_template = tokenizer.chat_template.replace(END, "<|pad|>")
    coder = Encoder(tokenizer, 512, end_ids=[258])
    assert coder.encode(ask("Tea?"), "No").answer_ids[-1] == 258


def test_no_beginning_of_sequence_token_is_added_to_the_templates_own() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = START
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    ids = Encoder(tokenizer, 512).encode(ask("Tea?"), "No").input_ids
    assert list(ids).count(256) == 3  # bos, user turn, assistant turn


def test_no_space_is_put_before_the_answer_by_a_tokenizer_of_words() -> None:
    """A SentencePiece-like tokenizer starts each text with a space; behind the prompt there is none."""
    letters = sorted(set(f"\u2581\n{START}user{END}assistantTea?No thanks"))
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first")
    core.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END)
    tokenizer.chat_template = tiny_tokenizer().chat_template
    alone = tokenizer("No thanks", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(alone[:2]) == ["\u2581", "N"]
    coder = Encoder(tokenizer, 512)
    encoded = coder.encode(ask("Tea?"), "No thanks")
    assert tokenizer.convert_ids_to_tokens(list(encoded.answer_ids)) == [*"No\u2581thanks", END]
    whole = tokenizer(coder.prompt_text(ask("Tea?")) + f"No thanks{END}", add_special_tokens=False)["input_ids"]
    assert list(encoded.input_ids) == whole


def test_a_token_over_the_border_is_not_taken() -> None:
    """Where prompt and answer merge into one token the prompt keeps its own tokens."""
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["\u010aN"] = 500  # newline and N
    state["model"]["merges"] = [["\u010a", "N"]]
    merged = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)
    merged.chat_template = tokenizer.chat_template
    assert 500 in merged("\nNo", add_special_tokens=False)["input_ids"]
    encoded = Encoder(merged, 512).encode(ask("Tea?"), "No")
    assert merged.convert_ids_to_tokens(list(encoded.answer_ids)) == ["N", "o", END]
    assert merged.convert_ids_to_tokens(list(encoded.input_ids[:-3]))[-2:] == ["t", "\u010a"]


@given(ANSWERS)
def test_byte_level_answers_are_the_tokens_of_the_answer_alone(text: str) -> None:
    coder = encoder()
    alone = coder.tokenizer(f"{text}{END}", add_special_tokens=False)["input_ids"]
    assert list(coder.encode(ask("Tea?"), text).answer_ids) == alone


def test_truncation_is_counted_and_the_end_token_is_then_absent() -> None:
    whole = encoder().encode(ask("Tea?"), "0123456789")
    head = len(whole.input_ids) - whole.n_answer
    for room in range(1, whole.n_answer + 3):
        cut = encoder(max_length=head + room).encode(ask("Tea?"), "0123456789")
        assert cut.n_answer == min(room, 11)
        assert cut.n_cut == max(0, 11 - room)
        assert cut.answer_ids == whole.answer_ids[: cut.n_answer]
        assert len(cut.input_ids) <= head + room


def test_a_prompt_without_room_for_an_answer_is_an_error_that_names_the_row() -> None:
    head = len(encoder().encode_prompt(ask("Tea?")))
    with pytest.raises(DataError, match=rf"bad\.jsonl:7: prompt: {head} tokens .* max_length {head} \(raise"):
        encoder(max_length=head).encode(ask("Tea?"), "No", "bad.jsonl:7")


def test_a_tokenizer_without_template_or_end_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        Encoder(tokenizer, 64)
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        Encoder(tokenizer, 64)


def test_padding_token_falls_back_to_the_end_token() -> None:
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    tokenizer.pad_token = None
    assert Encoder(tokenizer, 64).pad_id == 257


def test_key_depends_on_tokens_and_on_the_mask() -> None:
    a, b, c = Encoded((1, 2, 3), 1), Encoded((1, 2, 3), 2), Encoded((1, 23), 1)
    assert len({a.key, b.key, c.key, Encoded((1, 2, 3), 1, n_cut=4).key}) == 3


SEQUENCES = st.lists(
    st.integers(2, 12).flatmap(
        lambda n: st.builds(
            Encoded, st.lists(st.integers(0, 9), min_size=n, max_size=n).map(tuple), st.integers(1, n - 1)
        )
    ),
    min_size=1,
    max_size=6,
)


@given(SEQUENCES, st.integers(0, 9))
def test_collate_keeps_every_token_and_puts_every_answer_at_the_end(items: list[Encoded], pad: int) -> None:
    batch = collate(items, pad)
    for row, item in enumerate(items):
        real = batch.attention_mask[row].bool()
        assert tuple(batch.input_ids[row][real].tolist()) == item.input_ids
        assert batch.position_ids[row][real].tolist() == list(range(len(item.input_ids)))
        assert tuple(batch.targets[row][batch.answer_mask[row]].tolist()) == item.answer_ids
        assert (batch.input_ids[row][~real] == pad).all()
        assert real[-1]
    assert batch.answer_mask.sum() == sum(item.n_answer for item in items)
    assert batch.targets.shape == batch.answer_mask.shape


@given(SEQUENCES, st.integers(1, 60))
def test_token_batches_hold_each_row_once_within_the_budget(items: list[Encoded], budget: int) -> None:
    batches = token_batches(items, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(items)))
    for batch in batches:
        width = max(len(items[index].input_ids) for index in batch)
        assert len(batch) == 1 or width * len(batch) <= budget
    widths = [len(items[index].input_ids) for batch in batches for index in batch]
    assert widths == sorted(widths, reverse=True)


def test_no_rows_no_batches() -> None:
    assert token_batches([], 10) == []


def test_batches_move_to_a_device() -> None:
    coder = encoder()
    batch = collate([coder.encode(row.prompt, row.completion) for row in examples(2)], coder.pad_id, "meta")
    assert {value.device for value in vars(batch).values()} == {torch.device("meta")}


def test_rows_that_the_template_refuses_are_one_clear_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    turns = (Message(role="system", content="Be safe."), Message(role="user", content="Q?"))
    rows = tuple(
        Example(id=str(k), prompt=turns[k % 2 :], completion="a", source=f"rows.jsonl:{k + 1}") for k in range(4)
    )
    with pytest.raises(DataError) as caught:
        count_truncated(Partition(forget=rows), Encoder(tokenizer, 100))
    assert [text.split(": ")[0] for text in caught.value.problems] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert "the chat template refuses the turns system, user (no system) (leave the row out)" in str(caught.value)

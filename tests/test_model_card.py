"""The model card: front matter that parses, code that compiles, numbers from the record, no foreign markup."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

import pytest
import yaml

from fake_records import ANSWERS, PROMPTS, empty_records, fake_records
from u2a.config import RunConfig
from u2a.model_card import model_card
from u2a.robustness.records import Kind, RobustnessRow, RobustnessTable

EVIL = "x|y `z` <script>alert(1)</script> [a](javascript:1)\n# heading\n---\n\"'"


def front_matter(card: str) -> dict[str, object]:
    """Parse as the hub does: from a first line ``---`` to the next line that is ``---``."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def code(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def test_front_matter() -> None:
    front = front_matter(model_card(fake_records(), "owner/model"))
    assert front == {"base_model": "owner/model", "library_name": "peft", "tags": ["u2a", "unlearning", "lora"]}


def test_full_fine_tuning_is_no_adapter() -> None:
    config = RunConfig.model_validate({"model": {"adapter": {"enabled": False}}})
    card = model_card(replace(fake_records(), config=config), "owner/model")
    assert front_matter(card)["library_name"] == "transformers"
    assert "lora" not in front_matter(card)["tags"]  # type: ignore[operator]
    assert "peft" not in code(card)


@pytest.mark.parametrize("base", ["owner/model", EVIL, "", 'a"; import os; "'])
def test_loading_code_names_the_base_and_nothing_else(base: str) -> None:
    card = model_card(fake_records(), base)
    strings = [node.value for node in ast.walk(ast.parse(code(card))) if isinstance(node, ast.Constant)]
    assert strings.count(base) == 1
    assert [type(node).__name__ for node in ast.parse(code(card)).body] == ["ImportFrom"] * 2 + ["Assign"] * 4


def test_a_packaged_base_is_resolved_first() -> None:
    lines = code(model_card(fake_records(), "package:some_model")).splitlines()
    assert "from u2a.packaged import resolve_model" in lines
    assert 'base = AutoModelForCausalLM.from_pretrained(resolve_model("package:some_model"))' in lines


def test_metrics_and_verdict_are_the_records() -> None:
    lines = model_card(fake_records(), "m").splitlines()
    assert "| metric | before | after | random_k |" in lines
    margin = next(line for line in lines if line.startswith("| preference_margin ↑"))
    assert margin.split(" | ")[2] == "-0.019 [-0.078, 0.044] (n = 24)"
    assert next(line for line in lines if line.startswith("| retain_ppl ↓")).split(" | ")[1].startswith("14.21 [12.90")
    assert any(line.startswith("selection beat random-k: not shown") for line in lines)


def test_sizes_steps_and_versions() -> None:
    card = model_card(fake_records(), "m")
    for line in (
        "- 60 negative candidates",
        "- 64 preference (PA) pairs",
        "- optimiser: AdamW, peak learning rate 0.0001",
        "- perplexity of the guard's retain rows: 14.21 to 15.20, budget 15.63",
        "- torch 2.13.0",
        "- Arm full exceeded the utility budget: its change was scaled by 0.750.",
    ):
        assert line in card.splitlines()
    assert "9f3c1a77b0d24e55" in card


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ((), "can bring behaviour back, and none of them was tried here."),
        (("none",), "can bring behaviour back, and none of them was tried here."),
        (("none", "quantised"), "in the run's report: quantisation; not tried: fine-tuning, other prompts)."),
        (("prompt", "relearned", "quantised"), "in the run's report: fine-tuning, quantisation, other prompts)."),
    ],
)
def test_the_attacks_that_were_tried_are_named(kinds: tuple[Kind, ...], said: str) -> None:
    rows = tuple(RobustnessRow(condition=kind, kind=kind, metric="reward", arms={}) for kind in kinds)
    table = RobustnessTable(original="before", arms=("before", "after"), rows=rows) if kinds else None
    assert said in model_card(replace(fake_records(), robustness=table), "m")


def test_no_text_of_the_data_is_published() -> None:
    card = model_card(fake_records(), "m")
    assert not any(text.strip() in card for text in (*PROMPTS, *ANSWERS))


def test_hostile_text_stays_text() -> None:
    card = model_card(fake_records(6, EVIL), EVIL)
    body = card.split("```")[0].split("\n---\n", 1)[1] + card.split("```")[2]
    body = re.sub(r"`[^`\n]*`", "", body)  # code spans are inert
    assert not re.search(r"(?<!\\)<script", body)
    assert not re.search(r"(?<!\\)\[a", body)
    assert front_matter(card)["base_model"] == EVIL
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert len(headings) == 1 + 6


def test_empty_records_give_an_honest_card() -> None:
    card = model_card(empty_records(), "m")
    assert "Not evaluated." in card
    assert "No unlearning run was recorded." in card
    assert "## Limitations" in card
    assert re.search(r"^- transformers \d", card, re.MULTILINE)

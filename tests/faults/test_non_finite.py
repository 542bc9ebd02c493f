"""Nothing is ever updated with a number that is not finite: every case of ``non_finite`` and whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaForCausalLM

from u2a.bilevel.linsolve import CG
from u2a.bilevel.vectors import dot, norm
from u2a.cli import main
from u2a.errors import NonFiniteError
from u2a.losses import NPO

from .non_finite import CASES, PLACES, POISON, Case

CONFIRMED_WHEN_HUGE = {  # the other huge numbers overflow, and are refused as the infinity they become
    "logits", "gradient 1", "per-sample score", "Hessian-vector product 1", "CG scalar", "omega step", "reward",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_poisoned_number_is_refused_or_computed_with_rightly(case: Case) -> None:
    ending = case.check()
    wanted = case.kind == "huge" and any(case.name.startswith(name) for name in CONFIRMED_WHEN_HUGE)
    assert ending == ("confirmed" if wanted else "error")


def test_eight_places_and_four_kinds_are_covered() -> None:
    assert len(PLACES) == 8 and len(POISON) == 4
    assert {(case.place, case.kind) for case in CASES} == {(place, kind) for place in PLACES for kind in POISON}


# --- whole runs ------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a run by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["NaN", "Inf"])
def test_a_run_poisoned_while_it_unlearns_leaves_its_finished_records_alone(
    poison: float, tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control's run meets the number; what was saved before is byte for byte as it was."""
    config = str(tiny_config())
    assert main(["run", config, "--quiet"]) == 0
    folder, calls, own = tmp_path / "run", [], NPO.per_sample
    for name in ("unlearn_random_k.json", "evaluation.json", "summary.json", "report.html"):
        (folder / name).unlink()
    before = tree(folder)

    def per_sample(self: NPO, answers: Any, reference: Any) -> torch.Tensor:
        calls.append(1)
        out = own(self, answers, reference)
        return out * poison if len(calls) == 3 else out

    with mock.patch.object(NPO, "per_sample", per_sample):
        assert main(["run", config, "--quiet"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("u2a run: non-finite loss in phase random_k, step 2, sample ")
    after = tree(folder)
    changing = {"run.yaml", "diagnosis.json", "partition.json"}  # written anew by every start
    assert {name: raw for name, raw in after.items() if name not in changing} == {
        name: raw for name, raw in before.items() if name not in changing
    }
    assert main(["run", config, "--quiet"]) == 0, "and it goes on once the number is fine"


def test_a_model_that_gives_nan_from_the_start_writes_no_record_of_a_stage(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = LlamaForCausalLM.forward

    def forward(self: Any, *positional: Any, **named: Any) -> Any:
        out = own(self, *positional, **named)
        out.logits = out.logits * math.nan
        return out

    with mock.patch.object(LlamaForCausalLM, "forward", forward):
        assert main(["run", str(tiny_config(reward={"model": "none"})), "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("u2a run: non-finite ")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not names & {"solution.json", "unlearn_u2a.json", "evaluation.json", "stages.json", "adapter"}


# --- the arithmetic below ----------------------------------------------------------------------------------


def test_the_length_of_a_vector_with_nan_is_nan_and_not_zero() -> None:
    for values in ([math.nan, 1.0], [math.nan, math.inf]):
        assert math.isnan(norm({"a": torch.tensor(values)}))
    assert norm({"a": torch.tensor([math.inf, 1.0])}) == math.inf


def test_an_inner_product_of_infinities_of_both_signs_is_nan_and_no_crash() -> None:
    left = {"a": torch.tensor([math.inf]), "b": torch.tensor([-math.inf])}
    assert math.isnan(dot(left, {"a": torch.ones(1), "b": torch.ones(1)}))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_right_side_that_is_not_finite_is_no_zero_solution(poison: float) -> None:
    right = {"x": torch.tensor([1.0, poison])}
    with pytest.raises(NonFiniteError, match="phase solve, step 0"):
        CG().solve(lambda vector: vector, right, 1.0)

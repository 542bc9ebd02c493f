"""Errors planted into a copy of the source, one at a time: of each, the test named beside it must fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED = 0, 1  # pytest's exit status


@dataclass(frozen=True)
class Mutant:
    """One planted error.

    Attributes:
        name: what is wrong.
        file: below ``src/u2a``.
        old: text that stands there once.
        new: the error.
        test: the test that must notice.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


LOSSES, TRAINER, GAINS = "tests/test_losses.py", "tests/test_trainer.py", "tests/bilevel/test_gains.py"
OBJECTIVE, MODELING = "tests/bilevel/test_objective.py", "tests/test_modeling.py"
MUTANTS = (
    Mutant(
        "wrong sign of gradient ascent",
        "losses.py",
        "    return mean_log_prob\n",
        "    return -mean_log_prob\n",
        f"{LOSSES}::test_values_by_hand",
    ),
    Mutant(
        "NPO pushes up",
        "losses.py",
        "F.softplus(beta * (sum_log_prob - reference_sum))",
        "F.softplus(beta * (reference_sum - sum_log_prob))",
        f"{LOSSES}::test_values_by_hand",
    ),
    Mutant(
        "wrong sign of the gains",
        "bilevel/gains.py",
        "_projected(-found.values",
        "_projected(found.values",
        f"{GAINS}::test_gains_equal_the_dense_hypergradient_fold_by_fold",
    ),
    Mutant(
        "chosen and rejected swapped",
        "bilevel/objective.py",
        "return encode(pair.prompt, pair.chosen, pair.source), encode(pair.prompt, pair.rejected, pair.source)",
        "return encode(pair.prompt, pair.rejected, pair.source), encode(pair.prompt, pair.chosen, pair.source)",
        f"{OBJECTIVE}::test_values_equal_the_formula_written_out_for_each_pair",
    ),
    Mutant(
        "answer mask one token short",
        "encoding.py",
        "answer_mask[row, answer - item.n_answer :] = True",
        "answer_mask[row, answer - item.n_answer + 1 :] = True",
        f"{MODELING}::test_padded_batches_equal_single_unpadded_forwards",
    ),
    Mutant(
        "logits one position late",
        "modeling.py",
        "logits = out.logits[:, -(width + 1) : -1]",
        "logits = out.logits[:, -width:]",
        f"{MODELING}::test_padded_batches_equal_single_unpadded_forwards",
    ),
    Mutant(
        "omega not applied",
        "inner_loss.py",
        "forget = (coefficients * losses).mean()",
        "forget = losses.mean()",
        f"{TRAINER}::test_every_weight_changes_the_update",
    ),
    Mutant(
        "retain term dropped",
        "inner_loss.py",
        "forget + self.retain_weight * retain",
        "forget + 0.0 * retain",
        f"{TRAINER}::test_retain_gradient_equals_the_dense_one",
    ),
    Mutant(
        "retain term left out of the curvature",
        "bilevel/inner_terms.py",
        "self.retain_weight / len(self.retain) * losses.sum()",
        "0.0 * losses.sum()",
        "tests/bilevel/test_curvature.py::test_gauss_newton_product_equals_the_matrix_from_jacobians_of_the_logits",
    ),
    Mutant(
        "gradient of J not divided by the number of pairs",
        "bilevel/objective.py",
        "gradient.to(total[name]) / len(items)",
        "gradient.to(total[name])",
        f"{OBJECTIVE}::test_gradient_equals_central_differences_of_the_mean",
    ),
    Mutant(
        "omega not scaled to mean 1",
        "trainer.py",
        "Sample(item, weight * scale, ref, k)",
        "Sample(item, weight, ref, k)",
        f"{TRAINER}::test_the_scale_of_the_weights_does_not_matter",
    ),
    Mutant(
        "seed ignored",
        "stream.py",
        "(seed * 1_000_003 + number)",
        "(number)",
        "tests/test_stream.py::test_seeds_and_numbers_give_different_orders",
    ),
    Mutant(
        "reference not detached from the change",
        "modeling.py",
        "with evaluation_mode(self.model), self.model.disable_adapter():",
        "with evaluation_mode(self.model):",
        f"{MODELING}::test_the_reference_is_the_start_and_the_change_survives_it",
    ),
    Mutant(
        "length normalisation dropped",
        "modeling.py",
        "return self.sum / self.count",
        "return self.sum",
        f"{OBJECTIVE}::test_values_equal_the_formula_written_out_for_each_pair",
    ),
    Mutant(
        "folds share prompts",
        "bilevel/outer_problem.py",
        "groups.setdefault(prompt_key(pair.prompt), []).append(pair)",
        "groups.setdefault(pair.id, []).append(pair)",
        "tests/bilevel/test_outer_problem.py::test_split_keeps_prompts_together_and_loses_nothing",
    ),
    Mutant(
        "interval over rows instead of prompts",
        "evaluation/stats.py",
        "names = sorted({groups.get(key, key) for key in keys})",
        "groups = {}\n    names = sorted({groups.get(key, key) for key in keys})",
        "tests/evaluation/test_eval_stats.py::test_cluster_bootstrap_covers_where_rows_share_their_prompt",
    ),
    Mutant(
        "mirror descent climbs",
        "bilevel/weight.py",
        "weights[support].log() - rate * gradient[support]",
        "weights[support].log() + rate * gradient[support]",
        "tests/bilevel/test_weight.py::test_mirror_step_is_its_closed_form_and_stays_on_the_simplex",
    ),
    Mutant(
        "damping subtracted",
        "bilevel/linsolve.py",
        "image = plus(matvec(direction), direction, damping)",
        "image = plus(matvec(direction), direction, -damping)",
        "tests/bilevel/test_linsolve.py::test_cg_equals_dense_solve_and_reports_the_true_residual",
    ),
    Mutant(
        "guard lets everything pass",
        "guard.py",
        "if ppl <= self.ppl_budget:",
        "if True:",
        "tests/test_guard.py::test_roll_back_returns_to_the_last_state_within_the_budget",
    ),
    Mutant(
        "failed micro-batch leaves its gradient",
        "batch_size.py",
        "if found is None or parameter.grad is None:",
        "if parameter.grad is None:",
        "tests/faults/test_out_of_memory.py::test_earlier_gradients_survive_a_failed_part",
    ),
    Mutant(
        "ties broken by rounding",
        "bilevel/select.py",
        "TIE = 1e-5",
        "TIE = 0.0",
        "tests/faults/test_determinism.py::test_a_block_is_the_start_of_the_ranking",
    ),
)


def run_mutants(mutants: Sequence[tuple[Mutant, list[str]]], folder: Path) -> list[dict[str, Any]]:
    """Plant each error into a copy of the source and run tests on it: exit status and output of pytest."""
    shutil.copytree(ROOT / "src" / "u2a", folder / "u2a", ignore=shutil.ignore_patterns("__pycache__"))
    each = [{"file": item.file, "old": item.old, "new": item.new, "tests": tests} for item, tests in mutants]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "faults" / "mutant_runner.py")],
        input=json.dumps({"source": str(folder), "mutants": each}),
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_planted() -> dict[str, int]:
    """Plant every error.

    Returns:
        ``mutants``, how many, and ``mutants_killed``, those that a test noticed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = run_mutants([(mutant, [mutant.test]) for mutant in MUTANTS], Path(folder))
    return {"mutants": len(MUTANTS), "mutants_killed": sum(item["status"] == FAILED for item in found)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_can_be_planted(mutant: Mutant) -> None:
    text = (ROOT / "src" / "u2a" / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1 and mutant.old != mutant.new
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    path, _, name = mutant.test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_there_are_more_than_ten_and_the_page_lists_them() -> None:
    assert len(MUTANTS) == len({mutant.name for mutant in MUTANTS}) >= 10
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [mutant.name for mutant in MUTANTS if f"| {mutant.name} |" not in page] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_mutant_is_killed_and_without_one_the_tests_pass(tmp_path: Path) -> None:
    """The first run has nothing planted, the second one an error that every import meets: the copy is what is run."""
    tests = list(dict.fromkeys(mutant.test for mutant in MUTANTS))
    clean = Mutant("nothing", "losses.py", "", "", "")
    broken = Mutant("no import", "errors.py", "from __future__", "raise RuntimeError('the copy')\nfrom __future__", "")
    plans = [(clean, tests), (broken, tests[:1]), *((mutant, [mutant.test]) for mutant in MUTANTS)]
    first, second, *others = run_mutants(plans, tmp_path)
    assert first["status"] == PASSED, first["said"]
    assert second["status"] not in (PASSED, FAILED), second["said"]
    alive = {mutant.name: item for mutant, item in zip(MUTANTS, others, strict=True) if item["status"] != FAILED}
    assert alive == {}

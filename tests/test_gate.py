"""--gate: the exit status follows the verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_records import fake_evaluation, fake_partition
from u2a.cli import main
from u2a.evaluation.verdict import answer_of, verdict
from u2a.types import Contrast

ANSWERS = {"yes": (0.1, 0.2), "no": (-0.2, -0.1), "not shown": (-0.1, 0.2)}


def sentence(answer: str) -> str:
    low, high = ANSWERS[answer]
    row = Contrast(
        metric="preference_margin", first="after", second="random_k", difference=(low + high) / 2, low=low, high=high,
        n=9,
    )  # fmt: skip
    return verdict([row])


def saved(folder: Path, text: str | None) -> Path:
    folder.mkdir()
    (folder / "run.yaml").write_text("seed: 1\n", encoding="utf-8")
    fake_partition(2).save(folder / "partition.json")
    if text is not None:
        fake_evaluation().model_copy(update={"verdict": text}).save(folder / "evaluation.json")
    return folder


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_answer_is_taken_from_the_sentence(answer: str) -> None:
    assert answer_of(sentence(answer)) == answer


@pytest.mark.parametrize(
    "text", ["", "yes", "selection beat random-k: ", "selection beat random-k: maybe (x)", "no (x)"]
)
def test_another_text_has_no_answer(text: str) -> None:
    assert answer_of(text) is None


@pytest.mark.parametrize(
    ("answer", "gate", "status"),
    [
        ("yes", "yes", 0), ("not shown", "yes", 1), ("no", "yes", 1),
        ("yes", "not-no", 0), ("not shown", "not-no", 0), ("no", "not-no", 1),
        ("no", None, 0),
    ],
)  # fmt: skip
def test_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str, gate: str | None, status: int
) -> None:
    folder = saved(tmp_path / "run", sentence(answer))
    assert main(["report", str(folder), *([] if gate is None else ["--gate", gate])]) == status
    assert (folder / "report.html").exists()  # written whatever the gate says
    assert (folder / "candidates.csv").exists()
    said = capsys.readouterr().err
    assert said == (f"u2a report: --gate {gate}: {sentence(answer)}\n" if status else "")


def test_a_text_that_is_no_verdict_passes_no_gate(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", "")
    assert main(["report", str(folder), "--gate", "not-no"]) == 1


def test_a_run_without_evaluation_cannot_be_gated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(saved(tmp_path / "run", None)), "--gate", "not-no"]) == 2
    assert "evaluation.json" in capsys.readouterr().err

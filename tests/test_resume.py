"""A run stopped at any step, round or fold and gone on with ends in the same bytes as one that was never stopped."""

from __future__ import annotations

import hashlib
import json
import pydoc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import u2a.parts
from tiny import examples, pairs, tiny_policy
from u2a import UnlearnConfig, UnlearnTrainer
from u2a.bilevel.outer_problem import OuterProblem
from u2a.bilevel.solve import score, solve
from u2a.config import GuardSection, SolveSection, UnlearnSection
from u2a.errors import RecordError, Stopped
from u2a.modeling import Policy
from u2a.progress import Console
from u2a.random_state import random_state
from u2a.signals import stopping
from u2a.tensor_tree import flatten, read_tree, tensors_id
from u2a.unlearn import InnerProblem, InnerSolver, unlearn

ROWS, RETAIN = examples(5), examples(4, start=50)
STEPS = 4
PER_EPOCH = 3  # steps, with two rows each


class Cut(Exception):
    """Stands for a kill: nothing in the package catches it."""


def with_chance(policy: Policy) -> Policy:
    """Put dropout into the attention of a policy, which takes it out: a resumed run must draw what it would have."""
    for module in policy.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    return policy


class DrawsAndCuts(TrainerCallback):
    """Draws from all global generators in every step, keeps the draws, and cuts the run after a step."""

    def __init__(self, cut: int | None = None) -> None:
        self.cut, self.draws = cut, {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.draws[state.global_step] = (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: NPY002

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.cut:
            raise Cut


def trainer(folder: Path, cut: int | None = None, **settings: Any) -> UnlearnTrainer:
    """A fresh trainer on a fresh policy."""
    policy = tiny_policy(settings.pop("model_seed", 0), adapter=settings.pop("adapter", True), lora_b_sd=0.0)
    if settings.pop("chance", False):
        policy = with_chance(policy)
    defaults: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "lr_scheduler_type": "cosine",
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "guard": False,
    }  # fmt: skip
    momentum = settings.pop("momentum", False)
    args = UnlearnConfig(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, **defaults | settings
    )
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=5e-3, momentum=0.9) if momentum else None
    return UnlearnTrainer(
        policy,
        None,
        args,
        list(ROWS),
        list(RETAIN),
        list(ROWS),
        callbacks=[DrawsAndCuts(cut)],
        optimizers=(optimizer, None),
    )


def everything(run: UnlearnTrainer) -> dict[str, str]:
    """Hashes of all that a finished training leaves."""
    tensors: dict[str, torch.Tensor] = {}
    assert run.optimizer is not None and run.lr_scheduler is not None
    document = flatten([run.optimizer.state_dict(), run.lr_scheduler.state_dict()], tensors)
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    guard = None if run.guard is None else [run.guard.measured, run.guard.breached, repr(run.guard_result)]
    texts = {
        "optimizer": document,
        "logs": logs,
        "guard": guard,
        "random": random_state(),
        "step": run.state.global_step,
    }
    found = {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for name, value in texts.items()
    }
    return found | {"theta": tensors_id(run.policy.snapshot()), "moments": tensors_id(tensors)}


def draws(run: UnlearnTrainer) -> dict[int, tuple[float, ...]]:
    return next(each for each in run.callback_handler.callbacks if isinstance(each, DrawsAndCuts)).draws


KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optim": "sgd"},
    "momentum": {"momentum": True},
    "accumulation": {"gradient_accumulation_steps": 3},
    "dropout": {"chance": True},
    "guard": {"guard": True, "guard_steps": 2, "ppl_budget_frac": 5.0},
    "breach": {"guard": True, "guard_steps": 1, "ppl_budget_frac": 0.02, "learning_rate": 2e-2},
    "breach scaled down at the end": {"guard": True, "guard_steps": 0, "ppl_budget_frac": 0.01, "learning_rate": 2e-2},
    "all weights": {"adapter": False, "learning_rate": 1e-3},
    "log every fourth step": {"logging_steps": 4},
    "clipped, rows of retain": {"max_grad_norm": 0.1, "retain_term": "kl"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_any_step_and_ends_the_same(tmp_path: Path, kind: str) -> None:
    """Parameters, moments, schedule, generators, history and guard; the runs share no object."""
    whole = trainer(tmp_path / "whole", **KINDS[kind] | {"save_strategy": "no"})
    whole.train()
    wanted, last = everything(whole), whole.state.global_step
    assert last == STEPS or (kind == "breach" and last < STEPS)
    assert whole.guard_result is None or whole.guard_result.breached == kind.startswith("breach")
    saving = trainer(tmp_path / "saves", **KINDS[kind])
    saving.train()
    assert everything(saving) == wanted
    for step in range(1, last + 1):
        torch.manual_seed(step)  # what a new process begins with does not matter
        rest = trainer(tmp_path / "rest", **KINDS[kind] | {"save_strategy": "no"})
        rest.train(resume_from_checkpoint=str(tmp_path / "saves" / f"checkpoint-{step}"))
        assert everything(rest) == wanted, step
        assert draws(rest) == {k: v for k, v in draws(whole).items() if k >= step}


def test_what_is_compared_tells_runs_apart(tmp_path: Path) -> None:
    """The check of the check: every hash changes with the seed."""
    found = []
    for seed in (0, 1):
        run = trainer(tmp_path / str(seed), save_strategy="no", seed=seed)
        run.train()
        found.append(everything(run))
    assert all(found[0][name] != found[1][name] for name in ("theta", "moments", "logs", "random"))


def test_dropout_depends_on_the_generator(tmp_path: Path) -> None:
    """Without its generator put back, the resumed run with dropout differs: the restored state is what does it."""
    whole = trainer(tmp_path / "whole", chance=True)
    whole.train()
    with pytest.raises(Cut):
        trainer(tmp_path / "cut", 2, chance=True).train()
    rest = trainer(tmp_path / "cut", chance=True)
    rest._load_rng_state = lambda checkpoint: None  # type: ignore[method-assign]
    rest.train(resume_from_checkpoint=True)
    assert everything(rest)["theta"] != everything(whole)["theta"]


def test_a_longer_run_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    """``max_steps`` raised afterwards: the first steps are not done again."""
    short = trainer(tmp_path, lr_scheduler_type="constant")
    short.train()
    longer = trainer(tmp_path, lr_scheduler_type="constant", max_steps=STEPS + 2)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == STEPS + 2
    assert sorted(draws(longer)) == [STEPS, STEPS + 1]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"data_seed": 3},
        {"per_device_train_batch_size": 3},
        {"retain_batch_size": 2},
        {"loss": "ga"},
        {"npo_beta": 0.2},
        {"retain_term": "kl"},
        {"retain_weight": 2.0},
        {"model_seed": 1},
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    trainer(tmp_path).train()
    with pytest.raises(RecordError, match="checkpoint of another run"):
        trainer(tmp_path, **change).train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(Cut):
        trainer(tmp_path / "cut", 3).train()
    path = tmp_path / "cut" / "checkpoint-3" / "state.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RecordError, match=r"'state\.safetensors' is not the file that was saved"):
        trainer(tmp_path / "cut").train(resume_from_checkpoint=str(path.parent))
    rest = trainer(tmp_path / "cut")
    rest.train(resume_from_checkpoint=True)
    assert "checkpoint-3" in caplog.text
    assert min(draws(rest)) == 2
    assert everything(rest) == everything(whole)
    with pytest.raises(RecordError, match="no whole checkpoint there"):
        trainer(tmp_path / "none").train(resume_from_checkpoint=True)


def test_no_checkpoint_holds_a_pickle(tmp_path: Path) -> None:
    trainer(tmp_path, save_total_limit=2).train()
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
    endings = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert endings <= {".json", ".safetensors", ".md"}


def test_the_best_checkpoint_stays_and_is_loaded(tmp_path: Path) -> None:
    """``load_best_model_at_end`` reads the package's own files."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    run = trainer(tmp_path, **settings, metric_for_best_model="loss", greater_is_better=True)
    seen: dict[int, str] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[state.global_step] = tensors_id(run.policy.snapshot())

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
            metrics["eval_loss"] = -abs(state.global_step - 2)

    run.add_callback(Watch())
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None
    assert tensors_id(run.policy.snapshot()) == seen[int(Path(best).name.split("-")[1])]


@pytest.mark.parametrize("budget", [100.0, 0.02])
def test_the_guard_tells_of_the_best_checkpoint_that_was_loaded(tmp_path: Path, budget: float) -> None:
    """Its result is measured on the policy that is left, also where the last step broke the budget."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 2e-2}
    run = trainer(
        tmp_path, **settings, metric_for_best_model="loss", greater_is_better=True, guard=True, guard_steps=1,
        ppl_budget_frac=budget,
    )  # fmt: skip

    class First(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
            metrics["eval_loss"] = -state.global_step

    run.add_callback(First())
    run.train()
    assert run.state.best_global_step == 1 and run.guard is not None and run.guard_result is not None
    result, left = run.guard_result, run.policy.perplexity(run.guard.rows)
    assert result.ppl_end == pytest.approx(left, rel=1e-6) and left <= result.ppl_budget
    assert result.steps_kept <= 1


def test_a_shorter_run_in_the_same_folder_keeps_its_own_checkpoints(tmp_path: Path) -> None:
    trainer(tmp_path, save_total_limit=1).train()
    second = trainer(tmp_path, save_total_limit=1, max_steps=2, learning_rate=1e-2)
    second.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert tensors_id(load_file(tmp_path / "checkpoint-2" / "parameters.safetensors")) == tensors_id(
        second.policy.snapshot()
    )


@pytest.mark.parametrize(("first", "second"), [(5.0, 0.02), (0.02, 5.0)])
def test_a_run_that_goes_on_under_another_budget_keeps_to_that(tmp_path: Path, first: float, second: float) -> None:
    settings = {"guard": True, "guard_steps": 1, "learning_rate": 2e-2, "lr_scheduler_type": "constant"}
    before = trainer(tmp_path, **settings, ppl_budget_frac=first, max_steps=2)
    before.train()
    after = trainer(tmp_path, **settings, ppl_budget_frac=second)
    after.train(resume_from_checkpoint=True)
    assert after.guard is not None and after.guard_result is not None
    assert after.policy.perplexity(after.guard.rows) <= after.guard_result.ppl_budget
    assert after.guard_result.breached == (second < first)
    assert after.state.global_step == (2 if second < first else STEPS)
    with pytest.raises(RecordError, match="saved with the collapse guard"):
        trainer(tmp_path, **settings | {"guard": False}).train(resume_from_checkpoint=True)


def test_a_stop_in_the_last_step_of_an_epoch_leaves_out_nothing(tmp_path: Path, no_request: None) -> None:
    by_epoch = {
        "eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch", "load_best_model_at_end": True,
        "max_steps": 2 * PER_EPOCH, "greater_is_better": True, "metric_for_best_model": "loss",
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", **by_epoch)
    whole.train()
    cut = trainer(tmp_path / "cut", **by_epoch)

    class AsksAtTheEnd(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == PER_EPOCH - 1:
                stopping.requested = 15

    cut.add_callback(AsksAtTheEnd())
    with pytest.raises(Stopped):
        cut.train()
    stopping.requested = None
    rest = trainer(tmp_path / "cut", **by_epoch)
    rest.train(resume_from_checkpoint=True)
    told = [[(e["step"], e.get("loss"), e.get("eval_loss")) for e in run.state.log_history] for run in (rest, whole)]
    assert told[0][:-1] == told[1][:-1]  # the last one tells the time that was taken
    assert rest.state.best_global_step == whole.state.best_global_step
    assert tensors_id(rest.policy.snapshot()) == tensors_id(whole.policy.snapshot())


# --- by time, and on request ------------------------------------------------------------------------


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that moves 40 s per step, two minutes are over after every third step."""
    clock = {"now": 0.0}

    class Tick(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock["now"] += 40.0

    run = trainer(tmp_path, save_strategy="no", save_minutes=2.0, max_steps=8)
    run.add_callback(Tick())
    monkeypatch.setattr("u2a.trainer_checkpoint.time.monotonic", lambda: clock["now"])
    run.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]


@pytest.fixture
def no_request() -> Any:
    yield
    stopping.requested = None


class Asks(TrainerCallback):
    """Asks for a stop within a step, as a signal does."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            stopping.requested = 15


@pytest.mark.parametrize("saves", [True, False])
def test_a_stop_that_was_asked_for_saves_first(tmp_path: Path, saves: bool, no_request: None) -> None:
    settings = {"save_steps": 100} if saves else {"save_strategy": "no"}
    whole = trainer(tmp_path / "whole", gradient_accumulation_steps=2)
    whole.train()
    run = trainer(tmp_path / "cut", gradient_accumulation_steps=2, **settings)
    run.add_callback(Asks())
    with pytest.raises(Stopped) as caught:
        run.train()
    assert caught.value.exit_status == 143
    assert run.state.global_step == 2
    stopping.requested = None
    if not saves:
        assert not (tmp_path / "cut").exists() or not list((tmp_path / "cut").iterdir())
        return
    rest = trainer(tmp_path / "cut", gradient_accumulation_steps=2, **settings)
    rest.train(resume_from_checkpoint=True)
    assert everything(rest) == everything(whole)
    assert min(draws(rest)) == 2


# --- the inner problem and the search ---------------------------------------------------------------


def inner_problem(**changes: Any) -> InnerProblem:
    section = UnlearnSection(max_steps=3, batch_size=2, retain_batch_size=2, learning_rate=3e-3, **changes)
    return InnerProblem(ROWS, RETAIN, RETAIN[:2], section, GuardSection(every_steps=1, ppl_budget_frac=3.0), 7)


def outer_problem(folder: Path | None, **changes: Any) -> OuterProblem:
    settings: dict[str, Any] = {
        "rounds": 2, "folds": 2, "heldout_frac": 0.3, "warmup_steps": 1, "adjoint": "implicit", "cg_steps": 3,
        "fallback": "none", "n_selected": 3, "patience": 3, "refine_adjoint": "unrolled",
    }  # fmt: skip
    return OuterProblem(pairs(9), SolveSection(**settings | changes), checkpoints=folder)


@pytest.mark.parametrize("kept", ["save_steps", "nothing"])
def test_the_inner_problem_goes_on_with_its_guard(tmp_path: Path, kept: str) -> None:
    problem = inner_problem(save_steps=1 if kept == "save_steps" else 0)
    policy = tiny_policy()
    whole = unlearn(policy, problem, problem.uniform())

    class Cuts:
        def advance(self, n: int = 1, note: str = "") -> None:
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 3:
                raise Cut

    with pytest.raises(Cut):
        unlearn(tiny_policy(), problem, problem.uniform(), output_dir=tmp_path, advance=Cuts())
    rest = tiny_policy()
    found = unlearn(rest, problem, problem.uniform(), output_dir=tmp_path)
    assert timeless(found) == timeless(whole)
    assert tensors_id(rest.snapshot()) == tensors_id(policy.snapshot())


def timeless(record: Any) -> str:
    """A record as JSON without the seconds it took."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "seconds"}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return json.dumps(strip(record.model_dump(mode="json")))


@contextmanager
def cut_at(target: str, call: int | None) -> Iterator[list[int]]:
    """Make the n-th call of a function (0-based) a kill; yields the list of calls that were let through."""
    original, calls = pydoc.locate(target), []

    def counted(*args: Any, **named: Any) -> Any:
        if len(calls) == call:
            raise Cut
        calls.append(1)
        return original(*args, **named)  # type: ignore[operator]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, counted)
        yield calls


def searched(folder: Path | None, **changes: Any) -> tuple[str, str, list[str]]:
    """Solution, theta and rounds told, of a search with fresh objects."""
    policy, told = tiny_policy(), []
    solution = solve(
        InnerSolver(policy), inner_problem(), outer_problem(folder, **changes), Console(quiet=True), told.append
    )
    return timeless(solution), tensors_id(policy.snapshot()), [timeless(each) for each in told]


PLACES = {
    "training step": "u2a.trainer.UnlearnTrainer.training_step",
    "gradient of a fold": "u2a.bilevel.fold_gradients.objective_gradient",
    "linear solve": "u2a.bilevel.linsolve.CG.solve",
    "scoring of a batch": "u2a.bilevel.backward._Taps.measure",
    "state of a round": "u2a.bilevel.solve.save_state",
    "J": "u2a.bilevel.monitor.objective_values",
}
KEPT = ("gradient of a fold", "linear solve", "scoring of a batch")


@pytest.fixture
def keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every part at once, however quickly it was found."""
    monkeypatch.setattr(u2a.parts, "WORTH_S", 0.0)
    monkeypatch.setattr(u2a.parts, "EVERY_S", 0.0)


@pytest.fixture(scope="module")
def unbroken() -> tuple[str, str, list[str]]:
    return searched(None)


@pytest.mark.parametrize("place", PLACES)
def test_the_search_cut_at_any_call_ends_the_same(
    tmp_path: Path, keeps_all: None, unbroken: tuple[str, str, list[str]], place: str
) -> None:
    """Killed at several calls of each kind of work; what was kept is not done again."""
    with cut_at(PLACES[place], None) as calls:
        searched(None)
    total = len(calls)
    assert total >= 2
    for call in sorted({total // 2, total - 1}):
        folder = tmp_path / str(call)
        with cut_at(PLACES[place], call) as before, pytest.raises(Cut):
            searched(folder)
        with cut_at(PLACES[place], None) as after:
            assert searched(folder) == unbroken, call
        if place in KEPT:
            assert len(before) + len(after) == total, call


@pytest.mark.parametrize("place", ["scoring of a batch", "training step", "state of a round"])
def test_a_search_from_theta_0_finds_the_same_references_after_a_kill(
    tmp_path: Path, keeps_all: None, place: str
) -> None:
    """Its scoring finds them on the way; a resumed process, which has no scoring to do, asks for them."""
    changes = {"warmup_steps": 0, "adjoint": "identity", "scorer": "backward"}
    with cut_at(PLACES[place], None) as calls:
        whole = searched(None, **changes)
    for call in sorted({len(calls) // 2, len(calls) - 1}):
        folder = tmp_path / str(call)
        with cut_at(PLACES[place], call), pytest.raises(Cut):
            searched(folder, **changes)
        assert searched(folder, **changes) == whole, call


def test_a_search_stopped_after_every_round_in_turn(
    tmp_path: Path, unbroken: tuple[str, str, list[str]], no_request: None
) -> None:
    """Each process does one round and is asked to stop; the last one finishes."""
    policy, outer, n = tiny_policy(), outer_problem(tmp_path), 0
    for n in range(10):
        policy, ask = tiny_policy(), AsksAfter(n)
        try:
            found = solve(InnerSolver(policy), inner_problem(), outer, Console(quiet=True), ask)
        except Stopped:
            stopping.requested = None
            assert rounds_kept(tmp_path) == n + 1
            continue
        assert (timeless(found), tensors_id(policy.snapshot())) == unbroken[:2]
        break
    assert n >= 1


class AsksAfter:
    """Asks for a stop at the first round that is told after ``n`` that were read back."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, record: Any) -> None:
        self.left -= 1
        if self.left == -1:
            stopping.requested = 15


def rounds_kept(folder: Path) -> int:
    return len(read_tree(folder / "search", "search")["rounds"])


def test_another_search_does_not_take_the_state(tmp_path: Path, keeps_all: None) -> None:
    with cut_at(PLACES["training step"], 6), pytest.raises(Cut):
        searched(tmp_path)
    assert searched(tmp_path, mirror_rate=0.7) == searched(None, mirror_rate=0.7)


SLOW_SCORERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("backward", "jvp", "one_sided")]


@pytest.mark.parametrize("scorer", ["central", *SLOW_SCORERS])
def test_scores_cut_in_any_batch_are_the_same(tmp_path: Path, keeps_all: None, scorer: str) -> None:
    """One forward batch per two candidates, so that a cut falls into the middle of a pass."""

    def scored(folder: Path | None) -> str:
        policy = tiny_policy(token_budget=120)
        return timeless(score(policy, inner_problem(), outer_problem(folder, scorer=scorer), Console(quiet=True)))

    other = "u2a.bilevel.candidates.CandidateLosses.of"
    place = PLACES["scoring of a batch"] if scorer == "backward" else other
    with cut_at(place, None) as calls:
        wanted = scored(None)
    assert len(calls) > 2
    for call in sorted({1, len(calls) // 2, len(calls) - 1}):
        with cut_at(place, call), pytest.raises(Cut):
            scored(tmp_path / str(call))
        assert scored(tmp_path / str(call)) == wanted, call


@pytest.mark.parametrize("scorer", ["backward", "central"])
@pytest.mark.parametrize(("first", "second"), [(120, 1024), (300, 450)])
def test_scores_cut_under_one_token_budget_go_on_under_another(
    tmp_path: Path, keeps_all: None, scorer: str, first: int, second: int
) -> None:
    """Other batches: what is left over is told by row, not by the number of batches that were done."""

    def scored(folder: Path | None, budget: int) -> list[float]:
        policy = tiny_policy(token_budget=budget)
        inner = InnerProblem(examples(24), section=UnlearnSection(loss="ga", retain_term="none"))
        outer = outer_problem(folder, scorer=scorer, warmup_steps=0, adjoint="identity")
        return [row.gain for row in score(policy, inner, outer, Console(quiet=True)).rows]

    other = "u2a.bilevel.candidates.CandidateLosses.of"
    place = PLACES["scoring of a batch"] if scorer == "backward" else other
    with cut_at(place, None) as calls:
        wanted = scored(None, first)
    with cut_at(place, max(1, len(calls) // 2)), pytest.raises(Cut):
        scored(tmp_path, first)
    assert scored(tmp_path, second) == pytest.approx(wanted, rel=2e-2, abs=1e-4)
    assert all(wanted)


def test_a_search_kept_in_a_folder_is_that_of_its_model_and_chat_template(tmp_path: Path) -> None:
    """Two searches through the Python interface with one folder: the second one must not be given the first one's."""

    def chosen(policy: Policy, folder: Path | None) -> str:
        outer = outer_problem(folder, final_refine=False)
        return timeless(solve(InnerSolver(policy), inner_problem(), outer, Console(quiet=True)))

    def templated() -> Policy:
        policy = tiny_policy()
        policy.encoder.tokenizer.chat_template = policy.encoder.tokenizer.chat_template.replace("\n", " ")
        return policy

    first = chosen(tiny_policy(), tmp_path)
    for other in (lambda: tiny_policy(seed=1), templated):
        alone = chosen(other(), None)
        assert chosen(other(), tmp_path) == alone != first
    assert chosen(templated(), tmp_path) == alone  # its own state is still taken

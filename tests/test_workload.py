"""What a forecast says of each phase is what the run then does, wherever options change the work."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
)

from e2e.conftest import pair_rows, tiny_config, tiny_files, write_jsonl  # noqa: F401  # fixtures
from forecast_kit import BARE, EMBEDDER, SIMPLE, Both, both, workload_of
from tiny import pairs, save_tiny, tiny_model, tiny_tokenizer
from u2a.bilevel.candidates import CandidateLosses
from u2a.bilevel.curvature import GaussNewtonOperator
from u2a.bilevel.trajectory import plan_of
from u2a.config_file import load_config
from u2a.config_reward import RewardSection
from u2a.errors import ModelError
from u2a.forecast.dry_run import dry_run
from u2a.forecast.flops import Shape, sizes_of
from u2a.forecast.phases import Basis, phase_costs
from u2a.forecast.probe import Measured, Meter, Probe, Unit
from u2a.forecast.reward_probe import probe_reward
from u2a.model_loading import shapes_of
from u2a.pipeline import Pipeline
from u2a.progress import Console
from u2a.reward import lm_head, models
from u2a.reward.embedding import Embedder, train_embedding_reward
from u2a.reward.lm_head import load_hidden_states, train_language_model_reward
from u2a.unlearn import InnerProblem


@pytest.fixture
def configure(tiny_config: Callable[..., Path]) -> Callable[..., Path]:  # noqa: F811
    return tiny_config


def told(done: Both, phase: str) -> float:
    """Operations of a phase by the forecast."""
    return sum(cost.flops or 0.0 for cost in done.forecast.phases if cost.name == phase)


def test_a_lone_round_that_nothing_judges_leaves_all_of_its_training_to_stage_4(configure: Callable[..., Path]) -> None:
    done = both(configure(**BARE), "solve.heldout_frac=0", "model.attention=eager")
    assert [phase.name for phase in done.forecast.phases] == list(done.console.seconds)
    assert "inner run, round 1" not in done.console.seconds
    assert told(done, "unlearn u2a") == pytest.approx(done.console.flops["unlearn u2a"], rel=0.10)


def test_without_held_out_prompts_nothing_judges_a_round(configure: Callable[..., Path]) -> None:
    done = both(configure(**BARE), "solve.heldout_frac=0", "model.attention=eager")
    assert [phase.name for phase in done.forecast.phases] == list(done.console.seconds)
    assert told(done, "unlearn u2a") == pytest.approx(done.console.flops["unlearn u2a"], rel=0.10)


def test_linear_solves_are_told_for_every_direction(
    configure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["solve.adjoint=implicit", "solve.curvature=gauss_newton", "solve.cg_steps=3", "solve.cg_tol=1e-12"]
    options += ["solve.remove_common=true", "solve.damage_weight=0.5", "solve.heldout_frac=0"]
    config = load_config(configure(**BARE), options, None)
    expected = sum(work.times for work in workload_of(config).phases["linear solve"])
    products = []
    product = GaussNewtonOperator.product
    monkeypatch.setattr(
        GaussNewtonOperator, "product", lambda self, vector: products.append(1) or product(self, vector)
    )
    Pipeline(config, Console(quiet=True)).scores()
    assert len(products) == expected == (3 + 2) * (3 + 1), "per direction three steps and the residual"


# --- reward models -------------------------------------------------------------------------------


def save_classifier(folder: Path, kind: type[PreTrainedModel] = LlamaForSequenceClassification) -> Path:
    """A classifier of one label around a tiny model."""
    settings = tiny_model().config
    settings.num_labels = 1
    kind(settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_pretrained_reward_model_is_tried_without_pairs_of_its_own(
    configure: Callable[..., Path], tmp_path: Path
) -> None:
    rewards = {
        "model": "sequence_classification", "name_or_path": str(save_classifier(tmp_path / "rm")), "eval_model": "none",
    }  # fmt: skip
    shares = {"forget_frac": 0.3, "preference_frac": 0.4, "reward_frac": 0.0, "evaluation_frac": 0.3}
    config = load_config(configure(**BARE | {"reward": rewards, "partition": shares}), [], None)
    forecast = dry_run(config, Console(quiet=True))
    assert not workload_of(config).partition.reward
    assert next(phase.flops or 0.0 for phase in forecast.phases if phase.name == "reward analysis") > 0


def test_a_head_on_sentence_embeddings_costs_what_its_encoder_costs(
    configure: Callable[..., Path], tmp_path: Path
) -> None:
    rows = pairs(40)
    head = train_embedding_reward(Embedder(EMBEDDER), rows).save(tmp_path / "head")
    cpu = torch.device("cpu")
    encoder = probe_reward(RewardSection(model="embedding", name_or_path=EMBEDDER), rows, cpu).unit
    found = probe_reward(RewardSection(model="head", name_or_path=str(head)), rows, cpu).unit
    assert found.flops == pytest.approx(encoder.flops, rel=0.01)
    assert found.flops > 2 * 10_000_000, "at least two operations per weight of the encoder's body and text"
    assert probe_reward(RewardSection(model="embedding", name_or_path=EMBEDDER), rows[:1], cpu).unit.flops > 0


def test_a_head_on_a_language_model_reads_answers_and_one_on_an_encoder_texts(
    configure: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    save_tiny(model)
    states = load_hidden_states(str(model), "cpu")
    causal = train_language_model_reward(states, pairs(8)).save(tmp_path / "causal")
    encoder = train_embedding_reward(Embedder(EMBEDDER), pairs(8)).save(tmp_path / "encoder")

    def texts(folder: Path) -> float:
        rewards = {"model": "none", "eval_model": "head", "eval_name_or_path": str(folder)}
        workload = workload_of(load_config(configure(**BARE | {"reward": rewards}), [], None))
        assert (sets := workload.partition).evaluation
        sides = [pair.chosen for pair in sets.evaluation], [pair.rejected for pair in sets.evaluation]
        prompts = {pair.prompt[0].content for pair in sets.evaluation}
        expected = 2 * len(sets.evaluation) if folder == causal else len(prompts | {*sides[0], *sides[1]})
        assert sum(work.times for work in workload.phases["reward card"]) == expected
        return expected

    assert texts(causal) != texts(encoder)


def test_a_run_with_a_trained_head_is_let_through_and_told(configure: Callable[..., Path], tmp_path: Path) -> None:
    head = train_embedding_reward(Embedder(EMBEDDER), pairs(8)).save(tmp_path / "head")
    rewards = {"model": "head", "name_or_path": str(head), "eval_model": "none"}
    done = both(configure(**BARE | {"reward": rewards}))
    assert [phase.name for phase in done.forecast.phases] == list(done.console.seconds)
    assert told(done, "reward analysis") == pytest.approx(done.console.flops["reward analysis"], rel=0.5)
    nowhere = load_config(tmp_path / "config.yaml", [f"reward.name_or_path={tmp_path / 'nowhere'}"], None)
    with pytest.raises(ModelError, match="reward.name_or_path: .*no (readable )?reward head there"):
        dry_run(nowhere, Console(quiet=True))


@pytest.mark.parametrize("kind", ["sequence_classification", "token_value_head", "language_model"])
def test_the_reward_analysis_is_told_by_all_answers_that_it_reads(
    configure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made = {"token_value_head": LlamaForTokenClassification, "language_model": LlamaForCausalLM}
    folder = save_classifier(tmp_path / "rm", made.get(kind, LlamaForSequenceClassification))
    rewards = {"model": kind, "name_or_path": str(folder), "eval_model": "none"}
    config = load_config(configure(**BARE | {"reward": rewards}), [], None)
    expected = sum(work.times for work in workload_of(config).phases["reward analysis"])
    pipeline = Pipeline(config, Console(quiet=True))
    assert pipeline._selecting_reward
    read = []
    for module in (lm_head, models):
        forward = module.forward_batches
        monkeypatch.setattr(
            module, "forward_batches", lambda rows, *rest, f=forward: read.append(len(rows)) or f(rows, *rest)
        )
    pipeline.rewards()
    assert sum(read) == expected


def test_the_analysis_by_an_implicit_reward_is_told_with_both_of_its_passes(configure: Callable[..., Path]) -> None:
    done = both(configure(**SIMPLE | {"reward": {"model": "implicit", "eval_model": "none"}}), "model.attention=eager")
    assert told(done, "reward analysis") == pytest.approx(done.console.flops["reward analysis"], rel=0.20)


def test_an_expected_reward_is_told_with_the_answers_that_are_drawn_for_it(
    configure: Callable[..., Path], tmp_path: Path
) -> None:
    rewards = {
        "model": "sequence_classification", "name_or_path": str(save_classifier(tmp_path / "rm")), "eval_model": "none",
    }  # fmt: skip
    options = {"objective": "reward", "reward_samples": 3, "reward_max_new_tokens": 12, "heldout_frac": 0.3}
    path = configure(**BARE | {"reward": rewards, "solve": SIMPLE["solve"] | options})
    done = both(path, "model.attention=eager")
    for name in ("measure start", "measure round"):
        assert told(done, name) == pytest.approx(done.console.flops[name], rel=0.15), name
    real = done.console.flops["gradient of J"] + done.between_phases  # answers are drawn before the phase begins
    assert told(done, "gradient of J") == pytest.approx(real, rel=0.15)


def test_dry_run_and_run_let_reward_models_read_prompts_as_long_as_the_data_s(
    configure: Callable[..., Path],
    tiny_files: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    rows = [row | {"prompt": row["prompt"] + " x" * 300 * (k % 2)} for k, row in enumerate(pair_rows(60))]
    rewards = {
        "model": "language_model", "name_or_path": str(tiny_files / "model"),
        "eval_model": "language_model", "eval_name_or_path": str(tiny_files / "model"),
    }  # fmt: skip
    path = configure(**SIMPLE | {"reward": rewards})
    options = [f"data.pairs={write_jsonl(tmp_path / 'long.jsonl', rows)}", "data.max_length=1024"]
    assert not both(path, *options).forecast.advice


# --- files ---------------------------------------------------------------------------------------


def test_sizes_of_files_that_hold_the_candidates_texts(configure: Callable[..., Path], tmp_path: Path) -> None:
    tail = " ".join(f"wörd{k}" for k in range(300))
    rows = [{"prompt": f"N{k}: tea {k * 7919 % 1009}?", "completion": f"never {k} {tail}"} for k in range(60)]
    options = [f"data.forget={write_jsonl(tmp_path / 'long.jsonl', rows)}", "partition.forget_frac=0"]
    options += ["partition.preference_frac=0.5", "evaluation.controls=[]", "data.max_length=300"]
    done = both(configure(**BARE), *options)
    sizes = {file.path: file.bytes or 0 for file in done.forecast.files}
    for name in ("candidates.csv", "report.html", "partition.json"):
        assert sizes[name] == pytest.approx((done.folder / name).stat().st_size, rel=0.25), name


# --- memory --------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Memory of all tensors that Python knows."""
    found = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    return sum({value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in found}.values())


def scoring_bytes(path: Path, folds: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tensors alive while a run of full fine-tuning scores its candidates."""
    config = load_config(path, ["model.adapter.enabled=false", f"solve.folds={folds}"], None)
    config = config.model_copy(update={"output_dir": f"{config.output_dir}-{folds}"})
    seen: list[int] = []
    values = CandidateLosses.values

    def watched(self: CandidateLosses, *arguments: object) -> torch.Tensor:
        seen.append(live_bytes())
        return values(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(CandidateLosses, "values", watched)
        Pipeline(config, Console(quiet=True)).scores()
    gc.collect()
    return max(seen)


def test_gradients_of_every_fold_count_in_the_memory_of_scoring(
    configure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = configure(**BARE)
    monkeypatch.setattr("u2a.forecast.dry_run.device_free_bytes", lambda _: 1)  # formulas alone: nothing is tried
    monkeypatch.setattr("u2a.forecast.dry_run.resident_bytes", lambda: 0)

    quiet = Console(quiet=True)

    def by_formula(folds: int) -> int:
        forecast = dry_run(load_config(path, ["model.adapter.enabled=false", f"solve.folds={folds}"], None), quiet)
        return next(phase.peak_bytes or 0 for phase in forecast.phases if phase.name == "score candidates")

    more = scoring_bytes(path, 9, monkeypatch) - scoring_bytes(path, 2, monkeypatch)
    assert by_formula(9) - by_formula(2) == pytest.approx(more, rel=0.05)


def test_gradients_of_folds_are_added_to_what_a_probe_without_them_measured(configure: Callable[..., Path]) -> None:
    config = load_config(configure(**BARE), ["model.adapter.enabled=false", "solve.scorer=jvp"], None)
    workload, sizes = workload_of(config), sizes_of(shapes_of(config.model))
    held = {"forward": 0, "gradient": 0, "step": 0, "score": 1}
    units = {kind: Unit(1.0, 0.0, 1000, vectors=count) for kind, count in held.items()}

    def peak(name: str, directions: int) -> int:
        basis = Basis(workload, sizes, Measured(units, None, None), {}, {}, directions, False)
        return next(phase.peak_bytes or 0 for phase in phase_costs(basis) if phase.name == name)

    vector = 4 * sizes.trainable
    for directions in (2, 9):
        assert peak("gradient of J", directions) == 1000 + directions * vector
        assert peak("score candidates", directions) >= 1000 + (2 * directions - 1) * vector
    assert peak("warm-up", 9) == 1000


@pytest.mark.parametrize("retain_term", ["nll", "none"])
def test_memory_of_training_is_that_of_its_largest_batch(
    configure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retain_term: str
) -> None:
    negatives = [
        {"prompt": f"N{k}: tea?", "completion": f"never {k}" + " ugh" * 60 * (k % 20 == 13)} for k in range(60)
    ]
    options = [f"data.forget={write_jsonl(tmp_path / 'long.jsonl', negatives)}", "partition.forget_frac=0"]
    options += [
        "partition.preference_frac=0.5",
        "solve.selected_frac=1.0",
        "unlearn.max_steps=20",
        "unlearn.batch_size=4",
    ]
    options += ["solve.heldout_frac=0", "evaluation.controls=[full]", f"unlearn.retain_term={retain_term}"]
    config = load_config(configure(**BARE), options, None)
    workload, pipeline = workload_of(config), Pipeline(config, Console(quiet=True))
    policy, inner = pipeline.policy, workload.inner

    def micro_bytes(problem: InnerProblem) -> float:
        """Memory of the trainer's largest micro-batch, its candidates and retain rows together."""
        found = []
        for step in plan_of(policy, problem, problem.uniform()).steps:
            for batch in step.micro_batches:
                parts = [batch[name] for name in ("forget", "retain") if name in batch]
                shapes = [Shape(*part["input_ids"].shape, part["targets"].shape[1]) for part in parts]
                found.append(sum(sizes_of(policy.model).gradient_bytes(shape) for shape in shapes))
        return max(found)

    def bare(self: Meter, work: Callable[[], object]) -> int:
        work()
        return 1000

    monkeypatch.setattr(Meter, "peak_bytes", bare)
    probe = Probe(policy, workload, sizes_of(policy.model))
    first = micro_bytes(probe._problem())
    assert micro_bytes(inner) > 1.5 * first, "a longer answer than any of the first rows"
    assert probe.measure().units["step"].peak_bytes == pytest.approx(1000 + micro_bytes(inner) - first, abs=1)

"""FLOPs against torch's own counter and against closed formulas; phases that nest, pause and fail."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from tiny import ask, tiny_model, tiny_policy
from u2a.experiment.meter import Meter

ROWS, WIDTH, NEW = 4, 12, 6
HIDDEN = 128  # wide against the sequence, so that attention, which the formulas leave out, is a small part


def wide_model(attention: str = "eager") -> LlamaForCausalLM:
    return tiny_model(0, hidden=HIDDEN, attention=attention)


def weights(model: LlamaForCausalLM) -> tuple[int, int]:
    """Weights of the linear layers: in the blocks, and in the head."""
    linear = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = linear.pop("lm_head")
    return sum(linear.values()), head


def tokens(rows: int = ROWS, width: int = WIDTH) -> torch.Tensor:
    return torch.randint(0, 256, (rows, width), generator=torch.Generator().manual_seed(0))


def counted(work) -> int:
    meter = Meter()
    with meter.phase("train"):
        work()
    return meter.spent().flops["train"]


def forward(model: LlamaForCausalLM) -> torch.Tensor:
    ids = tokens()
    return model(input_ids=ids, labels=ids).loss


def backward(model: LlamaForCausalLM) -> None:
    forward(model).backward()


def double_backward(model: LlamaForCausalLM) -> None:
    parameters = list(model.parameters())
    first = torch.autograd.grad(forward(model), parameters, create_graph=True)
    torch.autograd.grad(sum((g * g.detach()).sum() for g in first), parameters)


def generation(model: LlamaForCausalLM) -> None:
    model.generate(
        tokens(), attention_mask=torch.ones(ROWS, WIDTH), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )


@pytest.mark.parametrize("work", [forward, backward, double_backward, generation])
def test_the_count_is_that_of_torchs_own_counter(work) -> None:
    model = wide_model()
    with FlopCounterMode(display=False) as reference:
        work(model)
    assert counted(lambda: work(model)) == reference.get_total_flops() > 0


def test_attention_of_the_cpu_kernel_counts_as_much_as_written_out() -> None:
    assert counted(lambda: forward(wide_model("sdpa"))) == counted(lambda: forward(wide_model("eager")))
    assert counted(lambda: generation(wide_model("sdpa"))) == counted(lambda: generation(wide_model("eager")))
    # the fused backward computes Q K' once more: one of 7 products instead of 6, of an attention that is small here
    fused, plain = counted(lambda: backward(wide_model("sdpa"))), counted(lambda: backward(wide_model("eager")))
    layers, heads, extra = 2, 4, 2 * ROWS * WIDTH**2 * (HIDDEN // 4)
    assert fused - plain == layers * heads * extra


def test_the_formulas_hold_within_a_tenth() -> None:
    model = wide_model()
    body, head = weights(model)
    n, d = body + head, ROWS * WIDTH
    assert counted(lambda: forward(model)) == pytest.approx(2 * n * d, rel=0.1)
    assert counted(lambda: backward(model)) == pytest.approx(6 * n * d, rel=0.1)
    hvp = counted(lambda: double_backward(model)) - counted(lambda: backward(model))
    assert hvp == pytest.approx(12 * n * d, rel=0.1)
    new = 6
    assert counted(lambda: generation(model)) == pytest.approx(
        2 * ROWS * (body * (WIDTH + new - 1) + head * new), rel=0.1
    )


def test_a_lora_step_costs_about_4nd() -> None:
    model = wide_model()
    n, d = sum(weights(model)), ROWS * WIDTH
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear"))
    assert counted(lambda: backward(adapted)) == pytest.approx(4 * n * d, rel=0.1)  # type: ignore[arg-type]


def test_inference_mode_hides_nothing() -> None:
    model = wide_model()

    def quietly() -> None:
        with torch.inference_mode():
            forward(model)

    assert counted(quietly) == counted(lambda: forward(model))


def test_passes_of_a_policy_are_counted() -> None:
    policy = tiny_policy()
    encoded = [policy.encoder.encode(ask("Is it so?"), "yes", "x")]
    assert counted(lambda: policy.answer_sums(encoded)) > 0


def product(n: int = 8) -> None:
    torch.ones(n, n) @ torch.ones(n, n)


def test_a_nested_phase_is_charged_to_the_inner_name_and_a_pause_to_none() -> None:
    meter, one = Meter(), 2 * 8**3
    product()
    with meter.phase("train"):
        product()
        with meter.phase("reference"):
            product()
            product()
        with meter.paused():
            product()
            with meter.phase("reward"):  # a phase inside a pause is a phase
                product()
        assert meter.flops == 4 * one
        product()
        assert meter.spent().flops == {"train": 2 * one, "reference": 2 * one, "reward": one}
        product()
    product()
    spent = meter.spent()
    assert spent.flops == {"train": 3 * one, "reference": 2 * one, "reward": one}
    assert spent.total_flops == meter.flops == 6 * one
    assert spent.seconds.keys() == spent.cpu_seconds.keys() == spent.flops.keys()
    assert spent.peak_rss_bytes > 10**6


def test_an_error_closes_its_phases() -> None:
    meter = Meter()
    with pytest.raises(KeyError), meter.phase("train"), meter.phase("reward"):
        raise KeyError
    product()
    assert meter.flops == 0
    with meter.phase("train"):
        product()
    assert meter.flops == 2 * 8**3


def test_waiting_costs_wall_time_but_no_cpu_time() -> None:
    meter = Meter()
    with meter.phase("train"):
        time.sleep(0.2)
    with meter.paused():
        time.sleep(0.2)
    spent = meter.spent()
    assert 0.2 <= spent.seconds["train"] < 0.39
    assert spent.cpu_seconds["train"] < 0.1


def small_operations() -> None:
    tensor = torch.zeros(8, 8)
    for _ in range(3000):
        tensor = (tensor * 0.5).add(1.0).tanh()


def test_what_counting_itself_takes_is_not_charged() -> None:
    def alone() -> float:
        start = time.process_time()
        small_operations()
        return time.process_time() - start

    def counted() -> tuple[float, float]:
        meter, start = Meter(), time.process_time()
        with meter.phase("generate"):
            small_operations()
        return time.process_time() - start, meter.spent().cpu_seconds["generate"]

    plain = min(alone() for _ in range(5))
    runs = [counted() for _ in range(5)]
    assert min(whole for whole, _ in runs) > 1.2 * plain, "the work is not one that counting delays"
    assert all(0.5 * plain < charged < 0.98 * whole for whole, charged in runs)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the peak of a process's memory")
def test_memory_is_that_of_the_phases_alone() -> None:
    meter, size = Meter(), 256 * 2**20
    with meter.phase("train"):
        product()
        before = meter.spent().peak_rss_bytes
        with meter.paused():
            block = bytearray(b"1") * size  # an evaluation, say
            assert len(block) == size
            del block
        product()
    assert meter.spent().peak_rss_bytes < before + size / 2
    with meter.phase("train"):
        block = bytearray(b"1") * size
        del block
    assert meter.spent().peak_rss_bytes > before + size / 2

"""The vLLM generator against a stand-in for vLLM that checks every argument and decodes with the exported model."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny import ask, pairs, save_tiny, tiny_policy
from u2a.errors import ConfigError, ModelError
from u2a.evaluation import vllm_generation
from u2a.evaluation.answer_cache import AnswerCache
from u2a.evaluation.decoding import Decoding, Generator
from u2a.evaluation.generation import PolicyGenerator
from u2a.evaluation.vllm_generation import EngineOptions, VllmGenerator, folder_fingerprint

torch.set_num_threads(1)
PROMPTS = [pair.prompt for pair in pairs(5)] + [ask("a considerably longer prompt than all of the others")]


@dataclass(kw_only=True)
class SamplingParams:
    """The fields of vLLM's class that are used here, with its defaults and ranges."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    detokenize: bool = True

    def __post_init__(self) -> None:
        assert 0.0 <= self.temperature <= 2.0
        assert 0.0 < self.top_p <= 1.0
        assert isinstance(self.top_k, int) and self.top_k >= 0
        assert self.seed is not None and 0 <= self.seed < 2**31
        assert self.stop_token_ids and all(isinstance(token, int) for token in self.stop_token_ids)


@dataclass
class Engine:
    """Decodes greedily, one prompt at a time; ``leave_out_end`` is a version that does not return the stop token."""

    arguments: dict[str, Any]
    calls: list[list[tuple[list[int], SamplingParams]]] = field(default_factory=list)
    max_len: int = 10**6
    leave_out_end: bool = False

    def generate(self, prompts: list[dict], sampling_params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        assert use_tqdm is False
        assert len(prompts) == len(sampling_params)
        assert all(list(prompt) == ["prompt_token_ids"] for prompt in prompts)
        given = [prompt["prompt_token_ids"] for prompt in prompts]
        assert all(type(ids) is list for ids in given)
        self.calls.append(list(zip(given, sampling_params, strict=True)))
        model = AutoModelForCausalLM.from_pretrained(self.arguments["model"])
        return [self._answer(model, ids, rule) for ids, rule in self.calls[-1]]

    @torch.no_grad()
    def _answer(self, model: Any, ids: list[int], rule: SamplingParams) -> Any:
        assert rule.ignore_eos and rule.stop_token_ids and rule.max_tokens
        drawn: list[int] = []
        reason, stop = "length", None
        while len(drawn) < rule.max_tokens and len(ids) + len(drawn) < self.max_len:
            drawn.append(int(model(torch.tensor([ids + drawn])).logits[0, -1].argmax()))
            if drawn[-1] in rule.stop_token_ids:
                reason, stop = "stop", drawn[-1]
                break
        if stop is not None and self.leave_out_end:
            drawn.pop()
        output = SimpleNamespace(token_ids=tuple(drawn), finish_reason=reason, stop_reason=stop)
        return SimpleNamespace(outputs=[output])


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Put the stand-in where vLLM would be; gives the engines it builds."""
    built: list[Engine] = []

    def build(**arguments: Any) -> Engine:
        built.append(Engine(arguments))
        return built[-1]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = build, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return built


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "exported")


def end_token() -> int:
    """A token that the model draws early, to serve as a second end token."""
    return PolicyGenerator(tiny_policy()).generate_ids(PROMPTS[:1], Decoding(6))[0].ids[2]


@pytest.mark.parametrize("leave_out_end", [False, True])
def test_greedy_answers_are_those_of_the_policy(engines: list[Engine], exported: Path, leave_out_end: bool) -> None:
    policy, generator = tiny_policy(), VllmGenerator(exported)
    engines[0].leave_out_end = leave_out_end
    ends = policy.encoder.end_ids | {end_token()}
    policy.encoder.end_ids = generator._encoder.end_ids = ends
    generators: list[Generator] = [generator, PolicyGenerator(policy)]
    found, expected = (each.generate_ids([*PROMPTS, PROMPTS[0]], Decoding(8)) for each in generators)
    assert found == expected
    assert {answer.finished for answer in found} == {True, False}
    assert [generator.text(answer) for answer in found] == [generators[1].text(answer) for answer in expected]
    assert len(engines[0].calls[0]) == len(PROMPTS)  # the repeated prompt once


def test_the_engine_is_built_without_remote_code_and_the_models_own_settings(
    engines: list[Engine], exported: Path
) -> None:
    VllmGenerator(str(exported), EngineOptions(dtype="bfloat16", max_model_len=512, gpu_memory_frac=0.5, n_gpus=2))
    assert engines[0].arguments == {
        "model": str(exported),
        "trust_remote_code": False,
        "generation_config": "vllm",
        "seed": 0,
        "dtype": "bfloat16",
        "max_model_len": 512,
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
    }


def test_prompts_and_settings_are_handed_over(engines: list[Engine], exported: Path) -> None:
    generator, policy = VllmGenerator(exported), tiny_policy()
    generator.generate_ids(PROMPTS, Decoding(3, 0.7, 20, 0.9, seed=5))
    generator.generate_ids(PROMPTS[:2], Decoding(4, 1.0, seed=5))
    generator.generate_ids(PROMPTS[:2], Decoding(4, 1.0, seed=6))
    full, plain, other = engines[0].calls
    assert {tuple(ids) for ids, _ in full} == {policy.encoder.encode_prompt(prompt) for prompt in PROMPTS}
    for _, rule in full:
        assert (rule.temperature, rule.top_k, rule.top_p, rule.max_tokens) == (0.7, 20, 0.9, 3)
        assert (rule.stop_token_ids, rule.ignore_eos, rule.detokenize) == ([257], True, False)
    assert all((rule.top_k, rule.top_p) == (0, 1.0) for _, rule in plain)
    seeds = {tuple(ids): rule.seed for ids, rule in full}
    assert len(set(seeds.values())) == len(PROMPTS)  # a seed for each prompt, the same in any company
    assert all(seeds[tuple(ids)] == rule.seed for ids, rule in plain)
    assert all(seeds[tuple(ids)] != rule.seed for ids, rule in other)


def test_the_end_tokens_are_those_of_the_tokenizer_and_of_the_generation_config(
    engines: list[Engine], exported: Path
) -> None:
    (exported / "generation_config.json").write_text('{"eos_token_id": [11, 12]}', encoding="utf-8")
    generator = VllmGenerator(exported)
    generator.generate_ids(PROMPTS[:1], Decoding(1))
    assert engines[0].calls[0][0][1].stop_token_ids == [11, 12, 257]


def test_answers_are_kept_call_by_call(
    engines: list[Engine], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_generation, "PROMPTS_PER_CALL", 2)
    generator = VllmGenerator(exported, cache=AnswerCache(tmp_path))

    class Stop:
        def advance(self, n: int = 1, note: str = "") -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate_ids(PROMPTS, Decoding(4), Stop())
    again = VllmGenerator(exported, cache=AnswerCache(tmp_path))
    expected = PolicyGenerator(tiny_policy()).generate_ids(PROMPTS, Decoding(4))
    assert again.generate_ids(PROMPTS, Decoding(4)) == expected
    assert [len(call) for engine in engines for call in engine.calls] == [2, 2, 2]
    policy = tiny_policy()
    assert AnswerCache(tmp_path).for_policy(policy, Decoding(4)).find([policy.encoder.encode_prompt(PROMPTS[0])]) == {}


def test_the_fingerprint_is_that_of_the_content(exported: Path, tmp_path: Path) -> None:
    same = save_tiny(tmp_path / "elsewhere")
    assert folder_fingerprint(same) == folder_fingerprint(exported)
    assert folder_fingerprint(save_tiny(tmp_path / "other", seed=1)) != folder_fingerprint(exported)
    weights = same / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert folder_fingerprint(same) != folder_fingerprint(exported)


def test_an_answer_cut_by_the_context_is_refused(engines: list[Engine], exported: Path) -> None:
    generator = VllmGenerator(exported)
    engines[0].max_len = 60
    with pytest.raises(ModelError, match=r"of 200 tokens \(length\).*larger max_model_len"):
        generator.generate_ids(PROMPTS[:1], Decoding(200))


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_a_temperature_that_vllm_would_change_is_refused(
    engines: list[Engine], exported: Path, temperature: float
) -> None:
    with pytest.raises(ConfigError, match=f"temperature: {temperature}"):
        VllmGenerator(exported).generate_ids(PROMPTS, Decoding(2, temperature))
    assert engines[0].calls == []


def test_without_vllm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[vllm\]'"):
        VllmGenerator(exported)


def test_a_folder_without_a_model_is_refused(engines: list[Engine], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no exported model"):
        VllmGenerator(tmp_path)
    assert engines == []

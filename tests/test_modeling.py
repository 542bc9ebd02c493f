"""Log-probabilities against one-by-one unpadded forwards; reference, change and roll-back of the policy.

Tolerance: log-probabilities of float32 models agree to 2e-5 nats per token (kernels sum in another order).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.nn.attention import SDPBackend, sdpa_kernel

from inner_oracle import alone, encode_all, flat
from tiny import ask, examples, save_tiny, tiny_model, tiny_policy, tiny_tokenizer
from u2a.adapter import fused_lora
from u2a.config import AdapterConfig, ModelSection
from u2a.encoding import Encoded, collate
from u2a.errors import ConfigError, ModelError, NonFiniteError
from u2a.model_loading import check_adapter, check_packages, load_model, load_tokenizer, pick_device
from u2a.modeling import Policy, answer_log_probs, weights_fingerprint

TOLERANCE = 2e-5  # nats per token, float32
ADAPTER = AdapterConfig(r=4, alpha=8.0)


def policy_with(system_turn: bool, pad_is_eos: bool, attention: str = "sdpa") -> Policy:
    return Policy(tiny_model(attention=attention), tiny_tokenizer(system_turn, pad_is_eos), ADAPTER)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pad_is_eos", [True, False], ids=["pad=eos", "own pad"])
@pytest.mark.parametrize("system_turn", [False, True], ids=["no system turn", "system turn"])
def test_padded_batches_equal_single_unpadded_forwards(system_turn: bool, pad_is_eos: bool, attention: str) -> None:
    policy = policy_with(system_turn, pad_is_eos, attention)
    items = encode_all(policy, examples(5))
    assert len({len(item.input_ids) for item in items}) > 2  # padding does occur
    with torch.no_grad():
        batch = policy.log_probs(items)
        for row, item in enumerate(items):
            single = alone(policy.model, item).float()
            assert torch.allclose(batch.token[row][batch.mask[row]], single, atol=TOLERANCE, rtol=0)
            assert (batch.token[row][~batch.mask[row]] == 0).all()
            assert batch.count[row] == item.n_answer == len(single)
            assert float(batch.sum[row]) == pytest.approx(float(single.sum()), abs=TOLERANCE * item.n_answer)
            assert float(batch.mean[row]) == pytest.approx(float(single.mean()), abs=TOLERANCE)


POLICY = tiny_policy(lora_b_sd=0.1)
ITEMS = encode_all(POLICY, examples(7))
SINGLE = [float(alone(POLICY.model, item).sum()) for item in ITEMS]


@settings(max_examples=25)
@given(st.permutations(range(7)), st.integers(1, 600))
def test_order_and_batch_size_change_nothing(order: list[int], budget: int) -> None:
    POLICY.token_budget = budget
    sums = POLICY.answer_sums([ITEMS[index] for index in order])
    for place, index in enumerate(order):
        assert float(sums[place]) == pytest.approx(SINGLE[index], abs=TOLERANCE * ITEMS[index].n_answer)


@settings(max_examples=10)
@given(st.integers(0, 258))
def test_the_value_of_the_padding_token_changes_nothing(pad: int) -> None:
    with torch.no_grad():
        one, other = (answer_log_probs(POLICY.model, collate(ITEMS, value)).token for value in (pad, 257))
    assert torch.equal(one, other)


def test_the_end_token_is_scored() -> None:
    """Making the end token likelier raises the answer's log-probability by exactly its own change."""
    policy = tiny_policy()
    (item,) = encode_all(policy, examples(1))
    cut = Encoded(item.input_ids[:-1], item.n_answer - 1)
    with torch.no_grad():
        whole, without = policy.log_probs([item]), policy.log_probs([cut])
    assert item.answer_ids[-1] == 257
    assert float(whole.sum - without.sum) == pytest.approx(float(alone(policy.model, item)[-1]), abs=TOLERANCE)


def test_log_probabilities_are_float32_for_bfloat16_and_float64_for_float64() -> None:
    item = ITEMS[:2]
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        policy = tiny_policy()
        policy.model.to(dtype)
        assert policy.log_probs(item).token.dtype == expected


def test_functional_parameters_replace_the_models_own() -> None:
    policy, other = tiny_policy(), tiny_policy(lora_b_sd=0.2)
    with torch.no_grad():
        ours = answer_log_probs(policy.model, policy.collate(ITEMS), other.trainable()).token
        theirs = other.log_probs(ITEMS).token
    assert torch.allclose(ours, theirs, atol=TOLERANCE)


# --- reference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_the_reference_is_the_start_and_the_change_survives_it(adapter: bool) -> None:
    policy = tiny_policy(adapter=adapter)
    before = policy.answer_sums(ITEMS)
    with torch.no_grad():
        for value in policy.trainable().values():
            value.add_(0.02 * torch.randn_like(value))
    changed, sums = flat(policy.snapshot()), policy.answer_sums(ITEMS)
    with policy.reference():
        assert torch.allclose(policy.answer_sums(ITEMS), before, atol=1e-4)
    assert torch.equal(flat(policy.snapshot()), changed)
    assert torch.equal(policy.answer_sums(ITEMS), sums)
    assert (sums - before).abs().max() > 1e-2
    assert torch.allclose(policy.reference_sums(ITEMS), before, atol=1e-4)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_the_reference_is_left_even_when_its_use_fails(adapter: bool) -> None:
    policy = tiny_policy(adapter=adapter)
    with torch.no_grad():
        for value in policy.trainable().values():
            value.add_(0.02)
    changed, sums = flat(policy.snapshot()), policy.answer_sums(ITEMS)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(flat(policy.snapshot()), changed)
    assert torch.equal(policy.answer_sums(ITEMS), sums)
    assert all(value.requires_grad for value in policy.trainable().values())


def test_reference_sums_are_computed_once_per_content(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    seen: list[int] = []
    inner = policy.answer_sums
    monkeypatch.setattr(policy, "answer_sums", lambda items: seen.append(len(items)) or inner(items))
    first = policy.reference_sums([ITEMS[0], ITEMS[1], ITEMS[0]])
    second = policy.reference_sums([ITEMS[1], ITEMS[2]])
    assert seen == [2, 1]
    assert first[0] == first[2]
    assert first[1] == second[0]


def test_a_non_finite_reference_is_refused_and_not_remembered() -> None:
    policy = tiny_policy()
    weight = policy.model.get_base_model().lm_head.weight
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="reference log-probability"):
        policy.reference_sums(ITEMS[:1])
    weight.data.copy_(kept)
    assert torch.isfinite(policy.reference_sums(ITEMS[:1])).all()


# --- change -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_scaling_the_change_scales_the_effective_weights(adapter: bool, scale: float) -> None:
    policy = tiny_policy(adapter=adapter, lora_b_sd=0.2)
    if not adapter:
        with torch.no_grad():
            for value in policy.trainable().values():
                value.add_(0.05 * torch.randn_like(value))
    whole, now = float(policy.change_sq().detach()), flat(policy.snapshot())
    with policy.change_scaled(scale):
        assert float(policy.change_sq().detach()) == pytest.approx(scale**2 * whole, rel=1e-4, abs=1e-9)
    assert torch.equal(flat(policy.snapshot()), now)
    policy.scale_change(scale)
    assert float(policy.change_sq().detach()) == pytest.approx(scale**2 * whole, rel=1e-4, abs=1e-9)


def test_reset_returns_to_the_start_bit_for_bit() -> None:
    policy = tiny_policy()
    start, sums = flat(policy.theta0), policy.answer_sums(ITEMS)
    policy.restore(tiny_policy(lora_b_sd=0.2).snapshot())
    policy.reset()
    assert torch.equal(flat(policy.snapshot()), start)
    assert torch.equal(policy.answer_sums(ITEMS), sums)


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone() -> None:
    plain = tiny_model()
    with torch.no_grad():
        expected = answer_log_probs(plain, collate(ITEMS, 257)).token
    policy = tiny_policy()
    with torch.no_grad():
        assert torch.equal(policy.log_probs(ITEMS).token, expected)
    torch.manual_seed(999)
    state = torch.get_rng_state()
    again = tiny_policy()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(flat(again.snapshot()), flat(policy.snapshot()))


def test_perplexity_is_per_answer_token() -> None:
    total = sum(SINGLE)
    tokens = sum(item.n_answer for item in ITEMS)
    assert POLICY.perplexity(ITEMS) == pytest.approx(float(torch.tensor(-total / tokens).exp()), rel=1e-5)


def test_adapter_layers_can_be_chosen() -> None:
    policy = Policy(tiny_model(), tiny_tokenizer(), AdapterConfig(r=2, layers=[1]))
    assert policy.trainable()
    assert all(".layers.1." in name for name in policy.trainable())


def test_training_mode_is_the_same_function() -> None:
    """Neither a configured adapter dropout nor the model's attention dropout makes passes differ."""
    model = tiny_model(attention="eager")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
    policy = Policy(model, tiny_tokenizer(), lora)
    for name, value in policy.trainable().items():
        value.data.fill_(0.05 if ".lora_B." in name else 0.1)
    with torch.no_grad():
        calm = policy.log_probs(ITEMS).token
        policy.model.train()
        assert torch.equal(policy.log_probs(ITEMS).token, calm)


def test_models_that_cannot_be_used_are_refused() -> None:
    carrying = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="carries an adapter already"):
        Policy(carrying, tiny_tokenizer(), ADAPTER)
    with pytest.raises(ModelError, match="model.adapter: Target modules .*no_such_layer"):
        Policy(tiny_model(), tiny_tokenizer(), AdapterConfig(target_modules=["no_such_layer"]))


def test_a_model_that_peft_has_changed_in_place_is_refused() -> None:
    """The second policy around the same model object would stack its adapter on the first one's."""
    model = tiny_model()
    Policy(model, tiny_tokenizer(), ADAPTER)
    with pytest.raises(ModelError, match="carries an adapter already .load the model anew"):
        Policy(model, tiny_tokenizer(), ADAPTER)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init_lora_weights": False}, "changes the model from the start"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.* would be trained beside"),
        ({"bias": "all", "use_dora": True}, "magnitude.* would be trained beside"),
    ],
    ids=["start", "modules_to_save", "dora"],
)
def test_adapters_whose_reference_is_not_the_model_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Policy(tiny_model(), tiny_tokenizer(), LoraConfig(r=2, target_modules=["q_proj"], **settings))


@pytest.mark.parametrize("rate", ["dropout", "residual_dropout", "activation_dropout", "input_jitter_noise"])
def test_rates_that_are_plain_numbers_are_set_to_zero(rate: str) -> None:
    model = tiny_model()
    setattr(model.model.layers[0].mlp, rate, 0.3)
    Policy(model, tiny_tokenizer(), ADAPTER)
    assert getattr(model.model.layers[0].mlp, rate) == 0.0


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_sums_and_reference_are_computed_in_evaluation_mode(adapter: bool) -> None:
    policy = tiny_policy(adapter=adapter)
    seen: list[bool] = []
    policy.model.get_input_embeddings().register_forward_hook(lambda module, *_: seen.append(module.training))
    policy.model.train()
    policy.model.get_output_embeddings().eval()
    modes = [module.training for module in policy.model.modules()]
    policy.answer_sums(ITEMS)
    with policy.reference() as start:
        assert not any(module.training for module in start.modules())
        policy.log_probs(ITEMS[:1])
    assert seen
    assert not any(seen)
    assert [module.training for module in policy.model.modules()] == modes
    assert set(modes) == {True, False}  # the mode that was restored is a mixed one


def test_a_model_wrapped_for_data_parallelism_is_looked_into() -> None:
    """Logits are asked for at answer positions only, also through the wrapper."""
    policy, widths = tiny_policy(), []
    policy.model.get_output_embeddings().register_forward_hook(lambda *parts: widths.append(parts[2].shape[1]))
    batch = policy.collate(ITEMS[:1])
    answer_log_probs(torch.nn.DataParallel(policy.model), batch)
    assert widths == [batch.targets.shape[1] + 1]


def test_the_fingerprint_needs_no_float64_on_the_models_device() -> None:
    """Some devices have no float64: the conversion comes after the copy to the CPU."""
    calls: list[str] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.cpu, torch.Tensor.double):
                calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        weights_fingerprint(torch.nn.Linear(2, 2))
    assert calls == ["cpu", "double"] * 2


# --- loading ----------------------------------------------------------------------------------------


def test_loading_from_a_directory_gives_the_same_model(tmp_path) -> None:
    section = ModelSection(name_or_path=str(save_tiny(tmp_path)), device="cpu")
    policy = Policy(load_model(section), load_tokenizer(section), ADAPTER)
    assert torch.equal(policy.answer_sums(ITEMS), tiny_policy().answer_sums(ITEMS))
    assert policy.encoder.encode(ask("Tea?"), "No").answer_ids[-1] == 257


def test_missing_models_and_devices_are_clear_errors(tmp_path) -> None:
    section = ModelSection(name_or_path=str(tmp_path / "nothing"), device="cpu")
    with pytest.raises(ModelError, match="model.name_or_path: no tokenizer at"):
        load_tokenizer(section)
    with pytest.raises(ModelError, match="model.name_or_path: cannot load"):
        load_model(section)
    with pytest.raises(ModelError, match="model.device: 'cuda:77' is not available"):
        pick_device("cuda:77")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "packages", "said"),
    [
        ({"load_in_4bit": True}, (), "model.load_in_4bit: needs the package bitsandbytes"),
        ({"load_in_4bit": True}, ("bitsandbytes",), None),
        ({"attention": "flash_attention_2"}, (), "model.attention: flash_attention_2 needs the package flash-attn"),
        ({"attention": "flash_attention_2"}, ("flash_attn",), None),
        ({"attention": "flash_attention_2"}, ("kernels",), None),
        ({}, (), None),
    ],
)
def test_options_whose_package_is_missing_are_refused_before_anything_is_loaded(
    options: dict, packages: tuple[str, ...], said: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr("u2a.model_loading.find_spec", lambda name: name if name in packages else None)
    section = ModelSection(name_or_path=str(tmp_path / "no model"), **options)
    if said is None:
        check_packages(section)
        return
    with pytest.raises(ConfigError, match=said):
        check_packages(section)


def test_adapter_layers_that_the_model_lacks_are_refused_before_its_weights_are_read(tmp_path) -> None:
    (save_tiny(tmp_path) / "model.safetensors").unlink()

    def section(**adapter) -> ModelSection:
        return ModelSection(name_or_path=str(tmp_path), adapter=AdapterConfig(**adapter))

    for fine in ({}, {"layers": [0, 1]}, {"layers": [99], "enabled": False}):
        check_adapter(section(**fine))
    with pytest.raises(ConfigError) as caught:
        check_adapter(section(layers=[1, 99, 2]))
    assert caught.value.problems == [
        "model.adapter.layers: 99 is not a layer of the model (0 to 1)",
        "model.adapter.layers: 2 is not a layer of the model (0 to 1)",
    ]
    with pytest.raises(ModelError, match="model.name_or_path: cannot load"):
        check_adapter(ModelSection(name_or_path=str(tmp_path / "no"), adapter=AdapterConfig(layers=[0])))


def test_modules_that_the_model_lacks_are_refused_before_its_weights_are_read(tmp_path) -> None:
    (save_tiny(tmp_path) / "model.safetensors").unlink()

    def section(targets: str | list[str]) -> ModelSection:
        return ModelSection(name_or_path=str(tmp_path), adapter=AdapterConfig(target_modules=targets))

    for fine in (["q_proj", "mlp.up_proj"], ["model.layers.0.self_attn.v_proj"], "all-linear", r".*\.q_proj"):
        check_adapter(section(fine))
    with pytest.raises(ConfigError) as caught:  # peft would train q_proj alone, and say nothing
        check_adapter(section(["q_proj", "c_attn", "proj"]))
    known = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    assert caught.value.problems == [
        f"model.adapter.target_modules: {name!r} is no module of the model (its linear ones: {known})"
        for name in ("c_attn", "proj")
    ]
    for none in (r".*\.c_attn", ["self_attn"]):  # matches nothing, and what LoRA cannot adapt
        with pytest.raises(ModelError, match="model.adapter: "):
            check_adapter(section(none))


def test_pickled_weights_are_never_read(tmp_path) -> None:
    folder = save_tiny(tmp_path)
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_model(ModelSection(name_or_path=str(folder), device="cpu"))


def test_fused_lora_gives_the_layers_own_values_and_leaves_them_as_they_were() -> None:
    policy = tiny_policy(lora_b_sd=0.3)
    batch = policy.collate(encode_all(policy, examples(3)))
    layers = [module for module in policy.model.modules() if type(module) is LoraLinear]
    with torch.no_grad():
        plain = answer_log_probs(policy.model, batch).token
        with fused_lora(policy.model):
            assert layers and all("forward" in vars(layer) for layer in layers)
            fused = answer_log_probs(policy.model, batch).token
        with policy.reference(), fused_lora(policy.model):  # a disabled adapter stays disabled
            reference = answer_log_probs(policy.model, batch).token
        with policy.reference():
            expected = answer_log_probs(policy.model, batch).token
        with fused_lora(policy.model), policy.reference():  # and one that is disabled inside is
            inside = answer_log_probs(policy.model, batch).token
    assert not any("forward" in vars(layer) for layer in layers)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(reference, expected) and not torch.equal(reference, plain)
    torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-5)


def test_fused_lora_has_the_layers_own_gradients_and_second_derivatives() -> None:
    policy = tiny_policy(lora_b_sd=0.3)
    batch = policy.collate(encode_all(policy, examples(3)))
    leaves = list(policy.trainable().values())

    def derivatives() -> list[torch.Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            first = torch.autograd.grad(answer_log_probs(policy.model, batch).sum.sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum((value**2).sum() for value in first), leaves)
        return [value.detach() for value in (*first, *second)]

    plain = derivatives()
    with fused_lora(policy.model):
        fused = derivatives()
    scale = max(float(value.abs().max()) for value in plain)
    assert scale > 1.0
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6 * scale)


def test_fused_lora_gives_the_layers_own_values_under_autocast() -> None:
    policy = tiny_policy(lora_b_sd=0.3)
    batch = policy.collate(encode_all(policy, examples(3)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = answer_log_probs(policy.model, batch).token
        with fused_lora(policy.model):
            fused = answer_log_probs(policy.model, batch).token
    torch.testing.assert_close(fused, plain, rtol=0.02, atol=0.05)


def test_the_change_of_an_adapted_embedding_counts() -> None:
    adapter = LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens", "q_proj"])
    policy = Policy(tiny_model(), tiny_tokenizer(), adapter)
    generator = torch.Generator().manual_seed(0)
    for name, value in policy.trainable().items():
        if "_B" in name:
            value.data.copy_(torch.randn(value.shape, generator=generator))
    expected = 0.0
    for module in policy.model.modules():
        if isinstance(module, LoraLayer):
            expected += float(module.get_delta_weight("default").double().square().sum())
    assert float(policy.change_sq()) == pytest.approx(expected, rel=1e-5)
    embedding = [value for name, value in policy.trainable().items() if "embedding_B" in name]
    assert len(embedding) == 1 and float(embedding[0].abs().sum()) > 0
    policy.scale_change(0.5)
    assert float(policy.change_sq()) == pytest.approx(expected / 4, rel=1e-5)


def test_fused_lora_leaves_a_layer_alone_that_drops_out_while_it_trains() -> None:
    policy = tiny_policy(lora_b_sd=0.3)
    layer = next(module for module in policy.model.modules() if type(module) is LoraLinear)
    layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    for training in (True, False):
        layer.train(training)
        with fused_lora(policy.model):
            assert ("forward" in vars(layer)) is not training


def test_fused_lora_leaves_layers_alone_that_are_more_than_plain_matrices() -> None:
    policy = tiny_policy(lora_b_sd=0.3)
    layers = [module for module in policy.model.modules() if type(module) is LoraLinear]
    layers[0].merge()
    layers[1].base_layer.to(torch.bfloat16)
    layers[2].lora_A["default"].register_forward_hook(lambda module, inputs, output: 2 * output)
    with fused_lora(policy.model):
        assert ["forward" in vars(layer) for layer in layers[:4]] == [False, False, False, True]

"""Models, heads, arms and records made to harm: refused with a reason, and nothing of them is executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tiny import save_tiny, tiny_policy
from u2a.config import ModelSection
from u2a.errors import ModelError, RecordError
from u2a.model_loading import load_model, load_pretrained, load_tokenizer
from u2a.packaged import is_converted, resolve_model
from u2a.progress import Console
from u2a.record import SCHEMA, refuse_foreign_link
from u2a.reward.head import BradleyTerryHead, HeadBase, load_head, save_head
from u2a.stage_store import StageStore
from u2a.tensor_tree import read_tensors
from u2a.types import Partition

from .cases import HOSTILE

WEIGHTS = "model.safetensors"


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.sentinel),)


@pytest.fixture
def sentinel(tmp_path: Path) -> Any:
    """Path that every payload would create; checked to be absent at the end of every test."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "a payload was executed"


def test_the_payloads_work(tmp_path: Path) -> None:
    """Otherwise the absence of the sentinel would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))  # noqa: S301
    assert (tmp_path / "executed").exists()
    exec(code(tmp_path / "run"))
    assert (tmp_path / "run").exists()


def code(sentinel: Path) -> str:
    """Python that creates the sentinel when it is imported."""
    classes = "class C(PretrainedConfig): model_type = 'own'\nclass M: pass\nclass T: pass\n"
    return f"import os\nos.mkdir({str(sentinel)!r})\nfrom transformers import PretrainedConfig\n{classes}"


# --- files of tensors: the same faults for a model, a head and an arm --------------------------------


def spoil(name: str, path: Path, sentinel: Path, first: str) -> None:
    """Put one fault into a safetensors file; ``first`` is one of its tensors."""
    raw = path.read_bytes()
    if name == "pickle":
        path.write_bytes(pickle.dumps(Payload(sentinel)))
    elif name == "torch.save":
        torch.save({first: Payload(sentinel)}, path)
    elif name == "truncated":
        path.write_bytes(raw[:-1])
    elif name == "header cut":
        path.write_bytes(raw[:20])
    elif name == "header of an exabyte":
        path.write_bytes(struct.pack("<Q", 2**60) + raw[8:])
    elif name == "header longer than the file":
        path.write_bytes(struct.pack("<Q", len(raw)) + raw[8:])
    elif name == "offsets outside":
        header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        header[first]["data_offsets"] = [0, 2**40]
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
    elif name == "empty":
        path.write_bytes(b"")
    else:
        tensors = load_file(path)
        value = tensors[first]
        if name == "missing tensor":
            del tensors[first]
        elif name == "extra tensor":
            tensors["more"] = torch.zeros(3)
        elif name == "wrong shape":
            tensors[first] = torch.ones(7, dtype=value.dtype)
        elif name == "wrong dtype":
            tensors[first] = torch.ones(value.shape, dtype=torch.int32)
        elif name == "not finite":
            tensors[first] = torch.full_like(value, float("nan"))
        else:
            raise AssertionError(name)
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def section(folder: Path, **changes: Any) -> ModelSection:
    return ModelSection.model_validate({"name_or_path": str(folder), "device": "cpu"} | changes)


def refused(load: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(ModelError) as caught:
        load(*arguments)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700
    return message


# What transformers itself does with these is to convert the dtype, leave the tensor out, and hand on the numbers.
ACCEPTED_IN_A_MODEL = ("wrong dtype", "extra tensor", "not finite")


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ACCEPTED_IN_A_MODEL])
def test_a_hostile_model_is_refused(name: str, model: Path, sentinel: Path) -> None:
    spoil(name, model / WEIGHTS, sentinel, "model.norm.weight")
    message = refused(load_model, section(model))
    assert "model.name_or_path" in message and str(model) in message
    if name in ("missing tensor", "wrong shape"):
        assert "model.norm.weight" in message
    assert str(model) in refused(load_pretrained, AutoModelForCausalLM, str(model), "reward model", torch.float32)


def test_an_untouched_model_loads(model: Path) -> None:
    loaded = load_model(section(model))
    again, tokenizer = load_pretrained(AutoModelForCausalLM, str(model), "reward model", torch.float32)
    for (name, value), (_, other) in zip(loaded.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(value, other), name
    assert not loaded.training and not again.training
    assert tokenizer.chat_template == load_tokenizer(section(model)).chat_template


def test_weights_that_are_not_used_may_be_missing_only_where_that_is_said(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    assert "model.norm.weight" in refused(load_pretrained, AutoModelForCausalLM, str(model), "encoder", torch.float32)
    load_pretrained(AutoModelForCausalLM, str(model), "encoder", torch.float32, ("model.norm.",))


def test_pickles_beside_the_weights_are_not_opened(model: Path, sentinel: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (model / name).write_bytes(pickle.dumps(Payload(sentinel)))
    load_model(section(model))
    load_tokenizer(section(model))
    (model / WEIGHTS).unlink()
    assert "no file named model.safetensors" in refused(load_model, section(model))


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "/etc/passwd", "weights.bin", "a/b.safetensors", 3, ".."]
)
def test_an_index_that_leads_elsewhere_is_refused(shard: object, model: Path, sentinel: Path) -> None:
    shutil.copytree(model, model.parent / "other")
    names = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    (model / "weights.bin").write_bytes(pickle.dumps(Payload(sentinel)))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no safetensors file beside it" in refused(load_model, section(model))
    (model / "model.safetensors.index.json").write_text("[]")
    assert "is damaged" in refused(load_model, section(model))


def test_an_adapter_in_the_place_of_a_model_is_refused(model: Path, base: Path, sentinel: Path) -> None:
    """Transformers would follow it to whatever base it names."""
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"}))
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Payload(sentinel)))
    assert "holds an adapter" in refused(load_model, section(model))
    assert "holds an adapter" in refused(load_pretrained, AutoModelForCausalLM, str(model), "encoder", torch.float32)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"model_type": "llama", "hidden_size": "big"}', "", "\xff"])
def test_a_damaged_model_configuration_is_refused(text: str, model: Path) -> None:
    (model / "config.json").write_text(text, encoding="latin-1")
    assert "cannot load" in refused(load_model, section(model))


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3", "", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_refused(text: str, model: Path) -> None:
    (model / "tokenizer.json").write_text(text)
    assert "no tokenizer at" in refused(load_tokenizer, section(model))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% if %}",
        "{{ messages[0].nothing.more }}",
    ],
)
def test_a_hostile_chat_template_is_refused(template: str, model: Path) -> None:
    (model / "chat_template.jinja").write_text(template)
    assert "has a chat template that fails" in refused(load_tokenizer, section(model))


# --- code shipped with a model -------------------------------------------------------------------------


def ship_code(model: Path, sentinel: Path, kind: str) -> None:
    """Let the model's files name classes of their own, for a known or an unknown kind of model."""
    (model / "own.py").write_text(code(sentinel))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoModel": "own.M"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    if kind == "own":
        tokenizer |= {"auto_map": {"AutoTokenizer": ["own.T", None]}, "tokenizer_class": "OwnTokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_code_shipped_with_a_model_is_not_executed(
    model: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked whether to run code"))
    ship_code(model, sentinel, "own")
    assert "custom code" in refused(load_model, section(model))
    assert "custom code" in refused(load_tokenizer, section(model))
    assert "custom code" in refused(load_pretrained, AutoModelForCausalLM, str(model), "reward model", torch.float32)


def test_code_beside_a_known_kind_of_model_is_not_looked_at(model: Path, sentinel: Path) -> None:
    ship_code(model, sentinel, "llama")
    assert type(load_model(section(model))).__name__ == "LlamaForCausalLM"
    load_tokenizer(section(model))


def test_code_is_executed_where_the_option_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option is what stands between: with it the sentinel does appear."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ship_code(model, tmp_path / "executed", "own")
    refused(load_model, section(model, trust_remote_code=True))  # the class there is no model
    assert (tmp_path / "executed").exists()


def test_other_loaders_do_not_ask_whether_to_run_code(
    model: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from u2a.reward.embedding import Embedder
    from u2a.reward.loading import architectures
    from u2a.reward.models import load_sequence_classifier

    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "n")
    ship_code(model, sentinel, "own")
    refused(Embedder, str(model))
    refused(architectures, str(model))
    refused(load_sequence_classifier, str(model), torch.device("cpu"))
    assert not asked


# --- names of packaged models ---------------------------------------------------------------------------


PACKAGE_NAMES = ("", ".", "..", "../x", "a/b", "__main__", "a\0b", "no_such_package", "shipped.inside", "shipped.")


@pytest.mark.parametrize("name", PACKAGE_NAMES)
def test_a_package_name_is_looked_up_without_importing_anything(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentinel: Path
) -> None:
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "__init__.py").write_text(code(sentinel))
    (tmp_path / "shipped" / "inside.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "is not installed" in refused(resolve_model, f"package:{name}")
    assert is_converted(f"package:{name}")


def test_a_damaged_gguf_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentinel: Path) -> None:
    pytest.importorskip("gguf")
    package = tmp_path / "some_gguf_package"
    package.mkdir()
    (package / "__init__.py").write_text(code(sentinel))
    (package / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**50, 2**50))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("U2A_CACHE", str(tmp_path / "cache"))
    assert "cannot be converted" in refused(resolve_model, "package:some_gguf_package")
    assert not (tmp_path / "cache").exists()


# --- heads ------------------------------------------------------------------------------------------------


@pytest.fixture
def head(tmp_path: Path) -> Path:
    values = BradleyTerryHead(np.arange(3.0), np.ones(3), np.ones(1), 1.0, 9, 0.5)
    base = HeadBase(kind="embedding", name_or_path="m", fingerprint="f", max_length=8)
    return save_head(tmp_path / "head", values, base)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("first", ["weights", "centre", "scale"])
def test_a_hostile_head_is_refused(name: str, first: str, head: Path, sentinel: Path) -> None:
    load_head(head)
    spoil(name, head / "head.safetensors", sentinel, first)
    assert "no readable reward head there" in refused(load_head, head)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_divides_by_nothing_is_refused(scale: float, head: Path) -> None:
    tensors = load_arrays(head / "head.safetensors")
    save_arrays(tensors | {"scale": np.array([scale])}, head / "head.safetensors")
    assert "a scale not above 0" in refused(load_head, head)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "reward head of format 99, expected"),
        ({"format": "x"}, "no readable reward head there"),
        ({"base": None}, "no readable reward head there"),
        ({"l2": "strong"}, "no readable reward head there"),
        ({"code": "import os"}, "no readable reward head there"),
    ],
)
def test_a_hostile_description_of_a_head_is_refused(change: dict, said: str, head: Path) -> None:
    about = json.loads((head / "head.json").read_text())
    (head / "head.json").write_text(json.dumps(about | change))
    assert said in refused(load_head, head)
    for text in ("", "[]", "[" * 100_000, "\0"):
        (head / "head.json").write_text(text)
        assert "no readable reward head there" in refused(load_head, head)


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
def test_a_head_that_is_a_link_out_of_its_folder_is_refused(name: str, head: Path) -> None:
    (head / name).rename(head.parent / name)
    (head / name).symlink_to(head.parent / name)
    assert "a link out of its folder" in refused(load_head, head)


# --- arms: the trained parameters of a run ----------------------------------------------------------------


@pytest.fixture
def arm(tmp_path: Path) -> Path:
    (tmp_path / "arms").mkdir()
    path = tmp_path / "arms" / "u2a.safetensors"
    save_file(tiny_policy(seed=3).snapshot(), path)
    return path


def refused_record(load: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(RecordError) as caught:
        load(*arguments)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 900
    return message


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_arm_is_refused(name: str, arm: Path, sentinel: Path) -> None:
    wanted = tiny_policy(seed=3).trainable()
    found = read_tensors(arm, wanted)
    assert all(torch.equal(found[key], value) for key, value in tiny_policy(seed=3).snapshot().items())
    first = min(wanted)
    spoil(name, arm, sentinel, first)
    message = refused_record(read_tensors, arm, wanted)
    assert str(arm) in message and "delete it and run its stage again" in message
    if name in ("missing tensor", "wrong shape", "wrong dtype", "not finite"):
        assert first in message


def test_an_arm_of_another_base_is_refused(arm: Path) -> None:
    other = tiny_policy(adapter=False).trainable()
    assert "weights of another model" in refused_record(read_tensors, arm, other)
    wider = {name: torch.zeros(*value.shape[:-1], value.shape[-1] + 1) for name, value in load_file(arm).items()}
    assert "the model has" in refused_record(read_tensors, arm, wider)


def test_an_arm_that_is_a_link_out_of_the_run_is_refused(arm: Path, tmp_path: Path) -> None:
    arm.rename(tmp_path / "elsewhere.safetensors")
    arm.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "a link out of its folder" in refused_record(read_tensors, arm, {})


# --- records ------------------------------------------------------------------------------------------------


def document(**changes: Any) -> dict[str, Any]:
    return {"record": "Partition", "schema": SCHEMA, "data": {"fingerprint": "abc"}} | changes


def test_a_sound_record_loads(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(document()))
    assert Partition.load(tmp_path / "a.json") == Partition(fingerprint="abc")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(document(schema=SCHEMA + 1)), f"schema {SCHEMA + 1} is newer than {SCHEMA} (upgrade u2a)"),
        (json.dumps(document(schema="2")), "its schema is '2'"),
        (json.dumps(document(schema=None)), "its schema is None"),
        (json.dumps(document(schema=0)), "its schema is 0"),
        (json.dumps(document(schema=[9])), "its schema is [9]"),
        (json.dumps({"record": "Partition", "data": {}}), "its schema is None"),
        (json.dumps(document(record="Solution")), "holds 'Solution', expected 'Partition'"),
        (json.dumps(document(record="\x1b[2J\n" * 99)), r"holds '\x1b[2J\n"),
        (json.dumps(document(data={"fingerprint": 3})), "not a valid Partition"),
        (json.dumps(document(data={"more": 3})), "not a valid Partition"),
        (json.dumps(document(data=None)), "not a valid Partition"),
        (json.dumps({"record": "Partition", "schema": 1}), "not a valid Partition"),
        (json.dumps(document(data={"dropped": {"x": float("nan")}})), "Partition.dropped.x: not a finite number"),
        (json.dumps(document(data={"x\x1b\n": float("inf")})), r"x\x1b\n: not a finite number"),
        ('{"record": "Partition", "schema": 1, "data": {"dropped": {"x": 1e999}}}', "not a finite number"),
        ("[]", "holds 'list', expected"),
        ("null", "holds 'NoneType', expected"),
        ("", "unreadable"),
        ("{", "unreadable"),
        ("[" * 200_000, "unreadable"),
        ('{"schema": ' + "9" * 5000 + "}", "unreadable"),
        ("\xff\xfe", "unreadable"),
    ],
)
def test_a_hostile_record_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    path.write_bytes(text.encode("latin-1"))
    message = refused_record(Partition.load, path)
    assert message.startswith(str(path)) and said in message


def test_a_pickle_in_the_place_of_a_record_is_refused(tmp_path: Path, sentinel: Path) -> None:
    (tmp_path / "partition.json").write_bytes(pickle.dumps(Payload(sentinel)))
    assert "unreadable" in refused_record(Partition.load, tmp_path / "partition.json")


STORE_KEY = "0123456789abcdef"


def entry(**changes: Any) -> dict[str, Any]:
    return {"partition": {"key": STORE_KEY, "seconds": {"x": 1.0}, "peak_rss_bytes": 5} | changes}


@pytest.mark.parametrize(
    "stages",
    [
        [1], 3, None, "x", {"partition": 3}, {"partition": {}}, entry(key=5), entry(seconds=[1]),
        entry(seconds={"x": "y"}), entry(seconds={"x": float("nan")}), entry(seconds={"x": -1}),
        entry(peak_rss_bytes="much"), entry(more=1),
    ],
)  # fmt: skip
def test_hostile_keys_of_stages_are_refused(stages: object, tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    store = StageStore(tmp_path, Console(quiet=True))
    assert "stages.json: unreadable" in refused_record(store.is_done, "partition", STORE_KEY)
    assert "stages.json: unreadable" in refused_record(store.seconds)
    assert "stages.json: unreadable" in refused_record(store.mark, "partition", STORE_KEY, {})


def test_a_record_of_other_options_is_refused(tmp_path: Path) -> None:
    store = StageStore(tmp_path, Console(quiet=True))
    made = store.saved("partition", Partition, STORE_KEY, lambda: Partition(fingerprint="abc"))
    assert StageStore(tmp_path, Console(quiet=True)).current("partition", Partition, STORE_KEY, "partition") == made
    again = StageStore(tmp_path, Console(quiet=True))
    message = refused_record(again.current, "partition", Partition, "another key", "partition")
    assert "made from other options or data (run u2a partition again)" in message
    assert again.saved("partition", Partition, "another key", lambda: Partition(fingerprint="new")).fingerprint == "new"


def test_links_out_of_a_folder_are_refused_and_links_inside_are_not(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside.json"
    run.mkdir()
    Partition(fingerprint="abc").save(outside)
    (run / "partition.json").symlink_to(outside)
    assert "a link out of its folder" in refused_record(Partition.load, run / "partition.json")
    (run / "dangling.json").symlink_to(tmp_path / "absent.json")
    assert "a link out of its folder" in refused_record(Partition.load, run / "dangling.json")
    (run / "inside.json").symlink_to(Partition(fingerprint="in").save(run / "real.json").name)
    assert Partition.load(run / "inside.json").fingerprint == "in"
    (tmp_path / "linked run").symlink_to(run)
    assert Partition.load(tmp_path / "linked run" / "real.json").fingerprint == "in"
    refuse_foreign_link(run / "absent.json")


def test_nothing_in_the_source_unpickles() -> None:
    """Every loader reads safetensors or JSON; a pickle would run what it holds."""
    source = Path(__file__).resolve().parents[2] / "src" / "u2a"
    words = r"torch\.load\(|\bpickle\b(?=\.| *$)|\bimport joblib|allow_pickle=True|yaml\.load\(|(?<![\w.])(eval|exec)\("
    unsafe = re.compile(words)
    assert (
        unsafe.search("x = torch.load(path)") and unsafe.search("import pickle") and not unsafe.search("model.eval()")
    )
    for path in source.rglob("*.py"):
        assert not [line for line in path.read_text("utf-8").splitlines() if unsafe.search(line)], path

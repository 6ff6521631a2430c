from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_core import envs
from vllm_core.errors import InvalidArgument, ModelError, WeightError
from vllm_core.tests.weights.checkpoints import (
    LLAMA,
    convert,
    llama_shapes,
    random_tensors,
    write_gguf,
)
from vllm_core.weights.resolve import resolve

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 48,
}


def write_model(folder: Path, config: object = CONFIG, *, weights: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    if weights:
        save_file(random_tensors(llama_shapes()), folder / "model.safetensors")
    return folder


def write_llama_gguf(path: Path) -> Path:
    keys = LLAMA | {"tokenizer.ggml.eos_token_id": 2}
    return write_gguf(path, "llama", keys, convert("llama", random_tensors(llama_shapes())))


def test_a_directory_resolves_to_its_safetensors(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    files = resolve(str(folder))
    assert (files.name, files.load_format) == (str(folder), "safetensors")
    assert files.tokenizer == folder
    assert (files.config.model_type, files.config.hidden_size) == ("llama", 32)
    source = files.open_weights()
    assert sorted(source.names()) == sorted(llama_shapes())
    assert files.num_weight_bytes == source.num_bytes()


def test_a_gguf_file_brings_its_own_config_and_tokenizer(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "m.gguf")
    files = resolve(str(path))
    assert (files.load_format, files.tokenizer) == ("gguf", path)
    assert files.config.num_key_value_heads == 2
    assert files.generation_config == {"eos_token_id": 2}
    assert sorted(files.open_weights().names()) == sorted(llama_shapes())


def test_a_directory_with_one_gguf_and_no_safetensors_resolves_to_it(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "m.gguf")
    assert resolve(str(tmp_path)).tokenizer == path


def test_several_ggufs_in_a_directory_are_listed(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_llama_gguf(tmp_path / name)
    with pytest.raises(ModelError, match=r"found: a\.gguf, b\.gguf; name the file itself"):
        resolve(str(tmp_path))


def test_load_format_decides_between_safetensors_and_gguf(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    path = write_llama_gguf(folder / "m.gguf")
    assert resolve(str(folder)).load_format == "safetensors"
    assert resolve(str(folder), load_format="gguf").load_format == "gguf"
    with pytest.raises(ModelError, match="load_format is safetensors; use auto or gguf"):
        resolve(str(path), load_format="safetensors")
    with pytest.raises(InvalidArgument, match="load_format must be one of"):
        resolve(str(folder), load_format="pickle")


def test_a_dummy_model_needs_only_its_config(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", weights=False)
    files = resolve(str(folder), load_format="dummy")
    assert (files.load_format, files.num_weight_bytes) == ("dummy", None)
    with pytest.raises(ModelError, match="reads no weights"):
        files.open_weights()
    with pytest.raises(ModelError, match="holds no weights"):
        resolve(str(folder))


@pytest.mark.parametrize("eos", [2, [2, 7]])
def test_generation_config_is_passed_on_as_it_is(tmp_path: Path, eos: Any) -> None:
    folder = write_model(tmp_path / "m")
    assert resolve(str(folder)).generation_config == {}
    text = json.dumps({"eos_token_id": eos, "temperature": 0.6})
    (folder / "generation_config.json").write_text(text)
    found = resolve(str(folder)).generation_config
    assert found == {"eos_token_id": eos, "temperature": 0.6}


def test_the_tokenizer_may_lie_elsewhere(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    other = tmp_path / "words"
    other.mkdir()
    assert resolve(str(folder), tokenizer=str(other)).tokenizer == other
    with pytest.raises(ModelError, match=r"did you mean .*words"):
        resolve(str(folder), tokenizer=str(tmp_path / "word"))


@pytest.mark.parametrize("name", ["SmolLM", "smollm.gguf"])
def test_an_unknown_path_names_its_neighbours(tmp_path: Path, name: str) -> None:
    (tmp_path / "SmolLM2").mkdir()
    (tmp_path / "smollm2.gguf").touch()
    with pytest.raises(ModelError, match=r"unknown model .* did you mean .*[mM]2"):
        resolve(str(tmp_path / name))


def test_an_unknown_name_is_compared_with_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories").mkdir()
    with pytest.raises(ModelError, match="did you mean demo"):
        resolve("demmo")
    with pytest.raises(ModelError, match="did you mean stories"):
        resolve("storys")
    with pytest.raises(ModelError, match="no such file or directory"):
        resolve("zzz")


def test_a_misspelt_relative_path_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "stories").mkdir()
    with pytest.raises(ModelError, match="did you mean models/stories"):
        resolve("models/storys")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="neither a directory nor a GGUF file"):
        resolve(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot read"),
        ("[]", "JSON object"),
        ({"hidden_size": 3}, "has no model_type"),
        ({"model_type": ["llama"]}, "has no model_type"),
        ({"model_type": "lama"}, "unknown model_type 'lama': did you mean llama"),
        ({"model_type": "zzzzzz"}, "transformers does not know it"),
        (CONFIG | {"hidden_size": "wide"}, "not accepted by transformers.*hidden_size"),
    ],
)
def test_a_broken_config_is_one_clear_sentence(
    tmp_path: Path, config: object, message: str
) -> None:
    folder = write_model(tmp_path / "m", config)
    with pytest.raises(ModelError, match=message) as raised:
        resolve(str(folder))
    assert "\n" not in str(raised.value)


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve(str(tmp_path))


def test_code_inside_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for model_type in ("llama", "mine"):
        remote = {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": model_type}
        folder = write_model(tmp_path / model_type, CONFIG | remote)
        (folder / "evil.py").write_text(code)
        if model_type == "llama":
            assert type(resolve(str(folder)).config).__name__ == "LlamaConfig"
        else:
            with pytest.raises(ModelError, match="unknown model_type"):
                resolve(str(folder))
    assert not (tmp_path / "ran").exists()


def test_damaged_weights_are_found_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightError, match="truncated"):
        resolve(str(folder))


def resolve_offline(cache: Path, model: str) -> str:
    """The hub's constants are read at import, so each case needs a process of its own."""
    code = (
        "import sys; from vllm_core.weights.resolve import resolve; "
        "from vllm_core.errors import ModelError\n"
        "try: print(sorted(resolve(sys.argv[1]).open_weights().names()))\n"
        "except ModelError as error: print('ModelError', error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_hub_model_is_taken_from_the_local_cache_when_offline(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    write_model(repository / "snapshots" / "abc")
    assert "model.norm.weight" in resolve_offline(tmp_path, "someone/tiny")


def test_an_unreachable_hub_is_one_clear_sentence(tmp_path: Path) -> None:
    said = resolve_offline(tmp_path, "someone/tiny")
    assert said.startswith("ModelError cannot download someone/tiny from the hub")
    assert said.count("\n") == 1


def test_resolving_imports_no_tensor_library_by_itself(tmp_path: Path) -> None:
    code = (
        "import sys, vllm_core.weights.resolve; "
        "print(sorted({'torch', 'jax', 'transformers', 'gguf', 'huggingface_hub'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_models_resolve() -> None:
    data = envs.test_data()
    if data is None:
        pytest.skip("VLLM_CORE_TEST_DATA is not set: real model folders were not resolved")
    files = resolve(str(data / "models" / "stories260K"))
    assert (files.config.num_hidden_layers, files.num_weight_bytes) == (5, 1040128)
    assert files.generation_config == {"bos_token_id": 1, "eos_token_id": 2}
    embed = files.open_weights().load("model.embed_tokens.weight")
    assert embed.shape == (512, 64) and bool(np.isfinite(embed).all())
    smollm = resolve(str(data / "models" / "smollm2-135m-instruct"), load_format="dummy")
    assert smollm.config.num_hidden_layers == 30

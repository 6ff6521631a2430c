from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from transformers import AutoConfig

from vllm_core.errors import ModelError, WeightError
from vllm_core.tests.weights.checkpoints import (
    FFN,
    HEAD,
    HIDDEN,
    LLAMA,
    NUM_EXPERTS,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    VOCAB,
    Array,
    convert,
    llama_shapes,
    random_tensors,
    write_gguf,
)
from vllm_core.weights.gguf import GGUFFile

Q = gguf.GGMLQuantizationType

QWEN3 = LLAMA | {"attention.key_length": HEAD, "attention.value_length": HEAD}
GEMMA = QWEN3 | {"attention.sliding_window": 16}
MOE = {"expert_count": NUM_EXPERTS, "expert_used_count": 2}


def dense(*more: Mapping[str, str], tied: bool = True) -> dict[str, Array]:
    return random_tensors(llama_shapes(tied=tied) | per_layer(*more))


def per_layer(*more: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    sizes = {"head": (HEAD,), "hidden": (HIDDEN,), "kv": (NUM_KV_HEADS * HEAD,)}
    return {
        f"model.layers.{layer}.{name}": sizes[size]
        for layer in range(NUM_LAYERS)
        for vectors in more
        for name, size in vectors.items()
    }


HEAD_NORMS = {"self_attn.q_norm.weight": "head", "self_attn.k_norm.weight": "head"}
BIASES = {
    "self_attn.q_proj.bias": "hidden",
    "self_attn.k_proj.bias": "kv",
    "self_attn.v_proj.bias": "kv",
}
FEEDFORWARD_NORMS = {
    "pre_feedforward_layernorm.weight": "hidden",
    "post_feedforward_layernorm.weight": "hidden",
}


def experts(
    prefix: str, gate: str, down: str, up: str, *more: Mapping[str, str]
) -> dict[str, Array]:
    shapes = {name: shape for name, shape in llama_shapes().items() if ".mlp." not in name}
    for layer in range(NUM_LAYERS):
        at = f"model.layers.{layer}.{prefix}."
        shapes[f"{at}gate.weight"] = (NUM_EXPERTS, HIDDEN)
        for expert in range(NUM_EXPERTS):
            shapes[f"{at}experts.{expert}.{gate}.weight"] = (FFN, HIDDEN)
            shapes[f"{at}experts.{expert}.{down}.weight"] = (HIDDEN, FFN)
            shapes[f"{at}experts.{expert}.{up}.weight"] = (FFN, HIDDEN)
    return random_tensors(shapes | per_layer(*more))


def gpt2() -> dict[str, Array]:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB, HIDDEN),
        "transformer.wpe.weight": (64, HIDDEN),
    }
    norms = ["transformer.ln_f"]
    for layer in range(NUM_LAYERS):
        at = f"transformer.h.{layer}."
        norms += [f"{at}ln_1", f"{at}ln_2"]
        for name, rows, columns in (
            ("attn.c_attn", HIDDEN, 3 * HIDDEN),
            ("attn.c_proj", HIDDEN, HIDDEN),
            ("mlp.c_fc", HIDDEN, FFN),
            ("mlp.c_proj", FFN, HIDDEN),
        ):
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (columns,)}
    for norm in norms:
        shapes |= {f"{norm}.weight": (HIDDEN,), f"{norm}.bias": (HIDDEN,)}
    return random_tensors(shapes)


GPT2 = {name: value for name, value in LLAMA.items() if "kv" not in name and "rope" not in name} | {
    "attention.layer_norm_epsilon": 1e-5
}

CASES = {
    "llama": ("llama", LLAMA, dense()),
    "llama_untied_with_biases": (
        "llama",
        LLAMA,
        dense(BIASES, {"self_attn.o_proj.bias": "hidden"}, tied=False),
    ),
    "mistral": ("llama", LLAMA | {"attention.sliding_window": 16}, dense()),
    "mixtral": ("llama", LLAMA | MOE, experts("block_sparse_moe", "w1", "w2", "w3")),
    "qwen2": ("qwen2", LLAMA, dense(BIASES)),
    "qwen3": ("qwen3", QWEN3, dense(HEAD_NORMS)),
    "qwen3_moe": (
        "qwen3moe",
        QWEN3 | MOE | {"expert_feed_forward_length": FFN},
        experts("mlp", "gate_proj", "down_proj", "up_proj", HEAD_NORMS),
    ),
    "gemma2": ("gemma2", GEMMA, dense(FEEDFORWARD_NORMS)),
    "gemma3": ("gemma3", GEMMA, dense(FEEDFORWARD_NORMS, HEAD_NORMS)),
    "gpt2": ("gpt2", GPT2, gpt2()),
}


def open_llama(tmp_path: Path, keys: dict[str, Any] | None = None, **options: Any) -> GGUFFile:
    tensors = convert("llama", dense()) | options.pop("tensors", {})
    return GGUFFile(write_gguf(tmp_path / "m.gguf", "llama", LLAMA | (keys or {}), tensors))


@pytest.mark.parametrize("case", CASES)
def test_tensors_come_back_as_hugging_face_has_them(tmp_path: Path, case: str) -> None:
    architecture, keys, tensors = CASES[case]
    path = write_gguf(tmp_path / "m.gguf", architecture, keys, convert(architecture, tensors))
    file = GGUFFile(path)
    assert sorted(file.names()) == sorted(tensors)
    for name, expected in tensors.items():
        loaded = file.load(name)
        assert loaded.flags.c_contiguous and loaded.flags.writeable
        assert file.shape(name) == loaded.shape and file.dtype(name) == "float32"
        np.testing.assert_allclose(loaded, expected, rtol=0, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_config_is_one_that_transformers_accepts(tmp_path: Path, case: str) -> None:
    architecture, keys, tensors = CASES[case]
    path = write_gguf(tmp_path / "m.gguf", architecture, keys, convert(architecture, tensors))
    config = AutoConfig.for_model(**GGUFFile(path).config())
    assert config.num_hidden_layers == NUM_LAYERS
    assert config.hidden_size == HIDDEN
    assert config.vocab_size == VOCAB
    assert config.num_attention_heads == NUM_HEADS
    assert config.max_position_embeddings == 64
    assert config.tie_word_embeddings is ("lm_head.weight" not in tensors)
    assert str(config.dtype) == "torch.float32" or config.dtype == "float32"
    if case != "gpt2":
        assert (config.head_dim, config.num_key_value_heads) == (HEAD, NUM_KV_HEADS)
        assert config.intermediate_size == FFN
    if "moe" in case or case == "mixtral":
        assert config.num_experts_per_tok == 2
    if case in ("mistral", "gemma2", "gemma3"):
        assert config.sliding_window == 16
    if case == "llama_untied_with_biases":
        assert config.attention_bias is True


def test_numbers_are_not_changed_by_their_way_through_float32(tmp_path: Path) -> None:
    assert open_llama(tmp_path).config()["rms_norm_eps"] == 1e-5


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.TQ1_0, Q.MXFP4])
def test_a_quantised_tensor_is_dequantised_when_loaded(tmp_path: Path, kind: Q) -> None:
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    tensors = convert("llama", dense())
    value = np.random.default_rng(1).standard_normal((HIDDEN, 2 * block)).astype(np.float32)
    tensors["blk.0.ffn_down.weight"] = value
    path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors, {"blk.0.ffn_down.weight": kind})
    file = GGUFFile(path)
    name = "model.layers.0.mlp.down_proj.weight"
    expected = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
    assert (file.dtype(name), file.shape(name)) == ("float32", value.shape)
    np.testing.assert_array_equal(file.load(name), expected)
    assert file.num_bytes() < sum(array.nbytes for array in tensors.values())


def test_quantised_rows_and_experts_are_reordered_after_dequantising(tmp_path: Path) -> None:
    architecture, keys, tensors = CASES["mixtral"]
    converted = convert(architecture, tensors)
    kinds = {name: Q.Q8_0 for name, array in converted.items() if array.ndim > 1}
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", architecture, keys, converted, kinds))
    for name, expected in tensors.items():
        np.testing.assert_allclose(file.load(name), expected, atol=0.02, err_msg=name)
    assert "dtype" not in file.config()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_plain_dtypes_are_kept(tmp_path: Path, dtype: Any) -> None:
    tensors = convert("llama", dense())
    halves = {n: a.astype(dtype) if a.ndim > 1 else a for n, a in tensors.items()}
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", "llama", LLAMA, halves))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert file.dtype(name) == file.config()["dtype"] == np.dtype(dtype).name
    assert file.load(name).dtype == dtype
    np.testing.assert_array_equal(file.load(name), dense()[name].astype(dtype))


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path: Path) -> None:
    tensors = convert("llama", dense())
    name = "blk.0.ffn_down.weight"
    path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA, tensors, {name: Q.Q8_0})
    raw = path.read_bytes()
    at = raw.index(name.encode()) + len(name) + 4 + 16
    assert struct.unpack_from("<I", raw, at) == (Q.Q8_0,)
    path.write_bytes(raw[:at] + struct.pack("<I", Q.I8) + raw[at + 4 :])
    with pytest.raises(WeightError, match="quantised as I8"):
        GGUFFile(path).load("model.layers.0.mlp.down_proj.weight")


def test_an_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "mamba", {}, {"token_embd.weight": np.ones((2, 2))})
    with pytest.raises(ModelError, match=r"architecture 'mamba'; known are llama, qwen2"):
        GGUFFile(path)


def test_a_file_with_another_magic_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match="is no GGUF file"):
        GGUFFile(path)


@pytest.mark.parametrize("length", [0, 3, 4, 8, 23])
def test_a_stub_of_a_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes((b"GGUF" + struct.pack("<IQQ", 3, 1, 1))[:length])
    with pytest.raises(ModelError):
        GGUFFile(path)


def test_a_file_cut_anywhere_is_truncated(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        LLAMA | {"tokenizer.ggml.token_type": [1] * 500, "tokenizer.ggml.tokens": ["a"] * 50},
        convert("llama", dense()),
    )
    whole = path.read_bytes()
    for length in [*range(24, 4000, 97), *range(4000, len(whole), 4999), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(WeightError, match="truncated"):
            GGUFFile(path)


def test_a_length_beyond_the_file_is_truncated_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    key = b"general.x"
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path.write_bytes(head + struct.pack("<IIQ", 9, gguf.GGUFValueType.UINT32, 2**60) + bytes(64))
    with pytest.raises(WeightError, match="truncated"):
        GGUFFile(path)


def test_overlapping_tensors_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA, convert("llama", dense()))
    raw = path.read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = raw.index(name) + len(name) + 4 + 16 + 4
    (offset,) = struct.unpack_from("<Q", raw, at)
    path.write_bytes(raw[:at] + struct.pack("<Q", offset - 32) + raw[at + 8 :])
    with pytest.raises(WeightError, match="overlap"):
        GGUFFile(path)


def test_a_part_of_a_split_file_says_how_to_join(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="one of 3 parts; join them"):
        open_llama(tmp_path, {"split.count": 3})


def test_a_tensor_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"'blk\.0\.attn_sinks\.weight'"):
        open_llama(tmp_path, tensors={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    keys = {name: value for name, value in LLAMA.items() if name != "context_length"}
    path = write_gguf(tmp_path / "m.gguf", "llama", keys, convert("llama", dense()))
    with pytest.raises(ModelError, match=r"lacks the key llama\.context_length"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.head_count_kv": [1, 2]}, "differs from layer to layer"),
        ({"rope.dimension_count": 4}, "only equal sizes"),
        ({"logit_scale": 0.5}, r"sets llama\.logit_scale"),
        ({"rope.scaling.type": "longrope"}, "rope scaling 'longrope'; known are"),
        ({"rope.scaling.type": "linear"}, "lacks the key"),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.attn_factor": 0.5,
            },
            "only 1 is supported",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        open_llama(tmp_path, keys)


def test_linear_and_yarn_rope_scaling_reach_the_config(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"rope.freq_base": 5e5, "rope.scaling.factor": 4.0}
    linear = open_llama(tmp_path, keys | {"rope.scaling.type": "linear"}).config()
    assert linear["rope_theta"] == 5e5
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = keys | {
        "rope.scaling.type": "yarn",
        "rope.scaling.original_context_length": 16,
        "rope.scaling.yarn_beta_fast": 16.0,
    }
    assert open_llama(tmp_path, yarn).config()["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
    }


def llama3_factors(theta: float, factor: float, size: int, low: float = 1.0) -> Array:
    """What the converter writes as rope_freqs.weight (LlamaModel.generate_extra_tensors)."""
    found = []
    for i in range(size):
        wavelength = 2 * math.pi * theta ** (i / size)
        smooth = (8192 / wavelength - low) / (4.0 - low)
        if wavelength < 8192 / 4.0:
            found.append(1.0)
        elif wavelength > 8192 / low:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_llama3_rope_scaling_is_recovered_from_its_frequencies(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": llama3_factors(5e5, 32.0, HEAD // 2)}
    file = open_llama(tmp_path, {"rope.freq_base": 5e5}, tensors=tensors)
    assert file.config()["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not any("rope" in name for name in file.names())


def test_frequencies_of_another_rule_are_refused(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": llama3_factors(5e5, 32.0, HEAD // 2) + np.float32(0.5)}
    with pytest.raises(ModelError, match="llama3's rule"):
        open_llama(tmp_path, {"rope.freq_base": 5e5}, tensors=tensors)


@pytest.mark.parametrize(("architecture", "largest"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_attention_by_hidden_size_over_heads(
    tmp_path: Path, architecture: str, largest: int
) -> None:
    wide = {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16}
    tensors = {"token_embd.weight": np.ones((VOCAB, HIDDEN), np.float32)}
    for layers, scale in ((NUM_LAYERS, 16), (largest, HIDDEN // NUM_HEADS)):
        keys = GEMMA | wide | {"block_count": layers}
        path = write_gguf(tmp_path / "m.gguf", architecture, keys, tensors)
        assert GGUFFile(path).config()["query_pre_attn_scalar"] == scale


def test_generation_config_lists_every_id_that_ends_a_sequence(tmp_path: Path) -> None:
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    assert open_llama(tmp_path, ids).generation_config() == {"bos_token_id": 1, "eos_token_id": 2}
    more = ids | {"tokenizer.ggml.eot_token_id": 7, "general.sampling.top_k": 20}
    assert open_llama(tmp_path, more).generation_config() == {
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "top_k": 20,
    }


def test_metadata_is_decoded_by_key(tmp_path: Path) -> None:
    file = open_llama(
        tmp_path, {"tokenizer.ggml.tokens": ["a", "é"], "tokenizer.ggml.token_type": [1, 3]}
    )
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "é"]
    assert file.metadata["tokenizer.ggml.token_type"] == [1, 3]
    assert "nothing" not in file.metadata and file.metadata.get("nothing") is None
    assert not any(key.startswith("GGUF.") for key in file.metadata)

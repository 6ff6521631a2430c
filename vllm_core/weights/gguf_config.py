"""Turns the metadata of a GGUF file into the fields of a Hugging Face config.

Knows: what each key means, and what llama.cpp takes for granted. Does not know: config classes,
tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_core.errors import ModelError
from vllm_core.weights.gguf_architectures import REFUSED_KEYS

if TYPE_CHECKING:
    from vllm_core.weights.gguf import GGUFFile

_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_MORE_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_GEMMA_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose attention scale follows hidden size / heads and not the head size
(llama.cpp, load_hparams: GGUF does not carry it)."""

_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The only llama3 rope scaling in use; GGUF carries its result, not its parameters."""


def config_fields(file: GGUFFile) -> dict[str, Any]:
    """The config of the file's model; ModelError when a key is missing or cannot be expressed."""
    keys = _Keys(file)
    architecture = file.architecture
    for key in REFUSED_KEYS:
        if keys.get(key):
            raise ModelError(f"{file.path} sets {keys.name(key)}, which is not supported")
    fields: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.model_class],
        "tie_word_embeddings": not file.has_tensor("output.weight"),
        **architecture.defaults,
        **{field: keys.need(key) for key, field in architecture.config.items()},
    }
    if not file.has_tensor("token_embd.weight"):
        raise ModelError(f"{file.path} holds no token_embd.weight, so it is no language model")
    fields["vocab_size"] = file.gguf_shape("token_embd.weight")[0]
    for field, key in _TOKEN_IDS.items():
        if key in file.metadata:
            fields[field] = file.metadata[key]
    if (dtype := _common_dtype(file)) is not None:
        fields["dtype"] = dtype
    if architecture.model_type != "gpt2":
        fields |= _attention_fields(file, keys) | _rope_fields(file, keys)
    if keys.prefix in _GEMMA_LARGEST:
        fields |= _gemma_fields(keys, fields)
    return fields


def generation_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids (`eos_token_id` is a list when several end a sequence) and sampling defaults."""
    table = _TOKEN_IDS | _SAMPLING
    fields = {field: metadata[key] for field, key in table.items() if key in metadata}
    ends = [fields["eos_token_id"]] if "eos_token_id" in fields else []
    ends += [metadata[key] for key in _MORE_ENDS if key in metadata]
    if len(set(ends)) > 1:
        fields["eos_token_id"] = sorted(set(ends))
    return fields


class _Keys:
    """The keys below the architecture's own prefix."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.prefix: str = file.metadata["general.architecture"]

    def name(self, key: str) -> str:
        return f"{self.prefix}.{key}"

    def get(self, key: str, default: Any = None) -> Any:
        value = self._file.metadata.get(self.name(key), default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, float):  # GGUF holds float32: 1e-5 came back as 9.999999747378752e-06
            value = float(str(np.float32(value)))
        return value

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelError(f"{self._file.path} lacks the key {self.name(key)}")
        if isinstance(value, list):
            raise ModelError(
                f"{self._file.path} has a {self.name(key)} that differs from layer to layer, "
                "which is not supported"
            )
        return value


def _attention_fields(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    num_heads = keys.need("attention.head_count")
    if keys.get("attention.head_count_kv") is None:
        num_kv_heads = num_heads
    else:
        num_kv_heads = keys.need("attention.head_count_kv")
    head_dim = keys.get("attention.key_length", keys.need("embedding_length") // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise ModelError(
                f"{file.path} has heads of size {head_dim} but {keys.name(key)} {keys.get(key)}; "
                "only equal sizes are supported"
            )
    fields: dict[str, Any] = {"num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    if file.architecture.model_type != "qwen2":  # its Q, K and V always have a bias
        fields["attention_bias"] = file.has_tensor("blk.0.attn_q.bias")
    if file.architecture.model_type == "llama":
        fields["mlp_bias"] = file.has_tensor("blk.0.ffn_up.bias")
    return fields


def _rope_fields(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_theta": keys.get("rope.freq_base", 10000.0)}
    kind = keys.get("rope.scaling.type", "none")
    if file.has_tensor("rope_freqs.weight"):
        scaling = _llama3_scaling(file, fields["rope_theta"])
        if kind != "none" and scaling:
            raise ModelError(f"{file.path} scales rope twice, by rope_freqs.weight and by {kind}")
        kind = "none"
    elif kind == "none":
        scaling = None
    elif kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": keys.need("rope.scaling.factor")}
    else:
        raise ModelError(
            f"{file.path} has rope scaling {kind!r}; known are none, linear, yarn and llama3"
        )
    if kind == "yarn" and scaling is not None:
        scaling |= _yarn_fields(file, keys)
    if scaling is not None:
        fields["rope_scaling"] = scaling
    return fields


def _yarn_fields(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        value = keys.get(f"rope.scaling.{key}", 1.0)
        if value != 1.0:
            raise ModelError(
                f"{file.path} sets {keys.name(f'rope.scaling.{key}')} to {value}; "
                "only 1 is supported"
            )
    if keys.get("rope.scaling.yarn_log_multiplier"):
        raise ModelError(
            f"{file.path} sets {keys.name('rope.scaling.yarn_log_multiplier')}, "
            "which is not supported"
        )
    fields = {"original_max_position_embeddings": keys.need("rope.scaling.original_context_length")}
    for field in ("beta_fast", "beta_slow"):
        if (value := keys.get(f"rope.scaling.yarn_{field}")) is not None:
            fields[field] = value
    return fields


def _llama3_scaling(file: GGUFFile, theta: float) -> dict[str, Any] | None:
    """The parameters behind rope_freqs.weight, by which inverse frequencies are divided."""
    found = np.asarray(file.gguf_tensor("rope_freqs.weight"), np.float64)  # [D / 2]
    factor = float(found.max())
    if np.all(found == 1.0):
        return None
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    inverse = theta ** -(np.arange(found.size) / found.size)
    turns = _LLAMA3["original_max_position_embeddings"] * inverse / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.allclose(found, 1.0 / ((1.0 - smooth) / factor + smooth), rtol=1e-3):
        raise ModelError(
            f"{file.path} scales rope by a rope_freqs.weight that does not follow llama3's rule "
            f"with {_LLAMA3}"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _gemma_fields(keys: _Keys, fields: Mapping[str, Any]) -> dict[str, Any]:
    is_largest = fields["num_hidden_layers"] == _GEMMA_LARGEST[keys.prefix]
    per_head = fields["hidden_size"] // fields["num_attention_heads"]
    found: dict[str, Any] = {
        "query_pre_attn_scalar": per_head if is_largest else fields["head_dim"]
    }
    for field, key in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("rope_local_base_freq", "rope.freq_base_swa"),
    ):
        if (value := keys.get(key)) is not None:
            found[field] = value
    return found


def _common_dtype(file: GGUFFile) -> str | None:
    """The dtype of all matrices when they share a plain one; None for a quantised file."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    dtypes = file.gguf_dtypes()
    return names.get(dtypes.pop()) if len(dtypes) == 1 else None

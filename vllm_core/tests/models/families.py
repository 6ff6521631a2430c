"""Tiny models of every family with random weights that make each of their facts matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vllm_core.models import ModelSpec, find_recipe

VOCAB = 96

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = _COMMON | {
    "head_dim": 10,
    "query_pre_attn_scalar": 12,
    "sliding_window": 5,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Family:
    """A transformers config class by name and what to set in it."""

    config: str
    fields: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family("LlamaConfig", _COMMON),
    "llama-biases-tied-llama3": Family(
        "LlamaConfig",
        _COMMON
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 12,
            "rope_parameters": _LLAMA3,
        },
    ),
    "llama-linear": Family(
        "LlamaConfig", _COMMON | {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}
    ),
    "llama-yarn-mscale": Family(
        "LlamaConfig",
        _COMMON
        | {
            "rope_parameters": _YARN
            | {"mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False, "beta_fast": 4}
        },
    ),
    "mistral": Family("MistralConfig", _COMMON | {"head_dim": 10, "sliding_window": 5}),
    "mistral-full": Family("MistralConfig", _COMMON | {"sliding_window": None}),
    "qwen2": Family("Qwen2Config", _COMMON | {"tie_word_embeddings": True}),
    "qwen2-windows": Family(
        "Qwen2Config",
        _COMMON | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3-yarn": Family("Qwen3Config", _COMMON | {"head_dim": 14, "rope_parameters": _YARN}),
    "gemma2": Family(
        "Gemma2Config",
        _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 15.0},
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        _GEMMA
        | {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gpt2": Family(
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 48,
            "n_layer": 3,
            "n_head": 6,
            "n_inner": 40,
            "n_positions": 64,
            "layer_norm_epsilon": 1e-2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt2-scaled-by-layer": Family(
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "layer_norm_epsilon": 1e-2,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": Family(
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "ffn_dim": 40,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 48,
            "pad_token_id": 1,
        },
    ),
    "mixtral": Family(
        "MixtralConfig", _COMMON | {"num_local_experts": 5, "num_experts_per_tok": 2}
    ),
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        _COMMON
        | {
            "head_dim": 14,
            "num_hidden_layers": 4,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "attention_bias": True,
        },
    ),
    "qwen3-moe-renormalised": Family(
        "Qwen3MoeConfig",
        _COMMON
        | {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
}


def config_of(name: str, **fields: Any) -> Any:
    """The family's transformers config, with some fields changed."""
    import transformers

    family = FAMILIES[name]
    return getattr(transformers, family.config)(**(family.fields | fields))


def spec_of(name: str, dtype: str = "float32", **fields: Any) -> ModelSpec:
    """What its recipe makes of that."""
    config = config_of(name, **fields)
    return find_recipe(config).spec(config, dtype)


def make_model(name: str) -> Any:
    """The transformers model in float32, eager, with weights large enough to matter."""
    import transformers

    torch = pytest.importorskip("torch", reason="nothing was compared: the models need torch")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_config(
        config_of(name), attn_implementation="eager", dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                base = float("norm" in key or "ln_" in key) if "weight" in key else 0.0
                if "gemma" in name:
                    base = 0.0  # kept as the distance from 1
                weight.copy_(base + 0.3 * noise)
            elif "embed" in key or "wte" in key or "wpe" in key:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(1.5 * noise * weight.shape[-1] ** -0.5)
    return model


def save(model: Any, folder: Path) -> Path:
    """As a checkpoint with config.json and safetensors."""
    model.save_pretrained(folder)
    return folder

"""How each GGUF architecture is spelled in Hugging Face terms: data only.

Knows: config keys, tensor names, what the converter did to the values. Does not know: files.

Source: llama.cpp's convert_hf_to_gguf.py, read backwards; a test compares the tensor names with the
gguf library's own table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Architecture:
    """One row of the table below."""

    model_type: str
    """The config class in transformers."""
    model_class: str
    config: Mapping[str, str]
    """GGUF key without its architecture -> config field; all of them must be there."""
    top: Mapping[str, str]
    """GGUF tensor -> Hugging Face module."""
    block: Mapping[str, str]
    """The same for `blk.N.*`; "{expert}" splits a tensor that stacks all experts."""
    layers: str = "model.layers."
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Config fields that GGUF does not carry and that differ from transformers' own defaults."""
    permuted: frozenset[str] = frozenset()
    """Q and K rows, which the converter reordered for interleaved rope."""
    transposed: frozenset[str] = frozenset()
    """Matrices that Hugging Face keeps as [in, out]."""
    norm_offset: int = 0
    """What the converter added to every norm weight."""


_CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_EXPERT_CONFIG = _CONFIG | {"expert_used_count": "num_experts_per_tok"}
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = _ATTENTION | {"ffn_norm": "post_attention_layernorm"} | _MLP
_GEMMA_BLOCK = (
    _ATTENTION
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    | _MLP
)
_QK = frozenset({"attn_q", "attn_k"})

MIXTRAL = Architecture(
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    config=_EXPERT_CONFIG | {"expert_count": "num_local_experts"},
    top=_TOP,
    block=_ATTENTION
    | {
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    },
    defaults={"sliding_window": None},
    permuted=_QK,
)
"""GGUF calls it llama; it has expert_count."""

MISTRAL = Architecture(
    model_type="mistral",
    model_class="MistralForCausalLM",
    config=_CONFIG | {"attention.sliding_window": "sliding_window"},
    top=_TOP,
    block=_BLOCK,
    permuted=_QK,
)
"""GGUF calls it llama; only with a sliding window does it differ from Llama."""

ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama",
        model_class="LlamaForCausalLM",
        config=_CONFIG,
        top=_TOP,
        block=_BLOCK,
        permuted=_QK,
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        model_class="Qwen2ForCausalLM",
        config=_CONFIG,
        top=_TOP,
        block=_BLOCK,
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        model_class="Qwen3ForCausalLM",
        config=_CONFIG,
        top=_TOP,
        block=_BLOCK | _HEAD_NORMS,
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        model_class="Qwen3MoeForCausalLM",
        config=_EXPERT_CONFIG
        | {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"},
        top=_TOP,
        block=_ATTENTION
        | _HEAD_NORMS
        | {
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.gate",
            "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
            "ffn_down_exps": "mlp.experts.{expert}.down_proj",
            "ffn_up_exps": "mlp.experts.{expert}.up_proj",
        },
        defaults={"norm_topk_prob": True},
    ),
    "gemma2": Architecture(
        model_type="gemma2",
        model_class="Gemma2ForCausalLM",
        config=_CONFIG | {"attention.sliding_window": "sliding_window"},
        top=_TOP,
        block=_GEMMA_BLOCK,
        norm_offset=1,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        model_class="Gemma3ForCausalLM",
        config=_CONFIG | {"attention.sliding_window": "sliding_window"},
        top=_TOP,
        block=_GEMMA_BLOCK | _HEAD_NORMS,
        norm_offset=1,
    ),
    "gpt2": Architecture(
        model_type="gpt2",
        model_class="GPT2LMHeadModel",
        config={
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        block={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        layers="transformer.h.",
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
}
"""By `general.architecture`."""

NOT_WEIGHTS = frozenset({"rope_freqs", "attn_rot_embd"})
"""Tensors that state rope frequencies: read as config or recomputed."""

REFUSED_KEYS = (
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
)
"""Keys that change the mathematics in a way that none of these config classes can say."""

"""Qwen2, Qwen3 and Qwen3-MoE.

Knows: their configs. Does not know: the decoder.
"""

from __future__ import annotations

from vllm_core.errors import ModelError
from vllm_core.models.recipe import Config, Recipe, activation, count, flag
from vllm_core.models.recipes.rotary import (
    gated_ffns,
    moe_rules,
    rotary_spec,
    rotary_weights,
    uniform_windows,
    windows_by_type,
)
from vllm_core.models.spec import FFNSpec, ModelSpec, MoESpec
from vllm_core.weights.rules import WeightRules

_EXPERTS = moe_rules("mlp.gate", "mlp.experts.{expert}", "gate_proj", "up_proj", "down_proj")


def _qwen2_spec(config: Config, dtype: str) -> ModelSpec:
    return rotary_spec(
        config,
        dtype,
        architecture="Qwen2ForCausalLM",
        windows=windows_by_type(config),
        ffns=gated_ffns(config),
        qkv_bias=True,
    )


def _qwen3_spec(config: Config, dtype: str) -> ModelSpec:
    return rotary_spec(
        config,
        dtype,
        architecture="Qwen3ForCausalLM",
        windows=windows_by_type(config),
        ffns=gated_ffns(config),
        qk_norm=True,
        qkv_bias=flag(config, "attention_bias"),
        output_bias=flag(config, "attention_bias"),
    )


def _qwen3_moe_spec(config: Config, dtype: str) -> ModelSpec:
    return rotary_spec(
        config,
        dtype,
        architecture="Qwen3MoeForCausalLM",
        windows=uniform_windows(config),
        ffns=_moe_ffns(config),
        qk_norm=True,
        qkv_bias=flag(config, "attention_bias"),
        output_bias=flag(config, "attention_bias"),
    )


def _moe_ffns(config: Config) -> list[FFNSpec | MoESpec]:
    """Experts in every `decoder_sparse_step`-th layer that mlp_only_layers does not name."""
    activation(config, "hidden_act", ("silu",))
    moe = MoESpec(
        num_experts=count(config, "num_experts"),
        top_k=count(config, "num_experts_per_tok"),
        size=count(config, "moe_intermediate_size"),
        renormalize=flag(config, "norm_topk_prob"),
    )
    if moe.top_k > moe.num_experts:
        raise ModelError(f"the config routes to {moe.top_k} of {moe.num_experts} experts")
    step, dense = count(config, "decoder_sparse_step"), set(config.mlp_only_layers or ())
    return [
        plain if i in dense or (i + 1) % step else moe for i, plain in enumerate(gated_ffns(config))
    ]


def _weights(spec: ModelSpec, config: Config) -> WeightRules:
    return rotary_weights(spec, moe_rules=_EXPERTS)


QWEN2 = Recipe(("Qwen2ForCausalLM",), "qwen2", _qwen2_spec, _weights)
QWEN3 = Recipe(("Qwen3ForCausalLM",), "qwen3", _qwen3_spec, _weights)
QWEN3_MOE = Recipe(("Qwen3MoeForCausalLM",), "qwen3_moe", _qwen3_moe_spec, _weights)

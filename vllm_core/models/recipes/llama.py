"""Llama and Mistral.

Knows: their configs. Does not know: the decoder.
"""

from __future__ import annotations

from vllm_core.models.recipe import Config, Recipe, flag
from vllm_core.models.recipes.rotary import (
    gated_ffns,
    no_windows,
    rotary_spec,
    rotary_weights,
    uniform_windows,
)
from vllm_core.models.spec import ModelSpec
from vllm_core.weights.rules import WeightRules


def _llama_spec(config: Config, dtype: str) -> ModelSpec:
    return rotary_spec(
        config,
        dtype,
        architecture="LlamaForCausalLM",
        windows=no_windows(config),
        ffns=gated_ffns(config, bias=flag(config, "mlp_bias")),
        qkv_bias=flag(config, "attention_bias"),
        output_bias=flag(config, "attention_bias"),
    )


def _mistral_spec(config: Config, dtype: str) -> ModelSpec:
    return rotary_spec(
        config,
        dtype,
        architecture="MistralForCausalLM",
        windows=uniform_windows(config),
        ffns=gated_ffns(config),
    )


def _weights(spec: ModelSpec, config: Config) -> WeightRules:
    return rotary_weights(spec)


LLAMA = Recipe(("LlamaForCausalLM",), "llama", _llama_spec, _weights)
MISTRAL = Recipe(("MistralForCausalLM",), "mistral", _mistral_spec, _weights)

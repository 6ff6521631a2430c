"""Mixtral.

Knows: its config. Does not know: the decoder.
"""

from __future__ import annotations

from vllm_core.errors import ModelError
from vllm_core.models.recipe import Config, Recipe, activation, count
from vllm_core.models.recipes.rotary import (
    moe_rules,
    rotary_spec,
    rotary_weights,
    uniform_windows,
)
from vllm_core.models.spec import ModelSpec, MoESpec
from vllm_core.weights.rules import WeightRules

_EXPERTS = moe_rules("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}", "w1", "w3", "w2")


def _spec(config: Config, dtype: str) -> ModelSpec:
    activation(config, "hidden_act", ("silu",))
    moe = MoESpec(
        num_experts=count(config, "num_local_experts"),
        top_k=count(config, "num_experts_per_tok"),
        size=count(config, "intermediate_size"),
        renormalize=True,
    )
    if moe.top_k > moe.num_experts:
        raise ModelError(f"the config routes to {moe.top_k} of {moe.num_experts} experts")
    windows = uniform_windows(config)
    return rotary_spec(
        config,
        dtype,
        architecture="MixtralForCausalLM",
        windows=windows,
        ffns=[moe] * len(windows),
    )


def _weights(spec: ModelSpec, config: Config) -> WeightRules:
    return rotary_weights(spec, moe_rules=_EXPERTS)


MIXTRAL = Recipe(("MixtralForCausalLM",), "mixtral", _spec, _weights)

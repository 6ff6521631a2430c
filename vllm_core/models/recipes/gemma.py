"""Gemma 2 and Gemma 3 (text).

Knows: their configs. Does not know: the decoder.
"""

from __future__ import annotations

import numpy as np

from vllm_core.errors import ModelError
from vllm_core.models.recipe import Config, Recipe, count, flag, number, optional_number, refuse
from vllm_core.models.recipes.rotary import (
    FULL,
    SLIDING,
    gated_ffns,
    rotary_spec,
    rotary_weights,
    windows_by_type,
)
from vllm_core.models.rope import RopeParameters
from vllm_core.models.spec import ModelSpec
from vllm_core.weights.rules import WeightRules


def _gemma2_spec(config: Config, dtype: str) -> ModelSpec:
    return _spec(
        config,
        dtype,
        architecture="Gemma2ForCausalLM",
        softcap=optional_number(config, "attn_logit_softcapping"),
    )


def _gemma3_spec(config: Config, dtype: str) -> ModelSpec:
    # transformers reads Gemma 3's attn_logit_softcapping and does not apply it
    refuse(config, {"attn_logit_softcapping": None})
    return _spec(
        config,
        dtype,
        architecture="Gemma3ForCausalLM",
        layer_ropes=_ropes_by_type(config),
        qk_norm=True,
    )


def _spec(
    config: Config,
    dtype: str,
    *,
    architecture: str,
    softcap: float | None = None,
    layer_ropes: list[RopeParameters] | None = None,
    qk_norm: bool = False,
) -> ModelSpec:
    refuse(config, {"use_bidirectional_attention": False})
    return rotary_spec(
        config,
        dtype,
        architecture=architecture,
        windows=windows_by_type(config),
        ffns=gated_ffns(config, "hidden_activation"),
        layer_ropes=layer_ropes,
        scale=number(config, "query_pre_attn_scalar") ** -0.5,
        softcap=softcap,
        qk_norm=qk_norm,
        qkv_bias=flag(config, "attention_bias"),
        output_bias=flag(config, "attention_bias"),
        is_sandwich=True,
        embedding_scale=_rounded(count(config, "hidden_size") ** 0.5, dtype),
        logit_softcap=optional_number(config, "final_logit_softcapping"),
    )


def _rounded(value: float, dtype: str) -> float:
    """As the models were trained: 3072 ** 0.5 is 55.5 in bfloat16, and float32 at the most."""
    import ml_dtypes  # noqa: F401  numpy knows the name "bfloat16" only once this is imported

    return float(np.float32(value).astype(dtype))


def _ropes_by_type(config: Config) -> list[RopeParameters]:
    """Full layers have a frequency base of their own, and perhaps a scaling."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or set(parameters) != {FULL, SLIDING}:
        raise ModelError(
            f"the config's rope_parameters must have tables for {FULL} and {SLIDING}, "
            f"not {parameters!r}"
        )
    return [parameters[kind] for kind in config.layer_types]


def _weights(spec: ModelSpec, config: Config) -> WeightRules:
    return rotary_weights(spec, norm_offset=1.0)


GEMMA2 = Recipe(("Gemma2ForCausalLM",), "gemma2", _gemma2_spec, _weights)
GEMMA3 = Recipe(("Gemma3ForCausalLM",), "gemma3_text", _gemma3_spec, _weights)

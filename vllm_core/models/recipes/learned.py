"""GPT-2 and OPT: learned positions, layer norms, biases everywhere.

Knows: their configs. Does not know: the decoder.
"""

from __future__ import annotations

from typing import Any

from vllm_core.models.recipe import (
    Activation,
    Config,
    Recipe,
    activation,
    attention,
    count,
    flag,
    head_counts,
    number,
    number_layers,
    refuse,
    refuse_common,
)
from vllm_core.models.spec import FFNSpec, LayerSpec, ModelSpec
from vllm_core.weights import rules
from vllm_core.weights.rules import WeightRule, WeightRules

_OPT_POSITION_OFFSET = 2
"""Rows of OPT's position table that no token uses."""

_OPT_EPS = 1e-5
"""OPT's config does not carry it: torch's default."""

_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu", "relu")


def _gpt2_spec(config: Config, dtype: str) -> ModelSpec:
    refuse_common(config)
    size, heads = count(config, "hidden_size"), head_counts(config)
    inner = 4 * size if config.n_inner is None else count(config, "n_inner")
    ffn = FFNSpec(
        inner, activation(config, "activation_function", _ACTIVATIONS), gated=False, bias=True
    )
    scales = [heads[2] ** -0.5 if flag(config, "scale_attn_weights") else 1.0]
    scales *= count(config, "num_hidden_layers")
    if flag(config, "scale_attn_by_inverse_layer_idx"):
        scales = [scale / (i + 1) for i, scale in enumerate(scales)]
    return _spec(
        config,
        dtype,
        architecture="GPT2LMHeadModel",
        scales=scales,
        ffn=ffn,
        bias=True,
        eps=number(config, "layer_norm_epsilon"),
        position_offset=0,
    )


def _opt_spec(config: Config, dtype: str) -> ModelSpec:
    refuse_common(config)
    size, heads = count(config, "hidden_size"), head_counts(config)
    refuse(
        config,
        {
            "do_layer_norm_before": True,
            "word_embed_proj_dim": size,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
        },
    )
    bias = flag(config, "enable_bias")
    kind = activation(config, "activation_function", _ACTIVATIONS)
    return _spec(
        config,
        dtype,
        architecture="OPTForCausalLM",
        scales=[heads[2] ** -0.5] * count(config, "num_hidden_layers"),
        ffn=FFNSpec(count(config, "ffn_dim"), kind, gated=False, bias=bias),
        bias=bias,
        eps=_OPT_EPS,
        position_offset=_OPT_POSITION_OFFSET,
    )


def _spec(
    config: Config,
    dtype: str,
    *,
    architecture: str,
    scales: list[float],
    ffn: FFNSpec,
    bias: bool,
    eps: float,
    position_offset: int,
) -> ModelSpec:
    heads = head_counts(config)
    layers, attention_specs = number_layers(
        [
            LayerSpec(
                attention=attention(heads, dtype, scale=scale),
                attention_index=0,
                kv_layer=0,
                rope=None,
                ffn=ffn,
                norm="layer",
                eps=eps,
                qkv_bias=bias,
                output_bias=bias,
            )
            for scale in scales
        ]
    )
    return ModelSpec(
        architecture=architecture,
        vocab_size=count(config, "vocab_size"),
        hidden_size=count(config, "hidden_size"),
        layers=layers,
        attention_specs=attention_specs,
        ropes=(),
        norm="layer",
        eps=eps,
        max_model_len=count(config, "max_position_embeddings"),
        tied_embeddings=bool(config.tie_word_embeddings),
        position_offset=position_offset,
    )


def _gpt2_weights(spec: ModelSpec, config: Config) -> WeightRules:
    size = spec.hidden_size

    def layer(index: int, layer: LayerSpec) -> dict[str, WeightRule]:
        assert isinstance(layer.ffn, FFNSpec)
        at, name, inner = f"transformer.h.{index}", f"layers.{index}", layer.ffn.size
        return {
            "input_norm": rules.norm(f"{name}.input_norm", f"{at}.ln_1", size, bias=True),
            "qkv": rules.transposed_linear(f"{name}.qkv", f"{at}.attn.c_attn", 3 * size, size),
            "output": rules.transposed_linear(f"{name}.output", f"{at}.attn.c_proj", size, size),
            "ffn_norm": rules.norm(f"{name}.ffn_norm", f"{at}.ln_2", size, bias=True),
            "up": rules.transposed_linear(f"{name}.up", f"{at}.mlp.c_fc", inner, size),
            "down": rules.transposed_linear(f"{name}.down", f"{at}.mlp.c_proj", size, inner),
        }

    return _weights(
        spec,
        [layer(i, one) for i, one in enumerate(spec.layers)],
        embed="transformer.wte",
        positions="transformer.wpe",
        norm="transformer.ln_f",
        prefix="transformer.",
        ignored=(r".*\.attn\.(bias|masked_bias)",),  # the causal mask
    )


def _opt_weights(spec: ModelSpec, config: Config) -> WeightRules:
    size = spec.hidden_size

    def layer(index: int, layer: LayerSpec) -> dict[str, WeightRule]:
        assert isinstance(layer.ffn, FFNSpec)
        at, name, bias = f"model.decoder.layers.{index}", f"layers.{index}", layer.qkv_bias
        qkv = [(f"{at}.self_attn.{which}_proj", size) for which in "qkv"]
        inner = layer.ffn.size
        return {
            "input_norm": rules.norm(
                f"{name}.input_norm", f"{at}.self_attn_layer_norm", size, bias=True
            ),
            "qkv": rules.linear(f"{name}.qkv", *qkv, size=size, bias=bias),
            "output": rules.linear(
                f"{name}.output", (f"{at}.self_attn.out_proj", size), size=size, bias=bias
            ),
            "ffn_norm": rules.norm(f"{name}.ffn_norm", f"{at}.final_layer_norm", size, bias=True),
            "up": rules.linear(f"{name}.up", (f"{at}.fc1", inner), size=size, bias=bias),
            "down": rules.linear(f"{name}.down", (f"{at}.fc2", size), size=inner, bias=bias),
        }

    return _weights(
        spec,
        [layer(i, one) for i, one in enumerate(spec.layers)],
        embed="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        norm="model.decoder.final_layer_norm",
        prefix="model.",
    )


def _weights(
    spec: ModelSpec,
    layers: list[dict[str, WeightRule]],
    *,
    embed: str,
    positions: str,
    norm: str,
    prefix: str,
    ignored: tuple[str, ...] = (),
) -> WeightRules:
    size = spec.hidden_size
    num_positions = spec.max_model_len + (spec.position_offset or 0)
    params: dict[str, Any] = {
        "embed": rules.embedding("embed", embed, spec.vocab_size, size),
        "positions": rules.embedding("positions", positions, num_positions, size, stays_dense=True),
        "layers": layers,
        "norm": rules.norm("norm", norm, size, bias=True),
    }
    if spec.tied_embeddings:
        params["head"] = params["embed"]
        ignored = (*ignored, r"lm_head\.weight")
    else:
        params["head"] = rules.linear("head", ("lm_head", spec.vocab_size), size=size, bias=False)
    return WeightRules(params, ignored, prefix)


GPT2 = Recipe(("GPT2LMHeadModel",), "gpt2", _gpt2_spec, _gpt2_weights)
OPT = Recipe(("OPTForCausalLM",), "opt", _opt_spec, _opt_weights)

"""What Llama's descendants share: RMS norms, rotary positions, gated feed-forward layers, names.

Knows: the facts that vary among them, as arguments. Does not know: which family sets which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm_core.errors import ModelError, NotSupported
from vllm_core.models.recipe import (
    Config,
    activation,
    attention,
    count,
    head_counts,
    number,
    number_layers,
    refuse_common,
)
from vllm_core.models.rope import RopeParameters, context_length, rope_spec
from vllm_core.models.spec import FFNSpec, LayerSpec, ModelSpec, MoESpec
from vllm_core.weights import rules
from vllm_core.weights.rules import WeightRule, WeightRules

FULL, SLIDING = "full_attention", "sliding_attention"

MoERules = Callable[[str, MoESpec, int], dict[str, WeightRule]]
"""(prefix of the layer's names, its MoESpec, hidden size) -> router, gate_up, down."""


def rotary_spec(
    config: Config,
    dtype: str,
    *,
    architecture: str,
    windows: Sequence[int | None],
    ffns: Sequence[FFNSpec | MoESpec],
    layer_ropes: Sequence[RopeParameters] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
    is_sandwich: bool = False,
    embedding_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> ModelSpec:
    """windows, ffns and layer_ropes have one entry per layer.

    layer_ropes None: config.rope_parameters in every layer.
    """
    refuse_common(config)
    heads = head_counts(config)
    eps = number(config, "rms_norm_eps")
    length = count(config, "max_position_embeddings")
    if layer_ropes is None:
        layer_ropes = [_rope_parameters(config)] * len(windows)
    ropes = [rope_spec(parameters, heads[2], length) for parameters in layer_ropes]
    distinct = tuple(dict.fromkeys(ropes))
    layers = [
        LayerSpec(
            attention=attention(
                heads,
                dtype,
                scale=heads[2] ** -0.5 if scale is None else scale,
                window=window,
                softcap=softcap,
            ),
            attention_index=0,
            kv_layer=0,
            rope=distinct.index(rope),
            ffn=ffn,
            norm="rms",
            eps=eps,
            is_sandwich=is_sandwich,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
        )
        for window, ffn, rope in zip(windows, ffns, ropes, strict=True)
    ]
    numbered, attention_specs = number_layers(layers)
    return ModelSpec(
        architecture=architecture,
        vocab_size=count(config, "vocab_size"),
        hidden_size=count(config, "hidden_size"),
        layers=numbered,
        attention_specs=attention_specs,
        ropes=distinct,
        norm="rms",
        eps=eps,
        max_model_len=max(context_length(parameters, length) for parameters in layer_ropes),
        tied_embeddings=bool(config.tie_word_embeddings),
        embedding_scale=embedding_scale,
        logit_softcap=logit_softcap,
    )


def _rope_parameters(config: Config) -> RopeParameters:
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        raise ModelError(f"the config's rope_parameters must be a table, not {parameters!r}")
    return parameters


def gated_ffns(config: Config, name: str = "hidden_act", *, bias: bool = False) -> list[FFNSpec]:
    """The same gated feed-forward layer in every layer; `name`: the field with its activation."""
    kind = activation(config, name, ("silu", "gelu_tanh"))
    ffn = FFNSpec(count(config, "intermediate_size"), kind, gated=True, bias=bias)
    return [ffn] * count(config, "num_hidden_layers")


def uniform_windows(config: Config) -> list[int | None]:
    """`sliding_window` in every layer if it is set; layer_types that say otherwise are refused."""
    window = None
    if getattr(config, "sliding_window", None) is not None:
        window = count(config, "sliding_window")
    expected = FULL if window is None else SLIDING
    return [window] * len(_layer_types(config, allowed=(expected,), default=expected))


def windows_by_type(config: Config) -> list[int | None]:
    """`sliding_window` in the layers that `layer_types` calls sliding."""
    types = _layer_types(config, allowed=(FULL, SLIDING), default=None)
    return [count(config, "sliding_window") if kind == SLIDING else None for kind in types]


def no_windows(config: Config) -> list[int | None]:
    """Full attention in every layer; layer_types that say otherwise are refused."""
    return [None] * len(_layer_types(config, allowed=(FULL,), default=FULL))


def _layer_types(config: Config, allowed: tuple[str, ...], default: str | None) -> list[str]:
    num_layers = count(config, "num_hidden_layers")
    types = getattr(config, "layer_types", None)
    if types is None and default is not None:
        types = [default] * num_layers
    if not isinstance(types, list) or len(types) != num_layers:
        raise ModelError(
            f"the config's layer_types must name the kinds of {num_layers} layers, not {types!r}"
        )
    for kind in types:
        if kind not in allowed:
            raise NotSupported(
                f"the config's layer_types hold {kind!r}; known here are {', '.join(allowed)}"
            )
    return types


def rotary_weights(
    spec: ModelSpec, *, norm_offset: float = 0.0, moe_rules: MoERules | None = None
) -> WeightRules:
    """Llama's names. norm_offset: what the family adds to norm weights; moe_rules: its experts."""
    embed = rules.embedding("embed", "model.embed_tokens", spec.vocab_size, spec.hidden_size)
    ignored = [r".*\.rotary_emb\.inv_freq"]
    if spec.tied_embeddings:
        ignored.append(r"lm_head\.weight")
        head = embed
    else:
        head = rules.linear("head", ("lm_head", spec.vocab_size), size=spec.hidden_size, bias=False)
    return WeightRules(
        {
            "embed": embed,
            "layers": [
                _layer_rules(i, layer, spec.hidden_size, norm_offset, moe_rules)
                for i, layer in enumerate(spec.layers)
            ],
            "norm": rules.norm("norm", "model.norm", spec.hidden_size, add=norm_offset),
            "head": head,
        },
        ignored=tuple(ignored),
        prefix="model.",
    )


def _layer_rules(
    index: int, layer: LayerSpec, size: int, norm_offset: float, moe_rules: MoERules | None
) -> dict[str, Any]:
    at, name = f"model.layers.{index}", f"layers.{index}"
    a = layer.attention
    q, k, v = a.num_q_heads * a.dim_qk, a.num_kv_heads * a.dim_qk, a.num_kv_heads * a.dim_v
    out: dict[str, WeightRule] = {
        "qkv": rules.linear(
            f"{name}.qkv",
            (f"{at}.self_attn.q_proj", q),
            (f"{at}.self_attn.k_proj", k),
            (f"{at}.self_attn.v_proj", v),
            size=size,
            bias=layer.qkv_bias,
        ),
        "output": rules.linear(
            f"{name}.output",
            (f"{at}.self_attn.o_proj", size),
            size=a.num_q_heads * a.dim_v,
            bias=layer.output_bias,
        ),
    }
    norms = {
        "input_norm": ("input_layernorm", size),
        "ffn_norm": ("post_attention_layernorm", size),
    }
    if layer.is_sandwich:
        norms["post_attention_norm"] = norms["ffn_norm"]
        norms["ffn_norm"] = ("pre_feedforward_layernorm", size)
        norms["post_ffn_norm"] = ("post_feedforward_layernorm", size)
    if layer.qk_norm:
        norms["q_norm"] = ("self_attn.q_norm", a.dim_qk)
        norms["k_norm"] = ("self_attn.k_norm", a.dim_qk)
    for key, (module, width) in norms.items():
        out[key] = rules.norm(f"{name}.{key}", f"{at}.{module}", width, add=norm_offset)
    if isinstance(layer.ffn, FFNSpec):
        return out | _gated_rules(name, at, layer.ffn, size)
    if moe_rules is None:
        raise AssertionError("a family with experts brings their rules")
    return out | moe_rules(at, layer.ffn, size)


def _gated_rules(name: str, at: str, ffn: FFNSpec, size: int) -> dict[str, WeightRule]:
    return {
        "gate_up": rules.linear(
            f"{name}.gate_up",
            (f"{at}.mlp.gate_proj", ffn.size),
            (f"{at}.mlp.up_proj", ffn.size),
            size=size,
            bias=ffn.bias,
        ),
        "down": rules.linear(
            f"{name}.down", (f"{at}.mlp.down_proj", size), size=ffn.size, bias=ffn.bias
        ),
    }


def moe_rules(router: str, experts: str, gate: str, up: str, down: str) -> MoERules:
    """Rules for experts of these names below the layer; `experts` holds {expert}."""

    def make(at: str, moe: MoESpec, size: int) -> dict[str, WeightRule]:
        name = at.removeprefix("model.")
        source, n = f"{at}.{experts}", moe.num_experts
        return {
            "router": rules.linear(
                f"{name}.router", (f"{at}.{router}", n), size=size, bias=False, stays_dense=True
            ),
            "gate_up": rules.experts(f"{name}.gate_up", source, (gate, up), n, moe.size, size),
            "down": rules.experts(f"{name}.down", source, (down,), n, size, moe.size),
        }

    return make

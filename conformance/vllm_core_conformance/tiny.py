"""Tiny seeded decoders: facts, the core's spec of them, weights, and how these get onto a device.

Knows: specs, weights. Does not know: what is right (oracle), engines, cases.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.models import ModelSpec
from vllm_core.models.recipe import attention, number_layers
from vllm_core.models.spec import FFNSpec, LayerSpec, MoESpec, RopeSpec
from vllm_core.ops import Param, ParamSpec, Part
from vllm_core.runner.memory import AHEAD
from vllm_core_conformance.oracle.model import Blueprint, Layer
from vllm_core_conformance.target import Target, calling, numpy_dtype

Numbers = NDArray[Any]

EOS = (3,)
VOCAB = 71
"""More than one segment of 64, and no multiple of anything."""

PLAIN = Blueprint("plain", VOCAB, 32, (Layer(4, 2, 8, 48),) * 3)
WINDOWS = Blueprint(
    "windows",
    VOCAB,
    32,
    tuple(
        Layer(
            6,
            2,
            16,
            40,
            window=window,
            softcap=7.5,
            activation="gelu_tanh",
            sandwich=True,
            qk_norm=True,
            theta=theta,
        )
        for window, theta in ((6, 10.0), (None, 500.0)) * 2
    ),
    tied=True,
    embedding_scale=1.5,
    logit_softcap=30.0,
)
"""Window and full layers in turn, in one pool, each kind with its own rotary frequencies; G = 3."""
POOLS = Blueprint(
    "pools", VOCAB, 40, tuple(Layer(5, 1, 8, 24, window=w, biases=True) for w in (None, 5, 5))
)
"""Groups of unequal size, so that each has a pool; G = 5."""
EXPERTS = Blueprint("experts", VOCAB, 32, (Layer(4, 4, 8, 24, experts=5, top_k=2),) * 2)
"""A mixture of experts; G = 1."""
LEARNED = Blueprint(
    "learned",
    VOCAB,
    32,
    tuple(
        Layer(2, 2, 16, 40, activation=kind, gated=False, norm="layer", rotates=False, biases=True)
        for kind in ("relu", "gelu")
    ),
    tied=True,
    position_offset=2,
    logit_scale=0.5,
)
"""Learned positions, layer norms, biases everywhere."""


# ---------------------------------------------------------------- a blueprint in the core's words
def spec_of(blueprint: Blueprint, dtype: str) -> ModelSpec:
    layers = [_layer_spec(blueprint, layer, dtype) for layer in blueprint.layers]
    numbered, specs = number_layers(layers)
    return ModelSpec(
        architecture=f"conformance model {blueprint.name!r}",
        vocab_size=blueprint.vocab,
        hidden_size=blueprint.hidden,
        layers=numbered,
        attention_specs=specs,
        ropes=_ropes(blueprint),
        norm=blueprint.layers[0].norm,
        eps=blueprint.eps,
        max_model_len=blueprint.max_len,
        tied_embeddings=blueprint.tied,
        embedding_scale=blueprint.embedding_scale,
        position_offset=blueprint.position_offset,
        logit_softcap=blueprint.logit_softcap,
        logit_scale=blueprint.logit_scale,
    )


def _ropes(blueprint: Blueprint) -> tuple[RopeSpec, ...]:
    """Each once, in the order of the layers."""
    rotating = [layer for layer in blueprint.layers if layer.rotates]
    found = (RopeSpec(layer.dim, blueprint.frequency_of(layer), 1.0) for layer in rotating)
    return tuple(dict.fromkeys(found))


def _rope_of(blueprint: Blueprint, layer: Layer) -> int | None:
    if not layer.rotates:
        return None
    return _ropes(blueprint).index(RopeSpec(layer.dim, blueprint.frequency_of(layer), 1.0))


def _layer_spec(blueprint: Blueprint, layer: Layer, dtype: str) -> LayerSpec:
    ffn: FFNSpec | MoESpec = FFNSpec(layer.ffn, layer.activation, layer.gated, layer.biases)
    if layer.experts:
        ffn = MoESpec(layer.experts, layer.top_k, layer.ffn, layer.renormalize)
    heads = (layer.q_heads, layer.kv_heads, layer.dim)
    return LayerSpec(
        attention=attention(
            heads, dtype, scale=layer.scale, window=layer.window, softcap=layer.softcap
        ),
        attention_index=0,
        kv_layer=0,
        rope=_rope_of(blueprint, layer),
        ffn=ffn,
        norm=layer.norm,
        eps=blueprint.eps,
        is_sandwich=layer.sandwich,
        qk_norm=layer.qk_norm,
        qkv_bias=layer.biases,
        output_bias=layer.biases,
    )


# ---------------------------------------------------------------- weights
def make_weights(blueprint: Blueprint, seed: int, round_to: Callable[[Numbers], Numbers]) -> Any:
    """float64 arrays that the dtype holds exactly, in the form of oracle.model.Weights."""
    rng = np.random.default_rng([seed, zlib.crc32(blueprint.name.encode())])
    size = blueprint.hidden
    own_experts = max(layer.experts for layer in blueprint.layers)

    def matrix(*shape: int, scale: float) -> Numbers:
        return round_to(rng.standard_normal(shape) * scale * shape[-1] ** -0.5)

    def norm(length: int, kind: str) -> dict[str, Numbers]:
        found = {"weight": round_to(1 + 0.1 * rng.standard_normal(length))}
        if kind == "layer":
            found["bias"] = round_to(0.1 * rng.standard_normal(length))
        return found

    def linear(rows: int, length: int, scale: float, bias: bool) -> dict[str, Numbers]:
        found = {"weight": matrix(rows, length, scale=scale)}
        if bias:
            found["bias"] = round_to(0.2 * rng.standard_normal(rows))
        return found

    def layer(facts: Layer) -> dict[str, Any]:
        heads = facts.q_heads + 2 * facts.kv_heads
        own: dict[str, Any] = {
            "input_norm": norm(size, facts.norm),
            "qkv": linear(heads * facts.dim, size, 1.3, facts.biases),
            "output": linear(size, facts.q_heads * facts.dim, 2.0, facts.biases),
            "ffn_norm": norm(size, facts.norm),
        }
        if facts.qk_norm:
            own |= {"q_norm": norm(facts.dim, facts.norm), "k_norm": norm(facts.dim, facts.norm)}
        if facts.sandwich:
            own |= {name: norm(size, facts.norm) for name in SANDWICH}
        if facts.experts:
            return own | _expert_weights(facts, size, own, matrix)
        if facts.gated:
            own["gate_up"] = linear(2 * facts.ffn, size, 1.5, facts.biases)
        else:
            own["up"] = linear(facts.ffn, size, 1.5, facts.biases)
        own["down"] = linear(size, facts.ffn, 2.0, facts.biases)
        return own

    embed = rng.standard_normal((blueprint.vocab, size))
    if own_experts:
        embed = _tagged(embed, own_experts, rng)
    if blueprint.tied:
        embed *= np.exp(0.5 * rng.standard_normal((blueprint.vocab, 1)))
    weights: dict[str, Any] = {
        "embed": {"weight": round_to(embed)},
        "layers": [layer(facts) for facts in blueprint.layers],
        "norm": norm(size, blueprint.layers[0].norm),
    }
    if blueprint.position_offset is not None:
        rows = blueprint.max_len + AHEAD + blueprint.position_offset
        weights["positions"] = {"weight": round_to(0.5 * rng.standard_normal((rows, size)))}
    if not blueprint.tied:
        # rows of very different length: the best token stands out from the noise of the others
        length = np.exp(1.0 * rng.standard_normal((blueprint.vocab, 1)))
        head = rng.standard_normal((blueprint.vocab, size)) * length * size**-0.5 * 3.0
        weights["head"] = {"weight": round_to(head)}
    return weights


SANDWICH = ("post_attention_norm", "post_ffn_norm")


def _tagged(embed: Numbers, experts: int, rng: np.random.Generator) -> Numbers:
    """The first dims of an embedding name the token's experts: routing then has wide margins, which
    no honest rounding crosses."""
    embed = embed.copy()
    embed[:, :experts] = 0.0
    for row in embed:
        first, second = rng.permutation(experts)[:2]
        row[first], row[second] = 3.0, 2.0
    return embed


def _expert_weights(
    facts: Layer, size: int, own: dict[str, Any], matrix: Callable[..., Numbers]
) -> dict[str, Any]:
    """Experts; nothing but the embedding writes into the dims that the router reads."""
    own["output"]["weight"][: facts.experts] = 0.0
    router = np.zeros((facts.experts, size))
    router[np.arange(facts.experts), np.arange(facts.experts)] = 2.0
    down = matrix(facts.experts, size, facts.ffn, scale=2.0)
    down[:, : facts.experts] = 0.0
    return {
        "router": {"weight": router},
        "gate_up": {"weight": matrix(facts.experts, 2 * facts.ffn, size, scale=1.5)},
        "down": {"weight": down},
    }


def load(target: Target, spec: ModelSpec, weights: Any) -> dict[str, Any]:
    """On the device, fused weights in parts as a loader brings them."""
    wide = np.dtype(np.float64) if target.dtype == "float64" else np.dtype(np.float32)
    stored = numpy_dtype(target.dtype)

    def one(name: str, tensors: Mapping[str, Numbers], cuts: Sequence[int] = ()) -> Param:
        weight = tensors["weight"]
        is_norm = weight.ndim == 1
        role = "norm" if is_norm else "experts" if weight.ndim == 3 else "linear"
        if name in ("embed", "positions"):
            role = "embedding"
        kind = wide if is_norm else stored
        pieces = {key: np.split(x.astype(kind), cuts) for key, x in tensors.items()}
        parts = [
            Part("dense", {key: piece[i] for key, piece in pieces.items()}, len(rows))
            for i, rows in enumerate(pieces["weight"])
        ]
        return target.load(ParamSpec(name, weight.shape, role), parts)

    def layer(number: int, own: Mapping[str, Any]) -> dict[str, Param]:
        a = spec.layers[number].attention
        q, kv = a.num_q_heads * a.dim_qk, a.num_kv_heads * a.dim_qk
        found = {}
        for name, tensors in own.items():
            cuts: tuple[int, ...] = ()
            if name == "qkv":
                cuts = (q, q + kv)
            elif name == "gate_up" and tensors["weight"].ndim == 2:
                cuts = (len(tensors["weight"]) // 2,)
            found[name] = one(f"layers.{number}.{name}", tensors, cuts)
        return found

    params: dict[str, Any] = {
        name: one(name, tensors) for name, tensors in weights.items() if name != "layers"
    }
    if spec.tied_embeddings:
        params["head"] = params["embed"]
    layers = [layer(number, own) for number, own in enumerate(weights["layers"])]
    with calling("stack_layers"):
        params["layers"] = target.ops.stack_layers(layers, spec.layers)
    return params
